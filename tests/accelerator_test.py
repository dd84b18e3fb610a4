"""Kernels that only an accelerator has, against the plain forms.

  JAX_PLATFORMS=cuda pytest -m gpu tests/accelerator_test.py
  JAX_PLATFORMS=tpu pytest -m tpu tests/accelerator_test.py
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from btx_jax.devices.mesh import BRANCH_BATCH_AXES, make_mesh
from btx_jax.model import attention, balance, config, llama, moe
from btx_jax.model.config import Config
from btx_jax.run import Objective, Optimizer
from btx_jax.training import optim
from btx_jax.training.step import create_state, make_train_step
from tests.helpers import assert_trees_close, normal, random_batch

MODEL = Config(vocab_size=512, dim=256, ffn_dim=512, num_layers=2, num_heads=4, num_kv_heads=2,
               num_experts=4, dtype='bfloat16', remat='full')


@pytest.fixture(params=[pytest.param('gpu', marks=pytest.mark.gpu),
                        pytest.param('tpu', marks=pytest.mark.tpu)], autouse=True)
def mesh(request):
  """One device of the kind that the test is marked with."""
  if jax.default_backend() != request.param:
    pytest.skip(f'needs a {request.param.upper()}; this is a {jax.default_backend()}')
  with jax.set_mesh(make_mesh(devices=jax.devices()[:1])) as made:
    yield made


def test_attention_is_the_kernel_of_the_platform_and_the_same_function():
  q, k, v = (normal((2, n, 512, 64), seed).astype(jnp.bfloat16)
             for seed, n in enumerate((4, 2, 2)))
  segments = jnp.int32(np.sort(np.random.default_rng(0).integers(1, 4, (2, 512))))

  def value_and_grad(implementation):
    f = lambda *qkv: jnp.sin(attention.attention(*qkv, segments, implementation)
                             .astype(jnp.float32)).sum()
    return jax.jit(jax.value_and_grad(f, (0, 1, 2))).lower(q, k, v).compile()

  ours, plain = value_and_grad('auto'), value_and_grad('xla')
  assert any(kernel in ours.as_text() for kernel in ('fmha', 'splash'))
  (value, grads), (expected, expected_grads) = ours(q, k, v), plain(q, k, v)
  np.testing.assert_allclose(value, expected, rtol=2e-2)
  for found, like in zip(grads, expected_grads, strict=True):
    found, like = np.float32(found), np.float32(like)
    np.testing.assert_allclose(found, like, atol=2e-2 * np.abs(like).max())


def test_attention_mapped_over_branches_is_the_same_function():
  q, k, v = (normal((3, 2, n, 512, 64), seed).astype(jnp.bfloat16)
             for seed, n in enumerate((4, 2, 2)))
  segments = jnp.int32(np.sort(np.random.default_rng(0).integers(1, 4, (3, 2, 512))))

  def grads(implementation):
    f = lambda *args: attention.attention(*args, implementation, BRANCH_BATCH_AXES)
    total = lambda *qkv: jnp.sin(jax.vmap(f)(*qkv, segments).astype(jnp.float32)).sum()
    return jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v)

  for found, like in zip(grads('auto'), grads('xla'), strict=True):
    found, like = np.float32(found), np.float32(like)
    np.testing.assert_allclose(found, like, atol=2e-2 * np.abs(like).max())


def test_the_mixture_layer_is_the_paper_s_equation():
  x = normal((2, 64, 128))
  experts = {name: normal((4, *shape), seed) for seed, (name, shape) in enumerate(
      {'gate': (128, 256), 'up': (128, 256), 'down': (256, 128)}.items())}
  gates, ids = jax.lax.top_k(jax.nn.softmax(normal((2, 64, 4), 7)), 2)

  def loss(form):
    def f(x, experts, gates):
      if form == 'dense':
        y = moe.dense_experts(x, experts, balance.dense_gates(gates, ids, 4))
      else:
        y = moe.sparse_experts(x, experts, gates, ids, form)
      return jnp.sin(y / 100).sum()
    with jax.default_matmul_precision('highest'):
      return jax.jit(jax.value_and_grad(f, (0, 1, 2)))(x, experts, gates)

  expected, expected_grads = loss('dense')
  for form in config.DISPATCHES:
    value, grads = loss(form)
    np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-3)
    assert_trees_close(grads, expected_grads, rtol=1e-3)


def test_a_step_is_the_step_of_the_plain_forms():
  batch = jax.tree.map(lambda x: x[None], random_batch(MODEL, rows=4, length=256))
  tx = optim.adamw(Optimizer(peak_lr=1e-3), optax.constant_schedule(1e-3))
  losses = []
  for changes in ({}, {'attention': 'xla', 'dispatch': 'pieces', 'remat': 'none'}):
    cfg = dataclasses.replace(MODEL, **changes)
    step = jax.jit(make_train_step(cfg, tx, Objective()))
    state, found = create_state(llama.init(cfg, jax.random.key(0)), tx), []
    for _ in range(3):
      state, metrics = step(state, batch)
      found.append(float(metrics['loss']))
    losses.append(found)
  np.testing.assert_allclose(*losses, rtol=2e-2)
  assert losses[0][2] < losses[0][0]
