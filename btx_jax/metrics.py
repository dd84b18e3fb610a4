"""metrics.jsonl: what a run measures while it goes on, a JSON object a line."""

import json
import os

from btx_jax.files import replacing


class MetricsFile:
  """Appends one JSON object a line. Resuming at a step drops the lines that come after it."""

  def __init__(self, path: str, resume_step: int = 0):
    kept = []
    if os.path.exists(path):
      with open(path, encoding='utf-8') as file:
        for line in file:
          try:
            if json.loads(line)['step'] <= resume_step:
              kept.append(line)
          except (ValueError, KeyError, TypeError):
            pass  # a line that was cut off when the run was stopped
    with replacing(path) as file:
      file.writelines(kept if resume_step else [])
    self._file = open(path, 'a', encoding='utf-8')

  def write(self, step: int, **values):
    self._file.write(json.dumps({'step': step, **values}) + '\n')
    self._file.flush()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._file.close()
