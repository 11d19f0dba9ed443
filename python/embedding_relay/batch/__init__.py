"""Batch sessions: a workbook of prompts, run to the end. Needs no SGLang, no torch."""
