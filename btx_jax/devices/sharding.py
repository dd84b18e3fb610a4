"""Where arrays live on the mesh: one table of rules from a parameter's path to its axes.

The mesh axes are `data` (everything is replicated), `fsdp` (parameters are sharded, and gathered
when used), `expert` (experts are sharded) and `tensor` (attention heads, feed-forward width and
vocabulary are sharded, and computed on where they are). Rows are sharded over all axes but
`tensor`: outside the feed-forward layers, `expert` is one more axis for rows and parameters.

While branches train stacked in one program, `expert` shards the branches instead: with
`stacked=True` it goes to the leading dimension of every array, and so to no other.
"""

from collections.abc import Callable
import functools
import math
import re

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from btx_jax.devices.mesh import BATCH_AXES, BRANCH_BATCH_AXES
from btx_jax.errors import UsageError

_CUT = ('fsdp', 'expert')

# First match wins. A rule names the axes of a parameter's trailing dimensions; leading ones (layers
# stacked by scan) are not sharded. The path of an optimizer moment ends in that of its parameter,
# so one table serves both, and dense models as well as mixtures. An axis goes to the first
# dimension that names it and that it divides: if the number of experts is not divisible by the
# size of `expert`, they are sharded along D instead.
RULES = (
    (r'(^|/)embed$', P('tensor', _CUT)),
    (r'(^|/)head$', P(_CUT, 'tensor')),
    (r'attn/[qkv]$', P(_CUT, 'tensor', None)),
    (r'attn/o$', P('tensor', None, _CUT)),
    (r'attn/[qkv]_bias$', P('tensor', None)),
    (r'experts/(gate|up)$', P('expert', _CUT, 'tensor')),
    (r'experts/down$', P('expert', 'tensor', _CUT)),
    (r'ffn/(gate|up)$', P(_CUT, 'tensor')),
    (r'ffn/down$', P('tensor', _CUT)),
    (r'(^|/)(scale|router|router_bias|step|count)$', P()),
)

_LARGE = 2**20  # bytes of an array that is worth a remark if it cannot be sharded


def holds_experts(axis_size: int, num_experts: int) -> bool:
  """Whether an `expert` axis of this size shards the experts; if not, each device has all.

  Raises:
    UsageError: there are more experts than devices on the axis, but not a multiple.
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
  """A key path of jax.tree.map_with_path as a string, like 'layers/ffn/up'."""
  return jax.tree_util.keystr(key_path, simple=True, separator='/')


def partition_specs(tree, mesh, stacked: bool = False):
  """The PartitionSpec of every leaf, by `RULES`.

  An axis that does not divide its dimension is left out of the spec, so the array is whole on
  every device of that axis; `undivided_arrays` lists these arrays.

  Args:
    tree: parameters, optimizer state or both.
    mesh: where they will live.
    stacked: whether the leaves are those of several branches, [E, ...], so that `expert` goes
      to E. It appears in the rest of a spec only if it does not divide E.

  Raises:
    ValueError: no rule matches a leaf. There is no catch-all: a new parameter needs a rule.
  """
  return jax.tree.map_with_path(
      lambda path, leaf: _spec_and_omitted(path_of(path), leaf.shape, mesh, stacked)[0], tree)


def undivided_arrays(tree, mesh, stacked: bool = False) -> list[str]:
  """A line for each array above 1 MiB and each axis of its rule that does not divide it."""
  lines = []
  for path, leaf in jax.tree.leaves_with_path(tree):
    path, size = path_of(path), math.prod(leaf.shape) * leaf.dtype.itemsize
    for axis, why in _spec_and_omitted(path, leaf.shape, mesh, stacked)[1].items():
      if size > _LARGE:
        lines.append(f'{path} {list(leaf.shape)} is whole on every device of mesh.{axis}: '
                     f'{" and ".join(why)}')
  return lines


def _spec_and_omitted(path: str, shape, mesh, stacked: bool) -> tuple[P, dict[str, list[str]]]:
  """The spec of an array, and why each axis that its rule names was left out."""
  rule = next((rule for pattern, rule in RULES if re.search(pattern, path)), None)
  if rule is None:
    raise ValueError(f'sharding.RULES has no rule for the parameter {path!r}.')
  named = [(axes,) if isinstance(axes, str) else axes or () for axes in rule]
  lead: list[tuple[str, ...]] = [()] * (len(shape) - len(rule))
  if stacked:
    lead[0] = ('expert',)
  spec, reasons = [], {}
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
        reasons.setdefault(axis, []).append(f'{size} is not divisible by {by}')
    spec.append(kept)
  placed = {axis for axes in spec for axis in axes}
  return (P(*(axes or None for axes in spec)),
          {axis: why for axis, why in reasons.items() if axis not in placed})


def shardings(tree, mesh, stacked: bool = False):
  """The NamedSharding of every leaf, by `RULES`."""
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec),
                      partition_specs(tree, mesh, stacked), is_leaf=lambda x: isinstance(x, P))


def batch_sharding(mesh, leading: int = 0, stacked: bool = False) -> NamedSharding:
  """The sharding of a batch: its rows, over all axes but `tensor`.

  Args:
    mesh: where the batch will live.
    leading: dimensions before the rows, not sharded.
    stacked: whether a dimension for the branches comes before all others.
  """
  if stacked:
    return NamedSharding(mesh, P('expert', *(None,) * leading, BRANCH_BATCH_AXES))
  return NamedSharding(mesh, P(*(None,) * leading, BATCH_AXES))


def platform() -> str:
  """The platform that a program is traced for: that of the mesh in use, 'cpu' without one.

  This may differ from the devices of this machine, because preflight compiles for others.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return 'cpu' if mesh.empty else mesh.abstract_device.platform


def constrain(x, spec):
  """with_sharding_constraint if a mesh is in use; otherwise `x` itself."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec)


def axis_that_cuts(axis: str, size: int) -> str | None:
  """`axis` if it has several devices in the mesh in use and divides `size`; otherwise None."""
  ways = jax.sharding.get_abstract_mesh().shape[axis]
  return axis if ways > 1 and size % ways == 0 else None


def varying_like(tree, x):
  """`tree`, with the type inside shard_map that it varies over the mesh axes that `x` varies over.
  """
  def varying(array):
    return jax.typeof(array).manual_axis_type.varying

  def cast(leaf):
    axes = tuple(varying(x) - varying(leaf))
    return jax.lax.pcast(leaf, axes, to='varying') if axes else leaf

  return jax.tree.map(cast, tree)


def from_slices(like, read: Callable[[tuple[slice, ...]], np.ndarray]) -> jax.Array:
  """An array over the mesh, of which each process reads only the slices it holds, each once.

  Args:
    like: its shape, type and sharding.
    read: slices, each with a start and an end -> that part of the array.
  """
  slices_read = {}

  def read_once(index):
    index = tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, like.shape, strict=True))
    key = tuple((s.start, s.stop) for s in index)
    if key not in slices_read:
      slices_read[key] = np.asarray(read(index)).astype(like.dtype, copy=False)
    return slices_read[key]

  return jax.make_array_from_callback(like.shape, like.sharding, read_once)


def tree_from_slices(like, read: Callable[[str, tuple[slice, ...]], np.ndarray]):
  """A tree of such arrays; `read`, (path, slices) -> that part of the array at the path."""
  return jax.tree.map_with_path(
      lambda key_path, x: from_slices(x, functools.partial(read, path_of(key_path))), like)


def local_rows(mesh, rows: int) -> list[int]:
  """The rows of a global batch that this process holds, in order."""
  return _local_indices(batch_sharding(mesh), (rows,))[0]


def local_branches(mesh, slots: int, rows: int) -> tuple[list[int], list[int]]:
  """The stacked branches that this process holds, and its rows of each, in order."""
  branches, rows_of_each = _local_indices(batch_sharding(mesh, stacked=True), (slots, rows))
  return branches, rows_of_each


def _local_indices(sharding: NamedSharding, shape: tuple[int, ...]) -> list[list[int]]:
  """For each dimension of a global array, the indices that this process holds, in order."""
  held = sharding.addressable_devices_indices_map(shape).values()
  return [sorted({i for index in held if index for i in range(size)[index[dim]]})
          for dim, size in enumerate(shape)]


def to_global(batch, mesh, rows: int, leading: int = 0, slots: int = 0):
  """Global arrays over the mesh, from each process's rows of a batch.

  Args:
    batch: a tree of this process's rows: those of `local_rows`, or of `local_branches`.
    mesh: where the arrays will live.
    rows: of the global batch.
    leading: dimensions before the rows.
    slots: stacked branches, in a dimension before all others; 0 if the batch is of one run.
  """
  def place(x):
    lead = x.shape[:leading] if not slots else (slots, *x.shape[1:leading + 1])
    shape = (*lead, rows, *x.shape[len(lead) + 1:])
    return jax.make_array_from_process_local_data(
        batch_sharding(mesh, leading, stacked=bool(slots)), x, shape)

  return jax.tree.map(place, batch)


def from_whole(batch, mesh):
  """Global arrays over the mesh, from a batch that every process has whole.

  Args:
    batch: arrays whose first dimension are the rows.
    mesh: where the arrays will live.
  """
  size = len(next(iter(batch.values())))
  rows = local_rows(mesh, size)
  return to_global({name: x[rows] for name, x in batch.items()}, mesh, size)


def jit_replicated(function: Callable, mesh):
  """`function` jitted, with results that are whole on every device: each process can read them."""
  return jax.jit(function, out_shardings=NamedSharding(mesh, P()))


def abstract(tree, shardings):
  """The shapes and types of `tree` with `shardings`, as jax.ShapeDtypeStructs."""
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
