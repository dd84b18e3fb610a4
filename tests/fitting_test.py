"""Routers set from text: their sums and solve against NumPy, and a study that rests on them."""

import dataclasses
import os

from flax import linen as nn
import jax
import numpy as np
import pytest

from btx_jax import base, btx
from btx_jax.convert.hugging_face import Folder
from btx_jax.devices.mesh import BATCH_AXES
from btx_jax.errors import UsageError
from btx_jax.fitting import fit, passes, samples, solve
from btx_jax.model import llama
from btx_jax.model.attention import rope_tables
from btx_jax.model.linear import swiglu
from btx_jax.pipeline import Pipeline
from btx_jax.run import dense_model
from btx_jax.scoring import scores
from btx_jax.study import params, routers
from btx_jax.study.routers import Sums
from tests import studies
from tests.helpers import (
  TINY,
  TINY_MIXTURE,
  final_params,
  initial_params,
  normal,
  random_batch,
  random_params,
  use_mesh,
)


def layer_by_layer(params, batch) -> np.ndarray:
  """What goes into the feed-forward layers of TINY, [L, B, T, D], one layer after another."""
  norm = lambda x, p: nn.RMSNorm(epsilon=TINY.norm_eps).apply({'params': p}, x)
  x, found = params['embed'][batch['tokens']], []
  rope = rope_tables(batch['positions'], TINY)
  for number in range(TINY.num_layers):
    layer = jax.tree.map(lambda leaf, at=number: leaf[at], params['layers'])
    x += llama.Attention(TINY, BATCH_AXES).apply(
        {'params': layer['attn']}, norm(x, layer['attn_norm']), rope, batch['segment_ids'])
    found.append(norm(x, layer['ffn_norm']))
    x += swiglu(found[-1], layer['ffn'])
  return np.asarray(found, np.float64)


@pytest.fixture(scope='module')
def some_text():
  """Two batches with padding, and what goes into the feed-forward layers, [L, tokens, D]."""
  dense = random_params(TINY)
  batches = [random_batch(TINY, seed=seed, padding=3) for seed in range(2)]
  inputs = np.concatenate([
      layer_by_layer(dense, batch)[:, batch['segment_ids'] > 0] for batch in batches], 1)
  return dense, batches, inputs


@pytest.mark.parametrize('shape', [(1, 1, 1, 1), (2, 1, 1, 1), (2, 2, 2, 1)])
def test_sums_are_those_of_every_token_on_any_devices(some_text, shape):
  dense, batches, inputs = some_text
  with use_mesh(shape) as mesh:
    found = passes.sums(TINY, dense, batches, mesh)
  outer = np.einsum('lnd,lne->lde', inputs, inputs)
  assert found.tokens == inputs.shape[1]
  assert np.abs(found.outer - outer).max() < 1e-5 * np.abs(outer).max()
  assert np.abs(found.total - inputs.sum(1)).max() < 1e-5 * np.abs(outer).max()


def domains_of(x_LND, sizes) -> dict[str, Sums]:
  """The sums of consecutive tokens as those of domains named 0, 1, ..."""
  parts = np.split(x_LND, np.cumsum(sizes)[:-1], 1)
  return {str(i): Sums(np.einsum('lnd,lne->lde', x, x), x.sum(1), x.shape[1])
          for i, x in enumerate(parts)}


def test_ridge_is_least_squares_with_a_penalty_and_logits_have_unit_deviation():
  x_LND = normal((2, 90, 5)).astype(np.float64) + 0.5
  labels = ('0', '1', '2', '1')
  found = solve.columns('ridge', domains_of(x_LND, (30, 40, 20)), labels, ridge=0.1)
  y_NE = np.repeat(np.eye(3), (30, 40, 20), 0)[:, [0, 1, 2, 1]]
  for x, columns in zip(x_LND, found):
    weight = np.sqrt(0.1 * (x**2).sum() / x.shape[1])
    padded = np.concatenate([x, weight * np.eye(5)])
    expected = np.linalg.lstsq(padded, np.concatenate([y_NE, np.zeros((5, 4))]))[0]
    expected /= (x @ expected).std(0)
    assert np.abs(columns - expected).max() < 1e-6 * np.abs(expected).max()
  assert (found[..., 1] == found[..., 3]).all()  # experts of one domain


def test_mean_routers_point_to_the_mean_input_of_their_text():
  x_LND = normal((2, 90, 5)).astype(np.float64) + 0.5
  found = solve.columns('mean', domains_of(x_LND, (50, 40)), ('0', '1'), ridge=1.0)
  for x, columns in zip(x_LND, found):
    means = np.stack([x[:50].mean(0), x[50:].mean(0)], -1)
    np.testing.assert_allclose(columns, means / (x @ means).std(0), rtol=1e-9)


def test_text_of_an_expert_goes_through_no_other():
  mixture = random_params(TINY_MIXTURE)
  batch = random_batch(TINY)
  sure = np.zeros((TINY.num_layers, TINY.dim, 4), np.float32)
  one = dataclasses.replace(TINY_MIXTURE, top_k=1, router='softmax_top_k')
  alone = passes.expert_of(mixture, 2)
  assert jax.tree.structure(alone) == jax.tree.structure(llama.shapes(dense_model(one)))
  # With equal logits the bias alone chooses, and every gate is 1/4.
  biased = dataclasses.replace(one, router_bias=True)
  chosen = llama.with_bias(biased, passes.with_routers(mixture, sure))
  chosen['layers']['ffn']['router_bias'] = np.float32([[0, 0, 1, 0]] * 2)
  chosen['layers']['ffn']['experts'] = {
      **chosen['layers']['ffn']['experts'], 'down': 4 * mixture['layers']['ffn']['experts']['down']}
  found = llama.Llama(biased).apply(
      {'params': chosen}, batch['tokens'], batch['segment_ids'], batch['positions'])[0]
  expected = llama.Llama(TINY).apply(
      {'params': alone}, batch['tokens'], batch['segment_ids'], batch['positions'])[0]
  np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.fixture(scope='module')
def study(text, tmp_path_factory):
  """Experts beside frozen shared weights, and mixtures of them that differ in their routers."""
  config = studies.modular_config(text)
  experts = ('code', 'math')
  set_from_text = base.from_text('ridge', rows=20, labels=(('seed', 'prose'),))
  config.runs.update({
      'normal': base.run(base.mix('seed', *experts)),
      'ridge': base.run(base.mix('seed', *experts, routers=set_from_text)),
  })
  pipeline = Pipeline(config, str(tmp_path_factory.mktemp('fitting')))
  pipeline.train()
  return pipeline


def mean_bits(study, name: str) -> float:
  found = scores.read(study, study.runs[name], scores.FINAL)
  return np.mean([of_domain['bits_per_byte'] for of_domain in found.values()])


def test_routers_from_text_beat_random_ones(study):
  assert mean_bits(study, 'ridge') < mean_bits(study, 'normal')
  figures = routers.figures(study, study.runs['ridge'])
  assert min(figures['accuracy']) > 0.6 and min(figures['accuracy_alone']) > 0.6
  assert figures['labels'] == ['prose', 'code', 'math']
  assert figures['temperature'] in fit.TEMPERATURES
  assert np.allclose(np.sum(figures['load'], -1), 1)


def test_text_of_a_domain_was_read_by_its_own_expert(study):
  run, text = study.runs['ridge'], study.prepare_text()
  kept = routers.sums(study, run)
  for name in ('math', 'code'):
    batches = samples.batches(study, samples.to_fit(samples.rows(run, text, name)))
    with jax.set_mesh(study.mesh):
      own, other = (passes.sums(study.runs[each].model, final_params(study, each), batches,
                                study.mesh).outer for each in (name, 'seed'))
    largest = np.abs(own).max()
    assert np.abs(kept[name].outer - own).max() < 1e-6 * largest
    assert np.abs(kept[name].outer - other).max() > 1e-3 * largest


def test_routers_follow_from_the_sums_that_are_kept(study):
  run = study.runs['ridge']
  found = solve.columns('ridge', routers.sums(study, run), run.routers.labels, run.routers.ridge)
  temperature = routers.figures(study, run)['temperature']
  np.testing.assert_allclose(routers.of(study, run), found / temperature, rtol=1e-6)
  start = initial_params(study, 'ridge')['layers']['ffn']['router']
  np.testing.assert_array_equal(start, routers.of(study, run))


def test_routers_are_exported_as_they_are(study, tmp_path):
  from btx_jax.commands.export import export_run
  export_run(study, 'ridge', str(tmp_path / 'out'), 'float32')
  folder = Folder(str(tmp_path / 'out'))
  found = folder.read('layers/ffn/router', tuple(slice(0, n) for n in (2, 16, 3)))
  np.testing.assert_array_equal(found, routers.of(study, study.runs['ridge']))


def test_the_expert_read_for_the_sums_is_that_of_the_mixture(study):
  run = study.runs['ridge']
  with jax.set_mesh(study.mesh):
    read = params.expert(study, run, 1, study.mesh)
    sliced = passes.expert_of(params.unrouted(study, run, study.mesh), 1)
  for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(sliced), strict=True):
    np.testing.assert_array_equal(a, b)


def test_damaged_routers_are_noticed(study):
  run = study.runs['ridge']
  path = os.path.join(study.folder('ridge'), 'routers', 'columns.npy')
  with open(path, 'r+b') as file:
    file.seek(-1, os.SEEK_END)
    last = file.read(1)[0]
    file.seek(-1, os.SEEK_END)
    file.write(bytes([last ^ 1]))
  with pytest.raises(UsageError, match='missing or damaged'):
    routers.of(study, run)


def test_mix_refuses_routers_of_another_shape():
  experts = btx.branch(random_params(TINY), 2)
  model = dataclasses.replace(TINY, num_experts=2)
  with pytest.raises(ValueError, match=r'routers are \[2, 16, 3\].*has \[2, 16, 2\]'):
    btx.mix(experts, model, jax.random.key(0), routers=np.zeros((2, 16, 3)))
