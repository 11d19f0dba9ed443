"""Asking the endpoint about many rows: how many at once, what is asked again, how long to wait."""
