"""The command line: a whole small study in processes of its own, help, and the environment.

Mistakes on the command line: errors_test.py.
"""

import os
import re
import subprocess
import sys

import pytest

from btx_jax import main
from tests import studies
from tests.jobs import PATIENCE, ROOT

CONFIG = '''
import pathlib
from tests import studies

def get_config():
  config = studies.get_config(pathlib.Path({text!r}))
  config.mesh.update(fsdp=1, expert=1, tensor=1)
  return config
'''


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp('study')
  studies.write_text(folder)
  path = folder / 'small.py'
  path.write_text(CONFIG.format(text=str(folder)))
  return str(path)


def command(*arguments, cwd=ROOT, **variables):
  environment = {**os.environ, 'PYTHONPATH': ROOT, **variables}
  environment = {name: value for name, value in environment.items() if value is not None}
  return subprocess.run([sys.executable, '-m', 'btx_jax.main', *arguments], cwd=cwd,
                        env=environment, capture_output=True, text=True, timeout=PATIENCE)


def compiled_programs(folder) -> set[str]:
  return {path.name for path in folder.glob('btx_jax/*/*-cache')}


def test_a_study_from_the_command_line_and_the_same_command_again(config, tmp_path):
  arguments = [f'--config={config}', f'--workdir={tmp_path / "work"}',
               '--config.evaluation.every=0']
  cache = {'XDG_CACHE_HOME': str(tmp_path / 'cache'), 'JAX_COMPILATION_CACHE_DIR': None,
           'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  one = command(*arguments, '--run=seed', **cache)
  assert one.returncode == 0, one.stderr
  assert 'seed is complete' in one.stdout
  kept = compiled_programs(tmp_path / 'cache')
  assert any('train_step' in name for name in kept)
  done = command(*arguments, **cache)
  assert done.returncode == 0, done.stderr
  assert ['compiled programs are kept in' in each.stdout for each in (one, done)] == [True, False]
  steps = lambda names: sum('train_step' in name for name in names)
  assert steps(compiled_programs(tmp_path / 'cache') - kept) <= 2  # the experts' and the mixture's
  for line in ('expert/code', 'average of btx', 'btx unfinetuned', 'Report: '):
    assert line in done.stdout
  assert (tmp_path / 'work' / 'report' / 'report.json').exists()
  again = command(*arguments)
  assert 'Every run is complete already.' in again.stdout
  table = lambda text: text[text.index('Bits per byte'):]
  assert table(again.stdout) == table(done.stdout)
  assert 'Warning' not in one.stderr + done.stderr + again.stderr

  other = command(*arguments, '--config.optimizer.peak_lr=0.5')
  assert other.returncode == 2
  assert 'belong to another config:\n  seed' in other.stderr


@pytest.mark.parametrize('module', ['btx_jax', 'btx_jax.main'])
def test_help_describes_every_command_and_flag(module):
  done = subprocess.run([sys.executable, '-m', module, '--help'], cwd=ROOT, capture_output=True,
                        text=True, timeout=PATIENCE)
  assert done.returncode == 0
  described = re.findall(r'^  (\w+)  +[a-z]', done.stdout, re.MULTILINE)
  assert described == [name for name in main.COMMANDS if name != 'train']
  assert all(f'--{name}:' in done.stdout or f'--[no]{name}:' in done.stdout
             for name in main._flag_names())


@pytest.mark.parametrize('platforms, expected', [
    ('cuda', 'cuda,cpu'), ('tpu', 'tpu,cpu'), ('cuda,tpu', 'cuda,tpu,cpu'), ('cpu', 'cpu'),
    ('cpu,cuda', 'cpu,cuda')])
def test_the_cpu_is_added_to_the_platforms_as_the_last(platforms, expected):
  assert main.platforms_with_cpu(platforms) == expected
