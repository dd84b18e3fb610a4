"""Divides the documents of a domain into training and held-out text, and writes both.

The hash of its text alone decides whether a document is held out, so exact copies never end up on
both sides, and adding documents moves no other document. (One exception: if no document of a small
domain has a hash below the threshold, the one with the smallest hash is held out.) If a domain
names files as its held-out text, these are held out instead, and kept_out.py keeps copies of their
documents out of training.

Each document is compared with the text that its tokens stand for; see changes.py.
"""

from collections.abc import Mapping, Sequence
import contextlib
import hashlib
from typing import NamedTuple

from btx_jax.data import corpora, encoding, kept_out, token_files
from btx_jax.data.changes import Changes
from btx_jax.data.domains import TEXT, Domain
from btx_jax.data.token_files import Encoded
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.errors import UsageError

SPLITS = ('train', 'held_out')
# A share above any hash: every document in files named as held-out text is held out.
ALL = 2.0


def share(text: str) -> float:
  """The hash of a document as a number from 0 to 1; it is held out if that is below `held_out`."""
  return _share(text.encode('utf-8'))


def _share(raw: bytes) -> float:
  return int.from_bytes(hashlib.sha256(raw).digest()[:8], 'big') / 2**64


class Written(NamedTuple):
  """A summary of the two splits that were written.

  Attributes:
    sizes: the bytes of raw text of each split.
    smallest: the smallest hash if no document was held out although one must be, else None.
    changes: the documents that the tokenizer changed.
    removed: the documents that were kept out of training.
    answers: for each split of conversations, its number of `answers` and of `written` tokens; {}
      for text.
  """
  sizes: dict[str, int]
  smallest: float | None
  changes: Changes
  removed: kept_out.Removed
  answers: dict[str, dict[str, int]]


def write(folder: str, parts: Sequence[tuple[Domain, float]], tokenizer: Tokenizer,
          max_skipped: float, tallies: Sequence[corpora.Tally], unless: Mapping[int, str],
          processes: int = 0) -> Written:
  """Writes both splits.

  Args:
    folder: the folder to write.
    parts: the domains to read, each with the share of its documents to hold out.
    tokenizer: encodes the text.
    max_skipped: see prepare.
    tallies: one for each part, which counts its records.
    unless: see prepare.
    processes: see encoding.encoded.
  """
  smallest, changes, removed = None, Changes(), kept_out.Removed()
  name, has_ids = parts[0][0].name, bool(parts[0][0].id_field)
  with contextlib.ExitStack() as stack:
    splits = {split: stack.enter_context(
        token_files.Writer(folder, split, tokenizer, has_ids, parts[0][0].format != TEXT))
              for split in SPLITS}
    kept = lambda: sum(writer.documents for writer in splits.values())

    def train(found: Encoded):
      copy = splits['train'].add(found, unless)
      if copy is not None:
        removed.add(copy, unless[copy])

    for (part, threshold), tally in zip(parts, tallies):
      for found in stack.enter_context(contextlib.closing(
          encoding.encoded(part, tokenizer, max_skipped, tally, processes))):
        text = found.document.text
        raw = text.encode('utf-8')
        if found.spelled != raw:
          decoded = found.spelled.decode('utf-8', errors='replace')
          if not changes.is_normal_form(text, decoded):
            changes.check(name, max_skipped, kept())
          elif _share(found.spelled) < threshold:  # on the side of a document of this form
            changes.left_out += 1
          else:
            changes.normalised += 1
            train(found)
          continue
        place = _share(raw)
        smallest = place if smallest is None else min(smallest, place)
        if place < threshold:
          splits['held_out'].add(found)
        else:
          train(found)
  changes.check(name, max_skipped, kept(), at_end=True)
  train_count, held_out_count = (splits[split].documents for split in SPLITS)
  read, by_share = train_count + removed.count, parts[-1][1] != ALL
  if (read > 1 and smallest is None) if by_share else not held_out_count:
    raise UsageError(
        f'The tokenizer changes every document of domains.{name}, for example '
        f'{next(iter(changes.examples.values()))}, so none can be held out: bits per byte count '
        'the bytes of the raw text. Normalise the files first.')
  if removed.count and not train_count:
    raise UsageError(
        f'domains.{name} has nothing to train on: {removed.in_words()}. Name other files in '
        f'domains.{name}.paths, or in held_out there.')
  if by_share and (read + held_out_count == 1 or not train_count):
    raise UsageError(
        f'domains.{name} has {read + held_out_count} document(s), and held-out text shares no '
        f'document with training: there must be at least two. Set domains.{name}.separator (for '
        'example a blank line) to split text files into documents, lower data.held_out, or name '
        f'the files of its held-out text in domains.{name}.held_out.')
  sizes = {split: writer.raw_bytes for split, writer in splits.items()}
  answers = {split: writer.of_chats for split, writer in splits.items()}
  return Written(sizes, smallest if by_share and not held_out_count else None, changes, removed,
                 answers)
