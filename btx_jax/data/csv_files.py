"""Records of CSV and TSV files, whose first row names the columns.

A row that is not as wide as the header, or whose quotes do not match, costs itself only: reading
goes on with the line after the one on which it began.
"""

from collections.abc import Iterable, Iterator
import csv
import io

from btx_jax.data import records
from btx_jax.data.records import (
  NO_COLUMN,
  NOT_A_ROW,
  NOT_UTF8,
  Document,
  Fields,
  Unusable,
  check_columns,
  names_of,
  too_long,
)
from btx_jax.data.streams import Damage

# Endings of names, and the delimiters to try, the usual one first.
DELIMITERS = {'.csv': ',;\t', '.tsv': '\t,;'}


def read(path: str, stream: Iterable[bytes], delimiters: str, fields: Fields, lenient: bool
         ) -> Iterator[Document | Unusable]:
  """The rows of a file, each with the line on which it begins.

  Args:
    path: of the file.
    stream: its bytes.
    delimiters: of which the first is taken that finds the columns in the header.
    fields: the columns of the text and the id.
    lenient: whether a file without the column of the text is NO_COLUMN, as a table that only
      accompanies the text is, rather than an error.

  Raises:
    UsageError: the file has no such columns.
  """
  rows = _Rows(stream)
  try:
    names = rows.header(delimiters, fields)
    if not names:
      return
    if fields.text not in names and lenient:
      yield Unusable(path, NO_COLUMN, f' {fields.text!r}; {names_of(names)}')
      return
    check_columns(path, fields, names)
    text_at, id_at = names.index(fields.text), names.index(fields.id) if fields.id else None
    while (line := rows.skip_blank()) is not None:
      place, row = f'{path}:{line}', rows.next_row(len(names))
      if isinstance(row, str):
        yield too_long(place) if row == records.TOO_LONG else Unusable(place, NOT_A_ROW, row)
      elif row != names:  # the header once more, where files were concatenated
        yield _document(row[text_at], '' if id_at is None else row[id_at], place)
  except Damage as damage:
    yield Unusable(f'{path}:{rows.line}', damage.reason, damage.detail)


def _document(text: str, identity: str, place: str) -> Document | Unusable:
  try:
    size = len(text.encode('utf-8'))
  except UnicodeEncodeError as error:
    return Unusable(place, NOT_UTF8, f' (character {error.start} of the cell)')
  if size > records.MAX_BYTES:
    return too_long(place)
  return Document(text, identity, place)


class _TooLong(Exception):
  """A row has more than MAX_BYTES characters; `line`: it is all one line, which was dropped."""

  def __init__(self, line: bool):
    super().__init__()
    self.line = line


class _Rows:
  """The rows of a table.

  Attributes:
    line: the number of the next line.
  """

  def __init__(self, stream: Iterable[bytes]):
    # Bytes that are not UTF-8 become surrogates, so that they cost their own row only.
    self._file = io.TextIOWrapper(
        io.BufferedReader(_Raw(stream)), 'utf-8', 'surrogateescape', newline='')
    self.line = 1
    self._again: list[str] = []  # lines to read again, the last one first
    self._taken: list[str] = []  # lines of the current row
    self._size = 0  # their characters
    self._delimiter = ','
    csv.field_size_limit(2**31 - 1)  # whole rows are limited here

  def header(self, delimiters: str, fields: Fields) -> list[str]:
    """The names of the columns; [] if the file has no row."""
    if self.skip_blank() is None:
      return []
    first = self._next_line()
    if first.lower().startswith('sep=') and first[4:5]:  # Excel's
      delimiters = first[4] + delimiters
      self.skip_blank()
    else:
      self._put_back([first])
    found = {}
    for delimiter in delimiters:
      self._delimiter = delimiter
      row = self.next_row(0)
      found[delimiter] = [name.strip() for name in row] if isinstance(row, list) else []
      if fields.text in found[delimiter]:
        return found[delimiter]
      self._put_back(self._taken)
    self._delimiter = max(found, key=lambda delimiter: len(found[delimiter]))
    self.next_row(0)
    return found[self._delimiter]

  def skip_blank(self) -> int | None:
    """Skips blank lines; the number of the next line, or None at the end."""
    while line := self._next_line():
      if line.strip():
        self._put_back([line])
        return self.line
    return None

  def next_row(self, width: int) -> list[str] | str:
    """The cells of the next row; or what is wrong with it, in words, or TOO_LONG.

    Args:
      width: its number of cells; 0 if that is not known. Empty ones at its end may be more.
    """
    self._taken, self._size = [], 0
    try:
      row = next(csv.reader(iter(self._line_of_row, ''), delimiter=self._delimiter, strict=True))
      wrong = _wrong_width(row, width)
    except (csv.Error, StopIteration):
      row, wrong = [], ': a quote is missing or out of place'
    except _TooLong as error:
      self._put_back([] if error.line else self._taken[1:])
      return records.TOO_LONG
    if wrong and self._delimiter == '\t' and width:
      # Tables with tabs often do not quote: a quote is then a letter like any other.
      row = self._taken[0].rstrip('\r\n').split('\t')
      self._put_back(self._taken[1:])
      return wrong if _wrong_width(row, width) else row[:width]
    if wrong:
      self._put_back(self._taken[1:])
      return wrong
    return row[:width] if width else row

  def _line_of_row(self) -> str:
    line = self._next_line()
    if not self._taken:
      line = line.removeprefix('\ufeff')  # where files were concatenated
    self._taken.append(line)
    self._size += len(line)
    if self._size > records.MAX_BYTES:
      is_one = len(self._taken) == 1
      while is_one and line and not line.endswith(('\n', '\r')):  # the rest of the line
        line = self._file.readline(records.MAX_BYTES)
      raise _TooLong(is_one)
    return line

  def _next_line(self) -> str:
    line = self._again.pop() if self._again else self._file.readline(records.MAX_BYTES + 1)
    self.line += bool(line)
    return line

  def _put_back(self, lines: list[str]):
    lines = [line for line in lines if line]  # not the end of the file
    self._again.extend(reversed(lines))
    self.line -= len(lines)


def _wrong_width(row: list[str], width: int) -> str:
  """What is wrong with the number of cells in a row, in words; '' if it is right."""
  if not width or (len(row) >= width and not any(row[width:])):
    return ''
  return f': it has {len(row)} of {width} cells'


class _Raw(io.RawIOBase):
  """The chunks of a stream as a file."""

  def __init__(self, stream: Iterable[bytes]):
    self._chunks = iter(stream)
    self._rest = memoryview(b'')

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    if not self._rest:
      self._rest = memoryview(next(self._chunks, b''))
    count = min(len(buffer), len(self._rest))
    buffer[:count] = self._rest[:count]
    self._rest = self._rest[count:]
    return count
