"""Forecasts of steps: preflight's bound, times how far from it steps were that have been timed.

The timed steps are those in a file of tests/benchmarks/accelerator.py, which times programs and
reads the bound of each of them on the devices where they run.
"""

import math
import statistics
from typing import NamedTuple

from btx_jax.errors import UsageError
from btx_jax.files import inputs
from btx_jax.preflight.topology import Topology

DENSE, MIXTURE = 'dense', 'mixture'


class Ratio(NamedTuple):
  """How far from their bounds steps were.

  Attributes:
    times: the median of seconds / bound.
    of: the number of programs that were timed.
  """
  times: float
  of: int


def read(path: str, topology: Topology) -> dict[str, Ratio]:
  """The ratios of dense programs and of mixtures, each if one was timed.

  Rows with an error, without a bound, or of a form that the config would not choose are left out.

  Args:
    path: of a file with `device_kind`, as jax names it, and `rows`. A row has `experts` (0 is a
      dense model), `seconds`, `bound` (both of a step) and perhaps `automatic` and `error`.
    topology: the devices that forecasts are for.

  Raises:
    UsageError: the file is not readable, not such a file, or of other chips.
  """
  try:
    found = inputs.read_json(path)
  except (OSError, ValueError) as error:
    raise UsageError(f'--measured={path} cannot be read: {error}.') from error
  try:
    kind, pairs = found['device_kind'], [
        (MIXTURE if row['experts'] else DENSE, row['seconds'], row['bound'])
        for row in found['rows']
        if not row.get('error') and row.get('automatic', True) and row['bound'] is not None]
    ratios = [(program, seconds / bound) for program, seconds, bound in pairs]
    usable = all(0 < ratio < math.inf for _, ratio in ratios)
  except (KeyError, TypeError, AttributeError, ZeroDivisionError):
    kind, ratios, usable = '', [], False
  if not usable:
    raise UsageError(f'--measured={path} is not a file of timed steps: python -m '
                     'tests.benchmarks.accelerator writes one.')
  kinds = topology.chip.kinds if topology.chip else ()
  if kind not in kinds:
    raise UsageError(f'--measured={path} has steps of {kind!r}, and --topology={topology.name} has '
                     f'{" or ".join(map(repr, kinds)) or "no known chip"}: what one chip reaches '
                     'says nothing of another.')
  if not ratios:
    raise UsageError(f'--measured={path} has no step that was timed and has a bound.')
  return {program: Ratio(statistics.median(of), len(of)) for program in (DENSE, MIXTURE)
          if (of := [ratio for each, ratio in ratios if each == program])}
