"""Devices by name, which need not exist here: 'v5p:4x4x4', 'v5e:16x16*2', 'h100:8', 'cpu:8'."""

from collections.abc import Callable, Sequence
import fnmatch
import importlib.metadata
import math
import os
import re
from typing import Any, NamedTuple

from btx_jax.devices.hardware import CHIPS, Chip
from btx_jax.devices.mesh import count_slices
from btx_jax.errors import UsageError, nearest

_PER_NODE = 8  # GPUs
# The properties that the CUDA compiler needs, read from such a GPU (jaxlib's GpuTargetConfigProto).
_H100 = '''
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
'''
_TPUS = tuple(name for name, chip in CHIPS.items() if chip.torus)
_EXAMPLES = 'v5p:4x4x4, v5e:16x16, v5e:16x16*2 (two slices), h100:8 or cpu:8'


class Topology(NamedTuple):
  """Devices to compile for.

  Attributes:
    name: as given to `get`.
    chip: None for a CPU, whose speed and memory are not known.
    devices: jax's descriptions of them.
    compiler: the one that will be used, with its version.
  """
  name: str
  chip: Chip | None
  devices: Sequence
  compiler: str

  @property
  def hosts(self) -> int:
    """Number of machines."""
    return max(1, len({getattr(d, 'process_index', 0) for d in self.devices}))


def get(name: str) -> Topology:
  """The devices that `name` describes, KIND:SIZE.

  Raises:
    UsageError: there are no such devices, or their compiler is not installed.
  """
  match = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?', name)
  if not match:
    raise UsageError(f'--topology={name} is not KIND:SIZE; examples are {_EXAMPLES}.')
  kind, shape, slices = match[1], match[2], int(match[3] or 1)
  if not slices * math.prod(int(n) for n in shape.split('x')):
    raise UsageError(f'--topology={name} has no devices; examples are {_EXAMPLES}.')
  if kind == 'cpu' and shape.isdigit() and slices == 1:
    return _cpu(name, int(shape))
  if kind == 'h100' and shape.isdigit() and slices == 1:
    return _gpu(name, int(shape))
  if kind not in _TPUS:
    raise UsageError(f'--topology={name}: {nearest(kind, (*_TPUS, "h100", "cpu"))} Examples are '
                     f'{_EXAMPLES}.')
  dims = shape.split('x')
  if len(dims) != CHIPS[kind].torus:
    raise UsageError(f'--topology={name}: {kind} chips form a torus of {CHIPS[kind].torus} '
                     f'dimensions, like {kind}:{"x".join("4" * CHIPS[kind].torus)}.')
  return _tpu(name, kind, shape, slices)


def _cpu(name: str, devices: int) -> Topology:
  import jax
  jax.config.update('jax_num_cpu_devices', devices)
  return Topology(name, None, jax.devices('cpu'), _version('jaxlib'))


def _tpu(name: str, kind: str, shape: str, slices: int) -> Topology:
  # The compiler must not look for a TPU in this machine.
  os.environ.update(TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1',
                    TPU_WORKER_HOSTNAMES='localhost', TPU_ACCELERATOR_TYPE=f'{kind}-8')
  compiler = _libtpu()
  if not compiler:
    raise UsageError(f"--topology={name} needs the TPU compiler: pip install 'btx_jax[tpu]', "
                     'which works on any x86-64 Linux machine.')
  from jax.experimental import topologies
  wraps = _wraps([int(n) for n in shape.split('x')])
  options: dict[str, Any] = {'wrap': (*wraps, *[False] * (3 - len(wraps)))}  # default: none
  if slices > 1:
    options['num_slices'] = slices
  if kind == 'v4':
    options['chip_config_name'] = 'megacore'  # both cores of a chip are one device
  try:
    found = topologies.get_topology_desc(platform='tpu', topology_name=f'{kind}:{shape}', **options)
  except Exception as error:
    why = str(error).splitlines()[0]
    raise UsageError(
        f'--topology={name}: {compiler} has no such slice ({why}).') from error
  return Topology(name, CHIPS[kind], found.devices, compiler)


def _libtpu() -> str:
  """'libtpu 0.0.42.1', with a remark if jax requires another; '' if it is not installed."""
  found = _version('libtpu')
  wanted = next((each.split(';')[0].strip() for each in importlib.metadata.requires('jax') or ()
                 if each.startswith('libtpu')), '*')
  pinned = found.replace(' ', '==')
  if not found or any(fnmatch.fnmatch(each, wanted) for each in (pinned, f'{pinned}.0')):
    return found
  return f'{found}, not the {wanted} that {_version("jax")} requires'


def _gpu(name: str, devices: int) -> Topology:
  if devices > _PER_NODE and devices % _PER_NODE:
    raise UsageError(f'--topology={name}: nodes have {_PER_NODE} GPUs, and {devices} is not a '
                     'multiple.')
  plugin = next(filter(None, map(_version, ('jax-cuda13-plugin', 'jax-cuda12-plugin'))), '')
  if not plugin:
    raise UsageError(f"--topology={name} needs NVIDIA's compiler: pip install 'jax[cuda13]' "
                     '(about 2 GB), which works without a GPU.')
  os.environ['JAX_SKIP_CUDA_CONSTRAINTS_CHECK'] = '1'
  from jax.experimental import topologies
  nodes = max(1, devices // _PER_NODE)
  found = topologies.get_topology_desc(
      platform='cuda', target_config=_H100, topology=f'1x{nodes}x{devices // nodes}')
  return Topology(name, CHIPS['h100'], found.devices, plugin)


def _version(package: str) -> str:
  """'libtpu 0.0.42', or '' if it is not installed."""
  try:
    return f'{package} {importlib.metadata.version(package)}'
  except importlib.metadata.PackageNotFoundError:
    return ''


def link_speed(topology: Topology, mesh) -> Callable[[str, tuple[str, ...]], float]:
  """(kind of collective, axes of the mesh) -> bytes per second that a device sends and receives.

  On a torus an axis of the mesh runs along one or more dimensions. Each of them adds two links if
  the axis goes all the way around, and one if it ends before. All-to-all travels a quarter of the
  way around on average, so its bytes share links. If an axis leaves the slice or node, all its
  traffic is limited by the network.
  """
  chip = topology.chip
  sizes = [len({d.coords[i] for d in topology.devices}) for i in range(chip.torus if chip else 0)]
  wraps = _wraps(sizes)

  def bytes_per_second(kind: str, axes: tuple[str, ...]) -> float:
    if not chip:
      return math.inf
    group = _group(mesh, axes)
    if count_slices(group) > 1 or (
        not chip.torus and len({d.process_index for d in group}) > 1):
      return chip.network
    if not chip.torus:
      return chip.link
    links, longest = 0, 1
    for i in range(chip.torus):
      along = len({d.coords[i] for d in group})
      if along > 1:
        links += 2 if along == sizes[i] and wraps[i] else 1
        longest = max(longest, along)
    sharing = longest / 4 if kind == 'all-to-all' and links else 1
    return max(links, 1) * chip.link / max(sharing, 1)

  return bytes_per_second


def _group(mesh, axes: tuple[str, ...]):
  """The first device, and those that differ from it along these axes only."""
  index = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
  return mesh.devices[index].reshape(-1)


def _wraps(sizes: Sequence[int]) -> list[bool]:
  """Which dimensions of a torus go all the way around: in cubes of 4x4x4 chips, and pods of 16x16.

  The compiler chooses its collectives accordingly: without, it builds all-reduces from all-gathers.
  """
  if len(sizes) == 3:
    return [all(n % 4 == 0 for n in sizes)] * 3
  return [n == 16 for n in sizes]
