"""`python -m btx_jax` is the same as the command `btx`."""

from btx_jax.main import cli

if __name__ == '__main__':
  cli()
