"""Branches in one program: each computes what it would alone, and sends nothing to the others."""

import dataclasses
import os
import shutil

import jax
import numpy as np
import pytest

from btx_jax import base, btx
from btx_jax.errors import UsageError
from btx_jax.pipeline import Pipeline
from btx_jax.preflight import hlo
from btx_jax.run import Objective, Optimizer, Run
from btx_jax.study import manifest, plan
from btx_jax.training import loop, metrics
from btx_jax.training.checkpoint import Checkpoints
from btx_jax.training.program import SingleRun, StackedBranches
from tests import studies
from tests.helpers import (
  TINY,
  assert_trees_close,
  assert_trees_equal,
  final_params,
  initial_params,
  random_batch,
  random_params,
  use_mesh,
)

MESH = (1, 2, 4, 1)


def branches():
  """Three runs, for four slots, of different lengths and learning rates."""
  one = Run(
      name='a', init='random', sources=(), weights={'code': 1.0}, model=TINY,
      optimizer=Optimizer(peak_lr=0.01, warmup=0.3), steps=4, seq_len=15, batch_size=16,
      microbatches=2, objective=Objective(freeze=('attn/o$',)), recipe=None,
      expert_names=(), seed=0)
  other = lambda name, steps, rate: dataclasses.replace(
      one, name=name, steps=steps, optimizer=dataclasses.replace(one.optimizer, peak_lr=rate))
  return [one, other('b', 2, 0.1), other('c', 3, 0.003)]


def batch_of(seed):
  return jax.tree.map(lambda x: x.reshape(2, 8, *x.shape[1:]), random_batch(TINY, 16, seed=seed))


@pytest.fixture(scope='module')
def stacked():
  """The program, its compiled form, and three steps of it."""
  runs = branches()
  with use_mesh(MESH) as mesh:
    program = StackedBranches(runs, mesh, num_domains=2)
    state = program.join_states([
        program.create_state(random_params(TINY, seed=i)) for i in range(3)])
    starts = jax.device_get([program.branch_state(state, i) for i in range(3)])
    history = []
    for step in (1, 2, 3):
      batches = [batch_of(10 * step + i) for i in (0, 1, 2, 2)]
      batch = program.global_batch(jax.tree.map(lambda *x: np.stack(x), *batches))
      state, found = program.step(state, batch, [step <= run.steps for run in runs])
      history.append(jax.device_get(found))
    ends = jax.device_get([program.branch_state(state, i) for i in range(3)])
    return program, mesh, starts, history, ends, state


def test_each_branch_is_what_it_would_be_alone(stacked):
  program, _, starts, history, ends, _ = stacked
  with use_mesh(MESH) as mesh:
    for i, run in enumerate(branches()):
      alone = SingleRun(run, mesh, num_domains=2)
      state = alone.create_state(random_params(TINY, seed=i))
      assert_trees_equal(jax.device_get(state.params), starts[i].params)
      for step in range(1, min(run.steps, 3) + 1):
        state, found = alone.step(state, alone.global_batch(batch_of(10 * step + i)), [True])
        ours = program.branch_metrics(history[step - 1], i)
        np.testing.assert_allclose(ours['loss'], found['loss'], rtol=1e-5)
        np.testing.assert_allclose(ours['grad_norm'], found['grad_norm'], rtol=1e-4)
        np.testing.assert_array_equal(ours['tokens_by_domain'], found['tokens_by_domain'])
      assert_trees_close(ends[i], jax.device_get(state), rtol=1e-4)
      assert ends[i].step == min(run.steps, 3)
      assert_trees_equal(*(at[i].params['layers']['attn']['o'] for at in (starts, ends)))  # frozen


def test_states_that_are_joined_are_given_away():
  """Leaf by leaf, so that memory never holds all of them twice."""
  with use_mesh(MESH) as mesh:
    program = StackedBranches(branches(), mesh, num_domains=2)
    states = [program.create_state(random_params(TINY, seed=i)) for i in range(3)]
    program.join_states(states)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(states))


def test_no_collective_crosses_branches(stacked):
  program = stacked[0]
  with use_mesh(MESH) as mesh:
    compiled = program.lower().compile()
  sent = hlo.collectives(hlo.parse(compiled.as_text()), mesh)
  assert {'fsdp'} <= {axis for each in sent for axis in each.axes}  # it does see some
  # Only the metrics, a few numbers, are sent to all.
  crossing = [each for each in sent if 'expert' in each.axes]
  assert all(np.prod(shape) <= 64 for each in crossing for shape in each.shapes), crossing


def test_a_branch_lives_on_its_own_slice_of_the_devices(stacked):
  _, mesh, *_, state = stacked
  up = state.params['layers']['ffn']['up']
  for e in range(4):
    devices = {shard.device for shard in up.addressable_shards if shard.index[0].start == e}
    assert devices == set(mesh.devices[:, :, e].ravel())


# A study


def get_config(text, stacked=()):
  config = studies.get_config(text)
  config.stacked = stacked
  config.evaluation.every = 3
  config.runs = {
      'seed': base.run(base.random(), {'prose': 1}, steps=2),
      'expert/code': base.run(base.checkpoint('seed'), {'code': 1}, steps=5),
      'expert/math': base.run(base.checkpoint('seed'), {'math': 1}, steps=3,
                              optimizer={'peak_lr': 3e-3}),
  }
  return config


BOTH = ('expert/code', 'expert/math')


@pytest.fixture(scope='module')
def apart(text, tmp_path_factory):
  pipeline = Pipeline(get_config(text), str(tmp_path_factory.mktemp('apart')))
  pipeline.train()
  return pipeline


def losses(pipeline, name):
  return {line['step']: line['loss'] for line in metrics.read(pipeline.folder(name))
          if 'loss' in line}


def watch_mixing(patched):
  """The run btx ends before its first step; the list of (its parameters, what was mixed)."""
  found, forms, run, mix = [], [], loop.run, btx.mix

  def mix_and_note(experts, *args):
    forms.append(type(experts))
    return mix(experts, *args)

  def run_or_stop(jobs, *args):
    if jobs[0].run.name != 'btx':
      return run(jobs, *args)
    program = SingleRun(jobs[0].run, args[0], 3)
    found.append((jax.device_get(jobs[0].make_state(program).params), *forms))
    raise KeyboardInterrupt

  patched.setattr(btx, 'mix', mix_and_note)
  patched.setattr(loop, 'run', run_or_stop)
  return found


def test_a_stacked_study_is_that_of_separate_jobs(apart, text, tmp_path, monkeypatch, capsys):
  """Stopped and resumed, together and with a branch that goes on alone; then mixed in memory."""
  config = get_config(text, BOTH)
  config.runs.btx = base.run(base.mix('seed', *BOTH, 'seed'), {'code': 1}, steps=1)
  pipeline = Pipeline(config, str(tmp_path / 'work'))
  shutil.copytree(apart.folder('seed'), pipeline.folder('seed'))
  save = Checkpoints.save

  def save_then_stop(self, step, *args):
    save(self, step, *args)
    if step == 3:  # expert/math is done, expert/code is saved at step 2
      raise KeyboardInterrupt

  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    patched.setattr(Checkpoints, 'save', save_then_stop)
    pipeline.train()
  assert [pipeline.state(name) for name in BOTH] == [manifest.STOPPED] * 2
  alone = Pipeline(pipeline.config, shutil.copytree(tmp_path / 'work', tmp_path / 'alone'))
  assert alone.train('expert/code')
  capsys.readouterr()
  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    mixed = watch_mixing(patched)
    pipeline.train()
  assert '2 branches in 2 slots' in capsys.readouterr().out
  (in_memory, form), = mixed
  assert form is dict  # one stacked tree, where separate jobs are read as sources
  by_slices = initial_params(pipeline, 'btx')
  assert_trees_equal(in_memory['layers'].pop('ffn'), by_slices['layers'].pop('ffn'))
  assert_trees_close(in_memory, by_slices, rtol=1e-6)
  for finished, names in ((pipeline, BOTH), (alone, ['expert/code'])):
    for name in names:
      assert finished.state(name) == manifest.COMPLETE
      ours, theirs = losses(finished, name), losses(apart, name)
      assert ours.keys() == theirs.keys()
      np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)
      assert_trees_close(final_params(finished, name), final_params(apart, name), rtol=1e-3)
      about, other = (manifest.read(p.folder(name)) for p in (finished, apart))
      assert about['identity'] == other['identity']
      assert about['tokens_by_domain'] == other['tokens_by_domain']
  bits = [line for line in metrics.read(pipeline.folder('expert/code')) if 'bits_per_byte' in line]
  assert [line['step'] for line in bits] == [3]


def test_stacked_runs_come_together_after_all_that_they_start_from(text):
  config = get_config(text, BOTH)
  branch = lambda name: base.run(base.checkpoint(name), {'math': 1}, steps=1)
  config.runs = {'seed': config.runs.seed, 'expert/code': branch('seed'), 'x': branch('seed'),
                 'expert/math': branch('y'), 'y': branch('x')}
  runs = plan.make_plan(config, 330)
  assert list(runs) == ['seed', 'x', 'y', 'expert/code', 'expert/math']
  assert [[run.name for run in group] for group in plan.groups(runs.values(), BOTH)] == [
      ['seed'], ['x'], ['y'], list(BOTH)]


@pytest.mark.parametrize('change, message', [
    (lambda c: c.runs['expert/math'].update(model={'dtype': 'bfloat16'}), 'model.dtype is'),
    (lambda c: c.runs['expert/math'].update(train={'batch_size': 32}), 'batch_size is 16 and 32'),
    (lambda c: c.runs['expert/math'].update(optimizer={'b2': 0.9}), 'optimizer.b2 is 0.95 and 0.9'),
    (lambda c: c.update(stacked=('expert/code', 'expert/maths')), "did you mean 'expert/math'"),
    (lambda c: c.update(stacked=('seed', 'expert/code')), 'in a circle'),
])
def test_what_cannot_be_one_program_is_refused(text, tmp_path, change, message):
  config = get_config(text, BOTH)
  change(config)
  with pytest.raises(UsageError, match=message):
    Pipeline(config, str(tmp_path / 'work'))
  assert not os.path.exists(tmp_path / 'work')
