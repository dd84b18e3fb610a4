"""What a step costs on one device: a compiled program's schedule gone through with a clock.

Each instruction takes as long as its FLOPs or its memory traffic do at the chip's peak, whichever
is longer. A collective takes as long as its bytes do over the links of its axes. It hides behind
other work only where the schedule has it start and end as a pair; all else waits for it. Loops
count as often as they run; of a conditional, the branch that takes least (overflow rounds of
experts do not happen at a balanced load). So it is what the program would take if every part of
it ran at the peak, not what a device will measure.
"""

from collections import Counter, defaultdict
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
_MEETING = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')
_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="([^"]*)"')
_WRAPPERS = ('fusion', 'async-start', 'call-start', 'custom-call-start')
_SLICES = ('dynamic-slice', 'slice', 'gather')


@dataclasses.dataclass
class Cost:
  """Of one device, once through a computation.

  Attributes:
    seconds: in all.
    compute: seconds that its FLOPs take at the peak.
    memory: seconds that its memory traffic takes at the peak.
    network: seconds that its collectives take.
    waiting: those of `network` that nothing hides.
    flops: of matmuls and kernels.
    sent: bytes by (kind of collective, axes), (n - 1) / n of each buffer, an all-reduce twice.
  """
  seconds: float = 0.0
  compute: float = 0.0
  memory: float = 0.0
  network: float = 0.0
  waiting: float = 0.0
  flops: float = 0.0
  sent: Counter = dataclasses.field(default_factory=Counter)

  def add(self, other: 'Cost', times: int = 1):
    """Adds `other`, so many times, behind this."""
    for field in ('seconds', 'compute', 'memory', 'network', 'waiting', 'flops'):
      setattr(self, field, getattr(self, field) + times * getattr(other, field))
    for key, value in other.sent.items():
      self.sent[key] += times * value


class Model:
  """Costs of a module's computations on a chip."""

  def __init__(self, module: hlo.Module, chip: Chip, mesh,
               speed: Callable[[str, tuple[str, ...]], float], filled: float = 1.0):
    """`speed`: (kind of collective, axes) -> bytes a second; `filled`: see `_kernel_flops`."""
    self._module, self._chip, self._mesh = module, chip, mesh
    self._speed, self._filled = speed, filled
    self.of = functools.cache(self._of)

  def total(self) -> Cost:
    """Of the program."""
    return self.of(self._module.entry)

  def _of(self, name: str) -> Cost:
    computation, cost = self._module.computations[name], Cost()
    clock = _Clock(cost)
    for instruction in computation.values():
      kind = instruction.opcode
      if moved := self._collective(computation, instruction):
        self._communicate(clock, instruction, *moved)
      elif kind in ('send', 'send-done', 'recv', 'recv-done'):
        self._between_slices(clock, computation, instruction)
      elif kind.endswith('-start'):
        where = 'host' if any(s.space == hlo.HOST for s in instruction.shapes) else 'memory'
        inner = self._module.computations.get((*instruction.called, '')[0])
        size = _updated(inner) if inner else _moved(instruction)
        seconds = size / (self._chip.host_link if where == 'host' else self._chip.bandwidth)
        cost.memory += seconds if where == 'memory' else 0
        clock.start(instruction.name, where, seconds)
      elif kind.endswith(('-update', '-done')):
        clock.follow(instruction.name, instruction.operands[0])
        if kind.endswith('-done'):
          clock.wait(instruction.name)
      elif kind == 'while':
        cost.add(self.of(instruction.attribute('body')), self._module.trips(instruction))
      elif kind == 'conditional':
        cost.add(min(map(self.of, self._module.branches(instruction)), key=lambda c: c.seconds))
      elif kind == 'call':
        cost.add(self.of(instruction.called[0]))
      elif kind not in _FREE:
        self._work(cost, computation, instruction)
    return cost

  def _communicate(self, clock: '_Clock', instruction: hlo.Instruction, collective: str,
                   kind: str, axes: tuple[str, ...], size: float):
    """A collective, `collective` by name; `size` is what a device sends."""
    stage = _stage(instruction)
    if stage == 'done':
      clock.wait(collective)
      return
    self._send(clock, collective, kind, axes, size)
    if stage == 'whole':
      clock.wait(collective)

  def _send(self, clock: '_Clock', name: str, kind: str, axes: tuple[str, ...], size: float):
    """`size` bytes are on their way from now on, until somebody waits for `name`."""
    seconds = size / self._speed(kind, axes) if axes else 0.0
    clock.cost.network += seconds
    clock.cost.sent[kind, axes] += size
    clock.start(name, 'network', seconds)

  def _between_slices(self, clock: '_Clock', computation: hlo.Computation,
                      instruction: hlo.Instruction):
    """What TPU slices send each other goes through their hosts, along `data`."""
    begins = instruction
    if instruction.opcode.endswith('-done'):
      begins = computation.get(instruction.operands[0], instruction)  # or before this loop
    meeting, does = (pattern.search(begins.attributes) for pattern in (_MEETING, _MEGASCALE))
    if meeting and does and instruction.opcode == 'send':
      self._send(clock, meeting[1], does[1].lower().replace('_', '-'), ('data',),
                 instruction.shapes[0].bytes)
    elif meeting and instruction.opcode == 'recv-done':
      clock.wait(meeting[1])

  def _work(self, cost: Cost, computation: hlo.Computation, instruction: hlo.Instruction):
    flops = self._flops(computation, instruction)
    compute = flops / self._chip.flops
    memory = self._traffic(computation, instruction) / self._chip.bandwidth
    cost.flops += flops
    cost.compute += compute
    cost.memory += memory
    cost.seconds += max(compute, memory)

  def _collective(self, computation: hlo.Computation, instruction: hlo.Instruction):
    """(name, kind, axes, bytes that a device sends) of a collective; None of anything else."""
    kind = instruction.opcode.removesuffix('-start')
    if instruction.opcode in _WRAPPERS and instruction.called:
      # Wrapped in a computation, or in one within, which another core of the chip may run. The
      # TPU's compiler has collectives start, go on in the midst of other fusions, and be done,
      # each by a fusion of its own on the same channel.
      inner = self._module.computations[instruction.called[0]]
      found = next(filter(None, (self._collective(inner, i) for i in inner.values())), None)
      if not found or _stage(instruction) == 'goes on':
        return None
      name, kind, axes, size = found
      if instruction.opcode != 'fusion' or name not in inner:
        return instruction.name, kind, axes, size
      if kind == 'all-reduce' and instruction.shapes[0].bytes < inner[name].shapes[0].bytes:
        kind, size = 'reduce-scatter', size / 2  # a device keeps its part of the sum only
      return inner[name].attribute('channel_id') or name, kind, axes, size
    if kind not in hlo.COLLECTIVES:
      return None
    axes = hlo.axes(instruction, self._mesh)
    n = math.prod(self._mesh.shape[axis] for axis in axes)
    given = sum(s.bytes for o in instruction.operands for s in _shapes(computation, o))
    size = {'all-gather': given * n, 'all-reduce': 2 * given}.get(kind, given)
    return instruction.name, kind, axes, size * (n - 1) / n

  def _flops(self, computation: hlo.Computation, instruction: hlo.Instruction) -> float:
    """Of matmuls in it; elementwise work is not counted."""
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
    """Bytes to and from the chip's memory: results and operands, or the parts of them in use."""
    if instruction.opcode == 'custom-call' and 'AllocateBuffer' in instruction.attributes:
      return 0.0
    read = [sum(s.bytes for s in _shapes(computation, o) if s.space == hlo.HBM)
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
        read[i] = min(read[i], _used(inner, parameter.name))
      written = min(written, _updated(inner))
    return sum(read) + written


def _stage(instruction: hlo.Instruction) -> str:
  """Of a collective: 'whole', or what part of its course this is."""
  if instruction.opcode != 'fusion':
    return 'start' if instruction.opcode.endswith('-start') else 'whole'
  if 'async' not in instruction.name:
    return 'goes on' if 'async_collective' in instruction.attributes else 'whole'
  return next((stage for stage in ('start', 'done') if stage in instruction.name), 'goes on')


class _Clock:
  """Time in a computation, and what is under way meanwhile."""

  def __init__(self, cost: Cost):
    self.cost = cost
    self._free: dict[str, float] = defaultdict(float)  # when network and memory are idle again
    self._ends: dict[str, tuple[float, bool]] = {}  # when, and whether it is the network's

  def start(self, name: str, where: str, seconds: float):
    end = self._free[where] = max(self._free[where], self.cost.seconds) + seconds
    self._ends[name] = end, where == 'network'

  def follow(self, name: str, other: str):
    """`name` is done when `other` is."""
    if other in self._ends:
      self._ends[name] = self._ends[other]

  def wait(self, name: str):
    end, on_network = self._ends.get(name, (0.0, False))
    waits = max(end - self.cost.seconds, 0.0)
    self.cost.seconds += waits
    self.cost.waiting += waits if on_network else 0


def _shapes(computation: hlo.Computation, name: str):
  found = computation.get(name)
  return found.shapes if found else ()


def _used(computation: hlo.Computation, name: str) -> float:
  """Bytes of an array that a computation reads: of slices, if it takes nothing else of it."""
  total = 0.0
  for user in computation.values():
    if name in user.operands:
      if user.opcode in _SLICES and user.operands[0] == name:
        total += sum(s.bytes for s in user.shapes)
      elif user.opcode == 'dynamic-update-slice' and user.operands[0] == name:
        continue  # written in place
      elif user.opcode in ('bitcast', 'copy', 'reshape', 'convert'):
        total += _used(computation, user.name)
      elif user.opcode == 'tuple' or user.opcode in hlo.COLLECTIVES:
        continue  # handed on; or sent, which has a price of its own
      else:
        return math.inf
  return total


def _updated(computation: hlo.Computation) -> float:
  """Bytes that a computation writes: of arrays that it updates in place, the slices."""
  root = computation.root
  names = root.operands if root.opcode == 'tuple' else (root.name,)
  return sum(_written(computation, name) for name in names)


def _moved(start: hlo.Instruction) -> float:
  """Bytes that a copy moves: of what is copied from or to a slice, the slice."""
  return min((s.bytes for s in start.shapes if s.dims and s.dtype == start.shapes[0].dtype),
             default=0.0)


def _written(computation: hlo.Computation, name: str) -> float:
  made = computation[name]
  while made.opcode in ('bitcast', 'copy', 'reshape') and made.operands[0] in computation:
    made = computation[made.operands[0]]
  if made.opcode == 'dynamic-update-slice':
    return computation.shape(made.operands[1]).bytes
  if made.opcode in ('parameter', 'custom-call') or made.opcode in hlo.COLLECTIVES:
    return 0.0  # handed on
  return sum(s.bytes for s in computation[name].shapes)


def _dot_flops(computation: hlo.Computation, dot: hlo.Instruction) -> float:
  lhs = computation.shape(dot.operands[0])
  contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', dot.attributes)[1]
  inner = math.prod(lhs.dims[int(i)] for i in contracted.split(',') if i)
  return 2.0 * math.prod(dot.shapes[0].dims) * inner


def _convolution_flops(computation: hlo.Computation, convolution: hlo.Instruction) -> float:
  """The TPU's compiler writes matmuls as convolutions; products with padding are none."""
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', convolution.attributes).groups()
  lhs, rhs, out = (dict(zip(label, shape.dims)) for label, shape in zip(
      labels, (*(computation.shape(o) for o in convolution.operands), convolution.shapes[0])))
  window = dict(part.split('=') for part in re.search(
      r'window=\{([^}]*)\}', convolution.attributes)[1].split()) if (
          'window={' in convolution.attributes) else {}
  groups = int(convolution.attribute('feature_group_count') or 1)
  flops = 2.0 * lhs['f'] / groups * out['f'] * out['b'] / int(
      convolution.attribute('batch_group_count') or 1)
  for i in range(len(labels[0]) - 2):
    part = lambda name, default, i=i: window[name].split('x')[i] if name in window else default
    low = int(part('pad', '0_0').split('_')[0])
    stride, spread, holes = (int(part(name, 1)) for name in ('stride', 'rhs_dilate', 'lhs_dilate'))
    last = (lhs[str(i)] - 1) * holes
    flops *= sum(0 <= at <= last and at % holes == 0
                 for o in range(out[str(i)]) for w in range(rhs[str(i)])
                 for at in (o * stride - low + w * spread,))
  return flops


def _kernel_flops(computation: hlo.Computation, call: hlo.Instruction, filled: float) -> float:
  """Of matmuls and attention by kernels; 0 of others.

  `filled`: the share of its rows that a grouped matmul multiplies.
  """
  shapes = [s for o in call.operands for s in _shapes(computation, o)]
  big = [s for s in shapes if len(s.dims) >= 2 and s.dtype in ('bf16', 'f16', 'f32')]
  if 'ragged-dot' in call.name and len(big) >= 2:
    (rows, inner), other = big[0].dims, big[1].dims  # [M, K] with [G, K, N] or, of weights, [M, N]
    outer = next((d for d in (other[-1], other[-2]) if d != inner), other[-1])
    return 2.0 * rows * inner * outer * filled
  # Causal attention: half of all pairs; products of [T, H] by [T, T] forward and in each kernel of
  # the backward pass.
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
