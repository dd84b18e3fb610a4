"""The cost of a step on one device, from a walk through the compiled program's schedule.

An instruction takes as long as its FLOPs or its memory traffic at the chip's peak, whichever is
longer. A collective takes as long as its bytes need on the links of its axes. It overlaps with
other work only if the schedule has separate instructions for its start and its end; otherwise
everything waits for it. A loop counts as often as it runs, and a conditional as its cheapest branch
(with a balanced load, experts need no overflow rounds). So this is the time in which the program
would run if every part of it reached the peak, not a prediction of what a device will measure.
"""

from collections import defaultdict
from collections.abc import Callable
import dataclasses
import functools
import math
import re

from btx_jax.devices.hardware import Chip
from btx_jax.preflight import hlo

_FREE = {'parameter', 'constant', 'get-tuple-element', 'bitcast', 'tuple', 'after-all',
         'add-dependency', 'partition-id', 'replica-id', 'opt-barrier', 'iota', 'domain'}
_MATMUL_CALL = re.compile(r'\$(?:gemm|matmul)|cublas')
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')
_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="([^"]*)"')
_WRAPPERS = ('fusion', 'async-start', 'call-start', 'custom-call-start')
_ADDED = ('seconds', 'compute', 'memory', 'network', 'waiting', 'flops', 'decisions')
_SLICES = ('dynamic-slice', 'slice', 'gather')


@dataclasses.dataclass
class Cost:
  """The cost of running a computation once, on one device.

  Attributes:
    seconds: total time.
    compute: seconds that its FLOPs take at the peak.
    memory: seconds that its memory traffic takes at the peak.
    network: seconds that its collectives take.
    waiting: the part of `network` that is exposed: it overlaps with nothing.
    flops: of matmuls and kernels.
    decisions: how often a GPU lets its host decide whether a loop goes on, or which branch to take.
    sent: bytes by (kind of collective, axes): (n - 1) / n of each buffer, twice for an all-reduce.
  """
  seconds: float = 0.0
  compute: float = 0.0
  memory: float = 0.0
  network: float = 0.0
  waiting: float = 0.0
  flops: float = 0.0
  decisions: int = 0
  sent: dict[tuple[str, tuple[str, ...]], float] = dataclasses.field(
      default_factory=lambda: defaultdict(float))

  def add(self, other: 'Cost', times: int = 1):
    """Adds `other`, which runs after this, `times` times."""
    for field in _ADDED:
      setattr(self, field, getattr(self, field) + times * getattr(other, field))
    for key, value in other.sent.items():
      self.sent[key] += times * value


class CostModel:
  """The costs of a module's computations on a chip."""

  def __init__(self, module: hlo.Module, chip: Chip, mesh,
               speed: Callable[[str, tuple[str, ...]], float], filled: float = 1.0):
    """Creates the model; computes nothing yet.

    Args:
      module: the compiled program.
      chip: the kind of device.
      mesh: the devices that the program is for.
      speed: (kind of collective, axes) -> bytes per second.
      filled: the share of its rows that a grouped matmul multiplies.
    """
    self._module, self._chip, self._mesh = module, chip, mesh
    self._speed, self._filled = speed, filled
    self._cost_of = functools.cache(self._uncached_cost_of)

  def total(self) -> Cost:
    """The cost of the program."""
    return self._cost_of(self._module.entry)

  def _uncached_cost_of(self, name: str) -> Cost:
    """The cost of a computation, by name."""
    computation, cost = self._module.computations[name], Cost()
    clock = _Clock(cost)
    for instruction in computation.values():
      kind = instruction.opcode
      if moved := self._collective(computation, instruction):
        self._run_collective(clock, instruction, *moved)
      elif kind in ('send', 'send-done', 'recv', 'recv-done'):
        self._send_between_slices(clock, computation, instruction)
      elif kind.endswith('-start'):
        where = 'host' if any(s.space == hlo.HOST for s in instruction.shapes) else 'memory'
        inner = self._module.computations.get((*instruction.called, '')[0])
        size = _bytes_written(inner) if inner else _bytes_copied(instruction)
        seconds = size / (self._chip.host_link if where == 'host' else self._chip.bandwidth)
        cost.memory += seconds if where == 'memory' else 0
        clock.start(instruction.name, where, seconds)
      elif kind.endswith(('-update', '-done')):
        clock.follow(instruction.name, instruction.operands[0])
        if kind.endswith('-done'):
          clock.wait(instruction.name)
      elif kind == 'while':
        turns = self._module.trip_count(instruction)
        cost.add(self._cost_of(instruction.attribute('body')), turns)
        cost.decisions += turns + 1 if self._module.known_trip_count(instruction) is None else 0
      elif kind == 'conditional':
        branches = map(self._cost_of, self._module.branches(instruction))
        cost.add(min(branches, key=lambda branch: branch.seconds))
        cost.decisions += 1
      elif kind == 'call':
        cost.add(self._cost_of(instruction.called[0]))
      elif kind not in _FREE:
        self._add_work(cost, computation, instruction)
    return cost

  def _run_collective(self, clock: '_Clock', instruction: hlo.Instruction, name: str,
                      kind: str, axes: tuple[str, ...], size: float):
    """Starts the collective `name` or waits for it; `size` is the bytes that a device sends."""
    stage = _stage(instruction)
    if stage == 'done':
      clock.wait(name)
      return
    self._send(clock, name, kind, axes, size)
    if stage == 'whole':
      clock.wait(name)

  def _send(self, clock: '_Clock', name: str, kind: str, axes: tuple[str, ...], size: float):
    """Starts to send `size` bytes, which may overlap with other work until `name` is waited for.
    """
    speed = self._speed(kind, axes) if axes else math.inf
    seconds = size / speed
    clock.cost.network += seconds
    clock.cost.sent[kind, axes] += size
    clock.start(name, 'network' if speed == self._chip.network else 'links', seconds)

  def _send_between_slices(self, clock: '_Clock', computation: hlo.Computation,
                           instruction: hlo.Instruction):
    """One of the instructions by which TPU slices exchange data through their hosts (`data`)."""
    start = instruction
    if instruction.opcode.endswith('-done'):
      start = computation.get(instruction.operands[0], instruction)  # absent if before this loop
    rendezvous = _RENDEZVOUS.search(start.attributes)
    transfer = _MEGASCALE.search(start.attributes)
    if rendezvous and transfer and instruction.opcode == 'send':
      self._send(clock, rendezvous[1], transfer[1].lower().replace('_', '-'), ('data',),
                 instruction.shapes[0].bytes)
    elif rendezvous and instruction.opcode == 'recv-done':
      clock.wait(rendezvous[1])

  def _add_work(self, cost: Cost, computation: hlo.Computation, instruction: hlo.Instruction):
    """Adds an instruction that nothing overlaps with."""
    flops = self._flops(computation, instruction)
    compute = flops / self._chip.flops
    memory = self._traffic(computation, instruction) / self._chip.bandwidth
    cost.flops += flops
    cost.compute += compute
    cost.memory += memory
    cost.seconds += max(compute, memory)

  def _collective(self, computation: hlo.Computation, instruction: hlo.Instruction):
    """(name, kind, axes, bytes that a device sends) of a collective; None for anything else."""
    kind = instruction.opcode.removesuffix('-start')
    if instruction.opcode in _WRAPPERS and instruction.called:
      # Wrapped in a computation, perhaps a nested one, which another core of the chip may run. The
      # TPU compiler splits a collective into fusions on the same channel: one that starts it, some
      # that continue it amid other work, and one that ends it.
      inner = self._module.computations[instruction.called[0]]
      found = next(filter(None, (self._collective(inner, i) for i in inner.values())), None)
      if not found or _stage(instruction) == 'continues':
        return None
      name, kind, axes, size = found
      if instruction.opcode != 'fusion' or name not in inner:
        return instruction.name, kind, axes, size
      if kind == 'all-reduce' and instruction.shapes[0].bytes < inner[name].shapes[0].bytes:
        kind, size = 'reduce-scatter', size / 2  # a device keeps only its part of the sum
      return inner[name].attribute('channel_id') or name, kind, axes, size
    if kind not in hlo.COLLECTIVES:
      return None
    axes = hlo.axes(instruction, self._mesh)
    n = math.prod(self._mesh.shape[axis] for axis in axes)
    given = sum(s.bytes for o in instruction.operands for s in _shapes(computation, o))
    size = {'all-gather': given * n, 'all-reduce': 2 * given}.get(kind, given)
    return instruction.name, kind, axes, size * (n - 1) / n

  def _flops(self, computation: hlo.Computation, instruction: hlo.Instruction) -> float:
    """The FLOPs of the matmuls in an instruction; elementwise work is not counted."""
    if instruction.opcode == 'dot':
      return _dot_flops(computation, instruction)
    if instruction.opcode == 'convolution':
      return _convolution_flops(computation, instruction)
    if instruction.opcode == 'custom-call':
      return _kernel_flops(computation, instruction, self._filled)
    inner = [self._module.computations[name] for name in instruction.called
             if name in self._module.computations]
    return sum(self._flops(c, i) for c in inner for i in c.values())

  def _traffic(self, computation: hlo.Computation, instruction: hlo.Instruction) -> float:
    """Bytes to and from the chip's memory: results and operands, or the parts of them used."""
    if instruction.opcode == 'custom-call' and 'AllocateBuffer' in instruction.attributes:
      return 0.0
    read: list[float] = [sum(s.bytes for s in _shapes(computation, o) if s.space == hlo.HBM)
                         for o in instruction.operands]
    written = sum(s.bytes for s in instruction.shapes if s.space == hlo.HBM)
    if instruction.opcode in _SLICES:
      return 2 * written
    if instruction.opcode == 'dynamic-update-slice':
      return 2 * computation.shape(instruction.operands[1]).bytes
    if instruction.opcode == 'fusion':
      inner = self._module.computations[instruction.called[0]]
      parameters = [i for i in inner.values() if i.opcode == 'parameter']
      parameters.sort(key=lambda i: int(i.operands[0]))
      for i, parameter in enumerate(parameters[:len(read)]):
        read[i] = min(read[i], _bytes_read(inner, parameter.name))
      written = min(written, _bytes_written(inner))
    return sum(read) + written


def _stage(instruction: hlo.Instruction) -> str:
  """The part of a collective that an instruction is: 'whole', 'start', 'continues' or 'done'."""
  if instruction.opcode != 'fusion':
    return 'start' if instruction.opcode.endswith('-start') else 'whole'
  if 'async' not in instruction.name:
    return 'continues' if 'async_collective' in instruction.attributes else 'whole'
  return next((stage for stage in ('start', 'done') if stage in instruction.name), 'continues')


class _Clock:
  """The time in a computation, and the transfers in progress."""

  def __init__(self, cost: Cost):
    self.cost = cost
    self._free: dict[str, float] = defaultdict(float)  # when each resource is idle again
    self._ends: dict[str, tuple[float, bool]] = {}  # by name: when, and whether it was sent

  def start(self, name: str, where: str, seconds: float):
    """Starts a transfer on a resource once that is idle: 'links', 'network', 'memory' or 'host'."""
    end = self._free[where] = max(self._free[where], self.cost.seconds) + seconds
    self._ends[name] = end, where in ('links', 'network')

  def follow(self, name: str, other: str):
    """Lets `name` end when `other` does."""
    if other in self._ends:
      self._ends[name] = self._ends[other]

  def wait(self, name: str):
    """Advances the time to the end of a transfer."""
    end, is_sent = self._ends.get(name, (0.0, False))
    waits = max(end - self.cost.seconds, 0.0)
    self.cost.seconds += waits
    self.cost.waiting += waits if is_sent else 0


def _shapes(computation: hlo.Computation, name: str):
  found = computation.get(name)
  return found.shapes if found else ()


def _bytes_read(computation: hlo.Computation, name: str) -> float:
  """Bytes of an array that a computation reads; infinite if it may read more than slices of it."""
  total = 0.0
  for user in computation.values():
    if name in user.operands:
      if user.opcode in _SLICES and user.operands[0] == name:
        total += sum(s.bytes for s in user.shapes)
      elif user.opcode == 'dynamic-update-slice' and user.operands[0] == name:
        continue  # written in place
      elif user.opcode in ('bitcast', 'copy', 'reshape', 'convert'):
        total += _bytes_read(computation, user.name)
      elif user.opcode == 'tuple' or user.opcode in hlo.COLLECTIVES:
        continue  # passed through; or sent, which is counted separately
      else:
        return math.inf
  return total


def _bytes_written(computation: hlo.Computation) -> float:
  """Bytes that a computation writes; for an array that it updates in place, only the slice."""
  root = computation.root
  names = root.operands if root.opcode == 'tuple' else (root.name,)
  return sum(_bytes_of_result(computation, name) for name in names)


def _bytes_of_result(computation: hlo.Computation, name: str) -> float:
  """Bytes that are written for one result of a computation."""
  source = computation[name]
  while source.opcode in ('bitcast', 'copy', 'reshape') and source.operands[0] in computation:
    source = computation[source.operands[0]]
  if source.opcode == 'dynamic-update-slice':
    return computation.shape(source.operands[1]).bytes
  if source.opcode in ('parameter', 'custom-call') or source.opcode in hlo.COLLECTIVES:
    return 0.0  # passed through
  return sum(s.bytes for s in computation[name].shapes)


def _bytes_copied(start: hlo.Instruction) -> float:
  """Bytes that an asynchronous copy moves; only the slice if it copies from or to one."""
  return min((s.bytes for s in start.shapes if s.dims and s.dtype == start.shapes[0].dtype),
             default=0.0)


def _dot_flops(computation: hlo.Computation, dot: hlo.Instruction) -> float:
  lhs = computation.shape(dot.operands[0])
  contracted = _matched(r'lhs_contracting_dims=\{([\d,]*)\}', dot)[1]
  inner = math.prod(lhs.dims[int(i)] for i in contracted.split(',') if i)
  return 2.0 * math.prod(dot.shapes[0].dims) * inner


def _convolution_flops(computation: hlo.Computation, convolution: hlo.Instruction) -> float:
  """The FLOPs of a convolution, which is how the TPU compiler writes matmuls.

  Products with padding are not counted.
  """
  labels = _matched(r'dim_labels=(\w+)_(\w+)->(\w+)', convolution).groups()
  lhs, rhs, out = (dict(zip(label, shape.dims)) for label, shape in zip(
      labels, (*(computation.shape(o) for o in convolution.operands), convolution.shapes[0])))
  window = {}
  if 'window={' in convolution.attributes:
    window = dict(part.split('=')
                  for part in _matched(r'window=\{([^}]*)\}', convolution)[1].split())
  groups = int(convolution.attribute('feature_group_count') or 1)
  flops = 2.0 * lhs['f'] / groups * out['f'] * out['b'] / int(
      convolution.attribute('batch_group_count') or 1)
  for i in range(len(labels[0]) - 2):
    field = lambda name, default, i=i: window[name].split('x')[i] if name in window else default
    low = int(field('pad', '0_0').split('_')[0])
    stride, spread, holes = (int(field(name, 1)) for name in ('stride', 'rhs_dilate', 'lhs_dilate'))
    last = (lhs[str(i)] - 1) * holes
    flops *= sum(0 <= at <= last and at % holes == 0
                 for o in range(out[str(i)]) for w in range(rhs[str(i)])
                 for at in (o * stride - low + w * spread,))
  return flops


def _matched(pattern: str, instruction: hlo.Instruction) -> re.Match[str]:
  """The match of an attribute that every such instruction has."""
  found = re.search(pattern, instruction.attributes)
  if not found:
    raise ValueError(f'{instruction.opcode} {instruction.name} has no {pattern}.')
  return found


def _kernel_flops(computation: hlo.Computation, call: hlo.Instruction, filled: float) -> float:
  """The FLOPs of a kernel for matmuls or attention; 0 for others.

  `filled`: the share of its rows that a grouped matmul multiplies.
  """
  shapes = [s for o in call.operands for s in _shapes(computation, o)]
  big = [s for s in shapes if len(s.dims) >= 2 and s.dtype in ('bf16', 'f16', 'f32')]
  if 'ragged-dot' in call.name and len(big) >= 2:
    (rows, inner), other = big[0].dims, big[1].dims  # [M, K] with [G, K, N], or [M, N] for weights
    outer = next((d for d in (other[-1], other[-2]) if d != inner), other[-1])
    return 2.0 * rows * inner * outer * filled
  # Causal attention computes half of all pairs. Each kernel, forward or backward, has this many
  # products of [T, H] and [T, T].
  for kernel, products in (('splash_mha_fwd', 2), ('splash_mha_dkv', 4), ('splash_mha_dq', 3)):
    if kernel in call.attributes and big:
      *lead, T, H = max(big, key=lambda s: len(s.dims)).dims
      return products * math.prod(lead) * T * T * H
  if 'fmha' in call.attributes and big:  # [B, T, N, H]
    B, T, N, H = big[0].dims
    return (5 if 'Backward' in call.attributes else 2) * B * N * T * T * H
  if _MATMUL_CALL.search(call.attributes) and len(big) >= 2:
    dims = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', call.attributes)
    inner = [int(i) for i in re.findall(r'\d+', dims[1])] if dims else [len(big[0].dims) - 1]
    return 2.0 * math.prod(call.shapes[0].dims) * math.prod(big[0].dims[i] for i in inner)
  return 0.0
