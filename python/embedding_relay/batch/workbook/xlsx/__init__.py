""".xlsx files: read in constant memory, and written back byte for byte with more cells."""
