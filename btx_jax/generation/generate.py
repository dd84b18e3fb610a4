"""Continues prompts: batches of a few fixed shapes, decoded until every row has ended."""

from collections.abc import Callable, Iterator, Sequence
import math
import os

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from btx_jax.convert import generation
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.data.tokenizer import load as load_tokenizer
from btx_jax.devices.mesh import row_ways
from btx_jax.errors import UsageError
from btx_jax.generation import decode
from btx_jax.generation.sampling import sample
from btx_jax.generation.settings import Sampling
from btx_jax.generation.texts import Completion, Text
from btx_jax.generation.weights import unstack
from btx_jax.model.config import Config
from btx_jax.model.trees import check_params

# Called with the index of a prompt, the index of the text among the prompt's texts, the new part of
# the text, and the gates of the new token averaged over layers [E].
OnText = Callable[[int, int, str, np.ndarray], None]

GREEDY = Sampling()
_SHORTEST, _FEWEST_SLOTS = 16, 128


def generate(config: Config, params, tokenizer: str | Tokenizer, prompts: Sequence[str],
             max_new_tokens: int = 256, sampling: Sampling = GREEDY, seed: int = 0) -> list[str]:
  """Generates one text per prompt. Generator has more options, and can be used repeatedly.

  Args:
    config: the model's sizes.
    params: its parameters, laid out as in model/llama.py.
    tokenizer: as in Generator.
    prompts: the texts to continue.
    max_new_tokens, sampling, seed: as in Generator.

  Example:
    >>> texts = generate(config, params, folder, ['The', 'A'], max_new_tokens=4)
    >>> len(texts)
    2
  """
  write = Generator(config, params, tokenizer)
  return [texts[0].text for texts in write(prompts, max_new_tokens, sampling, seed=seed)]


class Generator:
  """A model that is ready to generate text. A program is compiled for each rounded-up shape.

  Example:
    >>> write = Generator(config, params, folder)
    >>> len(write(['The'], max_new_tokens=4, sampling=Sampling(temperature=0.7), n=2)[0])
    2
  """

  def __init__(self, config: Config, params, tokenizer: str | Tokenizer,
               stop_ids: Sequence[int] = (), context: int = 0, batch_size: int = 16):
    """
    Args:
      config: the model's sizes.
      params: its parameters, laid out as in model/llama.py.
      tokenizer: a folder or file with the model's tokenizer, or a Tokenizer.
      stop_ids: ids that end a text, besides those of the tokenizer and its folder.
      context: the model's context length, prompt and text together; 0 is no limit.
      batch_size: the number of texts generated at once.
    """
    check_params(config, params, 'generate')
    self._config, self._weights = config, unstack(config, params)
    if isinstance(tokenizer, str):
      path = os.path.expanduser(tokenizer)
      tokenizer, stop_ids = load_tokenizer(path), (*stop_ids, *generation.read(path).stop_ids)
    self._tokenizer, self._context, self._batch_size = tokenizer, context, batch_size
    marks = (tokenizer.framing.begin, tokenizer.framing.end)
    self._begin, end = (mark.id if mark else None for mark in marks)
    self._stop_ids = {*stop_ids, *(i for i in (end, tokenizer.eos_id) if i is not None)}

  def __call__(self, prompts: Sequence[str | Sequence[int]], max_new_tokens: int = 256,
               sampling: Sampling = GREEDY, stop: Sequence[str] = (), seed: int = 0,
               n: int = 1, on_text: OnText | None = None) -> list[list[Completion]]:
    """Generates `n` texts for each prompt.

    A text depends on its prompt, the seed and the indices of prompt and text, but not on the other
    prompts.

    Args:
      prompts: strings, which get the tokenizer's begin mark; or token ids, used unchanged.
      max_new_tokens: the most tokens to generate per text.
      sampling: how each token is chosen.
      stop: strings that end a text, and are left out of it.
      seed: the random seed.
      n: texts per prompt; they differ only if the temperature is above 0.
      on_text: called for each token; see OnText.

    Returns:
      for each prompt, its n texts.

    Raises:
      UsageError: a prompt is empty or leaves no room for a token, or `stop` has an empty string.
    """
    ids = [self._ids(i, prompt) for i, prompt in enumerate(prompts)]
    if '' in stop:
      raise UsageError('stop has an empty string, which would end every text at once; omit it.')
    if max_new_tokens < 1:
      raise UsageError(f'max_new_tokens = {max_new_tokens} must be at least 1.')
    key = jax.random.key(seed)
    rows = [(i, j) for i in range(len(ids)) for j in range(n)]
    rows.sort(key=lambda row: len(ids[row[0]]))  # rows of a batch are padded to the longest
    results = {}
    for first in range(0, len(rows), self._batch_size):
      batch = rows[first:first + self._batch_size]
      texts = [Text(self._tokenizer, ids[i], self._room(ids[i], max_new_tokens), self._stop_ids,
                    stop) for i, _ in batch]
      keys_B = [jax.random.fold_in(jax.random.fold_in(key, i), j) for i, j in batch]
      for number, new, gates_E in self._write([ids[i] for i, _ in batch], texts, keys_B, sampling):
        if on_text:
          on_text(*batch[number], new, gates_E)
      results |= {row: text.done() for row, text in zip(batch, texts)}
    return [[results[i, j] for j in range(n)] for i in range(len(ids))]

  def _write(self, prompts: list, texts: list[Text], keys: list, sampling: Sampling
             ) -> Iterator[tuple[int, str, np.ndarray]]:
    """Decodes until all texts have ended; yields the row, new text and gates of each token."""
    lengths = [len(prompt) for prompt in prompts]
    B, T = self._rows(len(prompts)), _rounded(max(lengths), _SHORTEST)
    slots = _rounded(max(T, *(length + text.most for length, text in zip(lengths, texts))),
                     _FEWEST_SLOTS)
    tokens_BT = np.zeros((B, T), np.int32)
    for row, prompt in zip(tokens_BT, prompts):
      row[:len(prompt)] = prompt
    lengths_B = np.array(lengths + [1] * (B - len(lengths)), np.int32)
    keys_B = jnp.stack(keys + [keys[0]] * (B - len(keys)))
    seen_BV = self._seen(tokens_BT, lengths_B) if sampling.repetition_penalty != 1 else None
    found = decode.prefill(self._config, self._weights, tokens_BT, lengths_B, slots)
    for number in range(max(text.most for text in texts)):
      tokens_B = sample(sampling, found.logits, seen_BV, keys_B, number)
      if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(B), tokens_B].set(True)
      gates_BE = _on_host(found.gates)
      for i, (text, token) in enumerate(zip(texts, _on_host(tokens_B).tolist())):
        if not text.ended:
          yield i, text.add(token), gates_BE[i]
      if all(text.ended for text in texts):
        return
      found = decode.step(self._config, self._weights, tokens_B, lengths_B + number, found.cache)

  def _ids(self, number: int, prompt: str | Sequence[int]) -> list[int]:
    if isinstance(prompt, str):
      begin = [] if self._begin is None else [self._begin]
      ids = begin + self._tokenizer.encode([prompt])[0]
    else:
      ids = list(prompt)
    if not ids:
      raise UsageError(f'Prompt {number} is empty, and the tokenizer puts no token before a text; '
                       'a model needs at least one token to start from.')
    if self._context and len(ids) >= self._context:
      raise UsageError(f'Prompt {number} has {len(ids)} tokens, which leaves no room for a text: '
                       f'the model has {self._context} positions. Shorten the prompt.')
    return ids

  def _room(self, ids: list[int], max_new_tokens: int) -> int:
    return min(max_new_tokens, self._context - len(ids)) if self._context else max_new_tokens

  def _rows(self, count: int) -> int:
    """The rows of a batch: a power of two, and a multiple of the devices that share the rows."""
    return math.lcm(_rounded(count, 1), row_ways(jax.sharding.get_abstract_mesh()))

  def _seen(self, tokens_BT, lengths_B):
    seen_BV = np.zeros((len(tokens_BT), self._config.vocab_size), bool)
    for seen, row, length in zip(seen_BV, tokens_BT, lengths_B):
      seen[row[:length]] = True
    return jnp.asarray(seen_BV)


def _on_host(x: jax.Array) -> np.ndarray:
  """The whole array, of whose rows this process may hold a part."""
  if x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  return multihost_utils.process_allgather(x, tiled=True)


def _rounded(size: int, least: int) -> int:
  """`size` rounded up to a power of two, at least `least`, so that few programs are compiled."""
  return max(least, 1 << (size - 1).bit_length())
