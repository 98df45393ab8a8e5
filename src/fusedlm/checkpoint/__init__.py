"""Checkpoints in and out: Hugging Face directories and GGUF files, by path or by name."""
