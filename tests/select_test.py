"""Ensembles: what their selector reads and chooses, against NumPy, and a study that has one."""

import contextlib
import dataclasses
import itertools
import json
import math
import os

import jax
import numpy as np
import pytest
import sentencepiece as spm

from btx_jax import base, library, selector
from btx_jax.commands import export_ensemble, exported, generators, table
from btx_jax.convert.hugging_face import Folder
from btx_jax.convert.safetensors import File
from btx_jax.data.questions import Question
from btx_jax.data.tokens import Tokens
from btx_jax.errors import UsageError
from btx_jax.fitting import reading, samples, select, solve
from btx_jax.model import llama
from btx_jax.model.config import num_params
from btx_jax.pipeline import Pipeline
from btx_jax.scoring import answers, builtin, ensemble, scores, selected
from btx_jax.selector import Merge, choose
from btx_jax.study import params, routers
from btx_jax.study.study import Study
from tests import studies
from tests.helpers import TINY, normal, random_batch, random_params, use_mesh

DOMAINS = ('prose', 'code', 'math')


def means_by_loop(x_BTD, segments_BT, decay) -> np.ndarray:
  """What a selector reads, from its definition in float64; 0 for padding."""
  result = np.zeros(x_BTD.shape)
  for b, t in np.argwhere(segments_BT > 0):
    at = [i for i in range(t + 1) if segments_BT[b, i] == segments_BT[b, t]]
    weights = decay ** np.float64([t - i for i in at])
    result[b, t] = weights @ x_BTD[b, at].astype(np.float64) / weights.sum()
  return result


@pytest.mark.parametrize('decay', [1.0, 0.6])
def test_the_selector_is_fitted_to_means_of_the_document_so_far(decay):
  dense, batches = random_params(TINY), [random_batch(TINY, seed=i, padding=3) for i in range(2)]
  with use_mesh((2, 2, 1, 1)) as mesh:
    found = {str(i): reading.sums(TINY, dense, decay, [batch], mesh)
             for i, batch in enumerate(batches)}
  x_ND = []
  for batch, sums in zip(batches, found.values()):
    hidden, _ = llama.Llama(TINY).apply(
        {'params': dense}, batch['tokens'], batch['segment_ids'], batch['positions'])
    counted = batch['segment_ids'] > 0
    x_ND.append(means_by_loop(np.asarray(hidden), batch['segment_ids'], decay)[counted])
    outer = x_ND[-1].T @ x_ND[-1]
    assert sums.tokens == counted.sum()
    assert np.abs(sums.outer[0] - outer).max() < 1e-5 * np.abs(outer).max()
    assert np.abs(sums.total[0] - x_ND[-1].sum(0)).max() < 1e-5 * np.abs(outer).max()
  columns = solve.columns('ridge', found, ('0', '1'), ridge=0.1)[0]
  x_ND, y_NE = np.concatenate(x_ND), np.repeat(np.eye(2), [len(x) for x in x_ND], 0)
  penalty = 0.1 * (x_ND**2).sum() / TINY.dim * np.eye(TINY.dim)
  expected = np.linalg.solve(x_ND.T @ x_ND + penalty, x_ND.T @ y_NE)
  expected /= (x_ND @ expected).std(0)
  assert np.abs(columns - expected).max() < 1e-3 * np.abs(expected).max()


def test_later_tokens_change_nothing_that_is_read_before():
  dense, batch = random_params(TINY), random_batch(TINY)
  changed = batch | {'tokens': batch['tokens'].copy()}
  changed['tokens'][:, 9:] = (batch['tokens'][:, 9:] + 7) % TINY.vocab_size
  first, second = (np.asarray(reading.means_so_far(
      reading.hidden_states(TINY, dense, each), each['segment_ids'], 0.8))
                   for each in (batch, changed))
  np.testing.assert_array_equal(first[:, :9], second[:, :9])
  assert np.abs(first[:, 9:] - second[:, 9:]).max() > 0.01


def test_layers_that_are_left_out_are_not_computed():
  dense, batch = random_params(TINY), random_batch(TINY)
  layers = dense['layers']
  silent = {**dense, 'layers': {
      **layers, 'attn': {**layers['attn'], 'o': layers['attn']['o'].at[1].set(0)},
      'ffn': {**layers['ffn'], 'down': layers['ffn']['down'].at[1].set(0)}}}
  one = dataclasses.replace(TINY, num_layers=1)
  np.testing.assert_allclose(reading.hidden_states(one, dense, batch),
                             reading.hidden_states(TINY, silent, batch), atol=1e-6)


@pytest.mark.parametrize('decay', [1.0, 0.7])
@pytest.mark.parametrize('hysteresis', [0.0, 0.4])
def test_choices_follow_from_their_definition_and_not_from_later_text(decay, hysteresis):
  logits = normal((60, 3))
  found = choose(logits, decay, hysteresis)
  expected = []
  for t in range(60):
    weights = decay ** np.arange(t, -1.0, -1.0)
    mean = weights @ logits[:t + 1] / weights.sum()
    stays = expected and mean.max() - mean[expected[-1]] <= hysteresis
    expected.append(expected[-1] if stays else int(mean.argmax()))
  assert found.tolist() == expected
  assert len(set(expected)) > 1
  later = np.concatenate([logits[:30], -logits[30:]])
  np.testing.assert_array_equal(choose(later, decay, hysteresis)[:30], found[:30])


@pytest.fixture(scope='module')
def config(text, tmp_path_factory):
  """A model for each kind of text, which knows how frequent its tokens are; and two ensembles."""
  folder = tmp_path_factory.mktemp('models')
  texts = {domain: [json.loads(line)['text']
                    for line in (text / f'{domain}.jsonl').read_text().splitlines()]
           for domain in DOMAINS}
  spm.SentencePieceTrainer.train(
      sentence_iterator=itertools.chain(*texts.values()), model_prefix=str(folder / 'tokenizer'),
      vocab_size=330, model_type='bpe', byte_fallback=True, normalization_rule_name='identity',
      add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=9)
  tokenizer = spm.SentencePieceProcessor(model_file=str(folder / 'tokenizer.model'))
  model = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size())
  weights = random_params(model)
  # Every hidden state has this in its first dimension, and a token's own numbers in the others.
  weights['embed'] = weights['embed'].at[:, 0].set(2.0)
  config = studies.get_config(text)
  for domain, of_domain in texts.items():
    ids = np.concatenate(tokenizer.encode(of_domain))
    counts = 1.0 + np.bincount(ids, minlength=model.vocab_size)
    head = 0.05 * normal((model.dim, model.vocab_size))
    head[0] = np.log(counts / counts.sum()) / 3
    library.save(str(folder / domain), model, {**weights, 'head': head}, str(folder), 'float32')
    config.runs[domain] = base.run(base.hugging_face(str(folder / domain)))
  config.tokenizer.path = str(folder / 'prose')
  config.mesh.update(fsdp=1, expert=1, tensor=1)
  config.evaluation.update(tokens=400)
  config.data.seq_len = 31
  labels = tuple((domain, domain) for domain in DOMAINS)
  config.runs = {
      **{domain: config.runs[domain] for domain in DOMAINS},
      'all': base.run(base.ensemble(*DOMAINS, forget=20, hysteresis=0.1, selector=base.from_text(
          'ridge', rows=20, labels=labels))),
      'two': base.run(base.ensemble('code', 'math', reader='prose', layers=1,
                                    selector=base.from_text('mean', labels=labels[1:]))),
      'posterior': base.run(base.ensemble(*DOMAINS, selector=base.posterior()))}
  return config


def test_an_ensemble_counts_all_models_and_uses_an_expert_and_what_it_reads(config, tmp_path):
  study = Study(config, str(tmp_path))
  dense = study.runs['prose'].model
  for name, layers in (('all', 2), ('two', 1)):
    model, = scores.models_of(study, study.runs[name])
    read = dataclasses.replace(dense, num_layers=layers)
    assert model.total_params == 3 * num_params(dense)
    assert model.active_params == (
        num_params(dense) + num_params(read) - dense.vocab_size * dense.dim)
  model, = scores.models_of(study, study.runs['posterior'])
  for kind, top, computed in (('posterior', 0, 3), ('posterior', 1, 3), ('tfidf', 0, 3),
                              ('tfidf', 1, 1), ('tfidf', 2, 2)):
    run = dataclasses.replace(model.run, selector=Merge(kind, top))
    of_kind = model._replace(run=run)
    assert of_kind.total_params == 3 * num_params(dense)
    assert of_kind.active_params == computed * num_params(dense)


@pytest.fixture(scope='module')
def study(config, tmp_path_factory):
  config = config.copy_and_resolve_references()
  del config.runs['two']
  pipeline = Pipeline(config, str(tmp_path_factory.mktemp('select')))
  pipeline.train()
  return pipeline


def test_an_ensemble_is_better_than_each_of_its_models(study):
  rows = {row['name']: row for row in table.rows(study)}
  assert rows['all']['mean'] < min(rows[name]['mean'] for name in DOMAINS) - 0.1
  figures = routers.figures(study, study.runs['all'])
  assert min(figures['accuracy'].values()) > 0.5
  assert figures['labels'] == [*DOMAINS]
  shares = rows['all']['share']
  assert [max(range(3), key=shares[domain].__getitem__) for domain in DOMAINS] == [0, 1, 2]
  assert rows['all']['forward_flops'] > rows['prose']['forward_flops'] * 1.3
  assert rows['posterior']['mean'] < min(rows[name]['mean'] for name in DOMAINS) - 0.1
  assert rows['posterior']['forward_flops'] == 3 * rows['prose']['forward_flops']


def test_models_answer_questions_and_ensembles_those_with_choices(study, monkeypatch):
  found = tuple(Question(domain, start, start, end, (' the', '1', 'x'))
                for domain, start, end in (
                    ('prose', 'the king', ' said'), ('math', '1 + ', '2 = 3')))
  monkeypatch.setattr(builtin, 'of_task', lambda name, config: found)
  monkeypatch.setattr(answers, '_write', lambda write, prompts, most: [' said', ''])
  study.config.evaluation.tasks = ('arithmetic', 'arithmetic_choice')
  try:
    study.train()
    rows = {row['name']: row['answers'] for row in table.rows(study)}
    path = os.path.join(study.folder('all'), 'answers_final.json')
    before = os.stat(path).st_mtime_ns
    study.train()
    assert os.stat(path).st_mtime_ns == before
  finally:
    study.config.evaluation.tasks = ()
  run, T = study.runs['prose'], study.config.data.seq_len
  asked = builtin.choices(found, study.prepare_text().tokenizer, T)
  with jax.set_mesh(study.mesh):
    nll = ensemble.token_nll(run.model, params.final(study, run, study.mesh), asked.tokens,
                             study.mesh, T, study.config.evaluation.batch_size)
  assert rows['prose'] == {'arithmetic': builtin.summary(found, [True, False], 0.0),
                           'arithmetic_choice': builtin.chosen(found, asked, nll)}
  assert [*rows['all']] == [*rows['posterior']] == ['arithmetic_choice']


def test_its_score_and_costs_are_those_of_the_chosen_experts(study):
  run, T = study.runs['all'], study.config.data.seq_len
  found = scores.read(study, run, scores.FINAL)
  with jax.set_mesh(study.mesh):
    reader = params.final(study, run.reader, study.mesh)
    experts = [params.final(study, expert, study.mesh) for expert in run.experts]
    for domain, tokens in study.prepare_text().held_out.items():
      chosen = select.choices(study, run, reader, tokens, study.mesh)
      nll = [ensemble.token_nll(run.model, expert, tokens, study.mesh, T, 8) for expert in experts]
      bits = count = switches = prefill = 0
      for first, end in zip(tokens.starts, tokens.starts[1:]):
        for i in range(first + 1, end - 1):  # after the begin mark, before the end mark
          bits, count = bits + nll[chosen[i]][i] / math.log(2), count + 1
          if i > first + 1 and chosen[i] != chosen[i - 1]:
            window = (i - 1) // T * T
            switches, prefill = switches + 1, prefill + i - 1 - max(first, window)
      assert found[domain]['bits_per_byte'] == pytest.approx(bits / tokens.bytes[-1], rel=1e-6)
      assert found[domain]['tokens'] == count
      assert found[domain]['switches'] == pytest.approx(1000 * switches / count)
      head = 2 * run.model.vocab_size * run.model.dim
      forward = next(scores.models_of(study, run.reader)).forward_flops({})
      assert found[domain]['forward_flops'] == pytest.approx(
          2 * forward - head + 2 * run.model.dim * 3 + prefill / count * (forward - head))


def test_the_posterior_predicts_a_document_as_the_mean_of_its_experts_would(study):
  """By the chain rule: the experts' probabilities of the whole document are averaged."""
  run, T = study.runs['posterior'], study.config.data.seq_len
  found = scores.read(study, run, scores.FINAL)
  with jax.set_mesh(study.mesh):
    experts = [params.final(study, expert, study.mesh) for expert in run.experts]
    for domain, tokens in study.prepare_text().held_out.items():
      nll = [ensemble.token_nll(run.model, expert, tokens, study.mesh, T, 8) for expert in experts]
      bits = 0.0
      for first, end in itertools.pairwise(tokens.starts):
        wholes = [of_expert[first:end].sum() for of_expert in nll]
        bits -= (np.logaddexp.reduce([-whole for whole in wholes]) - math.log(3)) / math.log(2)
      assert found[domain]['bits_per_byte'] == pytest.approx(bits / tokens.bytes[-1], rel=1e-6)
      assert found[domain]['switches'] == 0 and sum(found[domain]['share']) == pytest.approx(1)


def test_copies_of_a_model_score_as_the_model_itself(study, monkeypatch):
  """Branch-Train-Merge over identical experts, by each kind of selector."""
  text, one = study.prepare_text(), study.runs['prose']
  monkeypatch.setattr(selector, 'BLOCK', 16)
  monkeypatch.setattr(samples, 'seen', lambda expert, text: ['the king said', 'by the sea'])
  merged, chosen = study.runs['posterior'], study.runs['all']
  four = dataclasses.replace(merged, sources=(one,) * 4, expert_names=('prose',) * 4)
  expected = scores.read(study, one, scores.FINAL)
  for run in (four, dataclasses.replace(four, selector=Merge('tfidf', 0)),
              dataclasses.replace(four, selector=Merge('tfidf', 1)),
              dataclasses.replace(chosen, sources=(one,) * len(chosen.sources))):
    with jax.set_mesh(study.mesh):
      found = selected.evaluate(study, run, text, study.mesh)
    for domain in DOMAINS:
      assert found[domain]['bits_per_byte'] == pytest.approx(
          expected[domain]['bits_per_byte'], rel=1e-6)


@pytest.mark.parametrize('top', [1, 2])
def test_tf_idf_predicts_with_the_experts_whose_text_is_most_similar(study, monkeypatch, top):
  """Block by block of each document; before the first comparison, with all experts."""
  monkeypatch.setattr(selector, 'BLOCK', 16)
  text, T = study.prepare_text(), study.config.data.seq_len
  trained = {domain: text.tokenizer.decode(tokens.ids[:900].tolist())
             for domain, tokens in text.train.items()}
  monkeypatch.setattr(samples, 'seen', lambda expert, _: [trained[expert.name]])
  run = dataclasses.replace(study.runs['posterior'], selector=Merge('tfidf', top))
  with jax.set_mesh(study.mesh):
    found = selected.evaluate(study, run, text, study.mesh)
    experts = [params.final(study, expert, study.mesh) for expert in run.experts]
    tokens = text.held_out['code']
    nll = [ensemble.token_nll(run.model, expert, tokens, study.mesh, T, 8) for expert in experts]
  similarity = ensemble.Similarity([[trained[domain]] for domain in DOMAINS])
  forward = next(scores.models_of(study, run.experts[0])).forward_flops({})
  bits = count = flops = 0
  for first, end in zip(tokens.starts, tokens.starts[1:]):
    last = None
    for i in range(first + 1, end - 1):  # after the begin mark, before the end mark
      block = (i - first) // 16 * 16
      weights = np.full(3, 1 / 3)
      if block:
        cosines = similarity([text.tokenizer.decode(tokens.ids[first:first + block].tolist())])[0]
        weights = np.where(cosines >= sorted(cosines)[-top], np.exp(20 * cosines), 0)
        weights /= weights.sum()
      bits -= math.log2(sum(w * math.exp(-of_one[i]) for w, of_one in zip(weights, nll)))
      count += 1
      flops += forward * (weights > 0).sum()
      if last is not None:
        begins = ((weights > 0) & (last == 0)).sum()
        flops += begins * (i - 1 - max(first, (i - 1) // T * T)) * (
            forward - 2 * run.model.vocab_size * run.model.dim)
      last = weights
  assert found['code']['bits_per_byte'] == pytest.approx(bits / tokens.bytes[-1], rel=1e-6)
  assert found['code']['forward_flops'] == pytest.approx(flops / count)
  assert max(range(3), key=found['code']['share'].__getitem__) == DOMAINS.index('code')


def test_experts_that_take_over_read_the_text_before(study):
  """For any experts computed, token by token."""
  run, T = study.runs['posterior'], study.config.data.seq_len
  tokens = study.prepare_text().held_out['math']
  rng = np.random.default_rng(0)
  computed = rng.random((len(tokens.ids), 3)) < 0.6
  weights = rng.dirichlet([1] * 3, len(tokens.ids))
  found = selected.usage(run, weights, computed, tokens)
  forward = next(scores.models_of(study, run.experts[0])).forward_flops({})
  flops, shares, switches = [], [], 0
  for first, end in zip(tokens.starts, tokens.starts[1:]):
    for i in range(first + 1, end - 1):
      shares.append(weights[i])
      begin = [e for e in range(3) if i > first + 1 and computed[i, e] and not computed[i - 1, e]]
      switches += bool(begin)
      read = i - 1 - max(first, (i - 1) // T * T)
      flops.append(forward * computed[i].sum() + len(begin) * read * (
          forward - 2 * run.model.vocab_size * run.model.dim))
  assert found['forward_flops'] == pytest.approx(np.mean(flops))
  assert found['switches'] == pytest.approx(1000 * switches / len(flops))
  np.testing.assert_allclose(found['share'], np.mean(shares, 0))


def test_texts_are_compared_with_those_that_an_expert_was_trained_on(study):
  text = study.prepare_text()
  run = dataclasses.replace(study.runs['prose'], weights={'code': 1.0}, steps=2, batch_size=3)
  found, whole = samples.seen(run, text), text.tokenizer.decode(text.train['code'].ids.tolist())
  assert len(found) == 6
  assert all(''.join(row.split())[5:25] in ''.join(whole.split()) for row in found)


def test_choices_are_made_from_the_document_before_the_token(study):
  """Document by document: hidden states by window, their mean over the whole document so far."""
  run, tokens, T = study.runs['all'], study.prepare_text().held_out['math'], 31
  settings, columns = run.selector, routers.of(study, run)[0].astype(np.float64)
  apply = jax.jit(llama.Llama(run.model).apply)
  with jax.set_mesh(study.mesh):
    reader = params.final(study, run.reader, study.mesh)
    found = select.choices(study, run, reader, tokens, study.mesh)
  local = jax.device_get(reader)
  for first, end in zip(tokens.starts, tokens.starts[1:]):
    logits, last = [], None
    for i in range(first + 1, end):
      if not logits or (i - 1) % T == 0:  # a document or a window begins
        part = np.asarray(tokens.ids[i - 1:min(end, (i - 1) // T * T + T)], np.int32)
        padded = np.pad(part, (0, T - len(part)))[None]
        seen = (np.arange(T) < len(part)).astype(np.int32)[None]
        states, _ = apply({'params': local}, padded, seen, np.arange(T, dtype=np.int32)[None])
        logits += list(np.asarray(states[0, :len(part)], np.float64) @ columns)
      weights = settings.decay ** np.arange(i - first - 1, -1.0, -1.0)
      mean = weights @ logits[:i - first] / weights.sum()
      if last is None or mean.max() - mean[last] > settings.hysteresis:
        last = int(mean.argmax())
      assert found[i] == last


def test_later_text_changes_no_earlier_choice(study):
  """Through windows, documents and their marks, as they are scored."""
  run, tokens = study.runs['all'], study.prepare_text().held_out['code']
  at = int(tokens.starts[2] + 5)
  ids = np.array(tokens.ids)
  ids[at:] = np.random.default_rng(0).integers(3, 300, len(ids) - at)
  with jax.set_mesh(study.mesh):
    reader = params.final(study, run.reader, study.mesh)
    before, after = (select.choices(study, run, reader, each, study.mesh)
                     for each in (tokens, dataclasses.replace(tokens, ids=ids)))
  np.testing.assert_array_equal(before[:at + 1], after[:at + 1])
  assert (before[at + 1:] != after[at + 1:]).any()


def test_an_ensemble_with_other_settings_is_another_run(study):
  config = study.config.copy_and_resolve_references()
  config.runs['all'].init.forget = 5.0
  with pytest.raises(UsageError, match=r'another config:\n  all was made with init.forget 20 and'):
    Pipeline(config, study.workdir).train()


def test_it_is_exported_as_its_models_and_its_selector(study, tmp_path, monkeypatch):
  out = tmp_path / 'out'
  with monkeypatch.context() as patch, pytest.raises(OSError, match='disk'):
    def fail(*_):
      raise OSError('disk')
    patch.setattr(export_ensemble, 'Writer', fail)
    export_ensemble.export_ensemble(study, 'all', str(out), 'float32')
  monkeypatch.setattr(export_ensemble, 'export_run', None)  # the models are complete
  export_ensemble.export_ensemble(study, 'all', str(out), 'float32')
  assert sorted(os.listdir(out)) == ['README.md', 'code', 'math', 'prose', 'selector.json',
                                     'selector.safetensors']
  about = json.loads((out / 'selector.json').read_text())
  assert about == {'reader': 'prose', 'layers': 2, 'experts': [*DOMAINS],
                   'domains': [*DOMAINS], 'decay': 0.5**0.05, 'hysteresis': 0.1,
                   'kind': 'ridge'}
  weight = File(str(out / 'selector.safetensors')).read('weight')
  np.testing.assert_array_equal(weight, routers.of(study, study.runs['all'])[0].T)
  with jax.set_mesh(study.mesh):
    math_params = params.final(study, study.runs['math'], study.mesh)
  np.testing.assert_array_equal(Folder(str(out / 'math')).read('embed'), math_params['embed'])
  opened, run, columns = exported.opened(str(out))
  assert run.selector.decay == pytest.approx(about['decay'])
  with contextlib.ExitStack() as stack:
    texts = [[5, 6, 7, 8, 9], [10, 11, 12]]
    expected = generators.open_engine(study, study.runs['all'], '', stack).start(texts, 32)
  with contextlib.ExitStack() as stack:
    found = generators.open_engine(opened, run, '', stack, columns).start(texts, 32)
  np.testing.assert_array_equal(found.shares, expected.shares)
  np.testing.assert_allclose(found.logits, expected.logits, atol=1e-4)
  (out / 'selector.json').write_text(json.dumps({**about, 'reader': '../prose'}))
  with pytest.raises(UsageError, match=r"'\.\./prose' cannot be the name of a run"):
    exported.opened(str(out))
  (out / 'selector.json').write_text('{}')
  with pytest.raises(UsageError, match=r"json is damaged \(KeyError\('experts'\)\); export the"):
    exported.opened(str(out))


def test_the_line_on_a_domain_names_the_experts_that_it_used(study):
  found = {'share': [0.25, 0.0, 0.75], 'switches': 3.0, 'forward_flops': 2e6}
  assert selected.in_words(study.runs['all'], 'code', found) == (
      'tokens of code by prose 25.0%, math 75.0%; 3.0 switches per 1,000 tokens; '
      '2.00 MFLOP per token')


# What is changed in the selectors, so that experts take over within a few tokens.
SELECTORS = {
    'all': lambda linear: dataclasses.replace(linear, forget=3.0),
    'posterior': lambda merge: merge,
    'tfidf': lambda merge: Merge('tfidf', 1)}


@pytest.mark.parametrize('name', SELECTORS)
def test_texts_are_generated_by_the_experts_that_score_them(study, name, monkeypatch):
  """For each token, weights and log-probabilities equal those of evaluation, which scores each row
  alone, in a batch of rows of different lengths whose domain changes."""
  monkeypatch.setattr(selector, 'BLOCK', 8)
  text, T = study.prepare_text(), study.config.data.seq_len
  trained = {domain: text.tokenizer.decode(tokens.ids[:900].tolist())
             for domain, tokens in text.train.items()}
  monkeypatch.setattr(samples, 'seen', lambda expert, _: [trained[expert.name]])
  run = study.runs['posterior' if name == 'tfidf' else name]
  run = dataclasses.replace(run, selector=SELECTORS[name](run.selector))
  held_out = text.held_out
  rows = [[*held_out[a].ids[:first], *held_out[b].ids[5:5 + T - first]] for a, b, first in (
      ('prose', 'code', 12), ('code', 'math', 20), ('math', 'prose', 9))]
  ids = np.array([token for row in rows for token in row])
  starts = np.arange(4) * T
  tokens = Tokens(ids, starts, starts, '', 1, 0)
  with contextlib.ExitStack() as stack:
    engine = generators.open_engine(study, run, '', stack)
    parameters = {each.name: params.final(study, each, study.mesh) for each in run.sources}
    nll = np.stack([ensemble.token_nll(expert.model, parameters[expert.name], tokens, study.mesh,
                                       T, 8) for expert in run.experts], 1)
    if name == 'all':
      chosen = select.choices(study, run, parameters[run.reader.name], tokens, study.mesh)
      log_weights = np.where(np.eye(3, dtype=bool)[chosen], 0.0, -np.inf)
    elif name == 'posterior':
      log_weights = ensemble.posterior_log_weights(nll, starts, 0)
    else:
      similarity = ensemble.Similarity([[trained[domain]] for domain in DOMAINS])
      log_weights = selector.similarity_log_weights(ensemble.similarities(
          similarity, tokens, text.tokenizer, 3), 1)
    expected = -ensemble.averaged_nll(nll, log_weights).reshape(3, T)
    shares = np.exp(log_weights).reshape(3, T, 3)
    assert (np.abs(np.diff(shares[:, 9:], axis=1)).max(-1) > 0.5).any(), 'no expert takes over'
    lengths = [9, 3, 6]
    found = engine.start([row[:length] for row, length in zip(rows, lengths)], 32)
    for number in range(T - 9):
      log_probs = np.asarray(jax.nn.log_softmax(found.logits))
      new = [0] * len(log_probs)
      for i, (row, length) in enumerate(zip(rows, lengths)):
        new[i] = row[length + number]
        np.testing.assert_allclose(found.shares[i], shares[i, length + number], atol=1e-4)
        assert log_probs[i, new[i]] == pytest.approx(expected[i, length + number], abs=1e-4)
      found.add(jax.numpy.array(new), [True] * len(rows))


def test_tf_idf_needs_the_text_that_it_compares_with(study):
  run = dataclasses.replace(study.runs['posterior'], selector=Merge('tfidf', 1), sources=tuple(
      dataclasses.replace(source, weights={'gone': 1.0}) for source in study.runs['all'].experts))
  message = r"'posterior' compares texts with .*data/gone does not"
  with contextlib.ExitStack() as stack, pytest.raises(UsageError, match=message):
    generators.open_engine(study, run, '', stack)
