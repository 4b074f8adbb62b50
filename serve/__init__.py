"""The server around TorchServe. It never imports torch."""

__version__ = "0.1.0"
