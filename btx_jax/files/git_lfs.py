"""Recognises pointers of Git LFS in place of files."""

import re

from btx_jax.errors import UsageError
from btx_jax.files import inputs

# The beginning of a pointer: the URL of the specification, today's or that of the first release.
_POINTER = re.compile(rb'version https://(git-lfs|hawser)\.github\.com/spec/v\d+\r?\n')
POINTER_BYTES = 1024  # a pointer is shorter than this, by its specification


def is_pointer(beginning: bytes) -> bool:
  """Whether a file that begins with these bytes is a Git LFS pointer in place of the file itself.

  Args:
    beginning: the first POINTER_BYTES bytes of the file, or all of it if it is shorter.
  """
  return (len(beginning) < POINTER_BYTES and bool(_POINTER.match(beginning))
          and b'\noid ' in beginning)


def check_no_pointer(path: str):
  """Raises UsageError if a file is a Git LFS pointer in place of the file itself.

  A repository cloned without git-lfs has such pointers, of some 130 bytes, for weights, tokenizers
  and data. A file that cannot be opened passes: its reader reports why.
  """
  try:
    with inputs.open_file(path) as file:
      beginning = file.read(POINTER_BYTES)
  except OSError:
    return
  if is_pointer(beginning):
    raise UsageError(f'{path} is a Git LFS pointer, not the file itself; run git lfs pull in '
                     'its repository.')
