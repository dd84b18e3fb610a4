"""Computes and stores DPO's reference: log-probabilities under the model that a run starts from.

They are computed once, before the training, and kept in the run's directory, so that training needs
only one model in memory.

    reference/N.npy           [pairs, 2] float32, for the run's domain number N: log-probabilities
                              of the chosen and the rejected answer in nats; NaN for pairs that are
                              longer than a row
    reference/reference.json  the domains, and the time it took; see study/stored.py
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
  """Computes and stores the reference of a run, unless it is stored already.

  Args:
    study: the study of the run.
    run: the run. If its loss has no reference, nothing is done.
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
  pairs = ', '.join(f'{count:,} pairs of {domain}' for domain, count in counts.items())
  say(f'{run.name}: computed the reference of {pairs} in {seconds:.1f} s')


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
  """The run whose initial model is the reference: this run, or the run whose state it continues."""
  while run.state and run.sources[0].objective.has_reference:
    run = run.sources[0]
  return run


def answers(cfg: Config, params, tokens: Tokens, mesh, length: int, batch_size: int) -> np.ndarray:
  """Log-probabilities of both answers of each pair, [pairs, 2]; NaN for pairs longer than a row.

  Args:
    cfg: the model.
    params: its parameters.
    tokens: a split of pairs.
    mesh: the devices to use.
    length: T, tokens per row.
    batch_size: rows per batch.
  """
  rows = PairRows(tokens, length, 0)
  found = [jax.device_get(_answers(cfg, mesh)(params, sharding.from_whole(batch, mesh)))
           for batch in mixture.in_batches(rows, batch_size)]
  return rows.by_pair(np.concatenate(found or [np.zeros((0, length))]))


@functools.cache
def _answers(model: Config, mesh):
  """Compiles (params, batch [B, T]) -> the log-probability of each segment's answer, [B, T]."""
  def score(params, batch):
    return -segment_sums(forward(model, params, batch).token_nll, batch['segment_ids'])

  return sharding.jit_replicated(score, mesh)


def _stored(study: Study, run: Run) -> Stored:
  return Stored(study, run, 'reference', 'reference.json')
