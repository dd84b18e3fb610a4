"""Finished rows: what is kept of a run without its parameters, in the folder config.rows.

    FOLDER/RUN.json
      manifest    what the manifest of the run says about how it was made
      evaluation  by stage, the content of its evaluation_STAGE.json
      answers     by stage, the content of its answers_STAGE.json
      training    its last loss and its median speed, as a line of metrics.jsonl
      cost        by stage, what of its costs only the working directory can tell: tokens by domain,
                  passes over the text, device time (scoring/ledger.py)
      fitted      what was measured when its routers or its selector were set from text; or {}

A row stands for its run where the working directory does not have the run: the run is not trained,
and tables show its scores. So a long study can be made in parts, on several machines, and committed
with the code. The command `rows` writes them.
"""

import functools
import os
from typing import Any

from btx_jax.errors import UsageError
from btx_jax.files import sealed, shapes
from btx_jax.study import manifest

_BY_STAGE = {str: {'measured_on': {'text': {str: str}}, 'domains': dict}}
_SHAPE = {'manifest': manifest.SHAPE, 'evaluation': _BY_STAGE, 'answers': {str: dict},
          'training': {'step?': int, 'loss?': float, 'tokens_per_second?': float, 'mfu?': float},
          'cost': {str: dict}, 'fitted': dict}


def path(folder: str, name: str) -> str:
  """The file with the row of a run."""
  return os.path.join(folder, f'{name}.json')


def read(folder: str, name: str) -> dict[str, Any] | None:
  """The row of a run in a folder of rows; None if there is none, or no such folder ('').

  It is read from the disk once, as long as the file does not change: whoever gets it must not
  change it.

  Raises:
    UsageError: the file exists, but it is not a row.
  """
  if not folder:
    return None
  file = path(folder, name)
  try:
    found = os.stat(file)
    return _read(file, found.st_ino, found.st_size, found.st_mtime_ns)
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (OSError, ValueError) as error:
    raise UsageError(f'{file} is not the row of a finished run, or is damaged ({error}); restore a '
                     'copy, or delete it to train the run again.') from error


@functools.lru_cache(maxsize=1024)  # a table asks for a row a dozen times
def _read(file: str, *facts: int) -> dict[str, Any]:
  """The row in a file; `facts` change if the file does."""
  del facts
  row = sealed.read(file)
  if wrong := shapes.misfit(row, _SHAPE):
    raise ValueError(wrong)
  return row


def write(folder: str, name: str, row: dict[str, Any]) -> None:
  """Writes the row of a run."""
  sealed.write(path(folder, name), row, indent=None)
