"""Workbooks as files: what is in them, what each row asks, where answers go."""
