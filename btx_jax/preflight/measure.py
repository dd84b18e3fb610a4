"""The programs of a config compiled for a topology, and what each of them takes."""

from collections.abc import Sequence
import dataclasses
import math
import re
import time
from typing import NamedTuple

import jax

from btx_jax import btx
from btx_jax.devices import sharding
from btx_jax.devices.hardware import UNKNOWN
from btx_jax.devices.sharding import abstract
from btx_jax.model import config as model_config
from btx_jax.model import llama
from btx_jax.preflight import cost as cost_lib
from btx_jax.preflight import hlo
from btx_jax.preflight import topology as topology_lib
from btx_jax.preflight.topology import Topology
from btx_jax.run import Run
from btx_jax.study import params
from btx_jax.study import plan as plan_lib
from btx_jax.study.study import Study
from btx_jax.training import layout
from btx_jax.training.program import make_program

_METRICS = 1024  # numbers; no array of a model is so small
_USED = re.compile(r'Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm|'
                   r'temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)')
_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


class Finding(NamedTuple):
  """Something that the compiled program alone can prove, or refute."""
  holds: bool
  text: str


@dataclasses.dataclass
class Measured:
  """One program, which one run needs, or several that differ in text and steps alone.

  Attributes:
    runs: that need it.
    stacked: they are branches of one program.
    mesh: sizes of the axes that are more than 1.
    devices: in all.
    state: bytes of parameters and optimizer, all devices together: of a checkpoint.
    compile_seconds: that the compiler took.
    error: why there is no program, or ''.
    arguments: bytes of a device that hold the state and a batch.
    temporaries: bytes of a device besides.
    memory: bytes that a device has; None where that is not known.
    host: bytes of a host that saving takes, and activations that are offloaded.
    host_memory: bytes that a host has.
    cost: of a step on one device, in no time where the chip is not known; None without a program.
    findings: what the program proves.
    uneven: what the mesh does not divide, a line each.
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
  cost: cost_lib.Cost | None = None
  findings: list[Finding] = dataclasses.field(default_factory=list)
  uneven: tuple[str, ...] = ()

  @property
  def params(self) -> int:
    """Of the model."""
    return model_config.num_params(self.runs[0].model)

  @property
  def active_params(self) -> int:
    """Those that a token meets."""
    return model_config.num_params(self.runs[0].model, active=True)

  @property
  def flops_per_token(self) -> int:
    """Of the model, forward and backward, without what is recomputed."""
    return model_config.train_flops_per_token(self.runs[0].model, self.runs[0].seq_len)

  @property
  def tokens(self) -> int:
    """Of a step, all branches together."""
    run = self.runs[0]
    return (len(self.runs) if self.stacked else 1) * run.batch_size * run.seq_len

  @property
  def peak(self) -> float:
    """Bytes of a device that are in use at once at most."""
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

  def mfu(self, chip) -> float:
    """The model's FLOPs of a step over what the devices could do in its time."""
    return self.tokens * self.flops_per_token / (
        self.cost.seconds * self.devices * chip.flops)


def programs(study: Study, topology: Topology, only: str | None = None):
  """Yields a Measured of every program that the study's runs need, compiled one after another.

  `only` is the run to do it for, as a job of its own, where it is not for all.

  Raises:
    UsageError: a run cannot be laid on the topology.
  """
  chip = topology.chip
  mesh = layout.mesh(study.config, study.runs, topology.devices, chip and chip.memory)
  asked = study.runs.values() if only is None else [study.run(only)]
  trained = [run for run in asked if run.steps]
  wanted: dict[str, list[list[Run]]] = {}
  stacked = () if only else study.config.stacked
  for group in plan_lib.groups(trained, stacked):
    for run in group:
      layout.check(run, mesh, stacked=len(group) > 1)
    wanted.setdefault(_key(group), []).append(group)
  for groups in wanted.values():
    with jax.set_mesh(mesh):
      yield _measure(groups, study, topology, mesh)


def _key(group: Sequence[Run]) -> str:
  """Equal for groups of runs that the same program trains, but for its learning rates."""
  fields = [(run.model, run.seq_len, run.batch_size, run.microbatches, run.objective,
             dataclasses.replace(run.optimizer, peak_lr=1.0, warmup=0.0, final_lr=0.0))
            for run in group]
  return repr((fields, len(group)))


def _measure(groups: list[list[Run]], study: Study, topology: Topology, mesh) -> Measured:
  group, chip = groups[0], topology.chip
  run, stacked = group[0], len(group) > 1
  domains = len(study.config.domains)
  program = make_program(group, mesh, domains)
  state = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(program.state_shapes))
  result = Measured(
      runs=tuple(each for group in groups for each in group), stacked=stacked,
      mesh={axis: n for axis, n in mesh.shape.items() if n > 1}, devices=mesh.size,
      state=state, memory=chip and chip.memory, uneven=tuple(layout.uneven(run, mesh)),
      host_memory=chip and chip.host_memory * len(topology.devices) / topology.hosts)
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
      result.arguments = 0 if stacked else _held(program.state_shapes)
      result.host = result.arguments * mesh.size / topology.hosts
      result.temporaries = max(float(taken) * _UNITS[unit] - result.arguments, 0)
      result.memory = float(there) * _UNITS[unit_there]
    return result
  result.compile_seconds = time.monotonic() - began
  module = hlo.parse(compiled.as_text())
  _read_memory(result, compiled, mesh.size / topology.hosts, on_cpu=not chip)
  filled = 1 / run.model.dispatch_factor if run.model.num_experts else 1.0
  result.cost = cost_lib.Model(module, chip or UNKNOWN, mesh, topology_lib.speed(topology, mesh),
                               filled).total()
  if stacked:
    result.findings.append(_branches_are_apart(module, mesh))
  for mixture in study.runs.values() if stacked else ():
    if _in_place(mixture, group, mesh):
      result.findings.append(_mixing_moves(mixture, group, mesh))
  return result


def _read_memory(result: Measured, compiled, per_host: float, on_cpu: bool):
  found = compiled.memory_analysis()
  result.arguments = found.argument_size_in_bytes
  # The state is updated in place; what is given besides are a few metrics. Temporaries that are
  # never there at once share memory: where the compiler tells its peak, that counts.
  besides = found.output_size_in_bytes - found.alias_size_in_bytes
  result.temporaries = found.temp_size_in_bytes + besides
  # On a CPU that leaves temporaries out.
  peak = getattr(found, 'peak_memory_in_bytes', 0)
  if peak and not on_cpu:
    result.temporaries = min(result.temporaries, max(peak - result.arguments, 0))
  result.host = (result.arguments + found.host_temp_size_in_bytes) * per_host


def _held(state) -> int:
  """Bytes of it that one device holds."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
             for x in jax.tree.leaves(state))


def _branches_are_apart(module: hlo.Module, mesh) -> Finding:
  """What stacked branches tell each other."""
  crossing = [c for c in hlo.collectives(module, mesh) if 'expert' in c.axes]
  most = max((math.prod(shape) for c in crossing for shape in c.shapes), default=0)
  return Finding(most <= _METRICS, (
      f'branches send each other at most {most} numbers at a time along mesh.expert, in '
      f'{len(crossing)} collectives: metrics, and no parameter, gradient or activation'))


def _mixing_moves(run: Run, branches: Sequence[Run], mesh) -> Finding:
  """What mixing sends if every branch lies where its expert does: the program that runs."""
  like = jax.eval_shape(lambda: btx.branch(
      llama.init(branches[0].model, jax.random.key(0)), len(branches)))
  like = abstract(like, sharding.shardings(like, mesh, stacked=True))
  mix = params.mix_stacked(run, params.slots_of(run, branches), mesh)
  found = hlo.collectives(hlo.parse(mix.lower(like, []).compile().as_text()), mesh)
  wide = [c for c in found if any(run.model.ffn_dim in shape for shape in c.shapes)]
  return Finding(not wide, (
      f'mixing {run.name} of branches along mesh.expert moves '
      f'{"feed-forward weights" if wide else "no feed-forward weight"}; {len(found)} collectives '
      'sum what is averaged'))


def _in_place(run: Run, branches: Sequence[Run], mesh) -> bool:
  """Whether a run mixes just these branches, and each lies on the devices of its expert."""
  one_each = tuple(((i, 0, run.model.ffn_dim),) for i in range(len(run.sources)))
  return (params.mixes(run, branches) and run.recipe.pieces == one_each
          and params.slots_of(run, branches) == list(range(mesh.shape['expert'])))
