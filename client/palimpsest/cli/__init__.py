"""The `palimpsest` command: its own commands edit pictures; the server, where it is installed too, adds others."""

from palimpsest.cli.app import app


def run() -> None:
    """Entry point."""
    app()
