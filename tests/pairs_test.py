"""Domains of pairs: how records are read or rejected, and how rows hold whole pairs."""

import itertools
import json

import numpy as np
import pytest

from btx_jax import base
from btx_jax.data import mixture, pairs, tokenizer, tokens
from btx_jax.data.chats import Unfit
from btx_jax.data.domains import from_config
from btx_jax.data.framing import Options
from btx_jax.data.pair_rows import PairRows, in_words
from tests import make_tokenizers

USER = {'role': 'user', 'content': 'Is it red?'}
GOOD, BAD = ({'role': 'assistant', 'content': text} for text in ('Yes, red.', 'No.'))
MORE = {'role': 'user', 'content': 'Sure?'}
LENGTH = 125  # of a row: one or two pairs, and some pairs are longer
READ = {**GOOD, 'weight': 0}  # an answer in the prompt, which is not learned


@pytest.mark.parametrize('record, expected', [
    ({'prompt': 'Is it red?', 'chosen': 'Yes, red.', 'rejected': 'No.'},
     ([USER, GOOD], [USER, BAD])),
    ({'prompt': [USER], 'chosen': [GOOD], 'rejected': [BAD]}, ([USER, GOOD], [USER, BAD])),
    ({'chosen': [USER, GOOD], 'rejected': [USER, BAD]}, ([USER, GOOD], [USER, BAD])),
    # A prompt that is a string beside lists of messages, as in UltraFeedback.
    ({'prompt': 'Is it red?', 'chosen': [USER, GOOD], 'rejected': [USER, BAD]},
     ([USER, GOOD], [USER, BAD])),
    ({'prompt': [USER], 'chosen': [USER, GOOD], 'rejected': [USER, BAD]},
     ([USER, GOOD], [USER, BAD])),
    ({'chosen': [USER, GOOD, MORE, GOOD, MORE], 'rejected': [USER, GOOD, MORE, BAD]},
     ([USER, READ, MORE, GOOD], [USER, READ, MORE, BAD]))])
def test_records_in_the_forms_that_people_have(record, expected):
  assert pairs.messages(record) == expected


@pytest.mark.parametrize('record, reason', [
    ({'prompt': 'a', 'chosen': 'b', 'rejected': 'b'}, pairs.EQUAL),
    ({'chosen': [USER, GOOD], 'rejected': [USER, GOOD]}, pairs.EQUAL),
    ({'prompt': [USER], 'chosen': [GOOD, MORE], 'rejected': [GOOD]}, pairs.EQUAL),
    ({'chosen': [USER, GOOD], 'rejected': [USER]}, 'has no answer of the assistant'),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': ' '}, 'has an empty answer'),
    ({'prompt': 'a', 'chosen': 'b'}, pairs.NO_PAIR), ({'chosen': 'b', 'rejected': 'c'},
                                                      pairs.NO_PAIR),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': [BAD]}, pairs.NO_PAIR),
    # Answers to different questions.
    ({'chosen': [USER, GOOD], 'rejected': [MORE, BAD]}, pairs.NO_PAIR),
    ({'prompt': [USER], 'chosen': [GOOD], 'rejected': [MORE, BAD]}, pairs.NO_PAIR)])
def test_records_that_are_not_pairs(record, reason):
  with pytest.raises(Unfit) as unfit:
    pairs.messages(record)
  assert unfit.value.reason == reason


@pytest.fixture(scope='module')
def split(tmp_path_factory):
  """The training split of forty pairs, its tokenizer, and meta.json; three records are unusable."""
  folder = tmp_path_factory.mktemp('pairs')
  records = [{'prompt': f'{i} + {i}?', 'chosen': f'{2 * i} ' * (5 * (i % 6) + 1),
              'rejected': f'{i}' * 3} for i in range(40)]
  records[3:3] = [{'prompt': 'a', 'chosen': 'b', 'rejected': 'b'}] * 3
  (folder / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, records)))
  path = make_tokenizers.write(folder, make_tokenizers.byte_level())
  encoder = tokenizer.load(str(path), Options(eos='<|endoftext|>', chat_template='chatml'))
  domain, = from_config({'prefs': base.domain(str(folder / 'pairs.jsonl'), format='pairs')})
  meta = tokens.prepare(str(folder / 'tokens'), domain, encoder, 0.1)
  return tokens.load(str(folder / 'tokens'), 'train'), encoder, meta


def test_rows_hold_whole_pairs_and_targets_are_the_answers(split):
  train, encoder, meta = split
  assert meta['skipped']['reasons'] == {pairs.EQUAL: 3}
  assert train.num_documents + meta['held_out']['documents'] == 40
  sizes, length = np.diff(train.starts) - 2, LENGTH
  reference = np.arange(2 * train.num_documents, dtype=np.float32).reshape(-1, 2)
  rows = PairRows(train, length, 5, reference)
  fits = sizes <= length
  assert len(sizes) > len(rows) and not fits.all()
  assert f'{(~fits).sum()} of {len(sizes)} pairs' in in_words(train, length)[0]
  assert sum(row['segment_ids'].max() for row in rows) == 2 * fits.sum()

  found = {}
  for row in rows:
    assert row['domain'] == 5
    for segment in range(1, row['segment_ids'].max() + 1):
      here = row['segment_ids'] == segment
      np.testing.assert_array_equal(row['positions'][here], np.arange(here.sum()))
      answer = row['targets'][here & row['loss_mask']].tolist()
      found[int(row['reference'][segment])] = encoder.spell_chat(answer).decode()
  conversations = itertools.chain.from_iterable(
      (train.ids[a:cut], train.ids[cut:b]) for a, cut, b in zip(
          train.starts, train.cuts, train.starts[1:]))
  whole = [encoder.spell_chat(ids.tolist()).decode() for ids in conversations]
  assert {at: text.split('assistant\n')[1].removesuffix('\n') for at, text in enumerate(whole)
          if fits[at // 2]} == found


def test_values_by_segment_are_those_of_the_pairs(split):
  train, *_ = split
  reference = np.arange(2 * train.num_documents, dtype=np.float32).reshape(-1, 2)
  rows = PairRows(train, LENGTH, 0, reference)
  again = rows.by_pair(np.stack([*(row['reference'] for row in rows), np.full(LENGTH, 7.0)]))
  fits = np.diff(train.starts) - 2 <= LENGTH
  np.testing.assert_array_equal(again, np.where(fits[:, None], reference, np.nan))


def test_scores_are_those_of_the_chosen_answers(split):
  train, encoder, _ = split
  batches = list(mixture.evaluation_batches(train, 64, 4))
  masks = mixture.by_token(train, np.concatenate([b['loss_mask'] for b in batches]), 64)
  np.testing.assert_array_equal(np.append(False, masks), train.has_score)
  ids = train.ids[train.has_score].tolist()
  assert len(encoder.spell_chat(ids)) == train.bytes[-1]
