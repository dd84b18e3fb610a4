"""Evaluation: bits per byte by domain, ensembles of unmixed experts, tasks, and stored scores."""
