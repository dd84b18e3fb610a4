"""The engine of an ensemble: whole models, which a selection weights for each token.

An expert that is computed for a row must have read the whole text of this row, so an expert that
takes over reads it first. All models are in memory, each with its own cache. A row of a cache is up
to date only while its expert is computed for that row.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from btx_jax.generation import decode
from btx_jax.generation.decode import Cache
from btx_jax.generation.engine import Model, Rows, padded
from btx_jax.generation.selection import Selection


class Ensemble:
  """The engine of several models with one vocabulary."""

  def __init__(self, experts: Sequence[Model], selection: Selection):
    self.experts, self.selection = experts, selection
    self.vocab_size = experts[0].vocab_size

  def start(self, prompts: Sequence[Sequence[int]], slots: int) -> Rows:
    """See engine.Engine."""
    return _EnsembleRows(self, prompts, slots)


class _EnsembleRows:
  """See engine.Rows."""

  def __init__(self, ensemble: Ensemble, prompts: Sequence[Sequence[int]], slots: int):
    self._experts, self._slots = ensemble.experts, slots
    self._scores = ensemble.selection.scores
    self._texts = [list(prompt) for prompt in prompts]
    self._lengths_B = padded(prompts)[1]
    self._selected = ensemble.selection.start(prompts, slots)
    rows, E = len(prompts), len(self._experts)
    self._caches: list[Cache | None] = [None] * E
    self._logits = [jnp.zeros((len(self._lengths_B), ensemble.vocab_size)) for _ in range(E)]
    self._nll_RE = np.zeros((rows, E))
    self._computed_RE = self._selected.computed()
    for e in range(E):
      self._read_texts(e, np.flatnonzero(self._computed_RE[:, e]))
    self._combine(np.ones(rows, bool))

  def add(self, tokens_B: jax.Array, live: Sequence[bool]) -> None:
    if self._scores:
      for e, logits_BV in enumerate(self._logits):
        self._nll_RE[:, e] += np.asarray(_nll(logits_BV, tokens_B))[:len(live)]
    self._selected.add(tokens_B, live)
    for text, token in zip(self._texts, np.asarray(tokens_B).tolist()):
      text.append(token)
    goes_on_R = np.asarray(live)
    before_RE, self._computed_RE = self._computed_RE, (
        self._selected.computed() & goes_on_R[:, None])
    for e, expert in enumerate(self._experts):
      continues_R = self._computed_RE[:, e] & before_RE[:, e]
      if continues_R.any():
        cache = self._caches[e]
        assert cache is not None
        self._logits[e], self._caches[e], _ = decode.step(
            expert.config, expert.weights, tokens_B, self._lengths_B, cache)
    self._lengths_B = self._lengths_B + 1
    for e in range(len(self._experts)):
      self._read_texts(e, np.flatnonzero(self._computed_RE[:, e] & ~before_RE[:, e]))
    self._combine(goes_on_R)

  def _read_texts(self, e: int, rows: np.ndarray):
    """Lets an expert read the whole text of these rows."""
    if not len(rows):
      return
    expert, B = self._experts[e], len(self._lengths_B)
    tokens_bT, lengths_b = padded([self._texts[row] for row in rows])
    if self._scores:
      found, nll_bT = decode.prefill_and_score(
          expert.config, expert.weights, tokens_bT, lengths_b, self._slots)
      self._nll_RE[rows, e] = np.asarray(nll_bT, np.float64).sum(1)[:len(rows)]
    else:
      found = decode.prefill(expert.config, expert.weights, tokens_bT, lengths_b, self._slots)
    if len(rows) == len(self._texts):
      self._logits[e], self._caches[e] = found.logits, found.cache
      return
    rows_b = np.array([*rows, *[B] * (len(lengths_b) - len(rows))], np.int32)  # B: dropped
    kept = self._caches[e] or decode.empty_cache(expert.config, expert.weights, B, self._slots)
    self._caches[e] = decode.insert(kept, found.cache, rows_b)
    self._logits[e] = _replaced(self._logits[e], found.logits, rows_b)

  def _combine(self, goes_on_R: np.ndarray):
    """Sets the logits and shares of the next token."""
    log_weights_RE = self._selected.log_weights(self._nll_RE)
    counts = [e for e in range(len(self._experts)) if self._computed_RE[:, e].any()]
    rows = [*range(len(goes_on_R)), *[0] * (len(self._lengths_B) - len(goes_on_R))]
    log_weights_BE = log_weights_RE[rows]
    self.shares = np.exp(log_weights_BE)
    if not counts:  # all texts have ended
      return
    self.logits = _combined([self._logits[e] for e in counts],
                            log_weights_BE[:, counts].astype(np.float32))


@jax.jit
def _combined(logits: list[jax.Array], log_weights_BE) -> jax.Array:
  """Logits of the weighted mean of probabilities, [B, V]; a single expert keeps its own logits."""
  if len(logits) == 1:
    return logits[0]
  logits_EBV = jnp.stack(logits)
  weights_EB1 = log_weights_BE.T[..., None]
  single_B1 = (weights_EB1 == 0).any(0)
  own_BV = jnp.where(weights_EB1 == 0, logits_EBV, 0.0).sum(0)
  mean_BV = jax.nn.logsumexp(jax.nn.log_softmax(logits_EBV) + weights_EB1, 0)
  return jnp.where(single_B1, own_BV, mean_BV)


@jax.jit
def _nll(logits_BV, tokens_B) -> jax.Array:
  """The negative log likelihood of each token, [B] in nats."""
  return -jnp.take_along_axis(jax.nn.log_softmax(logits_BV), tokens_B[:, None], -1)[:, 0]


@jax.jit
def _replaced(logits_BV, logits_bV, rows_b) -> jax.Array:
  """Logits with some rows replaced; rows beyond the last are dropped."""
  return logits_BV.at[rows_b].set(logits_bV, mode='drop')
