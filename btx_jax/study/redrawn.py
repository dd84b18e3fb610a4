"""Dense models with a share of their hidden units re-initialised: Drop-Upcycling, 2502.19261."""

import functools

import numpy as np

from btx_jax.model.config import Config
from btx_jax.model.source import Extent, Index, Source

_MATRICES = {'layers/ffn/gate': 1, 'layers/ffn/up': 1, 'layers/ffn/down': 0}  # axis of the units


class Redrawn:
  """A source in which some hidden units of every feed-forward layer have new weights.

  The units are chosen at random in each layer, and are the same in its three matrices. Their new
  weights come from a normal distribution with the mean and the standard deviation of the weights
  that these units had in the same matrix.
  """

  def __init__(self, source: Source, model: Config, share: float, seed: int):
    """
    Args:
      source: a dense model.
      model: its configuration.
      share: the share of hidden units to re-initialise, from 0 to 1.
      seed: determines the chosen units and their new weights.
    """
    self._source, self._model, self._seed = source, model, seed
    self._count = round(share * model.ffn_dim)
    self._layer = functools.lru_cache(maxsize=1)(self._make_layer)

  def read(self, path: str, index: Index) -> np.ndarray:
    if path not in _MATRICES:
      return self._source.read(path, index)
    layers, *matrix = index
    return np.stack([self._layer(path, layer)[tuple(matrix)]
                     for layer in range(layers.start, layers.stop)])

  def extent(self, path: str, index: Index) -> Extent | None:
    return None if path in _MATRICES else self._source.extent(path, index)

  def scratch_bytes(self, path: str) -> int:
    of_layer = 16 * self._model.dim * self._model.ffn_dim if path in _MATRICES else 0
    return self._source.scratch_bytes(path) + of_layer

  def units(self, layer: int) -> np.ndarray:
    """The hidden units of a layer that are re-initialised, in ascending order."""
    rng = np.random.default_rng((self._seed, layer))
    return np.sort(rng.choice(self._model.ffn_dim, self._count, replace=False))

  def _make_layer(self, path: str, layer: int) -> np.ndarray:
    """A layer's whole matrix, [D, F] or [F, D]: its new weights depend on all replaced ones."""
    axis, units = _MATRICES[path], self.units(layer)
    shape = (self._model.dim, self._model.ffn_dim)[::1 if axis else -1]
    found = self._source.read(path, (slice(layer, layer + 1), *(slice(0, n) for n in shape)))[0]
    if not len(units):
      return found
    before = np.take(found, units, axis).astype(np.float32)
    rng = np.random.default_rng((self._seed, layer, 1 + list(_MATRICES).index(path)))
    result = found.copy()
    result[(slice(None),) * axis + (units,)] = rng.normal(before.mean(), before.std(), before.shape)
    return result
