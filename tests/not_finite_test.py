"""Numbers that are not finite: noticed in loss, gradient and update, named, and skipped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax.devices import sharding
from btx_jax.outer import Outer
from btx_jax.run import Objective, Optimizer, Run
from btx_jax.training import not_finite, optim, spikes
from btx_jax.training import step as step_lib
from tests.helpers import TINY_MIXTURE, assert_trees_equal, random_batch, random_params

RUN = Run(name='btx', init='random', sources=(), weights={'code': 0.5, 'math': 0.5},
          model=TINY_MIXTURE, optimizer=Optimizer(), steps=9, seq_len=15, batch_size=8,
          microbatches=1, objective=Objective(), recipe=None, expert_names=('a', 'b', 'c', 'd'),
          seed=0)
HARMFUL, HUGE_RATE = 47, 3  # a first token with a harmful gradient; the update with a huge rate
UP = 'layers/ffn/experts/up'


@pytest.fixture(scope='module')
def step():
  """A step that skips what is not finite."""
  def rate(count):
    return jnp.where(count == HUGE_RATE, 3e38, 1e-3)

  def harmed(f, microbatches):
    grads, sums = summed(f, microbatches)
    nan = jnp.where(microbatches[0]['tokens'][0, 0, 0] == HARMFUL, jnp.nan, 0)
    experts = grads['layers']['ffn']['experts']
    experts = {**experts, 'up': experts['up'].at[1, 2, 0, 0].add(nan)}
    ffn = {**grads['layers']['ffn'], 'experts': experts}
    return {**grads, 'layers': {**grads['layers'], 'ffn': ffn}}, sums

  summed = step_lib._sum_over_microbatches
  tx = optim.adamw(Optimizer(), rate)
  take = jax.jit(step_lib.make_train_step(TINY_MIXTURE, tx, num_domains=2, skip_nonfinite=True))
  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(step_lib, '_sum_over_microbatches', harmed)
    state = step_lib.create_state(random_params(TINY_MIXTURE), tx)
    take = take.lower(state, batch(0)).compile()
  return take, state


def batch(first_token: int):
  found = jax.tree.map(lambda x: x[None], random_batch(TINY_MIXTURE))
  found['tokens'][0, 0, 0] = first_token
  return found


def moments(state):
  return [leaf for path, leaf in jax.tree.leaves_with_path(state.opt_state)
          if '/mu/' in sharding.path_of(path) or '/nu/' in sharding.path_of(path)]


def test_a_bad_step_is_named_and_leaves_parameters_and_moments_as_they_were(step):
  take, before = step
  said = []
  for update, first_token in enumerate([0, HARMFUL, 0, 0, 0]):
    after, metrics = take(before, batch(first_token))
    assert int(optim.updates(after.opt_state)) == update + 1  # the rate follows the step
    is_bad = first_token == HARMFUL or update == HUGE_RATE
    assert bool(metrics['is_finite']) is not is_bad
    assert len(moments(after)) == 2 * len(jax.tree.leaves(after.params))
    if is_bad:
      assert_trees_equal(after.params, before.params)
      assert_trees_equal(moments(after), moments(before))
      said.append(not_finite.describe(RUN, 7, jax.device_get(metrics), ['code', 'math']))
    else:
      assert not np.array_equal(after.params['embed'], before.params['embed'])
    before = after
  assert said[0] == (f'step 7 on text of code, math: the gradient is not finite in {UP} of layer '
                     '1, expert 2 (c); the parameters before it were finite')
  assert said[1].startswith('step 7 on text of code, math: the updated parameters are not finite, '
                            'or far too large, in ')
  assert said[1].endswith('; the parameters before it were finite')


def test_a_start_that_was_not_finite_is_named(step):
  take, state = step
  params = {**state.params, 'embed': state.params['embed'].at[5, 3].set(jnp.inf)}
  state = step_lib.TrainState(state.step, params, state.opt_state)
  metrics = jax.device_get(take(state, batch(5))[1])
  assert not_finite.places_before(metrics, RUN) == 'embed'
  assert not not_finite.is_by_update(metrics)
  assert not_finite.describe(RUN, 1, metrics, ['code', 'math']).endswith(
      'the parameters before it were not finite')


def test_many_places_are_summed_up():
  squares = {f'layer_{i}': np.float32(i < 9 or np.nan) for i in range(14)}
  squares['layers'] = {'attn': {'q': np.array([np.inf, 0, np.nan], np.float32)}}
  assert not_finite._places(squares, ()) == (
      'layer_10, layer_11, layer_12, 3 more tensors')
  assert not_finite._places({'a': {'b': squares['layers']['attn']['q'] * np.nan}}, ()) == 'a/b'
  assert not_finite._places(squares['layers'], ()) == 'attn/q of layers 0, 2'


@pytest.mark.parametrize('outer, advice', [
    (None, "checkpoint('btx', step=4, state=True)."), (Outer(2), "checkpoint('btx', step=4).")])
def test_the_advice_is_one_that_a_config_can_follow(outer, advice):
  """No run can take the optimizer state of several workers."""
  run = dataclasses.replace(RUN, outer=outer)
  assert str(not_finite.error_later(run, 'step 5', '/x', [4, 8])).endswith(advice)


def test_a_spike_is_far_above_the_last_hundred_losses():
  rng = np.random.default_rng(0)
  before = [9.0] * 50 + list(3 + 0.1 * rng.normal(size=spikes.LAST))
  assert spikes.describe(151, 3.5, before) == ''
  assert spikes.describe(151, 3.8, before).startswith('the loss rose to 3.800 at step 151; over ')
  assert spikes.describe(60, 30.0, before[:spikes.LAST - 1]) == ''
  assert spikes.describe(151, 1.0, before) == ''  # it may fall
