"""The HTTP service: its processes, its calls, its page, its metrics."""
