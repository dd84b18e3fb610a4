"""Records of files: a Document, or an Unusable with the reason; and the fields of JSON objects."""

from collections.abc import Callable, Collection, Iterable, Mapping
import json
from typing import Any, NamedTuple

from btx_jax.errors import UsageError, nearest

MAX_BYTES = 64_000_000  # per document, and per line

TOO_LONG, CUT_OFF, DAMAGED, EMPTY = 'is too long', 'is cut off', 'is damaged', 'is empty'
NOT_UTF8, NOT_JSON, ARCHIVE = 'is not UTF-8 text', 'is not JSON', 'is an archive'
BINARY = 'is not text but binary data'
SURROGATE = 'holds half of a surrogate pair'
NO_TEXT, LIST = 'has no text in field', 'has a list in field'
NOT_A_ROW = 'is not a row of the table'
NO_RECORDS, NO_COLUMN = 'is a single JSON object without field', 'is a table without column'
LFS_POINTER = 'is a Git LFS pointer'


class Part(NamedTuple):
  """A part of a rendered conversation.

  Attributes:
    text: its text.
    is_answer: whether a model is to write it.
    end: the special token at the end of `text` that ends the turn; '' if there is none.
  """
  text: str
  is_answer: bool = False
  end: str = ''


class Document(NamedTuple):
  """One document.

  Attributes:
    text: its content; for a conversation or a pair, the rendered text.
    id: its id in the file, or '' if it has none.
    place: 'PATH:NUMBER', the line, row or record where it begins, counted from 1.
    parts: the parts of a rendered conversation, with which `text` begins, see chats.py; () for
      plain text.
    rejected: for a pair, the parts with the rejected answer, which follow in `text`; see pairs.py.
  """
  text: str
  id: str = ''
  place: str = ''
  parts: tuple[Part, ...] = ()
  rejected: tuple[Part, ...] = ()


def answer_bytes(document: Document) -> int:
  """The bytes of a conversation's answers, without the tokens that end turns; of a pair, those of
  the chosen answers."""
  return sum(len(part.text.removesuffix(part.end).encode('utf-8'))
             for part in document.parts if part.is_answer)


class Unusable(NamedTuple):
  """A record that is not a document: its place (as in Document), a reason from above, details."""
  place: str
  reason: str
  detail: str = ''

  def __str__(self) -> str:
    return f'{self.place}: {self.reason}{self.detail}'


class Fields(NamedTuple):
  """Where a record has its text and its id.

  Attributes:
    text: the field or column of the text. 'a.b' is the field b of the object in field a, unless a
      field is called 'a.b'.
    id: likewise of the id; '' if there is none.
    read: makes a document from a whole record, such as a conversation; None if the text field alone
      is the document.
  """
  text: str
  id: str = ''
  read: 'Reader | None' = None


# (a record in JSON, its place, the fields) -> the document.
Reader = Callable[[Mapping[str, Any], str, Fields], Document | Unusable]


def from_json(raw: bytes | bytearray, place: str, fields: Fields) -> Document | Unusable:
  """The document of a JSON object given as bytes."""
  if len(raw) > MAX_BYTES:
    return too_long(place)
  text = utf8(raw, place)
  if isinstance(text, Unusable):
    return text
  try:
    # Where files were concatenated, a byte order mark can be at the start of any line.
    record = json.loads(text.removeprefix('\ufeff'))
  except (ValueError, RecursionError) as error:
    return Unusable(place, NOT_JSON, f': {error}')
  if not isinstance(record, dict):
    return Unusable(place, NO_TEXT, f' {fields.text!r}: it is not an object but {_kind(record)}')
  if fields.read:
    return fields.read(record, place, fields)
  found = record.get(fields.text)
  if not isinstance(found, str):
    found = found if fields.text in record else _nested(record, fields.text)
    if found is _MISSING:
      return Unusable(place, NO_TEXT, f' {fields.text!r}; {names_of(record)}')
    if isinstance(found, list):
      return Unusable(place, LIST, f' {fields.text!r}')
    if not isinstance(found, str):
      return Unusable(place, NO_TEXT, f' {fields.text!r} but {_kind(found)}')
  try:
    found.encode('utf-8')
  except UnicodeEncodeError as error:
    return Unusable(place, SURROGATE, f' (character {error.start})')
  return Document(found, id_of(record, fields), place)


def id_of(record: Mapping[str, Any], fields: Fields) -> str:
  """The id of a record; '' if it has none."""
  if not fields.id:
    return ''
  value = record[fields.id] if fields.id in record else _nested(record, fields.id)
  return '' if value is _MISSING else id_text(value)


_MISSING = object()


def _nested(record: Mapping[str, Any], name: str) -> Any:
  """The value at a path of names joined by dots, or _MISSING."""
  value: Any = record
  for part in name.split('.'):
    if not isinstance(value, Mapping) or part not in value:
      return _MISSING
    value = value[part]
  return value


def utf8(raw: bytes | bytearray, place: str) -> str | Unusable:
  """The text of these bytes."""
  try:
    return raw.decode('utf-8')
  except UnicodeDecodeError as error:
    return Unusable(place, NOT_UTF8, f' (byte {error.start})')


def id_text(value: Any) -> str:
  """The id that a field holds, as text; '' if it is null."""
  if value is None:
    return ''
  return value if isinstance(value, str) else json.dumps(value, default=str)


def names_of(record: Iterable[str]) -> str:
  """The fields of an object or the columns of a table, in words."""
  names = [*map(repr, record)]
  return f'its fields: {", ".join(names[:20]) or "none"}{", ..." if len(names) > 20 else ""}'


def check_columns(path: str, fields: Fields, columns: Collection[str]) -> None:
  """Raises UsageError if a table lacks the column of the text, or that of the id if one is set."""
  for key, name in (('text_field', fields.text), ('id_field', fields.id)):
    if name not in columns and (name or key == 'text_field'):
      raise UsageError(f'{path} has no column {name!r}; {names_of(columns)}. Set {key}: '
                       f'{nearest(name, columns)}')


def too_long(place: str) -> Unusable:
  return Unusable(place, TOO_LONG, f': more than {MAX_BYTES / 1e6:g} MB')


def _kind(value: Any) -> str:
  return 'null' if value is None else f'a {type(value).__name__}'
