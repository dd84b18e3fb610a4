"""Cuts a stream of bytes into pieces at a separator; no piece longer than MAX_BYTES is kept."""

from collections.abc import Iterable, Iterator
import functools
import re
from typing import NamedTuple

from btx_jax.data import records
from btx_jax.data.records import Unusable
from btx_jax.data.streams import Damage


class Piece(NamedTuple):
  """The bytes between two separators.

  Attributes:
    raw: the bytes.
    line: where they begin, counted from 1.
    cut: whether their end is missing, because the file is damaged or cut off.
    last: whether no separator follows.
  """
  raw: bytes
  line: int
  cut: bool = False
  last: bool = False


class Separator:
  """What stands between two pieces. Its line ends match those of any convention: CRLF, CR and LF.

  Attributes:
    text: as it was given; '' if there is a single piece.
    longest: its bytes, at most.
  """

  def __init__(self, text: str, exact: bool = False):
    """`exact`: only these very bytes separate, whatever line ends they hold."""
    self.text = text
    parts = [text] if exact else re.split('(\r\n|\r|\n)', text)  # at odd places: line ends
    raw = [part.encode() for part in parts]
    self.longest = len(b''.join(raw[::2])) + 2 * len(raw[1::2])
    self._exact = b'\n'.join(raw[::2])
    # A carriage return before a line feed is never a line end of its own.
    self._pattern = re.compile(rb'(?:\r\n|\n|\r(?!\n))'.join(map(re.escape, raw[::2])))
    self._has_ends = len(parts) > 1

  def exact(self, returns: bool) -> bytes:
    """The only bytes that match; b'' if several do, or none. `returns`: whether the text may have
    carriage returns."""
    return b'' if returns and self._has_ends else self._exact

  def find(self, buffer: bytearray, start: int, last: bool) -> tuple[int, int]:
    """Where the next separator in a buffer begins and ends, (-1, -1) if there is none.

    Args:
      buffer: is searched from `start`.
      start: an offset.
      last: whether nothing follows the buffer.
    """
    match = self._pattern.search(buffer, start) if self.text else None
    if not match or (match.end() == len(buffer) and buffer.endswith(b'\r') and not last):
      return -1, -1  # a line feed may follow, as part of the same line end
    return match.span()


separator_of = functools.lru_cache(Separator)  # one for all files of a domain


def pieces(path: str, chunks: Iterable[bytes], separator: Separator
           ) -> Iterator[Piece | Unusable]:
  """The pieces between separators, or all bytes as one.

  Args:
    path: for the places of unusable pieces.
    chunks: the bytes, of which the iterator may raise Damage.
    separator: what stands between them.
  """
  rest = bytearray()  # bytes read since the current piece began
  line = 1  # where the current piece begins
  searched = 0  # no separator begins before this offset in `rest`
  passed = 0  # line ends in the dropped bytes of a piece that is too long
  too_long = returns = False
  damage, chunks = None, iter(chunks)
  while True:
    try:
      chunk = next(chunks, b'')
    except Damage as error:
      damage, chunk = error, b''
    rest += chunk
    returns = returns or b'\r' in chunk
    begin, exact = 0, separator.exact(returns)
    while True:
      if exact:
        end = rest.find(exact, max(begin, searched))
        after = end + len(exact)
      else:
        end, after = separator.find(rest, max(begin, searched), last=not chunk)
      if end < 0:
        break
      if too_long or end - begin > records.MAX_BYTES:
        yield records.too_long(f'{path}:{line}')
      else:
        yield Piece(bytes(rest[begin:end]), line)
      line += passed + (count_lines(rest, begin, after) if returns else
                        rest.count(b'\n', begin, after))
      begin, passed, too_long = after, 0, False
    del rest[:begin]
    if not chunk:
      break
    searched = max(0, len(rest) - separator.longest + 1)
    if too_long or searched > records.MAX_BYTES:
      too_long = True
      if not separator.text:
        break  # the piece is the whole file
      searched -= rest[searched - 1:searched] == b'\r'  # a line end is not split
      passed += count_lines(rest, 0, searched)
      del rest[:searched]
      searched = 0
  if too_long or len(rest) > records.MAX_BYTES:
    yield records.too_long(f'{path}:{line}')
  elif rest:
    yield Piece(bytes(rest), line, cut=damage is not None, last=True)
  if damage:
    line += passed + count_lines(rest, 0, len(rest))
    yield Unusable(f'{path}:{line}', damage.reason, damage.detail)


def count_lines(buffer: bytes | bytearray, begin: int, end: int) -> int:
  """The number of line ends, of any convention, between two offsets."""
  return (buffer.count(b'\n', begin, end) + buffer.count(b'\r', begin, end)
          - buffer.count(b'\r\n', begin, end))
