"""Where arrays live: the mesh, and one table of rules from a parameter's path to its axes.

The mesh axes are `data` (copies of everything), `fsdp` (parameters cut up, gathered when
used) and `expert` ("which expert" throughout). Outside the feed-forward layers `expert` is
one more axis over which rows and parameters are spread.
"""

import math
import re

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from btx_jax.errors import UsageError

AXES = ('data', 'fsdp', 'expert')
BATCH_AXES = AXES  # every axis carries rows
_CUT = ('fsdp', 'expert')

# First match wins. A rule names the trailing dimensions of a parameter; leading ones (layers
# stacked by scan) are not sharded. The paths of optimizer moments end in those of their
# parameters, so one table serves both, and the dense model as well as the mixture.
RULES = (
    (r'(^|/)embed$', P(None, _CUT)),
    (r'(^|/)head$', P(_CUT, None)),
    (r'attn/[qkv]$', P(_CUT, None, None)),
    (r'attn/o$', P(None, None, _CUT)),
    (r'experts/(gate|up)$', P('expert', 'fsdp', None)),
    (r'experts/down$', P('expert', None, 'fsdp')),
    (r'ffn/(gate|up)$', P(_CUT, None)),
    (r'ffn/down$', P(None, _CUT)),
    (r'(^|/)(scale|router|step|count)$', P()),
)


def make_mesh(data: int = -1, fsdp: int = 1, expert: int = 1) -> jax.sharding.Mesh:
  """A mesh over all devices; one axis may be -1, "all devices that are left".

  Raises:
    UsageError: the sizes do not multiply to the number of devices.
  """
  sizes = dict(zip(AXES, (data, fsdp, expert)))
  devices = jax.device_count()
  named = ', '.join(f'mesh.{axis} = {size}' for axis, size in sizes.items())
  free = [axis for axis, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise UsageError(f'{named}: each axis must be positive, and at most one -1 (the rest).')
  if devices % fixed or (not free and fixed != devices):
    raise UsageError(
        f'{named} cannot be laid on {devices} device(s): the sizes must multiply to '
        f'{devices}. Set one of them to -1 to take all that is left; the others must '
        f'divide {devices}.')
  if free:
    sizes[free[0]] = devices // fixed
  return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * len(AXES))


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


def partition_specs(tree, mesh):
  """The PartitionSpec of every leaf, by `RULES`.

  An axis that does not divide its dimension is left out of the spec, so that the array is
  whole along it.

  Raises:
    ValueError: no rule matches a leaf. There is no catch-all: a new parameter needs a rule.
  """
  def axes_that_divide(axes, size):
    kept = ()
    for axis in (axes,) if isinstance(axes, str) else axes or ():
      if size % (math.prod(mesh.shape[a] for a in kept) * mesh.shape[axis]) == 0:
        kept += (axis,)
    return kept or None

  def spec(key_path, leaf):
    path = path_of(key_path)
    for pattern, rule in RULES:
      if re.search(pattern, path):
        lead = leaf.ndim - len(rule)
        return P(*(None,) * lead, *map(axes_that_divide, rule, leaf.shape[lead:]))
    raise ValueError(f'sharding.RULES has no rule for the parameter {path!r}.')

  return jax.tree.map_with_path(spec, tree)


def shardings(tree, mesh):
  """NamedShardings of every leaf, by `RULES`."""
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(tree, mesh),
                      is_leaf=lambda x: isinstance(x, P))


def batch_sharding(mesh, leading: int = 0) -> NamedSharding:
  """Rows over all axes of the mesh, behind `leading` dimensions that are not sharded."""
  return NamedSharding(mesh, P(*(None,) * leading, BATCH_AXES))


def constrain(x, spec):
  """with_sharding_constraint where there is a mesh, x itself where there is none."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec)


def varying_like(tree, x):
  """`tree`, typed inside shard_map as differing over the mesh axes that `x` differs over."""
  varying = lambda array: jax.typeof(array).manual_axis_type.varying

  def cast(leaf):
    axes = tuple(varying(x) - varying(leaf))
    return jax.lax.pcast(leaf, axes, to='varying') if axes else leaf

  return jax.tree.map(cast, tree)


def local_rows(mesh, rows: int) -> list[int]:
  """Which of a global batch's rows this process holds, in order."""
  slices = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
  return sorted({row for (index,) in slices for row in range(rows)[index]})


def to_global(batch, mesh, rows: int, leading: int = 0):
  """This process's rows of a batch as global arrays of `rows` rows over the mesh.

  `leading` counts the dimensions before the rows.
  """
  def place(x):
    shape = (*x.shape[:leading], rows, *x.shape[leading + 1:])
    return jax.make_array_from_process_local_data(batch_sharding(mesh, leading), x, shape)

  return jax.tree.map(place, batch)


def check_rows(mesh, rows: int, name: str):
  """Raises UsageError if so many rows cannot be shared out evenly among the devices."""
  devices = mesh.size
  if rows < 1:
    raise UsageError(f'{name} = {rows} must be at least 1.')
  if rows % devices:
    near = sorted({max(1, rows // devices) * devices, -(-rows // devices) * devices})
    raise UsageError(f'{name}: {rows} rows cannot be shared evenly by {devices} devices; '
                     f'the nearest that can: {" or ".join(map(str, near))}.')
