"""The origin of a domain's tokens, and how the config or the files have changed since, in words.

    DIR/meta.json     `made_from` has the settings, and the number and size of the files
    DIR/files.jsonl   for each file [path, bytes, time stamp in nanoseconds, hash of its first and
                      last bytes]; token folders from older versions lack it
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import hashlib
import json
import os
from typing import Any

from btx_jax.data.damage import Damaged
from btx_jax.errors import UsageError
from btx_jax.files import inputs, places
from btx_jax.files.writing import create

FILES = 'files.jsonl'
_ENDS = 1 << 20  # bytes compared at each end of a file
_NAMED = 3  # the most files of a domain that a message names
_FRAMING = {'begin': 'tokenizer.bos', 'end': 'tokenizer.eos', 'special': 'tokenizer.special',
            'chat_template': 'the chat template (tokenizer.chat_template)'}


def write(folder: str, paths: Iterable[str]) -> None:
  """Records the files of a domain in the folder of its tokens."""
  with create(os.path.join(folder, FILES)) as file:
    for path in paths:
      found = os.stat(places.local(path))
      line = [path, found.st_size, places.of(path).stamp(path), _hash(path)]
      file.write(json.dumps(line) + '\n')


def is_noted(folder: str) -> bool:
  """Whether the files of a domain are recorded; if not, `made_from` has their number and size."""
  return places.exists(os.path.join(folder, FILES))


def differences(folder: str, name: str, was: Mapping[str, Any], now: Mapping[str, Any],
                paths: Sequence[str]) -> Iterator[str]:
  """Yields a clause for each difference between what the tokens were made from and the config.

  Args:
    folder: the folder with the domain's tokens.
    name: the name of the domain.
    was: `made_from` of the folder's meta.json.
    now: the same for the config. Keys that it lacks are not compared.
    paths: the files now. If there are none, the files are not compared: the tokens suffice.
  """
  try:
    before = {path: tuple(facts) for path, *facts in _lines(folder)}
  except (ValueError, TypeError) as error:
    raise Damaged(folder, FILES, str(error)) from error
  for key, value in now.items():
    then = was.get(key)
    if then == value:
      continue
    if key == 'tokenizer':
      yield 'the tokenizer was a different one'
    elif key in ('text', 'held_out_text'):
      yield f'the text was {then} and is {value} now'
    elif isinstance(value, Mapping) and isinstance(then, Mapping):
      for field in sorted(then.keys() | value.keys()):
        old, new = (each.get(field, '') for each in (then, value))
        if old != new:
          shown = _FRAMING[field] if key == 'framing' else f'domains.{name}.{field}'
          yield f'{shown} was {old!r} and is {new!r} now'
    else:
      where = f'domains.{name}' if isinstance(value, list) or isinstance(then, list) else 'data'
      yield f'{where}.{key} was {then!r} and is {value!r} now'
  if before and paths and all(was.get(key) == now.get(key) for key in ('domain', 'held_out')):
    yield from _of_files(before, paths)


def check(folder: str, found: Mapping[str, Iterable[str]]) -> None:
  """Raises UsageError if there are differences.

  Args:
    folder: the folder with the tokens of all domains.
    found: the differences of each domain.
  """
  lines, concerned = list(in_words(found)), [name for name, clauses in found.items() if clauses]
  if lines:
    folders = ', '.join(os.path.join(folder, name) for name in concerned)
    raise UsageError(
        f'{folder} was made from another config:\n' + '\n'.join(f'  {line}' for line in lines) +
        '\nTo train on other text, give it a domain of another name, or use another --workdir; or '
        f'delete {folders} if no run needs what is there: no run needs text that is only '
        'measured.')


def in_words(found: Mapping[str, Iterable[str]]) -> Iterator[str]:
  """A line for each difference, with all domains that it concerns."""
  domains: dict[str, list[str]] = {}
  for name, clauses in found.items():
    for clause in clauses:
      domains.setdefault(clause, []).append(name)
  for clause, names in domains.items():
    yield f'{", ".join(names)}: {clause}'


def _of_files(before: Mapping[str, tuple], paths: Sequence[str]) -> Iterator[str]:
  """How the files of a domain have changed; `before` has their recorded facts by path."""
  clauses = [clause for path in paths if (clause := _of_file(path, before.get(path)))]
  clauses += [f'{path} is gone' for path in sorted(before.keys() - set(paths))]
  yield from clauses[:_NAMED]
  if len(clauses) > _NAMED:
    yield f'{len(clauses) - _NAMED:,} more files have changed'


def _of_file(path: str, before: tuple[int, int, str] | None) -> str:
  """How a file has changed; '' if it has not."""
  if before and places.of(path).is_same(path, before[0], before[1]):
    return ''
  found = os.stat(places.local(path))
  if before is None:
    return f'{path} is new, with {found.st_size:,} bytes'
  size, _, content = before
  if found.st_size != size:
    return f'{path} had {size:,} bytes and has {found.st_size:,} now'
  if _hash(path) != content:
    return f'{path} has different content of the same size'
  return ''


def _lines(folder: str) -> Iterator[list[Any]]:
  try:
    with inputs.open_file(os.path.join(folder, FILES)) as file:
      yield from map(json.loads, file)
  except FileNotFoundError:
    return


def _hash(path: str) -> str:
  """A hash of the beginning and the end of a file."""
  here = places.local(path)
  with open(here, 'rb') as file:
    digest = hashlib.sha256(file.read(_ENDS))
    file.seek(max(os.path.getsize(here) - _ENDS, 0))
    digest.update(file.read(_ENDS))
  return digest.hexdigest()[:16]
