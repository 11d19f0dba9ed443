"""Encode/language disaggregation with resumable embedding transfer: everything that knows nothing of SGLang."""

__version__ = "0.1.0"
