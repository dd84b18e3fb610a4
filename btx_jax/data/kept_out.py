"""Keeps documents that are held out for one domain out of the training text of all domains.

The hash of a document decides alone on which side it is where all domains hold out the same share.
Files that a domain names as its held-out text, and shares that differ, put documents aside that
another domain may have too. A document is compared by its tokens with marks, so it is recognised
without the raw text, also in a folder of tokens that was written before.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import os
import types
from typing import Any, Protocol

import numpy as np

from btx_jax import files
from btx_jax.errors import UsageError

# Hash of a document -> the domain that it is held out for.
NOTHING: Mapping[int, str] = types.MappingProxyType({})
_KEY = 'kept_out'  # of meta.json
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
    documents: their number by the domain that they are held out for.
    hashes: of them; equal documents have one.
  """
  documents: dict[str, int] = dataclasses.field(default_factory=dict)
  hashes: set[int] = dataclasses.field(default_factory=set)

  @property
  def count(self) -> int:
    return sum(self.documents.values())

  def add(self, document: int, held_out_for: str):
    """Counts a document, given its hash and the domain that it is held out for."""
    self.hashes.add(document)
    self.documents[held_out_for] = self.documents.get(held_out_for, 0) + 1

  def as_meta(self, unless: Mapping[int, str]) -> dict[str, Any]:
    """For meta.json: what was removed, and `of`, which identifies all that is held out."""
    hashes = np.sort(np.fromiter(unless, np.uint64, len(unless)))
    return {'of': hashlib.sha256(hashes.tobytes()).hexdigest()[:16] if unless else '',
            'documents': self.documents, 'hashes': [f'{each:x}' for each in sorted(self.hashes)]}

  def in_words(self) -> str:
    """How many documents are not trained on, and why."""
    return (f'{self.count:,} document(s) are left out of its training text, because they are held '
            f'out: {_counts(self.documents)}')


def hash_of(document: bytes) -> int:
  """The hash of a document, given its tokens as they are on disk, with marks."""
  return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest())


def check(folder: str, domain: str, meta: dict[str, Any], train: Split,
          unless: Mapping[int, str]) -> dict[str, Any]:
  """Checks that tokens on disk lack what is held out now, which need not be what was held out then.

  Args:
    folder: of the domain's tokens. If other documents are held out now, but none of them is here,
      its meta.json is replaced, so that this is known the next time.
    domain: its name.
    meta: its meta.json.
    train: its training text; empty if that was deleted, and then nothing is checked.
    unless: hash of a document that must not be trained on -> the domain it is held out for.

  Returns:
    the meta.json, as it is now.

  Raises:
    UsageError: documents that are held out now are in the training text, or documents were left out
      of it that are not held out any more.
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
        f'domains.{domain}: documents that are held out are in its training text, which was '
        f'tokenized before: {", ".join(f"{count} of {name}" for name, count in counts.items())}. '
        f'Runs may have been trained on them. Use another --workdir, or delete {folder} and train '
        'the runs on this domain again.')
  if back := [each for each in known['hashes'] if int(each, 16) not in unless]:
    raise UsageError(
        f'domains.{domain}: its training text in {folder} lacks {len(back):,} document(s) that '
        'were held out when it was tokenized, and are not any more. Hold them out again, use '
        'another --workdir, or delete that folder if no run needs it.')
  meta = meta | {_KEY: {**known, 'of': now}}
  with files.replacing(os.path.join(folder, META)) as file:
    json.dump(meta, file, indent=1)
  return meta


def in_words(meta: Mapping[str, Any]) -> list[str]:
  """A line for the documents that are left out of a domain's training text; none without any."""
  documents = meta.get(_KEY, {}).get('documents')
  return [Removed(documents).in_words()] if documents else []


def _counts(documents: Mapping[str, int]) -> str:
  return ', '.join(f'{count:,} for {name}' for name, count in sorted(documents.items()))
