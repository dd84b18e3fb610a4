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
  warnings            the same in sentences

and a line on evaluation has `bits_per_byte` by domain, and for domains of pairs `preferred`, the
share of held-out pairs that the model ranks as the data does (scoring/ranking.py).
"""

from collections.abc import Iterator
import json
import os
import time
from typing import Any

from btx_jax import inputs, shapes
from btx_jax.files import replacing

NAME = 'metrics.jsonl'
# What the code that reads lines relies on.
_SHAPE = {'step': int, 'time?': float, 'loss?': float, 'loss_by_domain?': {str: float},
          'lr?': float, 'tokens_per_second?': float, 'mfu?': (None, float),
          'bits_per_byte?': {str: float}, 'preferences?': {str: float}, 'warnings?': [str]}
_TAIL = 1 << 20  # bytes at the end of a file that `tail` reads


class MetricsFile:
  """Appends lines. Resuming at a step drops the lines after it.

  Attributes:
    kept: the lines up to that step, as dicts.
  """

  def __init__(self, folder: str, resume_step: int = 0):
    path = os.path.join(folder, NAME)
    lines = read(folder) if resume_step else []
    self.kept = [line for line in lines if line['step'] <= resume_step]
    with replacing(path) as file:
      file.writelines(json.dumps(line) + '\n' for line in self.kept)
    self._file = open(path, 'a', encoding='utf-8')

  def write(self, step: int, **values) -> dict[str, Any]:
    """Appends a line, and returns it."""
    line = {'step': step, 'time': round(time.time(), 1), **values}
    self._file.write(json.dumps(line) + '\n')
    self._file.flush()
    return line

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._file.close()


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
    with inputs.open_file(os.path.join(folder, NAME)) as file:
      size = file.seek(0, os.SEEK_END)
      cut = last_bytes and size > last_bytes
      file.seek(size - last_bytes if cut else 0)
      if cut:
        file.readline()  # probably not whole
      for line in file:
        try:
          values = json.loads(line)
        except (ValueError, RecursionError):
          continue
        if not shapes.misfit(values, _SHAPE):
          yield values
  except OSError:
    return
