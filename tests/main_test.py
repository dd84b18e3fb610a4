"""The command line, as a person meets it: messages, exit codes, and the whole of a small study."""

import os
import subprocess
import sys

import pytest

from tests import studies

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
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


def command(*arguments, cwd=ROOT):
  environment = {**os.environ, 'PYTHONPATH': ROOT}
  return subprocess.run([sys.executable, '-m', 'btx_jax.main', *arguments], cwd=cwd,
                        env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize('arguments, message', [
    ([], '--config is missing'),
    (['--config=configs/none.py'], 'configs/none.py'),
    (['--config=configs/demo.py:ful'], "has no form 'ful'"),
    (['--config=configs/demo.py', '--config.optimizer.peek_lr=1'], "Did you mean \"peak_lr\""),
    (['--config=configs/demo.py', '--config.train.batch_size=many'], 'many'),
    (['--config=configs/demo.py', '--confg.seed=1'], 'confg'),
    (['--config=configs/demo.py', 'traain'], "'traain'"),
    (['--config=configs/demo.py', '--run=experts/code'], "did you mean 'expert/code'"),
    (['--config=configs/demo.py:full', '--run=dens'], "did you mean 'dense'"),
    (['--config=configs/demo.py', "--config.runs.expert/code.steps=3"], "runs['expert/code']"),
    (['--config=configs/demo.py', '--config.runs.seed.steps=0'], 'runs.seed.steps = 0'),
    (['--config=configs/demo.py', "--config.runs['expert/code'].steps=-1"], 'steps = -1'),
    (['--config=configs/demo.py', '--config.train.batch_size=0'], 'train.batch_size = 0'),
    (['--config=configs/demo.py', '--config.tokenizer.path=none.model'], "'none.model'"),
    (['--config=configs/demo.py', '--config.domains.code.source=stdlb'], "did you mean 'stdlib'"),
])
def test_a_mistake_ends_with_one_clear_message(arguments, message, tmp_path):
  done = command(*arguments, f'--workdir={tmp_path / "work"}')
  assert done.returncode == 2, done.stderr
  assert message in done.stderr
  assert 'Traceback' not in done.stderr
  assert not (tmp_path / 'work').exists()


def test_a_study_from_the_command_line_and_the_same_command_again(config, tmp_path):
  arguments = [f'--config={config}', f'--workdir={tmp_path / "work"}',
               '--config.evaluation.every=0']
  one = command(*arguments, '--run=seed')
  assert one.returncode == 0, one.stderr
  assert 'seed is complete' in one.stdout
  done = command(*arguments)
  assert done.returncode == 0, done.stderr
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
  assert 'belongs to another config' in other.stderr
