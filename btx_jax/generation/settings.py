"""How the next token is chosen. Nothing here imports jax, so that the command line starts fast."""

import dataclasses

from btx_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is chosen.

  Example:
    >>> Sampling(temperature=0.7, top_p=0.9).top_k
    0

  Attributes:
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: samples from this many likeliest tokens; 0 is all.
    top_p: samples from the fewest likeliest tokens whose probabilities add up to this; 1 is all.
    min_p: samples from tokens at least this many times as likely as the likeliest; 0 is all.
    repetition_penalty: for tokens that are in the prompt or the text so far, divides positive
      logits and multiplies negative ones; 1 is no penalty.
  """
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0

  def __post_init__(self):
    for name, allowed, valid in (
        ('temperature', 'at least 0', self.temperature >= 0),
        ('top_k', 'at least 0', self.top_k >= 0),
        ('top_p', 'above 0 and at most 1', 0 < self.top_p <= 1),
        ('min_p', 'between 0 and 1', 0 <= self.min_p <= 1),
        ('repetition_penalty', 'above 0', self.repetition_penalty > 0)):
      if not valid:
        raise UsageError(f'{name} = {getattr(self, name)} must be {allowed}.')
