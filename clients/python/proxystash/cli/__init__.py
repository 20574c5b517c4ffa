"""The command line `proxystash`."""

from proxystash.cli.main import app, main

__all__ = ["app", "main"]
