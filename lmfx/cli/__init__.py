"""The command line: the stages of `lmfx.compress` by their names. `main` is the `lmfx` command."""

from lmfx.cli.command_line import main

__all__ = ["main"]
