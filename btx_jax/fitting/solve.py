"""Routers from sums over router inputs, in NumPy and float64."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from btx_jax.recipe import MEAN
from btx_jax.study.routers import Sums


def columns(kind: str, sums: Mapping[str, Sums], labels: Sequence[str], ridge: float
            ) -> np.ndarray:
  """Routers [L, D, E] whose logits have a deviation of 1 over the text of the sums.

  Both kinds have no bias: after RMSNorm a bias could not be folded into the weights.

  Args:
    kind: 'mean' or 'ridge'.
    sums: by domain.
    labels: the domain of each expert.
    ridge: lambda, in units of the mean square of an input's entries.
  """
  layers = range(len(next(iter(sums.values())).total))
  return np.stack([_of_layer(kind, sums, labels, ridge, layer) for layer in layers])


def _of_layer(kind: str, sums: Mapping[str, Sums], labels: Sequence[str], ridge: float, layer: int
              ) -> np.ndarray:
  """The router [D, E] of one layer; only its sums are added up at once."""
  outer_DD = _sum(of.outer[layer] for of in sums.values())
  total_D = _sum(of.total[layer] for of in sums.values())
  tokens = sum(of.tokens for of in sums.values())
  own_DE = np.stack([sums[label].total[layer] for label in labels], -1)
  if kind == MEAN:
    w_DE = own_DE / [sums[label].tokens for label in labels]
  else:
    damping = ridge * np.trace(outer_DD) / len(outer_DD)
    w_DE = np.linalg.solve(outer_DD + damping * np.eye(len(outer_DD)), own_DE)
  mean_E = total_D @ w_DE / tokens
  square_E = (w_DE * (outer_DD @ w_DE)).sum(0) / tokens
  return w_DE / np.sqrt(np.maximum(square_E - mean_E**2, 1e-60))


def _sum(values: Iterable[np.ndarray]) -> np.ndarray:
  """The sum, added in the order of the domains."""
  total, *others = (np.array(value, np.float64) for value in values)
  for value in others:
    total += value
  return total
