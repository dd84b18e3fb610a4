"""A source read in the vocabulary of another: rows by the name of the token, for any slice."""

import pathlib

import numpy as np
import pytest

from btx_jax.data import tokenizer
from btx_jax.study import compatibility, sources
from tests.helpers import Arrays, normal

TOKENIZER = pathlib.Path(__file__).parent / 'fixtures' / 'tokenizer'
OURS = {'<s>': 0, 'the': 1, 'king': 2, 'and': 3, 'so': 4, 'he': 5, 'went': 7}  # no token has row 6
THEIRS = {'<s>': 0, 'so': 1, 'he': 2, 'king': 3, 'queen': 4, 'and': 5, 'the': 6, 'far': 9}
SIZE, THEIR_SIZE = 9, 8


def models():
  """Parameters of our vocabulary, of theirs, and theirs in ours, row by row."""
  ours = {'embed': normal((SIZE, 3)), 'head': normal((3, SIZE), 1), 'norm': {'scale': normal(3)}}
  theirs = {'embed': normal((THEIR_SIZE, 3), 2), 'head': normal((3, THEIR_SIZE), 3),
            'norm': {'scale': normal(3, 4)}}
  expected = {name: ours[name].copy() for name in ('embed', 'head')}
  for token in ('<s>', 'the', 'king', 'and', 'so', 'he'):
    expected['embed'][OURS[token]] = theirs['embed'][THEIRS[token]]
    expected['head'][:, OURS[token]] = theirs['head'][:, THEIRS[token]]
  return ours, theirs, expected


def test_any_slice_is_that_of_the_whole():
  ours, theirs, expected = models()
  rows = sources.matching_rows(OURS, SIZE, THEIRS, THEIR_SIZE)
  assert rows.tolist() == [0, 6, 3, 5, 1, 2, -1, -1, -1]
  source = sources.Aligned(Arrays(theirs), Arrays(ours), rows)
  np.testing.assert_array_equal(source.read('embed'), expected['embed'])
  np.testing.assert_array_equal(source.read('head'), expected['head'])
  np.testing.assert_array_equal(source.read('norm/scale'), theirs['norm']['scale'])
  for start in range(SIZE):
    for end in range(start + 1, SIZE + 1):
      cut = slice(start, end)
      np.testing.assert_array_equal(source.read('embed', (cut,)), expected['embed'][cut])
      np.testing.assert_array_equal(source.read('head', (slice(1, 3), cut)),
                                    expected['head'][1:, cut])


def test_a_vocabulary_that_only_has_more_tokens_does_not_contradict():
  say = lambda theirs, size=9: compatibility.contradiction(OURS, theirs, size)
  assert not say(OURS) and not say({**OURS, 'more': 8})
  assert not say({token: i for token, i in OURS.items() if token != 'went'})
  assert say({**OURS, 'the': 2, 'king': 1}) == "1 is 'the' and 'king'"
  assert say({**{token: i for token, i in OURS.items() if token != 'so'}, 'far': 4}) == (
      "4 is 'so' and 'far'")
  assert say({'went': 8}) == "'went' is 7 and 8"
  assert say(OURS, 7) == "'went' is 7, beyond the model's 7 tokens"


@pytest.mark.parametrize('make', [
    lambda: tokenizer.train_tokenizer(['some words, and more words'] * 40, 290),
    lambda: tokenizer.load(str(TOKENIZER))])
def test_every_id_has_a_name_of_its_own(make):
  found = make()
  names = found.vocabulary()
  assert sorted(names.values()) == list(range(found.vocab_size))
  ids = found.encode(['more words'])[0]
  by_id = {i: name for name, i in names.items()}
  assert [by_id[i].strip('\u2581\u0120') for i in ids] == [
      piece.strip() for piece in found.pieces(ids)]
