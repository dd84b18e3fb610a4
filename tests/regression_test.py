"""What training changed in a mixture, and which expert helps which domain."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from btx_jax import base
from btx_jax.commands import regression as printed
from btx_jax.data.tokens import Tokens
from btx_jax.model import balance, routers
from btx_jax.scoring import bits, error_bars, regression, scores
from btx_jax.study import manifest
from btx_jax.study.study import Study
from tests import studies
from tests.helpers import TINY_MIXTURE, normal, random_params, use_mesh

E = TINY_MIXTURE.num_experts


def of(**scored):
  """Scores by domain as they are stored."""
  return {domain: {'bits_per_byte': score} for domain, score in scored.items()}


def test_the_largest_increase_comes_first_and_what_is_undefined_before_it():
  before = of(code=2.0, math=1.0, prose=4.0, law=0.0, tax=1.0)
  found = regression.changes(before, of(code=1.0, math=1.1, prose=4.1, law=0.5, tax=math.nan))
  assert [row['domain'] for row in found] == ['law', 'tax', 'math', 'prose', 'code']
  assert [row['percent'] for row in found] == [
      None, None, pytest.approx(10), pytest.approx(2.5), pytest.approx(-50)]
  assert found[2] == {'domain': 'math', 'before': 1.0, 'after': 1.1, 'percent': found[2]['percent'],
                      'percent_error': None}


@pytest.fixture
def study(text, tmp_path, monkeypatch):
  """All runs are complete, and have these scores; nothing was computed."""
  config = studies.get_config(text)
  config.evaluation.mask_experts = True
  blend = {'prose': 2, 'code': 1}
  config.runs.update({
      'longer': base.run(base.checkpoint('btx'), blend, steps=2),
      'same': base.run(base.checkpoint('btx'), {}, steps=0),
      'edited': base.run(base.drop('btx', 'seed')),
      'dense': base.run(base.checkpoint('expert/code'), blend, steps=2),
      'unscored': base.run(base.mix('seed', 'expert/code'), blend, steps=2),
      'hashed': base.run(base.mix('seed', 'expert/math'), blend, steps=2,
                         model={'router': 'hash'})})
  dense = of(code=3.0, math=3.0, prose=3.0)
  stored = {
      ('seed', 'final'): dense, ('expert/code', 'final'): dense, ('dense', 'final'): dense,
      ('btx', 'start'): of(code=2.0, math=2.0, prose=2.0),
      ('btx', 'final'): of(code=1.0, math=2.2, prose=2.0),
      ('btx', 'masked'): of(code=[1.0, 1.5, 1.0, 0.9], math=[2.2, 2.2, 3.2, 2.2],
                            prose=[2.5, 2.0, 2.0, 2.0]),
      ('longer', 'final'): of(code=1.1, math=2.2, prose=1.8), ('same', 'final'): dense,
      ('edited', 'final'): of(code=1.0, math=2.2, prose=3.0),
      ('unscored', 'final'): dense}
  monkeypatch.setattr(Study, 'state', lambda self, name: manifest.COMPLETE)
  monkeypatch.setattr(scores, 'read', lambda study, run, stage: stored.get((run.name, stage)))
  return Study(config, str(tmp_path))


def test_a_mixture_is_compared_with_its_start_and_what_continues_it_with_its_end(study):
  found = {each['name']: each for each in regression.regressions(study)}
  # Trained mixtures with both scores, and what exchanges their experts.
  assert found.keys() == {'btx', 'longer', 'edited'}
  assert found['btx']['since'] == 'btx unfinetuned'
  assert [(c['domain'], round(c['percent'], 6)) for c in found['btx']['changes']] == [
      ('math', 10), ('prose', 0), ('code', -50)]
  assert found['longer']['since'] == 'btx'
  assert [c['before'] for c in found['longer']['changes']] == [1.0, 2.2, 2.0]
  assert found['edited']['since'] == 'btx'
  assert [(c['domain'], c['before'], c['after']) for c in found['edited']['changes']] == [
      ('prose', 2.0, 3.0), ('code', 1.0, 1.0), ('math', 2.2, 2.2)]


def test_the_effect_of_an_expert_is_what_the_mixture_loses_without_it(study):
  effect, = regression.effects(study)
  assert effect['name'] == 'btx'
  assert effect['experts'] == ['seed', 'expert/code', 'expert/math', 'expert/code']
  assert {domain: np.round(change, 6).tolist() for domain, change in effect['change'].items()} == {
      'code': [0, 0.5, 0, -0.1], 'math': [0, 0, 1, 0], 'prose': [0.5, 0, 0, 0]}
  assert effect['error'] == dict.fromkeys(studies.WORDS, [None] * 4)  # of an earlier version


def test_the_effect_of_an_expert_has_the_error_of_paired_units(study, monkeypatch):
  whole = {'nll': [100.0, 210.0, 290.0], 'bytes': [50, 100, 150]}
  without = [[110.0, 205.0, 300.0], [100.0, 210.0, 290.0]]
  monkeypatch.setattr(scores, 'read', lambda _, run, stage: {
      'code': {'bits_per_byte': [2.0, 1.9], 'units': {'nll': without, 'bytes': whole['bytes']}}
      if stage == 'masked' else {'bits_per_byte': 1.9, 'units': whole}})
  effect = regression.effects(study)[0]
  assert effect['error']['code'] == [error_bars.error_of_difference(
      {'nll': nll, 'bytes': whole['bytes']}, whole) for nll in without]
  first, second = ([cell for cell, _ in row][1] for row in printed.effects_cells(
      effect | {'experts': effect['experts'][:2]}))
  assert first == f'+0.100 ±{effect["error"]["code"][0]:.3f}' and second == '+0.000 ±0.000'


def test_the_terminal_shows_both_within_80_columns(study, capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '80')
  printed.show(study)
  lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
  assert max(len(line) for line in lines if 'hashed: ' not in line) <= 80
  cells = [line.split() for line in lines]
  assert ['btx', 'btx', 'unfinetuned', 'math', '2.000', '2.200', '+10.00'] in cells
  assert ['code', '2.000', '1.000', '-50.00'] in cells
  assert ['1', 'expert/code', '+0.500', '+0.000', '+0.000'] in cells
  assert 'hashed: no expert is masked, because the router' in ' '.join(lines)


# Masking, against a mixture that the expert is really removed from.


@pytest.mark.parametrize('router, k, biased', [
    ('top_k', 2, False), ('top_k', 2, True), ('top_k', E, False), ('softmax_top_k', 2, False),
    ('softmax_top_k', E, True), ('switch', 0, True), ('soft', 0, False),
    ('sample_top_1', 0, False)])
def test_a_masked_router_chooses_as_if_the_expert_did_not_exist(router, k, biased):
  cfg = dataclasses.replace(TINY_MIXTURE, router=router, top_k=k)
  smaller = dataclasses.replace(cfg, num_experts=E - 1, top_k=min(k, E - 1))
  logits, out = normal((2, 40, E)), 1
  rest = np.delete(np.arange(E), out)
  # A bias that favours the expert to be masked.
  bias = np.float32([0.0, 5.0, 0.1, -0.1]) if biased else None
  for layer in (0, 1):
    context = routers.Context(np.zeros((2, 40), int), np.ones((2, 40), bool), layer)
    masked = context._replace(bias=bias, masked=np.arange(E) == out)
    choice = routers.route(cfg, *routers.mask(cfg, logits, masked))
    gates = balance.dense_gates(choice.gates, choice.ids, E)
    removed = routers.route(smaller, logits[..., rest], context._replace(
        bias=bias[rest] if biased else None))
    np.testing.assert_array_equal(gates[..., out], 0)
    np.testing.assert_allclose(gates[..., rest], balance.dense_gates(
        removed.gates, removed.ids, E - 1), rtol=1e-6)


def test_the_router_without_logits_cannot_be_masked():
  cfg = dataclasses.replace(TINY_MIXTURE, router='hash')
  context = routers.Context(np.zeros((1, 1), int), np.ones((1, 1), bool), masked=np.eye(E)[0])
  with pytest.raises(ValueError, match="'hash' has no logits"):
    routers.mask(cfg, None, context)
  assert 'has no scores' in regression.why_unmasked(cfg)


class Pieces:
  """A tokenizer that is asked for nothing but the text of tokens."""

  def pieces(self, ids):
    return list(map(str, ids))

  def spell(self, ids):
    return ' '.join(self.pieces(ids)).encode()


@pytest.mark.parametrize('router', ['top_k', 'softmax_top_k'])
def test_scores_without_an_expert_are_those_of_the_smaller_mixture(router):
  cfg = dataclasses.replace(TINY_MIXTURE, router=router)
  smaller = dataclasses.replace(cfg, num_experts=E - 1)
  params = random_params(cfg)
  held_out = {name: Tokens(np.random.default_rng(seed).integers(1, cfg.vocab_size, 150),
                           np.array([0, 70, 150]), np.array([0, 200, 400 + seed]), 'x')
              for seed, name in enumerate(('code', 'math'))}
  bits._masked_step.cache_clear()  # of other tests
  with use_mesh((1, 1, 2, 1)) as mesh:
    found = bits.without_each_expert(cfg, params, held_out, mesh, 15, 8, Pieces(), stride=7)
  assert bits._masked_step(cfg, mesh)._cache_size() == 1  # one program for all experts
  for out in range(E):
    ffn = params['layers']['ffn']
    removed = {**params, 'layers': {**params['layers'], 'ffn': {
        'router': np.delete(ffn['router'], out, 2),
        'experts': jax.tree.map(lambda x, out=out: np.delete(x, out, 1), ffn['experts'])}}}
    with use_mesh((1, 1, 1, 1)) as mesh:
      expected = bits.evaluate(smaller, removed, held_out, mesh, 15, 8, Pieces(), stride=7)
    for domain, score in expected.items():
      assert found[domain]['bits_per_byte'][out] == pytest.approx(score['bits_per_byte'], rel=1e-5)
      units = {kind: found[domain]['units'][kind] for kind in ('nll', 'bytes')}
      assert units['bytes'] == score['units']['bytes']
      np.testing.assert_allclose(units['nll'][out], score['units']['nll'], rtol=1e-4)
  assert len(set(found['code']['bits_per_byte'])) == E  # each expert matters
