"""Documents of a domain, from plain text and JSONL files (either may be .gz)."""

from collections.abc import Iterator, Mapping, Sequence
import glob
import gzip
import json
import os
from typing import NamedTuple
import zlib

from btx_jax.data import demo
from btx_jax.errors import UsageError, nearest


class Domain(NamedTuple):
  """Where the text of a domain comes from.

  Attributes:
    name: of the domain.
    source: 'files', or one of demo.SOURCES.
    paths: of 'files': directories, globs or files.
    text_field: the field of a JSON line that holds the text.
    separator: cuts a plain text file into documents; '' leaves it one document.
  """
  name: str
  source: str = 'files'
  paths: tuple[str, ...] = ()
  text_field: str = 'text'
  separator: str = ''


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


def documents(domain: Domain) -> Iterator[str]:
  """The documents of a domain in a fixed order; empty ones are left out.

  Raises:
    UsageError: no such file, text that is not UTF-8, a broken JSON line, a missing field, no
      text at all.
  """
  if domain.source == 'files':
    texts = (text for path in _files(domain) for text in _read(path, domain))
  else:
    texts = demo.SOURCES[domain.source]()
  empty = True
  for text in texts:
    if text.strip():
      empty = False
      yield text
  if empty:
    raise UsageError(f'domains.{domain.name} is empty: there is no text in '
                     f'{", ".join(domain.paths) or domain.source}.')


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


def _read(path: str, domain: Domain) -> Iterator[str]:
  plain = path.removesuffix('.gz')
  try:
    with (gzip.open if plain != path else open)(path, 'rb') as file:
      if plain.endswith('.jsonl'):
        for number, line in enumerate(file, 1):
          if line.strip():
            yield _json_text(line, f'{path}:{number}', domain)
      else:
        text = _utf8(file.read(), path, domain)
        yield from text.split(domain.separator) if domain.separator else (text,)
  except (OSError, EOFError, zlib.error) as error:
    raise UsageError(f'domains.{domain.name}: {path} cannot be read: {error}') from error


def _json_text(line: bytes, place: str, domain: Domain) -> str:
  try:
    record = json.loads(_utf8(line, place, domain))
  except json.JSONDecodeError as error:
    raise UsageError(f'domains.{domain.name}: {place} is not JSON: {error}') from error
  text = record.get(domain.text_field) if isinstance(record, dict) else None
  if not isinstance(text, str):
    fields = ', '.join(map(repr, record)) if isinstance(record, dict) else 'none'
    raise UsageError(
        f'domains.{domain.name}: {place} has no text in field {domain.text_field!r}; its '
        f'fields: {fields}. Set domains.{domain.name}.text_field.')
  try:
    text.encode('utf-8')
  except UnicodeEncodeError as error:
    raise UsageError(f'domains.{domain.name}: {place} holds half of a surrogate pair '
                     f'(character {error.start}), which is no text; repair the line.') from error
  return text


def _utf8(raw: bytes, place: str, domain: Domain) -> str:
  try:
    return raw.decode('utf-8')
  except UnicodeDecodeError as error:
    raise UsageError(
        f'domains.{domain.name}: {place} is not UTF-8 text (byte {error.start}); convert it, '
        'or narrow the paths to text files.') from error
