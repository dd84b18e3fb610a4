"""Documents of a domain: from its files in order, or from a source of the demo.

Unusable records are skipped, and counted by reason. Too large a share of them is an error, since
the config is then probably wrong for this text.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import os
from typing import Any

from btx_jax import errors
from btx_jax.data import chats, demo, folders, formats, records
from btx_jax.data.domains import Domain
from btx_jax.data.folders import LeftOut
from btx_jax.data.records import Document, Reader, Unusable
from btx_jax.errors import UsageError
from btx_jax.files import git_lfs, places

_CHECK_AFTER = 100  # records: a wrong config fails here, not after a whole corpus
_EXAMPLES = 3  # places named for each reason
_MOST_GROUPS = 100  # of files of one ending
# Why a whole file is left out, which is not held against the domain; and that in a table.
_WHOLE_FILES = {records.EMPTY: 'empty', records.NO_RECORDS: 'no field',
                records.NO_COLUMN: 'no column', records.LFS_POINTER: 'LFS pointer'}
_NAMED = 8  # groups of files that are left out, on one line


@dataclasses.dataclass
class Group:
  """Files of a domain whose names end alike and that were read as the same.

  Attributes:
    name: the name of the file; of several, '*' and their ending.
    kind: what they were read as, or why they were left out, in words.
    is_read: whether they were not left out.
    files: how many.
    documents: documents in them, without empty ones.
    skipped: records in them that are unusable.
  """
  name: str
  kind: str
  is_read: bool
  files: int = 0
  documents: int = 0
  skipped: int = 0


@dataclasses.dataclass
class Tally:
  """Counts of the records of a domain read so far.

  Attributes:
    documents: number of documents, without empty ones.
    identified: number of documents with an id.
    reasons: number of skipped records by reason.
    first: the first skipped records of each reason: place and reason.
    harmless: number of skipped records that are not held against max_skipped.
    groups: what was read as what, and what was left out, by ending and kind.
    plain: number of plain text files.
    separators: how often the separator was found in them.
  """
  documents: int = 0
  identified: int = 0
  reasons: dict[str, int] = dataclasses.field(default_factory=dict)
  first: list[str] = dataclasses.field(default_factory=list)
  harmless: int = 0
  groups: dict[tuple[str, str], Group] = dataclasses.field(default_factory=dict)
  plain: int = 0
  separators: int = 0

  @property
  def skipped(self) -> int:
    return sum(self.reasons.values())

  def skip(self, record: Unusable, harmless: bool = False):
    self.harmless += harmless
    count = self.reasons[record.reason] = self.reasons.get(record.reason, 0) + 1
    if count <= _EXAMPLES:
      self.first.append(str(record))

  def group(self, path: str, kind: str, is_read: bool) -> Group:
    """The group of a file, in which it is now counted; `is_read`: it is not left out."""
    name = os.path.basename(path)
    suffix = formats.suffix(path)
    key = suffix.lower() if is_read else name
    group = self.groups.setdefault(
        (key if len(self.groups) < _MOST_GROUPS else '', kind), Group(name, kind, is_read))
    group.files += 1
    if name != group.name:
      group.name = f'*{suffix}' if key else '*'
    return group

  def read_as(self) -> list[dict]:
    """The groups as plain data, those that were read first."""
    ordered = sorted(self.groups.values(), key=lambda group: not group.is_read)
    return [dataclasses.asdict(group) for group in ordered]

  def notes(self, domain: Domain) -> list[str]:
    """What is odd about how the domain was read, in words."""
    if not domain.separator or self.separators or domain.source != 'files':
      return []
    where = (f'in none of the {self.plain:,} plain text files, so each is one document'
             if self.plain else 'nowhere: only plain text is cut, and there is none')
    return [f'the separator {domain.separator!r} was found {where}']


def summary(tallies: Sequence[Tally]) -> dict[str, Any]:
  """A domain's entries for its meta.json: `skipped` records, and `files` by group."""
  reasons = collections.Counter()
  for tally in tallies:
    reasons.update(tally.reasons)
  return {'skipped': {'count': reasons.total(), 'reasons': dict(reasons),
                      'first': [line for tally in tallies for line in tally.first]},
          'files': [group for tally in tallies for group in tally.read_as()]}


def documents(domain: Domain, max_skipped: float = 0.1, tally: Tally | None = None,
              reader: Reader | None = None) -> Iterator[Document]:
  """The documents of a domain in a fixed order, without empty ones.

  Args:
    domain: where they come from.
    max_skipped: the largest share of records that may be unusable.
    tally: is updated with each record.
    reader: makes documents of records, see formats.read.

  Raises:
    UsageError: a file does not exist or cannot be opened, too many records are unusable, there
      is no text at all, or no document has an id although id_field is set.
  """
  tally = tally if tally is not None else Tally()
  for record in _documents(domain, max_skipped, tally, reader):
    tally.documents += 1
    tally.identified += bool(record.id)
    if tally.documents == _CHECK_AFTER:
      _check_ids(domain, tally)
    yield record
  if not tally.documents:
    raise UsageError(f'domains.{domain.name} is empty: there is no text in '
                     f'{", ".join(domain.paths) or domain.source}.{_why(domain, tally)}')
  with errors.about(f'domains.{domain.name}'):
    _check_skipped(domain, tally, max_skipped)
  _check_ids(domain, tally)


def _documents(domain: Domain, max_skipped: float, tally: Tally, reader: Reader | None
               ) -> Iterator[Document]:
  """The documents of a domain without empty ones; `tally` counts what is skipped."""
  if domain.source != 'files':
    for number, text in enumerate(demo.SOURCES[domain.source](), 1):
      if text.strip():
        yield Document(text, place=f'{domain.source}:{number}')
    return
  found, left_out = _files(domain)
  for name, reason in left_out:
    tally.group(name, reason, is_read=False)
  for path, explicit in found.items():
    try:
      with errors.about(f'domains.{domain.name}'):
        yield from _of_file(domain, path, explicit, max_skipped, tally, reader)
    except OSError as error:
      raise UsageError(f'domains.{domain.name}: {path} cannot be read: {error}') from error


def _of_file(domain: Domain, path: str, explicit: bool, max_skipped: float, tally: Tally,
             reader: Reader | None) -> Iterator[Document]:
  """The documents of a file; `explicit`: it was named, and not only its folder."""
  about, group = formats.Reading(), None
  # Files of a folder need not all be records: settings of one object are left out.
  lone = not explicit and domain.text_field == formats.TEXT_FIELD
  for record in formats.read(path, domain.text_field, domain.id_field, domain.separator, about,
                             lone, reader):
    if isinstance(record, Document):
      group = group or tally.group(path, about.kind, is_read=True)
      if record.text.strip():
        group.documents += 1
        yield record
      continue
    if record.reason == records.LFS_POINTER and (explicit or folders.is_data(path)):
      git_lfs.check_no_pointer(path)
    whole = record.reason in _WHOLE_FILES
    group = group or tally.group(
        path, _WHOLE_FILES[record.reason] if whole else about.kind, is_read=not whole)
    group.skipped += not whole
    tally.skip(record, harmless=whole)
    if tally.skipped >= _CHECK_AFTER:
      _check_skipped(domain, tally, max_skipped)
  tally.plain += about.is_text
  tally.separators += about.separators


def left_out(meta: Mapping) -> list[str]:
  """A line for the files that were not read, or none, from the meta.json of a domain's tokens."""
  groups = [Group(**group) for group in meta.get('files', [])]
  parts = [f'{group.name}{f" ({group.files:,} files)" if group.files > 1 else ""}: '
           f'{group.kind}' for group in groups if not group.is_read]
  more = len(parts) - _NAMED
  return [f'left out: {"; ".join(parts[:_NAMED])}{f"; and {more:,} more" if more > 0 else ""}'
          ] if parts else []


def _check_skipped(domain: Domain, tally: Tally, max_skipped: float):
  unusable = tally.skipped - tally.harmless
  count = tally.documents + unusable
  if unusable > max_skipped * count:
    raise UsageError(
        f'{unusable} of the {count} records read so far cannot be used, more than the share '
        f'data.max_skipped = {max_skipped:g}.{_why(domain, tally)} '
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
  field = f'set domains.{domain.name}.text_field to the field that holds the text'
  ways = {
      records.NO_TEXT: field, records.NO_RECORDS: field, records.NO_COLUMN: field,
      records.TOO_LONG: f'split plain text into documents by domains.{domain.name}.separator '
                        '(for example a blank line)',
      records.NOT_UTF8: 'convert the text to UTF-8',
      records.LIST: 'join the items of each list into one text, or set '
                    f'domains.{domain.name}.text_field to a field that holds text',
      chats.NO_MESSAGES: f'set domains.{domain.name}.text_field to the field of the messages',
  }
  ways = list(dict.fromkeys(way for reason, way in ways.items() if reason in tally.reasons))
  ways.append(
      f'repair the files, or narrow domains.{domain.name}.{domain.field} to the text files')
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
  found = paths(domain)
  return f'{len(found)} files, {sum(os.path.getsize(places.local(each)) for each in found)} bytes'


def paths(domain: Domain) -> list[str]:
  """The files of a domain that are read; empty for a source of the demo.

  Raises:
    UsageError: a path matches no file.
  """
  return list(_files(domain)[0]) if domain.source == 'files' else []


def _files(domain: Domain) -> tuple[dict[str, bool], list[LeftOut]]:
  """The files of a domain, each with whether its name was given, and those left out."""
  result: dict[str, bool] = {}
  left_out = []
  for path in domain.paths:
    found = folders.find(path)
    if not found.files:
      raise UsageError(f'domains.{domain.name}.{domain.field}: {path!r} matches no file (looked '
                       f'from {os.getcwd()}).')
    for name in found.files:
      result[name] = result.get(name, False) or found.explicit
    left_out.extend(found.left_out)
  return result, [each for each in dict.fromkeys(left_out) if each.path not in result]
