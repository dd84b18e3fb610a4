"""Parses the text of a compiled program: its computations, with instructions as scheduled."""

import functools
import math
import re
from typing import NamedTuple

import numpy as np

_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4,
          'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'f8e4m3fn': 1, 'f8e5m2': 1, 's4': 0.5, 'u4': 0.5,
          'c64': 8}
_SHAPE = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^{}]*)\})?')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.-]+) (?:\(.*)?\{\s*$')
_END = re.compile(r'^\}(, execution_thread=.*)?\s*$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.-]+) = (.*)$')
_CALLED_NAMES = re.compile(
    r'(?:calls|to_apply|async_execution_computation|called_computations)=\{?%?([\w.-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
# The notations for the groups of devices in a collective: {{0,1},{2,3}}, [2,2]<=[4], mesh[...].
_LISTED_GROUPS = re.compile(r'(?:replica_groups|source_target_pairs)=\{(\{[^=]*\})?\}')
_IOTA_GROUPS = re.compile(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
_MESH_GROUPS = re.compile(
    r'replica_groups=mesh\[([^\]]*)\]'
    r'(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}')
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute',
               'ragged-all-to-all')
HBM, HOST = 0, 5  # memory spaces; all others are on the chip


class Shape(NamedTuple):
  """An array: its type, dimensions and memory space."""
  dtype: str
  dims: tuple[int, ...]
  space: int = HBM

  @property
  def bytes(self) -> float:
    return math.prod(self.dims) * _BYTES.get(self.dtype, 0)


class Instruction(NamedTuple):
  """One line of a computation.

  Attributes:
    name: unique in its computation.
    opcode: 'fusion', 'all-gather-start' and so on.
    shapes: of its results.
    operands: names of other instructions.
    attributes: the rest of the line.
    is_root: whether it is the result of the computation.
  """
  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  attributes: str
  is_root: bool

  @property
  def called(self) -> list[str]:
    """The computations it is made of, except those of loops and conditionals."""
    return _CALLED_NAMES.findall(self.attributes)

  def attribute(self, name: str) -> str:
    """The value of `name=...` up to the next comma or space; '' if there is none."""
    found = re.search(rf'\b{name}=%?([^\s,]+)', self.attributes)
    return found[1] if found else ''


class Computation(dict[str, Instruction]):
  """Instructions by name, in the order of the schedule."""

  @property
  def root(self) -> Instruction:
    return next((i for i in self.values() if i.is_root), list(self.values())[-1])

  def shape(self, name: str) -> Shape:
    """The shape of the (first) result of an instruction."""
    return self[name].shapes[0]


class Module(NamedTuple):
  """A program: its computations by name, and the name of its entry."""
  computations: dict[str, Computation]
  entry: str

  def branches(self, conditional: Instruction) -> list[str]:
    """The computations that a conditional chooses from."""
    listed = _BRANCHES.search(conditional.attributes)
    if listed:
      return [name.strip(' %') for name in listed[1].split(',')]
    return [conditional.attribute(f'{which}_computation') for which in ('false', 'true')]

  def trip_count(self, loop: Instruction) -> int:
    """How often a loop's body runs: the compiler's note, or else the bound in its condition."""
    known = self.known_trip_count(loop)
    if known is not None:
      return known
    bound = max(self._constants(loop.attribute('condition')), default=1)
    return math.ceil(bound / self._step(loop))

  def known_trip_count(self, loop: Instruction) -> int | None:
    """The compiler's note of how often a loop's body runs; None if it does not know."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    return int(known[1]) if known else None

  def _step(self, loop: Instruction) -> int:
    """The increment of the loop's counter per iteration: more than 1 if XLA unrolled the loop."""
    condition, body = (self.computations.get(loop.attribute(which), Computation())
                       for which in ('condition', 'body'))
    if not condition or not body:
      return 1
    for operand in condition.root.operands:
      counter = condition.get(operand)
      if counter and counter.opcode == 'get-tuple-element' and body.root.opcode == 'tuple':
        updated = body.get(body.root.operands[int(counter.attribute('index'))])
        if updated and updated.opcode == 'add':
          added = [body[o].operands[0] for o in updated.operands
                   if o in body and body[o].opcode == 'constant']
          return int(added[0]) if added and added[0].isdigit() and int(added[0]) else 1
    return 1

  def _constants(self, name: str) -> list[int]:
    """The integer constants in a computation and in those it calls."""
    found = []
    for instruction in self.computations.get(name, Computation()).values():
      if instruction.opcode == 'constant' and instruction.operands[0].lstrip('-').isdigit():
        found.append(int(instruction.operands[0]))
      for called in instruction.called:
        found += self._constants(called)
    return found


def parse(text: str) -> Module:
  """The module in `compiled.as_text()`."""
  computations, current, entry = {}, None, ''
  for line in text.splitlines():
    if current is None:
      if match := _COMPUTATION.match(line):
        current = computations.setdefault(match[2], Computation())
        entry = match[2] if match[1] else entry
    elif _END.match(line):
      current = None
    elif match := _INSTRUCTION.match(line):
      instruction = _instruction(match[2], match[3], bool(match[1]))
      current[instruction.name] = instruction
    elif line.strip():  # the attributes of kernels may contain line breaks
      last = current.popitem()[1]
      current[last.name] = last._replace(attributes=last.attributes + line)
  return Module(computations, entry or next(reversed(computations)))


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
  """An instruction from `TYPE opcode(operands), attributes`."""
  end = _closing_parenthesis(text, 0) if text.startswith('(') else text.index(' ')
  result, rest = text[:end], text[end:].lstrip(') ')
  opcode, _, rest = rest.partition('(')
  end = _closing_parenthesis('(' + rest, 0) - 1
  operands = re.sub(r'/\*.*?\*/', '', rest[:end])
  operands = tuple(o.strip().split(' ')[-1].lstrip('%') for o in _split_at_commas(operands))
  return Instruction(name, opcode, _shapes(result), operands, rest[end + 1:], is_root)


def _closing_parenthesis(text: str, start: int) -> int:
  """The position of the parenthesis that closes the one at `start`."""
  depth = 0
  for at in range(start, len(text)):
    depth += {'(': 1, ')': -1}.get(text[at], 0)
    if not depth:
      return at
  return len(text)


def _split_at_commas(operands: str) -> list[str]:
  """The parts between commas that are outside brackets."""
  parts, depth = [''], 0
  for c in operands:
    depth += {'[': 1, '{': 1, '(': 1, ']': -1, '}': -1, ')': -1}.get(c, 0)
    if c == ',' and not depth:
      parts.append('')
    else:
      parts[-1] += c
  return [part for part in parts if part.strip()]


def _shapes(text: str) -> tuple[Shape, ...]:
  shapes = []
  for dtype, dims, layout in _SHAPE.findall(text):
    space = re.search(r'S\((\d+)\)', layout)
    shapes.append(Shape(dtype, tuple(map(int, dims.split(','))) if dims else (),
                        int(space[1]) if space else HBM))
  return tuple(shapes)


class Collective(NamedTuple):
  """One collective of a program.

  Attributes:
    kind: 'all-gather', 'all-reduce' and so on.
    shapes: dimensions of its results on one device.
    axes: the axes of the mesh along which it moves data.
  """
  kind: str
  shapes: tuple[tuple[int, ...], ...]
  axes: tuple[str, ...]


def collectives(module: Module, mesh) -> list[Collective]:
  """All collectives of a program that move data; one inside a loop counts once."""
  found = []
  for computation in module.computations.values():
    for instruction in computation.values():
      kind = instruction.opcode.removesuffix('-start')
      if kind in COLLECTIVES and (along := axes(instruction, mesh)):
        shapes = tuple(shape.dims for shape in instruction.shapes)
        found.append(Collective(kind, shapes, along))
  return found


def axes(instruction: Instruction, mesh) -> tuple[str, ...]:
  """The axes of the mesh along which a collective moves data."""
  return _axes(_group_text(instruction.attributes), mesh)


@functools.lru_cache(maxsize=1024)
def _axes(attributes: str, mesh) -> tuple[str, ...]:
  places = [np.array(np.unravel_index(group, mesh.devices.shape))
            for group in _groups(attributes, mesh.size)]
  return tuple(axis for i, axis in enumerate(mesh.axis_names)
               if any(len(set(place[i])) > 1 for place in places))


def _group_text(attributes: str) -> str:
  """The part of a collective's attributes that lists the groups of devices."""
  for pattern in (_LISTED_GROUPS, _IOTA_GROUPS, _MESH_GROUPS):
    if match := pattern.search(attributes):
      return match[0]
  return ''


def _groups(text: str, devices: int) -> list[list[int]]:
  """The groups of devices that exchange data, from any of HLO's notations."""
  if match := _IOTA_GROUPS.search(text):  # [2,4]<=[4,2]T(1,0): numbers of a transposed array
    return _iota(match[2], match[3]).reshape(_numbers(match[1])).tolist()
  # mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a','b':(1)2}: along axes, or parts of them
  if match := _MESH_GROUPS.search(text):
    sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
    parts = {axis: [1, size, 1] for axis, size in sizes.items()}
    for axis, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", match[4]):
      before, part = int(before or 1), int(part or sizes[axis])
      parts[axis] = [before, part, sizes[axis] // before // part]
    ids = _iota(match[2], match[3]) if match[2] else np.arange(devices)
    ids = ids.reshape([n for part in parts.values() for n in part])
    moved = [3 * list(sizes).index(axis) + 1 for axis in re.findall(r"'(\w+)'", match[4])]
    together = math.prod(ids.shape[i] for i in moved)
    return np.moveaxis(ids, moved, range(-len(moved), 0)).reshape(-1, together).tolist()
  groups = re.findall(r'[\d,]*\d', text.partition('=')[2])  # {{0,1},{2,3}}; {} is all devices
  return [_numbers(group) for group in groups] or [list(range(devices))]


def _iota(dims: str, order: str | None) -> np.ndarray:
  """0, 1, 2, ... in an array of these dimensions, transposed if `order` is given."""
  sizes = _numbers(dims)
  ids = np.arange(math.prod(sizes)).reshape(sizes)
  return ids.transpose(_numbers(order) if order else None)


def _numbers(text: str) -> list[int]:
  return list(map(int, text.split(',')))
