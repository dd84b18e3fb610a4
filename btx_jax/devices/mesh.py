"""The mesh of devices: its axes, their sizes, and which devices are neighbours along them."""

from collections.abc import Collection, Mapping, Sequence
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType
import numpy as np

from btx_jax.errors import UsageError

AXES = ('data', 'fsdp', 'expert', 'tensor')
BATCH_AXES = AXES[:3]  # the axes that rows are sharded over
BRANCH_BATCH_AXES = AXES[:2]  # the same while several branches are stacked along `expert`


def choose_sizes(sizes: Mapping[str, int], devices: int, num_experts: Collection[int],
                 state_bytes: int, memory: float | None, slices: int = 1) -> dict[str, int]:
  """The sizes of a mesh, with those that are 0 chosen.

  First `expert`: as large as the largest mixture allows and divides the others, because sending
  tokens costs less than sending weights. Then `fsdp`: just large enough for the state to fill at
  most half of the memory, because `data` needs the least traffic.

  Args:
    sizes: of the axes; -1 takes all remaining devices, 0 is to be chosen.
    devices: number of devices.
    num_experts: of each mixture.
    state_bytes: parameters, gradients and optimizer state of the largest model.
    memory: bytes per device; None if unknown or unlimited.
    slices: number of TPU slices; only `data` may cross them.

  Raises:
    UsageError: there are fewer devices than the given sizes multiply to.
  """
  sizes = dict(sizes)
  given = math.prod(max(size, 1) for axis, size in sizes.items() if axis != 'data')
  given *= sizes['data'] if sizes['data'] > 0 else slices
  left = devices // given
  if not left:
    named = ', '.join(f'mesh.{axis} = {size}' for axis, size in sizes.items() if size > 1)
    raise UsageError(f'{named} cannot be laid on {devices} device(s): {given} are needed.')
  if sizes['expert'] == 0:
    most = math.gcd(max(num_experts, default=0) or 1, left)
    sizes['expert'] = max(n for n in range(1, most + 1) if most % n == 0 and all(
        experts % n == 0 or experts < n for experts in num_experts))
    left //= sizes['expert']
  if sizes['fsdp'] == 0:
    share = state_bytes / (max(sizes['expert'], 1) * max(sizes['tensor'], 1))
    enough = [n for n in range(1, left + 1)
              if left % n == 0 and (not memory or share / n <= memory / 2)]
    sizes['fsdp'] = min(enough, default=left) if -1 in sizes.values() else left
  return sizes


def make_mesh(data: int = -1, fsdp: int = 1, expert: int = 1, tensor: int = 1,
              devices: Sequence | None = None) -> jax.sharding.Mesh:
  """A mesh over all devices, or those given; one axis may be -1, "all remaining devices".

  Raises:
    UsageError: the sizes do not multiply to the number of devices, or `data` is not a
      multiple of the number of TPU slices.
  """
  sizes: dict[str, int] = dict(zip(AXES, (data, fsdp, expert, tensor)))
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  named = ', '.join(f'mesh.{axis} = {size}' for axis, size in sizes.items())
  free = [axis for axis, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise UsageError(f'{named}: each size must be positive, except that one may be -1 (all '
                     'remaining devices).')
  if count % fixed or (not free and fixed != count):
    raise UsageError(
        f'{named} cannot be laid on {count} device(s): the sizes must multiply to '
        f'{count}. Set one of them to -1 to take all remaining devices; the others must '
        f'divide {count}.')
  if free:
    sizes[free[0]] = count // fixed
  return jax.sharding.Mesh(lay_devices(tuple(sizes.values()), devices), AXES,
                           axis_types=(AxisType.Auto,) * len(AXES))


def count_slices(devices: Sequence) -> int:
  """The number of TPU slices that the devices belong to; 1 if they are not TPUs."""
  if devices[0].platform != 'tpu':
    return 1
  return len({getattr(device, 'slice_index', 0) for device in devices})


def lay_devices(shape: tuple[int, ...], devices) -> np.ndarray:
  """The devices as an array of this shape, neighbours along the last axes.

  Slices of TPUs are connected by a slow network only. They lie along the first axis, `data`,
  which is crossed by one sum of the gradients per step.

  Raises:
    UsageError: the first axis is not a multiple of the number of slices.
  """
  slices = count_slices(devices)
  if slices == 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  if shape[0] % slices:
    raise UsageError(
        f'mesh.data = {shape[0]} must be a multiple of {slices}, the number of TPU slices: no '
        'other axis may cross the network between them. mesh.fsdp x mesh.expert x mesh.tensor '
        f'must fit into the {len(devices) // slices} devices of one slice.')
  return mesh_utils.create_hybrid_device_mesh(
      (shape[0] // slices, *shape[1:]), (slices, *(1,) * (len(shape) - 1)), devices,
      allow_split_physical_axes=True)


def row_ways(mesh, batch_axes=BATCH_AXES) -> int:
  """The number of devices that share the rows of a batch; 1 if the mesh is empty."""
  return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in batch_axes)


def check_rows(mesh, rows: int, name: str, batch_axes=BATCH_AXES):
  """Raises UsageError, about `name`, unless `batch_axes` can share the rows evenly."""
  ways = row_ways(mesh, batch_axes)
  if rows < 1:
    raise UsageError(f'{name} = {rows} must be at least 1.')
  if rows % ways:
    near = sorted({max(1, rows // ways) * ways, -(-rows // ways) * ways})
    named = ' x '.join(f'mesh.{axis}' for axis in batch_axes)
    raise UsageError(f'{name}: {rows} rows cannot be shared evenly by {ways} ({named}); '
                     f'the nearest that can: {" or ".join(map(str, near))}.')
