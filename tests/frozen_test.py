"""What freezing saves, and what it leaves for mixing to copy."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from btx_jax import base, btx
from btx_jax.commands import table
from btx_jax.configs import modular
from btx_jax.devices.hardware import CHIPS
from btx_jax.model import llama
from btx_jax.model.config import Config, shared_paths, train_flops_per_token
from btx_jax.preflight import cost, hlo
from btx_jax.recipe import whole_experts
from btx_jax.run import Objective
from btx_jax.study import compatibility, plan
from btx_jax.training import step
from tests import studies
from tests.helpers import TINY, Arrays, normal, random_params

HEAD_ONLY = ('^(?!head$)',)
# Matmuls dominate. One round holds exactly the rows of all experts.
DENSE = Config(vocab_size=96, dim=64, ffn_dim=128, num_layers=2, num_heads=2, num_kv_heads=2)
MIXTURE = dataclasses.replace(DENSE, num_experts=2, dispatch='grouped', dispatch_factor=1.0)
ROWS, LENGTH = 32, 15


def compiled_flops(cfg: Config, freeze) -> float:
  """The FLOPs per token of the matmuls in the compiled train step."""
  tx = optax.sgd(1e-3)
  state = jax.eval_shape(lambda params: step.create_state(params, tx, freeze), llama.shapes(cfg))
  batch = {key: np.ones((1, ROWS, LENGTH), np.int32)
           for key in ('tokens', 'targets', 'segment_ids', 'positions', 'loss_mask')}
  batch |= {'domain': np.zeros((1, ROWS), np.int32)}
  train_step = jax.jit(step.make_train_step(cfg, tx, Objective(freeze=freeze)))
  text = train_step.lower(state, batch).compile().as_text()
  found = cost.CostModel(hlo.parse(text), CHIPS['v5p'], None, lambda *_: 1.0).total()
  return found.flops / (ROWS * LENGTH)


def counted_flops(cfg: Config, freeze) -> int:
  return train_flops_per_token(cfg, LENGTH, Objective(freeze=freeze).frozen_paths(cfg))


@pytest.mark.parametrize('cfg, lists', [
    (DENSE, ((), base.FREEZE_ALL_BUT_EXPERTS, HEAD_ONLY)),
    (MIXTURE, (base.FREEZE_ALL_BUT_ROUTER,))], ids=['dense', 'mixture'])
def test_flops_are_those_of_the_step_that_xla_compiles(cfg, lists):
  """Attention computes its masked half too: 2 % of these models."""
  for freeze in lists:
    assert compiled_flops(cfg, freeze) == pytest.approx(counted_flops(cfg, freeze), rel=0.03)


def test_what_is_not_differentiated_costs_nothing():
  weights = 2 * (4 * 64 * 64 + 3 * 64 * 128)
  head, scores = 64 * 96, 2 * 64 * LENGTH
  forward = 2 * (weights + head + scores)
  assert counted_flops(DENSE, ()) == 3 * forward
  assert counted_flops(DENSE, HEAD_ONLY) == forward + 2 * head
  assert counted_flops(DENSE, ('^(?!norm)',)) == forward + 2 * head
  assert counted_flops(DENSE, base.FREEZE_ALL_BUT_EXPERTS) == (
      2 * forward + 2 * scores + 2 * 2 * 3 * 64 * 128)
  # A tied head trains with the embedding.
  tied = dataclasses.replace(DENSE, tied_head=True)
  for freeze, same in ((('layers',), ('layers',)), (('embed',), ('embed', 'head'))):
    assert counted_flops(tied, freeze) == counted_flops(DENSE, same)


def config_of(folder, freeze=base.FREEZE_ALL_BUT_EXPERTS, **mix):
  """The study in miniature with frozen branches."""
  config = studies.get_config(folder)
  for name in ('expert/code', 'expert/math'):
    config.runs[name].train = {'freeze': freeze}
  config.runs.btx.init.update(mix)
  return config


def test_matched_flops_are_those_computed(tmp_path):
  config = config_of(tmp_path)
  config.runs.dense = base.run(base.checkpoint('seed'), {'prose': 1}, train={'batch_size': 2},
                               match_flops_of=('expert/code', 'expert/math'))
  runs = plan.make_plan(config, 300)
  code, dense = runs['expert/code'], runs['dense']
  assert code.flops < code.flops_unfrozen == code.tokens * train_flops_per_token(code.model, 15)
  assert abs(dense.flops - 2 * code.flops) <= dense.flops / dense.steps / 2


def test_the_table_shows_both_counts_where_they_differ():
  row = {'name': 'a', 'bits_per_byte': {'code': 1.0}, 'mean': 1.0, 'active_params': 1e6,
         'total_params': 1e6, 'tokens': 1e6, 'train_flops': 2e12, 'train_flops_unfrozen': 2e12,
         'share': {}}
  frozen = row | {'train_flops_unfrozen': 3e12}
  assert table.headings([row]) == [
      'code', 'mean', 'active M', 'total M', 'tokens M', 'train TFLOP']
  assert table.headings([row, frozen])[-2:] == ['train TFLOP', 'TFLOP if unfrozen']
  assert [cells[-2:] for cells in table.costs([row, frozen])] == [['2.0', '2.0'], ['2.0', '3.0']]


def weights_of(config, path='embed'):
  """The sources of btx with a weight in this parameter, and the remarks about them."""
  run = plan.make_plan(config, 300)['btx']
  weights = run.recipe.weights(path)
  return ([source.name for source, weight in zip(run.sources, weights) if weight],
          compatibility.remarks(run))


def test_what_branches_left_alone_is_copied(tmp_path):
  sources = ['seed', 'expert/code', 'expert/math']
  nothing = ['btx: nothing is averaged: outside the feed-forward layers its sources are equal to '
             'seed']
  assert weights_of(config_of(tmp_path)) == (['seed'], nothing)
  assert weights_of(config_of(tmp_path), 'layers/ffn/experts/up')[0] == sources
  # Without the seed among the sources, of runs further down, and by tokens.
  assert weights_of(config_of(tmp_path, runs=sources[1:])) == (['expert/code'], nothing)
  further = config_of(tmp_path, runs=('more', 'expert/math'), rules=(('embed', 'tokens'),))
  further.runs.more = base.run(base.checkpoint('expert/code'), {'code': 1}, steps=1,
                               train={'freeze': base.FREEZE_ALL_BUT_EXPERTS})
  assert weights_of(further) == (['more'], nothing)
  # One step that changes it is enough.
  further.runs.more.train = {}
  assert weights_of(further) == (['more', 'expert/math'], [])
  assert weights_of(config_of(tmp_path, freeze=('^embed',))) == (
      ['seed'], ['btx: 4,800 of 11,728 parameters outside the feed-forward layers are copied, '
                 'because there its sources are equal to seed'])
  assert weights_of(config_of(tmp_path, freeze=('^embed',)), 'norm/scale')[0] == sources
  assert weights_of(config_of(tmp_path, freeze=('attn',)))[0] == sources


def test_a_rule_that_takes_one_source_stays(tmp_path):
  config = config_of(tmp_path, runs=('seed', 'expert/code'), averaged=('seed', 'expert/code'),
                     rules=(('embed', 'whole'),))
  config.runs.whole = base.run(base.checkpoint('seed'), {'math': 1}, steps=1)
  assert weights_of(config)[0] == ['whole']
  assert weights_of(config, 'head')[0] == ['seed']


def test_copies_have_the_bits_of_the_seed_in_memory_and_by_slices():
  """A mean of three equal numbers does not."""
  seed = jax.tree.map(np.asarray, random_params(TINY))
  ffn = seed['layers'].pop('ffn')
  branches = [{**seed, 'layers': {**seed['layers'], 'ffn': {
      name: normal(x.shape, i) for name, x in ffn.items()}}} for i in range(3)]
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *branches)
  model, rng = dataclasses.replace(TINY, num_experts=3), jax.random.key(0)
  shared = Arrays(seed)
  plain = whole_experts(range(3), TINY.ffn_dim)
  copying = plain.copying(shared_paths(TINY))
  assert (copying.mean, copying.reference) == (plain.mean, plain.reference)
  index = (slice(0, 48), slice(0, 16))
  assert btx.verbatim(copying, 'embed', index) == (0, 'embed', index)
  assert btx.verbatim(plain, 'embed', index) is None

  for recipe in (copying, plain):
    by_slices = btx.mix([Arrays(tree) for tree in branches], model, rng, recipe)
    in_memory = Arrays(jax.jit(btx.mix, static_argnums=(1, 3))(stacked, model, rng, recipe))
    for form in (by_slices, in_memory):
      equal = [(form.read(path, tuple(slice(0, n) for n in shape)) == shared.read(path)).all()
               for path, shape in shared.shapes.items()]
      assert all(equal) == (recipe == copying), recipe


def test_the_recipe_has_mixtures_of_both_kinds_of_branches():
  runs = plan.make_plan(modular.get_config(), 4096)
  assert compatibility.remarks(runs['mixed/ridge']) == [
      'mixed/ridge: nothing is averaged: outside the feed-forward layers its sources are equal to '
      'seed']
  assert not compatibility.remarks(runs['btx/normal'])
  assert runs['mixed/ridge'].steps == runs['btx/normal'].steps == 0
  assert runs['ffn/code'].flops < runs['whole/code'].flops == runs['whole/code'].flops_unfrozen
