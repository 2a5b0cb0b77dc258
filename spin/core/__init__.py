"""Errors, files, ranks and the terminal: what every other folder needs."""
