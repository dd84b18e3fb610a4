"""Text that held-out documents share with training: runs of tokens that both have.

A run is at least RUN tokens long, as in Lee et al. 2022, "Deduplicating Training Data Makes
Language Models Better". Every window of RUN tokens within a document gets a rolling hash: with
v(t) a mixed value of a token id and b odd, of the tokens t_i, t_i+1, ...

  hash(i) = sum_{j < RUN} v(t_{i+j}) b^j = (P[i + RUN] - P[i]) b^-i   modulo 2^64,

where P are prefix sums of v(t_i) b^i; so it costs a few operations a token, for any RUN. The
hashes of held-out windows are sorted, and those of training text looked up among them, a chunk
at a time. Two windows out of 10^9 and 10^7 have the same hash by chance with a probability
below 0.001; examples are compared token by token.
"""

from collections.abc import Iterator, Mapping
import functools
import hashlib
from typing import NamedTuple

import numpy as np

from btx_jax.data.tokens import Tokens

RUN = 50
_CHUNK = 1 << 21  # windows hashed at a time, in about 150 MB
_TOGETHER = 8  # chunks of held-out text for each pass over the training text
_BASE = 0x9E3779B97F4A7C15


class Example(NamedTuple):
  """A run that a held-out document shares with a training document.

  Attributes:
    document: number of the held-out document, from 0.
    domain: of the training document.
    source: number of the training document there.
    ids: [at least RUN] the shared tokens.
  """
  document: int
  domain: str
  source: int
  ids: np.ndarray


class Overlap(NamedTuple):
  """What held-out text shares with training.

  Attributes:
    share: of the held-out tokens (without the marks of documents), those in shared runs.
    documents: held-out documents with such a run.
    example: one of the longest, None if there is none.
  """
  share: float
  documents: int
  example: Example | None


def overlaps(held_out: Mapping[str, Tokens], train: Mapping[str, Tokens]) -> dict[str, Overlap]:
  """What the held-out text of each domain shares with the training text of any.

  Memory: a few bytes for each held-out token, and a fixed amount.
  """
  places = list(_chunks(train))
  origins = _origins(held_out, train, places)
  return {name: _overlap(held_out[name], origins[name], train, places) for name in held_out}


def copies(tokens: Tokens) -> int:
  """How many documents repeat an earlier one of this split exactly."""
  hashes = np.fromiter(
      (int.from_bytes(hashlib.blake2b(tokens.ids[a:b].tobytes(), digest_size=8).digest())
       for a, b in zip(tokens.starts, tokens.starts[1:])), np.uint64, tokens.num_documents)
  return len(hashes) - len(np.unique(hashes))


def _chunks(domains: Mapping[str, Tokens]) -> Iterator[tuple[str, int]]:
  for name, tokens in domains.items():
    for low in range(0, len(tokens.ids), _CHUNK):
      yield name, low


def _origins(held_out, train, places) -> dict[str, np.ndarray]:
  """Of the window at each held-out token [tokens]: the first place in `places`, a chunk of
  training text, that has the same; -1 if none."""
  origins = {name: np.full(len(tokens.ids), -1, np.int32) for name, tokens in held_out.items()}
  chunks = list(_chunks(held_out))
  for first in range(0, len(chunks), _TOGETHER):
    group = chunks[first:first + _TOGETHER]
    wanted = np.unique(np.concatenate([_inside(held_out[name], low) for name, low in group]))
    if not len(wanted):
      continue
    origin = np.full(len(wanted), -1, np.int32)
    for number, (name, low) in enumerate(places):
      hashes = np.sort(_inside(train[name], low))  # lookups in order are several times faster
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
  """Of the windows that begin at tokens `low` to `low + _CHUNK`, as far as there are any.

  Returns:
    Hashes [windows] uint64, the same wherever a window stands; and whether each lies in the
    text of one document [windows].
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
  marks = np.zeros(len(ids) + 1, np.int64)
  marks[starts] = 1  # the begin marks (and one behind the last token, which is cut away)
  marks[starts[starts > 0] - 1] = 1  # the end marks
  marks = _sums(marks[:-1])
  return ((sums[RUN:] - sums[:count]) * inverses[:count], marks[RUN:] == marks[:count])


def _sums(values: np.ndarray) -> np.ndarray:
  """[n + 1] sums of the values before each."""
  return np.concatenate([np.zeros(1, values.dtype), np.cumsum(values, dtype=values.dtype)])


@functools.cache
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
  """b^i and b^-i modulo 2^64, [count] each; an odd b has an inverse."""
  return tuple(
      np.cumprod(np.array([1] + [base] * (count - 1), np.uint64), dtype=np.uint64)
      for base in (_BASE, pow(_BASE, -1, 2**64)))


def _overlap(tokens: Tokens, origin: np.ndarray, train, places) -> Overlap:
  found = origin >= 0
  edges = np.diff(found.astype(np.int8), prepend=0, append=0)
  begins, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
  # A stretch of such windows covers the tokens of the last one too; two may overlap.
  lasts = np.minimum(ends + RUN - 1, np.append(begins[1:], len(origin)))
  documents = np.searchsorted(tokens.starts, begins, side='right') - 1
  text_tokens = len(tokens.ids) - 2 * tokens.num_documents
  example = None
  for stretch in np.argsort(begins - ends, kind='stable'):  # the longest first
    at = begins[stretch]
    example = _example(tokens, at, documents[stretch], train, *places[origin[at]])
    if example:
      break
  return Overlap(int((lasts - begins).sum()) / max(text_tokens, 1), len(np.unique(documents)),
                 example)


def _example(tokens: Tokens, at: int, document: int, train, name: str, low: int
             ) -> Example | None:
  """The run that begins at token `at`, and in the chunk of training text at `low`; None if
  only the hashes are the same."""
  ours = np.asarray(tokens.ids[at:tokens.starts[document + 1] - 1])
  hash_ = _hashes(tokens, at)[0][0]
  theirs, inside = _hashes(train[name], low)
  for place in low + np.flatnonzero(inside & (theirs == hash_)):
    source = np.searchsorted(train[name].starts, place, side='right') - 1
    text = train[name].ids[place:train[name].starts[source + 1] - 1][:len(ours)]
    differ = np.flatnonzero(text != ours[:len(text)])
    length = differ[0] if len(differ) else len(text)
    if length >= RUN:
      return Example(int(document), name, int(source), ours[:length])
  return None
