"""A run's parameters in memory, over the mesh."""

from collections.abc import Sequence
import dataclasses
import functools
import time
from typing import NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np

from btx_jax import btx
from btx_jax.devices import hardware, sharding
from btx_jax.model import llama
from btx_jax.model.config import Config
from btx_jax.model.source import Source
from btx_jax.run import CHECKPOINT, EDIT, MIX, RANDOM, Run, averaged_model, dense_model
from btx_jax.study import sources
from btx_jax.study.study import Study
from btx_jax.terminal import say
from btx_jax.training import checkpoint


class Branches(NamedTuple):
  """Runs that have just been trained as one program, still in memory.

  Attributes:
    runs: in the order of the slots that they are in.
    params: their parameters, stacked: leaves [slots, ...]; slots may be more than runs.
  """
  runs: Sequence[Run]
  params: dict


def initial(study: Study, run: Run, mesh: Mesh, branches: Branches | None = None):
  """The parameters that a run starts from.

  Args:
    study: whose run it is.
    run: the run.
    mesh: to lay them out on, by sharding.RULES.
    branches: used instead of their checkpoints if the run mixes them; their arrays are deleted
      then, so that they take no memory while the mixture trains.
  """
  if run.init == RANDOM:
    rng = jax.random.key(run.rng_seed)
    return _jitted(functools.partial(llama.init, run.model), run.model, mesh)(rng)
  if branches and mixes(run, branches.runs):
    return _timed(run, functools.partial(_mix_branches, study, run, mesh, branches))
  if run.init in (MIX, EDIT) or run.redraw:
    return _timed(run, lambda: _read(sources.start(study, run), run.model, mesh))
  if run.init == CHECKPOINT:
    params, biased = final(study, run.sources[0], mesh), run.sources[0].model.router_bias
  else:
    unbiased = dataclasses.replace(run.model, router_bias=False)
    params, biased = _read(sources.start(study, run), unbiased, mesh), False
  if run.model.router_bias == biased:
    return params
  return _jitted(functools.partial(llama.with_bias, run.model), run.model, mesh)(params)


def final(study: Study, run: Run, mesh: Mesh):
  """The parameters that a run has after its last step."""
  if not run.steps:
    return initial(study, run, mesh)
  return checkpoint.load_params(
      sources.checkpoints(study, run), run.steps, like(run.model, mesh),
      sources.identity(study, run))


def average(study: Study, run: Run, mesh: Mesh):
  """The plain average of what a mixture was made from: the baseline without experts."""
  return _timed(run, lambda: _read(sources.average(study, run), averaged_model(run), mesh))


def unrouted(study: Study, run: Run, mesh: Mesh):
  """The mixture that a run starts from, with routers of zeros."""
  zeros = np.zeros((run.model.num_layers, run.model.dim, run.model.num_experts), np.float32)
  return _timed(run, lambda: _read(sources.mixture(study, run, zeros), run.model, mesh))


def expert(study: Study, run: Run, number: int, mesh: Mesh):
  """A mixture's expert of this number beside the weights that all share: a dense model.

  Only these weights are read.
  """
  source = sources.Expert(sources.mixture(study, run), number)
  return _read(source, dense_model(run.model), mesh)


def mixes(run: Run, branches: Sequence[Run]) -> bool:
  """Whether a run is trained from a mixture of all of these branches while they are in memory.

  All of its sources must have the same vocabulary. Setting routers from text, and computing a
  reference, needs the memory.
  """
  names = {source.name for source in run.sources}
  return (run.init == MIX and run.steps > 0 and run.routers is None
          and not run.objective.has_reference
          and all(branch.name in names for branch in branches)
          and len({source.model.vocab_size for source in run.sources}) == 1
          and not any(source.vocabulary for source in run.sources))


def mix_stacked(run: Run, slots: Sequence[int | None], mesh: Mesh):
  """The jitted (branches, others) -> parameters of the mixture; see `_mix_branches`.

  Args:
    run: the mixture.
    slots: for each source, its slot among the stacked branches; None if it is one of the others.
    mesh: where branches lie along the axis `expert`, and the mixture by sharding.RULES.
  """
  def mix(branches, others):
    rest = iter(others)
    trees = [next(rest) if slot is None else jax.tree.map(lambda x, at=slot: x[at], branches)
             for slot in slots]
    rng = jax.random.key(run.rng_seed)
    return btx.mix(btx.stack(trees), run.model, rng, run.recipe)

  return _jitted(mix, run.model, mesh)


def slots_of(run: Run, branches: Sequence[Run]) -> list[int | None]:
  """For each source of a mixture, its place among the branches; None if it is not one."""
  place = {branch.name: i for i, branch in enumerate(branches)}
  return [place.get(source.name) for source in run.sources]


def _mix_branches(study: Study, run: Run, mesh: Mesh, branches: Branches):
  """A mixture of branches that are in memory and of other runs, which are read."""
  slots = slots_of(run, branches.runs)
  others = [_read(sources.final(study, source), source.model, mesh)
            for source, slot in zip(run.sources, slots) if slot is None]
  mixed = jax.block_until_ready(mix_stacked(run, slots, mesh)(branches.params, others))
  for leaf in jax.tree.leaves((branches.params, others)):
    leaf.delete()
  return mixed


def _timed(run: Run, make):
  began = time.monotonic()
  params = jax.block_until_ready(make())
  say(f'{", ".join(source.name for source in run.sources)}: combined in '
      f'{time.monotonic() - began:.1f} s, peak memory '
      f'{hardware.peak_memory()["host"] / 1e9:.1f} GB')
  return params


def _read(source: Source, model: Config, mesh: Mesh):
  """A source's parameters, of which each process reads only what its devices hold."""
  return sharding.tree_from_slices(like(model, mesh), source.read)


def _jitted(make, model: Config, mesh: Mesh):
  """`make` jitted, its result laid out as the parameters of the model are."""
  return jax.jit(make, out_shardings=sharding.shardings(llama.shapes(model), mesh))


def like(model: Config, mesh: Mesh):
  """The parameters of a model as shapes over the mesh."""
  shapes = llama.shapes(model)
  return sharding.abstract(shapes, sharding.shardings(shapes, mesh))
