"""What is written survives kills, full disks, bad disks and power cuts; nothing else is removed."""

import ast
import errno
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pytest

import btx_jax
from btx_jax import base, errors
from btx_jax.commands import report, status
from btx_jax.convert import export, hugging_face
from btx_jax.data import damage, text, tokenizer, tokens
from btx_jax.data.domains import Domain
from btx_jax.errors import UsageError
from btx_jax.files import leftovers, sealed, writing
from btx_jax.scoring import scores
from btx_jax.study import manifest, rename
from btx_jax.study.study import Study
from tests import finished, studies
from tests.disk import Disk, Killed, Replay
from tests.pretrained_test import TOKENIZER

LLAMA = pathlib.Path(__file__).parent / 'fixtures' / 'llama2'


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A domain of eight conversations' length, with ids, and its tokenizer."""
  folder = tmp_path_factory.mktemp('made')
  (folder / 'some.jsonl').write_text(''.join(
      json.dumps({'text': f'{"good " * i}{i}', 'id': f'document {i}'}) + '\n' for i in range(8)))
  domain = Domain('some', paths=(str(folder / 'some.jsonl'),), id_field='id')
  return domain, tokenizer.load(str(TOKENIZER))


def tree(folder: pathlib.Path) -> dict[str, bytes]:
  """The files in a folder, without locks and without what may be deleted."""
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*')
          if path.is_file() and path.name not in ('lock', 'checked.json')}


# The interface


# Each with the reason why it does not go through files/writing.py.
OTHER_WRITERS = {
    'training/saving.py': 'removes what tensorstore made in place of a folder that is gone',
    'training/sinks.py': 'a folder that another package fills',
    'devices/compiled.py': 'a folder that jax fills'}
CHANGES = {'rename', 'replace', 'remove', 'unlink', 'rmdir', 'mkdir', 'makedirs', 'fsync', 'pwrite',
           'truncate', 'link', 'symlink', 'removedirs', 'renames'}


def writers(source: str) -> list[str]:
  """The calls in a source that change the disk."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if not isinstance(node, ast.Call):
      continue
    match node.func:
      case ast.Attribute(value=ast.Name(id='os'), attr=name) if name in CHANGES:
        found.append(f'os.{name}')
      case ast.Attribute(value=ast.Name(id='shutil'), attr=name):
        found.append(f'shutil.{name}')
      case ast.Attribute(attr='write_text' | 'write_bytes' as name):
        found.append(name)
      case ast.Name(id='open'):
        modes = [each.value for each in node.args[1:2] if isinstance(each, ast.Constant)]
        found += [f'open {mode!r}' for mode in modes if set(str(mode)) & set('wax+')]
  return found


def test_all_writing_goes_through_one_interface():
  package = pathlib.Path(btx_jax.__file__).parent
  found = {str(path.relative_to(package)): calls for path in package.rglob('*.py')
           if (calls := writers(path.read_text(encoding='utf-8')))}
  assert all(found.pop(f'files/{name}.py') for name in ('disk', 'flocks', 'leftovers', 'writing'))
  assert found.keys() <= OTHER_WRITERS.keys(), found


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path):
  target = tmp_path / 'x.json'
  of_living = subprocess.Popen(
      [sys.executable, '-c', 'import fcntl, sys\nfile = open(sys.argv[1], "w")\n'
       'fcntl.lockf(file, fcntl.LOCK_EX)\nprint(1, flush=True)\nsys.stdin.read()',
       str(tmp_path / 'x.json.7-0123abcd.partial')], stdin=-1, stdout=-1)
  assert of_living.stdout.readline()
  for name in ('x.json.8-0123abcd.partial', 'y.json.8-0123abcd.partial', 'x.json.partial',
               'x.json.8.partial', 'x.json.8-0123abcd.partial.txt'):
    (tmp_path / name).write_text('half')
  kept = {each.name for each in tmp_path.iterdir()} - {'x.json.8-0123abcd.partial'}
  with writing.replacing(str(target)) as file:
    file.write('whole')
    inside = [name for name in os.listdir(tmp_path) if leftovers.is_temporary(name)]
    with writing.replacing(str(target)) as other:  # another thread's, say
      other.write('first')
    assert set(inside) <= set(os.listdir(tmp_path))
  assert {each.name for each in tmp_path.iterdir()} == kept | {'x.json'}
  of_living.communicate()
  with writing.replacing(str(target)) as file:
    file.write('whole')
  assert not (tmp_path / 'x.json.7-0123abcd.partial').exists()


def test_arrays_are_written_as_numpy_writes_them(tmp_path):
  for array in (np.arange(6).reshape(2, 3).T, np.float32(1), np.zeros((0, 2), np.uint16)):
    np.save(tmp_path / 'theirs.npy', array)
    with writing.replacing(str(tmp_path / 'ours.npy'), 'wb') as file:
      writing.save_array(file, np.asarray(array))
    assert (tmp_path / 'ours.npy').read_bytes() == (tmp_path / 'theirs.npy').read_bytes()


# Jobs, of which each call fails once


def write_manifest(folder, _):
  manifest.write(str(folder / 'seed'), manifest.begin('seed', {'steps': 2}))


def prepare(folder, made):
  domain, model = made
  return tokens.prepare(str(folder / 'data' / 'some'), domain, model, 0.3)


def put(folder, _):
  source = hugging_face.Folder(str(LLAMA))
  export.export(
      str(folder / 'out'), source.model, source, 'float32', max_length=99, balance_loss=0.0,
      bos_id=0, eos_id=1, card='card', identity='a', max_shard=20_000,
      tokenizer_files={'tokenizer.json': b'{}'})


def study_in(folder):
  config = base.get_config()
  config.domains = {'code': base.domain('/nowhere')}
  config.data.seq_len = 16
  config.runs = {'expert/seed': base.run(base.random(), {'code': 1}, steps=20)}
  return config, Study(config, str(folder / 'work'))


def measure(folder, _):
  _, study = study_in(folder)
  run = study.runs['expert/seed']
  scores.write(study, run, scores.FINAL, {'code': {'bits_per_byte': 1.5}})


def write_report(folder, _):
  report.write_report(study_in(folder)[1], 'mine')


def rename_run(folder, _):
  _, study = study_in(folder)
  rename.rename(study, 'expert/seed', 'first/one')


JOBS = {job.__name__: job
        for job in (write_manifest, prepare, put, measure, write_report, rename_run)}
FAILURES = [OSError(errno.ENOSPC, 'No space left on device'), OSError(errno.EIO, 'I/O error'),
            OSError(errno.EACCES, 'Permission denied')]


@pytest.fixture
def memory():
  """A folder in memory if the system has one: thousands of files come and go."""
  with tempfile.TemporaryDirectory(
      dir='/dev/shm' if os.access('/dev/shm', os.W_OK) else None) as folder:
    yield pathlib.Path(folder)


@pytest.fixture
def start(memory, monkeypatch):
  """A folder where each job can begin, with files that are not ours."""
  folder = memory / 'start'
  (folder / 'seed').mkdir(parents=True)
  manifest.write(str(folder / 'seed'), manifest.begin('seed', {'steps': 1}))
  finished.write(study_in(folder)[0], str(folder / 'work'))
  for name in ('other.partial', 'data/other.partial', 'seed/manifest.json.partial',
               'work/report/report.json.partial', 'out.partial.txt', 'data/some.partial'):
    path = folder / name / 'mine.txt'
    path.parent.mkdir(parents=True)
    path.write_text('not ours')

  class Page:
    def render(self, **_):
      return 'page'

  def contents(*given):
    given[-1]('loss', b'png', '')
    return {}

  monkeypatch.setattr(report, '_template', Page)
  monkeypatch.setattr(report, '_contents', contents)
  monkeypatch.setattr(manifest, 'now', lambda: '2026-11-28T05:04:36+00:00')
  monkeypatch.setattr(leftovers, '_YOUNG', -1)
  monkeypatch.setattr(status, '_age', lambda *_: 1.0)
  return folder


def runs(job, root, made, monkeypatch, fail_at=-1, error=None):
  """Runs a job; returns its calls and what it raised."""
  raised = None
  with monkeypatch.context() as patch:
    disk = Disk(patch, fail_at, error)
    try:
      job(root, made)
    except (OSError, UsageError, Killed) as caught:
      raised = caught
  return disk.calls, raised


@pytest.mark.parametrize('name', JOBS)
def test_each_call_fails_once_or_is_the_last(name, start, memory, made, monkeypatch):
  job, root = JOBS[name], memory / 'root'

  def begin_again():
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(start, root)

  begin_again()
  calls, raised = runs(job, root, made, monkeypatch)
  assert raised is None
  assert {each[0] for each in calls} >= {'open', 'write', 'fsync'}
  whole, failed = tree(root), 0
  # Of a row of equal calls, such as writes to one file, the first and the last.
  of_interest = [i for i, call in enumerate(calls)
                 if {tuple(each[:2]) for each in calls[max(i - 1, 0):i + 2]} != {call[:2]}]
  for number in of_interest:
    for error in (Killed(), FAILURES[number % len(FAILURES)]):
      begin_again()
      _, raised = runs(job, root, made, monkeypatch, number, error)
      if isinstance(raised, OSError):
        message, _ = errors._explain(raised)
        assert message and str(raised.filename) in message, calls[number]
        assert str(root) in message and not leftovers.is_temporary(message.split()[0]), message
      if raised:  # a stamp, or a folder that cannot be synced, may be done without
        failed += 1
        _, again = runs(job, root, made, monkeypatch)
        assert again is None, calls[number]
      assert tree(root) == whole, calls[number]
  assert failed > len(of_interest)


# Power cuts


def read_manifest(root, _):
  return manifest.read(str(root / 'seed'))


def read_tokens(root, made):
  """Makes them if they are not there."""
  found = prepare(root, made)
  tokens.check(str(root / 'data' / 'some'))
  return found


def read_export(root, _):
  if not (root / 'out').exists():
    return None
  folder = hugging_face.Folder(str(root / 'out'))
  return {path: folder.read(path).tolist() for path in folder.shapes}


READ = {'write_manifest': read_manifest, 'prepare': read_tokens, 'put': read_export}


@pytest.mark.parametrize('name', READ)
@pytest.mark.parametrize('names_synced', [False, True])
def test_a_power_cut_leaves_the_old_or_the_new(
    name, names_synced, start, memory, made, monkeypatch):
  root, left = memory / 'root', memory / 'left'
  shutil.rmtree(start / 'work')
  shutil.copytree(start, root)
  disk = Replay(root)
  before = None if name == 'prepare' else READ[name](root, made)
  calls, _ = runs(JOBS[name], root, made, monkeypatch)
  after, seen = READ[name](root, made), []
  for i, call in enumerate([('start', '/'), *calls]):
    disk.apply(*call)
    if call[0] not in ('write', 'pwrite', 'copy_file_range'):  # else as before the call
      disk.leave(left, names_synced)
      found = READ[name](left, made)
      assert found in (before, after), (i, call)
      if not seen or found != seen[-1]:
        seen.append(found)
      if found != after:
        runs(JOBS[name], left, made, monkeypatch)
      assert READ[name](left, made) == after, (i, call)
  assert seen == ([after] if name == 'prepare' else [before, after])


def test_a_replay_notices_what_was_not_synced(tmp_path, monkeypatch):
  """Without the calls of fsync, a power cut leaves an empty file under the final name."""
  root, left = tmp_path / 'root', tmp_path / 'left'
  root.mkdir()
  disk = Replay(root)
  calls, _ = runs(lambda *_: sealed.write(str(root / 'x'), {'a': 1}), root, None, monkeypatch)
  for call in calls:
    if call[0] != 'fsync':
      disk.apply(*call)
  disk.leave(left, names_synced=False)
  assert (left / 'x').read_bytes() == b''
  disk.leave(left, names_synced=True)
  assert not (left / 'x').exists()


# Damage


def flip(path: pathlib.Path, rng: random.Random):
  """Flips one bit of a file."""
  content = bytearray(path.read_bytes())
  content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  path.write_bytes(content)


def test_every_flipped_bit_of_a_json_file_is_noticed_or_harmless(memory):
  path, content = memory / 'x.json', {'loss': 1.25, 'name': 'code', 'steps': [3, None, True]}
  sealed.write(str(path), content)
  sound, noticed = path.read_bytes(), 0
  for bit in range(8 * len(sound)):
    changed = bytearray(sound)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    try:
      found = sealed.read(str(path))
      assert {key: found[key] for key in content} == content  # at most the checksum's name changed
    except ValueError:
      noticed += 1
  assert noticed > 0.8 * 8 * len(sound)
  path.write_text(json.dumps(content))  # an earlier version
  assert sealed.read(str(path)) == content


def token_files(folder: pathlib.Path) -> list[str]:
  return sorted(path.name for path in folder.iterdir()
                if path.name not in ('checked.json', 'lock') and path.stat().st_size)


@pytest.mark.parametrize('change', ['flip', 'cut', 'empty', 'remove'])
def test_damage_to_any_file_of_a_token_folder_is_noticed(change, memory, made):
  prepare(memory, made)
  folder, rng = memory / 'data' / 'some', random.Random(change)
  assert len(token_files(folder)) == 8
  for name in token_files(folder):
    path = folder / name
    if (change, name) in (('remove', 'train.bin'), ('remove', 'meta.json')):
      continue  # training tokens may be deleted; without meta.json the folder is not ours
    for _ in range(12 if change == 'flip' else 1):
      sound = path.read_bytes()
      if change == 'flip':
        flip(path, rng)
      elif change == 'remove':
        path.unlink()
      else:
        path.write_bytes(sound[:-1] if change == 'cut' else b'')
      try:
        tokens.check(str(folder))
        # The rest of meta.json is as it was: only the name of its checksum, or a space, changed.
        assert name == 'meta.json' and change != 'empty'
      except damage.Damaged as error:
        assert error.name == name and str(folder / name) in str(error)
        assert name == 'meta.json' or change != 'cut' or 'bytes instead of' in str(error)
      path.write_bytes(sound)
  tokens.check(str(folder))


def test_tokens_are_hashed_once(memory, made, monkeypatch):
  prepare(memory, made)
  folder, hashed = memory / 'data' / 'some', []
  monkeypatch.setattr(damage, '_hash', lambda path, *_: hashed.append(path) or '')
  tokens.check(str(folder))
  tokens.load(str(folder), 'train')
  assert not hashed
  os.utime(folder / 'held_out.bin')
  with pytest.raises(UsageError, match=r'held_out\.bin is damaged: its content is not'):
    tokens.load(str(folder), 'held_out')
  monkeypatch.undo()
  damage._hash.cache_clear()
  (folder / 'checked.json').unlink()
  tokens.check(str(folder))
  assert set(json.loads((folder / 'checked.json').read_text())) > {'train.bin', 'held_out.bin'}


@pytest.mark.parametrize('change, message', [
    (lambda boundaries: boundaries[::-1], 'its numbers do not rise from 0'),
    (lambda boundaries: boundaries[:-1], r'it ends at token \d+, and train.bin has \d+ tokens'),
    (lambda boundaries: boundaries.astype(np.int32), 'its numbers do not rise from 0')])
def test_boundaries_rise_to_the_end_of_the_tokens(memory, made, change, message):
  prepare(memory, made)
  path = memory / 'data' / 'some' / 'train.documents.npy'
  np.save(path, change(np.load(path)))
  with pytest.raises(UsageError, match=message):
    damage.check_numbers(str(path.parent), 'train', 'uint16', 272)
  with pytest.raises(UsageError, match=r'it has token \d+, and the tokenizer has 5'):
    damage.check_numbers(str(path.parent), 'held_out', 'uint16', 5)


def test_damaged_tokens_are_made_again_if_their_text_is_there(tmp_path, capsys):
  studies.write_text(tmp_path, documents=20)
  config, data = studies.get_config(tmp_path), tmp_path / 'data'
  config.tokenizer.path = str(TOKENIZER)
  first = text.prepare(config, str(data))
  sound = tree(data / 'code')
  flip(data / 'code' / 'train.bin', random.Random(0))
  flip(data / 'tokenizer.json', random.Random(0))
  again = text.prepare(config, str(data))
  said = ' '.join(capsys.readouterr().out.split())
  assert f'{data}/code/train.bin is damaged: its content is not what was written. The folder is ' \
         f'now called {data}/code.damaged, and the text is tokenized again.' in said
  assert f'{data}/tokenizer.json is damaged' in said
  assert again.train['code'].hash == first.train['code'].hash
  assert tree(data / 'code') == sound
  assert (data / 'code.damaged' / 'meta.json').exists()
  (tmp_path / 'math.jsonl').rename(tmp_path / 'away')
  text.prepare(config, str(data))  # the tokens suffice
  (data / 'math' / 'meta.json').write_text('{')
  with pytest.raises(UsageError, match=r'meta\.json is damaged: .* Its text is not there'):
    text.prepare(config, str(data))
  config.tokenizer.path = '/nowhere/tokenizer.json'
  flip(data / 'tokenizer.json', random.Random(0))
  with pytest.raises(UsageError, match=r'tokenizer\.json is damaged: .* Restore a copy of'):
    text.tokenizer(config, str(data))


def test_damaged_scores_are_named_and_count_as_not_measured(start, capsys):
  _, study = study_in(start)
  run = study.runs['expert/seed']
  assert scores.read(study, run, scores.FINAL)
  path = start / 'work' / 'expert' / 'seed' / 'evaluation_final.json'
  path.write_text(path.read_text().replace('21', '22', 1))
  assert scores.read(study, run, scores.FINAL) is None
  assert f'warning: {path} is damaged' in ' '.join(capsys.readouterr().out.split())


def test_a_folder_that_no_export_wrote_is_left_as_it_is(tmp_path):
  (tmp_path / 'out.partial').mkdir()
  (tmp_path / 'out.partial' / 'thesis.tex').write_text('not ours')
  with pytest.raises(UsageError, match=r"out\.partial has files .* did not write: thesis\.tex"):
    put(tmp_path, None)
  assert (tmp_path / 'out.partial' / 'thesis.tex').read_text() == 'not ours'
