"""Records of Parquet and Arrow files."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from btx_jax.data import records
from btx_jax.data.records import (
  DAMAGED,
  NO_TEXT,
  Document,
  Fields,
  Unusable,
  check_columns,
  id_text,
  names_of,
  too_long,
  utf8,
)
from btx_jax.data.streams import CHUNK
from btx_jax.errors import UsageError
from btx_jax.files import inputs, places

_ROWS = 64  # in memory at a time
_TEXT = ('string', 'large_string', 'string_view', 'binary', 'large_binary', 'binary_view')


def read_parquet(path: str, fields: Fields) -> Iterator[Document | Unusable]:
  """The rows of a Parquet file.

  Raises:
    UsageError: the file lacks these columns, or pyarrow is not installed.
  """
  return _read(path, fields, _open_parquet)


def read_arrow(path: str, fields: Fields) -> Iterator[Document | Unusable]:
  """The rows of an Arrow file, or of a file that holds an Arrow stream.

  Raises:
    UsageError: the file lacks these columns, or pyarrow is not installed.
  """
  return _read(path, fields, _open_arrow)


class _Table(NamedTuple):
  """An open table.

  Attributes:
    schema: its columns.
    batches: yields batches of rows that have at least these columns.
  """
  schema: Any
  batches: Callable[[list[str]], Iterable]


def _read(path: str, fields: Fields, open_table: Callable[[Any], _Table]
          ) -> Iterator[Document | Unusable]:
  try:
    import pyarrow as pa
  except ImportError as error:
    raise UsageError(f"{path}: Parquet and Arrow files need the package 'pyarrow': "
                     "pip install 'btx_jax[parquet]'") from error
  row = 0
  with inputs.open_file(places.local(path)) as file:
    try:
      table = open_table(file)
      if fields.read:
        yield from _records(path, table, fields)
        return
      text_name, id_name = _check_columns(path, table.schema, fields)
      columns = dict.fromkeys('.'.join(name) for name in (text_name, id_name) if name)
      for batch, damage in _validated(table.batches(list(columns))):
        if damage:
          row += 1
          yield Unusable(f'{path}:{row}', DAMAGED, f': {damage}')
          continue
        texts, ids = (_column(batch, name) for name in (text_name, id_name or text_name))
        for text, identity in zip(texts, ids):
          row += 1
          yield _from_row(text, identity if fields.id else None, f'{path}:{row}', fields.text)
    # The file itself was opened above; the names of columns need not be UTF-8.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
      yield Unusable(f'{path}:{row + 1}' if row else path, DAMAGED, f': {error}')


def _validated(batches: Iterable) -> Iterator[tuple[Any, str]]:
  """(batch, '') for each sound batch; for others, (row, what is wrong with it) for each row.

  In a damaged file, offsets can lead outside the buffers, and reading there crashes the process.
  """
  for batch in batches:
    if not _damage_of(batch):
      yield batch, ''
    else:
      for i in range(batch.num_rows):
        row = batch.slice(i, 1)
        yield row, _damage_of(row)


def _damage_of(batch) -> str:
  """The damage to a batch, in words; '' if there is none, or only text that is not UTF-8."""
  import pyarrow as pa
  for column in batch.columns:
    try:
      column.validate(full=True)
    except pa.ArrowInvalid as error:
      # Offsets are checked before the encoding, which later makes only single documents unusable.
      if 'UTF8' not in str(error) or str(column.type) not in _TEXT:
        return str(error)
  return ''


def _records(path: str, table: _Table, fields: Fields) -> Iterator[Document | Unusable]:
  """The documents of rows that `fields.read` reads, such as conversations."""
  assert fields.read
  row = 0
  for batch, damage in _validated(table.batches(list(table.schema.names))):
    if damage:
      row += 1
      yield Unusable(f'{path}:{row}', DAMAGED, f': {damage}')
      continue
    for i in range(batch.num_rows):
      row += 1
      try:
        record, = batch.slice(i, 1).to_pylist()
      except (ValueError, OverflowError) as error:  # bytes that are not UTF-8, a date in 10,000
        yield Unusable(f'{path}:{row}', DAMAGED, f': {error}')
        continue
      yield fields.read(record, f'{path}:{row}', fields)


def _open_parquet(file) -> _Table:
  from pyarrow import parquet
  table = parquet.ParquetFile(file, buffer_size=CHUNK, pre_buffer=False,
                              page_checksum_verification=True)
  return _Table(table.schema_arrow, lambda columns: table.iter_batches(
      _ROWS, columns=columns, use_threads=False))


def _open_arrow(file) -> _Table:
  import pyarrow as pa
  if file.read(6) == b'ARROW1':
    reader = pa.ipc.open_file(file)
    return _Table(reader.schema, lambda _: map(
        reader.get_batch, range(reader.num_record_batches)))
  file.seek(0)
  reader = pa.ipc.open_stream(file)
  return _Table(reader.schema, lambda _: reader)


def _check_columns(path: str, schema, fields: Fields) -> tuple[list[str], list[str]]:
  """The names on the way to the text and to the id; [] if there is no id."""
  columns = {'.'.join(names): (names, kind) for names, kind in _columns([], schema)}
  columns |= {name: ([name], schema.field(name).type) for name in schema.names}
  check_columns(path, fields, columns)
  names, kind = columns[fields.text]
  if hasattr(kind, 'index_type'):  # a dictionary
    kind = kind.value_type
  if str(kind) not in _TEXT:
    way = ('Set text_field to a column of text, or join the items of each list into one text.'
           if hasattr(kind, 'value_type') else 'Set text_field.')
    raise UsageError(f'{path}: column {fields.text!r} holds {kind}, not text; '
                     f'{names_of(columns)}. {way}')
  return names, columns[fields.id][0] if fields.id else []


def _columns(above: list[str], fields: Iterable) -> Iterator[tuple[list[str], Any]]:
  """The names on the way to each column, and its type; those within structs too."""
  for field in fields:
    yield [*above, field.name], field.type
    if type(field.type).__name__ == 'StructType':
      yield from _columns([*above, field.name], field.type)


def _column(batch, names: list[str]):
  """A column of a batch, with the codes of a dictionary replaced by their values."""
  from pyarrow import compute
  column = batch.column(names[0])
  if len(names) > 1:
    # Null where one of its parents is.
    column = compute.struct_field(column, names[1:])  # pyright: ignore[reportAttributeAccessIssue]
  return column.dictionary_decode() if hasattr(column, 'dictionary_decode') else column


def _from_row(text, identity, place: str, text_field: str) -> Document | Unusable:
  if not text.is_valid:
    return Unusable(place, NO_TEXT, f' {text_field!r} but null')
  raw = text.as_buffer()  # without a copy
  if raw.size > records.MAX_BYTES:
    return too_long(place)
  decoded = utf8(raw.to_pybytes(), place)
  if isinstance(decoded, Unusable):
    return decoded
  try:
    name = '' if identity is None else id_text(identity.as_py())
  except (ValueError, OverflowError) as error:
    return Unusable(place, DAMAGED, f' in its id: {error}')
  return Document(decoded, name, place)
