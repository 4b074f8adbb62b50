"""What the gateway and the workers must agree on, written once: both import it, and every archive carries it.

It imports neither serve nor handlers, and nothing that costs a worker's start: the standard library only.
"""
