"""The ``.pet`` file. No torch."""
