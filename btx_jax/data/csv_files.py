"""Records of CSV and TSV files, whose first row names the columns."""

from collections.abc import Iterable, Iterator
import csv
import io

from btx_jax.data import records
from btx_jax.data.records import (
  DAMAGED,
  NO_COLUMN,
  NO_TEXT,
  NOT_UTF8,
  Document,
  Fields,
  Unusable,
  names_of,
  no_column,
)
from btx_jax.data.streams import Damage

ENDINGS = ('.csv', '.tsv')
_DELIMITERS = ',\t;'


def read(path: str, stream: Iterable[bytes], fields: Fields, lenient: bool
         ) -> Iterator[Document | Unusable]:
  """The rows of a file, each with the line on which it begins.

  Args:
    path: of the file.
    stream: its bytes.
    fields: the columns of the text and the id.
    lenient: whether a file without the column of the text is NO_COLUMN, as a table that only
      accompanies the text is, rather than an error.

  Raises:
    UsageError: the file has no such columns.
  """
  csv.field_size_limit(records.MAX_BYTES)
  # Bytes that are not UTF-8 become surrogates, so that they cost their own row only.
  text = io.TextIOWrapper(io.BufferedReader(_Raw(stream)), 'utf-8', 'surrogateescape', newline='')
  first = text.readline(records.MAX_BYTES)
  delimiter = max(_DELIMITERS, key=first.count)
  names = next(csv.reader([first], delimiter=delimiter), [])
  if fields.text not in names and lenient:
    yield Unusable(path, NO_COLUMN, f' {fields.text!r}; {names_of(names)}')
    return
  for key, name in (('text_field', fields.text), ('id_field', fields.id)):
    if name not in names and (name or key == 'text_field'):
      raise no_column(path, key, name, names)
  at, id_at = names.index(fields.text), names.index(fields.id) if fields.id else -1
  rows = csv.reader(iter(lambda: text.readline(records.MAX_BYTES), ''), delimiter=delimiter)
  line = 2
  while True:
    place = f'{path}:{line}'
    try:
      if row := next(rows):  # not an empty line
        yield _document(row, at, id_at, len(names), place, fields)
    except StopIteration:
      return
    except csv.Error as error:  # a cell is too long
      yield Unusable(place, DAMAGED, f': {error}')
    except Damage as damage:
      yield Unusable(f'{path}:{rows.line_num + 2}', damage.reason, damage.detail)
      return
    line = rows.line_num + 2


def _document(row: list[str], at: int, id_at: int, columns: int, place: str, fields: Fields
              ) -> Document | Unusable:
  if len(row) <= max(at, id_at):
    return Unusable(place, NO_TEXT, f' {fields.text!r}: it has {len(row)} of {columns} cells')
  try:
    row[at].encode('utf-8')
  except UnicodeEncodeError as error:
    return Unusable(place, NOT_UTF8, f' (character {error.start} of the cell)')
  return Document(row[at], row[id_at] if fields.id else '', place)


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
