"""Log-likelihoods of continuations, in batches of a few fixed shapes shared by the devices.

Continuations that differ only in their last token, such as the letters of multiple choice, share
one row. Logits are computed only where a continuation is predicted.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from btx_jax.devices import sharding
from btx_jax.devices.mesh import row_ways
from btx_jax.errors import UsageError
from btx_jax.generation.engine import power_of_two
from btx_jax.model import llama
from btx_jax.model.config import Config
from btx_jax.training.loss import TOKENS_PER_CHUNK

_SHORTEST = 32  # tokens of the shortest rows
_FULL_ROWS = 512  # batches of rows longer than this have fewer than `batch_size` rows
# Called with the number of requests that are done, and the number of all requests.
OnProgress = Callable[[int, int], None]


class Likelihood(NamedTuple):
  """How likely a continuation is.

  Attributes:
    total: its log-probability in nats, summed over its tokens.
    greedy: whether each of its tokens is the likeliest one.
  """
  total: float
  greedy: bool


class _Row(NamedTuple):
  """Tokens to read, and the requests that they answer.

  Attributes:
    tokens: context and continuation, without its last token.
    requests: for each, its index, the number of tokens of its continuation, and the last of these.
  """
  tokens: Sequence[int]
  requests: list[tuple[int, int, int]]

  @property
  def shape(self) -> tuple[int, int]:
    """The number of tokens, and of positions whose next token is predicted, both rounded up."""
    longest = max(count for _, count, _ in self.requests)
    return _rounded(len(self.tokens)), power_of_two(longest)


def score(config: Config, params, pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
          context: int, batch_size: int = 32, on_progress: OnProgress | None = None
          ) -> list[Likelihood]:
  """Scores each continuation after its context.

  Under a mesh (`jax.set_mesh`) its devices share the rows. With several processes, all of them must
  call this with the same pairs.

  Args:
    config: the model's sizes.
    params: its parameters, laid out as in model/llama.py.
    pairs: the tokens of each context and of its continuation, at least one each.
    context: the most tokens that the model reads; longer contexts lose their beginning.
    batch_size: rows per batch; fewer if rows are long.
    on_progress: called after each batch.

  Raises:
    UsageError: a continuation is longer than the model's context.
  """
  rows: dict[tuple[int, ...], _Row] = {}
  for index, (before, after) in enumerate(pairs):
    if len(after) > context:
      raise UsageError(f'A continuation has {len(after)} tokens, and the model reads at most '
                       f'{context}; leave out the task.')
    read = tuple([*before, *after][-context - 1:-1])
    rows.setdefault(read, _Row(read, [])).requests.append((index, len(after), after[-1]))
  result: list[Likelihood] = [Likelihood(0.0, True)] * len(pairs)
  done, mesh = 0, jax.sharding.get_mesh()
  for batch in _batches(list(rows.values()), batch_size, row_ways(mesh)):
    for row, answers in zip(batch, _answers(config, params, batch, batch_size, mesh)):
      for (index, *_), answer in zip(row.requests, answers):
        result[index] = answer
      done += len(row.requests)
    if on_progress:
      on_progress(done, len(pairs))
  return result


def _batches(rows: list[_Row], batch_size: int, ways: int) -> Iterator[list[_Row]]:
  """Rows of about the same shape, the longest first."""
  rows = sorted(rows, key=lambda row: row.shape, reverse=True)
  while rows:
    length, _ = rows[0].shape
    alike = sum(row.shape[0] == length for row in rows)
    size = min(alike, _most_rows(length, batch_size, ways))
    yield rows[:size]
    rows = rows[size:]


def _most_rows(length: int, batch_size: int, ways: int) -> int:
  most = batch_size * _FULL_ROWS // max(length, _FULL_ROWS)
  return max(most // ways, 1) * ways


def _answers(config: Config, params, rows: Sequence[_Row], batch_size: int, mesh
             ) -> Iterator[list[Likelihood]]:
  """For each row, the answers to its requests."""
  T, C = (max(sizes) for sizes in zip(*(row.shape for row in rows)))
  K = power_of_two(max(len(row.requests) for row in rows))
  ways = row_ways(mesh)
  B = min(_most_rows(T, batch_size, ways), ways * power_of_two(-(-len(rows) // ways)))
  batch = {'tokens': np.zeros((B, T), np.int32), 'length': np.ones(B, np.int32),
           'last': np.zeros((B, K), np.int32)}
  for i, row in enumerate(rows):
    batch['tokens'][i, :len(row.tokens)] = row.tokens
    batch['length'][i] = len(row.tokens)
    batch['last'][i, :len(row.requests)] = [last for *_, last in row.requests]
  if not mesh.empty:
    batch = sharding.from_whole(batch, mesh)
  nll_BC, last_BK, likeliest_BC = jax.device_get(_program(config, C, mesh)(params, batch))
  for i, row in enumerate(rows):
    n = len(row.tokens)
    answers = []
    for k, (_, count, last) in enumerate(row.requests):
      expected = [*row.tokens[n - count + 1:], last]
      total = last_BK[i, k] - nll_BC[i, C - count:C - 1].sum(dtype=np.float64)
      answers.append(Likelihood(
          float(total), likeliest_BC[i, C - count:].tolist() == expected))
    yield answers


@functools.cache
def _program(cfg: Config, count: int, mesh):
  """Compiles (params, batch) -> predictions at the last `count` = C positions of each row.

  The batch has `tokens` [B, T], padded on the right; `length` [B], without padding; and `last`
  [B, K], tokens that may follow. The result is, in float32 and whole on every device:
    nll_BC: the loss of the next token in the row; meaningless at the last position.
    last_BK: the log-probabilities of the tokens `last`.
    likeliest_BC: the likeliest next tokens.
  """
  def predict(params, batch):
    tokens_BT, length_B = batch['tokens'], batch['length']
    B, T = tokens_BT.shape
    at_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    inside_BT = (at_BT < length_B[:, None]).astype(jnp.int32)
    hidden_BTD, _ = llama.Llama(cfg).apply({'params': params}, tokens_BT, inside_BT, at_BT)
    at_BC = jnp.maximum(length_B[:, None] - count + jnp.arange(count)[None], 0)
    next_BC = jnp.take_along_axis(tokens_BT, jnp.minimum(at_BC + 1, T - 1), 1)
    hidden_BCD = jnp.take_along_axis(hidden_BTD, at_BC[..., None], 1)
    steps = -(-count // max(1, TOKENS_PER_CHUNK // B))

    def chunk(inputs):
      hidden_BcD, next_Bc = inputs
      # log_softmax subtracts the maximum first; otherwise rounding would hide small losses.
      log_probs_BcV = jax.nn.log_softmax(llama.logits(params, hidden_BcD))
      next_Bc1 = next_Bc[..., None]
      return -jnp.take_along_axis(log_probs_BcV, next_Bc1, -1)[..., 0], log_probs_BcV.argmax(-1)

    nll_BC, likeliest_BC = _in_chunks(chunk, (hidden_BCD, next_BC), power_of_two(steps))
    last_BV = jax.nn.log_softmax(llama.logits(params, hidden_BCD[:, -1]))
    return nll_BC, jnp.take_along_axis(last_BV, batch['last'], 1), likeliest_BC

  return jax.jit(predict) if mesh.empty else sharding.jit_replicated(predict, mesh)


def _in_chunks(function, inputs, steps: int):
  """`function` of arrays [B, C, ...], applied to parts of the second axis one after the other."""
  steps = min(steps, inputs[0].shape[1])
  parts = jax.tree.map(
      lambda x: jnp.moveaxis(x.reshape(len(x), steps, -1, *x.shape[2:]), 1, 0), inputs)
  found = jax.lax.map(function, parts)
  return jax.tree.map(
      lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), found)


def _rounded(size: int) -> int:
  """`size` rounded up to 2**n or 3 * 2**(n - 1): few shapes, and at most a third is padding."""
  power = power_of_two(max(size, _SHORTEST))
  return power * 3 // 4 if size <= power * 3 // 4 and power > _SHORTEST else power
