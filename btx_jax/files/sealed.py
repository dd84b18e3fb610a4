"""JSON files with a checksum of their content, so that damage is noticed when they are read."""

from collections.abc import Mapping
import functools
import hashlib
import json
from typing import Any

from btx_jax.files import inputs, writing
from btx_jax.terminal import say

_KEY = 'checksum'
_MARK = 'has_checksum'  # so that damage to the key above does not make a file one without checksum


def write(path: str, content: Mapping[str, Any], indent: int | None = 1) -> None:
  """Replaces a JSON file by `content` as plain data, with its checksum."""
  # As it is read back: tuples become lists, and numbers that are keys become strings.
  plain = json.loads(json.dumps({key: content[key] for key in content if key != _KEY}))
  plain[_MARK] = True
  with writing.replacing(path) as file:
    json.dump({**plain, _KEY: _checksum(plain)}, file, indent=indent)


def read(path: str) -> Any:
  """The content of a JSON file.

  A file without a checksum is from an earlier version, and is read as it is.

  Raises:
    OSError: the file cannot be read.
    ValueError: it is not JSON, or its content does not match its checksum.
  """
  found = inputs.read_json(path)
  if not isinstance(found, dict) or not {_KEY, _MARK} & found.keys():
    return found
  expected = found.pop(_KEY, '')
  if _checksum(found) != expected:
    raise ValueError('its content does not match its checksum')
  found.pop(_MARK, None)
  return found


def read_or_empty(path: str) -> dict[str, Any]:
  """The content of a JSON file that may be deleted; {} if it does not exist or is damaged."""
  try:
    found = read(path)
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


def read_if_sound(path: str, stage: str = '') -> dict[str, Any]:
  """The content of a JSON file with scores; {} if it does not exist or is damaged.

  A damaged file gets one warning: its scores can be measured again.

  Args:
    path: the file.
    stage: the stage of the run that its scores must be of, if it names one: a file of an earlier
      version does not, and another's may have taken its place.
  """
  try:
    found = read(path)
    if not isinstance(found, dict):
      raise ValueError('it does not hold an object')
    if stage and found.get('stage', stage) != stage:
      raise ValueError(f'its scores are those of the stage {found["stage"]!r}')
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as error:
    _warn(f'{path} is damaged ({error}). Its scores count as missing: train, or evaluate for '
          'tasks, writes it again.')
    return {}
  return found


@functools.cache
def _warn(text: str) -> None:
  say(f'warning: {text}')


def _checksum(content: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
