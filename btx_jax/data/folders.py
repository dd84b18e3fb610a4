"""The files that a path of a domain names, and those in a data folder that are not data."""

from collections.abc import Iterable, Iterator
import os
import re
from typing import NamedTuple

from btx_jax.data import formats
from btx_jax.files import places

HIDDEN, ABOUT, BROKEN_LINK = 'hidden', 'not data', 'broken link'

# Beside files of records, these describe them, and nobody would call them the text of the domain.
_ABOUT = re.compile(
    r'(readme([._-].*)?|(licen[cs]e|copying|notice|citation|changelog|contributing|authors)'
    r'([.-].*)?)(?<!\.json)'
    r'|(dataset_?infos?|dataset_dict|state|croissant|stats|index)\.json'
    r'|_(success|metadata|common_metadata|(committed|started)_.*)'  # of Spark and Databricks
    r'|(md5|sha1|sha256|sha512|check)sums?(\.txt)?|manifest(\.txt)?'
    r'|.*\.(md5|sha1|sha256|sha512|crc|asc|sig|lock|tmp|part|partial|incomplete|crdownload)'
    r'|.*~|thumbs\.db|desktop\.ini', re.IGNORECASE)
# Folders of which nothing is data.
_ABOUT_FOLDERS = ('_temporary', '_delta_log', '__MACOSX')
_RECORDS = ('.jsonl', '.ndjson', '.jsonlines', '.parquet', '.arrow', '.arrayrecord',
            '.array_record', '.csv', '.tsv')
_DATA = (*_RECORDS, '.json', '.txt', '.text', '.md')


class LeftOut(NamedTuple):
  """A file or folder that a path names, but that is not read: HIDDEN, ABOUT or BROKEN_LINK."""
  path: str
  reason: str


class Found(NamedTuple):
  """What a path of a domain names.

  Attributes:
    files: those that are read, in order.
    left_out: what is not.
    explicit: whether the path is that of a single file, or a pattern for names of files like
      '*.json', rather than a folder or a pattern for all that is in one.
  """
  files: list[str]
  left_out: list[LeftOut]
  explicit: bool


def find(path: str) -> Found:
  """The files that a path names: a file, a folder with everything below it, or a pattern.

  A path that exists as it is written is not a pattern. In a folder, hidden files are left out, and
  so is what only describes the records beside it or below it, like README.md or _SUCCESS.
  """
  path = os.path.expanduser(path)
  place = places.of(path)
  if place.is_file(path):
    return Found([path], [], True)
  if place.is_folder(path):
    below, explicit = path.rstrip(os.sep), False
    names = place.all_below(below)
  else:
    names = place.matching(path)
    below, explicit = '', bool(os.path.basename(path).strip('*'))
  hidden = dict.fromkeys(_hidden(names, below)) if below else {}
  if hidden:
    names = [name for name in names if name not in hidden and not _is_below(name, hidden)]
  files, broken = place.files_and_broken_links(names)
  left_out = [*(LeftOut(name, HIDDEN) for name in hidden),
              *(LeftOut(name, BROKEN_LINK) for name in broken)]
  about = _about_records(files)
  left_out.extend(LeftOut(name, ABOUT) for name in about)
  return Found([name for name in files if name not in about], left_out, explicit)


def is_data(path: str) -> bool:
  """Whether the name of a file says that it holds text or records."""
  name = os.path.basename(path)
  return formats.ending(path) in _DATA or formats.ending(path) != os.path.splitext(name)[1].lower()


def _hidden(names: Iterable[str], below: str) -> Iterator[str]:
  """The hidden files and folders below a folder, without those within hidden folders."""
  for name in sorted(names):
    inside = name[len(below):]
    if f'{os.sep}.' in inside:
      *folders, last = inside.split(os.sep)
      if last.startswith('.') and not any(part.startswith('.') for part in folders):
        yield name


def _is_below(name: str, folders: Iterable[str]) -> bool:
  return any(parent in folders for parent in _parents(name))


def _parents(name: str) -> Iterator[str]:
  """The folders that a file is in, the nearest first."""
  while (parent := os.path.dirname(name)) != name:
    yield parent
    name = parent


def _about_records(files: list[str]) -> dict[str, None]:
  """Those of the files that describe files of records beside them or below."""
  endings = {name: formats.ending(name) for name in files}
  about = {name: None for name, ending in endings.items() if ending not in _RECORDS and (
      _ABOUT.fullmatch(os.path.basename(name))
      or any(f'{os.sep}{folder}{os.sep}' in name for folder in _ABOUT_FOLDERS))}
  if not about:
    return {}
  holders = [name for name, ending in endings.items() if ending in _RECORDS]
  json = [name for name, ending in endings.items() if ending == '.json' and name not in about]
  # Among other files, .json is as likely the settings of a program; compressed, it is records.
  alone = len(json) + len(about) == len(files)
  holders += [name for name in json if alone or not name.lower().endswith('.json')]
  folders = {parent for name in holders for parent in _parents(name)}
  return {name: None for name in about if os.path.dirname(name) in folders or any(
      os.path.basename(parent) in _ABOUT_FOLDERS and os.path.dirname(parent) in folders
      for parent in _parents(name))}
