"""What branching and mixing promise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax import btx
from btx_jax import recipe as recipe_lib
from btx_jax.devices import sharding
from btx_jax.model import llama
from btx_jax.preflight import hlo
from tests.helpers import (
  TINY,
  TINY_MIXTURE,
  Arrays,
  assert_trees_close,
  assert_trees_equal,
  hidden_and_sums,
  random_batch,
  random_params,
  use_mesh,
)

E = 4


def hidden(cfg, params, batch):
  return hidden_and_sums(cfg, params, batch)[0]


@functools.cache
def different_experts():
  return [random_params(TINY, seed=e) for e in range(E)]


def mix(experts, model=TINY_MIXTURE, **kwargs):
  return _mix(experts, model, jax.random.key(1), **kwargs)


_mix = jax.jit(btx.mix, static_argnums=1, static_argnames='recipe')
branch = jax.jit(btx.branch, static_argnums=1)
stack = jax.jit(btx.stack)


@pytest.mark.parametrize('router_std', [0.02, 3.0])
def test_mixing_identical_branches_changes_nothing(router_std):
  seed = random_params(TINY)
  recipe = recipe_lib.whole_experts(range(E), TINY.ffn_dim, router_std)
  mixed = mix(branch(seed, E), recipe=recipe)
  batch = random_batch(TINY)
  expected = hidden(TINY, seed, batch)
  np.testing.assert_allclose(hidden(TINY_MIXTURE, mixed, batch), expected, rtol=0,
                             atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize('forced', range(E))
def test_a_forced_router_gives_that_experts_feed_forward_in_the_average(forced):
  experts = different_experts()
  stacked = stack(experts)
  mixed = mix(stacked)
  # The router reads the normed stream; a norm that is constant in one channel forces it.
  mixed['embed'] = mixed['embed'].at[:, 0].set(4.0)
  mixed['layers']['ffn']['router'] = jnp.zeros((2, 16, E)).at[:, 0, forced].set(1e4)
  expected_params = jax.jit(btx.average)(stacked)
  expected_params['embed'] = mixed['embed']
  expected_params['layers']['ffn'] = experts[forced]['layers']['ffn']
  one = dataclasses.replace(TINY_MIXTURE, top_k=1)
  batch = random_batch(TINY)
  expected = hidden(TINY, expected_params, batch)
  np.testing.assert_allclose(hidden(one, mixed, batch), expected, rtol=0,
                             atol=1e-5 * np.abs(expected).max())


def test_everything_but_feed_forward_is_averaged_and_that_is_kept():
  experts = different_experts()
  mixed = mix(stack(experts))
  as64 = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
  average = jax.tree.map(lambda *leaves: sum(leaves) / E, *map(as64, experts))
  ffn = mixed['layers'].pop('ffn')
  average['layers'].pop('ffn')
  assert_trees_close(mixed, average, rtol=1e-6)
  for e in range(E):
    assert_trees_equal({name: x[:, e] for name, x in ffn['experts'].items()},
                       experts[e]['layers']['ffn'])


@pytest.mark.parametrize('tied', [False, True])
def test_a_mixture_has_the_structure_of_its_model(tied):
  dense = dataclasses.replace(TINY, tied_head=tied)
  model = dataclasses.replace(dense, num_experts=3)
  mixed = lambda rng: btx.mix(btx.branch(llama.init(dense, rng), 3), model, rng)
  assert jax.eval_shape(mixed, jax.random.key(0)) == llama.shapes(model)


def test_stack_is_branch_for_equal_experts():
  seed = random_params(TINY)
  assert_trees_equal(stack([seed] * 3), branch(seed, 3))


def read_whole(source, cfg):
  """A Source as a tree."""
  return jax.tree.map_with_path(
      lambda path, like: source.read(sharding.path_of(path),
                                     tuple(slice(0, n) for n in like.shape)),
      llama.shapes(cfg))


def test_sources_and_stacked_trees_become_the_same_mixture():
  """The same bits of experts and routers; means to rounding, with float64 as the oracle."""
  experts, rng = different_experts(), jax.random.key(1)
  in_memory = mix(stack(experts))
  by_slices = read_whole(btx.mix([Arrays(tree) for tree in experts], TINY_MIXTURE, rng),
                         TINY_MIXTURE)
  assert_trees_equal(in_memory['layers'].pop('ffn'), by_slices['layers'].pop('ffn'))
  as64 = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
  mean = jax.tree.map(lambda *leaves: sum(leaves) / E, *map(as64, experts))
  average = jax.jit(btx.average)(stack(experts))
  assert_trees_close(average, mean, rtol=1e-6)
  assert_trees_close(read_whole(btx.average([Arrays(tree) for tree in experts]), TINY), mean,
                     rtol=1e-6)
  mean['layers'].pop('ffn')
  for found in (in_memory, by_slices):
    assert_trees_close(found, mean, rtol=1e-6)


def test_routers_are_made_without_a_cpu_backend(monkeypatch):
  """As under JAX_PLATFORMS=cuda; the first local device takes the place of the CPU."""
  sources = [Arrays(tree) for tree in different_experts()]
  routers = btx.mix(sources, TINY_MIXTURE, jax.random.key(1))._routers
  local_devices = jax.local_devices

  def without_cpu(**backend):
    if backend:
      raise RuntimeError('Unknown backend cpu')
    return local_devices()

  monkeypatch.setattr(jax, 'local_devices', without_cpu)
  assert_trees_equal(btx.mix(sources, TINY_MIXTURE, jax.random.key(1))._routers, routers)


def test_an_average_can_be_weighted():
  experts = different_experts()
  for form in (stack(experts), [Arrays(tree) for tree in experts]):
    found = btx.average(form, (1.0, 0.0, 3.0, 0.0))
    found = found if isinstance(found, dict) else read_whole(found, TINY)
    np.testing.assert_allclose(
        found['embed'], (experts[0]['embed'] + 3 * experts[2]['embed']) / 4, rtol=1e-6)


WIDE = dataclasses.replace(TINY, ffn_dim=32)
three, two = (dataclasses.replace(TINY_MIXTURE, num_experts=n) for n in (3, 2))
two_of = lambda cfg: [random_params(cfg, seed=i) for i in range(2)]
mixed = lambda experts, model: btx.mix(experts, model, jax.random.key(0))


@pytest.mark.parametrize('call, message', [
    (lambda: btx.stack([random_params(TINY), random_params(WIDE)]),
     r"expert 1 differs from expert 0 at 'layers/ffn/down': \[2, 32, 16\] and \[2, 20, 16\]"),
    (lambda: btx.stack(random_params(TINY)), r'stack takes a list of parameter trees'),
    (lambda: btx.stack([]), r'stack takes a list of parameter trees, at least one'),
    (lambda: btx.stack([random_params(TINY), 3]), r'stack: expert 1 must be a .* not int'),
    (lambda: btx.branch(two_of(TINY), 2), r'branch: params must be a parameter tree, .* not list'),
    (lambda: btx.branch(random_params(TINY), 0), r'n = 0 copies; it must be at least 1'),
    (lambda: btx.branch({'embed': np.zeros(3, int)}, 2), r"with int64 at 'embed'"),
    (lambda: btx.average(random_params(TINY)), r'average takes stacked experts'),
    (lambda: btx.average(two_of(TINY)), r'not of sources: .*stack\(\[code, math\]\)'),
    (lambda: btx.average(btx.stack(two_of(TINY)), (1.0,)), r'1 weights for 2 experts'),
    (lambda: mixed(btx.branch(random_params(TINY), 4), three),
     r"'embed' is \[4, 48, 16\], and \[3, 48, 16\] in 3 .* 4 models are .*num_experts = 3"),
    (lambda: mixed(btx.branch(random_params(TINY), 4), TINY), r'num_experts = 0 is a dense model'),
    (lambda: mixed(random_params(TINY), TINY_MIXTURE),
     r"'embed' is \[48, 16\], and \[4, 48, 16\] .*one model: stack several with stack"),
    (lambda: mixed(two_of(TINY), TINY_MIXTURE), r'not of sources: pass parameter trees as one'),
    (lambda: mixed(btx.branch(random_params(WIDE), 4), TINY_MIXTURE),
     r"'layers/ffn/down' is \[4, 2, 32, 16\], and \[4, 2, 20, 16\] in 4 stacked dense models"),
    (lambda: btx.average(btx.stack(two_of(TINY)), (0.0, 0.0)), r'must not .* all be zero'),
    (lambda: mixed([Arrays(tree) for tree in two_of(WIDE)], two),
     r"'layers/ffn/down' of source 0 is \[2, 32, 16\], but in a dense .* is \[2, 20, 16\]"),
    (lambda: btx.mix(btx.stack(two_of(TINY)), two, None, dataclasses.replace(
        recipe_lib.whole_experts(range(2), 20), tied=3)), r'tied = 3 does not divide'),
    (lambda: recipe_lib.Recipe(((),), (('attn/', (1.0,)),)), r"must end with \('', weights\)"),
    (lambda: mixed([Arrays(tree) for tree in two_of(TINY)], TINY_MIXTURE),
     r'num_experts = 4, but the recipe makes 2 experts of 2 sources'),
    (lambda: mixed(btx.branch(random_params(dataclasses.replace(TINY, tied_head=True)), 4),
                   TINY_MIXTURE), r"'head' is absent, and \[4, 16, 48\]"),
])
def test_wrong_trees_are_refused_with_both_shapes(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.parametrize('mesh_shape', [(1, 1, 4, 2), (1, 2, 2, 2)])
def test_mixing_stacked_branches_only_adds_up_what_is_averaged(mesh_shape):
  """No feed-forward weight moves: each expert has its place already."""
  as_shapes = lambda tree, layout: jax.tree.map(
      lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, layout)
  with use_mesh(mesh_shape) as mesh:
    experts = jax.eval_shape(lambda p: btx.branch(p, E), random_params(TINY))
    experts = as_shapes(experts, sharding.shardings(experts, mesh, stacked=True))
    rng = jax.random.key(0)
    layout = sharding.shardings(llama.shapes(TINY_MIXTURE), mesh)
    compiled = jax.jit(btx.mix, static_argnums=1, out_shardings=layout).lower(
        experts, TINY_MIXTURE, rng).compile()
  found = hlo.collectives(hlo.parse(compiled.as_text()), mesh)
  assert any('expert' in c.axes for c in found)
  for c in found:
    assert c.kind in ('all-reduce', 'reduce-scatter'), c
    for shape in c.shapes:
      assert not {TINY.ffn_dim, TINY.ffn_dim // 2} & set(shape), c


def test_inputs_are_left_as_they_are():
  experts = branch(random_params(TINY), E)
  before = jax.tree.map(np.array, experts)
  mix(experts)
  assert_trees_equal(experts, before)
