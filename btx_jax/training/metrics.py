"""metrics.jsonl: the measurements of a run, one JSON object per line.

Every line has `step` and `time` (seconds since 1970). A line on training has

  loss                nats per target, over the steps since the previous line; for a run on pairs,
                      the loss per pair
  loss_by_domain      likewise, for each domain that had targets
  lr                  of this step
  grad_norm           of this step's whole gradient, before clipping
  grad_norms          by part of the model, of what trains
  param_norms         by part of the model, before this step
  tokens_by_domain    number of targets since the start of the run
  tokens_per_second   positions, without the first step, which is compiled
  mfu                 model FLOPs as a share of the devices' peak
  input_wait          share of the time spent waiting for a batch
  memory              peak bytes so far: host, device
  balance             load-balancing loss of this step, summed over layers
  router_z            router z-loss of this step, summed over layers
  preferences         for a run on pairs, means over the pairs since the previous line: preferred,
                      the share with a positive margin; margin, the reward of the chosen answer
                      minus that of the rejected one; chosen and rejected, log-probabilities of the
                      answers in nats
  routing             see routing_figures.describe
  troubles            of the routing, see routing_figures.troubles; each only once in a run
  warnings            the same in sentences; also of the first spike of the loss, see spikes.py
  skipped             number of steps since the start of the run that were skipped because their
                      numbers were not finite; only if there are any. No other field includes
                      them, and a line whose own step was skipped has no figures of that step.

and a line on evaluation has `bits_per_byte` by domain, and for domains of pairs `preferred`, the
share of held-out pairs that the model ranks as the data does (scoring/ranking.py).
"""

from collections.abc import Iterator
import contextlib
import errno
import functools
import json
import os
import time
from typing import Any, BinaryIO, NamedTuple
import zlib

from btx_jax import storage
from btx_jax.files import places, shapes, writing
from btx_jax.terminal import say
from btx_jax.training import saving

NAME = 'metrics.jsonl'
# What the code that reads lines relies on.
_SHAPE = {'step': int, 'time?': float, 'loss?': float, 'loss_by_domain?': {str: float},
          'lr?': float, 'tokens_per_second?': float, 'mfu?': (None, float),
          'bits_per_byte?': {str: float}, 'preferences?': {str: float}, 'warnings?': [str]}
_TAIL = 1 << 20  # bytes at the end of a file that `tail` reads


class Mark(NamedTuple):
  """A place in the file, as a checkpoint stores it.

  Attributes:
    size: the number of bytes before it.
    crc32: their checksum.
    late: lines after it that could not be written because the disk was full.
  """
  size: int = 0
  crc32: int = 0
  late: str = ''


_BEGINNING = Mark()


class MetricsFile:
  """Appends lines. Resuming at a step first cuts the file back to that step.

  Attributes:
    kept: the lines up to that step, as dicts.
  """

  def __init__(self, folder: str, resume_step: int = 0, mark: Mark = _BEGINNING):
    """`mark` is the end of the file when the checkpoint of `resume_step` was saved.

    If the file does not match the mark, a message says so, and the readable lines up to
    `resume_step` are kept.
    """
    path = os.path.join(folder, NAME)
    kept, problem = _up_to(path, mark)
    if problem:
      late = mark.late.encode().splitlines()  # perhaps they could be written after all
      kept = b''.join(line + b'\n' for line, values in _readable(path)
                      if values['step'] <= resume_step and line not in late)
      say(f'{path} {problem}; the run continues, and the file keeps the lines that are left')
    self.kept = [json.loads(line) for line in kept.splitlines()]
    with writing.replacing(path, 'wb') as file:
      file.write(kept)
    self._path, self._folder, self._file = path, folder, writing.append(path)
    self._mark, self._late, self._is_full = Mark(len(kept), zlib.crc32(kept)), b'', False
    self._synced, self._unsynced = self._mark, b''  # what is on the disk, and lines after it
    self.kept += [json.loads(line) for line in mark.late.splitlines()]
    self._append(mark.late.encode())

  def write(self, step: int, **values) -> dict[str, Any]:
    """Appends a line, and returns it."""
    line = {'step': step, 'time': round(time.time(), 1), **values}
    saving.check_present(self._folder)
    self._append(json.dumps(line).encode() + b'\n')
    return line

  def _append(self, data: bytes):
    """Appends whole lines; if the disk is full or fails, keeps them for the next call."""
    self._late += data
    done = 0
    try:
      if self._is_full:
        self._file.truncate(self._mark.size)
      while done < len(self._late):
        done += self._file.write(self._late[done:])
    except OSError as error:
      self._keep(error)
      return
    self._mark = Mark(self._mark.size + done, zlib.crc32(self._late, self._mark.crc32))
    self._unsynced += self._late
    self._late = b''

  def _sync(self):
    """Brings what is in the file to the disk, or keeps it for the next call.

    Some file systems, like NFS, only say here that there was no room for what was written.
    """
    try:
      self._file.sync()
    except OSError as error:
      self._mark, self._late = self._synced, self._unsynced + self._late
      self._keep(error)
    else:
      self._synced, self._is_full = self._mark, bool(self._late)
    self._unsynced = b''

  def _keep(self, error: OSError):
    """Leaves the file with its whole lines, because the others could not be written."""
    if not storage.disk_error(error):
      raise error
    with contextlib.suppress(OSError):  # the next call tries again
      self._file.truncate(self._mark.size)
    if not self._is_full:
      say(f'{self._path} could not be written: {error.strerror}. Its lines are kept, and '
          'written once that is possible')
    self._is_full = True

  def mark(self) -> Mark:
    """The end of the file; all before it is on the disk when this returns."""
    self._append(b'')
    self._sync()
    return self._mark._replace(late=self._late.decode())

  def __enter__(self):
    return self

  def __exit__(self, _, error, __):
    self.mark()
    self._file.close()
    if self._late and error is None:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._path)


def end_of(folder: str) -> Mark:
  """A mark at the end of a run's file; at the beginning if the file does not exist."""
  try:
    with _open(os.path.join(folder, NAME)) as file:
      found = file.read()
  except FileNotFoundError:
    return _BEGINNING
  return Mark(len(found), zlib.crc32(found))


def problem(folder: str, end: Mark) -> str:
  """How a file differs from what its end mark promises, as a sentence; '' if it does not."""
  path = os.path.join(folder, NAME)
  try:
    stamp = places.of(path).stamp_of_log(path)
  except OSError:
    stamp = None
  return _problem(path, end, stamp)


@functools.lru_cache(256)
def _problem(path: str, end: Mark, stamp: tuple[Any, ...] | None) -> str:
  """`problem` of a file with this stamp: `status --watch` asks again every two seconds."""
  del stamp
  _, found = _up_to(path, end)
  if not found and end.size and _size(path) > end.size:
    found = 'has lines that the run did not write'
  return f'{path} {found}: do not rely on its curves and rates.' if found else ''


def _up_to(path: str, mark: Mark) -> tuple[bytes, str]:
  """The bytes before a mark, and what is wrong with them, or ''."""
  if not mark.size:
    return b'', ''
  try:
    with _open(path) as file:
      size = file.seek(0, os.SEEK_END)
      file.seek(0)
      found = file.read(mark.size) if 0 < mark.size <= size else b''
  except FileNotFoundError:
    return b'', 'is missing'
  except OSError as error:
    return b'', f'cannot be read ({error.strerror})'
  if len(found) < mark.size:
    return b'', f'has lost lines ({size:,} of {mark.size:,} bytes are left)'
  return found, '' if zlib.crc32(found) == mark.crc32 else 'is damaged'


def _open(path: str) -> BinaryIO:
  return places.of(path).open_log(path)


def _size(path: str) -> int:
  with _open(path) as file:
    return file.seek(0, os.SEEK_END)


def _readable(path: str) -> list[tuple[bytes, dict[str, Any]]]:
  """The readable lines of a file, raw and parsed; none if the file cannot be read."""
  try:
    with _open(path) as file:
      return [(line, values) for line in file.read().split(b'\n') if (values := _parsed(line))]
  except OSError:
    return []


def _parsed(line: bytes) -> dict[str, Any] | None:
  """A line as a dict; None if it is not a measurement."""
  try:
    values = json.loads(line)
  except (ValueError, RecursionError):
    return None
  return None if shapes.misfit(values, _SHAPE) else values


def read(folder: str) -> list[dict[str, Any]]:
  """All lines of a run directory, in order; none if there is no file.

  An incomplete line, as a kill leaves it, is skipped.
  """
  return list(_lines(folder, 0))


def tail(folder: str) -> list[dict[str, Any]]:
  """The last lines, without reading all of a long file."""
  return list(_lines(folder, _TAIL))


def _lines(folder: str, last_bytes: int) -> Iterator[dict[str, Any]]:
  try:
    with _open(os.path.join(folder, NAME)) as file:
      size = file.seek(0, os.SEEK_END)
      cut = last_bytes and size > last_bytes
      file.seek(size - last_bytes if cut else 0)
      if cut:
        file.readline()  # probably not whole
      yield from filter(None, map(_parsed, file))
  except OSError:
    return
