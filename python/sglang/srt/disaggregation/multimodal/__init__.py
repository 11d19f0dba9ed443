"""What runs inside SGLang: hooks, the two halves in its scheduler, and what SGLang must be told."""
