"""Text files of JSON: an object a line, an array of objects, or objects that span several lines.

`layout_of` decides from the first bytes which of these a file is, if any. Arrays and objects over
several lines are cut into records without parsing them, so that memory stays bounded and a broken
record spoils no other.
"""

from collections.abc import Iterable, Iterator
import json
import re

from btx_jax.data import records
from btx_jax.data.pieces import Piece, pieces, separator_of
from btx_jax.data.records import NO_RECORDS, NO_TEXT, NOT_JSON, Document, Fields, Unusable
from btx_jax.data.streams import Damage, Stream

LINES, ARRAY, OBJECTS = 'JSON lines', 'JSON array', 'JSON objects'
_PEEK = 1 << 18  # bytes that decide
_LINES = 20  # of them, at most


def layout_of(stream: Stream, named_json: bool) -> str:
  """LINES, ARRAY or OBJECTS; '' if the file is not JSON but text.

  Args:
    stream: the file.
    named_json: its name says that it is JSON. Then it is, even if nothing in it can be parsed.
  """
  beginning, _ = stream.peek(64)
  if beginning.strip()[:1] not in (b'', b'{', b'['):
    return LINES if named_json else ''
  beginning, whole = stream.peek(_PEEK)
  text = beginning.decode('utf-8', errors='replace').lstrip()
  if text[:1] not in ('{', '['):
    return LINES if named_json else ''
  lines = re.split('[\r\n]+', text, maxsplit=_LINES)[:_LINES]
  lines = [line for line in lines if line.strip()]
  several = len(lines) > 1
  if several and not whole and text.count('\n') + text.count('\r') < _LINES:
    lines.pop()  # it may go on
  good = sum(map(_is_object, lines))
  first, after, cut = _first_value(text, int(text[0] == '['))
  if text[0] == '[':
    if after:
      _, end, beyond = _first_value(text, 0)  # of the whole array
      if isinstance(first, dict):
        array = named_json or beyond or (end and _all_json(text, end, whole))
      else:
        array = named_json and not (several and _is_complete(lines[0]))
    else:  # the first element is long or broken
      inside = sum(_is_object(line.strip().lstrip('[').rstrip('],')) for line in lines)
      array = inside > good or (re.match(r'\[\s*\{\s*"', text)
                                and (cut or (named_json and not good)))
    if array:
      return ARRAY
  elif several and not _is_object(lines[0]):
    if after:  # an object that ends on a later line
      alone = _all_json(text, after, whole)
      objects = re.search('[\r\n]', text[:after]) and (alone or named_json)
    else:
      objects = cut and (named_json or not whole) and re.match(r'\{\s*"', text)
    if objects:
      return OBJECTS
  if named_json or 2 * good > len(lines):
    return LINES
  # A single line, which goes on beyond what is known.
  return LINES if not (several or whole) and cut and re.match(r'\{\s*"', text) else ''


def _first_value(text: str, start: int) -> tuple[object, int, bool]:
  """The JSON value at an offset, the offset after it (0 if there is none), and whether the text
  ends within it."""
  start += len(text[start:]) - len(text[start:].lstrip())
  try:
    return *json.JSONDecoder().raw_decode(text, start), False
  except json.JSONDecodeError as error:
    cut = error.msg.startswith('Unterminated string') or error.pos >= len(text.rstrip()) - 8
    return None, 0, cut
  except (ValueError, RecursionError):  # a number of too many digits, or too many brackets
    return None, 0, False


def _all_json(text: str, at: int, whole: bool) -> bool:
  """Whether a text, from an offset on, is nothing but JSON values, with no prose after them.

  Args:
    text: the beginning of a file.
    at: the offset.
    whole: whether nothing follows the text.
  """
  while (rest := text[at:].lstrip()) and rest[0] in '{[':
    _, end, cut = _first_value(text, at)
    if not end:  # a broken value is one if it begins like a record
      return cut or not whole or bool(re.match(r'[\[\s]*\{\s*"', rest))
    at = end
  return not rest


def _is_object(line: str) -> bool:
  line = line.lstrip().removeprefix('\ufeff')  # as where files were concatenated
  try:
    return bool(line.startswith('{') and json.loads(line))
  except (ValueError, RecursionError):
    return False


def _is_complete(line: str) -> bool:
  try:
    json.loads(line)
  except (ValueError, RecursionError):
    return False
  return True


def read(path: str, stream: Stream, layout: str, fields: Fields, lone: bool
         ) -> Iterator[Document | Unusable]:
  """The records of a file of this layout.

  Args:
    path: of the file.
    stream: its bytes.
    layout: LINES, ARRAY or OBJECTS.
    fields: where a record has its text and id.
    lone: whether a file of one object that lacks the field is NO_RECORDS, as a file of settings
      or a description is, rather than a record without text.
  """
  if layout == LINES:
    beginning = stream.peek(_PEEK)[0]
    returns = b'\r' in beginning[:-1] and b'\n' not in beginning
    found = pieces(path, stream, separator_of('\r' if returns else '\n', exact=True))
  else:
    found = _elements(path, stream, layout == ARRAY)
  documents = _documents(path, found, fields)
  if lone and layout != ARRAY:
    first, second = next(documents, None), next(documents, None)
    if (second is None and isinstance(first, Unusable) and first.reason == NO_TEXT
        and first.detail.startswith(f' {fields.text!r}; ')):
      first = Unusable(path, NO_RECORDS, first.detail)
    yield from (record for record in (first, second) if record is not None)
  yield from documents


def _documents(path: str, found: Iterable[Piece | Unusable], fields: Fields
               ) -> Iterator[Document | Unusable]:
  for piece in found:
    if isinstance(piece, Unusable):
      yield piece
    elif piece.raw.strip():
      record = records.from_json(piece.raw, f'{path}:{piece.line}', fields)
      if isinstance(record, Document):
        yield record
      elif record.reason == NOT_JSON and b'\n' in piece.raw.strip():
        yield from _swallowed(path, piece, fields)
      elif not piece.cut:
        yield record


def _swallowed(path: str, piece: Piece, fields: Fields) -> Iterator[Document | Unusable]:
  """A broken piece, and the records in its further lines, which it holds as its end is missing."""
  lines = [line.strip().rstrip(b',') for line in piece.raw.strip().split(b'\n')]
  found = [records.from_json(line, f'{path}:{piece.line + i}', fields)
           for i, line in enumerate(lines) if i and line.startswith(b'{')]
  found = [record for record in found if isinstance(record, Document)]
  if found or not piece.cut:
    yield Unusable(f'{path}:{piece.line}', NOT_JSON, ': a bracket or quote is missing')
  yield from found


# Elements of arrays, and objects that follow each other

# Up to what may end an element, outside of strings; up to the end of a string, inside of one.
_OUTSIDE = re.compile(rb'[^"{}\[\],]*')
_INSIDE = re.compile(rb'[^"\\\n]*(?:\\.[^"\\\n]*)*', re.DOTALL)


def _elements(path: str, stream: Iterable[bytes], array: bool) -> Iterator[Piece | Unusable]:
  """The elements of arrays that follow each other, or objects that do."""
  scanner = _Scanner(path, array)
  try:
    for chunk in stream:
      yield from scanner.feed(chunk)
  except Damage as damage:
    yield from scanner.end(cut=True)
    yield Unusable(f'{path}:{scanner.line}', damage.reason, damage.detail)
    return
  yield from scanner.end(cut=False)


def _end(pattern: re.Pattern[bytes], buffer: bytearray, start: int) -> int:
  """Where the match of a pattern that always matches ends."""
  match = pattern.match(buffer, start)
  return match.end() if match else start


class _Scanner:
  """Cuts bytes that arrive in chunks into elements, by counting brackets outside of strings.

  Attributes:
    line: where the bytes begin that are not cut yet.
  """

  def __init__(self, path: str, array: bool):
    self.line = 1
    self._path, self._array = path, array
    self._rest = bytearray()  # since the current element began
    self._at = 0  # everything before it has been scanned
    self._depth = 0  # of brackets; that around the elements of an array counts
    self._string = self._too_long = False  # inside of a string; of an element that is too long

  def feed(self, chunk: bytes) -> Iterator[Piece | Unusable]:
    """The elements that are complete with this chunk."""
    self._rest += chunk
    while self._at < len(self._rest):
      if self._string:
        self._at = end = _end(_INSIDE, self._rest, self._at)
        mark = self._rest[end:end + 1]
        if mark in (b'', b'\\'):
          break  # the next chunk has the rest of it
        self._string, self._at = False, end + 1
        if mark == b'\n':  # not allowed in a string: its quote is missing
          yield from self._cut()
          self._depth = min(self._depth, self._array)
        continue
      self._at = _end(_OUTSIDE, self._rest, self._at)
      mark = self._rest[self._at:self._at + 1]
      self._at += len(mark)
      if mark == b'"':
        self._string = True
      elif mark in (b'{', b'['):
        if self._array and not self._depth and mark == b'[':
          yield from self._cut(without=1)
        self._depth += 1
      elif mark in (b'}', b']') and self._depth > self._array:
        self._depth -= 1
        if not self._depth:
          yield from self._cut()
      elif mark == b']' and self._array:
        yield from self._cut(without=1)
        self._depth = 0
      elif mark == b',' and self._array and self._depth <= 1:
        yield from self._cut(without=1)
    if self._at > records.MAX_BYTES:
      if not self._too_long:
        yield records.too_long(f'{self._path}:{self._line_of_element()}')
      self._too_long = True
      self._drop(self._at)

  def end(self, cut: bool) -> Iterator[Piece | Unusable]:
    """What is left; `cut`: the file goes on, but cannot be read."""
    self._at = len(self._rest)
    yield from self._cut(whole=not cut)

  def _cut(self, without: int = 0, whole: bool = True) -> Iterator[Piece | Unusable]:
    """The element that ends here, `without` the last bytes."""
    raw = bytes(self._rest[:self._at - without])
    if not self._too_long and raw.strip():
      line = self._line_of_element()
      yield Piece(raw, line, cut=not whole)
    self._too_long = False
    self._drop(self._at)

  def _line_of_element(self) -> int:
    """Where the first byte of the element is that is not a space."""
    blank = len(self._rest) - len(self._rest.lstrip())
    return self.line + self._rest.count(b'\n', 0, blank)

  def _drop(self, count: int) -> None:
    self.line += self._rest.count(b'\n', 0, count)
    del self._rest[:count]
    self._at -= count
