"""The training of a run: its step and loss, the compiled program, the loop, and its records."""
