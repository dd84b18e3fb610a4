"""Recipes, installed as btx_jax.configs: start a config of your own from one."""
