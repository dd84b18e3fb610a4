"""metrics.jsonl of a run that was killed is that of an undisturbed run, but for time and memory.

The loop is the real one; instead of a model, its program counts steps. Most tests keep checkpoints
in memory, so that a run can be killed everywhere.
"""

import dataclasses
import errno
import functools
import json
import os
import sys
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax.errors import RunError
from btx_jax.model.balance import RoutingSums
from btx_jax.run import Objective, Optimizer, Run
from btx_jax.training import loop, metrics, saving, spikes
from btx_jax.training.step import TrainState
from tests.helpers import TINY_MIXTURE

DOMAINS = ['code', 'math']
OF_THE_MACHINE = ('time', 'tokens_per_second', 'mfu', 'input_wait', 'memory')
STEPS = 11
# No interval divides another, except that steps 4 and 8 are saved and evaluated.
SETTINGS = loop.Settings(log_every=3, evaluation_every=4, checkpoint_every=2, checkpoints_kept=2)
RUN = Run(name='btx', init='random', sources=(), weights={'code': 0.5, 'math': 0.5},
          model=TINY_MIXTURE, optimizer=Optimizer(), steps=STEPS, seq_len=15, batch_size=8,
          microbatches=1, objective=Objective(), recipe=None, expert_names=('a', 'b', 'c', 'd'),
          seed=0, skip_nonfinite=2)
# Numbers of these steps are not finite: one is due for a line, and two in a row lie between lines.
BAD = (6, 9, 10)
SPIKE = 8  # its loss is far above those before; there is no line until 9


class Killed(BaseException):
  """The process ends here."""


def state_after(step: int) -> TrainState:
  return TrainState(jnp.int32(step), {'embed': jnp.full(2, step, jnp.float32)}, {})


class Counting:
  """A program whose parameters are the number of steps, and whose metrics depend on nothing else.

  It raises Killed instead of step `killed`.
  """
  slots = 1

  def __init__(self, killed: int = 0):
    self._killed = killed
    self.state_shapes = jax.eval_shape(lambda: state_after(0))
    at = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    self.state_shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), self.state_shapes)

  def join_states(self, states):
    return states[0]

  def branch_state(self, state, branch):
    del branch
    return state

  def branch_metrics(self, found, branch):
    del branch
    return found

  def global_batch(self, batch):
    return batch

  def batches(self, orders, first_step, last_step):
    del orders
    for step in range(first_step, last_step + 1):
      if step == self._killed:
        raise Killed
      yield step

  def step(self, state, batch, active):
    del active
    assert int(state.step) == batch - 1
    return state_after(batch), step_metrics(batch)


def step_metrics(step: int) -> dict:
  rng = np.random.default_rng(step)
  tokens = rng.integers(1, 99, 2)
  nll = tokens * rng.uniform(1, 2, 2)
  L, E = TINY_MIXTURE.num_layers, TINY_MIXTURE.num_experts
  if step == SPIKE:
    nll *= 50
  finite = {'is_finite': np.bool_(step not in BAD), 'squares': {
      name: {'embed': np.float32(np.nan if name == 'gradient' and step in BAD else 1)}
      for name in ('params', 'gradient', 'new_params')}}
  by_expert = (rng.uniform(0, 9, (L, 2, E)) for _ in range(3))
  return finite | {
          'loss': nll.sum() / tokens.sum(), 'nll_by_domain': nll, 'tokens_by_domain': tokens,
          'grad_norm': 1.0, 'grad_norms': {'embed': 1.0}, 'param_norms': {'embed': step},
          'balance': 1.0, 'router_z': 0.0,
          'routing': RoutingSums(*by_expert, *(rng.uniform(1, 9, (L, 2)) for _ in range(3)))}


def evaluate(model, params):
  """Scores that are those of the right step only; the lowest is that of step 4."""
  del model
  step = float(params['embed'][0])
  return {domain: {'bits_per_byte': 2 + abs(step - 4)} for domain in DOMAINS}


class InMemory:
  """Checkpoints that survive a kill in a dict. Positions are stored as JSON, as on disk."""
  stored: typing.ClassVar[dict[int, tuple[TrainState, str]]] = {}

  def __init__(self, *_):
    self.best, self.failures = 0, saving.Failures()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def wait(self):
    pass

  def wait_for(self, step):
    pass

  def shortage(self, *_):
    return ''

  @property
  def steps(self):
    return sorted(self.stored)

  def newest(self, like):
    del like
    if not self.stored:
      return 0, None, {}
    state, position = self.stored[self.steps[-1]]
    return self.steps[-1], state, json.loads(position)

  def save(self, step, state, position):
    self.stored[step] = state, json.dumps(position)
    kept = {*self.steps[-2:], self.best}
    for each in self.stored.keys() - kept:
      del self.stored[each]


@pytest.fixture
def in_memory(monkeypatch):
  monkeypatch.setattr(InMemory, 'stored', {})
  monkeypatch.setattr(loop, 'Checkpoints', InMemory)


def train(folder, killed=0, evaluate=evaluate, on_checkpoint=lambda *_: None, domains=DOMAINS,
          run=RUN, on_trouble=lambda *_: None, settings=SETTINGS, steps_kept=()):
  """Continues the run in a folder; see Counting for `killed`."""
  job = loop.Job(run, str(folder), lambda _: state_after(0), None, '0' * 16, steps_kept)
  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(loop, 'make_program', lambda *_: Counting(killed))
    patched.setattr(spikes, 'LAST', 5)
    loop.run([job], None, domains, settings, evaluate, on_checkpoint, on_trouble)


def lines_of(folder):
  """The file without figures of the machine; every line must be whole."""
  raw = (folder / metrics.NAME).read_bytes()
  found = metrics.read(str(folder))
  assert len(found) == raw.count(b'\n') and raw.endswith(b'\n')
  return [{key: value for key, value in line.items() if key not in OF_THE_MACHINE}
          for line in found]


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """With checkpoints on disk."""
  folder = tmp_path_factory.mktemp('undisturbed')
  train(folder)
  lines = lines_of(folder)
  assert [(line['step'], 'loss' in line, line.get('skipped')) for line in lines] == [
      (3, True, None), (4, False, None), (6, True, 1), (8, False, None), (9, True, 2),
      (11, True, 3)]
  for line, steps in ((lines[0], (1, 2, 3)), (lines[2], (4, 5)), (lines[4], (7, 8))):
    found = [step_metrics(step) for step in steps]
    assert line['loss'] == pytest.approx(
        sum(each['nll_by_domain'].sum() for each in found)
        / sum(each['tokens_by_domain'].sum() for each in found))
  said = [warning for line in lines for warning in line.get('warnings', [])
                 if warning.startswith('the loss rose to')]
  assert said == lines[4]['warnings'][:1]
  return lines


def test_killed_with_checkpoints_on_disk(undisturbed, tmp_path):
  with pytest.raises(Killed):
    train(tmp_path, killed=6)
  train(tmp_path)
  assert lines_of(tmp_path) == undisturbed


@pytest.mark.parametrize('is_lost', [False, True])
def test_killed_before_any_step(undisturbed, tmp_path, in_memory, is_lost):
  """And perhaps before the newest checkpoint was written."""
  for step in range(1, STEPS + 1):
    InMemory.stored.clear()
    folder = tmp_path / str(step)
    with pytest.raises(Killed):
      train(folder, killed=step)
    if is_lost and InMemory.stored:
      del InMemory.stored[max(InMemory.stored)]
    train(folder)
    assert lines_of(folder) == undisturbed, step


@pytest.mark.parametrize('where', ['evaluation', 'save', 'saved', 'line'])
def test_killed_within_any_step(undisturbed, tmp_path, in_memory, monkeypatch, where):
  """In the evaluation, before and after the save, or when half of a line is written."""
  def kill_if(here, now):
    if (here, now) == (where, step):
      raise Killed

  def killed_evaluate(model, params):
    kill_if('evaluation', params['embed'][0])
    return evaluate(model, params)

  def killed_write(self, now, **values):
    if (where, step) == ('line', now):
      with open(self._path, 'a', encoding='utf-8') as file:
        file.write('{"step": 4, "lo')
    kill_if('line', now)
    return write(self, now, **values)

  def killed_save(self, now, *given):
    kill_if('save', now)
    save(self, now, *given)

  write, save, kills = metrics.MetricsFile.write, InMemory.save, 0
  monkeypatch.setattr(metrics.MetricsFile, 'write', killed_write)
  monkeypatch.setattr(InMemory, 'save', killed_save)
  for step in range(1, STEPS + 1):
    InMemory.stored.clear()
    folder = tmp_path / str(step)
    try:
      train(folder, evaluate=killed_evaluate, on_checkpoint=lambda _, now, *__: kill_if(
          'saved', now))
    except Killed:
      kills += 1
    else:
      continue  # nothing was due there
    step = 0
    train(folder)
    assert lines_of(folder) == undisturbed
  assert kills == {'evaluation': 2, 'save': 6, 'saved': 6, 'line': 6}[where]


def test_preempted(undisturbed, tmp_path, in_memory, monkeypatch):
  """SIGTERM saves at once; an evaluation that was due is made up for, also if it was the best."""
  for step in range(1, STEPS):
    InMemory.stored.clear()
    folder, noted = tmp_path / str(step), []
    answers = iter([False] * (step - 1) + [True])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
      patched.setattr(loop.distributed, 'preempted', functools.partial(next, answers))
      train(folder)
    assert max(InMemory.stored) == step
    with pytest.raises(Killed):  # soon after, and before anything is saved
      train(folder, killed=step + 1)
    train(folder, on_checkpoint=lambda *given, noted=noted: noted.append(given))
    assert lines_of(folder) == undisturbed
    if step == 4:
      assert {best['step'] for _, now, _, best, _ in noted if now > 4} == {4}
      assert 4 in InMemory.stored  # kept, though two newer ones are
    health = noted[-1][-1]
    assert health['skipped_steps'] == 3 and health['loss_spike'].startswith('the loss rose')


def test_more_skipped_steps_in_a_row_than_allowed_end_the_run(
    tmp_path, in_memory, monkeypatch, capsys):
  """Also when a checkpoint and a kill came between them."""
  monkeypatch.setattr(sys.modules[__name__], 'BAD', (10, 11))
  run = dataclasses.replace(RUN, skip_nonfinite=1)
  with pytest.raises(Killed):
    train(tmp_path, killed=11, run=run)
  with pytest.raises(RunError, match=r'btx: step 11 on text of code, math: the gradient is not fi'
                     r'nite in embed; the parameters before it were finite\..* of steps 4, 8, 10'):
    train(tmp_path, run=run)
  assert max(InMemory.stored) == 10
  said = capsys.readouterr().out
  assert said.count('The step is skipped, and so are others like it, at most 1 in a row') == 1


def test_skipped_steps_are_no_updates(tmp_path, in_memory, monkeypatch):
  monkeypatch.setattr(sys.modules[__name__], 'BAD', (1, 2, 3))
  with pytest.raises(RunError, match=r'step 3 on .* No update came before, so a lower'):
    train(tmp_path)


@pytest.mark.parametrize('damage, said', [
    (lambda raw: None, 'is missing'),
    (lambda raw: raw[:len(raw) // 2], 'has lost lines'),
    (lambda raw: raw.replace(b'"step": 3', b'"step": 2'), 'is damaged'),
    (lambda raw: b'\x00' + raw[1:], 'is damaged')])
def test_a_damaged_file_is_said_once_and_the_run_goes_on(
    tmp_path, in_memory, capsys, damage, said):
  with pytest.raises(Killed):
    train(tmp_path, killed=9)
  path = tmp_path / metrics.NAME
  raw = damage(path.read_bytes())
  path.unlink() if raw is None else path.write_bytes(raw)
  with pytest.raises(Killed):
    train(tmp_path, killed=11)
  assert f'metrics.jsonl {said}' in capsys.readouterr().out
  train(tmp_path)
  assert said not in capsys.readouterr().out
  assert [line['step'] for line in lines_of(tmp_path)][-2:] == [9, 11]


def test_damage_between_the_last_step_and_the_manifest_is_said(tmp_path, in_memory, capsys):
  """Otherwise the manifest of the complete run would vouch for the damaged file."""
  train(tmp_path)
  path = tmp_path / metrics.NAME
  path.write_bytes(path.read_bytes()[:-3])
  train(tmp_path)
  assert 'metrics.jsonl has lost lines' in capsys.readouterr().out


def test_lines_whose_sync_fails_are_written_again(undisturbed, tmp_path, in_memory, monkeypatch,
                                                  capsys):
  """NFS tells of a full disk there; what was written since the last sync may be lost."""
  sync, path, calls = os.fsync, tmp_path / metrics.NAME, []

  def fails(file):
    if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
      calls.append(file)
      if len(calls) in (2, 3):
        os.truncate(file, 0)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    sync(file)

  monkeypatch.setattr(os, 'fsync', fails)
  train(tmp_path)
  assert lines_of(tmp_path) == undisturbed
  assert capsys.readouterr().out.count('metrics.jsonl could not be written: No space left') == 1


def test_lines_that_could_be_written_after_all_are_kept_once(tmp_path):
  late = '{"step": 2}\n'
  (tmp_path / metrics.NAME).write_text('{"step": 3}\n' + late)
  with metrics.MetricsFile(str(tmp_path), 2, metrics.Mark(9, 0, late)) as file:
    assert [line['step'] for line in file.kept] == [2]
  assert (tmp_path / metrics.NAME).read_text() == late


@pytest.mark.parametrize('mark', [(10**15, 0), (10**30, 1), (-5, 1)])
def test_the_mark_of_a_manifest_can_be_any_numbers(tmp_path, mark):
  (tmp_path / metrics.NAME).write_text('{"step": 1}\n')
  assert 'metrics.jsonl has' in metrics.problem(str(tmp_path), metrics.Mark(*mark)) or mark[0] < 0


def test_a_named_pipe_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / metrics.NAME)
  assert 'a named pipe' in metrics.problem(str(tmp_path), metrics.Mark(5, 0))
  with metrics.MetricsFile(str(tmp_path), 2, metrics.Mark(5, 0)) as file:
    assert not file.kept


def test_sums_of_an_interval_follow_their_domains(undisturbed, tmp_path, in_memory, monkeypatch):
  """A config may gain a domain in the middle of an interval."""
  with pytest.raises(Killed):
    train(tmp_path, killed=5)  # one step after a line
  monkeypatch.setattr(Counting, 'step', lambda self, state, batch, active: (
      state_after(batch), wider(step_metrics(batch))))
  train(tmp_path, domains=['web', *reversed(DOMAINS)])
  for line, like in zip(lines_of(tmp_path), undisturbed, strict=True):
    if 'loss' in like:
      assert line['tokens_by_domain'] == {'web': 0, **like['tokens_by_domain']} or line['step'] == 3
      assert line['loss_by_domain'] == pytest.approx(like['loss_by_domain'])
      assert line['routing']['gates'] == like['routing']['gates']


def wider(found: dict) -> dict:
  """The metrics of a step on the domains web, which has no tokens, math and code."""
  def widen(x, axis):
    x = np.flip(x, axis)
    return np.concatenate([np.zeros_like(x.take([0], axis)), x], axis)

  return found | {name: widen(found[name], 0) for name in ('nll_by_domain', 'tokens_by_domain')} | {
      'routing': RoutingSums(*(widen(x, 1) for x in found['routing'] if x is not None))}
