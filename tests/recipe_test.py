"""What mixtures can be made of: every form against its definition, in any slices."""

import dataclasses

import jax
import numpy as np
import pytest

from btx_jax import base, btx
from btx_jax import recipe as recipe_lib
from btx_jax.devices import sharding
from btx_jax.errors import UsageError
from btx_jax.model import llama
from btx_jax.model.config import shared_paths
from tests.helpers import TINY, hidden_and_sums, random_batch, random_params

NAMES = ('seed', 'code', 'math', 'law')


def recipe_of(*runs, names=None, tokens=(0, 10, 30, 60), **kwargs):
  init = base.mix(*runs or NAMES, **kwargs)
  names = recipe_lib.sources_of(init)
  return recipe_lib.from_config(init, names, TINY.ffn_dim, shared_paths(TINY),
                         [tokens[NAMES.index(name)] for name in names], 0.02)


def sources(n=4):
  return [jax.tree.map(np.asarray, random_params(TINY, seed=e)) for e in range(n)]


def model_of(recipe, top_k=2):
  width = sum(end - first for _, first, end in recipe.pieces[0])
  return dataclasses.replace(TINY, num_experts=len(recipe.pieces), ffn_dim=width, top_k=top_k,
                             dispatch_factor=4.0)


def mix(recipe, top_k=2):
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *sources())
  return btx.mix(stacked, model_of(recipe, top_k), jax.random.key(0), recipe)


jitted_mix = jax.jit(btx.mix, static_argnums=(1, 3))

RECIPES = {
    'whole': {}, 'copies': {'runs': ('math', 'seed', 'math', 'law'), 'averaged': NAMES},
    'rules': {'averaged': ('code', 'math'),
              'rules': {'attn/[qk]$': 'tokens', 'embed': 'seed', 'norm': 'uniform'}},
    'split': {'arrangement': 'split', 'chunks': 2},
    'blend': {'arrangement': 'blend'},
}


@pytest.mark.parametrize('form', RECIPES)
def test_any_slice_of_a_mixture_is_that_of_the_whole(form):
  kwargs = dict(RECIPES[form])
  recipe = recipe_of(*kwargs.pop('runs', ()), **kwargs)
  order = [NAMES.index(name) for name in recipe_lib.sources_of(base.mix(
      *RECIPES[form].get('runs', NAMES), **kwargs))]
  trees = [flat(sources()[i]) for i in order]
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *[sources()[i] for i in order])
  mixed = flat(jitted_mix(stacked, model_of(recipe), jax.random.key(0), recipe))
  rng = np.random.default_rng(0)
  for path, whole in mixed.items():
    if btx.is_router(path):
      continue
    ends = [sorted(rng.choice(n + 1, 2, replace=False)) for n in whole.shape]
    index = tuple(slice(int(a), int(b)) for a, b in ends)
    found = btx.mix_slice(recipe, path, index, lambda i, path, index: trees[i][path][index])
    assert isinstance(found, np.ndarray)
    # Experts are copied. A mean is rounded as the compiler orders and fuses its sum.
    rtol = 0 if '/experts/' in path else 1e-6
    np.testing.assert_allclose(found, whole[index], rtol, rtol / 10, err_msg=path)


def flat(tree):
  return {sharding.path_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def test_rules_say_what_is_averaged_how():
  recipe = recipe_of(**RECIPES['rules'])
  mixed, (seed, code, math, _) = flat(mix(recipe)), map(flat, sources())
  close = lambda path, expected: np.testing.assert_allclose(mixed[path], expected, rtol=1e-5,
                                                            atol=1e-6)
  close('layers/attn/q', (code['layers/attn/q'] * 10. + math['layers/attn/q'] * 30.) / 40)
  close('layers/attn/v', (code['layers/attn/v'] + math['layers/attn/v']) / 2)
  np.testing.assert_array_equal(mixed['embed'], seed['embed'])


@pytest.mark.parametrize('form, scale', [('split', 2.0), ('plain_split', 1.0)])
def test_a_split_expert_is_cut_along_its_hidden_units(form, scale):
  mixed = flat(mix(recipe_of(arrangement=form, chunks=2)))
  code = flat(sources()[1])
  half = TINY.ffn_dim // 2
  for e, units in ((2, slice(0, half)), (3, slice(half, None))):
    np.testing.assert_array_equal(mixed['layers/ffn/experts/up'][:, e],
                                  code['layers/ffn/up'][..., units])
    np.testing.assert_array_equal(mixed['layers/ffn/experts/down'][:, e],
                                  code['layers/ffn/down'][:, units] * scale)
  router = mixed['layers/ffn/router']
  assert (router[..., 2] == router[..., 3]).all() == (form == 'split')
  assert (router[..., 1] != router[..., 2]).all()


def test_a_blended_expert_has_a_piece_of_every_source():
  mixed, trees = flat(mix(recipe_of(arrangement='blend'))), [flat(s) for s in sources()]
  piece = TINY.ffn_dim // 4
  for e in range(4):
    units = slice(e * piece, (e + 1) * piece)
    np.testing.assert_array_equal(
        mixed['layers/ffn/experts/gate'][:, e],
        np.concatenate([tree['layers/ffn/gate'][..., units] for tree in trees], -1))
    np.testing.assert_array_equal(
        mixed['layers/ffn/experts/down'][:, e],
        np.concatenate([tree['layers/ffn/down'][:, units] for tree in trees], 1))


def test_splitting_changes_nothing_at_the_start():
  """Top-4 of 8 halves is top-2 of the 4 whole experts."""
  strong = lambda recipe: dataclasses.replace(recipe, router_std=1.0)
  whole, split = strong(recipe_of()), strong(recipe_of(arrangement='split', chunks=2))
  batch = random_batch(TINY)
  expected, _ = hidden_and_sums(model_of(whole), mix(whole), batch)
  found, _ = hidden_and_sums(model_of(split, 4), mix(split, 4), batch)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_structure_is_that_of_the_model():
  recipe = recipe_of(arrangement='split', chunks=4)
  mixed = mix(recipe)
  assert jax.tree.map(np.shape, mixed) == jax.tree.map(
      lambda x: x.shape, llama.shapes(model_of(recipe)))


@pytest.mark.parametrize('kwargs, message', [
    ({'arrangement': 'splitt'}, "arrangement = 'splitt'; did you mean 'split'"),
    ({'chunks': 2}, "'whole' and chunks = 2; 'split' and 'plain_split' need"),
    ({'arrangement': 'split'}, "'split' and chunks = 1"),
    ({'arrangement': 'split', 'chunks': 3}, '20 is not divisible by 3 .* 2, 4, 5, 10, 20'),
    ({'rules': {'attn/x': 'tokens'}}, "rule 'attn/x' matches no averaged parameter.*layers/attn/q"),
    ({'rules': {'(': 'tokens'}}, 'is not a regular expression'),
    ({'averaged': ('seed',), 'rules': {'embed': 'tokens'}}, 'none of seed was trained'),
])
def test_refusals(kwargs, message):
  with pytest.raises(UsageError, match=message):
    recipe_of(**kwargs)
