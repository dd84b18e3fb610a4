"""Detects damage to tokens on disk.

meta.json has the length and the hash of every file in its folder. Lengths are compared whenever
tokens are opened. A file is hashed once: `checked.json` then has its stamp, which is its size, time
of modification and inode, and while these stay the same, it is not hashed again. checked.json may
be deleted.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import functools
import hashlib
import os
from typing import Any

import numpy as np

from btx_jax.errors import UsageError
from btx_jax.files import sealed

SUMS = 'sums'  # in meta.json: name of a file -> [bytes, SHA-256]
_STAMPS = 'checked.json'  # name of a file -> its stamp: [bytes, time in nanoseconds, inode]
_BLOCK = 1 << 20  # bytes


class Damaged(UsageError):
  """A file is not what was written.

  Attributes:
    folder: the folder of the file.
    name: its name there.
    what: the problem, as a sentence.
  """

  def __init__(self, folder: str, name: str, problem: str):
    self.folder, self.name = folder, name
    self.what = f'{os.path.join(folder, name)} is damaged: {problem}.'
    super().__init__(f'{self.what} Restore a copy, or run the command data, which tokenizes the '
                     'text again if it is still there.')

  def without_text(self) -> UsageError:
    """The error to report if the text that the folder was made from is gone."""
    return UsageError(f'{self.what} Its text is not there, so it cannot be tokenized again. '
                      f'Restore a copy of {self.folder}, or put the text back.')

  def of_tokenizer(self) -> UsageError:
    """The error to report for a tokenizer that was trained here."""
    return UsageError(f'{self.what} The tokenizer was trained here, and the tokens and runs belong '
                      f'to it. Restore a copy of the file, or delete {self.folder} if no run needs '
                      'what is there.')


def sums(folder: str, names: Sequence[str]) -> dict[str, list]:
  """The length and hash of files, for meta.json; marks the files as checked."""
  stamps = {name: _stamp(os.path.join(folder, name)) for name in names}
  result = {name: [stamp[0], _hash(os.path.join(folder, name), *stamp)]
            for name, stamp in stamps.items()}
  _note(folder, stamps)
  return result


def are_sums(found: Any) -> bool:
  """Whether plain data is what `sums` returns."""
  return isinstance(found, dict) and all(
      isinstance(each, list) and list(map(type, each)) == [int, str] for each in found.values())


def check(folder: str, recorded: Mapping[str, Sequence]) -> list[str]:
  """Raises Damaged if files are not what was written.

  Args:
    folder: the folder of the files.
    recorded: what `sums` returned.

  Returns:
    The names of the files that were hashed: those never hashed before, or changed since.
  """
  checked, hashed = _checked(folder), {}
  for name, (size, content) in recorded.items():
    path = os.path.join(folder, name)
    try:
      stamp = _stamp(path)
    except FileNotFoundError:
      raise Damaged(folder, name, 'it does not exist') from None
    if stamp[0] != size:
      raise Damaged(folder, name, f'it has {stamp[0]:,} bytes instead of {size:,}')
    if checked.get(name) != stamp:
      if _hash(path, *stamp) != content:
        raise Damaged(folder, name, 'its content is not what was written')
      hashed[name] = stamp
  if hashed:
    _note(folder, hashed)
  return list(hashed)


def check_numbers(folder: str, split: str, dtype: str, vocab_size: int | None) -> None:
  """Raises Damaged unless boundaries rise to the end of the tokens, and all ids are in range.

  Args:
    folder: the folder of the tokens.
    split: the name of the split.
    dtype: the type of the ids.
    vocab_size: the number of tokens; None if it is not known.
  """
  name, boundaries = f'{split}.bin', f'{split}.documents.npy'
  try:
    count = os.path.getsize(os.path.join(folder, name)) / np.dtype(dtype).itemsize
    found = np.load(os.path.join(folder, boundaries), allow_pickle=False)
  except FileNotFoundError as error:
    raise Damaged(folder, os.path.basename(error.filename), 'it does not exist') from error
  except (ValueError, EOFError) as error:
    raise Damaged(folder, boundaries, str(error).splitlines()[0]) from error
  if (found.dtype != np.int64 or found.ndim != 2 or found.shape[1] != 2 or not len(found)
      or found[0].any() or (np.diff(found, axis=0) < 0).any()):
    raise Damaged(folder, boundaries, 'its numbers do not rise from 0')
  if found[-1, 0] != count:
    raise Damaged(folder, boundaries, f'it ends at token {found[-1, 0]:,}, and {name} has '
                  f'{count:,.10g} tokens')
  if vocab_size is not None:
    for block in _blocks(os.path.join(folder, name)):
      if block and (largest := np.frombuffer(block, dtype).max()) >= vocab_size:
        raise Damaged(folder, name, f'it has token {largest:,}, and the tokenizer has '
                      f'{vocab_size:,}')


@functools.lru_cache(4096)
def _hash(path: str, size: int, time: int, inode: int) -> str:
  """The SHA-256 of a file; its stamp is an argument only for the cache."""
  del size, time, inode
  digest = hashlib.sha256()
  for block in _blocks(path):
    digest.update(block)
  return digest.hexdigest()


def _blocks(path: str) -> Iterator[bytes]:
  with open(path, 'rb', buffering=0) as file:
    while block := file.read(_BLOCK):
      yield block


def _stamp(path: str) -> list[int]:
  found = os.stat(path)
  return [found.st_size, found.st_mtime_ns, found.st_ino]


def _checked(folder: str) -> dict[str, Any]:
  return sealed.read_or_empty(os.path.join(folder, _STAMPS))


def _note(folder: str, stamps: Mapping[str, Sequence[int]]) -> None:
  """Marks files as checked. If the folder cannot be written, they are hashed each time."""
  with contextlib.suppress(OSError):
    sealed.write(os.path.join(folder, _STAMPS), {**_checked(folder), **stamps})
