"""Workbooks as files: what is in them, what each row asks, and the same file with the answers. Knows no session."""
