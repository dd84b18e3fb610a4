"""Tokenizing in several processes: the same files and the same errors as in one, and no process
that stays behind."""

import json
import signal
import subprocess
import sys
import time

import pytest

from btx_jax.data import corpora, encoding, tokens, workers
from btx_jax.errors import RunError, UsageError
from tests import make_tokenizers as make

NFC = {'type': 'NFC'}
TEXTS = [f'the house {i} {"of the " * (i % 9)}\n' for i in range(150)]


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
  monkeypatch.setattr(encoding, '_BATCH', 11)
  monkeypatch.setattr(encoding, '_ALONE_CHARS', 1)


def prepare(folder, found, lines, processes):
  """The content of each file of the tokens of these records."""
  text = folder / 'text.jsonl'
  if not text.exists():
    text.write_text('\n'.join(lines))
  domain = corpora.Domain('some', paths=(str(text),), id_field='id')
  tokens.prepare(str(folder / f'tokens{processes}'), domain, found, 0.2, processes=processes)
  return {path.name: path.read_bytes() for path in (folder / f'tokens{processes}').iterdir()
          if path.name != 'checked.json'}  # that has times


def records(texts):
  return [json.dumps({'text': text, 'id': f'number {i}'}) for i, text in enumerate(texts)]


@pytest.mark.parametrize('kind', ['sentencepiece', 'byte-level with NFC'])
def test_any_number_of_processes_writes_the_same_files(tmp_path, kind):
  found = make.load(tmp_path / 'tokenizer', make.sentencepiece_model() if kind == 'sentencepiece'
                    else make.byte_level(normalizer=NFC))
  # Two records are skipped; documents with a decomposed letter are normalised.
  lines = [*records([*TEXTS, *(f'e\u0301 {i}' for i in range(9))]), '{"text"', '{"text": 3}']
  one = prepare(tmp_path, found, lines, 1)
  assert len(one['train.bin']) > 1000
  for processes in (2, 3):
    assert prepare(tmp_path, found, lines, processes) == one


@pytest.mark.parametrize('mistake', ['unreadable', 'lossy', 'lossy, then unreadable'])
def test_any_number_of_processes_meets_the_same_error(tmp_path, mistake):
  lossy = {'type': 'Replace', 'pattern': {'String': 'z'}, 'content': 'y'}
  found = make.load(tmp_path / 'tokenizer', make.byte_level(
      normalizer=lossy if 'lossy' in mistake else None))
  lines = records([*TEXTS[:30], *(f'z{i}' for i in range(105 if 'lossy' in mistake else 0))])
  lines += ['{"text"'] * (500 if 'unreadable' in mistake else 0)
  messages = []
  for processes in (1, 2):
    with pytest.raises(UsageError) as error:
      prepare(tmp_path, found, lines, processes)
    messages.append(str(error.value))
  assert messages[0] == messages[1]
  assert ('loses text' in messages[0]) == ('lossy' in mistake)


def broken(batch, tokenizer):
  del tokenizer
  raise ValueError(f'{len(batch)} documents cannot be encoded')


def test_an_error_in_a_process_is_raised_here():
  with pytest.raises(ValueError, match='1 documents cannot be encoded'):
    list(workers.in_order(broken, None, iter([[corpora.Document('a')]]), 1))


def test_a_process_that_is_killed_is_an_error(tmp_path, monkeypatch):
  monkeypatch.setattr(workers, '_CHILD', 'import os, sys; sys.stdin.buffer.read(9); '
                                         'os.kill(os.getpid(), 9)')
  found = make.load(tmp_path / 'tokenizer', make.byte_level())
  with pytest.raises(RunError, match=r'exit code -9 before .*data\.processes=1'):
    prepare(tmp_path, found, records(TEXTS), 2)
  assert not (tmp_path / 'tokens2').exists()


def test_the_processes_do_not_import_jax():
  done = subprocess.run(
      [sys.executable, '-c', 'import sys; from btx_jax.data import encoding, workers; '
       'print(*{"jax", "orbax", "grain", "optax", "flax"} & sys.modules.keys())'],
      capture_output=True, text=True, check=True)
  assert done.stdout.split() == []


ENDLESS = '''
import itertools, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from btx_jax.data import encoding, workers
from btx_jax.data.records import Document
from tests import make_tokenizers as make
import pathlib
start, children = workers._start, []
def noted():
  children.append(start())
  return children[-1]
workers._start = noted
found = make.load(pathlib.Path(sys.argv[1]), make.byte_level())
batches = ([Document('the house') for _ in range(100)] for _ in itertools.count())
for i, _ in enumerate(workers.in_order(encoding._texts, found, batches, 2)):
  if i == 1000:
    print(*(child.pid for child in children), flush=True)
'''


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGKILL'])
def test_no_process_outlives_the_one_that_started_it(tmp_path, name):
  with subprocess.Popen([sys.executable, '-c', ENDLESS, str(tmp_path / 'tokenizer')], text=True,
                        stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
    children = [int(word) for word in started.stdout.readline().split()]
    assert len(children) == 2 and all(map(_lives, children))
    started.send_signal(getattr(signal, name))
    try:
      errors = started.communicate(timeout=60)[1]
    finally:
      started.kill()
  deadline = time.monotonic() + 60
  while any(map(_lives, children)) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not any(map(_lives, children))
  # The processes themselves say nothing.
  assert errors.count('Traceback') == (name == 'SIGINT')


def _lives(pid):
  """Whether a process runs; one that ended, and that nobody has waited for, does not."""
  try:
    with open(f'/proc/{pid}/stat', encoding='utf-8') as file:
      return file.read().rpartition(')')[2].split()[0] != 'Z'
  except OSError:
    return False
