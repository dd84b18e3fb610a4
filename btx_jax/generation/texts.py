"""The text of one row while it grows: what may be shown already, and where it ends."""

import codecs
from collections.abc import Collection, Sequence
import dataclasses

from btx_jax.data.tokenizer import Tokenizer

STOP, LENGTH = 'stop', 'length'


@dataclasses.dataclass(frozen=True)
class Completion:
  """A generated text.

  Attributes:
    text: without what ended it.
    ids: the tokens that were generated, the one that ended the text included.
    ended: 'stop' if the model ended the text or a stop string came; 'length' if there was no room
      for more.
  """
  text: str
  ids: tuple[int, ...]
  ended: str


class Text:
  """What follows one prompt."""

  def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], most: int,
               stop_ids: Collection[int], stop: Sequence[str]):
    """
    Args:
      tokenizer: of the ids.
      prompt: its ids, at least one.
      most: tokens that it may have.
      stop_ids: tokens that end it.
      stop: strings that end it.
    """
    self._tokenizer, self._before = tokenizer, prompt[-1]
    self.most, self._stop_ids, self._stop = most, stop_ids, stop
    self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
    self._bytes = self._shown = 0
    self.ids: list[int] = []
    self.text, self.ended = '', ''

  def add(self, token: int) -> str:
    """Adds a token; returns the text that is certain now and was not before."""
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
    """The text, when it has ended."""
    return Completion(self.text, tuple(self.ids), self.ended)

  def _new_bytes(self) -> bytes:
    # A tokenizer may drop a space after some tokens, so the one before the text is spelled too.
    first = len(self._tokenizer.spell([self._before]))
    whole = self._tokenizer.spell([self._before, *self.ids])[first:]
    new, self._bytes = whole[self._bytes:], len(whole)
    return new

  def _certain(self) -> int:
    """The length of the text without an end that may be the beginning of a stop string."""
    held = (length for each in self._stop for length in range(1, len(each))
            if self.text.endswith(each[:length]))
    return len(self.text) - max(held, default=0)
