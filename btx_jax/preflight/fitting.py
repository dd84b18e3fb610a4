"""Time and memory that setting routers or a linear selector from text (fitting/) takes."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
import numpy as np

from btx_jax.devices import sharding
from btx_jax.fitting import fit, passes, reading, samples
from btx_jax.preflight import hlo
from btx_jax.preflight.cost import CostModel
from btx_jax.preflight.topology import Topology, link_speed
from btx_jax.recipe import RoutersFromText
from btx_jax.run import Run, dense_model, reader_model
from btx_jax.selector import Linear
from btx_jax.study import params
from btx_jax.study.study import Study
from btx_jax.training import layout
from btx_jax.training.batches import shapes_of_rows

# A pass over text: how many batches it computes, and what lowers its program.
Pass = tuple[int, Callable[[], jax.stages.Lowered]]


@dataclasses.dataclass(frozen=True)
class Fit:
  """The passes over text that set a run's routers or its selector.

  Attributes:
    run: its name.
    what: 'routers' or 'selector'.
    domains: how many domains' text is read for sums.
    rows: of each domain.
    seconds: of the devices, for all passes, reading of parameters excluded; None if the chip is
      unknown.
    peak: bytes of a device.
    memory: bytes that a device has; None if unknown.
    sums: bytes of the sums of all domains, in the memory of each process and on disk.
  """
  run: str
  what: str
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
    return (f'{self.run}: {self.what} from text: {read}{took}; a device needs '
            f'{self.peak / 1e9:.2f} GB{limit}{"" if self.fits else ", which DOES NOT FIT"}; '
            f'the sums are {self.sums / 1e9:.2f} GB in the memory of each process and on disk')

  def as_data(self) -> dict[str, Any]:
    return {**dataclasses.asdict(self), 'fits': self.fits}


def measured(study: Study, topology: Topology, only: str | None) -> list[Fit]:
  """Compiles the passes for each run of which something is set from text; `only` is a single run.

  They take the same with every seed, so one of them stands for all.
  """
  runs = {run.plain_name: run for run in study.runs.values()
          if run.fitted and only in (None, run.name)}
  if not runs:
    return []
  chip = topology.chip
  mesh = layout.mesh(study.config, study.runs, topology.devices, chip.memory if chip else None)
  with jax.set_mesh(mesh):
    return [_measure(run, study, topology, mesh) for run in runs.values()]


def _measure(run: Run, study: Study, topology: Topology, mesh) -> Fit:
  settings, chip = samples.settings(run), topology.chip
  if isinstance(settings, Linear):
    what, layers, steps = 'selector', 1, _selector_passes(run, settings, study, mesh)
  else:
    what, layers, steps = 'routers', run.model.num_layers, _router_passes(
        run, settings, study, mesh)
  seconds, peak = 0.0, 0.0
  for batches, lower in steps:
    compiled = lower().compile()
    found = compiled.memory_analysis()
    assert found is not None  # the compilers of CPUs, GPUs and TPUs all report it
    peak = max(peak, found.argument_size_in_bytes + found.temp_size_in_bytes
               + found.output_size_in_bytes)
    if chip:
      module = hlo.parse(compiled.as_text() or '')
      filled = 1 / run.model.dispatch_factor
      seconds += batches * CostModel(module, chip, mesh, link_speed(topology, mesh),
                                     filled).total().seconds
  return Fit(
      run.plain_name, what, len(samples.to_read(run)), settings.rows, seconds if chip else None,
      peak, chip.memory if chip else None,
      8 * len(settings.domains) * layers * run.model.dim * (run.model.dim + 1))


def _router_passes(run: Run, settings: RoutersFromText, study: Study, mesh) -> list[Pass]:
  """The passes of fit.fit: sums, then what each temperature scores."""
  model, dense, domains = run.model, dense_model(run.model), len(settings.domains)
  size, batch = _batch(run, study, mesh)
  columns = jax.ShapeDtypeStruct((model.num_layers, model.dim, model.num_experts), np.float32)
  own = jax.ShapeDtypeStruct((domains, model.num_experts), np.bool_)
  to_fit, kept = _counts(settings.rows)
  tried = 1 if settings.temperature else len(fit.TEMPERATURES)
  return [
      (len(samples.to_read(run)) * math.ceil(to_fit / size),
       lambda: passes.sums_program(dense, mesh).lower(params.like(dense, mesh), batch)),
      (tried * math.ceil(domains * kept / size),
       lambda: passes.routed_program(model, mesh).lower(
           params.like(model, mesh), columns, own, batch))]


def _selector_passes(run: Run, settings: Linear, study: Study, mesh) -> list[Pass]:
  """The passes of select.fit: sums, then the logits of the rows that are kept apart."""
  model, whole, domains = reader_model(run), run.reader.model, len(settings.domains)
  size, batch = _batch(run, study, mesh)
  decay = jax.ShapeDtypeStruct((), np.float32)
  columns = jax.ShapeDtypeStruct((model.dim, len(run.experts)), np.float32)
  to_fit, kept = _counts(settings.rows)
  return [
      (domains * math.ceil(to_fit / size),
       lambda: reading.sums_program(model, mesh).lower(params.like(whole, mesh), decay, batch)),
      (domains * math.ceil(kept / size),
       lambda: reading.logits_program(model, mesh).lower(
           params.like(whole, mesh), columns, batch))]


def _counts(rows: int) -> tuple[int, int]:
  """How many of a domain's rows are fitted to, and how many are kept apart."""
  return len(samples.to_fit(range(rows))), len(samples.kept(range(rows)))


def _batch(run: Run, study: Study, mesh):
  """The rows of a batch, and its shapes."""
  size = layout.evaluation_rows(study.config, mesh)
  return size, shapes_of_rows((size,), run.seq_len, sharding.batch_sharding(mesh))
