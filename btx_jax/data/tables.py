"""Records of Parquet and Arrow files."""

from collections.abc import Iterable, Iterator
import dataclasses
from typing import Any

from btx_jax.data import records
from btx_jax.data.records import (
  DAMAGED,
  NO_TEXT,
  Document,
  Fields,
  Unusable,
  id_text,
  names_of,
  no_column,
  too_long,
  utf8,
)
from btx_jax.data.streams import CHUNK
from btx_jax.errors import UsageError

_ROWS = 64  # in memory at a time
_TEXT = ('string', 'large_string', 'string_view', 'binary', 'large_binary', 'binary_view')


def read_parquet(path: str, fields: Fields) -> Iterator[Document | Unusable]:
  """The rows of a Parquet file.

  Raises:
    UsageError: the file lacks these columns, or pyarrow is not installed.
  """
  pa, parquet = _packages(path)
  count = _Count()
  with open(path, 'rb') as file:
    try:
      table = parquet.ParquetFile(file, buffer_size=CHUNK, pre_buffer=False,
                                  page_checksum_verification=True)
      names = _check_columns(path, table.schema_arrow, fields)
      columns = list(dict.fromkeys('.'.join(name) for name in names if name))
      batches = table.iter_batches(_ROWS, columns=columns, use_threads=False)
      yield from _rows(path, batches, names, fields, count)
    except (pa.ArrowException, OSError) as error:  # the file itself was opened above
      yield count.damage(path, error)


def read_arrow(path: str, fields: Fields) -> Iterator[Document | Unusable]:
  """The rows of an Arrow file, or of a file that holds an Arrow stream.

  Raises:
    UsageError: the file lacks these columns, or pyarrow is not installed.
  """
  pa, _ = _packages(path)
  count = _Count()
  with open(path, 'rb') as file:
    try:
      if file.read(6) == b'ARROW1':
        reader = pa.ipc.open_file(file)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
      else:
        file.seek(0)
        batches = reader = pa.ipc.open_stream(file)
      names = _check_columns(path, reader.schema, fields)
      yield from _rows(path, batches, names, fields, count)
    except (pa.ArrowException, OSError) as error:
      yield count.damage(path, error)


def _packages(path: str):
  """pyarrow and pyarrow.parquet."""
  try:
    import pyarrow as pa
    from pyarrow import parquet
  except ImportError as error:
    raise UsageError(f"{path}: Parquet and Arrow files need the package 'pyarrow': "
                     "pip install 'btx_jax[parquet]'") from error
  return pa, parquet


@dataclasses.dataclass
class _Count:
  """How many rows of a file were read."""
  rows: int = 0

  def damage(self, path: str, error: Exception) -> Unusable:
    """That the rows behind them cannot be read."""
    return Unusable(f'{path}:{self.rows + 1}' if self.rows else path, DAMAGED, f': {error}')


def _rows(path: str, batches: Iterable, names: tuple[list[str], list[str]], fields: Fields,
          count: _Count) -> Iterator[Document | Unusable]:
  """The records of batches of rows; `names`: see _check_columns."""
  for batch in batches:
    texts, ids = (_column(batch, name) for name in (names[0], names[1] or names[0]))
    for text, identity in zip(texts, ids):
      count.rows += 1
      yield _from_row(text, identity if fields.id else None, f'{path}:{count.rows}', fields.text)


def _check_columns(path: str, schema, fields: Fields) -> tuple[list[str], list[str]]:
  """The names on the way to the text and to the id; [] if there is no id."""
  columns = {'.'.join(names): (names, kind) for names, kind in _columns([], schema)}
  columns |= {name: ([name], schema.field(name).type) for name in schema.names}
  for key, name in (('text_field', fields.text), ('id_field', fields.id)):
    if name not in columns and (name or key == 'text_field'):
      raise no_column(path, key, name, columns)
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
    column = compute.struct_field(column, names[1:])  # null where one of its parents is
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
  return Document(decoded, '' if identity is None else id_text(identity.as_py()), place)
