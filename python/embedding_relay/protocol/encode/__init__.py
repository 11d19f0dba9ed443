"""The encode side of the protocol: rooms whose rows are sent, and the sessions that they are sent to."""
