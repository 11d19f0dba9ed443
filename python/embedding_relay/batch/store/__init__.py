"""What worker processes share: small values and leases, in a file (diskcache) or in Redis."""
