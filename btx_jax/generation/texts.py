"""The text of one row while it grows: how much of it is final, and where it ends."""

import codecs
from collections.abc import Collection, Sequence
import dataclasses

from btx_jax.data.tokenizer import Tokenizer

STOP, LENGTH = 'stop', 'length'


@dataclasses.dataclass(frozen=True)
class Completion:
  """A generated text.

  Attributes:
    text: the text, without the stop string or token that ended it.
    ids: the generated tokens, including the one that ended the text.
    ended: 'stop' if a stop token or stop string ended the text; 'length' if it reached its most
      tokens.
  """
  text: str
  ids: tuple[int, ...]
  ended: str


class Text:
  """The text generated for one prompt."""

  def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], most: int,
               stop_ids: Collection[int], stop: Sequence[str]):
    """
    Args:
      tokenizer: the tokenizer of the ids.
      prompt: the ids of the prompt, at least one.
      most: the most tokens of the text.
      stop_ids: tokens that end the text.
      stop: strings that end the text.
    """
    self._tokenizer, self._before = tokenizer, prompt[-1]
    self.most, self._stop_ids, self._stop = most, stop_ids, stop
    self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
    self._bytes = self._shown = 0
    self.ids: list[int] = []
    self.text, self.ended = '', ''

  def add(self, token: int) -> str:
    """Adds a token; returns the part of the text that has become final."""
    self.ids.append(token)
    if token in self._stop_ids:
      self.ended = STOP
    else:
      self.text += self._decoder.decode(self._new_bytes())
    at = min((at for each in self._stop if (at := self.text.find(each)) >= 0), default=-1)
    if at >= 0:
      self.text, self.ended = self.text[:at], STOP
    elif not self.ended and len(self.ids) >= self.most:
      self.ended = LENGTH
    if self.ended and at < 0:
      self.text += self._decoder.decode(b'', final=True)
    until = len(self.text) if self.ended else self._certain()
    new, self._shown = self.text[self._shown:until], max(until, self._shown)
    return new

  def done(self) -> Completion:
    """The completion, once the text has ended."""
    return Completion(self.text, tuple(self.ids), self.ended)

  def _new_bytes(self) -> bytes:
    # A tokenizer may drop a space after some tokens, so the one before the text is spelled too.
    first = len(self._spelled([self._before]))
    whole = self._spelled([self._before, *self.ids])[first:]
    new, self._bytes = whole[self._bytes:], len(whole)
    return new

  def _spelled(self, ids: Sequence[int]) -> bytes:
    # Many models have more rows than their tokenizer has tokens; these rows stand for no text.
    return self._tokenizer.spell([i for i in ids if i < self._tokenizer.vocab_size])

  def _certain(self) -> int:
    """The length of the final text: all but an ending that may be the start of a stop string."""
    held = (length for each in self._stop for length in range(1, len(each))
            if self.text.endswith(each[:length]))
    return len(self.text) - max(held, default=0)
