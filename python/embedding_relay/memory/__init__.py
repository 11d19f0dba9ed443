"""Registered memory, the data plane that writes into a peer's, and the proofs that nothing more can land there."""
