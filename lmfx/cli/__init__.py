"""The command line: the stages of `lmfx.compress` by their names. `lmfx.cli.main.main` is the `lmfx` command."""
