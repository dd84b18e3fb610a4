"""The network: causality, document borders, and each part against an independent form."""

import dataclasses
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax.devices.mesh import AXES, BRANCH_BATCH_AXES
from btx_jax.errors import UsageError
from btx_jax.model import attention, llama
from btx_jax.model.config import REMATS, Config, num_params, train_flops_per_token
from tests.helpers import (
  TINY,
  TINY_MIXTURE,
  assert_trees_close,
  hidden_and_sums,
  normal,
  random_batch,
  random_params,
)


@pytest.mark.parametrize('cfg', [TINY, TINY_MIXTURE], ids=['dense', 'mixture'])
def test_a_position_depends_on_its_own_documents_past_only(cfg):
  params = random_params(cfg)
  batch = random_batch(cfg, rows=2)

  def output_at(embeddings, row, at):
    """One position's output, as a function of all positions' embeddings."""
    table = embeddings.reshape(-1, cfg.dim)
    tokens = jnp.arange(table.shape[0]).reshape(2, -1)
    wide = dataclasses.replace(cfg, vocab_size=table.shape[0])
    head = jnp.zeros((cfg.dim, len(table)))
    out, _ = hidden_and_sums(
        wide, {**params, 'embed': table, 'head': head}, batch | {'tokens': tokens})
    return out[row, at].sum()

  gradient = jax.jit(jax.grad(output_at))
  embeddings = params['embed'][batch['tokens']]
  for row, at in ((0, 7), (1, 14)):
    reaches = np.abs(gradient(embeddings, row, at)).max(-1) > 0
    segments = batch['segment_ids']
    expected = np.zeros_like(reaches)
    expected[row] = (np.arange(15) <= at) & (segments[row] == segments[row, at])
    np.testing.assert_array_equal(reaches, expected)


def test_a_packed_document_is_computed_as_if_it_were_alone():
  params, batch = random_params(TINY), random_batch(TINY, rows=1)
  packed, _ = hidden_and_sums(TINY, params, batch)
  for segment in np.unique(batch['segment_ids']):
    at = batch['segment_ids'][0] == segment
    tokens = batch['tokens'][:, at]
    alone, _ = hidden_and_sums(TINY, params, {
        'tokens': tokens, 'segment_ids': np.ones_like(tokens),
        'positions': np.arange(tokens.shape[1], dtype=np.int32)[None]})
    np.testing.assert_allclose(packed[:, at], alone, atol=2e-5)


def test_every_remat_that_a_config_can_name_exists():
  assert ('none', *llama.REMAT_POLICIES) == REMATS


@pytest.mark.parametrize('cfg', [TINY, TINY_MIXTURE], ids=['dense', 'mixture'])
def test_scan_and_remat_change_nothing(cfg):
  params, batch = random_params(cfg), random_batch(cfg)

  def unrolled(params):
    rope = attention.rope_tables(batch['positions'], cfg)
    x = params['embed'][batch['tokens']]
    for i in range(cfg.num_layers):
      layer = jax.tree.map(lambda w, i=i: w[i], params['layers'])
      x, _ = llama.Block(cfg).apply(
          {'params': layer}, x, i, rope, batch['segment_ids'], batch['tokens'], None, None)
    return nn.RMSNorm(epsilon=cfg.norm_eps).apply({'params': params['norm']}, x)

  def scanned(params, model):
    hidden, sums = hidden_and_sums(model, params, batch)
    return (hidden ** 2).mean(), sums

  expected, expected_grad = jax.jit(
      jax.value_and_grad(lambda params: (unrolled(params) ** 2).mean()))(params)
  _, expected_sums = hidden_and_sums(cfg, params, batch)
  for remat in REMATS if cfg.num_experts else ('none', 'full'):
    model = dataclasses.replace(cfg, remat=remat)
    (value, sums), grad = jax.jit(jax.value_and_grad(scanned, has_aux=True), static_argnums=1)(
        params, model)
    assert_trees_close(sums, expected_sums, rtol=1e-6)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert_trees_close(grad, expected_grad, rtol=1e-4)


@pytest.mark.parametrize('length', [6, 16])  # in one block of queries, and in four
@pytest.mark.parametrize('kv_heads', [4, 2, 1])
def test_attention_against_numpy(length, kv_heads):
  rng = np.random.default_rng(0)
  q = rng.normal(size=(2, 4, length, 6))
  k, v = rng.normal(size=(2, 2, kv_heads, length, 6))
  segments = np.sort(rng.integers(1, 4, (2, length)))
  expected = np.zeros_like(q)
  for b, n, t in np.ndindex(2, 4, length):
    seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
    shared = n // (4 // kv_heads)
    scores = np.exp([q[b, n, t] @ k[b, shared, s] / np.sqrt(6) for s in seen])
    expected[b, n, t] = scores / scores.sum() @ v[b, shared, seen]
  y = jax.jit(attention.attention)(*map(jnp.float32, (q, k, v)), jnp.int32(segments))
  np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize('sizes', [(1, 1, 1, 1), (2, 1, 2, 2)])
def test_the_kernel_of_tpus_is_plain_attention(sizes):
  """Interpreted, with grouped queries and packed documents, rows and heads over a mesh."""
  q, k, v = (normal((4, n, 256, 16), seed) for seed, n in enumerate((4, 2, 2)))
  segments = jnp.int32(np.sort(np.random.default_rng(0).integers(0, 4, (4, 256))))

  def value_and_grad(implementation):
    f = lambda *qkv: jnp.sin(attention.attention(*qkv, segments, implementation)).sum()
    return jax.jit(jax.value_and_grad(f, (0, 1, 2)))(q, k, v)

  devices = np.array(jax.devices()[:math.prod(sizes)]).reshape(sizes)
  with jax.set_mesh(jax.sharding.Mesh(devices, AXES)):
    (value, grad), (expected, expected_grad) = map(value_and_grad, ('splash', 'xla'))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert_trees_close(grad, expected_grad, rtol=1e-4)


def test_attention_gradients_against_jax_nn():
  q, k, v = (normal((2, n, 16, 6), seed) for seed, n in enumerate((4, 2, 2)))
  segments = jnp.int32(np.sort(np.random.default_rng(0).integers(1, 4, (2, 16))))

  def reference(q, k, v):
    mask = (segments[:, None, :, None] == segments[:, None, None, :])
    y = jax.nn.dot_product_attention(
        *(x.swapaxes(1, 2) for x in (q, k, v)), mask=mask, is_causal=True)
    return jnp.sin(y.swapaxes(1, 2)).sum()

  ours = lambda q, k, v: jnp.sin(attention.attention(q, k, v, segments)).sum()
  with jax.numpy_rank_promotion('allow'):  # jax.nn's own code promotes
    expected = jax.jit(jax.grad(reference, (0, 1, 2)))(q, k, v)
  assert_trees_close(jax.jit(jax.grad(ours, (0, 1, 2)))(q, k, v), expected, rtol=1e-5)


def test_attention_mapped_over_branches_gives_the_kernel_of_gpus_a_mask_of_every_head(monkeypatch):
  """jax's rule for vmap over that kernel reshapes the mask to [branches * B, N, T, T]."""
  branches, B, N, T = 3, 2, 4, 16
  q, k, v = (normal((branches, B, n, T, 6), seed) for seed, n in enumerate((N, 2, 2)))
  segments = jnp.int32(np.sort(np.random.default_rng(0).integers(1, 4, (branches, B, T))))
  plain = jax.nn.dot_product_attention

  def kernel(*qkv, mask, implementation):
    assert (mask.shape, implementation) == ((B, N, T, T), 'cudnn')
    return plain(*qkv, mask=mask, implementation='xla')

  monkeypatch.setattr(jax.nn, 'dot_product_attention', kernel)
  found, expected = (jax.jit(jax.vmap(lambda *args, form=form: attention.attention(
      *args, form, BRANCH_BATCH_AXES)))(q, k, v, segments) for form in ('cudnn', 'xla'))
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rotary_embeddings_see_distances_only_and_keep_far_positions_apart():
  cfg = dataclasses.replace(TINY, head_dim=64)
  x, y = jnp.asarray(normal((2, 1, 1, 1, 64)))

  def score(query_at, key_at, dtype=jnp.float32):
    turn = lambda x, at: attention.rotate(
        x.astype(dtype), attention.rope_tables(jnp.full((1, 1), at), cfg))
    return (turn(x, query_at).astype(jnp.float32) * turn(y, key_at)).sum()

  np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-4)
  # Angles in bfloat16 would make positions 1000 and 1001 the same.
  assert abs(score(1001, 3, jnp.bfloat16) - score(1000, 3, jnp.bfloat16)) > 0.1


def test_llama_3_frequency_scaling():
  cfg = dataclasses.replace(
      TINY, head_dim=64, rope_theta=500_000.0, rope_factor=8.0, rope_low_freq_factor=1.0,
      rope_high_freq_factor=4.0, rope_original_length=8192)
  expected = []
  for i in range(32):  # by wavelength, as Meta describes it
    freq = 500_000.0 ** (-2 * i / 64)
    wavelength = 2 * np.pi / freq
    if wavelength < 8192 / 4:
      expected.append(freq)
    elif wavelength > 8192 / 1:
      expected.append(freq / 8)
    else:
      smooth = (8192 / wavelength - 1) / (4 - 1)
      expected.append((1 - smooth) * freq / 8 + smooth * freq)
  np.testing.assert_allclose(attention.rope_frequencies(cfg), expected, rtol=1e-6)


@pytest.mark.parametrize('cfg', [
    TINY, TINY_MIXTURE, dataclasses.replace(TINY, tied_head=True),
    dataclasses.replace(TINY, head_dim=10, qkv_bias=True),
    dataclasses.replace(TINY_MIXTURE, qk_norm=True)])
def test_counted_parameters_are_the_parameters(cfg):
  params = jax.eval_shape(lambda: llama.init(cfg, jax.random.key(0)))
  assert num_params(cfg) == sum(x.size for x in jax.tree.leaves(params))


def test_llama_2_7b_has_the_parameters_that_the_paper_says():
  cfg = Config(vocab_size=32_000, dim=4096, ffn_dim=11_008, num_layers=32, num_heads=32,
               num_kv_heads=32)
  assert round(num_params(cfg) / 1e9, 3) == 6.738
  moe = dataclasses.replace(cfg, num_experts=4)
  assert round(num_params(moe, active=True) / 1e9, 1) == 11.1
  assert round(num_params(moe) / 1e9, 2) == 19.72
  # 6 N and attention
  assert 6 * 6.6e9 < train_flops_per_token(cfg, 4096) < 6 * 7.3e9


def test_bfloat16_stays_near_float32():
  params, batch = random_params(TINY), random_batch(TINY)
  exact, _ = hidden_and_sums(TINY, params, batch)
  rounded, _ = hidden_and_sums(dataclasses.replace(TINY, dtype='bfloat16'), params, batch)
  assert rounded.dtype == jnp.bfloat16
  error = np.float32(rounded) - exact
  assert np.sqrt((error**2).mean()) < 0.03 * np.sqrt((exact**2).mean())


def test_a_frequent_token_s_gradient_is_not_rounded_away_in_bfloat16():
  cfg = dataclasses.replace(TINY, dtype='bfloat16')
  params = random_params(cfg)
  same = np.ones((2, 600), np.int32)
  batch = {'tokens': same, 'segment_ids': np.arange(1200, dtype=np.int32).reshape(2, 600) + 1,
           'positions': 0 * same}
  loss = lambda params, cfg: jnp.float32(hidden_and_sums(cfg, params, batch)[0])[..., 0].sum()
  ours = jax.grad(loss)(params, cfg)['embed'][1]
  exact = jax.grad(loss)(params, TINY)['embed'][1]
  np.testing.assert_allclose(ours, exact, atol=0.05 * np.abs(exact).max())


@pytest.mark.parametrize('fields, message', [
    ({'dim': 10, 'num_heads': 4, 'head_dim': 0}, 'model.dim = 10'),
    ({'head_dim': 5}, 'must be even'),
    ({'num_kv_heads': 3}, 'num_kv_heads = 3'),
    ({'num_experts': 2, 'top_k': 3}, 'top_k = 3'),
    ({'dtype': 'float16'}, "'float16'"),
    ({'attention': 'flash'}, "'flash'"),
    ({'dispatch_factor': 0}, 'dispatch_factor'),
])
def test_sizes_that_cannot_be_are_refused(fields, message):
  with pytest.raises(UsageError, match=message):
    dataclasses.replace(TINY, **fields)
