"""Reads and writes Hugging Face models; only this package knows their names, files and formats."""
