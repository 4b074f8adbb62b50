"""What the server writes down: a line per request, what goes wrong, and what TorchServe and the workers say.

Of what a client sends only its request id gets into a line, and that is checked; of an exception its type and where it
was raised, for its text may quote anything.
"""
