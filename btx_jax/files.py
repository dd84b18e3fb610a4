"""Files that are replaced whole, so that a reader never sees half of one."""

import contextlib
import os


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
