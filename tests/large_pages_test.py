"""Where large pages help, a command that computes starts again with them, as the same process."""

import io
import os
import subprocess
import sys

import pytest

from btx_jax.devices import large_pages
from tests.jobs import ROOT

CONFIG = '''
import os, sys
from btx_jax import base

def get_config():
  print(os.getpid(), sys.argv[1:], repr(os.environ.get('GLIBC_TUNABLES')))
  return base.get_config()
'''


@pytest.fixture
def helps(monkeypatch):
  """A machine where large pages help, whatever this one is."""
  monkeypatch.delenv(large_pages.TUNABLES, raising=False)
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  monkeypatch.setattr(large_pages.sys, 'platform', 'linux')
  monkeypatch.setattr(large_pages.os, 'confstr', lambda name: 'glibc 2.36')
  monkeypatch.setattr(large_pages.os.path, 'exists', lambda path: False)
  monkeypatch.setattr('builtins.open', lambda *_, **__: io.StringIO('always [madvise] never\n'))


def test_they_are_missing_where_they_help(helps, monkeypatch):
  assert large_pages._are_missing()
  monkeypatch.setenv(large_pages.TUNABLES, '')  # the user's, or ours
  assert not large_pages._are_missing()


@pytest.mark.parametrize('change', [
    lambda patch: patch.setattr(large_pages.sys, 'platform', 'darwin'),
    lambda patch: patch.setattr(large_pages.os, 'confstr', lambda name: 'glibc 2.31'),
    lambda patch: patch.setattr(large_pages.os, 'confstr', lambda name: None),
    lambda patch: patch.setattr(large_pages.os.path, 'exists', lambda path: 'nvidia' in path),
    lambda patch: patch.setattr('builtins.open', lambda *_, **__: io.StringIO('[always] never'))])
def test_elsewhere_nothing_is_asked_for(helps, monkeypatch, change):
  change(monkeypatch)
  assert not large_pages._are_missing()


def test_a_machine_with_an_accelerator_that_is_not_used_has_them(helps, monkeypatch):
  monkeypatch.setattr(large_pages.os.path, 'exists', lambda path: True)
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert large_pages._are_missing()


@pytest.mark.parametrize('command', ['train', 'status'])
def test_a_command_starts_again_as_the_same_process(tmp_path, command):
  config = tmp_path / 'a config.py'
  config.write_text(CONFIG)
  environment = {name: value for name, value in os.environ.items() if name != large_pages.TUNABLES}
  arguments = [f'--config={config}', f'--workdir={tmp_path / "a b"}', command]
  started = subprocess.Popen(
      [sys.executable, '-m', 'btx_jax.main', *arguments], cwd=ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      env={**environment, 'PYTHONPATH': ROOT, 'JAX_PLATFORMS': 'cpu'})
  printed, errors = started.communicate()
  assert 'config.runs is empty' in errors
  with pytest.MonkeyPatch.context() as patch:
    patch.delenv(large_pages.TUNABLES, raising=False)
    patch.setenv('JAX_PLATFORMS', 'cpu')
    expected = large_pages.WANTED if command == 'train' and large_pages._are_missing() else None
  assert printed.strip() == f'{started.pid} {arguments!r} {expected!r}'
