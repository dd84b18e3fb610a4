"""Reads documents from files: plain text and JSONL (either may be .gz), Parquet and ArrayRecord.

The extension of a file name decides its format. A reader yields its records in order: a Document,
or an Unusable with the place and the reason; the caller decides what follows. Files are streamed,
and no line or document longer than MAX_BYTES is kept, so memory stays bounded: a few times
MAX_BYTES, or one block of an ArrayRecord file.
"""

import codecs
from collections.abc import Iterator
import gzip
import json
import os
from typing import Any, NamedTuple
import zlib

from btx_jax import files
from btx_jax.errors import UsageError, nearest

MAX_BYTES = 64_000_000  # per document, and per line
_CHUNK = 1 << 20
_ROWS = 64  # of a Parquet file in memory at a time

TOO_LONG, CUT_OFF, DAMAGED, EMPTY = 'is too long', 'is cut off', 'is damaged', 'is empty'
NOT_UTF8, NOT_JSON = 'is not UTF-8 text', 'is not JSON'
SURROGATE = 'holds half of a surrogate pair'
NO_TEXT = 'has no text in field'


class Document(NamedTuple):
  """One document.

  Attributes:
    text: its content.
    id: its id in the file, or '' if it has none.
    place: 'PATH:NUMBER', the line, row or record where it begins, counted from 1.
  """
  text: str
  id: str = ''
  place: str = ''


class Unusable(NamedTuple):
  """A record that is not a document: its place (as in Document), a reason from above, details."""
  place: str
  reason: str
  detail: str = ''

  def __str__(self) -> str:
    return f'{self.place}: {self.reason}{self.detail}'


def read(path: str, text_field: str = 'text', id_field: str = '',
         separator: str = '') -> Iterator[Document | Unusable]:
  """The records of a file in order.

  Args:
    path: ends in .jsonl, .parquet, .arrayrecord or .array_record; anything else is plain text.
    text_field: the field or column of the text; '' if the records of an ArrayRecord file are
      plain text, not JSON.
    id_field: the field or column of the id; '' if there is none.
    separator: splits plain text into documents; if '', a file is one document.

  Raises:
    OSError: the file cannot be opened.
    UsageError: a Parquet file lacks these columns, pyarrow is not installed, or the file is a Git
      LFS pointer.
  """
  files.check_no_lfs_pointer(path)
  if path.endswith('.parquet'):
    records = _parquet(path, text_field, id_field)
  elif path.endswith(('.arrayrecord', '.array_record')):
    records = _array_record(path, text_field, id_field)
  elif path.removesuffix('.gz').endswith('.jsonl'):
    records = _jsonl(path, text_field, id_field)
  else:
    records = _plain(path, separator)
  if not os.path.getsize(path):
    records = iter(())  # Parquet and ArrayRecord readers would call the file damaged
  first = next(records, Unusable(path, EMPTY))
  yield first
  yield from records


# Plain text and JSONL


class _Piece(NamedTuple):
  """The bytes between two separators, the line they begin on, and whether the end is missing."""
  raw: bytes
  line: int
  cut: bool


def _plain(path: str, separator: str) -> Iterator[Document | Unusable]:
  for piece in _pieces(path, separator.encode()):
    if isinstance(piece, Unusable):
      yield piece
      continue
    try:
      # If the file is cut off, the last character may be incomplete: that is no further error.
      text = codecs.getincrementaldecoder('utf-8')().decode(piece.raw, final=not piece.cut)
      yield Document(text, '', f'{path}:{piece.line}')
    except UnicodeDecodeError as error:
      line = piece.line + piece.raw.count(b'\n', 0, error.start)
      yield Unusable(f'{path}:{line}', NOT_UTF8, f' (byte {error.start} of the document)')


def _jsonl(path: str, text_field: str, id_field: str) -> Iterator[Document | Unusable]:
  for piece in _pieces(path, b'\n'):
    if isinstance(piece, Unusable):
      yield piece
    elif piece.raw.strip():
      record = _json(piece.raw, f'{path}:{piece.line}', text_field, id_field)
      if isinstance(record, Document) or not piece.cut:
        yield record


def _pieces(path: str, separator: bytes) -> Iterator[_Piece | Unusable]:
  """The pieces between separators, or the whole file if the separator is empty."""
  rest = bytearray()  # bytes read since the current piece began
  line = 1  # where the current piece begins
  searched = 0  # no separator begins before this offset in `rest`
  passed = 0  # newlines in the dropped bytes of a piece that is too long
  too_long = False
  damage = None
  try:
    for chunk in _chunks(path):
      rest += chunk
      begin = 0
      while separator and (end := rest.find(separator, max(begin, searched))) >= 0:
        if too_long or end - begin > MAX_BYTES:
          yield _too_long(path, line)
        else:
          yield _Piece(bytes(rest[begin:end]), line, cut=False)
        line += passed + rest.count(b'\n', begin, end) + separator.count(b'\n')
        begin, passed, too_long = end + len(separator), 0, False
      del rest[:begin]
      searched = max(0, len(rest) - len(separator) + 1)
      if too_long or searched > MAX_BYTES:
        too_long = True
        if not separator:
          break  # the piece is the whole file
        passed += rest.count(b'\n', 0, searched)
        del rest[:searched]
        searched = 0
  except EOFError:
    damage = CUT_OFF, ''
  except (zlib.error, gzip.BadGzipFile) as error:
    damage = DAMAGED, f': {error}'
  if too_long or len(rest) > MAX_BYTES:
    yield _too_long(path, line)
  elif rest:
    yield _Piece(bytes(rest), line, cut=damage is not None)
  if damage:
    line += passed + rest.count(b'\n')
    yield Unusable(f'{path}:{line}', *damage)


def _chunks(path: str) -> Iterator[bytes]:
  with (gzip.open if path.endswith('.gz') else open)(path, 'rb') as file:
    while chunk := file.read1(_CHUNK):  # read() would lose the bytes before the damage
      yield chunk


# JSON objects and text, in any format


def _json(raw: bytes, place: str, text_field: str, id_field: str) -> Document | Unusable:
  if len(raw) > MAX_BYTES:
    return _too_long(place)
  text = _utf8(raw, place)
  if isinstance(text, Unusable):
    return text
  try:
    record = json.loads(text)
  except (ValueError, RecursionError) as error:
    return Unusable(place, NOT_JSON, f': {error}')
  if not isinstance(record, dict):
    return Unusable(place, NO_TEXT, f' {text_field!r}: it is not an object but {_kind(record)}')
  if text_field not in record:
    return Unusable(place, NO_TEXT, f' {text_field!r}; {_fields(record)}')
  text = record[text_field]
  if not isinstance(text, str):
    return Unusable(place, NO_TEXT, f' {text_field!r} but {_kind(text)}')
  try:
    text.encode('utf-8')
  except UnicodeEncodeError as error:
    return Unusable(place, SURROGATE, f' (character {error.start})')
  return Document(text, _id(record.get(id_field)) if id_field else '', place)


def _utf8(raw: bytes, place: str) -> str | Unusable:
  try:
    return raw.decode('utf-8')
  except UnicodeDecodeError as error:
    return Unusable(place, NOT_UTF8, f' (byte {error.start})')


def _id(value: Any) -> str:
  if value is None:
    return ''
  return value if isinstance(value, str) else json.dumps(value, default=str)


def _kind(value: Any) -> str:
  return 'null' if value is None else f'a {type(value).__name__}'


def _fields(names) -> str:
  names = [*map(repr, names)]
  return f'its fields: {", ".join(names[:20]) or "none"}{", ..." if len(names) > 20 else ""}'


def _too_long(place: str, line: int | None = None) -> Unusable:
  place = place if line is None else f'{place}:{line}'
  return Unusable(place, TOO_LONG, f': more than {MAX_BYTES / 1e6:g} MB')


# Parquet


def _parquet(path: str, text_field: str, id_field: str) -> Iterator[Document | Unusable]:
  try:
    import pyarrow as pa
    from pyarrow import parquet
  except ImportError as error:
    raise UsageError(f"{path}: Parquet files need the package 'pyarrow': "
                     "pip install 'btx_jax[parquet]'") from error
  columns = [text_field, id_field] if id_field not in ('', text_field) else [text_field]
  row = 0
  with open(path, 'rb') as file:
    try:
      table = parquet.ParquetFile(file, buffer_size=_CHUNK, pre_buffer=False,
                                  page_checksum_verification=True)
      _check_columns(path, table.schema_arrow, text_field, id_field)
      for batch in table.iter_batches(_ROWS, columns=columns, use_threads=False):
        texts, ids = (_decoded(batch.column(name)) for name in (text_field, columns[-1]))
        for text, identity in zip(texts, ids):
          row += 1
          yield _from_row(text, identity if id_field else None, f'{path}:{row}', text_field)
    except (pa.ArrowException, OSError) as error:  # the file itself was opened above
      yield Unusable(f'{path}:{row + 1}' if row else path, DAMAGED, f': {error}')


def _check_columns(path: str, schema, text_field: str, id_field: str):
  for key, name in (('text_field', text_field), ('id_field', id_field)):
    if name not in schema.names and (name or key == 'text_field'):
      raise UsageError(f'{path} has no column {name!r}; {_fields(schema.names)}. Set {key}: '
                       f'{nearest(name, schema.names)}')
  kind = schema.field(text_field).type
  if hasattr(kind, 'index_type'):  # a dictionary
    kind = kind.value_type
  if str(kind) not in ('string', 'large_string', 'string_view', 'binary', 'large_binary',
                       'binary_view'):
    raise UsageError(f'{path}: column {text_field!r} holds {kind}, not text; '
                     f'{_fields(schema.names)}. Set text_field.')


def _decoded(column):
  """The column with dictionary codes replaced by their values."""
  return column.dictionary_decode() if hasattr(column, 'dictionary_decode') else column


def _from_row(text, identity, place: str, text_field: str) -> Document | Unusable:
  if not text.is_valid:
    return Unusable(place, NO_TEXT, f' {text_field!r} but null')
  raw = text.as_buffer()  # without a copy
  if raw.size > MAX_BYTES:
    return _too_long(place)
  decoded = _utf8(raw.to_pybytes(), place)
  if isinstance(decoded, Unusable):
    return decoded
  return Document(decoded, _id(identity.as_py()) if identity is not None else '', place)


# ArrayRecord


def _array_record(path: str, text_field: str, id_field: str) -> Iterator[Document | Unusable]:
  from array_record.python.array_record_module import ArrayRecordReader  # installed with grain
  with open(path, 'rb'):
    pass  # raises the OSError, which the reader would swallow
  # No read-ahead: it would keep one block per core in memory.
  reader = ArrayRecordReader(path, 'readahead_buffer_size:0,max_parallelism:0')
  number = 0
  try:
    if not reader.ok():
      yield Unusable(path, DAMAGED)
    for number in range(reader.num_records()):
      raw, place = reader.read(), f'{path}:{number + 1}'
      if text_field:
        yield _json(raw, place, text_field, id_field)
      elif len(raw) > MAX_BYTES:
        yield _too_long(place)
      else:
        text = _utf8(raw, place)
        yield text if isinstance(text, Unusable) else Document(text, '', place)
  except RuntimeError as error:
    yield Unusable(f'{path}:{number + 1}', DAMAGED, f': {error}')
