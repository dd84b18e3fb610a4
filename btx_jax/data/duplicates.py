"""Finds held-out text that also occurs in training text, as runs of identical tokens.

A run is at least RUN tokens long, as in Lee et al. 2022, "Deduplicating Training Data Makes
Language Models Better". Every window of RUN tokens t_i, t_i+1, ... within a document gets a
rolling hash. With v(t) a mixed value of a token id and b an odd number,

  hash(i) = sum_{j < RUN} v(t_{i+j}) b^j = (P[i + RUN] - P[i]) b^-i   modulo 2^64,

where P are the prefix sums of v(t_i) b^i; this costs a few operations per token, for any RUN. The
hashes of held-out windows are sorted, and those of training windows are looked up among them, one
chunk at a time. Among 10^9 training and 10^7 held-out windows the probability of any hash collision
is below 0.001; examples are compared token by token.
"""

from collections.abc import Iterator, Mapping
import functools
from typing import NamedTuple

import numpy as np

from btx_jax.data.tokens import Tokens

RUN = 50
_CHUNK = 1 << 21  # windows hashed at a time, using about 150 MB
_TOGETHER = 8  # chunks of held-out text per pass over the training text
_BASE = 0x9E3779B97F4A7C15


class Example(NamedTuple):
  """A run that a held-out document shares with a training document.

  Attributes:
    document: number of the held-out document, counted from 0.
    domain: domain of the training document.
    source: number of the training document in its domain.
    ids: [at least RUN] the shared tokens.
  """
  document: int
  domain: str
  source: int
  ids: np.ndarray


class Overlap(NamedTuple):
  """The part of one domain's held-out text that training text contains too.

  Attributes:
    share: fraction of held-out tokens (without begin and end marks) that lie in shared runs.
    documents: number of held-out documents with such a run.
    example: one of the longest runs, or None if there is none.
  """
  share: float
  documents: int
  example: Example | None


def overlaps(held_out: Mapping[str, Tokens], train: Mapping[str, Tokens]) -> dict[str, Overlap]:
  """The overlap of each domain's held-out text with the training text of all domains.

  Memory: a few bytes per held-out token, plus a fixed amount.
  """
  places = list(_chunks(train))
  origins = _origins(held_out, train, places)
  return {name: _overlap(held_out[name], origins[name], train, places) for name in held_out}


def copies(tokens: Tokens) -> int:
  """The number of documents that repeat an earlier one of this split exactly."""
  return tokens.num_documents - len(np.unique(tokens.document_hashes))


def _chunks(domains: Mapping[str, Tokens]) -> Iterator[tuple[str, int]]:
  for name, tokens in domains.items():
    for low in range(0, len(tokens.ids), _CHUNK):
      yield name, low


def _origins(held_out, train, places) -> dict[str, np.ndarray]:
  """For the window at each held-out token [tokens]: the index in `places` of the first chunk of
  training text that contains the same window, or -1."""
  origins = {name: np.full(len(tokens.ids), -1, np.int32) for name, tokens in held_out.items()}
  chunks = list(_chunks(held_out))
  for first in range(0, len(chunks), _TOGETHER):
    group = chunks[first:first + _TOGETHER]
    wanted = np.unique(np.concatenate([_inside(held_out[name], low) for name, low in group]))
    if not len(wanted):
      continue
    origin = np.full(len(wanted), -1, np.int32)
    for number, (name, low) in enumerate(places):
      hashes = np.sort(_inside(train[name], low))  # sorted lookups are several times faster
      at = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
      at = at[wanted[at] == hashes]
      origin[at[origin[at] < 0]] = number
    for name, low in group:
      hashes, inside = _hashes(held_out[name], low)
      at = np.searchsorted(wanted, hashes[inside])
      origins[name][low:low + len(hashes)][inside] = origin[at]
  return origins


def _inside(tokens: Tokens, low: int) -> np.ndarray:
  hashes, inside = _hashes(tokens, low)
  return hashes[inside]


def _hashes(tokens: Tokens, low: int) -> tuple[np.ndarray, np.ndarray]:
  """Hashes the windows that begin at tokens `low` to `low + _CHUNK`, up to the end of the text.

  Returns:
    Hashes [windows] uint64, which do not depend on a window's position; and whether each window
    lies within the text of one document [windows] bool.
  """
  ids = np.asarray(tokens.ids[low:low + _CHUNK + RUN - 1])
  count = max(len(ids) - RUN + 1, 0)
  powers, inverses = _powers(_CHUNK + RUN)
  values = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
  values ^= values >> np.uint64(32)
  values *= np.uint64(0x94D049BB133111EB)
  sums = _sums(values * powers[:len(ids)])
  starts = tokens.starts[np.searchsorted(tokens.starts, low):
                         np.searchsorted(tokens.starts, low + len(ids), side='right')] - low
  begins = np.zeros(len(ids) + 1, np.int64)
  begins[starts] = 1
  begins = _sums(begins)  # element i counts the documents that begin before token i
  # A window holds no token at which a document begins, except its first if that is text; and none
  # begins after it, if its last would be an end mark then.
  first = 1 - tokens.begins
  inside = begins[RUN + tokens.ends:][:count] == begins[first:first + count]
  return (sums[RUN:] - sums[:count]) * inverses[:count], inside


def _sums(values: np.ndarray) -> np.ndarray:
  """[n + 1] prefix sums: element i is the sum of the first i values."""
  return np.concatenate([np.zeros(1, values.dtype), np.cumsum(values, dtype=values.dtype)])


@functools.cache
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
  """b^i and b^-i modulo 2^64, [count] each; an odd b has an inverse."""
  powers, inverses = (
      np.cumprod(np.array([1] + [base] * (count - 1), np.uint64), dtype=np.uint64)
      for base in (_BASE, pow(_BASE, -1, 2**64)))
  return powers, inverses


def _overlap(tokens: Tokens, origin: np.ndarray, train, places) -> Overlap:
  found = origin >= 0
  edges = np.diff(found.astype(np.int8), prepend=0, append=0)
  begins, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
  # A run extends to the end of its last window, where it may overlap the next run.
  lasts = np.minimum(ends + RUN - 1, np.append(begins[1:], len(origin)))
  documents = np.searchsorted(tokens.starts, begins, side='right') - 1
  text_tokens = len(tokens.ids) - (tokens.begins + tokens.ends) * tokens.num_documents
  example = None
  for run in np.argsort(begins - ends, kind='stable'):  # the longest first
    at = int(begins[run])
    example = _example(tokens, at, int(documents[run]), train, *places[origin[at]])
    if example:
      break
  return Overlap(int((lasts - begins).sum()) / max(text_tokens, 1), len(np.unique(documents)),
                 example)


def _example(tokens: Tokens, at: int, document: int, train, name: str, low: int
             ) -> Example | None:
  """The run that begins at token `at` and occurs in the chunk of training text at `low`; None if
  only the hashes agree."""
  ours = np.asarray(tokens.ids[at:tokens.starts[document + 1] - tokens.ends])
  hash_ = _hashes(tokens, at)[0][0]
  theirs, inside = _hashes(train[name], low)
  for place in low + np.flatnonzero(inside & (theirs == hash_)):
    source = np.searchsorted(train[name].starts, place, side='right') - 1
    end = train[name].starts[source + 1] - train[name].ends
    text = train[name].ids[place:end][:len(ours)]
    differ = np.flatnonzero(text != ours[:len(text)])
    length = differ[0] if len(differ) else len(text)
    if length >= RUN:
      return Example(int(document), name, int(source), ours[:length])
  return None
