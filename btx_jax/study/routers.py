"""What was set from text, and what it follows from: in a run's directory, as routers/ or selector/.

    columns.npy   [L, D, E] float32, the routers; of a linear selector L is 1
    DOMAIN        by its number: 0_outer.npy [L, D, D] and 0_sum.npy [L, D], float64
    fit.json      the settings, the figures that were measured, and a hash of every file; written
                  last, so that a folder without it does not count
"""

from collections.abc import Mapping
import hashlib
import json
import os
from typing import NamedTuple

import numpy as np

from btx_jax.devices import distributed
from btx_jax.errors import UsageError
from btx_jax.files import replacing
from btx_jax.run import Run
from btx_jax.study import manifest
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
  return _read(_folder(study, run), _COLUMNS, _fit(study, run)['files'])


def are_set(study: Study, run: Run) -> bool:
  """Whether they have been set, for all processes: those waiting for shared storage wait here."""
  done = distributed.broadcast(lambda: figures(study, run) is not None)
  if done:
    distributed.wait_for(os.path.join(_folder(study, run), _FIT))
  return done


def figures(study: Study, run: Run) -> dict | None:
  """What was measured when they were set, and how; None if that has not been done for this run."""
  try:
    with open(os.path.join(_folder(study, run), _FIT), encoding='utf-8') as file:
      fit = json.load(file)
    return fit if fit['run'] == _identity(study, run) else None
  except FileNotFoundError:
    return None
  except (ValueError, KeyError, TypeError) as error:
    raise UsageError(f'{os.path.join(_folder(study, run), _FIT)} is damaged ({error}). Delete the '
                     f'directory of the run, and run --run={run.name} again.') from error


def sums(study: Study, run: Run) -> dict[str, Sums]:
  """The sums that a run's routers or its selector follow from, by domain."""
  folder, fit = _folder(study, run), _fit(study, run)
  return {domain: Sums(*(_read(folder, f'{i}_{what}.npy', fit['files'])
                         for what in ('outer', 'sum')), tokens=tokens)
          for i, (domain, tokens) in enumerate(fit['tokens'].items())}


def write(study: Study, run: Run, columns_LDE: np.ndarray, sums: Mapping[str, Sums],
          figures: Mapping) -> None:
  """Stores routers or a selector, the sums of each domain, and what was measured.

  Process 0 writes; all return once they see it.
  """
  distributed.on_process_0(lambda: _write(study, run, columns_LDE, sums, figures))
  distributed.wait_for(os.path.join(_folder(study, run), _FIT))


def _write(study: Study, run: Run, columns_LDE: np.ndarray, sums: Mapping[str, Sums],
           figures: Mapping) -> None:
  arrays = {_COLUMNS: columns_LDE.astype(np.float32)}
  for i, of_domain in enumerate(sums.values()):
    arrays |= {f'{i}_outer.npy': of_domain.outer, f'{i}_sum.npy': of_domain.total}
  folder, hashes = _folder(study, run), {}
  for name, array in arrays.items():
    with replacing(os.path.join(folder, name), 'wb') as file:
      np.save(file, array, allow_pickle=False)
    hashes[name] = _hash(os.path.join(folder, name))
  with replacing(os.path.join(folder, _FIT)) as file:
    tokens = {domain: found.tokens for domain, found in sums.items()}
    json.dump({'run': _identity(study, run), 'tokens': tokens, 'files': hashes, **figures}, file,
              indent=1)


def _fit(study: Study, run: Run) -> dict:
  fit = figures(study, run)
  if fit is None:
    raise UsageError(f'{_folder(study, run)} has no {_FIT}: what belongs there has not been set '
                     f'from text. Run --run={run.name}; if its directory exists, delete it first.')
  return fit


def _identity(study: Study, run: Run) -> str:
  """The identity in the run's manifest: what was set for another run does not count."""
  found = manifest.read(study.folder(run.name))
  return found['identity'] if found else ''


def _folder(study: Study, run: Run) -> str:
  return os.path.join(study.folder(run.name), 'selector' if run.selector else 'routers')


def _read(folder: str, name: str, hashes: Mapping[str, str]) -> np.ndarray:
  path = os.path.join(folder, name)
  try:
    damaged = _hash(path) != hashes[name]
  except (OSError, KeyError):
    damaged = True
  if damaged:
    raise UsageError(f'{path} is missing or damaged: it is not what was written. Delete the '
                     'directory of the run, and train the run again.')
  return np.load(path, allow_pickle=False)


def _hash(path: str) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
