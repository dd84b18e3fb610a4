"""Bits per byte on held-out text, by domain, and which experts serve which domain."""

from collections.abc import Mapping
import functools
import math

import jax
import numpy as np

from btx_jax import sharding, train
from btx_jax.data import mixture
from btx_jax.data.tokens import Tokens
from btx_jax.model.config import Config


@functools.cache
def _eval_step(cfg: Config):
  return jax.jit(train.make_eval_step(cfg))


def evaluate(cfg: Config, params, held_out: Mapping[str, Tokens], mesh, length: int,
             batch_size: int, end_id: int) -> dict[str, dict]:
  """Scores whole held-out documents, in windows of `length`.

  Bits per byte is the information of the documents' own tokens (without their end marks),
  divided by the bytes of their raw text: tokenizers cannot change the unit.

  Args:
    cfg: of the model.
    params: its parameters.
    held_out: documents by domain.
    mesh: where to compute.
    length: T; text beyond it does not see what came before.
    batch_size: rows at a time.
    end_id: the token that ends documents.

  Returns:
    by domain: bits_per_byte, tokens, bytes, and for a mixture gates, the mean gate of each
    expert in each layer, [L][E].
  """
  rows = sharding.local_rows(mesh, batch_size)
  result = {}
  for domain, tokens in held_out.items():
    nll = scored = 0.0
    gates = count = 0.0
    for batch in mixture.evaluation_batches(tokens, length, batch_size):
      batch['loss_mask'] &= batch['targets'] != end_id
      batch = sharding.to_global({k: v[rows] for k, v in batch.items()}, mesh, batch_size)
      batch_nll, batch_tokens, sums = jax.device_get(_eval_step(cfg)(params, batch))
      nll, scored = nll + float(batch_nll), scored + int(batch_tokens)
      if sums is not None:
        gates, count = gates + np.float64(sums.gates), count + np.float64(sums.count)
    size = int(tokens.bytes[-1])
    result[domain] = {'bits_per_byte': nll / math.log(2) / size, 'tokens': int(scored),
                      'bytes': size}
    if cfg.num_experts:
      result[domain]['gates'] = (gates / count[:, None]).tolist()
  return result
