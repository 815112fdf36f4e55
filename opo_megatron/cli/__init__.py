"""The command `opo`, one file per command."""
