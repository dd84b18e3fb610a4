"""The mesh of devices: its axes, their sizes, and how devices are laid out along them."""

from collections.abc import Sequence
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType
import numpy as np

from btx_jax.errors import UsageError

AXES = ('data', 'fsdp', 'expert', 'tensor')
BATCH_AXES = AXES[:3]  # that carry rows
BRANCH_BATCH_AXES = AXES[:2]  # that carry the rows of each of several stacked branches



def choose(sizes: dict[str, int], devices: int, num_experts: int, state_bytes: int,
           memory: float | None, slices: int = 1) -> dict[str, int]:
  """The sizes of a mesh, those that are 0 chosen.

  `expert` as large as divides the experts, since tokens are less to send than weights; then
  `fsdp` as large as it takes for the state to fill no more than half of the memory, since
  copies need the least traffic.

  Args:
    sizes: of the axes; -1 is all that is left, 0 is to be chosen.
    devices: that there are.
    num_experts: of the mixture to come; 0 if there is none.
    state_bytes: parameters, gradients and optimizer state of the largest model.
    memory: bytes of a device; None if it is not known or no limit.
    slices: that TPUs are in, which only `data` may cross.

  Raises:
    UsageError: there are fewer devices than the sizes that are given multiply to.
  """
  sizes = dict(sizes)
  given = math.prod(max(size, 1) for axis, size in sizes.items() if axis != 'data')
  given *= sizes['data'] if sizes['data'] > 0 else slices
  left = devices // given
  if not left:
    named = ', '.join(f'mesh.{axis} = {size}' for axis, size in sizes.items() if size > 1)
    raise UsageError(f'{named} cannot be laid on {devices} device(s): {given} are needed.')
  if sizes['expert'] == 0:
    sizes['expert'] = math.gcd(num_experts or 1, left)
    left //= sizes['expert']
  if sizes['fsdp'] == 0:
    held = state_bytes / (max(sizes['expert'], 1) * max(sizes['tensor'], 1))
    enough = [n for n in range(1, left + 1)
              if left % n == 0 and (not memory or held / n <= memory / 2)]
    sizes['fsdp'] = min(enough, default=left) if -1 in sizes.values() else left
  return sizes


def make_mesh(data: int = -1, fsdp: int = 1, expert: int = 1, tensor: int = 1,
              devices: Sequence | None = None) -> jax.sharding.Mesh:
  """A mesh over all devices, or those given; one axis may be -1, "all devices that are left".

  Raises:
    UsageError: the sizes do not multiply to the number of devices, or `data` is not a
      multiple of the slices that TPUs are in.
  """
  sizes = dict(zip(AXES, (data, fsdp, expert, tensor)))
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  named = ', '.join(f'mesh.{axis} = {size}' for axis, size in sizes.items())
  free = [axis for axis, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise UsageError(f'{named}: each axis must be positive, and at most one -1 (the rest).')
  if count % fixed or (not free and fixed != count):
    raise UsageError(
        f'{named} cannot be laid on {count} device(s): the sizes must multiply to '
        f'{count}. Set one of them to -1 to take all that is left; the others must '
        f'divide {count}.')
  if free:
    sizes[free[0]] = count // fixed
  return jax.sharding.Mesh(lay_devices(tuple(sizes.values()), devices), AXES,
                           axis_types=(AxisType.Auto,) * len(AXES))


def count_slices(devices: Sequence) -> int:
  """Of how many TPU slices the devices are; 1 if they are no TPUs."""
  if devices[0].platform != 'tpu':
    return 1
  return len({getattr(device, 'slice_index', 0) for device in devices})


def lay_devices(shape: tuple[int, ...], devices) -> np.ndarray:
  """Devices in an array of this shape, near ones along the last axes.

  TPUs of several slices, which share a slow network only, differ along the first axis,
  `data`: all that crosses it is one sum of the gradients a step.

  Raises:
    UsageError: the first axis is not a multiple of the slices.
  """
  slices = count_slices(devices)
  if slices == 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  if shape[0] % slices:
    raise UsageError(
        f'mesh.data = {shape[0]} must be a multiple of {slices}, the number of TPU slices: no '
        f'other axis may cross the network between them. The {len(devices) // slices} devices '
        'of one slice must suffice for mesh.fsdp x mesh.expert x mesh.tensor.')
  return mesh_utils.create_hybrid_device_mesh(
      (shape[0] // slices, *shape[1:]), (slices, *(1,) * (len(shape) - 1)), devices,
      allow_split_physical_axes=True)


def check_rows(mesh, rows: int, name: str, batch_axes=BATCH_AXES):
  """Raises UsageError if so many rows cannot be shared out evenly along `batch_axes`."""
  ways = math.prod(mesh.shape[axis] for axis in batch_axes)
  if rows < 1:
    raise UsageError(f'{name} = {rows} must be at least 1.')
  if rows % ways:
    near = sorted({max(1, rows // ways) * ways, -(-rows // ways) * ways})
    named = ' x '.join(f'mesh.{axis}' for axis in batch_axes)
    raise UsageError(f'{name}: {rows} rows cannot be shared evenly by {ways} ({named}); '
                     f'the nearest that can: {" or ".join(map(str, near))}.')
