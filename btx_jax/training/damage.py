"""How damage to a checkpoint is noticed, and what follows."""

from collections.abc import Iterator, Mapping
import contextlib
import itertools
import json
import os
from typing import Any
import zlib

import jax
import numpy as np

from btx_jax.errors import RunError
from btx_jax.files import places, writing
from btx_jax.training import checksums

# Errors of tensorstore, XLA and buckets that do not come from what was stored.
_NOT_DAMAGE = ('RESOURCE_EXHAUSTED', 'PERMISSION_DENIED', 'UNAVAILABLE', 'DEADLINE_EXCEEDED',
               'UNAUTHENTICATED', 'http_response_code', 'curl_code', 'does not answer')


class Damaged(RunError):
  """A checkpoint is damaged, or belongs to another step or run than its path says.

  Attributes:
    folder: the directory of the run's checkpoints.
    step: the step.
    problem: what is wrong with it.
    what: the same, as a sentence with its path.
  """

  def __init__(self, folder: str, step: int, problem: str):
    self.folder, self.step, self.problem = folder, step, problem
    self.what = f'The checkpoint {os.path.join(folder, str(step))} is damaged: {problem}.'
    super().__init__(f'{self.what} Train its run again, with --run; it continues from the newest '
                     'sound checkpoint.')

  def set_aside(self, name: str, before: int) -> RunError:
    """Renames the checkpoint; returns the error to report.

    Args:
      name: the name of the run.
      before: the newest step before this one whose checkpoint is kept.
    """
    renamed = set_aside(self.folder, self.step)
    return RunError(f'{self.what} It is now called {renamed}, and the same command trains {name} '
                    f'again from step {before:,}.')

  def is_the_last(self) -> RunError:
    """The error to report if no earlier checkpoint can take its place."""
    return RunError(f'{self.what} No earlier sound checkpoint is kept. Restore a copy, or delete '
                    f'{os.path.dirname(self.folder)} to train that run from the beginning.')

  def has_later(self) -> RunError:
    """What to say if its run has later checkpoints, and so does not come to this step again."""
    return RunError(f'{self.what} Its run goes on from later ones, so it does not save this one '
                    f'again. Put back a copy, or delete {os.path.dirname(self.folder)} to train '
                    'that run from its beginning.')


def has_sums(folder: str, step: int) -> bool:
  """Whether a checkpoint has checksums; those of earlier versions have none."""
  return places.is_folder(os.path.join(folder, str(step), 'sums'))


def set_aside(folder: str, step: int) -> str:
  """Renames a checkpoint to damaged-STEP, or damaged-STEP-2 and so on; returns the new name."""
  names = (f'damaged-{step}{suffix}' for suffix in itertools.chain(
      [''], (f'-{i}' for i in itertools.count(2))))
  name = next(name for name in names if not places.exists(os.path.join(folder, name)))
  writing.rename(os.path.join(folder, str(step)), os.path.join(folder, name))
  return name


@contextlib.contextmanager
def reading(folder: str, step: int) -> Iterator[None]:
  """Raises Damaged for errors while a checkpoint is read, unless their cause lies elsewhere."""
  try:
    if not has_sums(folder, step):
      raise Damaged(folder, step, 'it has no checksums; earlier versions wrote none')
    yield
  except (RunError, MemoryError, PermissionError):
    raise
  except Exception as error:  # orbax and tensorstore raise many kinds
    text = str(error) or type(error).__name__
    if any(word in text for word in _NOT_DAMAGE):
      raise
    raise Damaged(folder, step, f'it cannot be read ({text.strip().splitlines()[0]:.300})'
                  ) from error


def labels(identity: str, step: int, position: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The labels of a checkpoint, as arrays, because orbax saves arrays."""
  return {'run': np.array([int(identity[:8], 16), int(identity[8:], 16)], np.uint32),
          'step': np.array(step, np.uint32),
          'data': np.array(zlib.crc32(json.dumps(position, sort_keys=True).encode()), np.uint32)}


def compare(folder: str, step: int, loaded: Mapping[str, Any], identity: str) -> None:
  """Raises Damaged if loaded items do not match the loaded item `sums`."""
  sums = loaded['sums']
  check_labels(folder, step, sums, labels(identity, step, loaded.get('data', {})),
                'data' in loaded)
  for item in ('params', 'train'):
    if item in loaded:
      found = checksums.of_tree(loaded[item], mesh_of(loaded[item]))
      differing = checksums.differing(found, sums[item])
      if differing:
        raise Damaged(folder, step, f'the checksums of {", ".join(differing)} in {item} differ '
                      'from what was saved')


def check_labels(folder: str, step: int, sums: Mapping[str, Any],
                  expected: Mapping[str, np.ndarray], whole: bool) -> None:
  """Raises Damaged unless a checkpoint has the expected labels.

  `whole`: whether to compare the label of the position in the data, too.
  """
  if not np.array_equal(sums['step'], expected['step']):
    raise Damaged(folder, step, f'it belongs to step {int(sums["step"]):,}')
  if not np.array_equal(sums['run'], expected['run']):
    raise Damaged(folder, step, 'it belongs to another run, or to this run with other settings')
  if whole and not np.array_equal(sums['data'], expected['data']):
    raise Damaged(folder, step, 'its position in the data is not what was saved')


def mesh_of(tree):
  """The mesh over which the arrays of a tree lie; None if they are on one device without a mesh."""
  return getattr(jax.tree.leaves(tree)[0].sharding, 'mesh', None)
