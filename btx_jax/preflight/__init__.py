"""Preflight: what a run would cost on other devices, read from the program compiled for them."""
