"""Re-initialised hidden units, for mixtures of one seed (Drop-Upcycling)."""

import functools

import numpy as np

from btx_jax import base
from btx_jax.model.source import Arrays
from btx_jax.pipeline import Pipeline
from btx_jax.study import sources
from btx_jax.study.redrawn import Redrawn
from tests import studies
from tests.helpers import TINY, final_params, random_params

MATRICES = {'layers/ffn/gate': 1, 'layers/ffn/up': 1, 'layers/ffn/down': 0}


@functools.cache
def seed() -> Arrays:
  return Arrays(random_params(TINY))


def whole(source, path):
  return source.read(path, tuple(slice(0, n) for n in seed().shapes[path]))


def test_the_same_units_are_reinitialised_in_all_matrices_and_the_rest_is_kept():
  made = Redrawn(seed(), TINY, 0.5, seed=1)
  for path, shape in seed().shapes.items():
    was, now = whole(seed(), path), whole(made, path)
    if path not in MATRICES:
      np.testing.assert_array_equal(now, was)
      continue
    for layer in range(shape[0]):
      changed = np.flatnonzero((was != now)[layer].any(1 - MATRICES[path]))
      np.testing.assert_array_equal(changed, made.units(layer))
      assert len(changed) == TINY.ffn_dim // 2
      drawn, before = (np.take(x[layer], changed, MATRICES[path]) for x in (now, was))
      np.testing.assert_allclose(drawn.std(), before.std(), rtol=0.3)
  assert set(made.units(0)) != set(made.units(1))
  assert set(made.units(0)) != set(Redrawn(seed(), TINY, 0.5, seed=2).units(0))


def test_a_slice_is_that_of_the_whole():
  made, path = Redrawn(seed(), TINY, 0.5, seed=1), 'layers/ffn/up'
  index = slice(1, 2), slice(3, 9), slice(2, 11)
  np.testing.assert_array_equal(made.read(path, index), whole(made, path)[index])
  unchanged = Redrawn(seed(), TINY, 0.0, seed=1)
  np.testing.assert_array_equal(whole(unchanged, path), whole(seed(), path))


def test_a_study_mixes_copies_with_other_units_reinitialised(text, tmp_path):
  config = studies.get_config(text)
  config.mesh.update(fsdp=1, expert=1, tensor=1)
  config.evaluation.every = 0
  config.runs = {
      'seed': base.run(base.random(), {'prose': 1}, steps=1),
      **{f'copy/{i}': base.run(base.checkpoint('seed', redraw=0.5)) for i in range(2)},
      'mixed': base.run(base.mix('copy/0', 'copy/1')),
  }
  pipeline = Pipeline(config, str(tmp_path / 'work'))
  pipeline.train('seed')

  def whole_of(name, path, shape):
    source = sources.final(pipeline, pipeline.runs[name])
    return np.asarray(source.read(path, tuple(slice(0, n) for n in shape)))

  seed = final_params(pipeline, 'seed')
  q, up = (np.asarray(seed['layers'][part][name]) for part, name in (('attn', 'q'), ('ffn', 'up')))
  np.testing.assert_array_equal(whole_of('mixed', 'layers/attn/q', q.shape), q)
  experts = whole_of('mixed', 'layers/ffn/experts/up', (up.shape[0], 2, *up.shape[1:]))
  assert [float(np.mean(up == experts[:, e])) for e in range(2)] == [0.5, 0.5]
  assert (experts[:, 0] != experts[:, 1]).any()
  np.testing.assert_array_equal(whole_of('copy/1', 'layers/ffn/up', up.shape), experts[:, 1])
