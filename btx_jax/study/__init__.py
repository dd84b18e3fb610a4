"""A config and its working directory: the runs, their plan, and what files say of them."""
