"""Routers from sums over router inputs, in NumPy and float64."""

from collections.abc import Mapping, Sequence

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
  outer_LDD = _over_domains(of.outer for of in sums.values())
  total_LD = _over_domains(of.total for of in sums.values())
  tokens = sum(of.tokens for of in sums.values())
  if kind == MEAN:
    w_LDE = np.stack([sums[label].total / sums[label].tokens for label in labels], -1)
  else:
    w_LDE = np.linalg.solve(_damped(outer_LDD, ridge),
                            np.stack([sums[label].total for label in labels], -1))
  mean_LE = np.einsum('ld,lde->le', total_LD / tokens, w_LDE)
  square_LE = np.einsum('lde,lde->le', w_LDE, outer_LDD / tokens @ w_LDE)
  deviation_LE = np.sqrt(np.maximum(square_LE - mean_LE**2, 0))
  return w_LDE / np.maximum(deviation_LE, 1e-30)[:, None]


def _damped(outer_LDD: np.ndarray, ridge: float) -> np.ndarray:
  """The sums of x x' plus lambda on the diagonal, in units of its mean."""
  D = outer_LDD.shape[-1]
  mean_L = np.trace(outer_LDD, axis1=1, axis2=2) / D
  return outer_LDD + (ridge * mean_L)[:, None, None] * np.eye(D)


def _over_domains(values) -> np.ndarray:
  """The sum, added in the order of the domains."""
  total, *others = (np.array(value, np.float64) for value in values)
  for value in others:
    total += value
  return total
