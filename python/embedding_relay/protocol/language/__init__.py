"""The language side of the protocol: rooms whose rows are received, and the peers that they come from."""
