"""Reads documents from files: text, JSON, CSV, Parquet and ArrayRecord, compressed or not.

The content of a file decides its format, and what it is compressed with. Its name only helps where
the content can be read in two ways: a file called .json, .jsonl, .csv or .tsv is never plain text.
A reader yields the records of a file in order: a Document, or an Unusable with the place and the
reason; the caller decides what follows. Files are streamed, and no line or document longer than
MAX_BYTES is kept, so memory stays bounded: a few times MAX_BYTES, or one block of an ArrayRecord
file.
"""

import codecs
from collections.abc import Iterator
import dataclasses
import os
from typing import IO

from btx_jax.data import csv_files, json_files, records, tables
from btx_jax.data.pieces import count_lines, pieces, separator_of
from btx_jax.data.records import (
  ARCHIVE,
  BINARY,
  DAMAGED,
  EMPTY,
  LFS_POINTER,
  NOT_UTF8,
  Document,
  Fields,
  Reader,
  Unusable,
)
from btx_jax.data.streams import Stream
from btx_jax.errors import UsageError
from btx_jax.files import git_lfs, inputs, places

TEXT, CSV = 'plain text', 'CSV'
PARQUET, ARROW, ARRAY_RECORD = 'Parquet', 'Arrow', 'ArrayRecord'
TEXT_FIELD = 'text'  # the default, which does not say that there are fields
_COMPRESSED = ('.gz', '.gzip', '.bz2', '.xz', '.zst', '.zstd')
_DECIDING = 8000  # bytes at the start of a file, among which text has no zero byte
_LINE_ENDINGS = ('.jsonl', '.ndjson', '.jsonlines')
_ARRAY_RECORD_BEGINS = bytes.fromhex('83af70d10d884a3f')
_ARROW_BEGINS = (b'ARROW1\0\0', b'\xff\xff\xff\xff')  # a file, or a stream as `datasets` saves it
_ARCHIVES = {  # kind -> (offset, how it is recognized there)
    'zip': (0, b'PK\x03\x04'), 'tar': (257, b'ustar'), '7z': (0, b'7z\xbc\xaf\x27\x1c'),
    'rar': (0, b'Rar!\x1a\x07'), 'lz4': (0, b'\x04\x22\x4d\x18')}


@dataclasses.dataclass
class Reading:
  """What `read` found out about a file.

  Attributes:
    kind: its format and compression, in words.
    is_text: whether it is plain text.
    separators: how often the separator was found in plain text so far.
  """
  kind: str = ''
  is_text: bool = False
  separators: int = 0


def ending(path: str) -> str:
  """The ending of a file's name in lower case, without that of a compression: '.jsonl'."""
  return os.path.splitext(_split(path)[0])[1].lower()


def suffix(path: str) -> str:
  """The ending of a file's name with that of a compression, as it is written: '.JSONL.gz'."""
  name, compressed = _split(path)
  return os.path.splitext(name)[1] + compressed


def _split(path: str) -> tuple[str, str]:
  """The name of a file, and the ending of its compression if it has one."""
  name = os.path.basename(path)
  plain, last = os.path.splitext(name)
  return (plain, last) if last.lower() in _COMPRESSED else (name, '')


def read(path: str, text_field: str = TEXT_FIELD, id_field: str = '', separator: str = '',
         about: Reading | None = None, lone: bool = False, reader: Reader | None = None
         ) -> Iterator[Document | Unusable]:
  """The records of a file in order.

  Args:
    path: of the file.
    text_field: the field or column of the text; '' if the records of an ArrayRecord file are
      plain text, not JSON.
    id_field: the field or column of the id; '' if there is none.
    separator: splits plain text into documents, its line ends being those of any convention; if
      '', a file is one document.
    about: is updated with what is found out about the file.
    lone: whether a file of a single JSON object that lacks the field is NO_RECORDS, and a CSV file
      that lacks the column NO_COLUMN.
    reader: makes documents of records in JSON, such as conversations; None if records are texts.

  Raises:
    OSError: the file cannot be opened.
    UsageError: the file has no such fields, or a package that reads it is not installed.
  """
  about = about if about is not None else Reading()
  with inputs.open_file(places.local(path)) as file:
    found = _records(path, file, Fields(text_field, id_field, reader), separator, about, lone)
    first = next(found, Unusable(path, EMPTY))
    yield first
    yield from found


def _records(path: str, file: IO[bytes], fields: Fields, separator: str, about: Reading,
             lone: bool) -> Iterator[Document | Unusable]:
  beginning = file.read(git_lfs.POINTER_BYTES)
  named = ending(path)
  if not beginning:
    return
  if git_lfs.is_pointer(beginning):
    yield Unusable(path, LFS_POINTER, '; run git lfs pull in its repository')
  elif beginning.startswith(b'PAR1') or named == '.parquet':
    about.kind = PARQUET
    yield from tables.read_parquet(path, fields)
  elif beginning.startswith(_ARROW_BEGINS):
    about.kind = ARROW
    yield from tables.read_arrow(path, fields)
  elif beginning.startswith(_ARRAY_RECORD_BEGINS) or named in ('.arrayrecord', '.array_record'):
    about.kind = ARRAY_RECORD
    _check_fields(path, fields, has_text=True, has_id=bool(fields.text))
    yield from _array_record(path, fields)
  else:
    stream = Stream(path, file, beginning)
    yield from _stream(path, named, stream, fields, separator, about, lone)


def _stream(path: str, named: str, stream: Stream, fields: Fields, separator: str,
            about: Reading, lone: bool) -> Iterator[Document | Unusable]:
  """The records of a file of text or JSON, whose name has the ending `named`."""
  compressed = f', {stream.compression}' if stream.compression else ''
  beginning, _ = stream.peek(_DECIDING)
  for archive, (at, mark) in _ARCHIVES.items():
    if beginning[at:at + len(mark)] == mark:
      about.kind = f'{archive} archive{compressed}'
      yield Unusable(path, ARCHIVE, f' ({archive}); unpack it first')
      return
  if beginning[:2] in (b'\xff\xfe', b'\xfe\xff'):
    about.kind = f'UTF-16{compressed}'
    yield Unusable(path, NOT_UTF8, ' but UTF-16')
    return
  if b'\0' in beginning:  # as git decides, too
    about.kind = f'binary data{compressed}'
    yield Unusable(path, BINARY)
    return
  if named in csv_files.DELIMITERS and not fields.read:
    about.kind = CSV + compressed
    yield from csv_files.read(path, stream, csv_files.DELIMITERS[named], fields, lenient=lone)
    return
  is_lines = named in _LINE_ENDINGS
  layout = json_files.layout_of(stream, is_lines or named == '.json')
  about.kind = (layout or TEXT) + compressed
  about.is_text = not layout
  if layout:
    _check_fields(path, fields, has_text=bool(fields.text), has_id=True)
    yield from json_files.read(path, stream, layout, fields, lone and not is_lines)
    return
  if fields.read:
    raise UsageError(f'{path} is {CSV if named in csv_files.DELIMITERS else TEXT}; conversations '
                     'are read from JSON, Parquet and Arrow files. Narrow the paths to such files.')
  _check_fields(path, fields, has_text=fields.text in ('', TEXT_FIELD), has_id=False)
  for piece in pieces(path, stream, separator_of(separator)):
    if isinstance(piece, Unusable):
      yield piece
      continue
    about.separators += not piece.last
    try:
      # If the file is cut off, the last character may be incomplete: that is no further error.
      text = codecs.getincrementaldecoder('utf-8')().decode(piece.raw, final=not piece.cut)
      yield Document(text, '', f'{path}:{piece.line}')
    except UnicodeDecodeError as error:
      line = piece.line + count_lines(piece.raw, 0, error.start)
      yield Unusable(f'{path}:{line}', NOT_UTF8, f' (byte {error.start} of the document)')


def _check_fields(path: str, fields: Fields, has_text: bool, has_id: bool) -> None:
  """Raises UsageError if a field is set that files of this format do not have."""
  if not has_text and not fields.text:
    raise UsageError(f"{path} holds JSON, and text_field = '' is for ArrayRecord files of plain "
                     'text. Set text_field to the field that holds the text.')
  if not has_text:
    raise UsageError(f'{path} is plain text, which has no field {fields.text!r} (text_field). '
                     'Narrow the paths to files with that field, or make this file a domain '
                     'of its own, without text_field.')
  if fields.id and not has_id:
    raise UsageError(f'{path} is plain text, which has no field {fields.id!r} (id_field). Narrow '
                     'the paths to files with that field, or leave id_field empty.')


def _array_record(path: str, fields: Fields) -> Iterator[Document | Unusable]:
  from array_record.python.array_record_module import ArrayRecordReader  # installed with grain
  # No read-ahead: it would keep one block per core in memory.
  reader = ArrayRecordReader(places.local(path), 'readahead_buffer_size:0,max_parallelism:0')
  number = 0
  try:
    if not reader.ok():
      yield Unusable(path, DAMAGED)
    for number in range(reader.num_records()):
      raw, place = reader.read(), f'{path}:{number + 1}'
      if fields.text:
        yield records.from_json(raw, place, fields)
      elif len(raw) > records.MAX_BYTES:
        yield records.too_long(place)
      else:
        text = records.utf8(raw, place)
        yield text if isinstance(text, Unusable) else Document(text, '', place)
  except RuntimeError as error:
    yield Unusable(f'{path}:{number + 1}', DAMAGED, f': {error}')
