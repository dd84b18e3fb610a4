"""Losses on pairs of answers: against NumPy in float64, over microbatches and meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from btx_jax.devices import sharding
from btx_jax.model import balance
from btx_jax.run import Objective
from btx_jax.training import preferences
from btx_jax.training.loss import token_losses
from btx_jax.training.step import create_state, make_train_step
from tests.helpers import (
  TINY,
  TINY_MIXTURE,
  assert_trees_close,
  hidden_and_sums,
  normal,
  random_params,
  use_mesh,
)

SGD = optax.sgd(1.0)  # so that the change of the parameters is the gradient
DPO = Objective(loss='dpo', dpo_beta=0.5)
SIMPO = Objective(loss='simpo', simpo_beta=1.5, simpo_gamma=0.5)


def pairs_batch(cfg, counts=(2, 1, 3, 0, 2, 1, 1, 2), length=31, seed=0):
  """Rows with these numbers of pairs: prompts of one or two tokens, answers of one to three."""
  rng = np.random.default_rng(seed)
  rows = []
  for count in counts:
    row = {name: np.zeros(length, np.int32)
           for name in ('tokens', 'targets', 'segment_ids', 'positions')}
    row['loss_mask'], at = np.zeros(length, bool), 0
    for segment in range(1, 2 * count + 1):
      prompt, answer = rng.integers(1, 3), rng.integers(1, 4)
      ids, end = rng.integers(0, cfg.vocab_size, prompt + answer), at + prompt + answer - 1
      row['tokens'][at:end], row['targets'][at:end] = ids[:-1], ids[1:]
      row['segment_ids'][at:end], row['positions'][at:end] = segment, np.arange(end - at)
      row['loss_mask'][at + prompt - 1:end] = True
      at = end
    rows.append(row)
  batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  reference = -10 * rng.random((len(counts), length)).astype(np.float32)
  return batch | {'domain': (np.arange(len(counts)) % 2).astype(np.int32), 'reference': reference}


def oracle(batch, logits, objective):
  """The loss of each pair in float64, and its gradient by the logits, by the papers' formulas."""
  logits = np.float64(logits)
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  gradient, pairs = np.zeros_like(logits), []
  for row, segments in enumerate(batch['segment_ids']):
    for chosen in range(1, segments.max(), 2):
      where, scores = [], []
      for segment in (chosen, chosen + 1):
        at = np.flatnonzero(batch['loss_mask'][row] & (segments == segment))
        total = sum(logp[row, i, batch['targets'][row, i]] for i in at)
        if objective.loss == 'dpo':
          score = objective.dpo_beta * (total - batch['reference'][row, segment])
        else:
          score = objective.simpo_beta * total / len(at)
        where.append(at)
        scores.append(score)
      target = objective.simpo_gamma if objective.loss == 'simpo' else 0
      margin = scores[0] - scores[1]
      pairs.append((np.log1p(np.exp(target - margin)), margin))
      for at, sign in zip(where, (-1, 1)):
        scale = objective.dpo_beta if objective.loss == 'dpo' else objective.simpo_beta / len(at)
        for i in at:
          by_logp = sign * scale / (1 + np.exp(margin - target))
          gradient[row, i] -= by_logp * np.exp(logp[row, i])
          gradient[row, i, batch['targets'][row, i]] += by_logp
  return np.array(pairs).T, gradient


@pytest.mark.parametrize('objective', [DPO, SIMPO])
def test_loss_and_gradient_against_numpy(objective):
  """The gradient is by the logits: the head is the identity, so hidden states are logits."""
  batch = pairs_batch(TINY)
  logits = normal((*batch['tokens'].shape, TINY.vocab_size))

  def loss(logits):
    _, nll_BT = token_losses(logits, jnp.eye(TINY.vocab_size), batch['targets'],
                             batch['loss_mask'])
    found = preferences.score(nll_BT, batch, objective)
    return found.loss.sum(), found

  (value, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits)
  (losses, margins), expected = oracle(batch, logits, objective)
  np.testing.assert_allclose(value, losses.sum(), rtol=1e-5)
  np.testing.assert_allclose(gradient, expected, atol=1e-5)
  assert found.pairs.sum() == len(losses) == 12
  assert found.preferred.sum() == (margins > 0).sum()
  np.testing.assert_allclose(found.margin.sum(), margins.sum(), rtol=1e-4)


@pytest.mark.parametrize('cfg, objective, microbatches, mesh_shape', [
    (TINY, SIMPO, 2, (1, 1, 2, 2)), (TINY_MIXTURE, DPO, 1, None)])
def test_a_step_follows_the_mean_over_pairs_and_the_balancing_loss(
    cfg, objective, microbatches, mesh_shape):
  """The rows have different numbers of pairs; one row has none."""
  weight = 0.5 if cfg.num_experts else 0.0
  params, batch = random_params(cfg), pairs_batch(cfg)

  def plain(params):
    hidden, routed = hidden_and_sums(cfg, params, batch)
    return hidden @ params['head'], balance.balance_loss(routed) if routed else jnp.zeros(())

  @jax.jit
  def gradient_through_model(params, by_logits):
    return jax.vjp(plain, params)[1]((by_logits, jnp.float32(weight)))[0]

  logits, balancing = jax.jit(plain)(params)
  (losses, margins), by_logits = oracle(batch, logits, objective)
  expected = gradient_through_model(params, np.float32(by_logits / len(losses)))
  found, metrics = step(cfg, params, batch, dataclasses.replace(objective, balance_loss=weight),
                        microbatches, mesh_shape)
  assert_trees_close(found, expected, rtol=1e-3)
  np.testing.assert_allclose(metrics['loss'], losses.mean(), rtol=1e-4)
  np.testing.assert_allclose(metrics['preferences'].margin.sum(), margins.sum(), rtol=1e-3)
  assert metrics['preferences'].pairs.tolist() == [8, 4]  # of the two domains
  if weight:
    np.testing.assert_allclose(metrics['balance'], balancing, rtol=1e-4)


def test_specs_of_runs_without_pairs_are_as_before_and_others_have_what_concerns_them():
  before = {'balance_loss': 0.01, 'balance_scope': 'microbatch', 'router_z': 0.0,
            'balance_bias': 0.0, 'freeze': ()}
  assert Objective(dpo_beta=0.2, simpo_gamma=3.0).spec() == before
  assert DPO.spec() == before | {'loss': 'dpo', 'dpo_beta': 0.5}
  assert SIMPO.spec() == before | {'loss': 'simpo', 'simpo_beta': 1.5, 'simpo_gamma': 0.5}


def step(cfg, params, batch, objective, microbatches, mesh_shape):
  """The gradient and the metrics of one train step."""
  batch = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch)
  state = create_state(params, SGD)
  step_fn = jax.jit(make_train_step(cfg, SGD, objective, num_domains=2))
  with use_mesh(mesh_shape) as mesh:
    if mesh:
      batch = jax.device_put(batch, sharding.batch_sharding(mesh, leading=1))
      state = jax.device_put(state, sharding.shardings(state, mesh))
    new, metrics = jax.device_get(step_fn(state, batch))
  return jax.tree.map(lambda a, b: np.asarray(a) - b, params, new.params), metrics
