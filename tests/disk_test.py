"""A run goes on when its disk is full, and ends with the reason when that lasts.

A limit on the size of files stands for the full disk: the system refuses every write beyond it, of
orbax, tensorstore and Python alike. The loop is the real one; its program counts steps, see
killed_metrics_test.py. `python -m tests.benchmarks.disk` fills real disks.
"""

import contextlib
import dataclasses
import os
import resource
import shutil
import signal

import pytest

from btx_jax import storage
from btx_jax.errors import RunError
from btx_jax.training import checkpoint, loop, saving, slices, spikes
from tests.killed_metrics_test import (
  DOMAINS,
  RUN,
  SETTINGS,
  STEPS,
  Counting,
  Killed,
  evaluate,
  lines_of,
  state_after,
)

PATIENT = dataclasses.replace(SETTINGS, checkpoint_patience=2)


@contextlib.contextmanager
def full_disk():
  """In the block, no file can be larger than 500 bytes, which a checkpoint and its mark are."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


class Disturbed(Counting):
  """Calls `disturb` before each step."""

  def __init__(self, disturb):
    super().__init__()
    self._disturb = disturb

  def step(self, state, batch, active):
    self._disturb(batch)
    return super().step(state, batch, active)


class Study:
  """A run in a folder, and what it says in its manifest."""

  def __init__(self, folder):
    self.folder, self.manifest, self.troubles = folder, {}, []
    self.checkpoints = None  # while it trains

  def train(self, disturb=lambda step: None, steps_kept=()):
    def opened(*given):
      self.checkpoints = checkpoint.Checkpoints(*given)
      return self.checkpoints

    job = loop.Job(RUN, str(self.folder), lambda _: state_after(0), None, '0' * 16, steps_kept,
                   self.manifest.get('best'))
    with pytest.MonkeyPatch.context() as patched:
      patched.setattr(loop, 'make_program', lambda *_: Disturbed(disturb))
      patched.setattr(loop, 'Checkpoints', opened)
      patched.setattr(spikes, 'LAST', 5)
      loop.run([job], None, DOMAINS, PATIENT, evaluate, self._on_checkpoint, self._on_trouble)

  def _on_checkpoint(self, name, step, tokens, best, health):
    del name, tokens
    self.manifest |= {'steps_done': step, 'best': best, **health}

  def _on_trouble(self, name, changes):
    del name
    self.manifest |= changes
    self.troubles.append(changes)

  def train_with_full_disk(self, steps: range, **given):
    with contextlib.ExitStack() as stack:
      def disturb(step):
        if step == steps.start:
          self.checkpoints.wait()
          stack.enter_context(full_disk())
        if step == steps.stop:
          self.checkpoints._unfinished.wait()  # it fails; the run notices at its next save
          stack.close()
      self.train(disturb, **given)

  @property
  def kept(self) -> list[str]:
    return sorted(os.listdir(self.folder / 'checkpoints'), key=lambda name: (len(name), name))


@pytest.fixture(scope='module')
def lines(tmp_path_factory):
  """metrics.jsonl of the undisturbed run."""
  study = Study(tmp_path_factory.mktemp('undisturbed') / 'run')
  study.train()
  assert study.kept == ['4', '10', '11'] and not study.troubles
  return lines_of(study.folder)


@pytest.fixture
def study(tmp_path, capsys):
  """A new one; what it prints stays in memory, where the limit does not apply."""
  del capsys
  return Study(tmp_path / 'run')


def test_a_failed_save_leaves_the_run_going(study, lines, capsys):
  study.train_with_full_disk(range(5, 8))  # the save of step 6 fails
  assert study.kept == ['4', '10', '11']
  assert [each['steps_done'] for each in study.troubles] == [8]  # that is saved
  assert 'checkpoint of step 6 could not be saved: no space' in study.troubles[0]['storage'][0]
  assert study.troubles[0]['storage'][0].endswith('The next one is tried when it is due')
  assert study.manifest['storage'][0].endswith('. Later ones were saved')
  assert study.manifest['steps_done'] == STEPS and study.manifest['best']['step'] == 4
  assert capsys.readouterr().out.count('could not be saved') == 2  # then, and at the end
  assert lines_of(study.folder) == lines


def test_a_step_whose_save_failed_is_not_the_best(study):
  study.train_with_full_disk(range(4, 6))
  assert study.manifest['best']['step'] == 8 and study.kept == ['8', '10', '11']


@pytest.mark.parametrize('steps, kept, needed, reached', [
    (range(5, STEPS + 2), ['2', '4'], (), 8),
    (range(STEPS, STEPS + 2), ['4', '8', '10'], (), STEPS),
    (range(5, STEPS + 2), ['2', '4'], (6,), 6), (range(1, STEPS + 2), [], (), 4),
], ids=['it lasts', 'the last save', 'a save that another run needs', 'no checkpoint at all'])
def test_a_run_ends_if_it_lasts(study, lines, steps, kept, needed, reached):
  with pytest.raises(RunError, match=f'of step {reached} could not be saved: no space') as caught:
    study.train_with_full_disk(steps, steps_kept=needed)
  newest = f'newest checkpoint is of step {kept[-1]}' if kept else 'It has no checkpoint'
  assert newest in str(caught.value) and 'it takes up to' in str(caught.value)
  assert study.kept == kept  # nothing that a failed save left
  study.train(steps_kept=needed)
  assert lines_of(study.folder) == lines and study.kept[-1] == str(STEPS)


@pytest.mark.parametrize('makes_another', [False, True])
def test_a_directory_that_vanishes_is_not_made_again(study, makes_another):
  def disturb(step):
    if step == 5:
      study.checkpoints.wait()
      os.rename(study.folder, f'{study.folder}-moved')
      if makes_another:
        os.makedirs(study.folder / 'checkpoints')

  with pytest.raises(RunError, match='is gone: it was deleted, moved or unmounted'):
    study.train(disturb)
  assert not study.folder.exists()
  shutil.move(f'{study.folder}-moved', study.folder)
  study.train()
  assert study.kept == ['4', '10', '11']


def test_an_error_of_another_kind_ends_the_run(study, monkeypatch):
  def fail(*_, **__):
    raise TypeError('a mistake')

  monkeypatch.setattr(checkpoint.ocp.training.Checkpointer, 'save_checkpointables_async', fail)
  with pytest.raises(TypeError, match='a mistake'):
    study.train()


def test_too_little_room_is_said_at_the_start(study, monkeypatch, capsys):
  free = {'bytes': 20}
  monkeypatch.setattr(storage, 'free_bytes', lambda _: free['bytes'])

  def disturb(step):
    free['bytes'] = 20 if step < 5 else 1000

  study.train(disturb)
  sentence = f'20 bytes are free for {study.folder}/checkpoints, and 3 checkpoints take up to 36'
  assert capsys.readouterr().out.count(sentence) == 1
  assert sentence in study.troubles[0]['storage'][0]
  assert study.manifest['storage'] == []


def test_only_unfinished_checkpoints_are_cleared(tmp_path):
  names = ['4', 'damaged-4', '4.orbax-checkpoint-tmp', '6.orbax-checkpoint-tmp-17', 'mine',
           'a.orbax-checkpoint-tmp']
  for name in names:
    (tmp_path / name / 'params').mkdir(parents=True)
  saving.clear_unfinished(str(tmp_path))
  assert sorted(os.listdir(tmp_path)) == sorted({*names} - set(names[2:4]))


def test_which_checkpoints_are_sound(study):
  study.train()
  folder = study.folder / 'checkpoints'
  assert [slices.problem_in(str(folder), step, '0' * 16) for step in (4, 10, 11)] == [''] * 3
  def exchange(item):
    shutil.rmtree(folder / '11' / item)
    shutil.copytree(folder / '10' / item, folder / '11' / item)

  def rename():
    shutil.rmtree(folder / '11')
    (folder / '4').rename(folder / '11')

  found = {}
  for what, harm in {'parameters of another step': lambda: exchange('params'),
                     'position of another step': lambda: exchange('data'),
                     'no parameters': lambda: shutil.rmtree(folder / '11' / 'params'),
                     'renamed': rename}.items():
    shutil.copytree(folder / '11', study.folder / 'sound')
    harm()
    found[what] = slices.problem_in(str(folder), 11, '0' * 16)
    shutil.rmtree(folder / '11')
    shutil.move(study.folder / 'sound', folder / '11')
  assert found.pop('no parameters')
  assert found == {
      'parameters of another step': 'the checksum of embed in params differs from what was saved',
      'position of another step': 'its position in the data is not what was saved',
      'renamed': 'it belongs to step 4'}
  assert slices.problem_in(str(folder), 10, '1' * 16).startswith('it belongs to another run')


def test_several_processes_do_not_try_a_save_that_may_not_fit(study, monkeypatch):
  free = {'bytes': 1000}
  monkeypatch.setattr(storage, 'free_bytes', lambda _: free['bytes'])

  def disturb(step):
    # One process stands for several; the programs that they run together are others' tests.
    study.checkpoints._is_refused = lambda size: free['bytes'] < size
    free['bytes'] = 5 if 5 < step < 8 else 1000

  study.train(disturb)
  assert study.kept == ['4', '10', '11']
  assert 'step 6 could not be saved: no space is left' in study.manifest['storage'][0]


def test_checkpoints_of_the_layout_before_are_refused_in_words(study, monkeypatch):
  """Their position was a tree of numbers."""
  monkeypatch.setattr(checkpoint, '_as_json', lambda position: {
      'step': position['step'], 'tokens_by_domain': position['tokens_by_domain']})
  with pytest.raises(Killed):
    study.train(lambda step: raised(Killed) if step == 3 else None)
  monkeypatch.undo()
  problem = 'an earlier version wrote it, without the sums of an interval, so no run can go on'
  assert slices.problem_in(
      str(study.folder / 'checkpoints'), 2, '0' * 16).startswith(problem)
  with pytest.raises(RunError, match=f'checkpoints/2 is damaged: {problem}'):
    study.train()
  assert study.kept == ['2']


def raised(kind):
  raise kind
