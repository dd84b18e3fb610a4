"""The command `generate`: prompts from files, conversations, and checks of chat templates."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from rich.segment import Segment

import btx_jax
from btx_jax.commands import chat, generators, prompts
from btx_jax.commands import generate as command
from btx_jax.data import chat_tokens
from btx_jax.data import tokenizer as tokenizers
from btx_jax.errors import UsageError
from btx_jax.generation.generate import Generator, TooLong
from btx_jax.generation.settings import Sampling
from btx_jax.generation.texts import LENGTH, STOP
from btx_jax.model.config import Config
from tests import make_tokenizers
from tests.chat_test import CHATML, assistant, user
from tests.helpers import random_params

SYSTEM = {'role': 'system', 'content': 'Be brief.'}


@pytest.mark.parametrize('name, lines, expected', [
    ('p.txt', '\ufeffone \n\n{"prompt": 2}\r\n', [{'prompt': 'one '}, {'prompt': '{"prompt": 2}'}]),
    ('p.jsonl', '{"prompt": "a\\nb", "id": 3}\n\n{"messages": [{"role": "user", "content": "c"}]}',
     [{'prompt': 'a\nb'}, {'messages': [user('c')]}])])
def test_a_file_has_a_prompt_in_each_line(tmp_path, name, lines, expected):
  path = tmp_path / name
  path.write_text(lines)
  found = prompts.collect(['x'], str(path), False, '')
  assert [each.as_data() for each in found] == [{'prompt': 'x'}, *expected]
  found = prompts.collect(['x'], str(path), True, SYSTEM['content'])
  assert [each.as_data()['messages'] for each in found] == [
      [SYSTEM, user('x')], *(each.get('messages') or [SYSTEM, user(each['prompt'])]
                             for each in expected)]


@pytest.mark.parametrize('name, lines, message', [
    ('none.txt', None, 'none.txt cannot be read: '),
    ('p.txt', '\n \n', 'p.txt has no prompts; every'),
    ('p.txt', b'\xff\n', 'p.txt cannot be read: '),
    ('p.jsonl', 'plain\n', 'p.jsonl, line 1 is not JSON: '),
    ('p.jsonl', '[' * 100_000, 'p.jsonl, line 1 is not JSON: '),
    ('p.jsonl', '\n["a"]', 'p.jsonl, line 2 must be an object with `prompt`, a'),
    ('p.jsonl', '{"prompt": 1}', 'line 1 must be an object'),
    ('p.jsonl', '{"prompt": "\\ud800"}', 'surrogates not allowed'),
    ('p.jsonl', '{"messages": []}', 'line 1 must be an object'),
    ('p.jsonl', '{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', 'line 1 must'),
    ('p.jsonl', '{"messages": [{"role": "user", "content": ["b"]}]}', 'whose values are strings.'),
    ('p.jsonl', '{"messages": [{"role": "usr", "content": "b"}]}', "'usr'; did you mean 'user'?")])
def test_a_file_that_has_something_else_is_refused(tmp_path, name, lines, message):
  if lines is not None:
    (tmp_path / name).write_bytes(lines if isinstance(lines, bytes) else lines.encode())
  with pytest.raises(UsageError) as raised:
    prompts.collect([], str(tmp_path / name), False, '')
  assert message in str(raised.value)


def test_a_system_message_needs_a_conversation():
  with pytest.raises(UsageError, match='--system has no effect without --chat'):
    prompts.collect(['a'], '', False, 'Be brief.')


class Echo:
  """A model that answers with the number of messages that it read."""
  context = 50

  def __init__(self):
    self.seen, self.seeds = [], []

  def __call__(self, prompts, max_new_tokens, sampling, stop, seed, on_text):
    messages, = prompts
    if len(messages) > 4:
      raise TooLong('', 64)
    self.seen.append([message['content'] for message in messages])
    self.seeds.append(seed)
    on_text(0, 0, f'{len(messages)} ', np.zeros(0))
    on_text(0, 0, 'seen', np.zeros(0))
    ended = LENGTH if len(messages) == 4 else STOP
    return [[btx_jax.generation.texts.Completion(f'{len(messages)} seen', (1, 2), ended)]]


@pytest.mark.parametrize('as_json', [False, True])
def test_a_conversation_goes_on_until_it_is_reset(capsys, as_json):
  shown, model = [], Echo()
  lines = ['Hi', 'And?', 'More', '/reset', 'Again']
  chat.converse(model, lines, 'Be brief.', 5, Sampling(), (), 7, lambda new, _: shown.append(new),
                as_json)
  assert model.seen == [['Be brief.', 'Hi'], ['Be brief.', 'Hi', '2 seen', 'And?'],
                        ['Be brief.', 'Again']]
  assert model.seeds == [7, 8, 9]
  printed = capsys.readouterr().out
  assert 'does not fit: it has 64 tokens with this turn, and the model has 50 pos' in printed
  assert printed.count('The answer was cut off: the conversation fills the 50') == 1
  if as_json:
    last = [json.loads(line) for line in printed.splitlines() if line.startswith('{')][-1]
    assert last == {'messages': [SYSTEM, user('Again'), assistant('2 seen')]}
  assert ''.join(shown) == ('' if as_json else '2 seen4 seen2 seen')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A tiny model whose tokenizer has a chat template."""
  path = tmp_path_factory.mktemp('chat')
  source = make_tokenizers.write(
      path / 'tokenizer', make_tokenizers.byte_level(),
      tokenizer_config={'eos_token': '</s>', 'chat_template': CHATML})
  size = tokenizers.load(str(source)).vocab_size
  config = Config(vocab_size=size, dim=8, ffn_dim=12, num_layers=1, num_heads=2, num_kv_heads=1)
  btx_jax.save(str(path / 'model'), config, random_params(config), str(source), 'float32', 80)
  return path / 'model'


class Dictated:
  """An engine that writes what it is given."""

  def __init__(self, vocab_size, ids):
    self.vocab_size, self._ids = vocab_size, ids
    self.prompts = []

  def start(self, prompts, slots):
    del slots
    self.prompts += prompts
    return _Dictated(self.vocab_size, iter(self._ids))


class _Dictated:
  shares = np.zeros((1, 0))

  def __init__(self, vocab_size, ids):
    self._vocab_size, self._ids = vocab_size, ids
    self.add(None, [True])

  def add(self, tokens_B, live):
    del tokens_B, live
    self.logits = jnp.zeros((1, self._vocab_size)).at[0, next(self._ids)].set(1.0)


def test_the_answer_to_a_conversation_ends_with_its_turn(folder):
  tokenizer = tokenizers.load(str(folder))
  end = chat_tokens.stop_id(tokenizer)
  ids = tokenizer.encode(['Yes.'])[0]
  assert end != tokenizer.eos_id
  engine = Dictated(tokenizer.vocab_size, [*ids, end, *ids, *ids])
  messages = [user('Is it?')]
  write = Generator.of(engine, tokenizer)
  answer, = write([messages], len(ids) + 3)[0]
  assert (answer.text, answer.ended, answer.ids) == ('Yes.', STOP, (*ids, end))
  assert engine.prompts == [chat_tokens.prompt_ids(tokenizer, messages)]
  text, = write(['Is it?'], len(ids) + 3)[0]
  assert (text.text, text.ended) == ('Yes.Ye', LENGTH)  # a text has no turns to end


def test_the_command_answers_turns_and_says_when_they_do_not_fit(folder, capsys, monkeypatch):
  asked = command.Asked((), True, max_new_tokens=6)
  monkeypatch.setattr('sys.stdin', io.StringIO('Hi\n' + 'a' * 90 + '\n'))
  command.print_texts(None, '', str(folder), asked, True)
  found = capsys.readouterr()
  talk, = [json.loads(line)['messages'] for line in found.out.splitlines()]
  assert talk[0] == user('Hi') and talk[1]['role'] == 'assistant'
  assert 'The conversation does not fit' in found.err
  prompt, = prompts.collect(['Hi'], '', True, '')
  command.print_texts(None, '', str(folder), asked._replace(prompts=[prompt]), False)
  assert f'> Hi\n{talk[1]["content"]}' in capsys.readouterr().out
  with pytest.raises(TooLong, match=r'Prompt 0 has \d+ tokens, which leaves no room'):
    command.print_texts(None, '', str(folder), asked._replace(
        prompts=prompts.collect(['a' * 90], '', True, '')), False)


@pytest.mark.parametrize('template, message', [
    (None, r'has no chat template\. Name one, as in --chat_template=chatml \(valid: chatml, lla'),
    ('{{ raise_exception("needs tools") }}', 'fails on this conversation: needs tools'),
    ('{% if %}', 'is not valid Jinja')])
def test_a_template_that_cannot_write_is_refused_before_the_model_is_read(
    folder, tmp_path, monkeypatch, template, message):
  other = tmp_path / 'model'
  other.mkdir()
  for file in folder.iterdir():
    if file.name != 'chat_template.jinja':
      (other / file.name).write_bytes(file.read_bytes())
  beside = json.loads((folder / 'tokenizer_config.json').read_text()) | {'chat_template': template}
  (other / 'tokenizer_config.json').write_text(json.dumps(beside))
  monkeypatch.setattr(generators, 'open_generator', None)
  asked = command.Asked((), True, max_new_tokens=6)
  with pytest.raises(UsageError, match=message):
    command.print_texts(None, '', str(other), asked, True)
  with pytest.raises(TypeError):  # next, the model would be read
    command.print_texts(None, '', str(other), asked._replace(chat_template='chatml'), True)


@pytest.mark.parametrize('is_terminal', [True, False])
def test_a_model_does_not_command_a_terminal(monkeypatch, is_terminal):
  shown = Console(file=io.StringIO(), force_terminal=is_terminal, color_system=None)
  monkeypatch.setattr(command.terminal, 'console', shown)
  command._show(Segment('a\tb\x1b]0;title\x07\x9b2Jc\r\n'))
  text = shown.file.getvalue()
  assert text == ('a\tb\ufffd]0;title\ufffd\ufffd2Jc\r\n' if is_terminal else
                  'a\tb\x1b]0;title\x07\x9b2Jc\r\n')
