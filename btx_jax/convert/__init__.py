"""Hugging Face checkpoints in and out. Nothing else knows their names, files or formats."""
