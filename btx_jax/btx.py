"""The method: branch a seed, train the copies apart, and mix them into one model (paper 3).

Pure functions on parameter trees, laid out as model/llama.py says. `average` and `mix` take experts
in either of two forms:

  stacked   one tree, each leaf [E, ...]: what `branch` and `stack` return, in memory
  sources   a sequence of model.source.Source, read slice by slice from checkpoints and folders

and return the same form: a tree for a tree, a Source for sources. `mix_slice` defines what mixing
computes; every other function here is in terms of it or gives the same numbers. Expert weights are
copies, so they have the same bits in both forms. Means have the same bits wherever they are added
in order; a stacked mean is one reduction, which may differ from that by rounding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from btx_jax.devices.sharding import path_of
from btx_jax.model import llama
from btx_jax.model.config import Config
from btx_jax.model.source import Extent, Index, Source
from btx_jax.model.trees import (
  check_tree,
  first_difference,
  leaves_of,
  model_shapes,
  shape_at,
  shapes_of,
)
from btx_jax.recipe import Recipe, whole_experts

Read = Callable[[int, str, Index], Any]


def branch(params, n: int):
  """n copies of the seed, stacked: every leaf [...] becomes [n, ...].

  Args:
    params: parameters of one dense model.
    n: number of copies.

  Raises:
    ValueError: `params` is not a parameter tree, or n is less than 1.

  Example:
    >>> experts = branch(seed, 3)
    >>> experts['embed'].shape == (3, *seed['embed'].shape)
    True
  """
  check_tree(params, 'branch: params')
  if n < 1:
    raise ValueError(f'branch: n = {n} copies; it must be at least 1.')
  return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), params)


def stack(experts: Sequence):
  """Experts that were trained as separate jobs, in the form that `branch` returns.

  Args:
    experts: a list of parameter trees of the same structure and shapes.

  Raises:
    ValueError: `experts` is not a list of trees, or they differ; with the first path that does.

  Example:
    >>> experts = stack([code, math])
    >>> experts['embed'].shape == (2, *code['embed'].shape)
    True
  """
  if isinstance(experts, Mapping) or not len(experts):
    raise ValueError('stack takes a list of parameter trees, at least one: stack([code, math]).')
  first, *others = (shapes_of(tree, f'stack: expert {i}') for i, tree in enumerate(experts))
  for i, other in enumerate(others, 1):
    if path := first_difference(other, first):
      raise ValueError(f'stack: expert {i} differs from expert 0 at {path!r}: '
                       f'{shape_at(other, path)} and {shape_at(first, path)}.')
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *experts)


def average(experts, weights: Sequence[float] | None = None):
  """The mean of the experts: a dense model, the baseline that has no experts.

  Args:
    experts: stacked, every leaf [E, ...]; or a sequence of Sources.
    weights: of each expert in the mean; equal if None.

  Returns:
    A tree of leaves [...], in float32 unless only one expert has a weight; for sources a Source.

  Raises:
    ValueError: the experts are not in one of the two forms, or not as many as `weights`.

  Example:
    >>> dense = average(stack([code, math]))
    >>> dense['embed'].shape == code['embed'].shape
    True
  """
  if _are_sources(experts):
    count = len(experts)
  else:
    leading = {shape[:1] for shape in shapes_of(experts, 'average: experts').values()}
    if len(leading) != 1 or () in leading:
      raise ValueError('average takes stacked experts, whose leaves all have the same first '
                       f'dimension, and these have {sorted(leading)}: use stack or branch first.')
    count = leading.pop()[0]
  weights = tuple(weights) if weights is not None else (1.0,) * count
  if len(weights) != count:
    raise ValueError(f'average: {len(weights)} weights for {count} experts.')
  if min(weights) < 0 or not any(weights):
    raise ValueError(f'average: weights = {weights} must not be negative, nor all be zero.')
  if _are_sources(experts):
    return _Average(experts, weights)
  return jax.tree.map(lambda x: _stacked_mean(x, weights), experts)


def mix(experts, model: Config, rng: jax.Array, recipe: Recipe | None = None, routers=None):
  """Dense models become one mixture of experts (paper 3.2).

  Each layer keeps every expert's whole feed-forward network and gains a router; everything else
  is averaged. The paper does not say how routers begin; a normal distribution with a small
  deviation makes the first gates nearly even.

  Args:
    experts: dense models: stacked, every leaf [E, ...]; or a sequence of Sources.
    model: the mixture's sizes.
    rng: key for the routers.
    recipe: what each source contributes; the paper's form if None.
    routers: [L, D, E], to begin with instead of random ones.

  Returns:
    Parameters of `model`: means in float32, copies in the type of their source. For sources, a
    Source that computes each slice when it is read.

  Raises:
    ValueError: the experts are not in one of the two forms, or do not have the shapes that the
      model and the recipe ask for; with both shapes.

  Example:
    >>> model = dataclasses.replace(config, num_experts=2)
    >>> params = mix(stack([code, math]), model, jax.random.key(0))
    >>> params['layers']['ffn']['experts']['up'].shape == (
    ...     model.num_layers, 2, model.dim, model.ffn_dim)
    True
  """
  if not model.num_experts:
    raise ValueError('mix: model.num_experts = 0 is a dense model; set it to the number of '
                     'experts.')
  expected = (model.num_layers, model.dim, model.num_experts)
  if routers is not None and (not model.has_router or tuple(routers.shape) != expected):
    raise ValueError(f'mix: routers are {list(routers.shape)}, but this model has '
                     f'{list(expected) if model.has_router else "none"}.')
  if _are_sources(experts):
    recipe = recipe or whole_experts(range(len(experts)), model.ffn_dim)
    _check_recipe(model, recipe, len(experts))
    _check_sources(experts, model, recipe)
    return _Mixture(experts, model, recipe, rng, routers)
  leaves = leaves_of(experts, 'mix: experts')
  in_place = whole_experts(range(model.num_experts), model.ffn_dim)
  chosen = recipe or in_place
  _check_stacked(leaves, model, chosen)
  _check_recipe(model, chosen, len(chosen.mean))

  def make(key_path, like):
    path = path_of(key_path)
    if is_router(path):
      return new_router(path, like.shape, chosen, rng, routers)
    if path in leaves:
      return _stacked_mean(leaves[path], chosen.weights(path))
    if chosen.pieces == in_place.pieces and _scale(chosen, path) == 1:
      # On a mesh whose `expert` axis the branches lie along, no weight moves.
      return leaves[_dense(path)].swapaxes(0, 1)
    return mix_slice(chosen, path, tuple(slice(0, n) for n in like.shape),
                     lambda source, path, index: leaves[path][(source, *index)])

  return jax.tree.map_with_path(make, llama.shapes(model))


def mix_slice(recipe: Recipe, path: str, index: Index, read: Read):
  """A slice of one parameter of a mixture: the definition of what mixing computes.

  The bits do not depend on how a parameter is sliced: feed-forward weights are copied, and means
  are added in the order of the sources, in float32.

  Args:
    recipe: what each source contributes.
    path: of the mixture's parameter; not of a router.
    index: a slice with a start and an end for each dimension.
    read: (source, path, index) -> that slice of a dense source's parameter.

  Returns:
    An array of the kind that `read` returns: NumPy's or jax's.
  """
  dense = _dense(path)
  if dense == path:
    return _mean_slice(recipe.weights(path), path, index, read)
  experts = [_joined([read(source, dense, at) for source, at in cuts], axis=1 + _hidden(path))
             for cuts in _cuts(recipe, path, index)]
  result = _joined([x[:, None] for x in experts], axis=1)
  if _scale(recipe, path) != 1:
    return result.astype('float32') * np.float32(recipe.scale)
  return result


def verbatim(recipe: Recipe, path: str, index: Index) -> tuple[int, str, Index] | None:
  """If `mix_slice` would return one source's slice unchanged: (source, path, slice). Else None."""
  dense = _dense(path)
  if dense == path:
    chosen = [i for i, weight in enumerate(recipe.weights(path)) if weight]
    return (chosen[0], path, index) if len(chosen) == 1 else None
  cuts = [cut for expert in _cuts(recipe, path, index) for cut in expert]
  if len(cuts) > 1 or _scale(recipe, path) != 1:
    return None
  source, at = cuts[0]
  return source, dense, at


def is_router(path: str) -> bool:
  """Whether mixing creates this parameter rather than taking it from the sources."""
  return path.endswith(('ffn/router', 'ffn/router_bias'))


def new_router(path: str, shape, recipe: Recipe, rng: jax.Array, routers=None) -> jax.Array:
  """Routers [L, D, E], random unless they are given, or their biases [L, E], which are zero."""
  if path.endswith('router_bias'):
    return jnp.zeros(shape)
  if routers is not None:
    return jnp.asarray(routers, jnp.float32)
  L, D, E = shape
  columns = recipe.router_std * jax.random.normal(rng, (L, D, E // recipe.tied))
  return jnp.repeat(columns, recipe.tied, axis=2)


class _Mixture:
  """A mixture of sources, as a Source."""

  def __init__(self, sources: Sequence[Source], model: Config, recipe: Recipe, rng: jax.Array,
               routers):
    self._sources, self._model, self._recipe = sources, model, recipe
    self._rng, self._given = rng, routers

  def read(self, path: str, index: Index) -> np.ndarray:
    if is_router(path):
      return self._routers[path][index]
    return mix_slice(self._recipe, path, index,
                     lambda source, path, index: self._sources[source].read(path, index))

  def extent(self, path: str, index: Index) -> Extent | None:
    if is_router(path) or not (found := verbatim(self._recipe, path, index)):
      return None
    source, path, index = found
    return self._sources[source].extent(path, index)

  def scratch_bytes(self, path: str) -> int:
    if is_router(path):
      return 16 * self._model.num_layers * self._model.dim * self._model.num_experts
    return max(source.scratch_bytes(_dense(path)) for source in self._sources)

  @functools.cached_property
  def _routers(self) -> dict[str, np.ndarray]:
    """Parameters that no source has, by path: created whole, on the CPU if jax may use it.

    The CPU gives the same bits whatever the devices are; JAX_PLATFORMS can exclude it.
    """
    shapes = {path: shape for path, shape in model_shapes(self._model).items() if is_router(path)}
    try:
      devices = jax.local_devices(backend='cpu')
    except RuntimeError:
      devices = jax.local_devices()
    key = np.asarray(jax.random.key_data(self._rng))
    with jax.set_mesh(jax.sharding.Mesh(devices[:1], ('one',))):
      make = jax.jit(lambda: {
          path: new_router(path, shape, self._recipe, jax.random.wrap_key_data(jnp.asarray(key)),
                           self._given)
          for path, shape in shapes.items()})
      return jax.tree.map(np.asarray, make())


class _Average:
  """The mean of sources, as a Source."""

  def __init__(self, sources: Sequence[Source], weights: tuple[float, ...]):
    self._sources, self._weights = sources, weights

  def read(self, path: str, index: Index) -> np.ndarray:
    return _mean_slice(self._weights, path, index,
                       lambda source, path, index: self._sources[source].read(path, index))

  def extent(self, path: str, index: Index) -> Extent | None:
    chosen = [source for source, weight in zip(self._sources, self._weights) if weight]
    return chosen[0].extent(path, index) if len(chosen) == 1 else None

  def scratch_bytes(self, path: str) -> int:
    return max(source.scratch_bytes(path) for source in self._sources)


def _dense(path: str) -> str:
  """The path in a dense model that a mixture's parameter is made from."""
  return path.replace('/experts/', '/')


def _cuts(recipe: Recipe, path: str, index: Index) -> list[list[tuple[int, Index]]]:
  """The slices of dense feed-forward layers that each expert of a slice is assembled from.

  The index is of [L, E, D, F], or for `down` of [L, E, F, D]: the hidden units are cut.
  """
  layers, wanted, *matrix = index
  hidden, result = _hidden(path), []
  for pieces in recipe.pieces[wanted]:
    found, begin = [], 0
    for source, first, end in pieces:
      start = max(matrix[hidden].start - begin, 0) + first
      stop = min(matrix[hidden].stop - begin, end - first) + first
      begin += end - first
      if start < stop:
        at = list(matrix)
        at[hidden] = slice(start, stop)
        found.append((source, (layers, *at)))
    result.append(found)
  return result


def _hidden(path: str) -> int:
  """The dimension of a feed-forward matrix, [D, F] or [F, D], that holds its hidden units."""
  return 0 if path.endswith('/down') else 1


def _scale(recipe: Recipe, path: str) -> float:
  """The factor on an expert's parameter."""
  return recipe.scale if path.endswith('/down') else 1.0


def _joined(arrays, axis: int):
  """The arrays concatenated; a single one is returned as it is, without a copy."""
  if len(arrays) == 1:
    return arrays[0]
  if len({x.dtype for x in arrays}) > 1:
    arrays = [x.astype('float32') for x in arrays]
  return arrays[0].__array_namespace__().concat(arrays, axis=axis)


def _mean_slice(weights: Sequence[float], path: str, index: Index, read: Read):
  """The weighted mean of one slice of the sources, of which those of weight 0 are not read."""
  chosen = {i: weight for i, weight in enumerate(weights) if weight}
  return _mean((read(i, path, index) for i in chosen), list(chosen.values()))


def _mean(values: Iterator, weights: Sequence[float]):
  """The weighted mean, added in order, one term in memory at a time; a single one is untouched.

  Multiplies by the inverse, as `_stacked_mean` does, so that the bits agree.
  """
  if len(weights) == 1:
    return next(values)
  total = _weighted(next(values), weights[0])
  for weight in weights[1:]:
    total += _weighted(next(values), weight)
  total *= np.float32(1 / sum(weights))
  return total


def _weighted(value, weight: float):
  term = value.astype('float32')
  if weight != 1:
    term *= np.float32(weight)
  return term


def _stacked_mean(x, weights: Sequence[float]):
  """The same mean of sources stacked in one array [E, ...]: a reduction, one sum over devices."""
  if sum(weight != 0 for weight in weights) == 1:
    return x[np.argmax(weights)]
  w = np.array(weights, np.float32).reshape(-1, *(1,) * (x.ndim - 1))
  x = x.astype('float32')
  return (x if (w == 1).all() else x * w).sum(0) * np.float32(1 / sum(weights))


# Checks of what is passed in: shapes only, so they work under jit.


def _are_sources(experts) -> bool:
  """Whether the experts are Sources; raises ValueError for a list of parameter trees."""
  if isinstance(experts, Mapping) or not isinstance(experts, Sequence):
    return False
  if not experts or not all(hasattr(source, 'read') for source in experts):
    raise ValueError('The experts are a list, but not of sources: pass parameter trees as one '
                     'stacked tree, stack([code, math]).')
  return True


def _check_recipe(model: Config, recipe: Recipe, count: int):
  """Raises ValueError unless the recipe makes this model from this number of sources."""
  if len(recipe.pieces) != model.num_experts:
    raise ValueError(f'mix: model.num_experts = {model.num_experts}, but the recipe makes '
                     f'{len(recipe.pieces)} experts of {count} sources.')
  widths = {sum(end - first for _, first, end in expert) for expert in recipe.pieces}
  if widths != {model.ffn_dim}:
    raise ValueError(f'mix: model.ffn_dim = {model.ffn_dim}, but the recipe makes experts of '
                     f'width {", ".join(map(str, sorted(widths)))}.')
  if model.num_experts % recipe.tied:
    raise ValueError(f'mix: recipe.tied = {recipe.tied} does not divide the number of experts, '
                     f'{model.num_experts}.')
  named = 1 + max(source for expert in recipe.pieces for source, _, _ in expert)
  weighted = sorted({len(weights) for _, weights in recipe.rest})
  if named > count or weighted != [count]:
    raise ValueError(f'mix: {count} sources, but the recipe has pieces of {named} and weights for '
                     f'{", ".join(map(str, weighted))}.')


def _source_shapes(model: Config, recipe: Recipe) -> dict[str, tuple[int, ...]]:
  """The shapes of a dense model that the recipe can cut up."""
  width = max(end for expert in recipe.pieces for _, _, end in expert)
  dense = dataclasses.replace(model, num_experts=0, router_bias=False, ffn_dim=width)
  return model_shapes(dense)


def _check_sources(sources: Sequence[Source], model: Config, recipe: Recipe):
  """Raises ValueError if a source that knows its `shapes` has others than the recipe cuts up."""
  expected = _source_shapes(model, recipe)
  for i, source in enumerate(sources):
    found = getattr(source, 'shapes', expected)
    if path := first_difference(found, expected):
      raise ValueError(f'mix: {path!r} of source {i} is {shape_at(found, path)}, but in a dense '
                       f'model of these sizes it is {shape_at(expected, path)}.')


def _check_stacked(leaves: Mapping[str, Any], model: Config, recipe: Recipe):
  """Raises ValueError unless these are the stacked parameters that the recipe cuts up."""
  one, count = _source_shapes(model, recipe), len(recipe.mean)
  wanted = {path: (count, *shape) for path, shape in one.items()}
  found = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
  path = first_difference(found, wanted)
  if path is None:
    return
  hint = ''
  if path in found and path in one:
    if found[path] == one[path]:
      hint = ' It looks like one model: stack several with stack, or copy it with branch.'
    elif found[path][1:] == one[path]:
      hint = f' {found[path][0]} models are stacked, and model.num_experts = {model.num_experts}.'
  raise ValueError(f'mix: {path!r} is {shape_at(found, path)}, and {shape_at(wanted, path)} in '
                   f'{count} stacked dense models of these sizes.{hint}')


