"""Keeps documents that are held out for one domain out of the training text of all domains.

If all domains hold out the same share, the hash of a document alone decides whether it is held
out. If a domain names files as its held-out text, or if shares differ, another domain may contain a
document that is held out here. Documents are compared by their tokens, marks included, so no raw
text is needed, and token folders that were written earlier can be checked too.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import os
import types
from typing import Any, Protocol

import numpy as np

from btx_jax.errors import UsageError
from btx_jax.files import sealed

# Hash of a document -> the domain that it is held out for.
NOTHING: Mapping[int, str] = types.MappingProxyType({})
_KEY = 'kept_out'  # in meta.json
META = 'meta.json'


class Split(Protocol):
  """The documents of a split, see tokens.Tokens."""

  @property
  def document_hashes(self) -> np.ndarray:
    """[documents] uint64."""
    ...


@dataclasses.dataclass
class Removed:
  """The documents of a domain that were kept out of its training text.

  Attributes:
    documents: the number of documents, by the domain that they are held out for.
    hashes: the hashes of these documents; equal documents share one.
  """
  documents: dict[str, int] = dataclasses.field(default_factory=dict)
  hashes: set[int] = dataclasses.field(default_factory=set)

  @property
  def count(self) -> int:
    return sum(self.documents.values())

  def add(self, document: int, held_out_for: str):
    """Counts the document with the hash `document`."""
    self.hashes.add(document)
    self.documents[held_out_for] = self.documents.get(held_out_for, 0) + 1

  def as_meta(self, unless: Mapping[int, str]) -> dict[str, Any]:
    """The entry for meta.json: the removed documents; `of` is a hash of all held-out documents."""
    hashes = np.sort(np.fromiter(unless, np.uint64, len(unless)))
    return {'of': hashlib.sha256(hashes.tobytes()).hexdigest()[:16] if unless else '',
            'documents': self.documents, 'hashes': [f'{each:x}' for each in sorted(self.hashes)]}

  def in_words(self) -> str:
    """A sentence: how many documents are not trained on, and why."""
    return (f'{self.count:,} document(s) are left out of its training text, because they are held '
            f'out: {_counts(self.documents)}')


def hash_of(document: bytes) -> int:
  """The hash of a document, given its tokens as stored on disk, marks included."""
  return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest())


def check(folder: str, domain: str, meta: dict[str, Any], train: Split,
          unless: Mapping[int, str]) -> dict[str, Any]:
  """Checks that the training text on disk has no document that is held out now.

  The held-out documents may have changed since the text was tokenized.

  Args:
    folder: the folder with the domain's tokens. If the held-out documents have changed, but none of
      them is in the training text, its meta.json is updated, so that the next check is quick.
    domain: the name of the domain.
    meta: the content of its meta.json.
    train: its training text; if that was deleted, it is empty, and nothing is checked.
    unless: hash of a document that must not be trained on -> the domain it is held out for.

  Returns:
    the content of meta.json after the check.

  Raises:
    UsageError: the training text has documents that are held out now, or lacks documents that are
      no longer held out.
  """
  known = meta.get(_KEY, Removed().as_meta(NOTHING))
  now = Removed().as_meta(unless)['of']
  hashes = set() if known['of'] == now else set(train.document_hashes.tolist())
  if known['of'] == now or (meta['train']['documents'] and not hashes):
    return meta
  if found := hashes & unless.keys():
    held_out = [unless[each] for each in found]
    all_of = list(unless.values())
    counts = {name: f'{held_out.count(name):,} of {all_of.count(name):,}'
              for name in dict.fromkeys(sorted(held_out))}
    raise UsageError(
        f'domains.{domain}: its training text, which is tokenized already, has documents that are '
        f'held out: {", ".join(f"{count} of {name}" for name, count in counts.items())}. '
        f'Runs may have been trained on them. Use another --workdir, or delete {folder} and train '
        'the runs on this domain again.')
  if back := [each for each in known['hashes'] if int(each, 16) not in unless]:
    raise UsageError(
        f'domains.{domain}: its training text in {folder} lacks {len(back):,} document(s) that '
        'were held out when it was tokenized and no longer are. Hold them out again, use '
        'another --workdir, or delete that folder if no run needs it.')
  meta = meta | {_KEY: {**known, 'of': now}}
  sealed.write(os.path.join(folder, META), meta)
  return meta


def in_words(meta: Mapping[str, Any]) -> list[str]:
  """A line on the documents left out of a domain's training text; empty if there are none."""
  documents = meta.get(_KEY, {}).get('documents')
  return [Removed(documents).in_words()] if documents else []


def _counts(documents: Mapping[str, int]) -> str:
  return ', '.join(f'{count:,} for {name}' for name, count in sorted(documents.items()))
