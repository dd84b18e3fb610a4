"""Preflight: what is read from a compiled program, against what is known of it."""

import dataclasses
import importlib.metadata
import json
import types

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from btx_jax import base
from btx_jax.configs import llama2_7b
from btx_jax.devices import hardware, sharding
from btx_jax.devices.hardware import CHIPS, Chip
from btx_jax.devices.mesh import AXES
from btx_jax.errors import UsageError
from btx_jax.model import config as model_config
from btx_jax.preflight import cost, fitting, forecast, hlo, measure, report, topology
from btx_jax.preflight.topology import Topology
from btx_jax.study.study import Study
from tests import studies
from tests.helpers import use_mesh

# 1 FLOP, 1 byte and 1 byte over the network take a second each.
CHIP = Chip((), 1.0, 1e9, 1.0, 1.0, 0, 1.0, 1e9, 1.0)
FREE_MEMORY = CHIP._replace(bandwidth=float('inf'))
TURNS = 7


def cost_of(text: str, mesh=None, chip=FREE_MEMORY, filled: float = 1.0) -> cost.Cost:
  return cost.CostModel(hlo.parse(text), chip, mesh, lambda kind, axes: 1.0, filled).total()


def test_loops_are_multiplied_out_and_fusions_looked_into():
  def f(x, w):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=TURNS)[0]

  compiled = jax.jit(f).lower(jnp.ones((8, 16)), jnp.ones((16, 16))).compile()
  assert cost_of(compiled.as_text()).flops == TURNS * 2 * 8 * 16 * 16


@pytest.mark.parametrize('step, turns', [(1, 8), (2, 4), (3, 3)])
def test_loops_count_as_far_as_they_do(step, turns):
  """As of a matmul whose weights go around, of which XLA makes one turn of two."""
  text = f'''HloModule m, is_scheduled=true

%body (p: (s32[], bf16[2,5], bf16[5,2])) -> (s32[], bf16[2,5], bf16[5,2]) {{
  %p = (s32[], bf16[2,5], bf16[5,2]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %m = bf16[2,5]{{1,0}} get-tuple-element(%p), index=1
  %n = bf16[5,2]{{1,0}} get-tuple-element(%p), index=2
  %c = s32[] constant({step})
  %j = s32[] add(%i, %c)
  {DOT}
  ROOT %t = (s32[], bf16[2,5], bf16[5,2]) tuple(%j, %m, %n)
}}

%condition (q: (s32[], bf16[2,5], bf16[5,2])) -> pred[] {{
  %q = (s32[], bf16[2,5], bf16[5,2]) parameter(0)
  %k = s32[] get-tuple-element(%q), index=0
  %b = s32[] constant(8)
  ROOT %l = pred[] compare(%k, %b), direction=LT
}}

ENTRY %main (a: (s32[], bf16[2,5], bf16[5,2])) -> (s32[], bf16[2,5], bf16[5,2]) {{
  %a = (s32[], bf16[2,5], bf16[5,2]) parameter(0)
  ROOT %w = (s32[], bf16[2,5], bf16[5,2]) while(%a), condition=%condition, body=%body
}}
'''
  assert cost_of(text).flops == turns * 40


def test_bytes_by_collective_and_axis():
  """A sum over devices is two passes over the buffer, and (n - 1) / n of it leaves a device."""
  with use_mesh((2, 1, 1, 4)) as mesh:
    place = lambda shape, spec: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    def f(x, w):
      body = lambda x, _: (jax.lax.with_sharding_constraint(jnp.tanh(x @ w), P('data')), None)
      return jax.lax.scan(body, x, None, length=TURNS)[0]

    compiled = jax.jit(f).lower(place((8, 16), P('data', 'tensor')),
                                place((16, 16), P('tensor', None))).compile()
  sent = cost_of(compiled.as_text(), mesh).sent
  assert sent['all-reduce', ('tensor',)] == TURNS * 2 * (3 / 4) * (4 * 16 * 4)
  assert {axes for _, axes in sent} == {('tensor',)}


def program(body: str) -> str:
  """Two devices, along the axis `data`; a is [10] f32, m and n [2, 5] bf16."""
  return f'''HloModule m, is_scheduled=true

%cheap (p: f32[10]) -> f32[10] {{
  ROOT %p = f32[10]{{0}} parameter(0)
}}

%dear (q: f32[10]) -> f32[10] {{
  %q = f32[10]{{0}} parameter(0)
  ROOT %d = f32[10]{{0}} all-reduce(%q), replica_groups={{{{0,1}}}}
}}, execution_thread="sparsecore"

ENTRY %main (a: f32[10]) -> f32[10] {{
  %a = f32[10]{{0}} parameter(0)
  %m = bf16[2,5]{{1,0}} parameter(1)
  %n = bf16[5,2]{{1,0}} parameter(2)
{body}
}}
'''


GATHER = '%s = (f32[10], f32[20]) all-gather-start(%a), replica_groups={{0,1}}, dimensions={0}'
DOT = '%x = bf16[2,2]{1,0} dot(%m, %n), lhs_contracting_dims={1}, rhs_contracting_dims={0}'
DONE = 'ROOT %g = f32[20]{0} all-gather-done(%s)'
# By another core of the chip.
SUM = '%s = ((), (s32[3])) custom-call-start(), called_computations={%dear}, custom_call_target="s"'
SUM_DONE = 'ROOT %g = f32[10]{0} custom-call-done(%s)'


def test_links_and_the_network_between_nodes_carry_at_the_same_time():
  """Of two gathers, one takes the links, where the other would wait for it."""
  other = GATHER.replace('%s', '%t')
  body = '\n'.join(f'  {line}' for line in (
      GATHER, other, DONE.replace('ROOT %g', '%h'), DONE.replace('%s', '%t')))
  speeds = iter([1.0, 1.0, 0.5, 1.0])
  with use_mesh((2, 1, 1, 1)) as mesh:
    found = [cost.CostModel(hlo.parse(program(body)), FREE_MEMORY, mesh,
                            lambda *_: next(speeds)).total() for _ in range(2)]
  assert [(each.network, each.seconds) for each in found] == [(80, 80), (120, 80)]


@pytest.mark.parametrize('lines, waiting', [
    ((GATHER, DOT, DONE), 0), ((DOT, GATHER, DONE), 40),
    ((SUM, DOT, SUM_DONE), 0), ((DOT, SUM, SUM_DONE), 40)])
def test_only_what_lies_between_start_and_done_hides_a_collective(lines, waiting):
  """40 bytes leave a device, in 40 seconds; the matmul takes 40 FLOPs as well."""
  with use_mesh((2, 1, 1, 1)) as mesh:
    found = cost_of(program('\n'.join(f'  {line}' for line in lines)), mesh)
  assert (found.compute, found.network, found.waiting) == (40, 40, waiting)
  assert found.seconds == 40 + waiting


MEETING = ('_xla_host_transfer_rendezvous="r",'
           '_xla_megascale_transfer_type="ALL_REDUCE"')
BETWEEN = f'''  %p = (f32[10], u32[], token[]) recv(%t), frontend_attributes={{{MEETING}}}
  %s = (f32[10], u32[], token[]) send(%a, %t), frontend_attributes={{{MEETING}}}
  {DOT}
  %e = token[] send-done(%s), is_host_transfer=true
  %r = (f32[10], token[]) recv-done(%p), is_host_transfer=true'''


def test_what_slices_send_each_other_goes_through_their_hosts():
  with use_mesh((2, 1, 1, 1)) as mesh:
    found = cost.CostModel(hlo.parse(program(BETWEEN)), FREE_MEMORY, mesh, lambda *_: 0.5).total()
  assert found.sent == {('all-reduce', ('data',)): 40}
  assert (found.network, found.waiting, found.seconds) == (80, 40, 80)


def test_a_conditional_costs_what_its_cheapest_branch_does():
  body = ('  ROOT %c = f32[10]{0} conditional(%i, %a, %a), branch_computations={%dear, %cheap}')
  with use_mesh((2, 1, 1, 1)) as mesh:
    assert cost_of(program(body), mesh).seconds == 0


@pytest.mark.parametrize('known', [True, False])
def test_a_gpu_s_host_decides_on_conditions_and_on_loops_of_unknown_length(known):
  """Three in each of TURNS turns: on a condition, on an inner loop's turn, and on its end."""
  def f(x, n):
    def body(x, _):
      x = jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x)
      return jax.lax.fori_loop(0, 1 if known else n, lambda _, x: jnp.tanh(x @ x), x), None
    return jax.lax.scan(body, x, None, length=TURNS)[0]

  text = jax.jit(f).lower(jnp.ones((8, 8)), jnp.int32(1)).compile().as_text()
  assert cost_of(text).decisions == TURNS * (1 if known else 3)


def test_what_waits_on_the_host_is_moved_slice_by_slice():
  """As model.remat='offload' has it: layers' inputs in a stack, in the memory of the host."""
  body = '''  %h = bf16[9,10]{1,0:S(5)} parameter(3)
  %s = (bf16[9,10]{1,0:S(5)}, bf16[1,10]{1,0}, s32[], u32[]) dynamic-update-slice-start(%h, %m, %i)
  ROOT %t = bf16[9,10]{1,0:S(5)} dynamic-update-slice-done(%s)'''
  assert cost_of(program(body), chip=CHIP._replace(host_link=1.0)).seconds == 1 * 10 * 2


def test_products_with_padding_are_none():
  """As the TPU's compiler writes x [2, 8, 16] @ w [16, 4, 32]: a window of 4 over padding."""
  text = program('''  %u = bf16[1,2,8,16]{3,2,1,0} parameter(3)
  %w = bf16[1,4,16,32]{3,2,1,0} parameter(4)
  ROOT %v = bf16[2,8,4,32]{3,2,1,0} convolution(%u, %w), '''
                 'window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f')
  text = text.replace('bf16[1,2,8,16]{3,2,1,0} parameter(3)',
                      'bf16[2,8,16,1]{3,2,1,0} parameter(3)')
  text = text.replace('bf16[1,4,16,32]{3,2,1,0} parameter(4)',
                      'bf16[4,32,16,1]{3,2,1,0} parameter(4)')
  assert cost_of(text).flops == 2 * (2 * 8) * 16 * (4 * 32)


def test_a_slice_of_a_stack_is_not_the_stack():
  """As of the layers' parameters in a loop."""
  def f(x, stack):
    return jax.lax.scan(lambda x, w: (jnp.sin(x) + w, None), x, stack)[0]

  compiled = jax.jit(f).lower(jnp.ones(1024), jnp.ones((100, 1024))).compile()
  one = 4 * 1024
  assert cost_of(compiled.as_text(), chip=CHIP).memory < 100 * 8 * one  # and not 100 * 100


def test_kernels_count_by_the_rows_of_their_operands():
  call = ('  %r = bf16[{}]{{1,0}} parameter(3)\n  %e = bf16[{}]{{2,1,0}} parameter(4)\n'
          '  ROOT %{} = bf16[{}] custom-call(%r, %e), custom_call_target="tpu_custom_call"{}')
  matmul = program(call.format('100,8', '2,8,32', 'ragged-dot-none.1', '100,32', ''))
  assert cost_of(matmul, filled=0.8).flops == 0.8 * 2 * 100 * 8 * 32
  q = '2,4,64,16'  # [B, N, T, H]: two products, of half of all pairs
  attend = program(call.format(q, q, 'k', q, ', metadata={op_name="splash_mha_fwd_segmented"}'))
  assert cost_of(attend).flops == 2 * 2 * (2 * 4) * 64 * 64 * 16 / 2


def miniature(tmp_path, **changes) -> Study:
  config = studies.get_config(tmp_path)
  config.mesh.update(data=-1, fsdp=1, expert=2, tensor=1)
  config.update(changes)
  return Study(config, str(tmp_path / 'work'), at_hand=False)


@pytest.fixture
def here():
  """The eight devices of the tests, as if they were elsewhere."""
  return Topology('cpu:8', None, jax.devices(), 'jaxlib')


def test_a_program_for_what_differs_and_one_for_branches_of_a_program(tmp_path, here):
  study = miniature(tmp_path, stacked=('expert/code', 'expert/math'),
                    train={'microbatches': 2})
  found = list(measure.programs(study, here))
  assert [[run.name for run in p.runs] for p in found] == [
      ['seed'], ['expert/code', 'expert/math'], ['btx']]
  seed, branches, mixture = found
  assert branches.stacked and branches.tokens == 2 * seed.tokens == 2 * 16 * 15
  assert [finding.holds for finding in branches.findings] == [True]
  # Parameters and the two moments of Adam, and three counters.
  assert mixture.state == 3 * 4 * mixture.params + 12 == (
      3 * 4 * model_config.num_params(study.runs["btx"].model) + 12)
  for program in found:
    assert program.fits and program.peak > program.state / 8
    assert program.cost.flops * 8 >= program.tokens * program.flops_per_token
  data = report.as_data(found, here, {})
  assert data['programs'][2]['memory']['checkpoint'] == mixture.state
  assert any(sent['axes'] == ('expert',) for sent in data['programs'][2]['sent'])


def test_what_it_takes_to_fit_a_selector(tmp_path, here):
  config = studies.get_config(tmp_path)
  config.mesh.update(data=-1, fsdp=1, expert=2, tensor=1)
  experts, dim = ('expert/code', 'expert/math'), 16
  ensemble = lambda selector, **fields: base.run(
      base.ensemble(*experts, selector=selector, **fields))
  config.runs = {name: config.runs[name] for name in ('seed', *experts)} | {
      'few': ensemble(base.from_text('ridge', rows=10), reader='seed', layers=1),
      'many': ensemble(base.from_text('ridge', rows=64), reader='seed', layers=1),
      'posterior': ensemble(base.posterior())}
  study = Study(config, str(tmp_path / 'work'), at_hand=False)
  few, many = fitting.measured(study, here._replace(chip=CHIP), None)  # nothing for the posterior
  assert [(each.run, each.what, each.domains, each.rows, each.fits) for each in (few, many)] == [
      ('few', 'selector', 2, 10, True), ('many', 'selector', 2, 64, True)]
  assert few.sums == 8 * 2 * dim * (dim + 1)  # in float64 by domain
  # Two devices share the weights.
  assert few.peak > 4 * model_config.num_params(study.runs['seed'].model) / 2
  # Batches of 8 rows of a domain: 1 to fit and 1 kept apart, or 7 and 2.
  assert 2 < many.seconds / few.seconds < 7
  assert few.in_words().startswith(
      f'few: selector from text: 10 rows of each of 2 domain(s) take {few.seconds:.1f} s; a dev')


def test_one_run_alone(tmp_path, here):
  found = list(measure.programs(miniature(tmp_path), here, only='expert/math'))
  assert [[run.name for run in p.runs] for p in found] == [['expert/math']]


def test_what_training_would_refuse_is_refused(tmp_path, here):
  config = studies.get_config(tmp_path)
  config.evaluation.batch_size = 3
  with pytest.raises(UsageError, match=r'evaluation\.batch_size: 3 rows cannot be shared evenly'):
    next(measure.programs(Study(config, str(tmp_path / 'work'), at_hand=False), here))


def test_only_branches_in_the_place_of_their_experts_prove_that_no_weight_moves(tmp_path, here):
  study = miniature(tmp_path)
  mixed, (seed, code, math) = study.runs['btx'], study.runs['btx'].sources
  whole = tuple(((i, 0, mixed.model.ffn_dim),) for i in range(2))
  of = lambda pieces, sources: dataclasses.replace(
      mixed, sources=sources, recipe=dataclasses.replace(mixed.recipe, pieces=pieces))
  with_two = jax.sharding.Mesh(np.array(jax.devices()[:2]).reshape(1, 1, 2, 1), AXES)
  assert measure._mixes_in_place(of(whole, (code, math)), [code, math], with_two)
  assert not measure._mixes_in_place(of(whole[::-1], (code, math)), [code, math], with_two)
  assert not measure._mixes_in_place(of(whole, (math, code)), [code, math], with_two)
  assert not measure._mixes_in_place(mixed, [code, math], with_two)  # the seed is not one of them
  del seed


def test_a_host_that_is_too_small_is_too_small(tmp_path, here):
  program = next(measure.programs(miniature(tmp_path), here))
  small = dataclasses.replace(program, host=2e9, host_memory=1e9)
  assert program.fits and small.fits_device and not small.fits
  assert 'needs 1.00 GB more than a host has' in report.advice(small)[0]


def test_equal_branches_need_one_program(tmp_path, here):
  found = list(measure.programs(miniature(tmp_path), here))
  assert [[run.name for run in p.runs] for p in found] == [
      ['seed', 'expert/code', 'expert/math'], ['btx']]


@pytest.mark.parametrize('why', [
    'XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 104.21G of '
    '95.74G hbm.', 'Ran out of memory on HBM, the total memory required for HLO temporaries '
    '(104.21G) exceeds available HBM (95.74G).'])
def test_what_the_compiler_cannot_place_is_an_answer(tmp_path, here, monkeypatch, capsys, why):
  def refuse(*_):
    raise jax.errors.JaxRuntimeError(f'RESOURCE_EXHAUSTED: {why}')

  monkeypatch.setattr(jax.stages.Lowered, 'compile', refuse)
  assert not report.print_report(miniature(tmp_path), here, as_json=False)
  said = capsys.readouterr().out
  assert ' s; the compiler found no way to fit it into the memory\nbtx: ' in said
  assert '112 GB of 103 GB DOES NOT FIT' in said and 'needs 9.09 GB more' in said
  places = [said.index(way) for way in ("'matmuls' or", 'mesh.fsdp = 2', 'more devices: of 16')]
  assert places == sorted(places)


def test_the_papers_run_without_its_weights():
  """Sizes of the paper: 6.74 B parameters, 19.7 B mixed, of which a token meets 11.1 B (2.4)."""
  study = Study(llama2_7b.get_config('/not/here'), '/not/there', at_hand=False)
  run = study.runs['btx']
  assert run.batch_size * run.seq_len == 2**22 and run.steps == 19_073
  count = lambda run, active=False: round(model_config.num_params(run.model, active) / 1e9, 2)
  assert count(study.runs['seed']) == 6.74
  assert (count(run), count(run, active=True)) == (19.72, 11.07)
  assert sum(run.weights.values()) == pytest.approx(1)
  assert report.missing_models(study) == [
      "/not/here does not exist: its sizes are assumed to be those of the config's section model"]
  with pytest.raises(UsageError, match='/not/here'):
    Study(llama2_7b.get_config('/not/here'), '/not/there')


def test_time_over_links():
  """Of a torus of 4 x 4 x 4 chips, and of slices of it that one network connects."""
  def devices(slices):
    return [types.SimpleNamespace(coords=(x, y, z), slice_index=s, process_index=0, platform='tpu')
            for s in range(slices) for x in range(4) for y in range(4) for z in range(4)]

  def speeds(slices, shape):
    array = sharding.np.array(devices(slices), object).reshape(shape)
    mesh = types.SimpleNamespace(devices=array, axis_names=AXES)
    return topology.link_speed(Topology('', CHIPS['v5p'], array.ravel(), ''), mesh)

  one = speeds(1, (1, 16, 4, 1))
  link = CHIPS['v5p'].link
  assert one('all-gather', ('expert',)) == 2 * link  # around one dimension, both ways
  assert one('all-gather', ('fsdp',)) == 4 * link
  assert one('all-gather', ('fsdp', 'expert')) == 6 * link
  assert speeds(2, (2, 16, 4, 1))('all-reduce', ('data',)) == CHIPS['v5p'].network
  assert speeds(1, (1, 16, 2, 2))('all-gather', ('expert',)) == link  # ends before it is around


def test_the_share_of_the_peak_and_preflight_have_one_table(monkeypatch):
  device = types.SimpleNamespace(device_kind='TPU v5p')
  monkeypatch.setattr(jax, 'devices', lambda: [device])
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  hardware.peak_flops.cache_clear()
  assert hardware.peak_flops('bfloat16') == CHIPS['v5p'].flops
  hardware.peak_flops.cache_clear()


@pytest.mark.parametrize('name, message', [
    ('v5q:4x4', "did you mean 'v5p'?"), ('v5p', 'is not KIND:SIZE'), ('v5p:4x4', '3 dimensions'),
    ('h100:12', 'nodes have 8 GPUs, and 12 is not a multiple'), ('cpu:2x2', "did you mean 'cpu'?")])
def test_topologies_that_nobody_knows(name, message):
  with pytest.raises(UsageError, match=message.replace('?', r'\?')):
    topology.get(name)


@pytest.mark.parametrize('version, told', [
    ('0.0.42.1', 'libtpu 0.0.42.1'),
    ('0.0.42', 'libtpu 0.0.42'),
    ('0.0.52', 'libtpu 0.0.52, not the libtpu==0.0.42.* that jax 0.10.2 requires')])
def test_a_compiler_that_jax_did_not_ask_for_is_told(monkeypatch, version, told):
  versions = {'libtpu': version, 'jax': '0.10.2'}
  monkeypatch.setattr(importlib.metadata, 'version', versions.__getitem__)
  monkeypatch.setattr(importlib.metadata, 'requires', lambda package: [
      'numpy>=2.0', 'libtpu==0.0.42.*; extra == "tpu"'])
  none = types.SimpleNamespace(devices=[])
  monkeypatch.setattr(topologies, 'get_topology_desc', lambda **_: none)
  assert topology.get('v5p:4x4x4').compiler == told


def test_a_program_that_has_no_time_shows_none(tmp_path, here):
  program = next(measure.programs(miniature(tmp_path), here))
  fast = dataclasses.replace(program)
  table = report.as_table([fast], here, {})
  cells = dict(table.rows)
  assert cells['MFU'] == cells['step'] == '-'
  assert cells['device: peak memory'].endswith('MB')


def timed(path, kind='NVIDIA H100 80GB HBM3', rows=(
    {'experts': 0, 'seconds': 3.0, 'bound': 2.0}, {'experts': 0, 'seconds': 2.0, 'bound': 1.0},
    {'experts': 0, 'seconds': 5.0, 'bound': 2.0}, {'experts': 4, 'seconds': 3.0, 'bound': 1.0},
    {'experts': 4, 'seconds': 9.0, 'bound': 1.0, 'automatic': False},
    {'experts': 4, 'error': 'was stopped after 9 s'})) -> str:
  path.write_text(json.dumps({'device_kind': kind, 'rows': rows}))
  return str(path)


H100 = Topology('h100:8', CHIPS['h100'], (), '')


def test_a_forecast_is_the_bound_times_what_steps_took_of_theirs(tmp_path, here):
  ratios = forecast.read(timed(tmp_path / 'timed.json'), H100)
  assert ratios == {'dense': (2.0, 3), 'mixture': (3.0, 1)}
  program = next(measure.programs(miniature(tmp_path), here))
  program = dataclasses.replace(program, cost=cost.Cost(seconds=2.0))
  reach = lambda ratios: report.as_data(
      [program], here._replace(chip=CHIP), ratios)['programs'][0]
  found = reach(ratios)
  assert found['forecast'] == {'step': 4.0, 'mfu': found['mfu'] / 2}
  assert 'forecast' not in reach({'mixture': ratios['mixture']}) and 'forecast' not in reach({})
  cells = dict(report.as_table([program], here._replace(chip=CHIP), ratios).rows)
  assert cells['forecast of the step, MFU'].startswith('4.000 s, ')


@pytest.mark.parametrize('content, message', [
    ('{', 'cannot be read'), ('[]', 'is not a file of timed steps'),
    ('{"device_kind": "NVIDIA H100 80GB HBM3", "rows": [{"experts": 0}]}', 'is not a file of'),
    ('{"device_kind": "NVIDIA H100 80GB HBM3", "rows": [{"experts": 0, "seconds": 1, "bound": 0}]}',
     'is not a file of timed'),
    ('{"device_kind": "NVIDIA H100 80GB HBM3", "rows": []}', 'has no step that was timed'),
    ('{"device_kind": "cpu", "rows": []}', "of 'cpu', and --topology=h100:8 has 'NVIDIA")])
def test_a_file_that_holds_no_such_steps_is_refused(tmp_path, content, message):
  path = tmp_path / 'timed.json'
  path.write_text(content)
  with pytest.raises(UsageError, match=message):
    forecast.read(str(path), H100)
  with pytest.raises(UsageError, match='has no known chip'):
    forecast.read(timed(path), H100._replace(name='cpu:8', chip=None))
