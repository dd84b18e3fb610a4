"""Compiles the programs of a config for a topology, and measures what each of them needs."""

from collections.abc import Sequence
import dataclasses
import math
import re
import time
from typing import NamedTuple

import jax

from btx_jax import btx
from btx_jax.data import domains
from btx_jax.devices import sharding
from btx_jax.devices.hardware import UNKNOWN, Chip
from btx_jax.model import llama
from btx_jax.model.config import num_params
from btx_jax.preflight import hlo
from btx_jax.preflight.cost import Cost, CostModel
from btx_jax.preflight.topology import Topology, link_speed
from btx_jax.run import Run
from btx_jax.study import params, plan
from btx_jax.study.study import Study
from btx_jax.training import layout
from btx_jax.training.program import make_program

_METRICS = 1024  # numbers; every array of a model is larger
_USED = re.compile(r'Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm|'
                   r'temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)')
_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


class Finding(NamedTuple):
  """A property that only the compiled program can prove or refute."""
  holds: bool
  text: str


@dataclasses.dataclass
class Measured:
  """A compiled program, and the runs that need it: one, or several that differ in text and steps.

  Attributes:
    runs: the runs that need it.
    stacked: whether they are branches of one program.
    mesh: sizes of the axes larger than 1.
    devices: number of devices.
    state: bytes of parameters and optimizer state on all devices: the size of a checkpoint.
    compile_seconds: time that the compiler took.
    error: why it does not compile; '' if it does.
    arguments: bytes per device for the state and a batch.
    temporaries: further bytes per device.
    memory: bytes of a device's memory; None if unknown.
    host: bytes per host for saving, and for activations that are offloaded.
    host_memory: bytes of a host's memory; None if unknown.
    cost: of a step on one device, without times if the chip is unknown; None if it does not
      compile.
    findings: properties that the program proves or refutes.
    uneven: a line for each array that the mesh does not divide.
  """
  runs: tuple[Run, ...]
  stacked: bool
  mesh: dict[str, int]
  devices: int
  state: int
  compile_seconds: float = 0.0
  error: str = ''
  arguments: float = 0.0
  temporaries: float = 0.0
  memory: float | None = None
  host: float = 0.0
  host_memory: float | None = None
  cost: Cost | None = None
  findings: list[Finding] = dataclasses.field(default_factory=list)
  uneven: tuple[str, ...] = ()

  @property
  def of_one_seed(self) -> list[Run]:
    """Its runs, each once if the config trains it with several seeds."""
    return [run for run in self.runs if run.series == self.runs[0].series]

  @property
  def params(self) -> int:
    """Parameters of the model."""
    return num_params(self.runs[0].model)

  @property
  def active_params(self) -> int:
    """Parameters that are used for each token."""
    return num_params(self.runs[0].model, active=True)

  @property
  def flops_per_token(self) -> int:
    """FLOPs of the model, forward and backward, without recomputation."""
    return self.runs[0].flops_per_token

  @property
  def tokens(self) -> int:
    """Tokens per step, of all branches together."""
    run = self.runs[0]
    return (len(self.of_one_seed) if self.stacked else 1) * run.batch_size * run.seq_len

  @property
  def peak(self) -> float:
    """The most bytes of a device in use at once."""
    return self.arguments + self.temporaries

  @property
  def fits_device(self) -> bool:
    return not self.error and (self.memory is None or self.peak <= self.memory)

  @property
  def fits_host(self) -> bool:
    return self.host_memory is None or self.host <= self.host_memory

  @property
  def fits(self) -> bool:
    return self.fits_device and self.fits_host

  def mfu(self, chip: Chip) -> float:
    """The model's FLOPs in a step, as a share of what the devices could compute in its time."""
    seconds = self.cost.seconds if self.cost else math.inf
    return self.tokens * self.flops_per_token / (seconds * self.devices * chip.flops)


def programs(study: Study, topology: Topology, only: str | None = None):
  """Compiles every program that the runs of a study need, one after another.

  Args:
    study: whose runs to measure.
    topology: the devices to compile for.
    only: a single run to measure, as if trained by a job of its own; all runs if None.

  Yields:
    a Measured for each program.

  Raises:
    UsageError: a run does not fit the mesh on this topology.
  """
  chip = topology.chip
  mesh = layout.mesh(study.config, study.runs, topology.devices, chip.memory if chip else None)
  layout.evaluation_rows(study.config, mesh)  # refuses what training would refuse
  asked = study.runs.values() if only is None else [study.run(only)]
  trained = [run for run in asked if run.steps]
  wanted: dict[str, list[list[Run]]] = {}
  stacked = () if only else study.config.stacked
  for group in plan.groups(trained, stacked):
    for run in group:
      layout.check(run, mesh, stacked=len(group) > 1)
    wanted.setdefault(_key(group), []).append(group)
  for groups in wanted.values():
    with jax.set_mesh(mesh):
      yield _measure(groups, study, topology, mesh)


def _key(group: Sequence[Run]) -> str:
  """A key that is equal for groups of runs whose programs differ at most in learning rates."""
  fields = [(run.model, run.seq_len, run.batch_size, run.microbatches, run.objective, run.outer,
             run.skip_nonfinite > 0,
             dataclasses.replace(run.optimizer, peak_lr=1.0, warmup=0.0, decay=1.0, final_lr=0.0))
            for run in group]
  return repr((fields, len(group)))


def _measure(groups: list[list[Run]], study: Study, topology: Topology, mesh) -> Measured:
  group, chip = groups[0], topology.chip
  run, stacked = group[0], len(group) > 1
  program = make_program(group, mesh, len(domains.trained(study.config.domains)))
  state = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(program.state_shapes))
  result = Measured(
      runs=tuple(each for group in groups for each in group), stacked=stacked,
      mesh={axis: n for axis, n in mesh.shape.items() if n > 1}, devices=mesh.size,
      state=state, memory=chip.memory if chip else None, uneven=tuple(layout.uneven(run, mesh)),
      host_memory=chip.host_memory * len(topology.devices) / topology.hosts if chip else None)
  began = time.monotonic()
  try:
    compiled = program.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    result.compile_seconds = time.monotonic() - began
    result.error = 'the compiler found no way to fit it into the memory'
    if used := _USED.search(str(error)):
      taken, unit, there, unit_there = filter(None, used.groups())
      result.arguments = 0 if stacked else _bytes_per_device(program.state_shapes)
      result.host = result.arguments * mesh.size / topology.hosts
      result.temporaries = max(float(taken) * _UNITS[unit] - result.arguments, 0)
      result.memory = float(there) * _UNITS[unit_there]
    return result
  result.compile_seconds = time.monotonic() - began
  module = hlo.parse(compiled.as_text() or '')
  _read_memory(result, compiled, mesh.size / topology.hosts, on_cpu=not chip)
  filled = 1 / run.model.dispatch_factor if run.model.num_experts else 1.0
  result.cost = CostModel(module, chip or UNKNOWN, mesh, link_speed(topology, mesh),
                          filled).total()
  if stacked:
    result.findings.append(_check_branches_apart(module, mesh))
  for mixture in study.runs.values() if stacked else ():
    if _mixes_in_place(mixture, group, mesh):
      result.findings.append(_check_mixing(mixture, group, mesh))
  return result


def _read_memory(result: Measured, compiled, devices_per_host: float, on_cpu: bool):
  """Fills in `arguments`, `temporaries` and `host` from the compiler's analysis."""
  found = compiled.memory_analysis()
  result.arguments = found.argument_size_in_bytes
  # The state is updated in place; other outputs are only a few metrics. Temporaries whose lifetimes
  # do not overlap share memory, so the compiler's peak counts if it reports one.
  outputs = found.output_size_in_bytes - found.alias_size_in_bytes
  result.temporaries = found.temp_size_in_bytes + outputs
  # On a CPU the peak does not include temporaries.
  peak = getattr(found, 'peak_memory_in_bytes', 0)
  if peak and not on_cpu:
    result.temporaries = min(result.temporaries, max(peak - result.arguments, 0))
  result.host = (result.arguments + found.host_temp_size_in_bytes) * devices_per_host


def _bytes_per_device(state) -> int:
  """The bytes of a state that one device holds."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
             for x in jax.tree.leaves(state))


def _check_branches_apart(module: hlo.Module, mesh) -> Finding:
  """Whether stacked branches exchange nothing but metrics."""
  crossing = [c for c in hlo.collectives(module, mesh) if 'expert' in c.axes]
  most = max((math.prod(shape) for c in crossing for shape in c.shapes), default=0)
  return Finding(most <= _METRICS, (
      f'branches send each other at most {most} numbers at a time along mesh.expert, in '
      f'{len(crossing)} collectives: metrics, and no parameter, gradient or activation'))


def _check_mixing(run: Run, branches: Sequence[Run], mesh) -> Finding:
  """Whether mixing stacked branches in memory moves no feed-forward weight between devices."""
  like = jax.eval_shape(lambda: btx.branch(
      llama.init(branches[0].model, jax.random.key(0)), len(branches)))
  like = sharding.abstract(like, sharding.shardings(like, mesh, stacked=True))
  mix = params.mix_stacked(run, params.slots_of(run, branches), mesh)
  module = hlo.parse(mix.lower(like, []).compile().as_text() or '')
  found = hlo.collectives(module, mesh)
  wide = [c for c in found if any(run.model.ffn_dim in shape for shape in c.shapes)]
  return Finding(not wide, (
      f'mixing {run.name} from branches along mesh.expert moves '
      f'{"feed-forward weights" if wide else "no feed-forward weight"}; {len(found)} collectives '
      'combine the rest'))


def _mixes_in_place(run: Run, branches: Sequence[Run], mesh) -> bool:
  """Whether a run mixes exactly these branches, each on the devices that its expert will be on."""
  one_each = tuple(((i, 0, run.model.ffn_dim),) for i in range(len(run.sources)))
  return (params.mixes(run, branches) and run.recipe is not None
          and run.recipe.pieces == one_each
          and params.slots_of(run, branches) == list(range(mesh.shape['expert'])))
