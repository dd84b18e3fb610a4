"""Documents whose tokens stand for another text than their own.

A tokenizer may normalise: a letter followed by a combining accent gets the tokens of the accented
letter. Such a document is the same text to a reader, so it is trained on; but it is not held out,
because bits per byte count the bytes of the raw text. If a document comes back as anything else,
text was lost, and it is left out altogether.
"""

import dataclasses
import unicodedata

from btx_jax.errors import UsageError

_CHECK_AFTER = 100  # lost documents: a wrong tokenizer fails here, not after a whole corpus
_SHOWN = 20  # characters


@dataclasses.dataclass
class Changes:
  """Counts of these documents in a domain.

  Attributes:
    normalised: number of documents that are trained on in another Unicode normal form.
    left_out: number of normalised documents that would be held out, and are left out.
    lost: number of documents that came back as another text, and are left out.
    examples: the first difference, in words, of the first document that was normalised, and of
      the first that was lost.
  """
  normalised: int = 0
  left_out: int = 0
  lost: int = 0
  examples: dict[str, str] = dataclasses.field(default_factory=dict)

  def is_normal_form(self, text: str, decoded: str) -> bool:
    """Whether `decoded` is `text` in another normal form. Otherwise counts it as lost."""
    # Compatibility decomposition includes all forms, whichever the tokenizer makes.
    same = unicodedata.normalize('NFKC', decoded) == unicodedata.normalize('NFKC', text)
    kind = 'normalised' if same else 'lost'
    if kind not in self.examples:
      at = next((i for i, (a, b) in enumerate(zip(text, decoded)) if a != b),
                min(len(text), len(decoded)))
      self.examples[kind] = f'{text[at:at + _SHOWN]!r} to {decoded[at:at + _SHOWN]!r}'
    self.lost += not same
    return same

  def check(self, domain: str, max_skipped: float, kept: int, at_end: bool = False):
    """Raises UsageError if the tokenizer loses text in too large a share of the documents so far.

    Args:
      domain: name of the domain.
      max_skipped: the largest share.
      kept: number of documents kept so far.
      at_end: whether these were all documents; before, some are waited for.
    """
    count = self._count(kept)
    if (at_end or self.lost >= _CHECK_AFTER) and self.lost > max_skipped * count:
      raise UsageError(
          f'The tokenizer loses text of domains.{domain}: it changes {self.examples["lost"]}. '
          f'That concerns {self.lost} of the {count} documents read so far, more than the share '
          f'data.max_skipped = {max_skipped:g}. Use a tokenizer that has all bytes (like those of '
          'Llama), or leave tokenizer.path empty to train one.')

  def in_words(self, kept: int) -> list[str]:
    """A line for each kind of change that occurred; `kept` is the number of documents kept."""
    count = self._count(kept)
    changed = self.normalised + self.left_out
    lines = []
    if changed:
      lines.append(
          f'{changed:,} of {count:,} documents ({changed / count:.1%}) are normalised by the '
          f'tokenizer, which changes {self.examples["normalised"]}: {self.normalised:,} are '
          f'trained on in that form, {self.left_out:,} would be held out and are left out')
    if self.lost:
      lines.append(
          f'{self.lost:,} of {count:,} documents ({self.lost / count:.1%}) are left out, because '
          f'the tokenizer loses text there: it changes {self.examples["lost"]}')
    return lines

  def _count(self, kept: int) -> int:
    return kept + self.left_out + self.lost
