"""Validation and test sets of one's own: measured, never trained on, and scored after the fact."""

import json
import os
import random

import numpy as np
import pytest

import btx_jax
from btx_jax import base
from btx_jax.commands import evaluate
from btx_jax.data import duplicates, mixture, splits, text, tokenizer, tokens
from btx_jax.data.domains import Domain
from btx_jax.data.tokens import Tokens
from btx_jax.errors import UsageError
from btx_jax.model.config import Config
from btx_jax.pipeline import Pipeline
from btx_jax.scoring import units
from btx_jax.study import manifest
from tests import studies
from tests.helpers import random_params

T = 15  # data.seq_len of tests/studies.py
MODELS = ('a', 'b', 'c')
CONFIG = '''
import pathlib
from btx_jax import base
from tests import studies

here = pathlib.Path({here!r})

def get_config():
  config = studies.get_config(here)
  config.mesh.update(fsdp=1, expert=1, tensor=1)
  config.tokenizer.path = str(here / 'a')
  config.domains.wiki = base.domain(held_out=str(here / 'wiki*.txt'), separator=' = = \\n')
  config.runs = {{name: base.run(base.hugging_face(str(here / name))) for name in 'abc'}}
  return config
'''


def documents_of(folder, domain):
  with open(folder / f'{domain}.jsonl', encoding='utf-8') as file:
    return [json.loads(line)['text'] for line in file]


def write(path, documents):
  path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in documents))
  return str(path)


@pytest.fixture(scope='module')
def own(text, tmp_path_factory):
  """A folder with text, three models, a test set like WikiText's, and a config that measures it."""
  here = tmp_path_factory.mktemp('own')
  studies.write_text(here)
  model = tokenizer.train_tokenizer(
      (document for domain in studies.WORDS for document in documents_of(here, domain)), 330)
  sizes = Config(vocab_size=330, dim=16, ffn_dim=24, num_layers=1, num_heads=2, num_kv_heads=2)
  for seed, name in enumerate(MODELS):
    btx_jax.save(str(here / name), sizes, random_params(sizes, seed), model, 'float32')
  rng = random.Random(3)
  (here / 'wiki.txt').write_text(' = = \n'.join(
      ' '.join(rng.choices(studies.WORDS['prose'], k=rng.randint(1, 12))) for _ in range(25)))
  (here / 'mine.py').write_text(CONFIG.format(here=str(here)))
  return here


def score_by_numpy(folder, part: Tokens, stride: int):
  """Nats of all tokens with a score, and their number: by NumPy, from logits of their contexts."""
  sizes, params = btx_jax.load(str(folder))
  pieces, wanted = [], []
  for first, end in zip(part.starts, part.starts[1:]):
    for target in range(first + 1, end - part.ends):
      window = 0
      while window + T < target:  # the first window that predicts it
        window += stride
      begin = max(window, first)
      piece = part.ids[begin:target].astype(int)
      pieces.append(np.pad(piece, (0, T - len(piece))))
      wanted.append((target - 1 - begin, part.ids[target]))
  places, ids = np.array(wanted).T
  logits = np.asarray(btx_jax.logits(sizes, params, np.stack(pieces)), np.float64)
  logits = logits[np.arange(len(ids)), places]
  return float((np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids)), ids]).sum()), len(ids)


def test_a_test_set_is_scored_by_runs_and_by_a_folder(run, own, tmp_path):
  """By all runs of a study that measures it, and after the fact, with and without a config."""
  config = f'--config={own / "mine.py"}', f'--workdir={tmp_path / "work"}'
  done = run(*config)
  assert done.code == 0, done.stderr
  assert 'wiki: 25 documents' in done.stdout and 'only measured' in done.stdout
  report = json.loads((tmp_path / 'work' / 'report' / 'report.json').read_text())
  part = tokens.load(str(tmp_path / 'work' / 'data' / 'wiki'), 'held_out')
  raw = (own / 'wiki.txt').read_text().split(' = = \n')
  size, words = (sum(map(len, each)) for each in (raw, map(str.split, raw)))
  for row, name in zip(report['rows'], MODELS, strict=True):
    nll, count = score_by_numpy(own / name, part, T)
    check_score(row['bits_per_byte']['wiki'], row['perplexity']['wiki'], nll, size, words, count)
    assert row['measured']['wiki'] == {
        'documents': 25, 'bytes': size, 'tokens': count, 'words': words, 'units': 25}
  before = snapshot(tmp_path / 'work')
  on = '--json', f'--on={own / "wiki.txt"}', '--separator= = = \n'
  by_run = run(*config, 'evaluate', '--run=c', *on, '--stride=4')
  assert by_run.code == 0, by_run.stderr
  found = json.loads(by_run.stdout)
  assert (found['model'], found['length'], found['stride']) == ('c', T, 4)
  score = found['texts'][str(own / 'wiki.txt')]
  nll, count = score_by_numpy(own / 'c', part, 4)
  check_score(score['bits_per_byte'], score['perplexity'], nll, size, words, count)
  by_folder = run('evaluate', f'--model={own / "c"}', *on, f'--length={T}', f'--on={own}/prose*')
  assert by_folder.code == 0, by_folder.stderr
  score = json.loads(by_folder.stdout)['texts'][str(own / 'wiki.txt')]
  row = report['rows'][-1]
  assert score['bits_per_byte'] == pytest.approx(row['bits_per_byte']['wiki'], rel=1e-6)
  assert score['error'] == pytest.approx(row['error']['bits_per_byte']['wiki'], rel=1e-5)
  assert score['trained_on'] is None
  assert snapshot(tmp_path / 'work') == before


def check_score(bits_per_byte, perplexity, nll, size, words, count):
  assert bits_per_byte == pytest.approx(nll / np.log(2) / size, rel=1e-6)
  assert perplexity == {'token': pytest.approx(np.exp(nll / count), rel=1e-5),
                        'word': pytest.approx(np.exp(nll / words), rel=1e-4)}


def snapshot(folder):
  return {os.path.join(root, name): os.stat(os.path.join(root, name)).st_mtime_ns
          for root, _, names in os.walk(folder) for name in names}


@pytest.mark.parametrize('stride', [1, 4, 7, 8, 0])
@pytest.mark.parametrize('size', [2, 8, 9, 10, 40])
def test_each_token_counts_once_with_the_context_that_the_stride_leaves(stride, size):
  """As the usual loop over a text does: a window takes what the one before has not predicted."""
  length = 8
  part = Tokens(np.arange(100, 100 + size), np.array([0, size]), np.array([0, 9]), 'x', 0, 0)
  rows = [row for batch in mixture.evaluation_batches(part, length, 3, stride)
          for row in zip(*(batch[key] for key in ('tokens', 'targets', 'loss_mask')))]
  predicted, done = [], 1
  for begin in range(0, size, stride or length):
    end = min(begin + length + 1, size)
    if end > done:
      inputs, targets, mask = rows[begin // (stride or length)]
      assert inputs[:end - begin - 1].tolist() == part.ids[begin:end - 1].tolist()
      assert targets[mask].tolist() == part.ids[done:end].tolist()
      predicted += targets[mask].tolist()
      done = end
  assert predicted == part.ids[1:].tolist()
  assert sum(mask.sum() for _, _, mask in rows) == size - 1
  targets = np.stack([targets for _, targets, _ in rows])
  assert mixture.without_overlap(targets, size - 1, stride).tolist() == predicted
  starts = mixture.window_starts(np.arange(size - 1), length, stride)
  assert starts.tolist() == [next(
      inputs[0] - 100 for inputs, targets, mask in rows if target in targets[mask])
                             for target in predicted]


def make_config(own):
  config = studies.get_config(own)
  config.tokenizer.path = str(own / 'a')
  return config


def identities(config, folder):
  pipeline = Pipeline(config, str(folder))
  return {name: manifest.identity(pipeline.spec(run)) for name, run in pipeline.runs.items()}


def training_text(found: text.Text, domain: str):
  part = found.train[domain]
  return [found.tokenizer.decode(part.ids[a + part.begins:b - part.ends].tolist())
          for a, b in zip(part.starts, part.starts[1:])]


def test_measured_text_is_in_no_identity_unless_it_removed_something(own, tmp_path, capsys):
  before = identities(make_config(own), tmp_path / 'work')
  config = make_config(own)
  config.domains.wiki = base.domain(held_out=str(own / 'wiki.txt'), separator=' = = \n')
  assert identities(config, tmp_path / 'work') == before  # in the same directory
  assert identities(config, tmp_path / 'fresh') == before
  trained = [each for each in documents_of(own, 'prose') if splits.share(each) >= 0.1]
  path = write(tmp_path / 'test.jsonl', [*trained[:3], 'other text', *trained[3:5]])
  config.domains.other = base.domain(held_out=path)
  with pytest.raises(UsageError, match=r'domains\.prose: its training text, which is tokenized '
                                       r'already, has documents that are held out: 5 of 6 of o'):
    identities(config, tmp_path / 'work')
  assert identities(config, tmp_path / 'new') != before
  assert ('5 document(s) are left out of its training text, because they are held out: 5 for other'
          in capsys.readouterr().out)
  del config.domains['other']
  with pytest.raises(UsageError, match=r'lacks 5 document\(s\) that were held out when'):
    identities(config, tmp_path / 'new')


@pytest.mark.parametrize('measured', ['wiki', 'prose'])
def test_documents_that_are_held_out_are_in_the_training_text_of_no_domain(own, tmp_path, measured):
  """Whether the files are of a domain that is only measured, or of one that trains on others."""
  config = make_config(own)
  prose, code = (documents_of(own, domain) for domain in ('prose', 'code'))
  test = [prose[0], prose[1], 'other text', ' '.join(studies.WORDS['prose'] * 3)]
  config.domains.code.paths = (write(tmp_path / 'code.jsonl', [*code, prose[1], prose[1]]),)
  paths = config.domains.prose.paths if measured == 'prose' else ()
  config.domains[measured] = base.domain(paths, held_out=write(tmp_path / 'test.jsonl', test))
  config.domains.math = base.domain(config.domains.math.paths, held_out=0.5)
  found = text.prepare(config, str(tmp_path / 'data'))
  assert found.held_out[measured].num_documents == 4
  assert set(found.train) == {'code', 'math', 'prose'}
  for domain, others in (('prose', prose), ('code', [*code, prose[1], prose[1]])):
    trained = training_text(found, domain)
    share = 0.0 if domain == measured else 0.1
    assert trained == [each for each in others if each not in test and splits.share(each) >= share]
  assert found.train['math'].num_documents == sum(
      splits.share(each) >= 0.5 for each in documents_of(own, 'math'))
  meta = tokens.read_meta(str(tmp_path / 'data' / 'code'))
  assert meta['kept_out']['documents'] == {measured: 2 * (splits.share(prose[1]) >= 0.1)} or (
      splits.share(prose[1]) < 0.1)


def test_a_file_that_changes_while_it_is_read_is_noticed(own, tmp_path, monkeypatch):
  domain, model = Domain('x', paths=(f'{tmp_path}/*.jsonl',)), tokenizer.load(str(own / 'a'))
  write(tmp_path / 'one.jsonl', ['one', 'two'])
  encode = model.encode

  def slowly(texts):
    write(tmp_path / 'two.jsonl', ['three'])
    return encode(texts)

  monkeypatch.setattr(model, 'encode', slowly)
  tokens.prepare(str(tmp_path / 'x'), domain, model, 0.1)
  assert tokens.differences(str(tmp_path / 'x'), domain, model, 0.1) == [
      f'{tmp_path}/two.jsonl is new, with {os.path.getsize(tmp_path / "two.jsonl")} bytes']


def test_a_larger_share_holds_copies_out_of_the_other_domains(own, tmp_path):
  config = make_config(own)
  config.domains.copy = base.domain(config.domains.prose.paths, held_out=0.6)
  found = text.prepare(config, str(tmp_path / 'data'))
  shares = [splits.share(each) for each in documents_of(own, 'prose')]
  for domain, part in found.train.items():
    assert domain == 'math' or domain == 'code' or part.num_documents == sum(
        share >= 0.6 for share in shares)


def test_what_was_trained_on_is_counted(own):
  """Whole documents, and runs of tokens in others."""
  found = text.prepare(make_config(own), str(own / 'data'))
  train = found.train['prose']
  longest = np.argmax(np.diff(train.starts))
  ids = np.concatenate([train.ids[:train.starts[4]], train.ids[train.starts[longest] + 2:
                                                               train.starts[longest + 1]]])
  starts = np.array([*train.starts[:5], len(ids)])
  part = Tokens(ids, starts, starts, 'x')
  seen = evaluate.seen_in_training({'x': part, 'y': found.held_out['math']}, found.train)
  assert (seen['x']['documents'], seen['x']['by_domain']) == (4, {'prose': 4})
  assert seen['x']['share'] == duplicates.overlaps({'x': part}, found.train)['x'].share > 0
  assert seen['y'] == {'documents': 0, 'by_domain': {}, 'share': seen['y']['share']}


def test_words_are_those_of_the_text_that_has_a_score(own):
  found = tokenizer.load(str(own / 'a'))
  texts = ['one two\nthree', '  four', 'five']
  ids = found.encode(texts)
  starts = np.cumsum([0, *map(len, ids)])
  after_first = [text[len(found.spell(each[:1])):] for text, each in zip(texts, ids)]
  sizes = np.cumsum([0, *map(len, after_first)])
  part = Tokens(np.concatenate(ids), starts, sizes, 'x', begins=0, ends=0)
  assert units.words(part, found) == sum(len(text.split()) for text in after_first)
