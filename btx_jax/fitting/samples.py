"""The training text that routers and selectors follow from: rows to fit, and rows kept apart."""

from collections.abc import Mapping, Sequence
import time
from typing import Any

from btx_jax.data import mixture
from btx_jax.data.mixture import Batch
from btx_jax.data.text import Text
from btx_jax.errors import UsageError
from btx_jax.recipe import RoutersFromText
from btx_jax.run import Run, seed_of
from btx_jax.selector import Linear
from btx_jax.study.study import Study


def check(run: Run, text: Text) -> None:
  """Raises UsageError if there is too little text to set a run's routers or its selector from."""
  what = 'routers' if run.routers else 'a selector'
  for domain in to_read(run):
    found = available(run, text, domain)
    read = min(found, settings(run).rows)
    tokens = len(to_fit(range(read))) * run.seq_len
    if found < 5 or tokens < run.model.dim:
      raise UsageError(
          f'runs.{run.plain_name}: {read} rows of {run.seq_len} tokens of {domain!r}, which has '
          f'{found} to train on, are too few to set {what} of width {run.model.dim} from; it takes '
          '5 rows, and as many tokens as the width in four fifths of them. Raise rows, or give it '
          'more text.')


def to_read(run: Run) -> list[str]:
  """The domains whose sums must be computed; an edit reuses the stored sums of the others."""
  stored = run.edit.stored if run.edit else ()
  return [domain for domain in run.fitted.domains if domain not in stored] if run.fitted else []


def rows(run: Run, text: Text, domain: str) -> list[Batch]:
  """Rows of a domain, the same for every run of a seed: sums of several can be added."""
  order: Any = mixture.training_order(
      text.train, {domain: 1.0}, run.seq_len, seed_of('routers', run.seed))
  return [order[i] for i in range(min(settings(run).rows, available(run, text, domain)))]


def seen(run: Run, text: Text, rows: int = 1000) -> list[str]:
  """The first rows that a run was trained on, as text."""
  order: Any = mixture.order_of(run, text.train)
  chosen = (order[i] for i in range(min(rows, run.steps * run.batch_size)))
  return [text.tokenizer.decode(row['tokens'][row['segment_ids'] > 0].tolist()) for row in chosen]


def to_fit(rows: Sequence) -> list:
  """Four of five rows."""
  return [row for i, row in enumerate(rows) if i % 5]


def kept(rows: Sequence) -> list:
  """The others."""
  return list(rows[::5])


def batches(study: Study, rows: Sequence[Batch]) -> list[Batch]:
  """Batches of one size on any devices; empty rows fill the last."""
  size = study.config.evaluation.batch_size
  return [mixture.filled(rows[first:first + size], size) for first in range(0, len(rows), size)]


def settings(run: Run) -> RoutersFromText | Linear:
  """How a run's routers or its selector are set; ValueError if it has none that are."""
  if run.fitted is None:
    raise ValueError(f'Nothing of {run.name} is set from text.')
  return run.fitted


def about(run: Run, rows: Mapping[str, Sequence[Batch]], began: float) -> dict[str, Any]:
  """How routers or a selector were set, for fit.json; `began` is of time.monotonic."""
  fitted = settings(run)
  return {'kind': fitted.kind, 'ridge': fitted.ridge, 'labels': fitted.labels,
          'rows': {domain: len(of_domain) for domain, of_domain in rows.items()},
          'seconds': time.monotonic() - began}


def available(run: Run, text: Text, domain: str) -> int:
  """The training rows of a domain."""
  return len(mixture.rows_of(text.train[domain], run.seq_len))
