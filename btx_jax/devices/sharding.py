"""Where arrays live: the mesh, and one table of rules from a parameter's path to its axes.

The mesh axes are `data` (copies of everything), `fsdp` (parameters cut up, gathered when
used), `expert` ("which expert" throughout) and `tensor` (attention heads, feed-forward width
and vocabulary cut up, and computed on where they lie). Rows are spread over all but `tensor`:
outside the feed-forward layers `expert` is one more axis for rows and parameters.

While branches train in one program, stacked, `expert` indexes the branches instead: with
`stacked=True` it goes to the leading dimension of every array, and so to no other.
"""

from collections.abc import Callable
import math
import re

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from btx_jax.devices.mesh import BATCH_AXES, BRANCH_BATCH_AXES
from btx_jax.errors import UsageError

_CUT = ('fsdp', 'expert')

# First match wins. A rule names the trailing dimensions of a parameter; leading ones (layers
# stacked by scan) are not sharded. The paths of optimizer moments end in those of their
# parameters, so one table serves both, and the dense model as well as the mixture. An axis
# goes to the first dimension that names it and that it divides: experts that do not divide
# among the devices of `expert` are cut along D there.
RULES = (
    (r'(^|/)embed$', P('tensor', _CUT)),
    (r'(^|/)head$', P(_CUT, 'tensor')),
    (r'attn/[qkv]$', P(_CUT, 'tensor', None)),
    (r'attn/o$', P('tensor', None, _CUT)),
    (r'experts/(gate|up)$', P('expert', _CUT, 'tensor')),
    (r'experts/down$', P('expert', 'tensor', _CUT)),
    (r'ffn/(gate|up)$', P(_CUT, 'tensor')),
    (r'ffn/down$', P('tensor', _CUT)),
    (r'(^|/)(scale|router|router_bias|step|count)$', P()),
)

_WORTH_TELLING = 2**20  # bytes of an array that stays whole


def holds_experts(axis_size: int, num_experts: int) -> bool:
  """Whether an `expert` axis holds slices of so many experts (else they are whole on each).

  Raises:
    UsageError: more experts than devices on the axis, yet not a multiple.
  """
  if num_experts % axis_size == 0:
    return True
  if num_experts < axis_size:
    return False
  valid = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
  raise UsageError(
      f'{num_experts} experts cannot be spread over mesh.expert = {axis_size} devices; '
      f'mesh.expert can be {", ".join(map(str, valid))}.')


def path_of(key_path) -> str:
  """'layers/ffn/up' from a key path of jax.tree.map_with_path."""
  return jax.tree_util.keystr(key_path, simple=True, separator='/')


def partition_specs(tree, mesh, stacked: bool = False):
  """The PartitionSpec of every leaf, by `RULES`.

  An axis that does not divide its dimension is left out of the spec, so that the array is
  whole along it; `left_whole` tells of which arrays.

  Args:
    tree: parameters, optimizer state or both.
    mesh: where they will live.
    stacked: the leaves are those of several branches, [E, ...], and `expert` goes to E. It
      is in the rest of a spec only where it does not divide E.

  Raises:
    ValueError: no rule matches a leaf. There is no catch-all: a new parameter needs a rule.
  """
  return jax.tree.map_with_path(
      lambda path, leaf: _spec(path_of(path), leaf.shape, mesh, stacked)[0], tree)


def left_whole(tree, mesh, stacked: bool = False) -> list[str]:
  """A line for each array above 1 MiB that an axis of its rule does not divide."""
  lines = []
  for path, leaf in jax.tree.leaves_with_path(tree):
    path, size = path_of(path), math.prod(leaf.shape) * leaf.dtype.itemsize
    for axis, why in _spec(path, leaf.shape, mesh, stacked)[1].items():
      if size > _WORTH_TELLING:
        lines.append(f'{path} {list(leaf.shape)} is whole on every device of mesh.{axis}: '
                     f'{" and ".join(why)}')
  return lines


def _spec(path: str, shape, mesh, stacked: bool):
  """The spec of an array, and of each axis that its rule names in vain: why."""
  rule = next((rule for pattern, rule in RULES if re.search(pattern, path)), None)
  if rule is None:
    raise ValueError(f'sharding.RULES has no rule for the parameter {path!r}.')
  named = [(axes,) if isinstance(axes, str) else axes or () for axes in rule]
  lead = [()] * (len(shape) - len(rule))
  if stacked:
    lead[0] = ('expert',)
  spec, why = [], {}
  for size, axes in zip(shape, lead + named, strict=True):
    kept = ()
    for axis in axes:
      ways = [mesh.shape[a] for a in (*kept, axis)]
      if any(axis in used for used in spec):
        continue
      if size % math.prod(ways) == 0:
        kept += (axis,)
      else:
        by = ' x '.join(str(n) for n in ways if n > 1)
        why.setdefault(axis, []).append(f'{size} does not divide by {by}')
    spec.append(kept)
  placed = {axis for axes in spec for axis in axes}
  return (P(*(axes or None for axes in spec)),
          {axis: reasons for axis, reasons in why.items() if axis not in placed})


def shardings(tree, mesh, stacked: bool = False):
  """NamedShardings of every leaf, by `RULES`."""
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec),
                      partition_specs(tree, mesh, stacked), is_leaf=lambda x: isinstance(x, P))


def batch_sharding(mesh, leading: int = 0, stacked: bool = False) -> NamedSharding:
  """Rows over the axes that carry them, behind `leading` dimensions that are not sharded.

  `stacked`: before all these, a dimension for the branches.
  """
  if stacked:
    return NamedSharding(mesh, P('expert', *(None,) * leading, BRANCH_BATCH_AXES))
  return NamedSharding(mesh, P(*(None,) * leading, BATCH_AXES))


def platform() -> str:
  """Of the devices that a program is traced for: those of the mesh in use, 'cpu' without one.

  Not of those that are here: a program can be compiled for others (preflight).
  """
  mesh = jax.sharding.get_abstract_mesh()
  return 'cpu' if mesh.empty else mesh.abstract_device.platform


def constrain(x, spec):
  """with_sharding_constraint where there is a mesh, x itself where there is none."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec)


def axis_that_cuts(axis: str, size: int) -> str | None:
  """`axis` if the mesh in use has several devices along it that divide `size`, else None."""
  ways = jax.sharding.get_abstract_mesh().shape[axis]
  return axis if ways > 1 and size % ways == 0 else None


def varying_like(tree, x):
  """`tree`, typed inside shard_map as differing over the mesh axes that `x` differs over."""
  varying = lambda array: jax.typeof(array).manual_axis_type.varying

  def cast(leaf):
    axes = tuple(varying(x) - varying(leaf))
    return jax.lax.pcast(leaf, axes, to='varying') if axes else leaf

  return jax.tree.map(cast, tree)


def from_slices(like, read: Callable[[tuple[slice, ...]], np.ndarray]) -> jax.Array:
  """An array over the mesh of which each process reads no more than it holds, and that once.

  Args:
    like: its shape, type and sharding.
    read: slices, each with a start and an end -> that part of the array.
  """
  parts = {}

  def part(index):
    index = tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, like.shape, strict=True))
    key = tuple((s.start, s.stop) for s in index)
    if key not in parts:
      parts[key] = np.asarray(read(index)).astype(like.dtype, copy=False)
    return parts[key]

  return jax.make_array_from_callback(like.shape, like.sharding, part)


def local_rows(mesh, rows: int) -> list[int]:
  """Which of a global batch's rows this process holds, in order."""
  slices = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
  return sorted({row for (index,) in slices for row in range(rows)[index]})


def local_branches(mesh, slots: int, rows: int) -> tuple[list[int], list[int]]:
  """Which of the stacked branches this process holds, and which rows of each, in order."""
  where = batch_sharding(mesh, stacked=True).addressable_devices_indices_map((slots, rows))
  both = zip(*where.values())
  return tuple(sorted({i for index in indices for i in range(size)[index]})
               for indices, size in zip(both, (slots, rows)))


def to_global(batch, mesh, rows: int, leading: int = 0, slots: int = 0):
  """This process's rows of a batch as global arrays of `rows` rows over the mesh.

  `leading` counts the dimensions before the rows; `slots` are those of stacked branches, whose
  dimension comes before all.
  """
  def place(x):
    lead = x.shape[:leading] if not slots else (slots, *x.shape[1:leading + 1])
    shape = (*lead, rows, *x.shape[len(lead) + 1:])
    return jax.make_array_from_process_local_data(
        batch_sharding(mesh, leading, stacked=bool(slots)), x, shape)

  return jax.tree.map(place, batch)


def abstract(tree, shardings):
  """Shapes and types of `tree` with shardings, as `restore` and `load_params` want them."""
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
