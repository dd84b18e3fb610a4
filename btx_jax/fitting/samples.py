"""The training text that routers and selectors are fitted to: rows to fit, and rows kept apart."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from btx_jax.data import mixture
from btx_jax.data.mixture import Batch
from btx_jax.data.text import Text
from btx_jax.errors import UsageError
from btx_jax.run import Run, seed_of
from btx_jax.study.study import Study


def check(run: Run, text: Text) -> None:
  """Raises UsageError if there is too little text to set a run's routers or its selector from."""
  what = 'routers' if run.routers else 'a selector'
  for domain in to_read(run):
    found = available(run, text, domain)
    fitted = run.routers or run.selector
    read = min(found, fitted.rows) if fitted else found
    tokens = len(to_fit(range(read))) * run.seq_len
    if found < 5 or tokens < run.model.dim:
      raise UsageError(
          f'runs.{run.plain_name}: {read} rows of {run.seq_len} tokens of {domain!r}, which has '
          f'{found} to train on, are too few to set {what} of width {run.model.dim} from; it takes '
          '5 rows, and as many tokens as the width in four fifths of them. Raise rows, or give it '
          'more text.')


def to_read(run: Run) -> list[str]:
  """The domains whose sums must be computed; an edit reuses the stored sums of the others."""
  fitted, stored = run.routers or run.selector, run.edit.stored if run.edit else ()
  return [domain for domain in fitted.domains if domain not in stored] if fitted else []


def rows(run: Run, text: Text, domain: str) -> list[Batch]:
  """Rows of a domain, the same for every run of a seed: sums of several can be added."""
  fitted = run.routers or run.selector
  if fitted is None:
    raise ValueError(f'Nothing of {run.name} is set from text.')
  order: Any = mixture.training_order(
      text.train, {domain: 1.0}, run.seq_len, seed_of('routers', run.seed))
  return [order[i] for i in range(min(fitted.rows, available(run, text, domain)))]


def to_fit(rows: Sequence) -> list:
  """Four of five rows."""
  return [row for i, row in enumerate(rows) if i % 5]


def kept(rows: Sequence) -> list:
  """The others."""
  return list(rows[::5])


def batches(study: Study, rows: Sequence[Batch]) -> list[Batch]:
  """Batches of one size on any devices; empty rows fill the last."""
  size = study.config.evaluation.batch_size
  empty = {name: np.zeros_like(values) for name, values in rows[0].items()}
  filled = [*rows, *[empty] * (-len(rows) % size)]
  return [mixture.stack(filled[first:first + size]) for first in range(0, len(filled), size)]


def available(run: Run, text: Text, domain: str) -> int:
  """The training rows of a domain."""
  return len(mixture.Windows(text.train[domain], run.seq_len, 0))
