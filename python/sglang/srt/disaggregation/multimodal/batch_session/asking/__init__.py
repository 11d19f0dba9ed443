"""Asking an OpenAI-compatible endpoint: one row's question, one attempt, the run over all rows. Knows no session."""
