"""Continues prompts: batches of a few fixed shapes, decoded until every row has ended."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import os
from typing import TypeGuard, cast

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from btx_jax.convert import generation
from btx_jax.data import chat_tokens
from btx_jax.data.chat_template import Message
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.data.tokenizer import load as load_tokenizer
from btx_jax.errors import UsageError
from btx_jax.generation.engine import Engine, Model, power_of_two, rounded_length
from btx_jax.generation.sampling import sample
from btx_jax.generation.settings import Sampling
from btx_jax.generation.texts import Completion, Text
from btx_jax.model.config import Config

# Called with the index of a prompt, the index of the text among the prompt's texts, the new part of
# the text, and how much each expert contributed to the new token [E]: in a mixture its gate,
# averaged over layers; in an ensemble its weight.
OnText = Callable[[int, int, str, np.ndarray], None]

# A string, which gets the tokenizer's begin mark; token ids, which are used unchanged; or the
# messages of a conversation, which the tokenizer's chat template renders.
Prompt = str | Sequence[int] | Sequence[Message]

GREEDY = Sampling()
_FEWEST_SLOTS = 128


class TooLong(UsageError):
  """A prompt leaves no room for a text; `length` is its number of tokens."""

  def __init__(self, message: str, length: int):
    super().__init__(message)
    self.length = length


def generate(config: Config, params, tokenizer: str | Tokenizer, prompts: Sequence[Prompt],
             max_new_tokens: int = 256, sampling: Sampling = GREEDY, seed: int = 0) -> list[str]:
  """Generates one text per prompt. Generator has more options, and can be used repeatedly.

  Args:
    config: the model's sizes.
    params: its parameters, laid out as in model/llama.py.
    tokenizer: as in Generator.
    prompts: as in Generator.
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

  Attributes:
    tokenizer: the model's.
    context: the model's context length, for prompt and text together; 0 means no limit.

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
      context: the model's context length, for prompt and text together; 0 means no limit.
      batch_size: the number of texts generated at once.
    """
    self._set(Model(config, params), tokenizer, stop_ids, context, batch_size)

  @classmethod
  def of(cls, engine: Engine, tokenizer: str | Tokenizer, stop_ids: Sequence[int] = (),
         context: int = 0, batch_size: int = 16) -> 'Generator':
    """A Generator of any engine, such as an ensemble (see ensemble.py); arguments as above."""
    result = cls.__new__(cls)
    result._set(engine, tokenizer, stop_ids, context, batch_size)
    return result

  def _set(self, engine: Engine, tokenizer: str | Tokenizer, stop_ids: Sequence[int], context: int,
           batch_size: int):
    self._engine = engine
    if isinstance(tokenizer, str):
      path = os.path.expanduser(tokenizer)
      tokenizer, stop_ids = load_tokenizer(path), (*stop_ids, *generation.read(path).stop_ids)
    self.tokenizer, self.context, self._batch_size = tokenizer, context, batch_size
    marks = (tokenizer.framing.begin, tokenizer.framing.end)
    self._begin, end = (mark.id if mark else None for mark in marks)
    self._stop_ids = {*stop_ids, *(i for i in (end, tokenizer.eos_id) if i is not None)}

  def __call__(self, prompts: Sequence[Prompt], max_new_tokens: int = 256,
               sampling: Sampling = GREEDY, stop: Sequence[str] = (), seed: int = 0,
               n: int = 1, on_text: OnText | None = None) -> list[list[Completion]]:
    """Generates `n` texts for each prompt.

    A text depends on its prompt, the seed and the indices of prompt and text, but not on the other
    prompts.

    Args:
      prompts: see Prompt. The answer to a conversation ends with the token that ends a turn in the
        chat template.
      max_new_tokens: the most tokens to generate per text.
      sampling: how each token is chosen.
      stop: strings that end a text, and are left out of it.
      seed: the random seed.
      n: texts per prompt; they differ only if the temperature is above 0.
      on_text: called for each token; see OnText.

    Returns:
      for each prompt, its n texts.

    Raises:
      UsageError: a prompt is empty, `stop` has an empty string, or the tokenizer cannot write a
        conversation; TooLong if a prompt leaves no room for a token.
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
      texts = [Text(self.tokenizer, ids[i], self._room(ids[i], max_new_tokens),
                    self._ends(prompts[i]), stop) for i, _ in batch]
      keys_B = [jax.random.fold_in(jax.random.fold_in(key, i), j) for i, j in batch]
      for number, new, shares_E in self._write([ids[i] for i, _ in batch], texts, keys_B, sampling):
        if on_text:
          on_text(*batch[number], new, shares_E)
      results |= {row: text.done() for row, text in zip(batch, texts)}
    return [[results[i, j] for j in range(n)] for i in range(len(ids))]

  def _write(self, prompts: list, texts: list[Text], keys: list, sampling: Sampling
             ) -> Iterator[tuple[int, str, np.ndarray]]:
    """Decodes until all texts have ended; yields the row, the new text and the shares [E] of each
    token."""
    lengths, most = [len(prompt) for prompt in prompts], max(text.most for text in texts)
    slots = max(_FEWEST_SLOTS, rounded_length(max(lengths)), power_of_two(
        max(length + text.most for length, text in zip(lengths, texts))))
    rows = self._engine.start(prompts, slots)
    B = len(rows.logits)
    keys_B = jnp.stack(keys + [keys[0]] * (B - len(keys)))
    seen_BV = self._seen(prompts, B) if sampling.repetition_penalty != 1 else None
    for number in range(most):
      tokens_B, shares_BE = sample(sampling, rows.logits, seen_BV, keys_B, number), rows.shares
      if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(B), tokens_B].set(True)
      if number + 1 < most:  # the devices compute while this token is turned into text
        rows.add(tokens_B, [not text.ended for text in texts])
      shares_BE = _on_host(shares_BE)
      for i, (text, token) in enumerate(zip(texts, _on_host(tokens_B).tolist())):
        if not text.ended:
          yield i, text.add(token), shares_BE[i]
      if all(text.ended for text in texts):
        return

  def _ids(self, number: int, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
      begin = [] if self._begin is None else [self._begin]
      ids = begin + self.tokenizer.encode([prompt])[0]
    elif _is_conversation(prompt):
      ids = chat_tokens.prompt_ids(self.tokenizer, prompt)
    else:
      ids = list(cast(Sequence[int], prompt))
    if not ids:
      raise UsageError(f'Prompt {number} is empty, and the tokenizer puts no token before a text; '
                       'a model needs at least one token to start from.')
    if self.context and len(ids) >= self.context:
      raise TooLong(f'Prompt {number} has {len(ids)} tokens, which leaves no room for a text: '
                    f'the model has {self.context} positions. Shorten the prompt.', len(ids))
    return ids

  def _ends(self, prompt: Prompt) -> set[int]:
    """The tokens that end the text for a prompt."""
    end = chat_tokens.stop_id(self.tokenizer) if _is_conversation(prompt) else None
    return self._stop_ids if end is None else {*self._stop_ids, end}

  def _room(self, ids: list[int], max_new_tokens: int) -> int:
    return min(max_new_tokens, self.context - len(ids)) if self.context else max_new_tokens

  def _seen(self, prompts: list, rows: int) -> jax.Array:
    seen_BV = np.zeros((rows, self._engine.vocab_size), bool)
    for seen_V, prompt in zip(seen_BV, prompts):
      seen_V[prompt] = True
    return jnp.asarray(seen_BV)


def _is_conversation(prompt: Prompt) -> TypeGuard[Sequence[Message]]:
  return not isinstance(prompt, str) and any(isinstance(each, Mapping) for each in prompt)


def _on_host(x: jax.Array | np.ndarray) -> np.ndarray:
  """The whole array; this process may hold only some of its rows."""
  if isinstance(x, np.ndarray) or x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  return multihost_utils.process_allgather(x, tiled=True)
