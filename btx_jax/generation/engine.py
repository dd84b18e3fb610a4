"""Engines predict tokens: they read prompts, and then one token of each row at a time.

This file has the interface and the engine of one model; ensemble.py has the engine of several. The
loop in generate.py uses only the interface.
"""

from collections.abc import Sequence
import math
from typing import Protocol

import jax
import numpy as np

from btx_jax.devices.mesh import row_ways
from btx_jax.generation import decode
from btx_jax.generation.weights import unstack
from btx_jax.model.config import Config
from btx_jax.model.trees import check_params

_SHORTEST = 16  # the fewest positions that are computed for a prompt


class Rows(Protocol):
  """A batch of texts that are being generated."""

  @property
  def logits(self) -> jax.Array:
    """[B, V] float32, the logits of the next token of each row."""
    ...

  @property
  def shares(self) -> jax.Array | np.ndarray:
    """[B, E], how much each expert counted in these logits; [B, 0] without experts."""
    ...

  def add(self, tokens_B: jax.Array, live: Sequence[bool]) -> None:
    """Reads one more token of each row.

    Args:
      tokens_B: the tokens.
      live: whether the text of each row continues; the logits of other rows, and of those that
        only fill the batch, are undefined.
    """
    ...


class Engine(Protocol):
  """One or several models that predict the next token.

  Attributes:
    vocab_size: V.
  """
  vocab_size: int

  def start(self, prompts: Sequence[Sequence[int]], slots: int) -> Rows:
    """Reads prompts of any lengths, at least one token each.

    Args:
      prompts: token ids; the batch may get more rows, so that its size is rounded.
      slots: the most tokens that a row will have, at least `rounded_length` of the longest prompt.
    """
    ...


class Model:
  """The engine of one model."""

  def __init__(self, config: Config, params):
    """
    Args:
      config: the model's sizes.
      params: its parameters, laid out as in model/llama.py.

    Raises:
      ValueError: the parameters do not fit `config`; the message has both shapes.
    """
    check_params(config, params, 'generate')
    self.config, self.weights = config, unstack(config, params)
    self.vocab_size = config.vocab_size

  def start(self, prompts: Sequence[Sequence[int]], slots: int) -> Rows:
    """See Engine."""
    return _ModelRows(self, prompts, slots)


class _ModelRows:
  """See Rows."""

  def __init__(self, model: Model, prompts: Sequence[Sequence[int]], slots: int):
    self._model = model
    tokens_BT, self._lengths_B = padded(prompts)
    self._show(decode.prefill(model.config, model.weights, tokens_BT, self._lengths_B, slots))

  def add(self, tokens_B: jax.Array, live: Sequence[bool]) -> None:
    del live
    self._show(decode.step(self._model.config, self._model.weights, tokens_B, self._lengths_B,
                           self._cache))
    self._lengths_B = self._lengths_B + 1

  def _show(self, found: decode.Decoded):
    self.logits, self._cache, self.shares = found


def padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
  """Prompts as one array [B, T] with zeros on the right, and their lengths [B].

  B is the least common multiple of a power of two and the number of devices that share the rows;
  the added rows have one token. T is a power of two. So few programs are compiled.
  """
  B = math.lcm(power_of_two(len(prompts)), row_ways(jax.sharding.get_abstract_mesh()))
  tokens_BT = np.zeros((B, rounded_length(max(map(len, prompts)))), np.int32)
  for row, prompt in zip(tokens_BT, prompts):
    row[:len(prompt)] = prompt
  lengths_B = np.array([*map(len, prompts), *[1] * (B - len(prompts))], np.int32)
  return tokens_BT, lengths_B


def rounded_length(length: int) -> int:
  """The number of positions that are computed for a prompt of `length` tokens."""
  return max(_SHORTEST, power_of_two(length))


def power_of_two(size: int) -> int:
  """`size` rounded up to a power of two."""
  return 1 << (size - 1).bit_length()
