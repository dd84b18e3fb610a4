"""What goes wrong because of what a person asked for, told without a traceback."""

from collections.abc import Iterable
import difflib


class UsageError(Exception):
  """The message names the thing, its value, and the way out."""


def nearest(word: str, valid: Iterable[str]) -> str:
  """A sentence with the valid words, or the nearest of them where one is near."""
  valid = sorted(valid)
  close = difflib.get_close_matches(word, valid, n=1, cutoff=0.6)
  if close:
    return f'did you mean {close[0]!r}?'
  return f'valid: {", ".join(map(repr, valid)) or "(none)"}.'


class RunError(Exception):
  """Something failed underway: a loss that is not finite, a checkpoint that is gone."""
