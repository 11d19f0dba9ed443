"""The threads and sockets that carry out what the protocol asks for."""
