"""A run: its directory, its events, its checkpoints, its progress on the terminal, and how it is launched."""
