"""Whether two working directories hold the same results."""

from collections.abc import Iterator
import contextlib
import json
import os
from typing import Any

import tensorstore as ts

# What may differ: times, speed, memory, the commits of the code, and checksums over these.
EXCLUDED_FIELDS = frozenset((
    'time', 'tokens_per_second', 'mfu', 'input_wait', 'memory',  # of metrics.jsonl
    'seconds', 'started', 'saved', 'updated', 'versions', 'earlier_versions',  # of manifests
    'checkpoint_age', 'seconds_left', 'device_seconds',  # of report.json
    'checksum',  # of a JSON file; its other fields are compared
    'metrics',  # of a checkpoint: the size and the checksum of metrics.jsonl, which has times
    'unevaluated'))  # of a checkpoint: whether SIGTERM put its evaluation off, to be made up for
# Process ids; times of files; a page and a picture with times, whose figures are in report.json.
EXCLUDED_FILES = ('lock', 'files.jsonl', 'checked.json', 'report.html', 'graph.png')
_POSITION, _EXCLUDED_ARRAYS = 'data/json', ('sums/data',)  # JSON with `metrics`; its checksum


def differences(expected: str, found: str, inside: tuple[str, ...] = ('',)) -> list[str]:
  """What differs between two working directories: 'KIND: file, and where in it', sorted.

  A kind is one of the first part of a path in a working directory (`data`, `report`), or for the
  files of runs `metrics`, `scores`, `manifest`, `checkpoints`, and `left` for files that only
  `found` has, or else `files`. Only paths that begin with one of `inside` are compared.
  """
  names, others = ({path for path in _names(workdir) if path.startswith(inside)}
                   for workdir in (expected, found))
  return sorted([f'{kind_of(path)}: {path}{where}' for path, where in _differences(
      expected, found, names)] + [f'left: {path}' for path in others - names])


def kind_of(path: str) -> str:
  """The kind of a file, by its path in a working directory."""
  parts = path.split(os.sep)
  name = parts[-1]
  if parts[0] in ('data', 'report'):
    return parts[0]
  if 'checkpoints' in parts:
    return 'checkpoints'
  if name == 'metrics.jsonl':
    return 'metrics'
  if name == 'manifest.json':
    return 'manifest'
  return 'scores' if name.startswith('evaluation') else 'files'


def _names(workdir: str) -> set[str]:
  """The files of a working directory, and of its checkpoints the folders of the steps."""
  result = set()
  for root, folders, names in os.walk(workdir):
    inside = os.path.relpath(root, workdir)
    if os.path.basename(root) == 'checkpoints':
      result |= {os.path.normpath(os.path.join(inside, name)) for name in folders + names}
      folders.clear()
      continue
    result |= {os.path.normpath(os.path.join(inside, name)) for name in names
               if name not in EXCLUDED_FILES}
  return result


def _differences(expected: str, found: str, names: set[str]) -> Iterator[tuple[str, str]]:
  for path in sorted(names):
    one, other = os.path.join(expected, path), os.path.join(found, path)
    if not os.path.exists(other):
      yield path, ' is missing'
    elif os.path.isdir(one):
      for place in sorted(_of_trees(_arrays(one), _arrays(other))):
        yield path, f' {place}'
    elif path.endswith(('.json', '.jsonl')):
      for place in _of_values(_read(one), _read(other)):
        yield path, f' {place}'
    elif not _equal_bytes(one, other):
      yield path, ''


def _arrays(folder: str) -> dict[str, Any]:
  """All arrays and numbers of a checkpoint, by item and path, however they were sharded."""
  result = {}
  for item in sorted(os.listdir(folder)):
    if os.path.isdir(os.path.join(folder, item)):
      store = {'driver': 'ocdbt', 'base': f'file://{os.path.abspath(folder)}/{item}/'}
      for key in ts.KvStore.open(store).result().list().result():
        name, _, file = key.decode().rpartition('/')
        if file == 'zarr.json':
          result[f'{item}/{name}'] = ts.open(
              {'driver': 'zarr3', 'kvstore': store | {'path': f'{name}/'}}, open=True
          ).result()[...].read().result()
  return result


def _of_trees(one: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
  for path in (one.keys() | other.keys()) - {*_EXCLUDED_ARRAYS}:
    if path not in one or path not in other:
      yield f'{path} is only in {"the reference" if path in one else "this one"}'
    elif path == _POSITION:
      yield from _of_values(*(json.loads(arrays[path].tobytes()) for arrays in (one, other)), path)
    elif one[path].tobytes() != other[path].tobytes():
      yield path


def _read(path: str) -> Any:
  """The values of a JSON file, or of each line."""
  with open(path, encoding='utf-8') as file:
    if not path.endswith('.jsonl'):
      return json.load(file)
    lines = []
    for line in file:
      with contextlib.suppress(ValueError):  # as a kill leaves it
        lines.append(json.loads(line))
    return lines


def _of_values(one: Any, other: Any, at: str = '') -> Iterator[str]:
  """The places at which two JSON values differ, in fields that are not excluded."""
  if isinstance(one, dict) and isinstance(other, dict):
    for key in sorted((one.keys() | other.keys()) - EXCLUDED_FIELDS):
      if key not in one or key not in other:
        yield f'{at}.{key} is only in {"the reference" if key in one else "this one"}'
      else:
        yield from _of_values(one[key], other[key], f'{at}.{key}')
  elif isinstance(one, list) and isinstance(other, list):
    if len(one) != len(other):
      yield f'{at} has {len(other)} entries instead of {len(one)}'
    for i, pair in enumerate(zip(one, other)):
      yield from _of_values(*pair, f'{at}[{i}]')
  elif one != other and not (one != one and other != other):  # NaN equals NaN here
    yield at


def _equal_bytes(one: str, other: str) -> bool:
  with open(one, 'rb') as a, open(other, 'rb') as b:
    return a.read() == b.read()
