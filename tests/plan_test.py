"""The graph of runs: order, what follows from sources, and what is refused."""

import dataclasses

import ml_collections
import pytest

from btx_jax import base
from btx_jax import run as run_lib
from btx_jax.configs import demo
from btx_jax.configs import study as study_config
from btx_jax.errors import UsageError
from btx_jax.model.config import param_paths
from btx_jax.run import frozen, lineage
from btx_jax.study import plan, twins
from tests import studies
from tests.helpers import TINY, TINY_MIXTURE


def config_of(tmp_path, **runs):
  config = studies.get_config(tmp_path)
  for name, fields in runs.items():
    config.runs[name] = fields
  return config


def test_runs_stand_behind_what_they_start_from(tmp_path):
  config = studies.get_config(tmp_path)
  config.runs = dict(reversed([(name, config.runs[name]) for name in config.runs]))
  names = list(plan.make_plan(config, 300))
  assert names.index('seed') < names.index('expert/code') < names.index('btx')


def test_a_mixture_takes_its_sizes_from_its_sources(tmp_path):
  runs = plan.make_plan(config_of(
      tmp_path, more=base.run(base.checkpoint('btx'), {'code': 1}, steps=1, model={'top_k': 3})),
      300)
  assert runs['btx'].model == dataclasses.replace(runs['seed'].model, num_experts=4)
  assert runs['more'].model == dataclasses.replace(runs['btx'].model, top_k=3)


def test_weights_are_shares(tmp_path):
  runs = plan.make_plan(studies.get_config(tmp_path), 300)
  assert runs['seed'].weights == {'code': 0.25, 'math': 0.25, 'prose': 0.5}
  assert runs['expert/code'].weights == {'code': 1.0}


def test_steps_can_match_the_flops_of_other_runs():
  runs = plan.make_plan(demo.get_config('full'), 4096)
  trained = ('expert/code', 'expert/math', 'expert/knowledge', 'btx')
  spent = sum(runs[name].flops for name in trained)
  for rival in ('dense', 'upcycled'):
    per_step = runs[rival].flops / runs[rival].steps
    assert abs(runs[rival].flops - spent) <= per_step / 2
  assert runs['upcycled'].expert_names == ('seed',) * 4
  assert [run.name for run in runs['upcycled'].sources] == ['seed']
  assert [run.name for run in run_lib.lineage(runs['btx'])] == [
      'btx', 'seed', 'expert/code', 'expert/math', 'expert/knowledge']


def test_routers_may_change_between_runs_and_a_bias_stays(tmp_path):
  after = lambda source, **fields: base.run(
      base.checkpoint(source), {'code': 1}, steps=1, **fields)
  runs = plan.make_plan(config_of(
      tmp_path, biased=after('btx', train={'balance_bias': 0.01}), more=after('biased'),
      dense=after('seed', train={'balance_bias': 0.01}),
      soft=after('more', model={'router': 'soft'}),
      switch=after('soft', model={'router': 'switch', 'capacity_factor': 2.0})), 300)
  assert [runs[name].model.router for name in ('more', 'soft', 'switch')] == [
      'top_k', 'soft', 'switch']
  assert [run.name for run in runs.values() if run.model.router_bias] == ['biased', 'more']


def test_ready_lists_of_what_is_frozen():
  paths = param_paths(dataclasses.replace(TINY_MIXTURE, router_bias=True))
  of = lambda freeze: {path for path in paths if frozen(path, freeze)}
  assert of(base.FREEZE_EXPERTS) == {
      'layers/ffn/experts/down', 'layers/ffn/experts/gate', 'layers/ffn/experts/up'}
  assert of(base.FREEZE_ALL_BUT_ROUTER) == set(paths) - {
      'layers/ffn/router', 'layers/ffn/router_bias'}
  assert of(base.FREEZE_ALL_BUT_EXPERTS) == set(paths) - of(base.FREEZE_EXPERTS)
  dense = param_paths(TINY)
  assert [path for path in dense if not frozen(path, base.FREEZE_ALL_BUT_EXPERTS)] == [
      'layers/ffn/down', 'layers/ffn/gate', 'layers/ffn/up']


def test_a_run_matches_the_flops_of_another_with_all_that_both_descend_from(tmp_path):
  config = config_of(
      tmp_path,
      trunk=base.run(base.checkpoint('seed'), {'code': 1}, steps=40,
                     optimizer={'schedule': 'constant'}),
      expert=base.run(base.checkpoint('trunk', step=30, state=True), {'code': 1}, steps=10),
      frozen=base.run(base.checkpoint('seed'), {'math': 1}, match_total_flops_of='expert',
                      train={'freeze': base.FREEZE_ALL_BUT_EXPERTS}),
      dense=base.run(base.checkpoint('seed'), {'code': 1}, steps=120),
      mixed=base.run(base.mix('expert', 'frozen'), {'code': 1}, match_total_flops_of='dense'))
  runs = plan.make_plan(config, 300)
  totals = {name: sum(run.flops for run in lineage(runs[name]))
            for name in ('expert', 'frozen', 'dense', 'mixed')}
  assert runs['expert'].steps + 30 == 40 < runs['frozen'].steps
  for name, reference in (('frozen', 'expert'), ('mixed', 'dense')):
    of_step = runs[name].flops / runs[name].steps
    assert abs(totals[name] - totals[reference]) <= of_step / 2


def test_all_rows_of_the_study_take_the_flops_of_the_dense_one():
  """Within one of their own steps; those that only mix or merge, within a step of each expert."""
  config = study_config.get_config()
  config.seeds = (0,)
  runs = {run.plain_name: run for run in plan.make_plan(config, 4096).values()}
  totals = {name: sum(each.flops for each in lineage(run)) for name, run in runs.items()}
  rows = [name for name in runs if name.split('/')[0] in ('dense', 'sparse', 'btx', 'ffn', 'merge')
          and name.split('/')[1] not in study_config.NEW]
  assert len(rows) == 16
  dense = runs['dense/blend']
  for name in rows:
    count = runs[name].steps
    allowed = runs[name].flops / count if count else 3 * dense.flops / dense.steps
    assert abs(totals[name] - totals['dense/blend']) <= allowed, name


def edit(**fields):
  return base.run(**{'init': base.checkpoint('seed'), 'domains': {'code': 1}, 'steps': 5} | fields)


@pytest.mark.parametrize('fields, message', [
    (edit(init=base.checkpoint('sed')), r"names 'sed', which is not a run; did you mean 'seed'"),
    (edit(init=base.mix()), 'mix names no run'),
    (edit(init=ml_collections.ConfigDict({'kind': 'average', 'runs': ('seed',)})), "'average'"),
    (edit(init=base.checkpoint('new')), 'in a circle: new -> new'),
    (edit(init=base.mix('seed', 'btx')), "mixes 'btx', which is a mixture already"),
    (edit(domains={'cod': 1}), "names 'cod', which is not a domain; did you mean 'code'"),
    (edit(domains={'code': 1, 'math': -0.5}), 'math = -0.5; weights are finite and not negative'),
    (edit(domains={'code': 0, 'math': 0}), 'at least one weight must be positive'),
    (edit(domains={}), 'at least one weight must be positive'),
    (edit(steps=0), 'steps = 0 must be at least 1'),
    (edit(match_flops_of=('seed',)),
     r"has steps = 5 and match_flops_of = \('seed',\); give one of them"),
    (edit(match_total_flops_of='sed', steps=0), r"match_total_flops_of names 'sed'"),
    (edit(match_total_flops_of='seed', steps=0), 'so nothing is left to train it for'),
    (edit(match_flops_of=('sed',), steps=0), r"match_flops_of names 'sed'"),
    (edit(model={'dim': 32}), r'changes the parameters: dim = 32 \(it starts from 16\)'),
    (edit(train={'balance_loss': -1.0}), 'balance_loss = -1.0'),
    (edit(optimizer={'warmup': -0.5}), 'warmup = -0.5'),
    (edit(model={'vocab_size': 400}), 'changes the parameters: vocab_size = 400'),
    (edit(train={'batch_size': 15, 'microbatches': 2}), 'not a multiple of train.microbatches'),
    (edit(train={'batch_size': 0}), 'train.batch_size = 0'),
    (edit(train={'balance_scope': 'bach'}), "'bach'; did you mean 'batch'"),
    (edit(optimizer={'peak_lr': -1.0}), 'peak_lr = -1.0'),
    (edit(optimizer={'warmup': 2.5}), 'warmup = 2.5'),
])
def test_what_could_not_run_is_refused(tmp_path, fields, message):
  with pytest.raises(UsageError, match=message):
    plan.make_plan(config_of(tmp_path, new=fields), 300)


def test_models_that_differ_cannot_be_mixed(tmp_path):
  config = config_of(
      tmp_path, wide=base.run(base.random(), {'code': 1}, steps=1, model={'vocab_size': 512}),
      both=base.run(base.mix('seed', 'wide'), {'code': 1}, steps=1))
  with pytest.raises(UsageError, match=r'vocab_size +300 +512\n +seed +seed +wide\n') as raised:
    plan.make_plan(config, 300)
  assert str(raised.value).endswith("base.mix(..., allow=('vocabulary', 'seed')).")
  for allow in ((), ('seed',), ('vocabulary', 'seed')):
    config.runs.both.init.allow = allow
    if len(allow) < 2:
      with pytest.raises(UsageError, match='vocabulary: rows of embedding and head') as raised:
        plan.make_plan(config, 300)
      assert ('\nseed: ' in str(raised.value)) != bool(allow)
    else:
      assert plan.make_plan(config, 300)['both'].model.vocab_size == 300


def test_a_mixture_has_the_settings_of_the_first_run_that_is_averaged(tmp_path):
  far = {'rope_theta': 1e6, 'norm_eps': 1e-6}
  config = config_of(
      tmp_path, far=base.run(base.checkpoint('seed'), {'code': 1}, steps=1, model=far),
      both=base.run(base.mix('seed', 'far', allow=('rope', 'norm_eps')), {'code': 1}, steps=1),
      one=base.run(base.mix('seed', 'far', averaged='far', allow=('norm_eps', 'rope')),
                   {'code': 1}, steps=1))
  runs = plan.make_plan(config, 300)
  seed = runs['seed'].model
  for name, like in (('both', seed), ('one', dataclasses.replace(seed, **far))):
    assert runs[name].model == dataclasses.replace(like, num_experts=2)
    assert run_lib.averaged_model(runs[name]) == like
  config.runs.both.init.allow = ('norm_eps',)
  with pytest.raises(UsageError, match=r'rope_theta +10000.0 +1000000.0\n(.*\n)+rope: the'):
    plan.make_plan(config, 300)


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path):
  config = studies.get_config(tmp_path)
  config.model.vocab_size = 100
  with pytest.raises(UsageError, match="smaller than the tokenizer's 300"):
    plan.make_plan(config, 300)


@pytest.mark.parametrize('name', ['data', 'report/x', '/seed'])
def test_names_that_are_taken_are_refused(tmp_path, name):
  with pytest.raises(UsageError, match='cannot be the name of a run'):
    plan.make_plan(config_of(tmp_path, **{name: edit()}), 300)


def test_a_misspelt_field_in_a_config_file_is_an_error():
  config = base.get_config()
  with pytest.raises(AttributeError, match='batch_size'):
    config.train.batch_sise = 4
  with pytest.raises(AttributeError, match='model'):
    config.modle = 4


def test_names_of_runs_may_come_in_lists():
  assert base.mix(['seed', 'a']).runs == base.mix('seed', 'a').runs == ('seed', 'a')


def test_nothing_to_do_is_said():
  with pytest.raises(UsageError, match=r'config.runs is empty'):
    plan.make_plan(base.get_config(), 300)


def test_runs_that_differ_in_their_names_only_are_named(tmp_path):
  twin = lambda steps: base.run(base.checkpoint('seed'), {'code': 1}, steps)
  runs = plan.make_plan(config_of(tmp_path, one=twin(3), other=twin(3), longer=twin(4)), 300)
  line, = twins.remarks(runs.values())
  assert line.startswith('one and other differ only in their names')
