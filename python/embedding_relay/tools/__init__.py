"""The `sglang-relay` command: demo, local servers, tiny models."""
