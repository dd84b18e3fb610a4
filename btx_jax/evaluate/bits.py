"""Bits per byte on held-out text, by domain, and which experts serve which domain."""

from collections.abc import Mapping
import functools
import math

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from btx_jax.data import mixture
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.data.tokens import Tokens
from btx_jax.devices import sharding
from btx_jax.model import balance as routing
from btx_jax.model.config import Config
from btx_jax.training import step as train

_SHOWN = 256  # tokens of each domain whose experts are told one by one


@functools.cache
def _eval_step(cfg: Config, mesh):
  """(params, batch [B, T]) -> summed loss in nats, its tokens, and for a mixture the gates
  summed over tokens [L, E], their number, and the first row's gates [T, E], mean over layers."""
  def step(params, batch):
    scores = train.forward(cfg, params, batch)
    if not cfg.num_experts:
      return scores.nll, scores.tokens, None
    gates_LBTk, ids_LBTk = scores.routed.gates, scores.routed.ids
    first_TE = routing.dense_gates(gates_LBTk[:, 0], ids_LBTk[:, 0], cfg.num_experts).mean(0)
    sums = scores.routed.sums
    return scores.nll, scores.tokens, (sums.gates.sum(1), sums.count[0].sum(), first_TE)

  # Whole on every device: with several processes each must be able to read them.
  return jax.jit(step, out_shardings=NamedSharding(mesh, P()))


def evaluate(cfg: Config, params, held_out: Mapping[str, Tokens], mesh, length: int,
             batch_size: int, tokenizer: Tokenizer) -> dict[str, dict]:
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
    tokenizer: of the tokens.

  Returns:
    by domain: bits_per_byte, tokens, bytes, and for a mixture gates, the mean gate of each
    expert in each layer, [L][E], and sample, the beginning of the text: pieces, and gates of
    each, mean over layers, [pieces][E].
  """
  rows = sharding.local_rows(mesh, batch_size)
  result = {}
  for domain, tokens in held_out.items():
    nll = scored = gates = count = 0.0
    sample = None
    for batch in mixture.evaluation_batches(tokens, length, batch_size):
      batch['loss_mask'] &= batch['targets'] != tokenizer.eos_id
      first = batch['tokens'][0][batch['segment_ids'][0] > 0][:_SHOWN]
      batch = sharding.to_global({k: v[rows] for k, v in batch.items()}, mesh, batch_size)
      batch_nll, batch_tokens, routed = jax.device_get(_eval_step(cfg, mesh)(params, batch))
      nll, scored = nll + float(batch_nll), scored + int(batch_tokens)
      if routed is not None:
        gates, count = gates + np.float64(routed[0]), count + float(routed[1])
        sample = sample or {'pieces': tokenizer.pieces(first),
                            'gates': routed[2][:len(first)].round(3).tolist()}
    size = int(tokens.bytes[-1])
    result[domain] = {'bits_per_byte': nll / math.log(2) / size, 'tokens': int(scored),
                      'bytes': size}
    if sample:
      result[domain] |= {'gates': (gates / count).tolist(), 'sample': sample}
  return result
