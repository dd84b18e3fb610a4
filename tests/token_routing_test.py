"""Which tokens go to which expert, against NumPy from the routers' inputs."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from btx_jax.data import mixture
from btx_jax.data.tokens import Tokens
from btx_jax.fitting import passes
from btx_jax.scoring import bits, routing
from tests.helpers import TINY_MIXTURE, random_params, use_mesh

E, L = TINY_MIXTURE.num_experts, TINY_MIXTURE.num_layers
LENGTH = 15
WORDS = (' king', 'dom', '12', ' 7', '):', '    ', '')


class Words:
  """A tokenizer whose tokens have these texts."""

  def pieces(self, ids):
    return [WORDS[i % len(WORDS)] for i in ids]

  def spell(self, ids):
    return ' '.join(self.pieces(ids)).encode()


def text(seed, size):
  ids = np.random.default_rng(seed).zipf(1.5, size) % TINY_MIXTURE.vocab_size
  return Tokens(ids, np.array([0, 70, size]), np.array([0, 200, 400]), 'x')


read = jax.jit(passes.router_inputs, static_argnums=0)


def dense(cfg, params, tokens, stride):
  """The expert with the largest logit for each token but the last, [N, L], one layer at a time."""
  rows = [row for batch in mixture.evaluation_batches(tokens, LENGTH, 4, stride)
          for row in np.moveaxis(np.asarray(read(cfg, params, batch)), 0, 2)]
  columns_LDE = np.asarray(params['layers']['ffn']['router'], np.float64)
  best = []
  for n in range(len(tokens.ids) - 1):
    # The first window that has the token.
    window = max(math.ceil((n - LENGTH + 1) / (stride or LENGTH)), 0)
    inputs_LD = rows[window][n - window * (stride or LENGTH)].astype(np.float64)
    best.append([int((inputs_LD[layer] @ columns_LDE[layer]).argmax()) for layer in range(L)])
  return np.array(best)


@pytest.mark.parametrize('router, stride', [('top_k', 0), ('top_k', 7), ('soft', 0)])
def test_counts_are_those_of_a_dense_recomputation(router, stride):
  cfg = dataclasses.replace(TINY_MIXTURE, router=router)
  params = random_params(cfg)
  held_out = {'code': text(0, 150), 'math': text(1, 130)}
  with use_mesh((1, 1, 1, 1)) as mesh:
    found = bits.evaluate(cfg, params, held_out, mesh, LENGTH, 4, Words(), stride)
  chosen = {name: dense(cfg, params, tokens, stride) for name, tokens in held_out.items()}
  pieces = {}
  for name, tokens in held_out.items():
    counts, ids = found[name]['routing'], np.asarray(tokens.ids[:-1])
    assert counts['layers'] == [0, 1]
    assert counts['first'] == [np.bincount(chosen[name][:, layer], minlength=E).tolist()
                               for layer in range(L)]
    for layer in counts['layers']:
      for i, kind in enumerate(routing.CLASSES):
        of_class = [routing.class_of(piece) == kind for piece in Words().pieces(ids)]
        assert counts['by_class'][layer][i] == np.bincount(
            chosen[name][of_class, layer], minlength=E).tolist()
      # Several tokens have one text here, so sums over tokens of a text are compared.
      for word in WORDS:
        of_word = [piece == word for piece in Words().pieces(ids)]
        at = [i for i, piece in enumerate(counts['pieces']) if piece == word]
        assert np.sum([counts['by_piece'][layer][i] for i in at], 0).tolist() == np.bincount(
            chosen[name][of_word, layer], minlength=E).tolist()
    pieces[name] = counts['pieces']
  assert pieces['code'] == pieces['math']


def test_mutual_information_is_that_of_the_decisions():
  rng = np.random.default_rng(0)
  chosen = [rng.choice(3, 4000, p=p) for p in ([0.7, 0.2, 0.1], [0.1, 0.2, 0.7])]
  # Each domain has the same weight, however much text it has.
  chosen[1] = chosen[1][:400]
  joint = np.array([[(one == expert).mean() / 2 for expert in range(3)] for one in chosen])
  entropy = lambda p: -(p * np.log2(p)).sum()
  expected = entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint)
  found = {name: {'routing': {
      'first': [np.bincount(one).tolist()], 'layers': [0], 'pieces': ['x'],
      'by_piece': [[[1, 1, 1]]], 'by_class': [[[1, 1, 1]] * len(routing.CLASSES)]}}
           for name, one in zip(('code', 'math'), chosen)}
  assert routing.describe(found)['mutual_information'] == [pytest.approx(expected, abs=1e-12)]
  own = {name: np.eye(2)[None, i] for i, name in enumerate(('code', 'math'))}
  assert routing.mutual_information([*own.values()]) == pytest.approx([1.0])
  assert routing.mutual_information([own['code']] * 2) == pytest.approx([0.0])


def test_shares_tokens_and_classes_follow_from_the_counts():
  """Two layers, two experts, and two tokens: digits and the start of a word."""
  no_class = [[0, 0]] * (len(routing.CLASSES) - 2)

  def counts(first, by_piece):
    by_class = [[*table, *no_class] for table in by_piece]
    return {'routing': {'first': first, 'layers': [0, 1], 'pieces': ['7', ' a'],
                        'by_piece': by_piece, 'by_class': by_class}}

  found = routing.describe({
      'code': counts([[3, 1], [0, 4]], [[[3, 0], [0, 1]], [[0, 3], [0, 1]]]),
      'math': counts([[1, 1], [1, 1]], [[[1, 0], [0, 1]], [[0, 1], [1, 0]]])})
  assert found['share'] == {'code': [[0.75, 0.25], [0, 1]], 'math': [[0.5, 0.5], [0.5, 0.5]]}
  assert found['tokens'] == [[[('7', 4, 4)], [(' a', 2, 2)]], [[(' a', 1, 2)], [('7', 4, 4)]]]
  assert found['classes'] == [[[1, 0], [0, 1], *[None] * 4], [[0, 1], [0.5, 0.5], *[None] * 4]]


def test_the_most_over_represented_tokens_come_first():
  counts_PE = np.array([[90, 10], [5, 5], [40, 0], [1, 0], [10, 90]])
  names = ['often', 'evenly', 'always', 'once', 'elsewhere']
  found = routing.over_represented(names, counts_PE, counts_PE.sum(0), 0)
  assert found == [('often', 90, 100), ('always', 40, 40), ('once', 1, 1)]
  assert routing.over_represented(names, counts_PE, counts_PE.sum(0), 1)[0] == (
      'elsewhere', 90, 100)


def test_scores_of_earlier_versions_show_nothing():
  assert routing.describe({'code': {'bits_per_byte': 1.0}}) is None


@pytest.mark.parametrize('piece, kind', [
    (' king', 'word start'), ('dom', 'word part'), ('12', 'digits'), (' 7', 'digits'),
    ('):', 'punctuation'), (' =', 'punctuation'), ('\n\n', 'white space'), ('x1', 'other'),
    ('', 'other'), ('\ufffd', 'other')])
def test_the_class_of_a_token_follows_from_its_text(piece, kind):
  assert routing.class_of(piece) == kind
