"""Whether a model ranks held-out pairs of answers as the data does."""

import numpy as np

from btx_jax.data.chat_tokens import READ, REJECTED
from btx_jax.data.tokens import Tokens
from btx_jax.fitting import reference
from btx_jax.model.config import Config


def preferred(cfg: Config, params, tokens: Tokens, mesh, length: int, batch_size: int
              ) -> float | None:
  """The share of pairs whose chosen answer has the higher mean log-probability per token.

  It needs no reference, so it compares all models, however they were trained. Pairs that are longer
  than a row do not count; None if there are no others. Arguments as for reference.answers.
  """
  logp = reference.answers(cfg, params, tokens, mesh, length, batch_size)
  kept = np.isfinite(logp[:, 0])
  if not kept.any():
    return None
  higher = np.subtract(*(logp / _lengths(tokens))[kept].T) > 0
  return float(higher.mean())


def _lengths(tokens: Tokens) -> np.ndarray:
  """The number of tokens of the chosen and of the rejected answer, [pairs, 2]."""
  starts = np.stack([np.asarray(tokens.starts[:-1]), tokens.cuts], 1)
  written = np.asarray(tokens.roles) % REJECTED != READ
  return np.add.reduceat(written, starts.ravel(), dtype=np.int64).reshape(-1, 2)
