"""The background work of each process: splitting workbooks into tasks, and running the tasks."""
