"""Eight fake CPU devices, and nothing that jax lets pass silently."""

from importlib import metadata
import os

# XLA's thread pool: with fewer threads than devices, collectives can wait for each other.
os.environ.setdefault('NPROC', '32')

# Compiling is most of what the tests do. The second flag halves that; later versions lack it.
os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0' + (
    ' --xla_cpu_use_fusion_emitters=false' if metadata.version('jaxlib').startswith('0.10.')
    else ''))

# Commands that tests start keep nothing in the user's cache.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', '')

import jax
import pytest

from btx_jax import terminal
from tests import command, studies

jax.config.update('jax_platforms', os.environ.get('JAX_PLATFORMS', 'cpu'))  # or cuda, or tpu
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(scope='session', autouse=True)
def cache(tmp_path_factory):
  """The user's cache directory, also of commands that tests start."""
  os.environ['XDG_CACHE_HOME'] = str(tmp_path_factory.mktemp('cache'))


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  """A folder with the text of tests/studies.py."""
  folder = tmp_path_factory.mktemp('text')
  studies.write_text(folder)
  return folder


@pytest.fixture(autouse=True)
def console():
  """A command that prints JSON sends all else to stderr; the next test starts as a new process."""
  yield
  terminal.console.stderr = False


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Runs commands, as tests/command.py says."""
  with command.Commands(str(tmp_path_factory.mktemp('output'))) as commands:
    yield commands
