"""Damages valid inputs with the structure of the format in mind: trees of JSON, headers, lines,
bytes, and what a path leads to. All choices come from a `random.Random`, so an input is its seed.
"""

from collections.abc import Callable, Mapping
import gzip
import json
import math
import os
import random
import socket
from typing import Any

import numpy as np

ODD_TEXTS = ('', ' ', '\0', '\ud800', '\u2581', 'é', '..', '/', '../x', '/dev/zero', '%s',
             '{{1/0}}', '[/red]', 'nan', 'x' * 100, '\n', '1e999', '<s>', '\x1b[31m', 'a.b', "'",
             '\ufeff')
ODD_NUMBERS = (0, -1, 1, 2, 3, 2**31, 2**53, 2**63, 2**64, 10**9, 10**18, 10**30, -10**9, 0.5, -0.0,
               1e308, -1e308, 1e-320, math.inf, -math.inf, math.nan, True, False)
_DEPTHS = (50, 500, 5_000, 200_000)


class AsIs(random.Random):
  """For a file that is not damaged: what serialises it makes no odd choices."""

  def __new__(cls):
    return super().__new__(cls, 1)

  def __init__(self):
    super().__init__(1)


def odd_value(rng: random.Random) -> Any:
  """A value of any type of JSON."""
  return rng.choice([
      lambda: rng.choice(ODD_TEXTS), lambda: rng.choice(ODD_NUMBERS), lambda: None, dict, list,
      lambda: [rng.choice(ODD_NUMBERS)] * rng.choice((1, 3, 40)),
      lambda: [rng.choice(ODD_TEXTS), None], lambda: {rng.choice(ODD_TEXTS): None},
      lambda: [[]], lambda: [{}], lambda: {'type': rng.choice(ODD_TEXTS)}])()


def _nodes(tree: Any) -> list[tuple[Any, Any]]:
  """(container, key) of every value in a tree, at most 3,000."""
  found, waiting = [], [tree]
  while waiting and len(found) < 3000:
    at = waiting.pop()
    pairs = at.items() if isinstance(at, dict) else enumerate(at) if isinstance(at, list) else ()
    for key, value in pairs:
      found.append((at, key))
      waiting.append(value)
  return found


def damage_tree(tree: Any, rng: random.Random) -> Any:
  """A copy of a tree of JSON in which one thing differs."""
  tree = {'root': json.loads(json.dumps(tree))}
  nodes = _nodes(tree)
  # Values near the root are few and decide most.
  at, key = nodes[min(rng.randrange(len(nodes)), rng.randrange(len(nodes)))]
  value = at[key]
  change = rng.randrange(10)
  if change < 5:
    at[key] = odd_value(rng)
  elif change == 5 and at is not tree:
    del at[key]
  elif change == 6:
    if isinstance(value, dict):
      value[rng.choice(ODD_TEXTS)] = odd_value(rng)
    elif isinstance(value, list):
      value.insert(rng.randrange(len(value) + 1), odd_value(rng))
    else:
      at[key] = [value]
  elif change == 7 and isinstance(value, int | float) and not isinstance(value, bool):
    at[key] = rng.choice((-value, value + 1, value * 1000, value / 3, str(value), value * 10**12))
  elif change == 8:
    other, name = rng.choice(nodes)
    if other is not tree and at is not tree:
      at[key] = json.loads(json.dumps(other[name]))
  elif isinstance(at, dict) and at is not tree:
    at[rng.choice(ODD_TEXTS + tuple(map(str, at)))] = at.pop(key)
  return tree['root']


def to_json(tree: Any, rng: random.Random) -> bytes:
  """Serialises a tree, at times as no library would."""
  text = json.dumps(tree, ensure_ascii=rng.random() < 0.9)
  odd = rng.randrange(60)
  if odd == 0 and isinstance(tree, dict) and tree:  # a key twice
    text = f'{{{json.dumps(rng.choice([*tree]))}: {json.dumps(odd_value(rng))}, {text[1:]}'
  elif odd == 1:  # a value that is too deep for a recursive parser
    depth, (opening, closing) = rng.choice(_DEPTHS), rng.choice(('[]', ('{"a":', '}')))
    place = rng.choice([i for i, c in enumerate(text) if c in ':['] or [0]) + 1
    text = text[:place] + opening * depth + closing * depth + ',' * (text[place - 1] == '[') + (
        text[place:])
  elif odd == 2:
    text = text.replace('1', '1' * 5_000, 1)  # a number of too many digits
  elif odd == 3:
    text = '\ufeff' + text
  elif odd == 4:
    text = text[:rng.randrange(len(text) + 1)]
  return text.encode('utf-8', 'surrogatepass')


def damage_bytes(raw: bytes, rng: random.Random) -> bytes:
  """A copy of bytes with one change: flipped, cut off, left out, doubled or put in between."""
  if not raw:
    return rng.randbytes(rng.randrange(64))
  at = min(rng.randrange(len(raw)), rng.randrange(len(raw)))  # headers come first
  size = rng.choice((1, 1, 2, 4, 8, 100))
  change = rng.randrange(7)
  if change < 2:
    flipped = bytearray(raw)
    flipped[at] ^= 1 << rng.randrange(8)
    return bytes(flipped)
  inside = {2: b'', 3: rng.randbytes(size), 4: raw[at:at + size] * 2,
            5: rng.choice((b'\0' * size, b'\xff' * size, b'\x80', b'"', b'{', b'\r', b'\n\n',
                           b'\xed\xa0\x80', b'[' * 2000, b'9' * 5000))}.get(change)
  return raw[:at] if inside is None else raw[:at] + inside + raw[at + size:]


def safetensors(tree: Any, rng: random.Random, body: bytes = b'') -> bytes:
  """A file of safetensors whose header is this tree."""
  raw = to_json(tree, rng)
  raw += b' ' * (-len(raw) % 8)
  return len(raw).to_bytes(8, 'little') + raw + body


def json_lines(tree: Any, rng: random.Random) -> bytes:
  end = rng.choice((b'\n', b'\n', b'\r\n', b'\r', b'\n\n'))
  return b''.join(to_json(line, rng) + end for line in tree) if isinstance(tree, list) else (
      to_json(tree, rng))


def parquet(tree: Any, rng: random.Random) -> bytes:
  """A Parquet or Arrow file of these records, if they have one schema; else JSON lines."""
  import io

  import pyarrow as pa
  from pyarrow import parquet as pq
  out = io.BytesIO()
  try:
    table = pa.Table.from_pylist(tree)
    if rng.random() < 0.3:
      with pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    else:
      pq.write_table(table, out, compression=rng.choice(('none', 'zstd', 'snappy', 'gzip')))
  except Exception:  # the tree is no longer a table
    return json_lines(tree, rng)
  return out.getvalue()


def csv(tree: Any, rng: random.Random) -> bytes:
  if not isinstance(tree, list):
    return to_json(tree, rng)
  rows = [row if isinstance(row, list) else [row] for row in tree]
  quote = rng.choice(('"', '"', ''))
  return rng.choice(('\n', '\r\n')).join(
      rng.choice(',;\t' if rng.random() < 0.02 else ',').join(
          f'{quote}{cell}{quote}' for cell in row) for row in rows).encode('utf-8', 'replace')


def compressed(raw: bytes, rng: random.Random) -> bytes:
  """The bytes compressed, at times with far more of the same."""
  import bz2
  import lzma

  import zstandard
  bomb = rng.random() < 0.004
  raw = raw + b' ' * (200_000_000 if bomb else 0)
  pack = rng.choice((gzip.compress, bz2.compress, lzma.compress, zstandard.compress)
                    if not bomb else (lambda x: gzip.compress(x, 1), zstandard.compress))
  return pack(raw)


Serialise = Callable[[Any, random.Random], bytes]


def damaged(files: Mapping[str, tuple[Any, Serialise | None]], rng: random.Random,
            irregular: bool = True) -> dict[str, Any]:
  """Damages the files of an input.

  Args:
    files: path -> tree and how it is serialised; or bytes and None.
    rng: makes all choices.
    irregular: whether files may become pipes, devices and the like.

  Returns:
    path -> bytes, or the name of a way to be no regular file (see `write`).
  """
  result: dict[str, Any] = {}
  names = list(files)
  targets = [rng.choice(names) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
  if rng.random() < 0.02:
    targets = []  # the input as it is
  for name, (tree, serialise) in files.items():
    hits, in_bytes = targets.count(name), 0
    if serialise is None:
      raw, in_bytes = tree, hits
    else:
      for _ in range(hits):
        if rng.random() < 0.85:
          tree = damage_tree(tree, rng)
        else:
          in_bytes += 1
      try:
        raw = serialise(tree, rng if hits else AsIs())
      except UnicodeEncodeError:
        raw = b'{}'
    for _ in range(in_bytes):
      raw = damage_bytes(raw, rng)
    result[name] = raw
    if irregular and hits and rng.random() < 0.03:
      result[name] = rng.choice(sorted(_ODD_FILES))
  return result


def _fifo(path):
  os.mkfifo(path)


def _socket(path):
  with socket.socket(socket.AF_UNIX) as made:
    here = os.getcwd()
    os.chdir(os.path.dirname(path))  # the path of a socket is short
    try:
      made.bind(os.path.basename(path))
    finally:
      os.chdir(here)


def _unreadable(path):
  with open(path, 'wb'):
    pass
  os.chmod(path, 0)


_ODD_FILES = {
    'fifo': _fifo, 'socket': _socket, 'directory': os.mkdir, 'unreadable': _unreadable,
    'missing': lambda path: None, 'endless': lambda path: os.symlink('/dev/zero', path),
    'null': lambda path: os.symlink('/dev/null', path),
    'loop': lambda path: os.symlink(os.path.basename(path), path),
    'broken': lambda path: os.symlink('/nowhere/at/all', path),
    'sparse': lambda path: _sparse(path, 1 << 40), 'empty': lambda path: open(path, 'wb').close(),
}


def _sparse(path, size):
  with open(path, 'wb') as file:
    file.truncate(size)


def write(folder: str, files: Mapping[str, Any]) -> None:
  """Writes the files of an input, some of which are no regular files."""
  for name, content in files.items():
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if isinstance(content, str):
      _ODD_FILES[content](path)
    else:
      with open(path, 'wb') as file:
        file.write(content)


def array(values: Any) -> bytes:
  """The bytes of a .npy file."""
  import io
  out = io.BytesIO()
  np.save(out, values)
  return out.getvalue()
