"""What several models predict together, weighted as in Branch-Train-Merge."""

import itertools
import math

import numpy as np
import pytest

from btx_jax import base, selector
from btx_jax.data.tokens import Tokens
from btx_jax.devices import sharding
from btx_jax.devices.mesh import make_mesh
from btx_jax.scoring import bits, ensemble, scores
from btx_jax.study import manifest
from btx_jax.study.study import Study
from tests import studies
from tests.helpers import TINY, random_params


class Letters:
  """A tokenizer with one token per letter; 0 ends a document."""

  def decode(self, ids):
    return ''.join(chr(96 + i) if i else '' for i in ids)

  def spell(self, ids):
    return self.decode(ids).encode()


def documents(*texts):
  ids = [[*(ord(c) - 96 for c in text), 0] for text in texts]
  starts = np.cumsum([0, *map(len, ids)])
  sizes = np.cumsum([0, *map(len, texts)])
  return Tokens(np.array([i for one in ids for i in one]), starts, sizes, 'x')


TOKENS = documents(*(''.join(chr(97 + (7 * i * j + j) % 26) for j in range(40 + 90 * i))
                     for i in range(3)))
NLL = np.random.default_rng(0).exponential(size=(len(TOKENS.ids), 3))
EQUAL = np.full((len(TOKENS.ids), 3), -math.log(3))


def score(weights, nll=NLL):
  return ensemble.bits_per_byte(nll, weights, TOKENS, Letters())['bits_per_byte']


def similarity_of(cosines):
  return lambda texts: np.tile(np.float64(cosines), (len(texts), 1))


@pytest.fixture(scope='module', params=[0, 4])
def scored(request):
  """A model's negative log likelihood of each of TOKENS, and its bits per byte, with a stride."""
  params = random_params(TINY)
  mesh = make_mesh(data=4, fsdp=2)
  with sharding.jax.set_mesh(mesh):
    nll = ensemble.token_nll(TINY, params, TOKENS, mesh, 15, 8, request.param)
    whole = bits.evaluate(
        TINY, params, {'x': TOKENS}, mesh, 15, 8, Letters(), request.param)['x']
  return nll, whole


def test_one_expert_alone_scores_as_in_the_table(scored):
  nll, whole = scored
  found = ensemble.bits_per_byte(nll[:, None], np.zeros((len(nll), 1)), TOKENS, Letters())
  units = found['units'] | {'nll': pytest.approx(found['units']['nll'], rel=1e-5)}
  assert whole == found | {
      'bits_per_byte': pytest.approx(found['bits_per_byte'], rel=1e-5), 'units': units}
  assert whole['units']['bytes'] == np.diff(TOKENS.bytes).tolist()


def similarities(cosines=(0.1, 0.3, 0.2)):
  return ensemble.similarities(similarity_of(cosines), TOKENS, Letters(), 3)


def log_weights(kind, top, nll=NLL):
  if kind == 'posterior':
    return ensemble.posterior_log_weights(nll, TOKENS.starts, top)
  return selector.similarity_log_weights(similarities(), top)


@pytest.mark.parametrize('top', [0, 1, 2])
@pytest.mark.parametrize('kind', ['tfidf', 'posterior'])
def test_identical_experts_score_as_one(kind, top):
  same = np.repeat(NLL[:, :1], 3, 1)
  found = score(log_weights(kind, top, same), same)
  assert found == pytest.approx(score(np.zeros((len(NLL), 1)), NLL[:, :1]))


def test_the_most_similar_expert_alone_is_exactly_that_expert():
  """From the second block on; in the first block the weights are uniform."""
  weights = log_weights('tfidf', 1)
  place = np.concatenate([np.arange(b - a) for a, b in zip(TOKENS.starts, TOKENS.starts[1:])])
  known = place >= selector.BLOCK
  assert known.any() and (~known).any()
  mixed = ensemble.averaged_nll(NLL, weights)
  np.testing.assert_array_equal(mixed[known], NLL[known, 1])
  np.testing.assert_allclose(weights[~known], EQUAL[~known])


def test_weights_are_a_softmax_over_the_most_similar():
  cosines = np.array([[0.1, 0.4, 0.3], [0.1, 0.1, 0.0]])
  expected = np.exp(-(2 - 2 * cosines) / 0.1)
  for top, left_out in ((0, []), (2, [(0, 0), (1, 2)]), (1, [(0, 0), (0, 2), (1, 2)])):
    for at in left_out:  # those that equal the last are kept
      expected[at] = 0
    found = np.exp(selector.similarity_log_weights(cosines, top))
    np.testing.assert_allclose(found, expected / expected.sum(1, keepdims=True))


def test_weights_of_a_token_depend_only_on_the_tokens_before():
  seen = []

  def similarity(texts):
    seen.extend(texts)
    return np.tile([0.1, 0.3, 0.2], (len(texts), 1))

  found = ensemble.similarities(similarity, TOKENS, Letters(), 3)
  whole = Letters().decode(TOKENS.ids[TOKENS.starts[2]:].tolist())
  assert seen[-1] == whole[:192] and len(seen) == 2 + 3
  assert [np.flatnonzero(found[first:end, 1])[0] for first, end in itertools.pairwise(
      TOKENS.starts) if end - first > 64] == [64, 64]
  other = NLL.copy()
  other[150:] += 5
  before, after = (ensemble.posterior_log_weights(nll, TOKENS.starts, 0) for nll in (NLL, other))
  np.testing.assert_allclose(before[:151], after[:151], rtol=1e-12)


def test_the_most_probable_expert_is_that_of_the_largest_product_so_far():
  weights = log_weights('posterior', 1)
  for first, end in itertools.pairwise(TOKENS.starts):
    np.testing.assert_allclose(weights[first], EQUAL[0])  # no text yet: all experts
    for i in range(first + 1, end):
      products = [math.prod(math.exp(-x) for x in NLL[first:i, e]) for e in range(3)]
      assert weights[i].tolist() == [0 if p == max(products) else -math.inf for p in products]


def test_the_posterior_gives_a_document_the_mean_of_its_probabilities():
  """By the chain rule, for the probabilities that the experts give to the whole document."""
  weights = ensemble.posterior_log_weights(NLL, TOKENS.starts, 0)
  for first, end in zip(TOKENS.starts, TOKENS.starts[1:]):
    found = np.log(np.exp(weights[first:end] - NLL[first:end]).sum(1)).sum()
    whole = np.log(np.exp(-NLL[first:end].sum(0)).mean())
    assert found == pytest.approx(whole)


def test_texts_are_similar_by_their_words():
  similarity = ensemble.Similarity([
      ['def f(x): return x + 17', 'import os'], ['the king said to the queen', 'a royal house']])
  close = similarity(['def g(y): return y + 33', 'the queen of the house', ''])
  assert close[0].argmax() == 0 and close[1].argmax() == 1 and not close[2].any()


def test_mixtures_of_the_same_models_share_their_average(text, tmp_path, monkeypatch):
  config = studies.get_config(text)
  sources = 'seed', 'expert/code', 'expert/math'
  mixture = lambda *names, **kwargs: base.run(base.mix(*names, **kwargs), {'code': 1}, steps=1)
  config.runs.again = mixture(*sources[::-1], arrangement='split', chunks=2)
  config.runs.other = mixture(*sources, averaged=('seed', 'expert/code'))
  monkeypatch.setattr(Study, 'state', lambda self, name: manifest.COMPLETE)
  names = [model.name for model in scores.models(Study(config, str(tmp_path)))]
  assert [name for name in names if ' of ' in name] == ['average of again', 'average of other']
