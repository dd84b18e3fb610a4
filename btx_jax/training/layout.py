"""How the runs of a config are laid out on devices, which need not exist yet (preflight)."""

from collections.abc import Mapping, Sequence
import math

import jax

from btx_jax.devices import hardware, sharding
from btx_jax.devices.mesh import (
  BATCH_AXES,
  BRANCH_BATCH_AXES,
  check_rows,
  choose_sizes,
  count_slices,
  make_mesh,
  row_ways,
)
from btx_jax.errors import UsageError
from btx_jax.model import llama
from btx_jax.model.config import num_params
from btx_jax.run import Run

_EVALUATION_ROWS = 32  # at least, unless the config sets them


def mesh(config, runs: Mapping[str, Run], devices: Sequence, memory: float | None
         ) -> jax.sharding.Mesh:
  """The mesh of a config; sizes that it leaves open are chosen for its runs.

  Args:
    config: as btx_jax/base.py makes it.
    runs: of the config.
    devices: all of them.
    memory: bytes per device; None if unknown.

  Raises:
    UsageError: the mesh does not fit the devices.
  """
  sizes = dict(config.mesh)
  if 0 in sizes.values():
    models = [run.model for run in runs.values()]
    experts = {model.num_experts for model in models if model.num_experts} | {
        run.workers for run in runs.values() if run.outer}
    state = max(map(_state_bytes, runs.values()), default=0)
    sizes = choose_sizes(sizes, len(devices), experts, state, memory, count_slices(devices))
  return make_mesh(**sizes, devices=devices)


def _state_bytes(run: Run) -> int:
  """Bytes of float32 parameters, gradients and Adam's two moments.

  Several workers have these each, besides the parameters and the momentum that they share.
  """
  return num_params(run.model) * (16 * run.workers + (8 if run.outer else 0))


def mesh_here(config, runs: Mapping[str, Run]) -> jax.sharding.Mesh:
  """`mesh` over the devices of this job."""
  return mesh(config, runs, jax.devices(), hardware.device_memory())


def evaluation_rows(config, mesh: jax.sharding.Mesh) -> int:
  """The rows of a batch of held-out text.

  Raises:
    UsageError: the config sets a number of rows that the devices cannot share evenly.
  """
  rows = config.evaluation.batch_size
  if rows:
    check_rows(mesh, rows, 'evaluation.batch_size')
    return rows
  ways = row_ways(mesh)
  return math.ceil(_EVALUATION_ROWS / ways) * ways


def check(run: Run, mesh: jax.sharding.Mesh, stacked: bool):
  """Raises UsageError if the run cannot train on the mesh, `stacked` if as one of several."""
  if run.outer and run.workers % mesh.shape['expert']:
    raise UsageError(f'runs.{run.plain_name}: train.workers = {run.workers} cannot be shared '
                     f'evenly by mesh.expert = {mesh.shape["expert"]} devices. Set mesh.expert to '
                     'a divisor.')
  check_rows(
      mesh, run.batch_size // run.microbatches // run.workers,
      f'runs.{run.plain_name}: train.batch_size / train.microbatches' + (
          ' / train.workers' if run.outer else ''),
      BRANCH_BATCH_AXES if stacked or run.outer else BATCH_AXES)
  if run.model.num_experts:
    sharding.holds_experts(mesh.shape['expert'], run.model.num_experts)
  platform = mesh.devices.flat[0].platform
  if run.model.attention == 'cudnn' and platform not in ('gpu', 'cuda'):
    raise UsageError(f"runs.{run.plain_name}: model.attention = 'cudnn' needs an NVIDIA GPU, and "
                     f"this is a {platform}; use 'auto'.")


def uneven(run: Run, mesh: jax.sharding.Mesh) -> list[str]:
  """The arrays of a run's model that the mesh does not divide, at a cost in memory or traffic.

  One line each.
  """
  lines = sharding.undivided_arrays(llama.shapes(run.model), mesh)
  experts, devices = run.model.num_experts, mesh.shape['expert']
  if experts and not sharding.holds_experts(devices, experts):
    lines.append(f'runs.{run.plain_name}: {experts} experts are fewer than mesh.expert = '
                 f'{devices} devices: their weights are gathered when they are used, as with '
                 'mesh.fsdp')
  return lines
