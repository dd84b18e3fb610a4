"""Every router: against its dense formula, finite differences, on meshes, and what it promises."""

import dataclasses
import functools
import math

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax import btx
from btx_jax.devices import sharding
from btx_jax.devices.mesh import BATCH_AXES
from btx_jax.model import balance, config, grouped, llama, moe, routers
from btx_jax.model.routers import Context, NoiseKey
from tests.helpers import TINY_MIXTURE, assert_trees_close, normal, use_mesh

B, T, D, E = 8, 6, TINY_MIXTURE.dim, 4
NOISE = NoiseKey(seed=5, step=3000, microbatch=1)
CONFIGS = {router: dataclasses.replace(TINY_MIXTURE, router=router, dispatch_factor=1.25)
           for router in config.ROUTERS}
CONFIGS['biased'] = dataclasses.replace(CONFIGS['top_k'], router_bias=True)


def inputs(seed=0, skew=0.0):
  """Logits that lean towards expert 0 by `skew`, token ids, and which of them are not padding."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(B, T, E)) + skew * np.eye(E)[:1, None]
  return (np.float32(logits), rng.integers(0, 48, (B, T)).astype(np.int32),
          np.arange(T)[None] < rng.integers(1, T + 1, (B, 1)))


@functools.partial(jax.jit, static_argnums=0)
def route(cfg, logits, tokens, counted, layer, bias=None, noise=None):
  """The router's choice; everything but the config may be an array."""
  return routers.route(cfg, logits, Context(tokens, counted, layer, bias, noise))


# The dense forms, written independently: a gate for every expert.


def softmax(x):
  x = jnp.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def best(scores, k):
  # By rank, not by `scores >= the k-th`: XLA may compute scores twice, and round them differently.
  ids = jnp.argsort(-scores, -1)[..., :k]
  return jax.nn.one_hot(ids, scores.shape[-1], dtype=bool).any(-2)


def kept(first_choice, counted):
  """Whether the expert is not full yet, token by token in the order of the batch."""
  first_choice, left = np.asarray(first_choice), np.full(E, math.ceil(1.5 * counted.sum() / E))
  found = np.zeros(counted.shape, bool)
  for place in np.argwhere(counted):
    expert = first_choice[tuple(place)]
    found[tuple(place)] = left[expert] > 0
    left[expert] -= left[expert] > 0
  return found[..., None]


def mix32(x):
  for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
    x = (x ^ x >> shift) * factor % 2**32
  return x ^ x >> 16


def dense_form(cfg, logits, tokens, layer, kept, bias=None):
  probs, k = softmax(logits) if cfg.has_router else None, cfg.k
  if cfg.router == 'top_k':
    chosen = best(logits if bias is None else probs + bias[None, None], k)
    return softmax(jnp.where(chosen, logits, -1e30))
  if cfg.router == 'softmax_top_k':
    return probs * best(probs, k)
  if cfg.router == 'switch':
    return probs * best(probs, 1) * kept
  if cfg.router == 'sample_top_1' and layer:
    key = jax.random.key(NOISE.seed)
    for part in (NOISE.step, NOISE.microbatch, layer):
      key = jax.random.fold_in(key, part)
    sample = softmax((logits + jax.random.gumbel(key, (B, T, E))) / math.exp(-0.3))
    return sample * best(sample, 1)
  if cfg.router == 'hash':
    scores = np.array([[[mix32(int(t) * E + e) for e in range(E)] for t in row] for row in tokens])
    return jnp.float32(best(scores / 2**32, k) / k)
  return probs  # soft


def scalar(y):
  """A scalar that depends on all of y, and y."""
  return (y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)).sum(), y


@functools.cache
def layer_and_gradient(cfg):
  def layer_of(params, x, context):
    return scalar(llama.Mixture(cfg, BATCH_AXES).apply({'params': params}, x, context)[0])

  return jax.jit(jax.value_and_grad(layer_of, (0, 1), has_aux=True))


@jax.jit
def dense_layer(experts, x, gates):
  return jax.value_and_grad(
      lambda *args: scalar(moe.dense_experts(args[1], args[0], args[2])), (0, 1, 2),
      has_aux=True)(experts, x, gates)


def test_every_router_that_a_config_can_name_exists():
  assert tuple(routers.ROUTERS) == config.ROUTERS


@pytest.mark.parametrize('name, layer, mesh_shape, form', [
    ('biased', 0, (1, 2, 4, 1), 'auto'), ('softmax_top_k', 0, (2, 2, 2, 1), 'auto'),
    ('switch', 0, (1, 2, 2, 2), 'auto'), ('soft', 0, (1, 1, 4, 2), 'auto'),
    ('sample_top_1', 1, (1, 2, 2, 2), 'auto'), ('sample_top_1', 0, (1, 2, 2, 2), 'auto'),
    ('hash', 0, None, 'auto'),
    *((name, 1, (1, 1, 2, 1), 'gather') for name in CONFIGS)])
def test_a_layer_is_its_dense_form(name, layer, mesh_shape, form):
  """Values to 1e-5, and every gradient to 1e-4: of tokens, router and experts."""
  cfg = dataclasses.replace(CONFIGS[name], dispatch=form)
  _, tokens, counted = inputs()
  x = jnp.asarray(normal((B, T, D)))
  experts = {'gate': (E, D, 20), 'up': (E, D, 20), 'down': (E, 20, D)}
  experts = {name: jnp.asarray(normal(shape, i)) for i, (name, shape) in enumerate(experts.items())}
  router = jnp.asarray(normal((D, E), 9)) / 4
  bias = jnp.asarray([0.5, 0.0, -0.2, 0.1]) if cfg.router_bias else None
  expected_kept = kept((x @ router).argmax(-1), counted)

  def gates_of(router, x):
    return dense_form(cfg, x @ router, tokens, layer, expected_kept, bias)

  gates, pull_back = jax.vjp(jax.jit(gates_of), router, x)
  (_, expected), (dexperts, dx, dgates) = dense_layer(experts, x, gates)
  drouter, dx_gates = pull_back(dgates)
  expected_grads = {'experts': dexperts, 'router': drouter}, dx + dx_gates
  params = {'experts': experts, 'router': router}
  if cfg.router_bias:
    params['router_bias'], expected_grads[0]['router_bias'] = bias, jnp.zeros(E)
  if not cfg.has_router:
    del params['router'], expected_grads[0]['router']
  with use_mesh(mesh_shape):
    (_, y), grads = layer_and_gradient(cfg)(
        params, x, Context(tokens, counted, layer, noise=NOISE))
  if name == 'switch':
    assert (counted & ~expected_kept[..., 0]).sum() > 1  # it does drop
  np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
  assert_trees_close(grads, expected_grads, rtol=1e-4)


@pytest.mark.parametrize('name', ['switch', 'sample_top_1'])
def test_tokens_are_dropped_and_experts_drawn_alike_on_every_mesh(name):
  logits, tokens, counted = inputs(skew=1.0)
  expected = route(CONFIGS[name], logits, tokens, counted, 1, None, NOISE)
  for mesh_shape in ((1, 2, 4, 1), (1, 2, 2, 2)):
    with use_mesh(mesh_shape) as mesh:
      rows = sharding.batch_sharding(mesh)
      found = route(CONFIGS[name], *jax.device_put((logits, tokens, counted), rows), 1, None,
                    NOISE)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.gates, expected.gates, rtol=1e-5)
    if name == 'switch':
      np.testing.assert_array_equal(found.kept, expected.kept)
      expected_kept = kept(logits.argmax(-1), counted)
      np.testing.assert_array_equal(found.kept, expected_kept)
      sums = balance.routing_sums(found, logits, counted, E)
      assert sums.dropped.tolist() == (counted & ~expected_kept[..., 0]).sum(1).tolist()
      assert sums.dropped.sum() > 0
    else:
      assert balance.routing_sums(found, logits, counted, E).dropped is None


def test_sample_top_1_computes_one_expert_a_token_and_all_in_the_first_layer(monkeypatch):
  """Counts the rows of one round's buffers; further rounds run only if an expert overflows."""
  cfg, shapes = CONFIGS['sample_top_1'], []

  def swiglu(x_rD, *_):
    shapes.append(x_rD.shape)
    return x_rD

  monkeypatch.setattr(grouped, 'swiglu_in_pieces', swiglu)
  params = {'router': np.zeros((D, E)), 'experts': {
      'gate': np.zeros((E, D, 20)), 'up': np.zeros((E, D, 20)), 'down': np.zeros((E, 20, D))}}
  jax.eval_shape(lambda: llama.Mixture(cfg, BATCH_AXES).apply(
      {'params': params}, jnp.zeros((B, T, D)), Context(*inputs()[1:], 1, noise=NOISE)))
  assert set(shapes) == {(E * math.ceil(cfg.dispatch_factor * B * T / E), D)}
  for layer, experts in ((0, E), (1, 1)):
    ids = route(cfg, *inputs(), layer, None, NOISE).ids
    np.testing.assert_array_equal((ids >= 0).sum(-1), experts)


def test_sample_top_1_draws_by_the_softmax_and_differently_every_time():
  cfg = CONFIGS['sample_top_1']
  logits = np.broadcast_to(np.float32([1.0, 0.0, -0.5, 0.3]), (B, T, E))
  _, tokens, counted = inputs()
  draw = lambda layer=1, **other: np.asarray(
      route(cfg, logits, tokens, counted, layer, None, NOISE._replace(**other)).ids)
  drawn = np.array([draw(step=step) for step in range(100)]) >= 0
  np.testing.assert_allclose(  # the largest of Gumbel noise and logits is a draw of the softmax
      drawn.mean((0, 1, 2)), softmax(logits)[0, 0], atol=0.03)
  np.testing.assert_array_equal(draw(), draw())
  for other in (draw(layer=2), draw(seed=6), draw(step=3001), draw(microbatch=0)):
    assert (other != draw()).any(-1).mean() > 0.3
  evaluated = route(cfg, logits, tokens, counted, 1)
  assert (evaluated.ids.max(-1) == 0).all()
  np.testing.assert_array_equal(evaluated.gates[..., 0], 1)


def test_the_temperature_falls_to_one_half():
  logits, tokens, counted = inputs()
  noise = lambda step: functools.reduce(
      jax.random.fold_in, (step, 1, 1), jax.random.key(NOISE.seed))
  for step, heat in ((0, 1.0), (1000, math.exp(-0.1)), (6931, 0.50002), (50_000, 0.5)):
    found = route(CONFIGS['sample_top_1'], logits, tokens, counted, 1, None,
                  NOISE._replace(step=step))
    sample = softmax((logits + jax.random.gumbel(noise(step), logits.shape)) / heat)
    np.testing.assert_allclose(found.gates.max(-1), sample.max(-1), rtol=1e-4)


@pytest.mark.parametrize('name', ['top_k', 'softmax_top_k', 'switch', 'soft', 'sample_top_1'])
def test_gradients_against_finite_differences_in_float64(name):
  """Of the gates, and of the balancing and z-loss that follow from them."""
  cfg = CONFIGS[name]
  logits, tokens, counted = inputs()
  with jax.enable_x64(True):
    logits = np.float64(logits)
    direction = np.random.default_rng(1).normal(size=logits.shape)

    def loss(logits):
      choice = routers.route(cfg, logits, Context(tokens, counted, 1, noise=NOISE))
      sums = balance.routing_sums(choice, logits, counted, E)
      gates = balance.dense_gates(choice.gates, choice.kept_ids, E)
      return jnp.sin(gates * np.arange(gates.size).reshape(gates.shape)).sum() + (
          balance.balance_loss(sums) + sums.z.sum())

    value_and_grad = jax.jit(jax.value_and_grad(loss))
    size = 1e-6
    above, below = (value_and_grad(logits + sign * size * direction)[0] for sign in (1, -1))
    gradient = value_and_grad(logits)[1]
    np.testing.assert_allclose(
        (gradient * direction).sum(), (above - below) / (2 * size), rtol=1e-7)


@pytest.mark.parametrize('name', CONFIGS)
def test_the_balancing_loss_of_an_even_load_is_1_however_sure_the_router_is(name):
  """Gates that add up to less than 1 must not make it less; all to one expert makes it more."""
  _, tokens, _ = inputs()
  counted = np.ones((B, T), bool)
  even = np.stack([np.roll([0.9, 0.4, -0.2, 0.1], i) for i in range(B * T)])
  even = np.float32(even.reshape(B, T, E))
  bias = np.zeros(E, np.float32) if name == 'biased' else None

  @jax.jit
  def loss(logits, tokens):
    choice = routers.route(CONFIGS[name], logits, Context(tokens, counted, 1, bias))
    logits = logits if CONFIGS[name].has_router else None
    return balance.balance_loss(balance.routing_sums(choice, logits, counted, E))

  if name == 'hash':  # a single token goes to 2 of 4
    np.testing.assert_allclose(loss(even, 0 * tokens), E / 2, rtol=1e-5)
    return
  np.testing.assert_allclose(loss(even, tokens), 1, rtol=1e-5)
  assert loss(np.broadcast_to(even[0, 0], even.shape), tokens) > 1.05


# What routers promise, for any logits


CASES = st.tuples(st.integers(0, 10**6), st.floats(-6, 6))
many = settings(max_examples=15, derandomize=True, deadline=None, database=None)


@pytest.mark.parametrize('name', CONFIGS)
@many
@given(case=CASES)
def test_promises(name, case):
  cfg = CONFIGS[name]
  logits, tokens, counted = inputs(*case)
  bias = np.float32([0.3, -0.1, 0.0, 0.2]) if cfg.router_bias else None
  for noise in (None, NOISE):
    gates, ids, kept = jax.device_get(route(cfg, logits, tokens, counted, 1, bias, noise))
    chosen = (ids >= 0).sum(-1)
    assert (chosen == cfg.k).all()  # no token is lost
    of_expert = (ids[..., None] == np.arange(E)).sum(-2)
    assert of_expert.max() == 1 and (of_expert.sum(-1) == chosen).all()  # nor sent twice
    total, probs = np.where(ids >= 0, gates, 0).sum(-1), np.sort(softmax(logits))
    if name in ('top_k', 'biased', 'soft', 'hash') or (name == 'sample_top_1' and not noise):
      np.testing.assert_allclose(total, 1, rtol=1e-6)
    elif name != 'sample_top_1':
      np.testing.assert_allclose(total, probs[..., -cfg.k:].sum(-1), rtol=1e-5)
    assert (total >= 1 / E - 1e-6).all() and (total <= 1 + 1e-6).all()
    assert (kept is not None) == (name == 'switch' and bool(noise))
    if kept is not None:
      kept, limit = kept[..., 0], math.ceil(1.5 * counted.sum() / E)
      sent, wanted = ((of_expert * mask[..., None]).sum((0, 1)) for mask in (kept, counted))
      np.testing.assert_array_equal(sent, np.minimum(wanted, limit))
      assert not kept[~counted].any()


@pytest.mark.parametrize('name', ['top_k', 'softmax_top_k', 'switch', 'soft'])
@many
@given(case=CASES, order=st.permutations(range(E)))
def test_another_order_of_the_experts_changes_nothing_else(name, case, order):
  logits, tokens, counted = inputs(*case)
  dense = lambda logits: jax.device_get(permutable(CONFIGS[name], logits, tokens, counted))
  np.testing.assert_allclose(dense(logits[..., order]), dense(logits)[..., order], rtol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def permutable(cfg, logits, tokens, counted):
  choice = routers.route(cfg, logits, Context(tokens, counted, 1, noise=NOISE))
  return balance.dense_gates(choice.gates, choice.kept_ids, E)


@many
@given(case=CASES, missing=st.floats(0, 1))
def test_the_dispatch_loses_no_choice_and_adds_none(case, missing):
  logits, _, _ = inputs(*case)
  ids = np.argsort(-logits, -1)[..., :3].astype(np.int32)
  ids[np.random.default_rng(case[0]).random(ids.shape) < missing] = -1
  gates = np.abs(logits[..., :3])
  x = normal((B, T, D))
  experts = {'gate': normal((E, D, 20), 1), 'up': normal((E, D, 20), 2),
             'down': normal((E, 20, D), 3)}
  expected = _dense(x, experts, balance.dense_gates(gates, ids, E))
  y = _sparse(x, experts, gates, ids)
  np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max() + 1e-9)


_dense = jax.jit(moe.dense_experts)
_sparse = jax.jit(functools.partial(moe.sparse_experts, dispatch_factor=0.4, expected_k=1))


@pytest.mark.parametrize('name', CONFIGS)
def test_sizes_are_those_of_the_parameters(name):
  cfg = CONFIGS[name]
  params = llama.shapes(cfg)
  sizes = {sharding.path_of(path): x.size for path, x in jax.tree.leaves_with_path(params)}
  assert sorted(config.param_paths(cfg)) == sorted(sizes)
  assert config.num_params(cfg) == sum(sizes.values())
  # A token uses k of E experts in each layer, and everything else.
  experts = sum(size for path, size in sizes.items() if '/experts/' in path)
  used = {'soft': 1, 'switch': 1 / E, 'sample_top_1': (E + 1) / (2 * E)}.get(name, 2 / E)
  active = config.num_params(cfg, active=True)
  assert active == sum(sizes.values()) - experts + used * experts
  matmuls = active - sum(size for path, size in sizes.items()
                         if path == 'embed' or path.endswith(('scale', 'router_bias')))
  attention = cfg.num_layers * cfg.num_heads * cfg.head_dim * 15
  assert config.train_flops_per_token(cfg, 15) == 6 * (matmuls + attention)


def test_a_bias_begins_at_zero_and_is_dropped_where_nothing_chooses_by_it():
  biased, plain = (llama.shapes(CONFIGS[name]) for name in ('biased', 'top_k'))
  matched = lambda name, params: jax.eval_shape(
      functools.partial(llama.with_bias, CONFIGS[name]), params)
  assert matched('biased', plain) == matched('biased', biased) == biased
  assert matched('soft', biased) == matched('soft', plain) == plain
  begun = llama.with_bias(CONFIGS['biased'], {'layers': {'ffn': {}}})['layers']['ffn']
  mixed = btx.new_router('layers/ffn/router_bias', (2, E), None, None)
  assert btx.is_router('layers/ffn/router_bias')
  assert not begun['router_bias'].any() and not mixed.any()
