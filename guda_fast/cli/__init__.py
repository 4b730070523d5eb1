"""The command line, one file a command."""

from guda_fast.cli.app import main

__all__ = ["main"]
