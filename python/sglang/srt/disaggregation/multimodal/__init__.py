"""Encode/language disaggregation with resumable embedding transfer."""
