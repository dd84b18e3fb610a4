"""A config and its working directory: the plan of its runs, their parameters, their manifests."""
