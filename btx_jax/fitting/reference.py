"""Log-probabilities of the pairs that a run learns from, under what it starts from: its reference.

They are computed once, before the training, and kept in the run's directory, so that training has
one model in memory.

    reference/N.npy           [pairs, 2] float32, of domain number N in the training of the run: the
                              chosen and the rejected answers, in nats; NaN for pairs that are
                              longer than a row
    reference/reference.json  the domains and how long it took, see study/stored.py
"""

import functools
import time

import jax
import numpy as np

from btx_jax.data import mixture
from btx_jax.data.pair_rows import PairRows
from btx_jax.data.text import Text
from btx_jax.data.tokens import Tokens
from btx_jax.devices import sharding
from btx_jax.model.config import Config
from btx_jax.run import Run
from btx_jax.study import params
from btx_jax.study.stored import Stored
from btx_jax.study.study import Study
from btx_jax.terminal import say
from btx_jax.training.preferences import segment_sums
from btx_jax.training.step import forward


def compute(study: Study, run: Run, text: Text, mesh: jax.sharding.Mesh) -> None:
  """Computes and stores the reference of a run, unless that has been done.

  Args:
    study: whose run it is.
    run: the run; one whose loss has no reference is left alone.
    text: the tokenized text.
    mesh: the devices to use.
  """
  stored = _stored(study, run)
  if not run.objective.has_reference or stored.exists():
    return
  began, origin = time.monotonic(), origin_of(run)
  say(f'{run.name}: computing the reference on {", ".join(run.weights)}')
  parameters = params.initial(study, origin, mesh)
  arrays, counts = {}, {}
  for number, domain in enumerate(run.weights):
    found = answers(origin.model, parameters, text.train[domain], mesh, run.seq_len,
                    study.config.evaluation.batch_size)
    arrays[f'{number}.npy'], counts[domain] = found, int(np.isfinite(found[:, 0]).sum())
  seconds = time.monotonic() - began
  stored.write(arrays, {'domains': list(run.weights), 'pairs': counts, 'seconds': seconds})
  say(f'{run.name}: reference computed in {seconds:.1f} s, of ' + ', '.join(
      f'{count:,} pairs of {domain}' for domain, count in counts.items()))


def of(study: Study, run: Run) -> dict[str, np.ndarray] | None:
  """The stored log-probabilities by domain, [pairs, 2]; None for a loss without a reference.

  Raises:
    UsageError: a file is damaged.
  """
  stored = _stored(study, run)
  if not run.objective.has_reference:
    return None
  figures = stored.figures()
  if figures is None:
    raise ValueError(f'The reference of {run.name} has not been computed.')
  return {domain: stored.array(f'{number}.npy', figures)
          for number, domain in enumerate(figures['domains'])}


def origin_of(run: Run) -> Run:
  """The run whose start is the reference: the run itself, or if it continues another one with that
  one's state, that one."""
  while run.state and run.sources[0].objective.has_reference:
    run = run.sources[0]
  return run


def answers(cfg: Config, params, tokens: Tokens, mesh, length: int, batch_size: int) -> np.ndarray:
  """Log-probabilities of the answers of each pair, [pairs, 2]; NaN for pairs longer than a row.

  Args:
    cfg: the model.
    params: its parameters.
    tokens: a split of pairs.
    mesh: the devices to use.
    length: T, tokens per row.
    batch_size: rows per batch.
  """
  rows, found = PairRows(tokens, length, 0), []
  for first in range(0, len(rows), batch_size):
    batch = mixture.filled(
        [rows[i] for i in range(first, min(first + batch_size, len(rows)))], batch_size)
    found.append(jax.device_get(_answers(cfg, mesh)(params, sharding.from_whole(batch, mesh))))
  return rows.by_pair(np.concatenate(found or [np.zeros((0, length))]))


@functools.cache
def _answers(model: Config, mesh):
  """Compiles (params, batch [B, T]) -> the log-probability of each segment's answer, [B, T]."""
  def score(params, batch):
    return -segment_sums(forward(model, params, batch).token_nll, batch['segment_ids'])

  return sharding.jit_replicated(score, mesh)


def _stored(study: Study, run: Run) -> Stored:
  return Stored(study, run, 'reference', 'reference.json')
