"""A run's training: the train step, what is compiled, the loop around it, and what is recorded."""
