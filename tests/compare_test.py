"""The command compare: its figures against NumPy in float64, and the seed that it picks."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from btx_jax import base
from btx_jax.commands import compare
from btx_jax.devices import sharding
from btx_jax.study import plan
from tests import studies
from tests.helpers import TINY, Arrays, random_params

MODEL = dataclasses.replace(TINY, tied_head=False)


def relatives():
  """A seed and three models: one differs in all weights, one in some, one from both others."""
  seed = jax.tree.map(np.asarray, random_params(MODEL))
  noise = [jax.tree.map(np.asarray, random_params(MODEL, i, 0.02)) for i in range(1, 4)]
  some = jax.tree.map(lambda a, b: np.where(b > 0, a, a + b).astype(np.float32), seed, noise[1])
  like = jax.tree.map(lambda a, b, c: a - b + c, seed, noise[0], noise[2])
  return [seed, jax.tree.map(np.add, seed, noise[0]), some, like]


def flat(tree, chosen):
  """The parameters whose paths are chosen."""
  return [leaf for path, leaf in jax.tree.leaves_with_path(tree)
          if chosen(sharding.path_of(path))]


def expected(seed, a, b):
  """Cosine, norm ratio and conflicts of two models, the slow way."""
  da, db = (x.astype(np.float64) - seed.astype(np.float64) for x in (a, b))
  both = [(x, y) for x, y in zip(da, db) if abs(x) > compare.TINY and abs(y) > compare.TINY]
  return (da @ db / np.sqrt((da @ da) * (db @ db)), np.sqrt(da @ da / (db @ db)),
          sum(x * y < 0 for x, y in both) / len(both))


@pytest.mark.parametrize('small', [False, True])
def test_figures_match_the_formulas(monkeypatch, small):
  """Regardless of how much is read at a time."""
  if small:
    monkeypatch.setattr(compare, '_READ', 350)
    monkeypatch.setattr(compare, '_BLOCK', 53)
  trees = relatives()
  found = compare.components(MODEL, [Arrays(tree) for tree in trees])
  places = {
      ('embed', None): lambda path: path == 'embed',
      ('head', None): lambda path: path in ('head', 'norm/scale'),
      **{('attention and norms', layer): lambda path: path.startswith('layers/') and (
          '/ffn/' not in path) for layer in range(MODEL.num_layers)},
      **{('feed-forward', layer): lambda path: '/ffn/' in path
         for layer in range(MODEL.num_layers)}}
  assert [(component, layer) for component, layer, *_ in found] == [
      ('embed', None), ('attention and norms', 0), ('feed-forward', 0), ('attention and norms', 1),
      ('feed-forward', 1), ('head', None)]
  assert {kind for component, _, kind, _ in found if component != 'feed-forward'} == {
      compare.AVERAGED}
  for component, layer, _, sums in found:
    figures = compare.figures(sums)
    weights = [np.concatenate([
        (leaf if layer is None else leaf[layer]).ravel()
        for leaf in flat(tree, places[component, layer])]) for tree in trees]
    seed, *experts = weights
    for i, a in enumerate(experts):
      d = a.astype(np.float64) - seed
      np.testing.assert_allclose(figures['moved'][i], np.linalg.norm(d) / np.linalg.norm(seed),
                                 rtol=1e-6)
      np.testing.assert_allclose(
          figures['weight_cosine'][i],
          a.astype(np.float64) @ seed / (np.linalg.norm(a) * np.linalg.norm(seed)), rtol=1e-6)
      for j, b in enumerate(experts):
        cosine, ratio, conflicts = expected(seed, a, b)
        np.testing.assert_allclose(figures['cosine'][i][j], cosine, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(figures['norm_ratio'][i][j], ratio, rtol=1e-9)
        assert figures['conflicts'][i][j] == pytest.approx(conflicts, abs=1e-12)


def test_unchanged_weights_have_no_figures():
  values = np.ones((3, 5), np.float32)
  values[1, 2] += 1
  values[2] += 1e-7  # less than TINY
  found = json.loads(json.dumps(compare.figures(compare.sums(values)), allow_nan=False))
  assert found['conflicts'] == [[0.0, None], [None, None]]
  assert found['changed'] == [[1.0, 0.0], [0.0, 0.0]]
  assert compare.figures(compare.sums(np.stack([values[0]] * 2)))['cosine'] == [[None]]


def config_of(tmp_path, **runs):
  config = studies.get_config(tmp_path)
  for name, init in runs.items():
    config.runs[name] = base.run(init, {'code': 1}, steps=1)
  return config


def test_the_seed_is_the_nearest_common_ancestor(tmp_path):
  runs = plan.make_plan(config_of(
      tmp_path, later=base.checkpoint('expert/code'), apart=base.random(),
      near=base.mix('later', 'expert/code'), far=base.mix('later', 'expert/math'),
      none=base.mix('apart', 'seed', allow='seed')), 300)
  seeds = {name: compare.seed_of(runs[name]) for name in ('btx', 'near', 'far', 'none')}
  assert {name: seed.name for name, (seed, _) in seeds.items()} == {
      'btx': 'seed', 'near': 'expert/code', 'far': 'seed', 'none': 'apart'}
  assert [name for name, (_, why) in seeds.items() if 'no common ancestor' in why] == ['none']


def test_the_table_shows_every_layer():
  values = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
  components = [
      {'component': 'feed-forward', 'layer': i, **compare.figures(compare.sums(values * scale))}
      for i, scale in ((0, 1), (1, 1e-9))]
  table = compare.layer_table({'experts': ['two', 'three'], 'components': components})
  name, *moved, pair = zip(*table.rows)
  seed, *experts = values.astype(np.float64)
  assert name == ('0 feed-forward', '1 feed-forward')
  assert [cells[0] for cells in moved] == [
      f'{np.linalg.norm(w - seed) / np.linalg.norm(seed):.1%}' for w in experts]
  cosine, ratio, conflicts = expected(seed, *experts)
  assert pair[0] == f'{cosine:.2f} {ratio:.2f} {conflicts:.1%}'
  assert pair[1].endswith(' -')  # no weight there has changed by more than TINY


def test_remarks_name_what_stands_out():
  values = np.random.default_rng(0).normal(size=(3, 4000)).astype(np.float32)
  values[1] += values[0]
  figures = compare.figures(compare.sums(values))
  found = {'seed': 'one', 'experts': ['two', 'three'],
           'all': {kind: figures for kind in (compare.AVERAGED, compare.FEED_FORWARD)},
           'components': [{'component': 'embed', 'layer': None, 'kind': compare.AVERAGED,
                           **figures}]}
  unlike, conflicts = compare.remarks(found)
  assert unlike.startswith('three: the cosine of its weights with those of one is ')
  share = figures['conflicts'][0][1]
  assert 0.3 < share < 0.7
  assert f'averaged parameters: {share:.1%}, between two and three in embed.' in conflicts
