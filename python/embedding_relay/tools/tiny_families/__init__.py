"""The families that tiny models are made of: what differs between them, a file for each kind of tower."""
