"""Runs that differ only in arguments of the compiled step share it."""

import dataclasses

import jax

from btx_jax.run import Objective, Optimizer, Run
from btx_jax.training import optim
from btx_jax.training.program import SingleRun
from btx_jax.training.step import create_state, make_train_step
from tests.helpers import TINY_MIXTURE, assert_trees_close, random_batch, random_params, use_mesh

# Its routers draw noise, by the seed of the run.
MODEL = dataclasses.replace(TINY_MIXTURE, router='sample_top_1', num_layers=1)


def run(name, seed, steps, **optimizer):
  return Run(
      name=name, init='random', sources=(), weights={name: 1.0}, model=MODEL,
      optimizer=Optimizer(**optimizer), steps=steps, seq_len=15, batch_size=8, microbatches=1,
      objective=Objective(), recipe=None, expert_names=(), seed=seed)


def steps_of(step, state, batches):
  for batch in batches:
    state, metrics = step(state, batch)
  return jax.device_get((state.params, state.opt_state, metrics))


def test_runs_of_one_kind_are_compiled_once_and_are_what_they_are_alone(caplog):
  """Not by text, length, learning rates or seed, all of which are in their results."""
  runs = [run('code', 0, 9, peak_lr=1e-2), run('math', 1, 400, peak_lr=3e-3, schedule='constant')]
  batches = [jax.tree.map(lambda x: x[None], random_batch(MODEL, 8, seed=i)) for i in range(3)]
  found, compiled = [], 'Finished XLA compilation of jit(train_step)'
  with use_mesh((1, 1, 1, 1)) as mesh, jax.log_compiles():
    for each in runs:
      program = SingleRun(each, mesh, num_domains=2)
      step = lambda state, batch, to=program: to.step(state, to.global_batch(batch), [True])
      found.append(steps_of(step, program.create_state(random_params(MODEL)), batches))
    assert sum(compiled in message for message in caplog.messages) == 1
    tx = optim.adamw(runs[1].optimizer, optim.schedule(runs[1].optimizer, runs[1].steps))
    alone = jax.jit(make_train_step(MODEL, tx, runs[1].objective, 2, seed=runs[1].training_seed))
    # Bit for bit too, unless XLA does not optimise, which has the rates rounded otherwise.
    assert_trees_close(found[1], steps_of(alone, create_state(random_params(MODEL), tx), batches),
                       rtol=1e-5)
  seen = [float(metrics['routing'].gates[0, 0, 0]) for *_, metrics in found]
  assert seen[0] != seen[1]
