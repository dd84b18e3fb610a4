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

# Nor do they start again for large pages, which small models don't need.
os.environ.setdefault('GLIBC_TUNABLES', '')

import jax
import pytest

from btx_jax import terminal
from tests import command, studies

jax.config.update('jax_platforms', os.environ.get('JAX_PLATFORMS', 'cpu'))  # or cuda, or tpu
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')


# Files that take longest, most of them with few tests. They start first, so that no worker of
# pytest-xdist is left with one of them when all others are done.
_LONGEST = ('distributed_test.py', 'launch_test.py', 'pipeline_test.py', 'edit_test.py',
            'stacked_test.py', 'tasks_test.py', 'writes_test.py', 'diloco_test.py',
            'main_test.py', 'chaos_test.py', 'preference_runs_test.py')


def pytest_configure(config):
  config.option.loadscopereorder = False  # xdist would start with the files of most tests


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: (_LONGEST.index(item.path.name) if item.path.name in _LONGEST
                               else len(_LONGEST)))


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


@pytest.fixture(scope='session')
def run(tmp_path_factory):
  """Runs commands, as tests/command.py says."""
  with command.Commands(str(tmp_path_factory.mktemp('output'))) as commands:
    yield commands
