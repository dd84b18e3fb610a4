"""From text to rows: nothing is lost, nothing leaks, and every process agrees on the order."""

import gzip
import hashlib
import io
import itertools
import json
import os
import re

import numpy as np
import pytest
import sentencepiece

from btx_jax import run as run_lib
from btx_jax.data import corpora, demo, domains, mixture, splits, tokenizer, tokens
from btx_jax.errors import UsageError

TRICKY = [
    'def f(x):\n\tif x:\n\t\treturn  {"a":  1}\n\n\n    # four\r\n',
    '', ' ', '\n', '  lead', 'end  ', 'emoji \U0001F469\u200d\U0001F4BB \U0001F389', '日本語',
    '\u2581 the space mark \u2581\u2581', '\ue000\u2581 private', '<s></s><unk><0x0A>', '\ufeffbom',
    '\x00\x01\x7f', 'e\u0301 \u00e9 \ufb01 \u3000 \u00a0']


@pytest.fixture(scope='module')
def model():
  texts = [f'the {a} {b} of {c}\n' for a in ['red', 'green', 'blue']
           for b in ['house', 'tree', 'sea'] for c in range(40)]
  return tokenizer.train_tokenizer([*texts, *TRICKY], 320)


def write(folder, name, text):
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  raw = text.encode()
  path.write_bytes(gzip.compress(raw) if name.endswith('.gz') else raw)
  return str(path)


def files(*paths, **fields):
  return corpora.Domain('some', paths=tuple(map(str, paths)), **fields)


def texts_of(domain, *args):
  return [document.text for document in corpora.documents(domain, *args)]


# Tokenizer


def test_any_text_comes_back(model):
  for text, ids in zip(TRICKY, model.encode(TRICKY)):
    assert model.decode(ids) == text
  assert model.encode([TRICKY[0]]) == model.encode(TRICKY)[:1]  # batches change nothing


def test_random_text_comes_back(model):
  rng = np.random.default_rng(0)
  alphabet = [*' \n\tab1\u2581é', *map(chr, (0, 0x1F600, 0xE000, 0x10FFFF, 0x3042))]
  for _ in range(200):
    text = ''.join(rng.choice(alphabet, size=rng.integers(1, 30)))
    assert model.decode(model.encode([text])[0]) == text


def test_training_is_repeatable(model):
  texts = ['some text of few words'] * 50
  first, again = (tokenizer.train_tokenizer(texts, 290) for _ in range(2))
  assert first.hash == again.hash != model.hash


def test_too_large_a_vocabulary_is_refused():
  with pytest.raises(UsageError, match='vocab_size = 5000'):
    tokenizer.train_tokenizer(['few words'], 5000)


def test_a_file_that_is_no_model_is_refused(tmp_path):
  with pytest.raises(UsageError, match='not a sentencepiece model'):
    tokenizer.load(write(tmp_path, 'x.model', 'nonsense'))
  with pytest.raises(UsageError, match='cannot be read'):
    tokenizer.load(str(tmp_path / 'missing.model'))


# Corpora


def test_directories_globs_jsonl_and_gz(tmp_path):
  write(tmp_path, 'a/one.txt', 'first')
  write(tmp_path, 'a/deep/two.txt.gz', 'second')
  write(tmp_path, 'a/three.jsonl', '{"text": "third"}\n\n{"text": "fourth"}\n')
  write(tmp_path, 'b/four.jsonl.gz', json.dumps({'body': 'fifth'}))
  read = lambda domain: sorted(texts_of(domain))
  assert read(files(tmp_path / 'a')) == ['first', 'fourth', 'second', 'third']
  assert read(files(tmp_path / 'a' / '*.txt')) == ['first']
  assert read(files(tmp_path / '**' / '*.txt*')) == ['first', 'second']
  assert read(files(tmp_path / 'b', text_field='body')) == ['fifth']


def test_a_separator_cuts_documents(tmp_path):
  path = write(tmp_path, 'x.txt', 'one\n\n\ntwo\n\n\n\n\n\nthree')
  assert texts_of(files(path, separator='\n\n\n')) == ['one', 'two', 'three']


def test_unreadable_files_are_named(tmp_path, monkeypatch):
  with pytest.raises(UsageError, match='matches no file'):
    texts_of(files(tmp_path / 'none*'))
  write(tmp_path, 'closed.txt', 'text')

  def refuse(path, *_):
    raise PermissionError(13, 'Permission denied', path)

  monkeypatch.setattr('builtins.open', refuse)  # root may read anything
  with pytest.raises(UsageError, match=r'domains\.some: .*closed\.txt cannot be read: .*denied'):
    texts_of(files(tmp_path / 'closed.txt'))


def test_a_source_nobody_knows_is_refused():
  fields = {'source': 'wikipedia', 'paths': (), 'text_field': 'text', 'separator': '',
            'held_out': ()}
  with pytest.raises(UsageError, match="'wikipedia' is not a source; valid: 'arithmetic'"):
    domains.from_config({'some': fields})


# Arithmetic


@pytest.fixture(scope='module')
def documents():
  return list(demo.arithmetic())


def problems_of(documents):
  """(level, question, answer) of every problem."""
  for document in documents:
    level, *lines = document.splitlines()
    for line in lines:
      yield level, *re.match(r'(.*?[?.]) (.+)', line).groups()


def gcd(a, b):
  return gcd(b, a % b) if b else a


def is_right(question, answer):
  """Whether an answer is right, worked out from the numbers in the question alone."""
  for worked, result in re.findall(r'(\d+ [*+] \d+) = (\d+)', answer):
    if eval(worked) != int(result):
      return False
  given, found = ([int(n) for n in re.findall(r'(?<!\d)-?\d+', text)]
                  for text in (question, answer))
  last = found[-1] if found else None
  match question.split()[:3]:
    case ['What', 'is', 'the']:
      return found == [gcd(*given)]
    case ['What', 'is', share] if share.endswith('%'):
      return last * 100 == given[0] * given[1]
    case ['What', 'is', _]:
      operation = {'plus': '+', 'minus': '-', 'times': '*'}[question.split()[3]]
      return last == eval(f'{given[0]} {operation} {given[1]}')
    case ['Calculate', *_]:
      return last == eval(question.removeprefix('Calculate ').removesuffix('.'))
    case ['Divide', *_] | [_, 'shares', _]:
      quotient, rest = found
      return given[0] == quotient * given[1] + rest and 0 <= rest < given[1]
    case ['Solve', *_]:
      left, right = question.removeprefix('Solve ').removesuffix('.').split(' = ')
      return answer.startswith(f'{given[0]}x = {given[0] * last}, so x = ') and (
          eval(left.replace('x', f' * {last}')) == int(right))
    case ['Which', 'is', 'greater,']:
      if given[0] == given[1]:
        return answer == 'They are equal'
      return found == [max(given)]
    case ['Sort', *_]:
      return found == np.sort(given).tolist()
    case ['What', 'comes', _]:
      step = found[1] if 'adding' in answer else -found[1]
      return set(np.diff([*given, found[0]])) == {step}
    case ['How', 'many', small] if ', so ' in answer:
      large = question.split()[5]
      assert answer.endswith(f' {small}')
      return last == given[0] * SIZES[large, small] + given[1]
    case ['How', 'many', large]:
      small = question.split()[4]
      assert answer == f'{found[0]} {large} and {found[1]} {small}'
      return given[0] == found[0] * SIZES[large, small] + found[1] and (
          0 <= found[1] < SIZES[large, small])
    case [_, 'has', _]:
      return last == given[0] + given[1] * given[2]
  return False


SIZES = {('minutes', 'seconds'): 60, ('hours', 'minutes'): 60, ('days', 'hours'): 24,
         ('weeks', 'days'): 7, ('years', 'months'): 12, ('metres', 'centimetres'): 100,
         ('kilometres', 'metres'): 1000, ('kilograms', 'grams'): 1000}


def test_every_answer_is_right(documents):
  harder = list(demo.SOURCES['arithmetic_harder']())
  wrong = [problem for problem in problems_of([*documents[::10], *harder[::10]])
           if not is_right(*problem[1:])]
  assert not wrong


@pytest.mark.parametrize('question, answer', [
    ('What is 3 plus 4?', '8'), ('Divide 17 by 5.', '2, remainder 7'),
    ('Calculate (3 + 4) * 2.', '3 + 4 = 8, so it is 14'),
    ('Solve 3x - 7 = 5.', '3x = 15, so x = 4'), ('Which is greater, 7 or 7?', '8'),
    ('Sort 4, 5, 4 from smallest to largest.', '4, 5, 5'),
    ('What comes next: 9, 7, 5, 3?', '1, adding 2'), ('Is it so?', '7')])
def test_a_wrong_answer_is_seen(question, answer):
  assert not is_right(question, answer)


def test_arithmetic_is_the_same_everywhere_and_always(documents):
  digest = hashlib.sha256(''.join(documents[:3000]).encode()).hexdigest()
  assert digest.startswith('5b7cfa7279ce15bd')
  assert documents[:100] == list(demo.arithmetic(documents=100))


def test_no_question_is_asked_twice(documents):
  harder = demo.SOURCES['arithmetic_harder']()
  questions = [question for _, question, _ in problems_of([*documents, *harder])]
  assert len(set(questions)) == len(questions)


def test_the_first_line_of_a_document_tells_how_large_its_numbers_are(documents):
  sizes = {f'Level: {level}': set() for level in ('easy', 'medium', 'hard', 'harder')}
  for level, question, _ in problems_of([*documents, *demo.SOURCES['arithmetic_harder']()]):
    if question.startswith('Divide'):
      sizes[level].add(int(question.split()[1]))
  for smaller, larger in itertools.pairwise(sizes.values()):
    assert max(smaller) < min(larger)
  held_out = [text.splitlines()[0] for text in documents if splits.share(text) < 0.02]
  assert min(map(held_out.count, [*sizes][:3])) > 80


def test_there_are_four_million_tokens_of_arithmetic(documents):
  # Digits are tokens, so spaces and signs beside them are; a word is at least one.
  least = re.findall(r'\d| (?=\d)|(?<=\d)[^\w\s]| [-+*=]|[^\W\d]+', ''.join(documents[::5]))
  assert 5 * len(least) > 4_000_000


# Tokens


def prepared(tmp_path, model, texts, held_out=0.2, name='tokens'):
  path = write(tmp_path, f'{name}.jsonl', '\n'.join(json.dumps({'text': t}) for t in texts))
  folder = str(tmp_path / name)
  meta = tokens.prepare(folder, files(path), model, held_out)
  return {split: tokens.load(folder, split) for split in tokens.SPLITS}, meta


def documents_of(part, model):
  return [model.decode(part.ids[a + 1:b - 1]) for a, b in zip(part.starts, part.starts[1:])]


def test_every_document_is_on_one_side_and_copies_on_the_same(tmp_path, model):
  texts = [f'the house of {i}\n' for i in range(60)] + [f'the house of {i}\n' for i in range(30)]
  parts, meta = prepared(tmp_path, model, texts)
  train, held_out = (documents_of(parts[split], model) for split in tokens.SPLITS)
  assert sorted(train + held_out) == sorted(texts)
  assert not set(train) & set(held_out)
  assert 0.05 < len(held_out) / len(texts) < 0.4
  for split, documents in zip(tokens.SPLITS, (train, held_out)):
    assert meta[split]['bytes'] == sum(len(t.encode()) for t in documents)
    assert meta[split]['tokens'] == len(parts[split].ids)
    assert (parts[split].ids[parts[split].starts[:-1]] == model.bos_id).all()
    assert (parts[split].ids[parts[split].starts[1:] - 1] == model.eos_id).all()


def test_the_side_of_a_document_does_not_depend_on_the_others(tmp_path, model):
  few, _ = prepared(tmp_path, model, [f'tree {i}' for i in range(40)])
  many, _ = prepared(tmp_path, model, [f'tree {i}' for i in range(80)], name='more')
  assert set(documents_of(few['held_out'], model)) <= set(documents_of(many['held_out'], model))


def test_something_is_always_held_out(tmp_path, model):
  parts, _ = prepared(tmp_path, model, ['the red house', 'the green tree'], held_out=1e-9)
  assert parts['train'].num_documents == parts['held_out'].num_documents == 1


@pytest.mark.parametrize('texts, message', [
    ([], 'is empty'), ([' ', '\n'], 'is empty'), (['only one'], 'at least two')])
def test_too_few_documents_are_refused(tmp_path, model, texts, message):
  with pytest.raises(UsageError, match=message):
    prepared(tmp_path, model, texts)
  assert [name for name in os.listdir(tmp_path) if name.startswith('tokens')] == ['tokens.jsonl']


def test_tokens_of_another_config_are_refused_and_left_alone(tmp_path, model):
  texts = [f'sea {i}' for i in range(9)]
  _, before = prepared(tmp_path, model, texts)
  with pytest.raises(UsageError, match=r'data.held_out was 0.2 and is 0.3 now'):
    prepared(tmp_path, model, texts, held_out=0.3)
  assert prepared(tmp_path, model, texts)[1] == before


def test_a_tokenizer_that_loses_text_is_refused(tmp_path):
  proto = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(  # sentencepiece's defaults
      sentence_iterator=iter(['some words here'] * 20), model_writer=proto, vocab_size=30,
      hard_vocab_limit=False, minloglevel=2)
  lossy = tokenizer.Sentencepiece({tokenizer.FILE: proto.getvalue()}, 'lossy')
  with pytest.raises(UsageError, match=r'loses text of domains\.some'):
    prepared(tmp_path, lossy, ['some  words\n', 'here'])


# Mixture


def flat(num_documents, size, offset=100):
  """Documents of `size` tokens, numbered from `offset`; 1 begins and 2 ends each."""
  documents = [np.array([1, *range(offset + 10 * i, offset + 10 * i + size - 2), 2])
               for i in range(num_documents)]
  starts = np.arange(num_documents + 1) * size
  return tokens.Tokens(np.concatenate(documents), starts, starts, 'hash')


def test_windows_cover_every_token_once_and_keep_documents_apart():
  part = flat(7, 5)
  windows = mixture.Windows(part, 8, domain=3, evaluation=True)
  rows = [windows[i] for i in range(len(windows))]
  together = {name: np.concatenate([np.atleast_1d(row[name]) for row in rows]) for name in rows[0]}
  n = len(part.ids) - 1
  np.testing.assert_array_equal(together['tokens'][:n], part.ids[:-1])
  np.testing.assert_array_equal(together['targets'][:n], part.ids[1:])
  # The target of an end mark is another document's begin mark: never counted. The end mark itself
  # is learned, but is no text to be scored.
  np.testing.assert_array_equal(together['loss_mask'][:n],
                                (part.ids[:-1] != 2) & (part.ids[1:] != 2))
  trained = mixture.Windows(part, 8, domain=3)
  for i in range(len(trained)):
    np.testing.assert_array_equal(trained[i]['loss_mask'], trained[i]['tokens'] != 2)
  assert not together['loss_mask'][n:].any()
  assert not together['segment_ids'][n:].any()
  for row in rows:
    inside = row['segment_ids'] > 0
    begins = row['tokens'] == 1
    np.testing.assert_array_equal(np.diff(row['segment_ids'][inside]), begins[inside][1:])
    assert (row['positions'][begins] == 0).all()
    same = np.diff(row['segment_ids'][inside]) == 0
    assert (np.diff(row['positions'][inside])[same] == 1).all()


WEIGHTS = {'a': 0.25, 'b': 0.75}


def order(seed=0, weights=WEIGHTS):
  return mixture.training_order({'a': flat(40, 9), 'b': flat(60, 9, 5000), 'c': flat(9, 9)},
                                weights, length=8, seed=seed)


@pytest.mark.parametrize('processes', [1, 2, 4])
def test_the_global_batches_are_the_same_on_any_number_of_processes(processes):
  whole = mixture.global_batches(order(), 8, 2)
  each = [mixture.global_batches(order(), 8, 2, rows=range(p, 4, processes))
          for p in range(processes)]
  for step in (0, 1, 7, 50):
    expected = whole[step]
    for p in range(processes):
      for name, values in each[p][step].items():
        np.testing.assert_array_equal(values, expected[name][:, p::processes])


@pytest.mark.parametrize('microbatches', [1, 2, 4])
def test_a_global_batch_is_the_next_rows_of_the_order(microbatches):
  rows = order()
  batch = mixture.global_batches(rows, 8, microbatches)[3]['tokens']
  assert batch.shape == (microbatches, 8 // microbatches, 8)
  np.testing.assert_array_equal(
      batch.reshape(8, 8), [rows[i]['tokens'] for i in range(24, 32)])


@pytest.mark.parametrize('microbatches', [1, 2])
def test_every_domain_has_its_share_in_each_batch(microbatches):
  batches = mixture.global_batches(order(), 8, microbatches)
  for step in range(30):
    assert np.bincount(batches[step]['domain'].ravel(), minlength=3).tolist() == [2, 6, 0]


def test_a_pass_over_a_domain_sees_each_row_once_and_the_next_is_shuffled_anew():
  only = order(weights={'a': 1.0})
  rows = len(mixture.Windows(flat(40, 9), 8, 0))
  passes = [[only[i]['tokens'][1] for i in range(p * rows, (p + 1) * rows)] for p in range(2)]
  assert sorted(passes[0]) == sorted(passes[1])
  assert passes[0] != passes[1]


def test_a_further_domain_changes_nothing_for_the_others():
  both = mixture.training_order({'aa': flat(9, 9), 'b': flat(60, 9, 5000)}, {'b': 1.0}, 8, 0)
  alone = mixture.training_order({'b': flat(60, 9, 5000)}, {'b': 1.0}, 8, 0)
  for i in range(80):
    np.testing.assert_array_equal(both[i]['tokens'], alone[i]['tokens'])


def test_runs_of_other_names_have_other_orders():
  seeds = [run_lib.seed_of(name, 0) for name in ('seed', 'expert/code', 'btx')]
  firsts = {tuple(order(seed)[i]['tokens'][1] for i in range(20)) for seed in seeds}
  assert len(firsts) == 3


def test_a_domain_shorter_than_a_row_is_refused():
  with pytest.raises(UsageError, match=r'domains.a has 18 training tokens'):
    mixture.training_order({'a': flat(2, 9)}, {'a': 1.0}, length=30, seed=0)


def test_evaluation_reads_whole_documents_once():
  whole = flat(10, 9)
  part = whole.sample(30)
  assert part.num_documents == 3
  documents = lambda tokens: {
      tuple(tokens.ids[a:b]) for a, b in zip(tokens.starts, tokens.starts[1:])}
  assert documents(part) < documents(whole)
  batches = list(mixture.evaluation_batches(part, 8, 4))
  assert sum(batch['loss_mask'].sum() for batch in batches) == 3 * 7
  assert all(batch['tokens'].shape == (4, 8) for batch in batches)
  assert whole.sample(2).num_documents == 1
  assert documents(whole.sample(1000)) == documents(whole)
