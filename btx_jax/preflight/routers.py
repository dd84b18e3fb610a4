"""What it takes to set routers from text (fitting/) on a topology."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
import numpy as np

from btx_jax.devices import sharding
from btx_jax.fitting import fit, passes, samples
from btx_jax.preflight import hlo
from btx_jax.preflight.cost import CostModel
from btx_jax.preflight.topology import Topology, link_speed
from btx_jax.run import Run, dense_model
from btx_jax.study import params
from btx_jax.study.study import Study
from btx_jax.training import layout
from btx_jax.training.program import batch_shapes


@dataclasses.dataclass(frozen=True)
class RouterPass:
  """The passes over text that set a run's routers.

  Attributes:
    run: its name.
    domains: whose text is read for sums.
    rows: of each domain.
    seconds: of the devices, for all passes, reading of parameters excluded; None if the chip is
      unknown.
    peak: bytes of a device.
    memory: bytes that a device has; None if unknown.
    sums: bytes of the sums of all domains, in the memory of each process and on disk.
  """
  run: str
  domains: int
  rows: int
  seconds: float | None
  peak: float
  memory: float | None
  sums: int

  @property
  def fits(self) -> bool:
    return self.memory is None or self.peak <= self.memory

  def in_words(self) -> str:
    took = '' if self.seconds is None else f' take {self.seconds:.1f} s'
    limit = '' if self.memory is None else f' of {self.memory / 1e9:.1f}'
    read = (f'{self.rows} rows of each of {self.domains} domain(s)' if self.domains else
            'no sums, only passes to choose a temperature')
    return (f'{self.run}: routers from text: {read}{took}; a device needs '
            f'{self.peak / 1e9:.2f} GB{limit}{"" if self.fits else ", which DOES NOT FIT"}; '
            f'the sums are {self.sums / 1e9:.2f} GB in the memory of each process and on disk')

  def as_data(self) -> dict[str, Any]:
    return {**dataclasses.asdict(self), 'fits': self.fits}


def measured(study: Study, topology: Topology, only: str | None) -> list[RouterPass]:
  """Compiles the passes for each run whose routers are set from text; `only` is a single run.

  They take the same with every seed, so one of them stands for all.
  """
  runs = {run.plain_name: run for run in study.runs.values()
          if run.routers and only in (None, run.name)}
  if not runs:
    return []
  chip = topology.chip
  mesh = layout.mesh(study.config, study.runs, topology.devices, chip.memory if chip else None)
  with jax.set_mesh(mesh):
    return [_measure(run, study, topology, mesh) for run in runs.values()]


def _measure(run: Run, study: Study, topology: Topology, mesh) -> RouterPass:
  settings, model, chip = run.routers, run.model, topology.chip
  assert settings is not None
  dense, size = dense_model(model), study.config.evaluation.batch_size
  batch = batch_shapes((size,), run.seq_len, sharding.batch_sharding(mesh))
  columns = jax.ShapeDtypeStruct((model.num_layers, model.dim, model.num_experts), np.float32)
  domains, read = len(settings.domains), len(samples.to_read(run))
  own = jax.ShapeDtypeStruct((domains, model.num_experts), np.bool_)
  kept = len(samples.kept(range(settings.rows)))
  tried = 1 if settings.temperature else len(fit.TEMPERATURES)
  times_and_programs: list[tuple[int, Callable]] = [
      (read * math.ceil((settings.rows - kept) / size),
       lambda: passes.sums_program(dense, mesh).lower(params.like(dense, mesh), batch)),
      (tried * math.ceil(domains * kept / size),
       lambda: passes.routed_program(model, mesh).lower(
           params.like(model, mesh), columns, own, batch))]
  seconds, peak = 0.0, 0.0
  for times, lower in times_and_programs:
    compiled = lower().compile()
    found = compiled.memory_analysis()
    peak = max(peak, found.argument_size_in_bytes + found.temp_size_in_bytes
               + found.output_size_in_bytes)
    if chip:
      module = hlo.parse(compiled.as_text() or '')
      filled = 1 / model.dispatch_factor
      seconds += times * CostModel(module, chip, mesh, link_speed(topology, mesh),
                                   filled).total().seconds
  return RouterPass(
      run.plain_name, read, settings.rows, seconds if chip else None, peak,
      chip.memory if chip else None,
      8 * domains * model.num_layers * model.dim * (model.dim + 1))
