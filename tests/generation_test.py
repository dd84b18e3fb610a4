"""Generation: the cache against whole passes, sampling against NumPy, and where a text ends."""

import dataclasses
import functools
import io
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import btx_jax
from btx_jax.commands import generate as command
from btx_jax.commands.prompts import Prompt
from btx_jax.data import tokenizer as tokenizers
from btx_jax.devices import sharding
from btx_jax.errors import UsageError
from btx_jax.generation import decode
from btx_jax.generation.engine import Model, padded
from btx_jax.generation.ensemble import Ensemble
from btx_jax.generation.generate import Generator
from btx_jax.generation.sampling import filtered, penalised, sample
from btx_jax.generation.selection import ByPosterior
from btx_jax.generation.settings import Sampling
from btx_jax.generation.texts import LENGTH, STOP, Text
from btx_jax.generation.weights import unstack
from btx_jax.model import config
from tests.helpers import TINY, TINY_MIXTURE, normal, random_params, use_mesh

TOKENIZER = pathlib.Path(__file__).parent / 'fixtures' / 'tokenizer'
MODELS = {
    'dense': TINY,
    'biases, norms of heads and scaled waves': dataclasses.replace(
        TINY, qkv_bias=True, qk_norm=True, rope_factor=8.0, rope_original_length=8,
        tied_head=True),
    **{router: dataclasses.replace(TINY_MIXTURE, router=router) for router in config.ROUTERS},
    'biased router': dataclasses.replace(TINY_MIXTURE, router_bias=True),
    'bfloat16': dataclasses.replace(TINY_MIXTURE, dtype='bfloat16')}
LENGTHS, STEPS = np.array([5, 1, 3, 8]), 3


def rows_of(cfg, seed=0):
  """Rows of token ids, some of them prompts, the next STEPS what follows."""
  return np.random.default_rng(seed).integers(0, cfg.vocab_size, (len(LENGTHS), 8 + STEPS))


def decoded(cfg, params, rows):
  """Logits after each prompt and each of the STEPS tokens that follow it: [B, STEPS + 1, V]."""
  weights = unstack(cfg, params)
  found = decode.prefill(cfg, weights, rows[:, :8], LENGTHS, 16)
  logits = [found.logits]
  for i in range(STEPS):
    tokens = rows[np.arange(len(rows)), LENGTHS + i]
    found = decode.step(cfg, weights, tokens, LENGTHS + i, found.cache)
    logits.append(found.logits)
  return np.stack(logits, 1)


def whole(cfg, params, rows):
  """The same from one pass over everything."""
  logits = np.asarray(btx_jax.logits(cfg, params, rows))
  at = (LENGTHS - 1)[:, None] + np.arange(STEPS + 1)
  return logits[np.arange(len(rows))[:, None], at]


@pytest.mark.parametrize('name', MODELS)
def test_steps_with_a_cache_are_one_pass(name):
  cfg = MODELS[name]
  params, rows = random_params(cfg), rows_of(cfg)
  atol = 1e-4 if cfg.dtype == 'float32' else 0.05 * np.abs(whole(cfg, params, rows)).max()
  np.testing.assert_allclose(decoded(cfg, params, rows), whole(cfg, params, rows), atol=atol)


@pytest.mark.parametrize('shape', [(2, 1, 2, 1), (1, 1, 2, 2)])
def test_a_mesh_decodes_the_same(shape):
  params, rows = random_params(TINY_MIXTURE), rows_of(TINY_MIXTURE)
  with use_mesh(shape) as mesh:
    found = decoded(TINY_MIXTURE, jax.device_put(params, sharding.shardings(params, mesh)), rows)
  np.testing.assert_allclose(found, whole(TINY_MIXTURE, params, rows), atol=1e-4)


# From prompts to texts


@functools.cache
def tokenizer():
  return tokenizers.load(str(TOKENIZER))


@functools.cache
def generator(**options):
  cfg = dataclasses.replace(TINY_MIXTURE, vocab_size=tokenizer().vocab_size)
  return Generator(cfg, random_params(cfg), tokenizer(), **options)


PROMPTS = ['a', 'The model', 'def f(x):\n  return', 'Once upon a time']


def test_a_text_does_not_depend_on_its_batch():
  sampling = Sampling(temperature=1.0, top_k=20)
  together = generator(batch_size=16)(PROMPTS, 12, sampling, n=2)
  assert together == generator(batch_size=4)(PROMPTS, 12, sampling, n=2)
  assert together[0] == generator(batch_size=16)(PROMPTS[:1], 12, sampling, n=2)[0]
  assert together[0][0] != together[0][1]
  assert together != generator(batch_size=16)(PROMPTS, 12, sampling, seed=1, n=2)
  same, again = generator(batch_size=16)(PROMPTS[:1] * 2, 12, sampling)
  assert same != again  # a prompt that comes twice is drawn twice


def test_greedy_takes_the_likeliest_token_of_whole_passes():
  cfg = dataclasses.replace(TINY_MIXTURE, vocab_size=tokenizer().vocab_size)
  prompt, params = [5, 6, 7], random_params(cfg)
  found = generator()([prompt], 6)[0][0]
  logits = btx_jax.logits(cfg, params, np.array(prompt + list(found.ids[:-1])))
  assert list(found.ids) == logits[len(prompt) - 1:].argmax(-1).tolist()


def test_an_ensemble_of_copies_is_the_model():
  cfg = dataclasses.replace(TINY_MIXTURE, vocab_size=tokenizer().vocab_size)
  model = Model(cfg, random_params(cfg))
  write = Generator.of(Ensemble([model] * 2, ByPosterior(2)), str(TOKENIZER))
  shares = []
  found = write(PROMPTS[:2], 6, on_text=lambda *given: shares.append(given[-1]))
  assert found == generator()(PROMPTS[:2], 6)
  np.testing.assert_allclose(shares, 0.5)


def test_what_streams_adds_up_to_the_text_and_gates_to_one():
  streamed, gates = {}, []

  def on_text(prompt, number, new, gates_E):
    streamed[prompt, number] = streamed.get((prompt, number), '') + new
    gates.append(gates_E)

  found = generator()(PROMPTS, 12, Sampling(temperature=1.5), n=2, on_text=on_text)
  assert streamed == {(i, j): text.text for i, texts in enumerate(found)
                      for j, text in enumerate(texts)}
  np.testing.assert_allclose(np.sum(gates, -1), 1, atol=1e-5)


def text_of(ids, stop=(), most=99, stop_ids=()):
  """The text of generated ids, and what was shown after each."""
  text = Text(tokenizer(), [5], most, stop_ids, stop)
  shown = [text.add(token) for token in ids if not text.ended]
  return text.done(), shown


def test_a_stop_string_ends_a_text_and_nothing_of_it_is_shown():
  ids = tokenizer().encode(['one two END three'])[0]
  done, shown = text_of(ids, ('two END', 'never'))
  assert (done.text, done.ended, ''.join(shown)) == ('one ', STOP, 'one ')
  assert len(done.ids) < len(ids)
  done, shown = text_of(ids, ('ENDING',))  # it began, and did not come
  assert ''.join(shown)[:20] == 'one two END three'[:len(''.join(shown))]


def test_a_character_of_several_tokens_is_shown_when_it_is_whole():
  ids = tokenizer().encode(['\u4f60\u597d'])[0]
  assert len(ids) > 2
  done, shown = text_of(ids, most=len(ids))
  assert (done.text, done.ended) == ('\u4f60\u597d', LENGTH)
  assert [new for new in shown if new] == ['\u4f60', '\u597d']
  assert text_of(ids[:-1], most=len(ids) - 1)[0].text == '\u4f60\ufffd'


def test_a_token_that_ends_texts_is_not_part_of_them():
  done, _ = text_of([*tokenizer().encode(['one'])[0], 2], stop_ids={2})
  assert (done.text, done.ids[-1], done.ended) == ('one', 2, STOP)


def test_rows_of_a_model_beyond_its_tokenizer_stand_for_no_text():
  size = tokenizer().vocab_size
  one, two = tokenizer().encode(['one', ' two'])
  done, _ = text_of([size, *one, size + 5, *two])
  assert (done.text, len(done.ids)) == ('one two', len(one) + len(two) + 2)
  cfg = dataclasses.replace(TINY, vocab_size=2 * size)
  texts, = Generator(cfg, random_params(cfg), tokenizer())(['a'], 12, Sampling(temperature=2.0))
  assert any(i >= size for i in texts[0].ids)


@pytest.mark.parametrize('call, message', [
    (lambda: generator(context=4)([[1] * 4]), 'leaves no room for a text'),
    (lambda: generator()([[]]), 'is empty, and the tokenizer puts no token before a text'),
    (lambda: generator()(['a'], stop=['']), 'stop has an empty string'),
    (lambda: generator()(['a'], max_new_tokens=0), 'max_new_tokens = 0 must be at least 1'),
    (lambda: Sampling(top_p=0.0), 'top_p = 0.0 must be above 0 and at most 1')])
def test_what_cannot_be_generated_is_refused(call, message):
  with pytest.raises(UsageError, match=message.replace('.', r'\.')):
    call()


def test_prompts_of_all_sizes_need_few_programs():
  shapes = {padded([[1] * length] * rows)[0].shape
            for length in range(1, 257) for rows in range(1, 17)}
  assert shapes == {(B, T) for B in (1, 2, 4, 8, 16) for T in (16, 32, 64, 128, 256)}


def test_a_text_ends_where_the_context_does():
  assert len(generator(context=8)([[1] * 5])[0][0].ids) == 3


# The command


def test_the_command_writes_by_a_folder_what_the_library_does(tmp_path, capsys, monkeypatch):
  cfg = dataclasses.replace(TINY_MIXTURE, vocab_size=tokenizer().vocab_size)
  folder = str(tmp_path / 'model')
  btx_jax.save(folder, cfg, random_params(cfg), str(TOKENIZER), 'float32')
  asked = command.Asked([Prompt(each) for each in PROMPTS], max_new_tokens=12,
                        sampling=Sampling(1.0, top_k=20), n=2)
  command.print_texts(None, '', folder, asked, True)
  found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  expected = generator(batch_size=16)(PROMPTS, 12, asked.sampling, n=2)
  assert [each['prompt'] for each in found] == PROMPTS
  assert [[text['text'] for text in each['texts']] for each in found] == [
      [text.text for text in texts] for texts in expected]
  monkeypatch.setattr('sys.stdin', io.StringIO('a\n\nThe model\n'))
  command.print_texts(None, '', folder, asked._replace(
      prompts=(), n=1, sampling=Sampling(), colours=True), False)
  shown = capsys.readouterr().out
  greedy = [generator(batch_size=16)([prompt], 12)[0][0].text for prompt in PROMPTS[:2]]
  assert all(prompt + text in shown for prompt, text in zip(PROMPTS, greedy))
  assert 'expert 0' in shown
  for n in (1, 2):  # what is printed is the text, whatever is in it
    command.print_texts(None, '', folder, asked._replace(prompts=[Prompt('\ta\t\r\n')], n=n), False)
    assert '\ta\t\r\n' in capsys.readouterr().out.replace('\x1b', '')


# Sampling


def probabilities(settings, logits):
  """The distribution to draw from, by NumPy in float64, token by token."""
  scaled = np.float64(logits) / settings.temperature
  allowed = np.ones(len(scaled), bool)

  def probs():
    p = np.where(allowed, np.exp(scaled - scaled.max()), 0)
    return p / p.sum()

  if settings.top_k:
    allowed[np.argsort(-scaled)[settings.top_k:]] = False
  total, p = 0.0, probs()
  for token in np.argsort(-p, kind='stable'):
    allowed[token] &= total < settings.top_p
    total += p[token]
  allowed &= probs() >= settings.min_p * probs().max()
  return probs()


@pytest.mark.parametrize('settings', [
    Sampling(temperature=0.7), Sampling(temperature=1.3, top_k=5), Sampling(1.0, top_p=0.6),
    Sampling(1.0, min_p=0.3), Sampling(0.9, top_k=20, top_p=0.9, min_p=0.05)])
def test_draws_follow_the_distribution(settings):
  logits = 2 * normal((30,))
  expected = probabilities(settings, logits)
  found = np.asarray(jax.nn.softmax(filtered(settings, jnp.asarray(logits)[None])))[0]
  np.testing.assert_allclose(found, expected, atol=1e-6)
  draws = 20_000
  keys = jax.random.split(jax.random.key(0), draws)
  tokens = sample(settings, jnp.broadcast_to(logits, (draws, 30)), None, keys, 3)
  counts = np.bincount(np.asarray(tokens), minlength=30)
  assert not counts[expected == 0].any()
  common = expected * draws > 5
  observed = np.append(counts[common], counts[~common].sum())
  wanted = np.append(expected[common], expected[~common].sum()) * draws
  keep = wanted > 0
  chi_square = ((observed - wanted)[keep]**2 / wanted[keep]).sum()
  assert jax.scipy.stats.chi2.sf(chi_square, keep.sum() - 1) > 1e-3


def test_a_repetition_is_penalised_whatever_the_sign():
  logits = jnp.array([[2.0, -2.0, 1.5, -1.0]])
  seen = jnp.array([[True, True, False, False]])
  found = penalised(Sampling(repetition_penalty=2.0), logits, seen)
  np.testing.assert_array_equal(found, [[1.0, -4.0, 1.5, -1.0]])
  assert sample(Sampling(repetition_penalty=2.0), logits, seen, None, 0).tolist() == [2]
