"""Files that are replaced whole, so that a reader never sees half of one; and what is no path."""

import contextlib
import os
import re

from btx_jax.errors import UsageError


def check_path(name: str, path: str):
  """Raises UsageError for an address like gs://bucket: os.path takes it for a relative path."""
  if re.match(r'[a-z][a-z0-9]*://', path):
    raise UsageError(f'{name} = {path} is an address, not a path. What is in a bucket has to be '
                     'mounted or copied first; see docs/tpu_vm.md.')


@contextlib.contextmanager
def replacing(path: str, mode: str = 'w'):
  """Opens a file beside `path` that takes its place at the end of the block, if all went well."""
  os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
  partial = f'{path}.{os.getpid()}.partial'  # several jobs may write the same file
  encoding = None if 'b' in mode else 'utf-8'
  try:
    with open(partial, mode, encoding=encoding) as file:
      yield file
    os.replace(partial, path)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      os.remove(partial)
    raise
