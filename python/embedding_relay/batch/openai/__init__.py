"""OpenAI's Files and Batches API over the same sessions."""
