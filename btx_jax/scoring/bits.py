"""Measures bits per byte on held-out text by domain, and which experts a domain uses and needs."""

from collections.abc import Iterator, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from btx_jax.data import mixture
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.data.tokens import Tokens
from btx_jax.devices import sharding
from btx_jax.fitting import passes
from btx_jax.model.balance import dense_gates
from btx_jax.model.config import Config
from btx_jax.run import dense_model
from btx_jax.scoring import ranking, routing, units
from btx_jax.training.step import forward

_SHOWN = 256  # tokens of each domain whose gates are stored one by one


@functools.cache
def _eval_step(cfg: Config, mesh):
  """Compiles (params, batch [B, T]) -> loss of each target in nats [B, T], routing.

  `routing` is None for a dense model, else (gates summed over tokens [L, E], number of these
  tokens, gates of the first row averaged over layers [T, E], and for each token the number of the
  expert with the largest gate, plus 1 [B, T, L]).
  """
  def score(params, batch):
    scores = forward(cfg, params, batch)
    if scores.routed is None:
      return scores.token_nll, None
    gates_LBTk, ids_LBTk = scores.routed.gates, scores.routed.ids
    first_TE = dense_gates(gates_LBTk[:, 0], ids_LBTk[:, 0], cfg.num_experts).mean(0)
    sums, largest_LBT1 = scores.routed.sums, gates_LBTk.argmax(-1, keepdims=True)
    chosen_BTL = jnp.moveaxis(jnp.take_along_axis(ids_LBTk, largest_LBT1, -1)[..., 0], 0, -1)
    return scores.token_nll, (sums.gates.sum(1), sums.count[0].sum(), first_TE,
                              (chosen_BTL + 1).astype(jnp.uint16))

  return sharding.jit_replicated(score, mesh)


@functools.cache
def _masked_step(cfg: Config, mesh):
  """Compiles (params, batch [B, T], masked [E]) -> loss of each target without those experts."""
  def score(params, batch, masked_E):
    return forward(cfg, params, batch, masked_E=masked_E).token_nll

  return sharding.jit_replicated(score, mesh)


def evaluate(cfg: Config, params, held_out: Mapping[str, Tokens], mesh, length: int,
             batch_size: int, tokenizer: Tokenizer, stride: int = 0) -> dict[str, dict]:
  """Scores whole held-out documents, in windows of `length`.

  Bits per byte is the information of the documents' tokens, without end-of-document tokens,
  divided by the bytes of their raw text, so the unit does not depend on the tokenizer. If
  documents have no begin mark, their first token and its bytes do not count: nothing predicts it.
  For conversations it is the information of the answers, without the tokens that end turns, divided
  by the bytes of the answers.

  Args:
    cfg: the model.
    params: its parameters.
    held_out: domain -> documents.
    mesh: the devices to use.
    length: T, tokens per window; attention does not cross windows.
    batch_size: rows per batch.
    tokenizer: the tokenizer of the tokens.
    stride: tokens from the start of one window to the next; 0 is `length`. If windows overlap, a
      token counts in the first that predicts it, after at least `length` - `stride` tokens of it.

  Returns:
    domain -> what units.score returns; for pairs also `preferred`, see ranking.py; for a mixture
    also `gates`, the mean gate of each expert in each layer, [L][E]; `sample`, the first tokens
    of the text: their `pieces`, and their `gates` averaged over layers, [pieces][E]; and `routing`,
    see routing.count.
  """
  result, firsts = {}, {}
  for domain, tokens in held_out.items():
    nll, chosen, count = [], [], 0.0
    gates, sample = np.zeros(()), None
    for first, batch in _batches(tokens, mesh, length, batch_size, stride):
      nll_BT, routed = jax.device_get(_eval_step(cfg, mesh)(params, batch))
      nll.append(nll_BT)
      if routed is not None:
        gates = gates + np.asarray(routed[0], np.float64)
        count += float(routed[1])
        chosen.append(routed[3])
        sample = sample or {'pieces': tokenizer.pieces(first),
                            'gates': routed[2][:len(first)].round(3).tolist()}
    result[domain] = _score(nll, tokens, tokenizer, length, stride)
    if tokens.pairs:
      result[domain]['preferred'] = ranking.preferred(cfg, params, tokens, mesh, length, batch_size)
    if sample:
      result[domain] |= {'gates': (gates / count).tolist(), 'sample': sample}
      firsts[domain] = mixture.by_token(tokens, np.concatenate(chosen), length, stride)
  if firsts:
    for domain, counts in routing.count(firsts, held_out, tokenizer, cfg.num_experts).items():
      result[domain]['routing'] = counts
  return result


def token_nll(cfg: Config, params, tokens: Tokens, mesh, length: int, batch_size: int,
              stride: int = 0) -> np.ndarray:
  """Negative log likelihood of each token, [tokens] in nats; 0 for each first token of a document.

  It is computed by the program that `evaluate` runs. Arguments as for `evaluate`.
  """
  nll = [jax.device_get(_eval_step(cfg, mesh)(params, batch)[0])
         for _, batch in _batches(tokens, mesh, length, batch_size, stride)]
  return _of_tokens(nll, tokens, length, stride).astype(np.float64)


def without_each_expert(cfg: Config, params, held_out: Mapping[str, Tokens], mesh, length: int,
                        batch_size: int, tokenizer: Tokenizer, stride: int = 0) -> dict[str, dict]:
  """Scores a mixture as `evaluate` does, once without each of its experts.

  A masked expert is never chosen, in any layer, and the others' gates are formed as if it did not
  exist. All masks run the same compiled program.

  Args:
    cfg: a mixture of at least 2 experts whose router has logits.
    params: its parameters.
    held_out: domain -> documents.
    mesh: the devices to use.
    length: T, tokens per window.
    batch_size: rows per batch.
    tokenizer: the tokenizer of the tokens.
    stride: see evaluate.

  Returns:
    domain -> `bits_per_byte`, [E]: entry e is the score without expert e; and `units`: `nll`,
    [E][U], and `bytes`, [U], see units.score.
  """
  step, masks_EE = _masked_step(cfg, mesh), np.eye(cfg.num_experts, dtype=bool)
  result = {}
  for domain, tokens in held_out.items():
    nll: list[list[np.ndarray]] = [[] for _ in masks_EE]
    for _, batch in _batches(tokens, mesh, length, batch_size, stride):
      nll_EBT = jax.device_get([step(params, batch, masked_E) for masked_E in masks_EE])
      for of_expert, nll_BT in zip(nll, nll_EBT):
        of_expert.append(nll_BT)
    result[domain] = _together(
        [_score(of_expert, tokens, tokenizer, length, stride) for of_expert in nll])
  return result


def each_expert_alone(cfg: Config, params, held_out: Mapping[str, Tokens], mesh, length: int,
                      batch_size: int, tokenizer: Tokenizer, stride: int = 0) -> dict[str, dict]:
  """Scores a mixture as `evaluate` does, once with each of its experts for every token.

  In all layers the token goes to this expert alone, with weight 1, and the routers have no effect:
  a dense model of the expert and of the weights that all experts share.

  Args:
    cfg: a mixture; see `evaluate` for the other arguments.

  Returns:
    what `without_each_expert` returns, of the experts alone.
  """
  found: dict[str, list[dict]] = {domain: [] for domain in held_out}
  for number in range(cfg.num_experts):
    alone = passes.expert_of(params, number)
    for domain, tokens in held_out.items():
      nll_N = token_nll(dense_model(cfg), alone, tokens, mesh, length, batch_size, stride)
      found[domain].append(units.score(nll_N, tokens, tokenizer))
  return {domain: _together(scored) for domain, scored in found.items()}


def _together(scored: list[dict]) -> dict[str, Any]:
  """The scores of a split by expert, from that with each expert; see `without_each_expert`."""
  return {'bits_per_byte': [score['bits_per_byte'] for score in scored],
          'units': {'nll': [score['units']['nll'] for score in scored],
                    'bytes': scored[0]['units']['bytes']}}


def _score(nll: list[np.ndarray], tokens: Tokens, tokenizer: Tokenizer, length: int, stride: int
           ) -> dict[str, Any]:
  """The score of a split from the losses of its batches, [B, T] each; see units.score."""
  return units.score(_of_tokens(nll, tokens, length, stride), tokens, tokenizer)


def _of_tokens(nll: list[np.ndarray], tokens: Tokens, length: int, stride: int) -> np.ndarray:
  """The loss of each token of a split, [tokens]; nothing predicts the first."""
  nll_N = mixture.by_token(tokens, np.concatenate(nll), length, stride)
  return np.append(np.float32(0), nll_N)


def _batches(tokens: Tokens, mesh, length: int, batch_size: int, stride: int
             ) -> Iterator[tuple[list[int], dict[str, jax.Array]]]:
  """Yields the first tokens of each batch's first row, and the batch over the mesh."""
  for batch in mixture.evaluation_batches(tokens, length, batch_size, stride):
    first = batch['tokens'][0][batch['segment_ids'][0] > 0][:_SHOWN].tolist()
    yield first, sharding.from_whole(batch, mesh)
