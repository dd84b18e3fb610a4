"""Programs as compiled for TPUs, without a TPU: pytest -m aot, where libtpu is installed."""

import os

os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # before libtpu is loaded: there is no TPU host
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from btx_jax.configs import llama2_7b
from btx_jax.devices.hardware import CHIPS
from btx_jax.devices.mesh import AXES, BATCH_AXES
from btx_jax.model import moe
from btx_jax.preflight import cost, hlo, measure, topology
from btx_jax.study.study import Study

pytestmark = [pytest.mark.aot, pytest.mark.filterwarnings('ignore')]

B, D, F, K = 16, 512, 1536, 2


@pytest.fixture(scope='module')
def mesh():
  """Four chips along the axis `expert`."""
  devices = topologies.get_topology_desc(platform='tpu', topology_name='v5p:2x2x1').devices
  return jax.sharding.Mesh(np.array(devices).reshape(1, 1, 4, 1), AXES,
                           axis_types=(AxisType.Auto,) * 4)


def compiled_layer(mesh, num_experts: int, T: int):
  """The gradient of a layer of experts that are spread over the mesh."""
  like = lambda dtype, spec, *shape: jax.ShapeDtypeStruct(
      shape, dtype, sharding=NamedSharding(mesh, spec))
  E, rows, held = num_experts, P(BATCH_AXES), P('expert')
  experts = {'gate': like(jnp.bfloat16, held, E, D, F), 'up': like(jnp.bfloat16, held, E, D, F),
             'down': like(jnp.bfloat16, held, E, F, D)}
  args = (like(jnp.bfloat16, rows, B, T, D), experts, like(jnp.float32, rows, B, T, K),
          like(jnp.int32, rows, B, T, K))

  def loss(x, experts, gates, ids):
    return moe.sparse_experts(x, experts, gates, ids).astype(jnp.float32).sum()

  with jax.set_mesh(mesh):
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args).compile()


def flops(compiled, mesh) -> float:
  """FLOPs of matmuls; those of kernels are counted by the rows of their operands."""
  module = hlo.parse(compiled.as_text())
  return cost.CostModel(module, CHIPS['v5p'], mesh, lambda *_: 1.0).total().flops


def test_more_experts_are_no_more_work(mesh):
  """Top-2 of 8 costs what top-2 of 4 does: a token still uses two experts."""
  T = 1024
  four, eight = (compiled_layer(mesh, n, T) for n in (4, 8))
  assert 'ragged-dot' in four.as_text()
  # Buffers hold a quarter more rows than there are choices. Two matmuls forward (no gradient needs
  # the last one), three for the gradient of the rows, three for that of the weights.
  rows = B * T * K * 5 // 4 // 4
  assert flops(four, mesh) == flops(eight, mesh) == 8 * 2 * rows * D * F


def test_the_kernel_for_groups_is_used_whatever_the_length(mesh):
  """XLA replaces it by a matmul over all rows if they are not whole tiles."""
  assert 'ragged-dot' in compiled_layer(mesh, 4, 1001).as_text()


@pytest.fixture(scope='module')
def pod():
  return topology.get('v5p:4x4x4')


def test_the_papers_run_fits_a_v5p_128(pod):
  """Every run of configs/llama2_7b.py, and its experts as one program."""
  found = list(measure.programs(Study(llama2_7b.get_config(), '/none', at_hand=False), pod))
  config = llama2_7b.get_config()
  config.stacked = tuple(name for name in config.runs if name.startswith('expert/'))
  config.runs = {name: run for name, run in config.runs.items() if name != 'btx'}
  config.mesh.update(expert=4)
  config.train.microbatches = 16  # a branch has a quarter of the chips
  found += measure.programs(Study(config, '/none', at_hand=False), pod)
  experts, mixture, branches = found
  assert branches.stacked and len(experts.runs) == 3 and mixture.runs[0].name == 'btx'
  for program in found:
    assert program.fits, (program.runs, program.peak, program.error)
    assert all(finding.holds for finding in program.findings), program.findings
  assert min(program.mfu(pod.chip) for program in (experts, mixture)) > 0.55
  assert not mixture.findings and len(branches.findings) == 1
  along = {axis for (_, axes), sent in branches.cost.sent.items() if sent > 1e6 for axis in axes}
  assert 'expert' not in along and 'fsdp' in along
  # The compiler knows that the slice is a torus: what all chips share is gathered, twice a
  # microbatch, where it would otherwise be summed.
  run = mixture.runs[0]
  attention = run.model.num_layers * 4 * run.model.dim**2 * 2
  gathered = mixture.cost.sent['all-gather', ('fsdp', 'expert')]
  assert gathered > 2 * run.microbatches * attention * 63 / 64
