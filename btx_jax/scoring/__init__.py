"""Evaluation: bits per byte by domain, ensembles of unmixed experts, and scores of all models."""
