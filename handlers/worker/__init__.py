"""The life cycle of a model in a worker, and what it shares with the gateway."""
