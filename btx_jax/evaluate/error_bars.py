"""Error bars of bits per byte from the text: what other held-out text would have changed.

Bits per byte is a ratio of two sums over units of text, sum(nll) / sum(bytes); see units.py. Its
standard error is that of a delete-one-unit jackknife, where r_u is the ratio without unit u of U:

  sqrt((U - 1) / U * sum_u (r_u - mean(r))^2)

Two models are measured on the same units, and what is hard for one is hard for the other. So the
error of their difference is computed from the differences unit by unit, and is far smaller than the
two errors together suggest. This is not the error from training, which config.seeds shows.
"""

from collections.abc import Iterable, Mapping, Sequence
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

# A check on fewer units than this says neither yes nor no: a standard error would itself be too
# uncertain.
LEAST_UNITS = 20

Units = Mapping[str, Sequence[float]]  # 'nll' in nats and 'bytes', [U] each; see units.score


class Difference(NamedTuple):
  """By how much one score is higher than another.

  Attributes:
    value: in bits per byte.
    error: its standard error from the text, paired by unit; None if it is not known.
    units: of text that it was measured on, in the domain that has fewest; None if not known.
  """
  value: float
  error: float | None
  units: int | None


def bits_per_byte(nll: float, size: int) -> float:
  """Bits per byte of raw text, from its negative log likelihood in nats."""
  return nll / math.log(2) / max(size, 1)


def standard_error(nll_U: ArrayLike, bytes_U: ArrayLike) -> float | None:
  """The jackknife's standard error of bits per byte; None for fewer than two units with text."""
  nll, size = np.asarray(nll_U, np.float64), np.asarray(bytes_U, np.float64)
  rest = size.sum() - size  # bytes without each unit
  if len(size) < 2 or rest.min() <= 0:
    return None
  without = (nll.sum() - nll) / rest / math.log(2)
  return math.sqrt((len(size) - 1) * without.var())


def error_of(units: Units) -> float | None:
  """The standard error of a score."""
  return standard_error(units['nll'], units['bytes'])


def error_of_difference(units: Units, other: Units) -> float | None:
  """The standard error of the difference of two scores, which are paired by unit.

  None if they were not measured on the same units.
  """
  if not np.array_equal(units['bytes'], other['bytes']):
    return None
  return standard_error(np.subtract(units['nll'], other['nll']), units['bytes'])


def error_of_mean(errors: Iterable[float | None]) -> float | None:
  """The standard error of the mean over domains, whose texts are independent; None if one is."""
  found = [math.nan if error is None else error for error in errors]
  result = math.hypot(*found) / max(len(found), 1)
  return None if math.isnan(result) else result
