"""Documents of a domain: its files in order, or text that Python packages carry.

A record that cannot be used is skipped, and counted by reason. More than a share of them is an
error, since then it is rather the config that does not fit the text.
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

_ENOUGH = 100  # records, to tell that a config does not fit before all has been read
_PLACES = 3  # that are named of each reason


class Domain(NamedTuple):
  """Where the text of a domain comes from.

  Attributes:
    name: of the domain.
    source: 'files', or one of demo.SOURCES.
    paths: of 'files': directories, globs or files.
    text_field: the field of a JSON record, or the column, that holds the text.
    separator: cuts a plain text file into documents; '' leaves it one document.
    id_field: the field or column that holds the id of the document; '' is none.
  """
  name: str
  source: str = 'files'
  paths: tuple[str, ...] = ()
  text_field: str = 'text'
  separator: str = ''
  id_field: str = ''


@dataclasses.dataclass
class Tally:
  """What became of the records of a domain so far.

  Attributes:
    documents: that there were; empty ones do not count.
    identified: those of them that have an id.
    reasons: why others were skipped, and how many.
    first: the first places of each reason, with the reason.
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
    if count <= _PLACES:
      self.first.append(str(record))


def from_config(domains: Mapping[str, Mapping]) -> list[Domain]:
  """The domains of a config by name. Raises UsageError for a source that does not exist."""
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
  """The documents of a domain in a fixed order; empty ones are left out.

  Args:
    domain: where they come from.
    max_skipped: the largest share of records that may be unusable.
    tally: where to count.

  Raises:
    UsageError: a file that does not exist or cannot be opened, too many unusable records, no
      text at all, no ids where an id_field is set.
  """
  tally = tally or Tally()
  for record in _records(domain):
    if isinstance(record, Unusable):
      tally.skip(record)
      if tally.skipped >= _ENOUGH:
        _check_skipped(domain, tally, max_skipped)
    elif record.text.strip():
      tally.documents += 1
      tally.identified += bool(record.id)
      if tally.documents == _ENOUGH:
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
  unusable = tally.skipped - tally.reasons.get(formats.EMPTY, 0)  # empty files do no harm
  count = tally.documents + unusable
  if unusable > max_skipped * count:
    raise UsageError(
        f'domains.{domain.name}: {unusable} of the {count} records read so far cannot be '
        f'used, more than the share data.max_skipped = {max_skipped:g}.{_why(domain, tally)} '
        'Or go on without them: raise data.max_skipped.')


def _check_ids(domain: Domain, tally: Tally):
  if domain.id_field and not tally.identified:
    raise UsageError(
        f'domains.{domain.name}.id_field = {domain.id_field!r}: none of the first '
        f"{tally.documents} documents has one. Set it to the field of the id, or to '' if "
        'there is none (plain text has none).')


def _why(domain: Domain, tally: Tally) -> str:
  """The first places of what was skipped, and what to do about it; '' if nothing was."""
  if not tally.skipped:
    return ''
  ways = {
      formats.NO_TEXT: f'set domains.{domain.name}.text_field to the field that holds the text',
      formats.TOO_LONG: f'cut plain text into documents by domains.{domain.name}.separator (for '
                        'example a blank line)',
      formats.NOT_UTF8: 'convert the text to UTF-8',
  }
  ways = [way for reason, way in ways.items() if reason in tally.reasons]
  ways.append(f'repair the files, or narrow domains.{domain.name}.paths to those that are text')
  more = tally.skipped - len(tally.first)
  return ' Skipped:' + ''.join(f'\n  {line}' for line in tally.first) + (
      f'\n  and {more} more' if more else '') + f'\nTo use them, {"; ".join(ways)}.'


def describe(domain: Domain) -> str:
  """How many files and bytes there are; tells text that has changed from text that has not.

  Raises:
    UsageError: there are no such files.
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
