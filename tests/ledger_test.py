"""The ledger: its FLOPs against compiled train steps, and the other figures by hand."""

import dataclasses
import json
import os

import pytest

from btx_jax import base
from btx_jax.commands import ledger as command
from btx_jax.devices.hardware import UNKNOWN
from btx_jax.fitting.flops import fit_flops
from btx_jax.model.config import Config, train_flops_by_part
from btx_jax.preflight import cost, hlo
from btx_jax.recipe import RoutersFromText
from btx_jax.run import lineage
from btx_jax.scoring import ledger, scores
from btx_jax.selector import Linear
from btx_jax.study import manifest, plan
from btx_jax.training.program import make_program
from tests import finished
from tests.helpers import use_mesh

V, D, F, L, N, K, T, B = 96, 64, 128, 2, 4, 2, 64, 8
H = D // N


# FLOPs


def run_of(init=None, batch_size=B, **fields):
  """A run of a small model, which is the mixture of four if `init` is not given."""
  config = base.get_config()
  config.domains = {'code': base.domain('/nowhere')}
  config.tokenizer.vocab_size = V
  config.data.seq_len = T
  config.model.update(dim=D, ffn_dim=F, num_layers=L, num_heads=N, num_kv_heads=K,
                      dispatch='grouped', dispatch_factor=2.0)  # one round of dispatch
  train = {'batch_size': batch_size, **fields.pop('train', {})}
  config.runs.seed = base.run(base.random(), {'code': 1}, steps=3)
  config.runs.measured = base.run(
      init or base.mix(*['seed'] * 4), {'code': 1}, steps=3, train=train, **fields)
  return plan.make_plan(config, V)['measured']


def compiled_flops(run) -> float:
  """FLOPs of the dots in the compiled train step, as often as its loops run."""
  with use_mesh((1, 1, 1, 1)) as mesh:
    text = make_program([run], mesh, num_domains=1).lower().compile().as_text()
    return cost.CostModel(hlo.parse(text), UNKNOWN, mesh, lambda *_: 1.0).total().flops


def counted_flops(run) -> float:
  """The ledger's FLOPs of a step on one CPU, with those that it leaves out."""
  beyond = ledger.overhead_of(run, '1 x cpu')
  assert None not in beyond.values()
  return (run.flops + sum(beyond.values())) / run.steps


@pytest.mark.parametrize('case, left_out', [
    ({'init': base.random(), 'batch_size': 10}, {'masked', 'padding'}),  # 640 tokens: two chunks
    ({'init': base.random(), 'model': {'remat': 'full'}}, {'masked', 'recomputed'}),
    ({'init': base.random(), 'model': {'remat': 'projections'}}, {'masked', 'recomputed'}),
    ({'init': base.random(), 'train': {'freeze': base.FREEZE_ALL_BUT_EXPERTS}}, {'masked'}),
    ({}, {'masked', 'padding'}),
    ({'model': {'remat': 'full'}, 'train': {'balance_scope': 'batch'}},
     {'masked', 'recomputed', 'second_pass', 'padding'}),
], ids=['dense', 'full', 'projections', 'frozen', 'mixture', 'mixture again'])
def test_flops_are_those_of_the_compiled_train_step(case, left_out):
  run = run_of(**case)
  assert {name for name, flops in ledger.overhead_of(run, '1 x cpu').items() if flops} == left_out
  assert compiled_flops(run) == pytest.approx(counted_flops(run), rel=0.02)


def test_workers_compute_as_much_as_one():
  workers = run_of(base.random(), train={'workers': 2, 'sync_every': 2})
  plain = dataclasses.replace(workers, outer=None)
  assert counted_flops(workers) == counted_flops(plain)
  assert compiled_flops(workers) == pytest.approx(counted_flops(plain), rel=0.02)


def test_the_parts_of_a_dense_step_by_hand():
  """Forward and backward are three products of two FLOPs per multiply-add."""
  found = train_flops_by_part(Config(V, dim=D, ffn_dim=F, num_layers=L, num_heads=N,
                                     num_kv_heads=K), T)
  # Position t sees t + 1 keys, about half of T; each costs H for the score and H for the sum.
  pairs = sum(t + 1 for t in range(T)) / T
  assert found.pop('scores') == pytest.approx(6 * L * N * 2 * H * pairs, rel=1 / T)
  assert found == {'feed-forward': 6 * L * 3 * D * F, 'routers': 0, 'head': 6 * V * D,
                   'projections': 6 * L * (2 * N + 2 * K) * H * D}


def test_what_kernels_compute_is_not_known():
  run = run_of(base.random(), model={'dtype': 'bfloat16', 'remat': 'full'})
  found = ledger.overhead_of(run, '8 x NVIDIA H100 80GB HBM3')
  assert (found['masked'], found['recomputed']) == (None, None)
  assert found['padding'] == 0 == found['second_pass']
  assert {*ledger.overhead_of(run, '').values()} == {None}


# Everything else


def small_study(folder):
  """A seed, two experts from different steps of it, their mixture and DiLoCo; all complete."""
  config = finished.two_mixtures()
  config.domains = {name: config.domains[name] for name in ('code', 'math')}
  blend = {'code': 1, 'math': 1}
  config.checkpoints_kept_every = 100
  config.runs = {
      'seed': base.run(base.random(), {'code': 3, 'math': 1}, steps=500),
      'expert/code': base.run(base.checkpoint('seed', step=200), {'code': 1}, steps=130),
      'expert/math': base.run(base.checkpoint('seed', step=300), {'math': 1}, steps=130,
                              train={'freeze': base.FREEZE_ALL_BUT_EXPERTS}),
      'btx': base.run(base.mix('expert/code', 'expert/math'), blend, steps=40),
      'diloco': base.run(base.checkpoint('seed'), blend, steps=250,
                         train={'workers': 2, 'sync_every': 100}),
  }
  return finished.write(config, str(folder))


@pytest.fixture
def study(tmp_path):
  return small_study(tmp_path)


def rows_of(study, machines=4):
  return {row['name']: row for row in ledger.rows(study, machines)}


STEP = 8 * 256  # tokens


def test_tokens_are_those_of_all_ancestors_up_to_the_steps_that_were_used(study):
  found = rows_of(study)
  assert found['seed']['tokens'] == {'code': 375 * STEP, 'math': 125 * STEP}
  assert found['expert/code']['tokens'] == {'code': (150 + 130) * STEP, 'math': 50 * STEP}
  # Of the seed's steps, 200 of which both experts have, the mixture descends from 300.
  both = {'code': (225 + 130 + 20) * STEP, 'math': (75 + 130 + 20) * STEP}
  assert found['btx']['tokens'] == both
  targets = 1234567 - 1234  # the first token of a document is none
  assert found['btx']['passes'] == {name: count / targets for name, count in both.items()}
  assert found['btx']['most_passes'] == found['btx']['passes']['code']
  assert found['btx unfinetuned']['tokens'] == found['average of btx']['tokens'] == {
      'code': 355 * STEP, 'math': 205 * STEP}


def test_flops_and_device_time_are_sums_over_the_lineage(study):
  found, runs = rows_of(study), study.runs
  for name in ('seed', 'expert/math', 'btx', 'diloco'):
    row, spent = found[name], lineage(runs[name])
    assert row['train_flops'] == sum(run.flops for run in spent)
    assert row['frozen'] == sum(run.flops_unfrozen - run.flops for run in spent)
  assert found['expert/math']['frozen'] > 0 == found['expert/code']['frozen']
  assert found['btx']['device_seconds'] == pytest.approx(0.4 * (300 + 130 + 130 + 40))


def test_bytes_by_hand(study):
  found, runs = rows_of(study, machines=4), study.runs
  dense = scores.num_params(runs['seed'].model)
  mixture = scores.num_params(runs['btx'].model)
  one_sum = 4 * 2 * 3  # bytes that 4 machines send for each parameter
  seed = one_sum * 500 * dense
  assert found['seed']['sent_by_all'] == seed and found['seed']['checkpoint_bytes'] == 0
  # Experts send nothing; each takes the seed's checkpoint and gives its own.
  assert found['expert/code']['sent_by_all'] == one_sum * 200 * dense
  assert found['expert/code']['checkpoint_bytes'] == 4 * dense
  assert found['btx']['sent_by_all'] == one_sum * (300 * dense + 40 * mixture)
  for name in ('btx', 'average of btx'):
    assert found[name]['checkpoint_bytes'] == 4 * 4 * dense
  # 250 steps have meetings after 100, 200 and 250, of two workers.
  assert found['diloco']['sent_by_all'] == seed + 3 * 2 * 4 * dense
  of_one = rows_of(study, machines=1)
  assert [of_one[name]['sent_by_all'] for name in ('seed', 'btx', 'diloco')] == [
      0, 0, 3 * 2 * 4 * dense]


def test_only_what_some_models_of_a_mixture_descend_from_is_trained_apart(tmp_path):
  study = finished.write(finished.two_mixtures(), str(tmp_path))
  assert ledger.branches_of(study.runs.values()) == {
      name for name in study.runs if name.startswith('expert/')}


def rewritten(study, name, **changes):
  """A manifest without the fields that are None in `changes`, and with the others."""
  path = study.folder(name)
  found = {**(manifest.read(path) or {}), **changes}
  manifest.write(path, {key: value for key, value in found.items() if value is not None})


@pytest.mark.parametrize('changes, unknown', [
    ({'tokens_by_domain': None}, ['tokens', 'most_passes']),
    ({'tokens_by_domain': {}}, ['tokens', 'most_passes']),
    ({'seconds': None}, ['device_seconds']),
    ({'devices': None}, ['device_seconds', 'masked']),
    ({'devices': 'many'}, ['device_seconds', 'masked']),
    ({'steps_done': None}, ['tokens', 'most_passes', 'device_seconds'])])
def test_what_an_older_manifest_does_not_say_is_a_dash(study, changes, unknown, capsys):
  rewritten(study, 'seed', **changes)
  for row in rows_of(study).values():
    flat = row | row['beyond']
    fields = ('tokens', 'most_passes', 'device_seconds', 'masked', 'train_flops', 'sent_by_all')
    assert [name for name in fields if flat[name] is None] == unknown
  command.print_ledger(study, 4, as_json=False)
  assert ' - ' in capsys.readouterr().out


@pytest.mark.parametrize('damage', [os.remove, lambda path: open(path, 'w').close()])
def test_without_the_manifest_of_an_ancestor_its_figures_are_not_known(study, damage):
  damage(os.path.join(study.folder('seed'), 'manifest.json'))
  found = rows_of(study)
  assert 'seed' not in found  # as in the table of results: its state is not known
  assert found['btx']['tokens'] is None is found['btx']['device_seconds']
  assert found['btx']['train_flops'] > 0


def test_as_json_and_where_nothing_is_complete(study, capsys):
  command.print_ledger(study, 2, as_json=True)
  found = json.loads(capsys.readouterr().out)
  assert found == {'machines': 2, 'rows': ledger.rows(study, 2)}
  for name in study.runs:
    rewritten(study, name, state=manifest.RUNNING)
  command.print_ledger(study, 2, as_json=False)
  assert 'is complete, so no model has a ledger yet' in capsys.readouterr().out


def test_setting_routers_or_a_selector_from_text_by_hand():
  attention, ffn, pairs = (2 * N + 2 * K) * H * D, 3 * D * F, N * H * T
  dense = 2 * L * (attention + ffn + pairs)
  mixture = 2 * (L * (attention + 2 * ffn + pairs + 4 * D) + V * D)
  figures = {'tokens': {'code': 1000}, 'rows': {'code': 20}, 'losses': {'2.0': 1.0, '1.0': 1.0}}
  kept = 4 * T  # a fifth of the rows
  routed = dataclasses.replace(
      run_of(), routers=RoutersFromText('ridge', 20, 1e-3, 0, ('code',) * 4))
  assert fit_flops(routed, figures) == (
      1000 * (dense + 2 * L * D * D) + kept * (2 * mixture + dense + 2 * L * 4 * D))
  del figures['losses']
  chosen = dataclasses.replace(
      run_of(base.checkpoint('seed')), expert_names=('a',),
      selector=Linear('ridge', 20, 1e-3, ('code',), reader=0, layers=1))
  half = dense // L
  assert fit_flops(chosen, figures) == 1000 * (half + 2 * D * D) + kept * (half + 2 * D)
