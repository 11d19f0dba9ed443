"""One session: its state, which all workers share, and its files."""
