"""`python -m btx_jax` is the command `btx`."""

from btx_jax.main import cli

if __name__ == '__main__':
  cli()
