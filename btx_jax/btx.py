"""The method: branch a seed, stack experts that were trained apart, mix them into one model.

Pure functions on parameter trees (laid out as model/llama.py says).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from btx_jax import recipe as recipe_lib
from btx_jax.devices import sharding
from btx_jax.model import llama
from btx_jax.model.config import Config
from btx_jax.recipe import Recipe

Index = tuple[slice, ...]
Read = Callable[[int, str, Index], Any]


def branch(params, n: int):
  """n copies of the seed, stacked: every leaf [...] becomes [n, ...]."""
  return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), params)


def stack(experts: Sequence):
  """Experts that were trained as separate jobs, in the form that `branch` gives.

  Raises:
    ValueError: the trees differ in structure or shapes.
  """
  shapes = [jax.tree.map(jnp.shape, params) for params in experts]
  for i, other in enumerate(shapes):
    if other != shapes[0]:
      raise ValueError(f'expert {i} differs from expert 0 in structure or shape: '
                       f'{other} against {shapes[0]}.')
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *experts)


def average(experts):
  """The uniform average of stacked experts: every leaf [E, ...] becomes [...]."""
  return jax.tree.map(lambda x: _stacked_mean(x, (1.0,) * len(x)), experts)


def mix(experts, model: Config, rng: jax.Array, recipe: Recipe | None = None):
  """Stacked dense models become one mixture of experts (paper 3.2).

  Each layer keeps every expert's whole feed-forward network, and gains a router; all else
  is averaged. The paper does not say how routers begin; normal with a small deviation makes
  the first gates nearly even.

  Args:
    experts: leaves [E, ...], dense models.
    model: of the mixture.
    rng: for the routers.
    recipe: if not the paper's form, see recipe.py.

  Returns:
    Parameters of `model`, float32.
  """
  experts = {sharding.path_of(path): leaf for path, leaf in jax.tree.leaves_with_path(experts)}
  in_place = recipe_lib.whole(range(len(experts['embed'])), model.ffn_dim)
  recipe = recipe or in_place

  def make(key_path, like):
    path = sharding.path_of(key_path)
    if is_new(path):
      return new(path, like.shape, recipe, rng)
    if path in experts:
      return _stacked_mean(experts[path], recipe.weights(path))
    if recipe.experts == in_place.experts:
      # On a mesh whose `expert` axis the branches lie along, no weight moves.
      return experts[path.replace('/experts/', '/')].swapaxes(0, 1)
    return part(recipe, path, tuple(slice(0, n) for n in like.shape),
                lambda source, path, index: experts[path][(source, *index)])

  return jax.tree.map_with_path(make, llama.shapes(model))


def part(recipe: Recipe, path: str, index: Index, read: Read):
  """A slice of one parameter of a mixture: the one place that says what mixing computes.

  The same bits for any slicing: feed-forward weights are copied, means are added up in the order
  of the sources, in float32.

  Args:
    recipe: of the mixture.
    path: of the parameter; none that `is_new`.
    index: a slice for each dimension, with a start and an end.
    read: (source, path, index) -> that slice of a parameter of a dense source.

  Returns:
    An array of the kind that `read` gives: NumPy's or jax's.
  """
  dense = path.replace('/experts/', '/')
  if dense == path:
    chosen = {i: weight for i, weight in enumerate(recipe.weights(path)) if weight}
    return _mean((read(i, path, index) for i in chosen), list(chosen.values()))
  stack = [_joined([read(source, dense, at) for source, at in cuts], axis=1 + _hidden(path))
           for cuts in _cuts(recipe, path, index)]
  result = _joined([x[:, None] for x in stack], axis=1)
  if _scale(recipe, path) != 1:
    return result.astype('float32') * np.float32(recipe.scale)
  return result


def only(recipe: Recipe, path: str, index: Index) -> tuple[int, str, Index] | None:
  """What `part` would read, (source, path, index), where it gives that as it is; else None."""
  dense = path.replace('/experts/', '/')
  if dense == path:
    chosen = [i for i, weight in enumerate(recipe.weights(path)) if weight]
    return (chosen[0], path, index) if len(chosen) == 1 else None
  cuts = [cut for expert in _cuts(recipe, path, index) for cut in expert]
  if len(cuts) > 1 or _scale(recipe, path) != 1:
    return None
  source, at = cuts[0]
  return source, dense, at


def _cuts(recipe: Recipe, path: str, index: Index) -> list[list[tuple[int, Index]]]:
  """Of what each expert of a slice is put together: slices of dense feed-forward layers.

  The index is of [L, E, D, F], or for `down` of [L, E, F, D]: the hidden units are cut.
  """
  layers, wanted, *matrix = index
  hidden, result = _hidden(path), []
  for pieces in recipe.experts[wanted]:
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
  """Which dimension of a feed-forward matrix, [D, F] or [F, D], its hidden units are."""
  return 0 if path.endswith('/down') else 1


def _scale(recipe: Recipe, path: str) -> float:
  """Of an expert's parameter."""
  return recipe.scale if path.endswith('/down') else 1.0


def _joined(arrays, axis: int):
  """The arrays one behind the other; a single one is left as it is, in memory too."""
  if len(arrays) == 1:
    return arrays[0]
  if len({x.dtype for x in arrays}) > 1:
    arrays = [x.astype('float32') for x in arrays]
  return arrays[0].__array_namespace__().concat(arrays, axis=axis)


def is_new(path: str) -> bool:
  """Whether a mixture's parameter is made by mixing rather than taken from the sources."""
  return path.endswith(('ffn/router', 'ffn/router_bias'))


def new(path: str, shape, recipe: Recipe, rng: jax.Array) -> jax.Array:
  """A parameter that no source has: the routers [L, D, E], and their biases [L, E], zero."""
  if path.endswith('router_bias'):
    return jnp.zeros(shape)
  L, D, E = shape
  columns = recipe.router_std * jax.random.normal(rng, (L, D, E // recipe.tied))
  return jnp.repeat(columns, recipe.tied, axis=2)


def _mean(values: Iterator, weights):
  """The weighted mean, added up in order, one at a time; a single one is left as it is.

  Times the inverse, since XLA makes that of a division: other bits.
  """
  if len(weights) == 1:
    return next(values)
  total = None
  for weight in weights:
    term = next(values).astype('float32')
    if weight != 1:
      term *= np.float32(weight)
    if total is None:
      total = term
    else:
      total += term
    del term  # before the next is read
  total *= np.float32(1 / sum(weights))
  return total


def _stacked_mean(x, weights):
  """The same of sources in one array [n, ...]: a reduction, which crosses devices as one sum."""
  if sum(weight != 0 for weight in weights) == 1:
    return x[np.argmax(weights)]
  w = np.array(weights, np.float32).reshape(-1, *(1,) * (x.ndim - 1))
  x = x.astype('float32')
  return (x if (w == 1).all() else x * w).sum(0) * np.float32(1 / sum(weights))
