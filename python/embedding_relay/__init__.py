"""Encode/language disaggregation with resumable embedding transfer: everything that knows nothing of SGLang."""
