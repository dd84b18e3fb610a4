"""Fits a linear selector to text, once, into the directory of its ensemble; and lets it choose."""

from collections.abc import Sequence
import itertools
import time
from typing import Any

import jax
import numpy as np

from btx_jax.data import mixture
from btx_jax.data.mixture import Batch
from btx_jax.data.text import Text
from btx_jax.data.tokens import Tokens
from btx_jax.fitting import reading, samples, solve
from btx_jax.run import Run, linear_of, reader_model
from btx_jax.selector import Linear, choose
from btx_jax.study import params, routers
from btx_jax.study.study import Study
from btx_jax.terminal import say


def fit(study: Study, run: Run, text: Text, mesh: jax.sharding.Mesh) -> None:
  """Fits the linear selector of a run, unless that has been done.

  Args:
    study: whose run it is.
    run: an ensemble with a linear selector; any other run is left alone.
    text: the tokenized text.
    mesh: the devices to use.
  """
  if not isinstance(run.selector, Linear) or routers.are_set(study, run):
    return
  began, settings, model = time.monotonic(), run.selector, reader_model(run)
  say(f'{run.name}: reading {", ".join(settings.domains)} with {run.reader.name}')
  parameters = params.final(study, run.reader, mesh)
  rows = {domain: samples.rows(run, text, domain) for domain in settings.domains}
  sums = {domain: reading.sums(model, parameters, settings.decay,
                               samples.batches(study, samples.to_fit(of_domain)), mesh)
          for domain, of_domain in rows.items()}
  columns_1DE = solve.columns(settings.kind, sums, settings.labels, settings.ridge)
  columns_1DE = columns_1DE.astype(np.float32)
  figures: dict[str, Any] = {'accuracy': {}, 'switches': {}}
  for domain, of_domain in rows.items():
    kept = samples.kept(of_domain)
    logits_RTE = reading.logits(model, parameters, columns_1DE[0], samples.batches(study, kept),
                                mesh)
    figures['accuracy'][domain], figures['switches'][domain] = _measure(
        logits_RTE.reshape(-1, logits_RTE.shape[-1]), kept, settings, domain)
  figures |= samples.about(run, rows, began)
  routers.write(study, run, columns_1DE, sums, figures)
  for line in in_words(figures):
    say(f'{run.name}: {line}')


def in_words(figures: dict[str, Any]) -> list[str]:
  """What was measured when a selector was fitted, as lines for a person."""
  def by_domain(of: str, form: str) -> str:
    return ', '.join(f'{domain} {value:{form}}' for domain, value in figures[of].items())

  return [f'selector by {figures["kind"]} in {figures["seconds"]:.1f} s, from '
          + ', '.join(f'{rows} rows of {domain}' for domain, rows in figures['rows'].items()),
          'on a fifth of the rows, kept for this, tokens for which an expert of their domain is '
          f'chosen: {by_domain("accuracy", ".1%")}; switches per 1,000 tokens: '
          f'{by_domain("switches", ".1f")}']


def choices(study: Study, run: Run, parameters, tokens: Tokens, mesh) -> np.ndarray:
  """The expert chosen for each token of a split, [tokens]; it depends on earlier tokens only.

  Hidden states are computed in the same windows as the predictions; their mean is over the
  whole document so far. Entries for the first token of a document mean nothing.

  Args:
    study: whose run it is.
    run: an ensemble whose linear selector has been fitted.
    parameters: of its reader.
    tokens: the split.
    mesh: the devices to use.
  """
  columns_1DE = routers.of(study, run)
  assert columns_1DE is not None
  rows, stride = study.config.evaluation.batch_size, study.config.evaluation.stride
  batches = mixture.evaluation_batches(tokens, run.seq_len, rows, stride)
  logits_RTE = reading.logits(reader_model(run), parameters, columns_1DE[0], batches, mesh)
  logits_NE = mixture.by_token(tokens, logits_RTE, run.seq_len, stride)
  chosen = in_documents(logits_NE, tokens.starts, linear_of(run))
  return np.concatenate([[0], chosen])


def in_documents(logits_NE: np.ndarray, starts: Sequence[int] | np.ndarray, settings: Linear
                 ) -> np.ndarray:
  """`choose` for each of several documents that follow one another, [N].

  Args:
    logits_NE: of their positions.
    starts: the first position of each, then the end of the last.
    settings: of the selector.
  """
  return np.concatenate([choose(logits_NE[first:end], settings.decay, settings.hysteresis)
                         for first, end in itertools.pairwise(starts)])


def switches(chosen_N: np.ndarray, starts: Sequence[int] | np.ndarray) -> np.ndarray:
  """Where another expert is chosen than for the position before it in its document, [N] bool."""
  result = np.diff(chosen_N, prepend=chosen_N[:1]) != 0
  result[np.asarray(starts[:-1])] = False
  return result


def _measure(logits_NE: np.ndarray, rows: Sequence[Batch], settings: Linear, domain: str
             ) -> tuple[float, float]:
  """The share of right choices in rows of a domain, and the switches per 1,000 tokens."""
  segments_RT = np.stack([row['segment_ids'] for row in rows])
  begins_RT = np.diff(segments_RT, axis=1, prepend=-1) != 0
  starts = [*np.flatnonzero(begins_RT), segments_RT.size]
  chosen = in_documents(logits_NE[:segments_RT.size], starts, settings)
  right = np.array(settings.labels)[chosen] == domain
  counted = segments_RT.reshape(-1) > 0
  return (float(right[counted].mean()),
          1000 * float(switches(chosen, starts)[counted].mean()))
