"""Checksums of arrays, stored in a checkpoint because orbax's chunks have none.

A checksum is the sum of an array's words (its numbers as unsigned integers), each multiplied by an
odd number that depends on its place, modulo 2**32. A single flipped bit always changes it;
exchanged rows change it, too. It is computed where the array is: over devices that each hold a
part, or piece by piece in NumPy. Stacked layers and experts have one checksum each, so that one of
them can be read and checked alone.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from btx_jax.devices import sharding
from btx_jax.model.source import Index

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def leading_axes(path: str) -> int:
  """The number of leading axes of a parameter, or of its moments, that are layers and experts."""
  return ('layers/' in path) + ('/experts/' in path)


def of_tree(tree, mesh):
  """The checksums of every array of a tree: uint32 [layers, experts], or fewer of these axes.

  Args:
    tree: jax arrays.
    mesh: the mesh of their devices; None if they are on one device.
  """
  return jax.device_get(_compiled(mesh)(tree))


@functools.cache
def _compiled(mesh):
  of_tree = functools.partial(jax.tree.map_with_path, _of_array)
  return sharding.jit_replicated(of_tree, mesh) if mesh else jax.jit(of_tree)


def _of_array(key_path, x) -> jax.Array:
  words = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
  everywhere = tuple(slice(0, n) for n in x.shape)
  return _weighted_sum(words, everywhere, leading_axes(sharding.path_of(key_path)))


def of_piece(piece: np.ndarray, index: Index, leading: int) -> np.ndarray:
  """The contribution of a part of an array to the array's checksums.

  Args:
    piece: the part.
    index: its place in the array; for every axis a slice with both ends.
    leading: the number of leading axes, see leading_axes.

  Returns:
    uint32, with the leading axes of the piece. The contributions of all parts of an array add up,
    modulo 2**32, to its checksums.
  """
  words = piece.view(_UNSIGNED[piece.dtype.itemsize]).astype(np.uint32)
  return _weighted_sum(words, index, leading)


def _weighted_sum(words: Any, index: Index, leading: int) -> Any:
  """The checksums of words, in NumPy or jax; arguments as for of_piece."""
  words = words ^ (words >> 16)  # otherwise an even number of flipped signs would cancel out
  for axis in reversed(range(leading, words.ndim)):
    at = index[axis]
    weights = factors(axis, at.stop)[at.start:].reshape((1,) * axis + (-1,))
    words = (words * weights).sum(-1, dtype=np.uint32)
  return words


@functools.lru_cache(256)
def factors(axis: int, size: int) -> np.ndarray:
  """The odd factors of the places along an axis, uint32 [size]."""
  mixed = np.arange(size, dtype=np.uint64) + np.uint64((axis + 1) * 0x9E3779B97F4A7C15 % 2**64)
  for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # as in SplitMix64
    mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
  return (mixed ^ (mixed >> np.uint64(31))).astype(np.uint32) | np.uint32(1)


def differing(expected, found) -> list[str]:
  """The paths at which two trees of checksums differ; their container types may differ."""
  one, other = ({sharding.path_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
                for tree in (expected, found))
  return sorted(path for path in one.keys() | other.keys()
                if path not in one or path not in other
                or not np.array_equal(one[path], other[path]))


def pieces(shape: tuple[int, ...], leading: Index, most: int) -> list[Index]:
  """Cuts the selected layers and experts of an array into parts, in order.

  Args:
    shape: the shape of the array.
    leading: slices of the leading axes.
    most: the most numbers in one part, unless a single row of the next axis has more.
  """
  rest = shape[len(leading):]
  if not rest:
    return [leading]
  rows = max(1, most // max(math.prod(rest[1:]), 1))
  after = tuple(slice(0, n) for n in rest[1:])
  return [(*leading, slice(first, min(first + rows, rest[0])), *after)
          for first in range(0, rest[0], rows)]
