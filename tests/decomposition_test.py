"""Where a mixture's score comes from: experts alone, their average, routers, the finetune."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from btx_jax import base
from btx_jax.data.tokens import Tokens
from btx_jax.pipeline import Pipeline
from btx_jax.scoring import bits, decomposition, error_bars, scores, units
from btx_jax.study import manifest
from btx_jax.study.study import Study
from tests import studies
from tests.helpers import TINY_MIXTURE, random_params, use_mesh
from tests.regression_test import Pieces

E = TINY_MIXTURE.num_experts
BLEND = {'prose': 1, 'code': 1, 'math': 1}


@pytest.fixture(scope='module')
def study(text, tmp_path_factory):
  """Mixtures of whole experts, of feed-forward experts, of equal ones, and edits, all measured."""
  config = studies.modular_config(text)
  config.evaluation.oracle = True
  first = {name: base.run(base.checkpoint('seed'), {name: 1}, steps=20)
           for name in ('code', 'math')}
  config.runs = {
      'seed': base.run(base.random(), {'prose': 2, 'code': 1, 'math': 1}, steps=20),
      **{f'whole/{name}': run for name, run in first.items()},
      **{f'ffn/{name}': studies.modular_expert(name, steps=20) for name in first},
      'again': base.run(base.checkpoint('seed')),
      'btx': base.run(base.mix('seed', 'whole/code', 'whole/math'), BLEND, steps=4),
      'longer': base.run(base.checkpoint('btx'), BLEND, steps=2),
      'ffn': base.run(base.mix('seed', 'ffn/code', 'ffn/math')),
      'hashed': base.run(base.mix('seed', 'ffn/code', 'ffn/math'), model={'router': 'hash'}),
      'equal': base.run(base.mix('seed', 'again')),
      'copies': base.run(base.mix('seed', 'seed'), BLEND, steps=4),
      'dropped': base.run(base.drop('ffn', 'seed')),
  }
  pipeline = Pipeline(config, str(tmp_path_factory.mktemp('study')))
  pipeline.train()
  return pipeline


@pytest.fixture(scope='module')
def found(study):
  return {each['name']: each for each in decomposition.of_study(study)}


def own(study, name, domain):
  return scores.read(study, study.runs[name], 'final')[domain]['bits_per_byte']


def test_all_mixtures_of_whole_experts_are_taken_apart(study, found):
  assert found.keys() == {'btx', 'longer', 'ffn', 'hashed', 'equal', 'copies', 'dropped'}
  assert decomposition.remarks(study) == []
  assert json.loads(json.dumps([*found.values()])) == [*found.values()]


def test_experts_that_are_parts_of_runs_cannot_be_measured_alone(tmp_path, monkeypatch):
  config = studies.modular_config(pathlib.Path('nowhere'))
  config.evaluation.oracle = True
  config.runs.update({
      'halves': base.run(base.mix('seed', 'code', arrangement='split', chunks=2)),
      'blend': base.run(base.mix('seed', 'code', arrangement='blend'), BLEND, steps=2),
      'whole': base.run(base.mix('seed', 'code'))})
  monkeypatch.setattr(Study, 'state', lambda self, name: manifest.COMPLETE)
  assert decomposition.remarks(Study(config, str(tmp_path))) == [
      f'{name}: no expert is measured alone, because its experts are parts of runs.'
      for name in ('blend', 'halves')]


def test_the_parts_add_up_and_are_the_scores_of_the_rows(study, found):
  btx = found['btx']
  rows = {stage: scores.read(study, study.runs['btx'], stage)
          for stage in ('average', 'start', 'final')}
  for domain, part in btx['domains'].items():
    assert part['own'] + part['averaging'] + part['routing'] - part['gained'] == pytest.approx(
        part['final'], abs=1e-12)
    for stage, row in rows.items():
      assert part[stage] == row[domain]['bits_per_byte']
  assert btx['domains']['code']['own'] == own(study, 'whole/code', 'code')
  assert btx['domains']['code']['expert'] == btx['domains']['code']['expert_final'] == 1
  assert btx['mean']['gained'] == pytest.approx(np.mean(
      [part['gained'] for part in btx['domains'].values()]))
  # No expert was trained on prose alone: the best one there.
  assert btx['domains']['prose']['own'] == min(
      own(study, name, 'prose') for name in ('seed', 'whole/code', 'whole/math'))
  final = scores.read(study, study.runs['btx'], 'final')['math']
  start = scores.read(study, study.runs['btx'], 'start')['math']
  assert btx['domains']['math']['errors']['gained'] == error_bars.error_of_difference(
      start['units'], final['units'])


def test_averaging_costs_whole_experts_something_and_feed_forward_experts_nothing(found):
  for name in ('ffn', 'hashed'):
    for part in found[name]['domains'].values():
      assert part['averaging'] == pytest.approx(0, abs=1e-6)
      assert part['final'] is part['gained'] is part['oracle_final'] is None
  assert found['hashed']['mean']['routing'] > 1e-3
  assert abs(found['btx']['mean']['averaging']) > 1e-3


def test_equal_experts_are_the_seed_whatever_routers_do(study, found):
  for name in ('equal', 'copies'):
    for domain, part in found[name]['domains'].items():
      for kind in ('own', 'oracle_start', 'start'):
        assert part[kind] == pytest.approx(own(study, 'seed', domain), abs=1e-5), (name, kind)
  assert abs(found['copies']['mean']['gained']) > 1e-4
  assert found['equal']['mean']['average'] and not found['copies']['mean']['average']


def test_a_run_that_continues_a_mixture_has_its_beginning(found):
  longer, btx = found['longer'], found['btx']
  for domain, part in longer['domains'].items():
    before = btx['domains'][domain]
    assert [part[kind] for kind in ('own', 'average', 'oracle_start', 'start')] == [
        before[kind] for kind in ('own', 'average', 'oracle_start', 'start')]
    assert part['final'] != before['final'] and part['oracle_final'] != before['oracle_final']


def test_an_edit_has_the_experts_that_are_left(study, found):
  assert found['dropped']['experts'] == ['ffn/code', 'ffn/math']
  for domain, scored in found['dropped']['by_expert']['own'].items():
    assert scored == [own(study, name, domain) for name in ('ffn/code', 'ffn/math')]
    assert found['dropped']['by_expert']['oracle_start'][domain] == pytest.approx(scored, abs=1e-6)
  assert found['dropped']['domains']['math']['expert'] == 1


def test_the_own_expert_of_a_domain_is_the_one_trained_on_it_even_if_another_is_better():
  of_experts = [{'code': {'bits_per_byte': score}} for score in (0.5, 1.0, 0.9)]
  assert decomposition._best('code', ['prose', 'code', 'code'], of_experts) == 2
  assert decomposition._best('code', ['prose', '', ''], of_experts) == 0


def test_measured_experts_are_not_measured_again(study):
  assert not Pipeline(study.config, study.workdir).train()


@pytest.mark.parametrize('router', ['top_k', 'soft'])
def test_an_expert_alone_is_what_is_left_if_all_others_are_masked(router):
  """So routing costs nothing if routers choose the own expert of a domain."""
  cfg = dataclasses.replace(TINY_MIXTURE, router=router)
  params = random_params(cfg)
  tokens = Tokens(np.random.default_rng(0).integers(1, cfg.vocab_size, 150),
                  np.array([0, 70, 150]), np.array([0, 200, 400]), 'x')
  with use_mesh((1, 1, 2, 1)) as mesh:
    alone = bits.each_expert_alone(cfg, params, {'code': tokens}, mesh, 15, 8, Pieces(), stride=7)
    step = bits._masked_step(cfg, mesh)
    for number in range(E):
      nll = [jax.device_get(step(params, batch, np.arange(E) != number))
             for _, batch in bits._batches(tokens, mesh, 15, 8, 7)]
      expected = units.score(bits._of_tokens(nll, tokens, 15, 7), tokens, Pieces())
      assert alone['code']['bits_per_byte'][number] == pytest.approx(
          expected['bits_per_byte'], rel=1e-5)
      np.testing.assert_allclose(
          alone['code']['units']['nll'][number], expected['units']['nll'], rtol=1e-4)
  assert len({round(score, 3) for score in alone['code']['bits_per_byte']}) == E
