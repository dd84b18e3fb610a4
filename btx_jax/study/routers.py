"""What was set from text, and what it follows from: in a run's directory, as routers/ or selector/.

    columns.npy   [L, D, E] float32, the routers; of a linear selector L is 1
    DOMAIN        by its number: 0_outer.npy [L, D, D] and 0_sum.npy [L, D], float64
    fit.json      the settings, the figures that were measured, and a hash of every file; see
                  stored.py
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from btx_jax.errors import UsageError
from btx_jax.run import Run
from btx_jax.study.stored import Stored
from btx_jax.study.study import Study

_FIT, _COLUMNS = 'fit.json', 'columns.npy'


class Sums(NamedTuple):
  """Sums over what routers or a selector read of one domain's text; those of several add up.

  Attributes:
    outer: [L, D, D] float64, of x x'.
    total: [L, D] float64, of x.
    tokens: how many there are.
  """
  outer: np.ndarray
  total: np.ndarray
  tokens: int


def of(study: Study, run: Run) -> np.ndarray | None:
  """The routers [L, D, E] that a run starts with, or [1, D, E] of its selector; None without.

  Raises:
    UsageError: they have not been set yet, or their file is damaged.
  """
  if run.fitted is None:
    return None
  return _stored(study, run).array(_COLUMNS, _fit(study, run))


def are_set(study: Study, run: Run) -> bool:
  """Whether they have been set, for all processes: those waiting for shared storage wait here."""
  return _stored(study, run).exists()


def figures(study: Study, run: Run) -> dict | None:
  """What was measured when they were set, and how; None if that has not been done for this run."""
  return _stored(study, run).figures()


def sums(study: Study, run: Run) -> dict[str, Sums]:
  """The sums that a run's routers or its selector follow from, by domain."""
  stored, fit = _stored(study, run), _fit(study, run)
  return {domain: Sums(*(stored.array(f'{i}_{what}.npy', fit) for what in ('outer', 'sum')),
                       tokens=tokens)
          for i, (domain, tokens) in enumerate(fit['tokens'].items())}


def write(study: Study, run: Run, columns_LDE: np.ndarray, sums: Mapping[str, Sums],
          figures: Mapping) -> None:
  """Stores routers or a selector, the sums of each domain, and what was measured.

  Process 0 writes; all return once they see it.
  """
  arrays = {_COLUMNS: columns_LDE.astype(np.float32)}
  for i, of_domain in enumerate(sums.values()):
    arrays |= {f'{i}_outer.npy': of_domain.outer, f'{i}_sum.npy': of_domain.total}
  tokens = {domain: found.tokens for domain, found in sums.items()}
  _stored(study, run).write(arrays, {'tokens': tokens, **figures})


def _fit(study: Study, run: Run) -> dict:
  fit = figures(study, run)
  if fit is None:
    raise UsageError(f'{_stored(study, run).folder} has no {_FIT}: what belongs there has not been '
                     f'set from text. Run --run={run.name}; if its directory exists, delete it '
                     'first.')
  return fit


def _stored(study: Study, run: Run) -> Stored:
  return Stored(study, run, 'selector' if run.selector else 'routers', _FIT)
