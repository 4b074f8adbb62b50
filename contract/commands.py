"""What the gateway tells a worker beside clients' requests, and the headers of both.

A command is a request with the header COMMAND. It needs the key, which the gateway gives its TorchServe in the
environment: anybody could have models parked and files opened otherwise.
"""

VERSION = 2
"""Of commands and tickets, as an archive's model-config.yaml names it (`handler.commands`). An archive of another
version is served as one of another make: by plain requests, and never parked.
"""

PREFIX = "x-palimpsest-"
"""Of the headers that are ours: none of a client's reaches a worker, all of a worker's reach the client."""

COMMAND = PREFIX + "command"
KEY = PREFIX + "key"
KEY_VARIABLE = "PALIMPSEST_COMMAND_KEY"
REQUEST = PREFIX + "request"
"""The id of the client's request, for what the worker logs meanwhile (contract/marking.py)."""

ANSWER = "answer"
"""Answers a client's request, which a ticket names (contract/ticket.py)."""
CONVERT = "convert"
"""Gives the picture in a ticket's field `image` back as a file of the kind that is accepted. The model is not asked."""
PARK = "park"
"""Gives the weights' memory back and keeps the worker."""
WAKE = "wake"
"""Undoes PARK."""
SUSPEND = "suspend"
"""Takes a parked worker off its GPU altogether. Whatever fails from here on, it is to be ended."""
RESUME = "resume"
"""Undoes SUSPEND: the worker is parked again."""
STATUS = "status"
"""Changes nothing."""
