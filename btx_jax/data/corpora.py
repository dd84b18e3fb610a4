"""Documents of a domain: from its files in order, or from a source of the demo.

Unusable records are skipped, and counted by reason. Too large a share of them is an error, since
the config is then probably wrong for this text.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import glob
import os
from typing import NamedTuple

from btx_jax import errors
from btx_jax.data import demo, formats
from btx_jax.data.formats import Document, Unusable
from btx_jax.errors import UsageError, nearest

_CHECK_AFTER = 100  # records: a wrong config fails here, not after a whole corpus
_EXAMPLES = 3  # places named for each reason


class Domain(NamedTuple):
  """Where the text of a domain comes from.

  Attributes:
    name: the domain's name.
    source: 'files', or a key of demo.SOURCES.
    paths: directories, globs or files, if the source is 'files'.
    text_field: the JSON field or Parquet column that holds the text.
    separator: splits a plain text file into documents; if '', a file is one document.
    id_field: the field or column that holds a document's id; '' if there is none.
  """
  name: str
  source: str = 'files'
  paths: tuple[str, ...] = ()
  text_field: str = 'text'
  separator: str = ''
  id_field: str = ''


@dataclasses.dataclass
class Tally:
  """Counts of the records of a domain read so far.

  Attributes:
    documents: number of documents, without empty ones.
    identified: number of documents with an id.
    reasons: number of skipped records by reason.
    first: the first skipped records of each reason: place and reason.
  """
  documents: int = 0
  identified: int = 0
  reasons: dict[str, int] = dataclasses.field(default_factory=dict)
  first: list[str] = dataclasses.field(default_factory=list)

  @property
  def skipped(self) -> int:
    return sum(self.reasons.values())

  def skip(self, record: Unusable):
    count = self.reasons[record.reason] = self.reasons.get(record.reason, 0) + 1
    if count <= _EXAMPLES:
      self.first.append(str(record))


def from_config(domains: Mapping[str, Mapping]) -> list[Domain]:
  """The domains of a config, sorted by name.

  Raises:
    UsageError: a source does not exist, or a domain of files has no paths.
  """
  result = []
  for name, fields in sorted(domains.items()):
    domain = Domain(name, **{**fields, 'paths': tuple(fields['paths'])})
    valid = ('files', *demo.SOURCES)
    if domain.source not in valid:
      raise UsageError(f'domains.{name}.source = {domain.source!r} is not a source; '
                       f'{nearest(domain.source, valid)}')
    if domain.source == 'files' and not domain.paths:
      raise UsageError(f'domains.{name}.paths is empty; name a directory, a glob or files.')
    result.append(domain)
  return result


def documents(domain: Domain, max_skipped: float = 0.1,
              tally: Tally | None = None) -> Iterator[Document]:
  """The documents of a domain in a fixed order, without empty ones.

  Args:
    domain: where they come from.
    max_skipped: the largest share of records that may be unusable.
    tally: is updated with each record.

  Raises:
    UsageError: a file does not exist or cannot be opened, too many records are unusable, there
      is no text at all, or no document has an id although id_field is set.
  """
  tally = tally or Tally()
  for record in _records(domain):
    if isinstance(record, Unusable):
      tally.skip(record)
      if tally.skipped >= _CHECK_AFTER:
        _check_skipped(domain, tally, max_skipped)
    elif record.text.strip():
      tally.documents += 1
      tally.identified += bool(record.id)
      if tally.documents == _CHECK_AFTER:
        _check_ids(domain, tally)
      yield record
  if not tally.documents:
    raise UsageError(f'domains.{domain.name} is empty: there is no text in '
                     f'{", ".join(domain.paths) or domain.source}.{_why(domain, tally)}')
  _check_skipped(domain, tally, max_skipped)
  _check_ids(domain, tally)


def _records(domain: Domain) -> Iterator[Document | Unusable]:
  if domain.source != 'files':
    for number, text in enumerate(demo.SOURCES[domain.source](), 1):
      yield Document(text, place=f'{domain.source}:{number}')
    return
  for path in _files(domain):
    try:
      with errors.about(f'domains.{domain.name}'):
        yield from formats.read(path, domain.text_field, domain.id_field, domain.separator)
    except OSError as error:
      raise UsageError(f'domains.{domain.name}: {path} cannot be read: {error}') from error


def _check_skipped(domain: Domain, tally: Tally, max_skipped: float):
  unusable = tally.skipped - tally.reasons.get(formats.EMPTY, 0)  # empty files are harmless
  count = tally.documents + unusable
  if unusable > max_skipped * count:
    raise UsageError(
        f'domains.{domain.name}: {unusable} of the {count} records read so far cannot be '
        f'used, more than the share data.max_skipped = {max_skipped:g}.{_why(domain, tally)} '
        'To continue without them, raise data.max_skipped.')


def _check_ids(domain: Domain, tally: Tally):
  if domain.id_field and not tally.identified:
    raise UsageError(
        f'domains.{domain.name}.id_field = {domain.id_field!r}: none of the first '
        f"{tally.documents} documents has one. Set it to the field of the id, or to '' if "
        'there is none (plain text has none).')


def _why(domain: Domain, tally: Tally) -> str:
  """The first skipped records and how to make them usable, or '' if none was skipped."""
  if not tally.skipped:
    return ''
  ways = {
      formats.NO_TEXT: f'set domains.{domain.name}.text_field to the field that holds the text',
      formats.TOO_LONG: f'split plain text into documents by domains.{domain.name}.separator '
                        '(for example a blank line)',
      formats.NOT_UTF8: 'convert the text to UTF-8',
  }
  ways = [way for reason, way in ways.items() if reason in tally.reasons]
  ways.append(f'repair the files, or narrow domains.{domain.name}.paths to the text files')
  more = tally.skipped - len(tally.first)
  return ' Skipped:' + ''.join(f'\n  {line}' for line in tally.first) + (
      f'\n  and {more} more' if more else '') + f'\nTo use them, {"; ".join(ways)}.'


def describe(domain: Domain) -> str:
  """The number of files and bytes, so that changed text is noticed; or the name of the source.

  Raises:
    UsageError: a path matches no file.
  """
  if domain.source != 'files':
    return domain.source
  files = _files(domain)
  return f'{len(files)} files, {sum(map(os.path.getsize, files))} bytes'


def _files(domain: Domain) -> Sequence[str]:
  found = []
  for path in domain.paths:
    if os.path.isdir(path):
      names = glob.glob(os.path.join(glob.escape(path), '**', '*'), recursive=True)
    else:
      names = glob.glob(path, recursive=True)
    files = sorted(name for name in names if os.path.isfile(name))
    if not files:
      raise UsageError(f'domains.{domain.name}.paths: {path!r} matches no file (looked from '
                       f'{os.getcwd()}).')
    found.extend(files)
  return list(dict.fromkeys(found))
