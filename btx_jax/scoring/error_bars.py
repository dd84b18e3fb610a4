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
import statistics
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


def error_of_ratio(top_U: ArrayLike, bottom_U: ArrayLike) -> float | None:
  """The jackknife's standard error of sum(top) / sum(bottom) over units.

  None if it is not known: there are fewer than two units, or one has all of `bottom`.
  """
  top, bottom = np.asarray(top_U, np.float64), np.asarray(bottom_U, np.float64)
  rest = bottom.sum() - bottom
  if len(rest) < 2 or rest.min() <= 0:
    return None
  without = (top.sum() - top) / rest
  return math.sqrt((len(rest) - 1) * without.var())


def error_of(units: Units) -> float | None:
  """The standard error of a score."""
  return error_of_ratio(np.divide(units['nll'], math.log(2)), units['bytes'])


def error_of_difference(units: Units, other: Units) -> float | None:
  """The standard error of the difference of two scores, which are paired by unit.

  None if they were not measured on the same units.
  """
  if not np.array_equal(units['bytes'], other['bytes']):
    return None
  return error_of({'nll': np.subtract(units['nll'], other['nll']).tolist(),
                   'bytes': units['bytes']})


def error_of_percent(units: Units, other: Units) -> float | None:
  """The standard error of by how many percent a score differs from another, paired by unit.

  None if they were not measured on the same units.
  """
  if not np.array_equal(units['bytes'], other['bytes']):
    return None
  error = error_of_ratio(units['nll'], other['nll'])
  return None if error is None else 100 * error


def mean(values: Sequence[float | None]) -> float | None:
  """The mean, of a score over the seeds, say; None if a value is not known, or there is none."""
  known = [value for value in values if value is not None]
  return statistics.fmean(known) if known and len(known) == len(values) else None


def spread(values: Sequence[float | None]) -> float | None:
  """The sample standard deviation; None if a value is not known, or there are fewer than two."""
  known = [value for value in values if value is not None]
  return statistics.stdev(known) if len(known) == len(values) > 1 else None


def error_of_mean(errors: Iterable[float | None]) -> float | None:
  """The standard error of the mean over domains, whose texts are independent; None if one is."""
  found = [math.nan if error is None else error for error in errors]
  result = math.hypot(*found) / max(len(found), 1)
  return None if math.isnan(result) else result
