"""Parameter trees by path, and checks of their shapes that name both sides."""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from btx_jax.devices.sharding import path_of
from btx_jax.model import llama
from btx_jax.model.config import Config

Shapes = dict[str, tuple[int, ...]]


def leaves_of(tree, name: str) -> dict[str, Any]:
  """The leaves of a parameter tree by path; see `check_tree`."""
  check_tree(tree, name)
  return {path_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def shapes_of(tree, name: str) -> Shapes:
  """The shapes of a parameter tree by path; see `check_tree`."""
  return {path: tuple(leaf.shape) for path, leaf in leaves_of(tree, name).items()}


@functools.cache
def model_shapes(cfg: Config) -> Shapes:
  """The shapes of a model's parameters by path; traced once, and not to be changed."""
  return shapes_of(llama.shapes(cfg), 'model')


def first_difference(found: Shapes, wanted: Shapes) -> str | None:
  """The first path that only one side has, or whose shapes differ; None if there is none."""
  paths = sorted(found.keys() | wanted.keys())
  return next((path for path in paths if found.get(path) != wanted.get(path)), None)


def shape_at(shapes: Mapping[str, tuple[int, ...]], path: str) -> str:
  """A shape for a message."""
  return str(list(shapes[path])) if path in shapes else 'absent'


def check_tree(tree, name: str):
  """Raises ValueError unless `tree` is a parameter tree; `name` is what the message calls it."""
  leaves = jax.tree.leaves(tree)
  if not isinstance(tree, Mapping) or not leaves or not all(map(_is_floating, leaves)):
    raise ValueError(f'{name} must be a parameter tree, a dict of dicts of floating-point arrays, '
                     f'not {type(tree).__name__}{_first_wrong(tree)}.')


def check_params(cfg: Config, params, function: str):
  """Raises ValueError unless the parameters have the shapes of the model."""
  wanted, found = model_shapes(cfg), shapes_of(params, f'{function}: params')
  if path := first_difference(found, wanted):
    raise ValueError(f'{function}: {path!r} is {shape_at(found, path)} in the parameters, and '
                     f'{shape_at(wanted, path)} in the model of this config.')


def _is_floating(leaf) -> bool:
  return hasattr(leaf, 'shape') and jnp.issubdtype(leaf.dtype, jnp.floating)


def _first_wrong(tree) -> str:
  """The first leaf that is not a floating-point array, in words."""
  for path, leaf in jax.tree.leaves_with_path(tree) if isinstance(tree, Mapping) else ():
    if not _is_floating(leaf):
      return f' with {getattr(leaf, "dtype", type(leaf).__name__)} at {path_of(path)!r}'
  return ''
