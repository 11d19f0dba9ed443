"""Batch sessions: a workbook of prompts, run to the end against any OpenAI-compatible endpoint."""
