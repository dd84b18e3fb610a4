"""The recipes, installed as btx_jax.configs: a config of yours can start from one."""
