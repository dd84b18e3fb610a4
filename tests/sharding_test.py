"""The mesh and the table of rules."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax import base
from btx_jax import run as run_lib
from btx_jax.devices import sharding
from btx_jax.devices.mesh import (
  BRANCH_BATCH_AXES,
  check_rows,
  choose_sizes,
  count_slices,
  lay_devices,
  make_mesh,
)
from btx_jax.errors import UsageError
from btx_jax.model import llama
from btx_jax.model.config import Config
from btx_jax.training import layout, optim
from btx_jax.training import step as train
from tests.helpers import MESHES, TINY, TINY_MIXTURE, random_params, use_mesh

LLAMA_7B = Config(vocab_size=32_000, dim=4096, ffn_dim=11_008, num_layers=32, num_heads=32,
                  num_kv_heads=32, num_experts=4)


def shapes_of(cfg):
  return jax.eval_shape(functools.partial(llama.init, cfg), jax.random.key(0))


def state_of(cfg):
  tx = optim.adamw(run_lib.Optimizer(peak_lr=1.0), lambda count: 1.0)
  return jax.eval_shape(lambda params: train.create_state(params, tx), random_params(cfg))


def test_a_parameter_without_a_rule_is_an_error():
  with use_mesh((1, 1, 1, 1)) as mesh, pytest.raises(ValueError, match="'layers/new'"):
    sharding.partition_specs({'layers': {'new': np.zeros(3)}}, mesh)


def test_parameters_and_moments_are_cut_alike():
  with use_mesh((1, 2, 2, 2)) as mesh:
    specs = sharding.partition_specs(state_of(TINY_MIXTURE), mesh)
  experts = specs.params['layers']['ffn']['experts']
  assert experts['up'] == jax.P(None, 'expert', 'fsdp', 'tensor')
  assert experts['down'] == jax.P(None, 'expert', 'tensor', 'fsdp')
  assert specs.params['layers']['attn']['q'] == jax.P(None, ('fsdp', 'expert'), 'tensor', None)
  assert specs.params['head'] == jax.P(('fsdp', 'expert'), 'tensor')
  moments = specs.opt_state[1][0]
  assert moments.mu == specs.params
  assert moments.nu == specs.params


@pytest.mark.parametrize('mesh_shape', MESHES)
@pytest.mark.parametrize('num_experts', [0, 3, 4])
def test_no_large_parameter_is_whole_anywhere(mesh_shape, num_experts):
  tree = shapes_of(dataclasses.replace(LLAMA_7B, num_experts=num_experts))
  with use_mesh(mesh_shape) as mesh:
    placed = sharding.shardings(tree, mesh)
    assert not sharding.undivided_arrays(tree, mesh)
  for leaf, at in zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True):
    if 4 * leaf.size > 2**21:  # norm scales and routers are smaller
      assert leaf.size == math.prod(at.shard_shape(leaf.shape)) * mesh.size // mesh_shape[0]


def test_of_stacked_leaves_the_first_dimension_is_cut_over_expert_and_no_other():
  state = state_of(TINY)
  stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((4, *x.shape), x.dtype), state)
  with use_mesh((1, 1, 4, 2)) as mesh:
    alone = sharding.partition_specs(state, mesh)
    specs = sharding.partition_specs(stacked, mesh, stacked=True)
    assert sharding.batch_sharding(mesh, 1, stacked=True).spec == jax.P(
        'expert', None, ('data', 'fsdp'))

  def check(path, ours, theirs):
    without = [tuple(a for a in ((axes,) if isinstance(axes, str) else axes or ())
                     if a != 'expert') or None for axes in theirs]
    assert ours == jax.P('expert', *without), sharding.path_of(path)

  jax.tree.map_with_path(check, specs, alone, is_leaf=lambda x: isinstance(x, jax.P))
  assert specs.params['layers']['ffn']['up'] == jax.P('expert', None, 'fsdp', 'tensor')
  assert specs.step == jax.P('expert')
  three = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), state.params)
  with use_mesh((1, 1, 4, 2)) as mesh:
    specs = sharding.partition_specs(three, mesh, stacked=True)
  assert specs['layers']['ffn']['up'] == jax.P(None, None, ('fsdp', 'expert'), 'tensor')


def test_a_large_array_that_an_axis_does_not_divide_is_listed():
  like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  tree = {'embed': like(32_001, 4096), 'head': like(4096, 64), 'layers': {
      'attn': {'k': like(2, 4096, 1, 128), 'q': like(2, 4098, 2, 128)},
      'ffn': {'experts': {'down': like(2, 3, 11_008, 4098), 'up': like(2, 3, 4096, 11_008)}}}}
  with use_mesh((1, 2, 2, 2)) as mesh:
    assert [line.split(' is whole on every device of ') for line in
            sharding.undivided_arrays(tree, mesh)] == [
        ['embed [32001, 4096]', 'mesh.tensor: 32001 is not divisible by 2'],
        ['layers/attn/k [2, 4096, 1, 128]', 'mesh.tensor: 1 is not divisible by 2'],
        ['layers/attn/q [2, 4098, 2, 128]', 'mesh.expert: 4098 is not divisible by 2 x 2'],
        ['layers/ffn/experts/down [2, 3, 11008, 4098]',
         'mesh.expert: 3 is not divisible by 2 and 4098 is not divisible by 2 x 2']]
    assert not sharding.undivided_arrays({'head': like(4096, 63)}, mesh)  # below 1 MiB


def test_rows_are_shared_among_all_axes_but_tensor():
  with use_mesh((1, 2, 2, 2)) as mesh:
    check_rows(mesh, 4, 'rows')
    with pytest.raises(UsageError, match=r'6 rows cannot be shared evenly by 4 .* 4 or 8'):
      check_rows(mesh, 6, 'rows')
    check_rows(mesh, 6, 'rows', BRANCH_BATCH_AXES)
    rows = np.arange(8)
    placed = sharding.to_global({'x': rows[sharding.local_rows(mesh, 8)]}, mesh, 8)['x']
  np.testing.assert_array_equal(placed, rows)
  assert {shard.data.shape for shard in placed.addressable_shards} == {(2,)}


@dataclasses.dataclass(frozen=True)
class FakeTpu:
  """What mesh_utils asks of a device."""
  id: int
  slice_index: int
  coords: tuple[int, int, int]
  core_on_chip: int = 0
  process_index: int = 0
  platform: str = 'tpu'
  device_kind: str = 'TPU v5'


@pytest.mark.parametrize('slices, shape', [
    (1, (1, 2, 2, 2)), (2, (2, 2, 2, 2)), (2, (4, 1, 2, 2)), (4, (4, 2, 4, 1))])
def test_slices_differ_along_data_only(slices, shape):
  devices = [FakeTpu(8 * s + i, s, (i % 2, i // 2 % 2, i // 4))
             for s in range(slices) for i in range(8)]
  laid = lay_devices(shape, devices)
  assert laid.shape == shape
  assert {device.id for device in laid.flat} == set(range(8 * slices))
  for i, part in enumerate(laid):
    assert {device.slice_index for device in part.flat} == {i * slices // shape[0]}


def test_an_axis_that_would_cross_slices_is_refused():
  devices = [FakeTpu(i, i // 4, (i % 2, i % 4 // 2, 0)) for i in range(8)]
  with pytest.raises(UsageError, match=r'mesh.data = 1 must be a multiple of 2, .* into the 4 dev'):
    lay_devices((1, 4, 2, 1), devices)


CHOSEN = {'data': -1, 'fsdp': 0, 'expert': 0, 'tensor': 1}


@pytest.mark.parametrize('devices, experts, memory, expected', [
    (1, 4, None, (1, 1)), (8, 4, None, (1, 4)), (8, 3, None, (1, 1)), (6, 4, None, (1, 2)),
    (8, 0, None, (1, 1)), (8, 4, 60, (1, 4)), (8, 4, 50, (1, 4)), (8, 4, 40, (2, 4)),
    (8, 3, 60, (4, 1)), (8, 3, 1, (8, 1)),  # does not fit at all: as little as there can be
])
def test_a_mesh_chosen_for_the_experts_and_the_memory(devices, experts, memory, expected):
  sizes = choose_sizes(CHOSEN, devices, [experts], 100, memory)
  assert (sizes['fsdp'], sizes['expert']) == expected
  assert choose_sizes(dict(CHOSEN, data=1), devices, [experts], 100, memory)['fsdp'] == (
      devices // expected[1])  # nothing may be left over


def test_a_mesh_chosen_for_mixtures_of_several_sizes_holds_all():
  def expert(devices, *experts):
    return choose_sizes(CHOSEN, devices, experts, 100, None)['expert']
  assert (expert(2, 4, 3), expert(4, 4, 3), expert(8, 8, 6), expert(8)) == (1, 4, 8, 1)


def test_a_mesh_chosen_for_slices_keeps_all_but_data_within_one():
  sizes = choose_sizes(CHOSEN, 8, [16], 100, None, slices=2)
  assert (sizes['data'], sizes['expert']) == (-1, 4)


def test_nodes_of_gpus_are_no_slices():
  node = lambda platform, i: types.SimpleNamespace(platform=platform, slice_index=i)
  assert count_slices([node('gpu', 0), node('gpu', 1)]) == 1
  assert count_slices([node('tpu', 0), node('tpu', 1)]) == 2


def test_a_mesh_over_all_devices():
  assert make_mesh(tensor=2).devices.shape == (4, 1, 1, 2)
  assert make_mesh(1, -1, 2, 2).axis_names == ('data', 'fsdp', 'expert', 'tensor')
  with pytest.raises(UsageError, match=r'mesh.tensor = 3 cannot be laid on 8'):
    make_mesh(tensor=3)


def test_values_vary_over_what_others_vary_over():
  def local(a, b):
    return sharding.varying_like(a, b)

  with use_mesh((1, 1, 2, 2)):
    out = jax.jit(jax.shard_map(local, in_specs=(jax.P(), jax.P(('expert', 'tensor'))),
                                out_specs=jax.P(('expert', 'tensor'))))(
        jnp.ones(2), jnp.ones(4))
  assert out.shape == (8,)


@pytest.mark.parametrize('devices, asked, rows', [(1, 0, 32), (6, 0, 36), (8, 0, 32), (6, 12, 12)])
def test_an_evaluation_has_as_many_rows_as_the_devices_can_share(devices, asked, rows):
  config = base.get_config()
  config.evaluation.batch_size = asked
  with_so_many = make_mesh(data=devices, devices=jax.devices()[:devices])
  assert layout.evaluation_rows(config, with_so_many) == rows
