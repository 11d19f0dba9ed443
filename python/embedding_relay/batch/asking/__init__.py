"""Asking about many rows: how many at once, what to try again, when to wait."""
