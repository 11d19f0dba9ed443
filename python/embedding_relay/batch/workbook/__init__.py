"""Workbooks (.xlsx, .csv, .jsonl): what an upload holds, what each row asks, and the same file with the answers."""
