"""Stores arrays that are computed once for a run, before its training, in the run's directory.

A folder holds them as .npy files, beside a JSON file with figures, a hash of every array, and the
run's identity from its manifest: arrays that were computed for another run are ignored. The JSON
file is written last, so a folder without it is ignored, too.
"""

from collections.abc import Mapping
import hashlib
import os
from typing import Any, NamedTuple

import numpy as np

from btx_jax.devices import distributed
from btx_jax.errors import UsageError
from btx_jax.files import inputs, sealed
from btx_jax.files.writing import replacing, save_array
from btx_jax.run import Run
from btx_jax.study import manifest
from btx_jax.study.study import Study


class Stored(NamedTuple):
  """A place for arrays in the directory of a run.

  Attributes:
    study: the study of the run.
    run: the run.
    name: the name of the folder in the run's directory.
    file: the name of the JSON file in it.
  """
  study: Study
  run: Run
  name: str
  file: str

  @property
  def folder(self) -> str:
    return os.path.join(self.study.folder(self.run.name), self.name)

  @property
  def path(self) -> str:
    """The path of the JSON file."""
    return os.path.join(self.folder, self.file)

  def figures(self) -> dict[str, Any] | None:
    """The figures; None if nothing was written for this run.

    Raises:
      UsageError: the file is damaged.
    """
    try:
      found = sealed.read(self.path)
      return found if found['run'] == self._identity() else None
    except FileNotFoundError:
      return None
    except (ValueError, KeyError, TypeError) as error:
      raise UsageError(f'{self.path} is damaged ({error}). Delete the directory of the run, and '
                       f'run --run={self.run.name} again.') from error

  def array(self, name: str, figures: Mapping[str, Any]) -> np.ndarray:
    """One of the arrays, given the figures. Raises UsageError if it is missing or damaged."""
    path = os.path.join(self.folder, name)
    try:
      damaged = _hash(path) != figures['files'][name]
    except (OSError, KeyError):
      damaged = True
    if damaged:
      raise UsageError(f'{path} is missing or damaged: it is not what was written. Delete the '
                       'directory of the run, and train the run again.')
    with inputs.open_file(path) as file:
      return np.load(file, allow_pickle=False)

  def exists(self) -> bool:
    """Whether the arrays are written; the same for all processes, which wait for shared storage."""
    done = distributed.broadcast(lambda: self.figures() is not None)
    if done:
      distributed.wait_for(self.path)
    return done

  def write(self, arrays: Mapping[str, np.ndarray], figures: Mapping[str, Any]) -> None:
    """Writes arrays, by the names of their files, and figures.

    Process 0 writes; all return once they see it.
    """
    distributed.on_process_0(lambda: self._write(arrays, figures))
    distributed.wait_for(self.path)

  def _write(self, arrays: Mapping[str, np.ndarray], figures: Mapping[str, Any]) -> None:
    hashes = {}
    for name, array in arrays.items():
      path = os.path.join(self.folder, name)
      with replacing(path, 'wb') as file:
        save_array(file, array)
      hashes[name] = _hash(path)
    sealed.write(self.path, {'run': self._identity(), 'files': hashes, **figures})

  def _identity(self) -> str:
    return manifest.identity_in(self.study.folder(self.run.name)) or ''


def _hash(path: str) -> str:
  with inputs.open_file(path) as file:
    return hashlib.sha256(file.read()).hexdigest()
