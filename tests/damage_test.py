"""Every reader notices a damaged checkpoint, and a run continues from a sound one.

tests/pipeline_test.py kills runs; here files change on disk.
"""

import dataclasses
import os
import random
import shutil

import jax
import numpy as np
import pytest

from btx_jax import load, terminal
from btx_jax.commands import status
from btx_jax.devices import sharding
from btx_jax.errors import RunError
from btx_jax.pipeline import Pipeline
from btx_jax.scoring import scores
from btx_jax.study import manifest, params, sources
from btx_jax.training import checkpoint, checksums, damage, slices
from tests import finished, studies
from tests.helpers import assert_trees_equal, final_params

STEPS = 6  # with checkpoints after 2, 4 and 6


@pytest.fixture(scope='module')
def study(text, tmp_path_factory):
  """A complete run, and another one that started from it."""
  config = studies.get_config(text)
  config.evaluation.update(every=0)
  config.mesh.update(fsdp=2, expert=1, tensor=1)
  config.checkpoints_kept = 3
  config.runs = {name: config.runs[name] for name in ('seed', 'expert/code')}
  pipeline = Pipeline(config, str(tmp_path_factory.mktemp('study') / 'work'))
  assert pipeline.train()
  return pipeline


@pytest.fixture
def copy(study, tmp_path):
  """The study in a directory of its own, where a test may damage it."""
  return Pipeline(study.config, str(shutil.copytree(study.workdir, tmp_path / 'work')))


def of_step(study, step: int, name: str = 'seed') -> str:
  return os.path.join(sources.checkpoints(study, study.runs[name]), str(step))


def read_all(study) -> dict[str, np.ndarray]:
  """All parameters of the seed's last checkpoint, and its moments of the head, by slices."""
  run = study.runs['seed']
  shapes = {sharding.path_of(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(
      params.like(run.model, study.mesh))}
  wanted = {'params': shapes, 'train': {f'opt_state/1/0/mu/{path}': shapes[path]
                                        for path in ('embed', 'layers/ffn/up')} | {'step': ()}}
  found = {}
  for item, shape_of in wanted.items():
    saved = slices.Saved(sources.checkpoints(study, run), run.steps,
                             sources.identity(study, run), item)
    for path, shape in shape_of.items():
      found[f'{item}/{path}'] = saved.read(path, tuple(slice(0, n) for n in shape))
  return found


def flip(path: str, rng: random.Random):
  """Flips one bit of a file."""
  with open(path, 'r+b') as file:
    at = rng.randrange(os.path.getsize(path))
    file.seek(at)
    byte = file.read(1)[0] ^ 1 << rng.randrange(8)
    file.seek(at)
    file.write(bytes([byte]))


def spoil(folder: str):
  """Flips bits all over the largest file of a folder: some lie in what is read."""
  path = max((os.path.join(root, name) for root, _, names in os.walk(folder) for name in names),
             key=os.path.getsize)
  with open(path, 'r+b') as file:
    data = bytearray(file.read())
    data[::50] = bytes(byte ^ 1 for byte in data[::50])
    file.seek(0)
    file.write(data)


def test_a_flipped_bit_is_noticed_or_changes_nothing(study, copy):
  sound = read_all(study)
  folder, kept = of_step(copy, STEPS), of_step(study, STEPS)
  names = sorted(os.path.relpath(os.path.join(root, name), folder)
                 for root, _, files in os.walk(folder) for name in files
                 if 'data' not in os.path.relpath(root, folder).split(os.sep))
  tensors = max((name for name in names if name.startswith('params/')),
                key=lambda name: os.path.getsize(os.path.join(folder, name)))
  rng, noticed = random.Random(0), 0
  for trial in range(20):
    name = tensors if trial % 2 else rng.choice(names)
    flip(os.path.join(folder, name), rng)
    try:
      found = read_all(copy)
    except RunError as error:
      assert f'{STEPS} is damaged: ' in str(error)
      noticed += 1
    else:
      assert found.keys() == sound.keys()
      for path, value in found.items():
        np.testing.assert_array_equal(value, sound[path], f'{name}: {path}')
    shutil.copyfile(os.path.join(kept, name), os.path.join(folder, name))
  assert noticed  # a flip may hit something that is not read, such as an old index


@pytest.mark.parametrize('harm, problem', [
    (lambda study: os.rename(of_step(study, 4), of_step(study, STEPS)), 'it belongs to step 4'),
    (lambda study: shutil.copytree(of_step(study, 4) + '/params', of_step(study, STEPS) + '/params'
                                   ), 'the checksums? of .*embed.* in params differ'),
    (lambda study: shutil.copytree(of_step(study, 5, 'expert/code'), of_step(study, STEPS)),
     'it belongs to'),
], ids=['another step', 'parameters of another step', 'another run'])
def test_what_is_not_the_checkpoint_of_its_place_is_refused(copy, harm, problem):
  shutil.rmtree(of_step(copy, STEPS) + ('/params' if 'params' in problem else ''))
  harm(copy)
  for read in (lambda: final_params(copy, 'seed'), lambda: read_all(copy),
               lambda: load(copy.folder('seed'))):
    with pytest.raises(RunError, match=rf'seed/checkpoints/{STEPS} is damaged: {problem}'):
      read()


def test_a_run_goes_on_from_the_newest_sound_checkpoint(study, copy, capsys):
  folder = copy.folder('seed')
  manifest.write(folder, manifest.read(folder) | {'state': manifest.STOPPED})
  shutil.rmtree(os.path.join(of_step(copy, STEPS), 'train'))
  spoil(os.path.join(of_step(copy, 4), 'params'))
  assert copy.train('seed')
  said = capsys.readouterr().out
  assert f'seed/checkpoints/{STEPS} is damaged: it cannot be read' in said
  assert 'seed/checkpoints/4 is damaged: ' in said
  assert 'continuing from step 2, the newest sound checkpoint' in said
  assert_trees_equal(final_params(copy, 'seed'), final_params(study, 'seed'))
  kept = os.listdir(os.path.dirname(of_step(copy, 4)))
  assert {'damaged-4', f'damaged-{STEPS}', '4', str(STEPS)} <= set(kept)


def test_status_says_which_checkpoints_are_sound(copy):
  spoil(os.path.join(of_step(copy, 4), 'params'))
  assert 'checkpoints' not in status.collect(copy)['runs'][0]  # it reads them only if asked
  found = status.collect(copy, check=True)
  problems = {**found['runs'][0]['checkpoints']}
  assert problems.pop(4) and problems == {2: '', STEPS: ''}
  assert found['runs'][1]['checkpoints'] == {2: '', 4: '', 5: ''}
  with terminal.console.capture() as shown:
    terminal.console.print(status.as_table(found), soft_wrap=True)
  assert 'seed: the checkpoint of step 4 is damaged: ' in shown.get()
  assert f'seed: sound checkpoints, of steps: 2, {STEPS}\n' in shown.get()


@pytest.mark.parametrize('when', ['before it is read', 'while it is read'])
def test_a_checkpoint_that_its_run_deletes_meanwhile_is_not_called_damaged(
    copy, monkeypatch, when):
  read, folders = slices.problem_in, []

  def problem_in(folder, step, identity):
    if step == 2:
      shutil.rmtree(os.path.join(folder, '2', 'sums' if when == 'while it is read' else ''))
      folders.append(folder)
    return read(folder, step, identity)

  def sleep(_):  # meanwhile the deletion goes on
    shutil.rmtree(os.path.join(folders[-1], '2'))

  monkeypatch.setattr(slices, 'problem_in', problem_in)
  monkeypatch.setattr(status.time, 'sleep', sleep)
  monkeypatch.setattr(status.locks, 'is_locked', lambda folder: True)
  found = status.collect(copy, check=True)
  assert {step: problem for run in found['runs'] for step, problem in run['checkpoints'].items()
          if problem} == {}
  assert 2 not in found['runs'][0]['checkpoints']


def test_damage_that_another_process_notices(copy, monkeypatch):
  run = copy.runs['seed']
  given = sources.checkpoints(copy, run), STEPS, sources.identity(copy, run)
  shares = []
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(slices, 'problem_in', lambda *asked: shares.append(asked[-1]) or '')
  monkeypatch.setattr(slices.distributed, 'gather', lambda own: [own, 'it cannot be read'])
  with pytest.raises(damage.Damaged, match=f'{STEPS} is damaged: it cannot be read'):
    slices.check_together(*given)
  assert shares == [(0, 2)]
  monkeypatch.undo()
  spoil(os.path.join(of_step(copy, STEPS), 'params'))
  assert sorted(bool(slices.problem_in(*given, (i, 2))) for i in range(2))[-1]


def test_a_damaged_end_of_a_complete_run_is_trained_again(study, copy):
  shutil.rmtree(copy.folder('expert/code'))
  shutil.rmtree(os.path.join(of_step(copy, STEPS), 'params'))
  with pytest.raises(RunError, match=rf'checkpoints/{STEPS} is damaged: .* It is now called '
                     rf'damaged-{STEPS}, and the same command trains seed again from step 4'):
    copy.train()
  assert copy.state('seed') == manifest.STOPPED
  assert copy.train()
  for name in study.runs:
    assert_trees_equal(final_params(copy, name), final_params(study, name))


def test_processes_set_the_same_checkpoints_aside(monkeypatch, tmp_path):
  """Of several, one that sees other files on shared storage must still take part."""
  def restore(self, step, like):
    if step > 2:
      raise damage.Damaged(str(tmp_path), step, 'x')
    return like, {}

  seen, renamed = iter([[2, 4, 6], [2, 4]]), []
  monkeypatch.setattr(checkpoint.Checkpoints, 'steps', property(lambda self: next(seen)))
  monkeypatch.setattr(checkpoint.Checkpoints, 'restore', restore)
  monkeypatch.setattr(damage, 'set_aside', lambda folder, step: renamed.append(step))
  with checkpoint.Checkpoints(str(tmp_path), '0' * 16) as saved:
    assert saved.newest('state') == (2, 'state', {})
  assert renamed == [4, 6]


def test_a_complete_run_that_is_named_is_checked(copy):
  assert not copy.train('seed')
  manifest.write(copy.folder('seed'), manifest.read(copy.folder('seed')) | {'end_compared': True})
  shutil.rmtree(os.path.join(of_step(copy, STEPS), 'params'))
  with pytest.raises(RunError, match='the same command trains seed again from step 4'):
    copy.train('seed')  # all is measured, so nothing else reads it
  assert copy.state('seed') == manifest.STOPPED
  # Else its best step would be one of those that are evaluated again, and never the end.
  assert 'end_compared' not in manifest.read(copy.folder('seed'))


@pytest.mark.parametrize('damaged, harmed, message', [
    # All of an earlier version: none is renamed.
    (STEPS, (2, 4, STEPS), 'it has no checksums; .* No earlier sound checkpoint is kept'),
    # The run would go on from its end, and never come to step 4 again.
    (4, (4,), 'Its run goes on from later ones, so it does not save this one again'),
], ids=['earlier version', 'has later'])
def test_what_would_not_be_made_again_is_not_set_aside(copy, damaged, harmed, message):
  run = copy.runs['seed']
  for step in harmed:
    shutil.rmtree(of_step(copy, step) + '/sums')
  copy.runs['expert/code'] = dataclasses.replace(
      copy.runs['expert/code'], sources=(run if damaged == STEPS else run.first(damaged),))
  shutil.rmtree(copy.folder('expert/code'))
  copy._check_manifests = lambda: None  # its source is another one
  with pytest.raises(RunError, match=message):
    copy.train('expert/code')
  assert {'2', '4', str(STEPS)} == set(os.listdir(sources.checkpoints(copy, run)))
  assert copy.state('seed') == manifest.COMPLETE


def test_scores_are_not_taken_for_those_of_another_stage(tmp_path, capsys):
  study = finished.write(finished.two_mixtures(), str(tmp_path))
  run, stages = study.runs['btx'], (scores.START, scores.FINAL)
  sound = [scores.read(study, run, stage) for stage in stages]
  assert all(sound) and sound[0] != sound[1]
  start, final = (scores.path(study, run, stage) for stage in stages)
  os.rename(start, tmp_path / 'kept')
  os.rename(final, start)
  os.rename(tmp_path / 'kept', final)
  assert [scores.read(study, run, stage) for stage in stages] == [None, None]
  printed = ' '.join(capsys.readouterr().out.split())
  assert f"{start} is damaged (its scores are those of the stage 'final')" in printed


def test_without_a_sound_checkpoint_nothing_is_touched(copy):
  folder = copy.folder('seed')
  manifest.write(folder, manifest.read(folder) | {'state': manifest.STOPPED})
  for step in (2, 4, STEPS):
    shutil.rmtree(os.path.join(of_step(copy, step), 'sums'))
  with pytest.raises(RunError, match=r'it has no checksums; .* No earlier sound checkpoint is '
                     r'kept. Restore a copy, or delete .*work/seed to train'):
    copy.train('seed')
  assert {'2', '4', str(STEPS)} <= set(os.listdir(os.path.join(folder, 'checkpoints')))


@pytest.mark.parametrize('path', ['embed', 'layers/ffn/up', 'layers/ffn/experts/up', 'step'])
def test_checksums_of_pieces_add_up_to_that_of_the_array(path):
  rng = np.random.default_rng(0)
  shape = {'embed': (7, 5), 'layers/ffn/up': (3, 6, 4), 'step': ()}.get(path, (2, 3, 6, 4))
  x = rng.normal(size=shape).astype(np.float32)
  expected = checksums.of_tree(_nested(path, jax.numpy.array(x)), None)
  [expected] = jax.tree.leaves(expected)
  many = checksums.leading_axes(path)
  leading = tuple(slice(0, n) for n in shape[:many])
  total = np.zeros(shape[:many], np.uint32)
  for piece in checksums.pieces(shape, leading, 8):
    total += checksums.of_piece(x[piece], piece, many)
  np.testing.assert_array_equal(total, expected)
  assert sharding.path_of(jax.tree.leaves_with_path(_nested(path, x))[0][0]) == path


def test_exchanged_rows_and_a_flipped_sign_change_a_checksum():
  x = np.zeros((4, 3), np.float32)
  x[0] = 1
  index = (slice(0, 4), slice(0, 3))
  one = checksums.of_piece(x, index, 0)
  assert one != checksums.of_piece(x[::-1].copy(), index, 0)
  assert one != checksums.of_piece(x[:, ::-1] * np.float32([1, 1, -1]), index, 0)


def _nested(path: str, leaf):
  for name in reversed(path.split('/')):
    leaf = {name: leaf}
  return leaf
