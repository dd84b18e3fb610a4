"""What a compiled program sends between devices, and along which axes of the mesh."""

import math
import re
from typing import NamedTuple

import numpy as np

_KINDS = 'all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute'
_COLLECTIVE = re.compile(rf' = (\(.*?\)|\S+) ({_KINDS})(?:-start)?\((.*)')
_LISTED = re.compile(r'(?:replica_groups|source_target_pairs)=\{(\{[^=]*\})?\}')
_IOTA = re.compile(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
_NAMED = re.compile(
    r'replica_groups=mesh\[([^\]]*)\]'
    r'(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}')


class Collective(NamedTuple):
  """One collective of a compiled program.

  Attributes:
    kind: 'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all' or 'collective-permute'.
    shapes: of its results on one device.
    axes: the mesh axes along which it moves data.
  """
  kind: str
  shapes: tuple[tuple[int, ...], ...]
  axes: tuple[str, ...]


def collectives(compiled, mesh) -> list[Collective]:
  """All collectives of a compiled program that move data; those inside loops once."""
  found = []
  for result, kind, rest in _COLLECTIVE.findall(compiled.as_text()):
    places = [np.array(np.unravel_index(group, mesh.devices.shape))
              for group in _groups(rest, mesh.size)]
    axes = tuple(axis for i, axis in enumerate(mesh.axis_names)
                 if any(len(set(place[i])) > 1 for place in places))
    shapes = tuple(tuple(map(int, dims.split(','))) if dims else ()
                   for dims in re.findall(r'\w+\[([\d,]*)\]', result))
    if axes:
      found.append(Collective(kind, shapes, axes))
  return found


def _groups(text: str, devices: int) -> list[list[int]]:
  """The devices that take part together, from any of the notations of HLO."""
  numbers = lambda text: list(map(int, text.split(',')))
  if match := _LISTED.search(text):  # {{0,1},{2,3}}; {} is all devices
    groups = re.findall(r'[\d,]*\d', match[1] or '')
    return [numbers(group) for group in groups] or [list(range(devices))]
  if match := _IOTA.search(text):  # [2,4]<=[4,2]T(1,0): numbers of a transposed array
    return _iota(match[2], match[3]).reshape(numbers(match[1])).tolist()
  # mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a','b':(1)2}: along axes, or parts of them
  match = _NAMED.search(text)
  sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
  parts = {axis: [1, int(size), 1] for axis, size in sizes.items()}
  for axis, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", match[4]):
    before, size = int(before or 1), int(size or sizes[axis])
    parts[axis] = [before, size, int(sizes[axis]) // before // size]
  ids = _iota(match[2], match[3]) if match[2] else np.arange(devices)
  ids = ids.reshape([n for part in parts.values() for n in part])
  moved = [3 * list(sizes).index(axis) + 1 for axis in re.findall(r"'(\w+)'", match[4])]
  together = math.prod(ids.shape[i] for i in moved)
  return np.moveaxis(ids, moved, range(-len(moved), 0)).reshape(-1, together).tolist()


def _iota(dims: str, order: str) -> np.ndarray:
  dims = list(map(int, dims.split(',')))
  ids = np.arange(math.prod(dims)).reshape(dims)
  return ids.transpose(list(map(int, order.split(','))) if order else None)
