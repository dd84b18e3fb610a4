"""Chat templates: rendered as in transformers, sandboxed, and cut where a model begins to write."""

import functools
import json

import pytest

from btx_jax.data import chat_template, chat_tokens, chats, framing, tokenizer
from btx_jax.data.chat_template import ChatTemplate
from btx_jax.errors import UsageError
from tests import make_tokenizers

SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# As Mistral's: no generation prompt, roles that must alternate, and an end of text after an answer.
MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate') }}{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}
{%- endif %}{% endfor %}"""
# As Gemma's and Phi's: another name of the role; an end of text after the last turn alone.
GEMMA = """{{ bos_token }}{% set ns = namespace(last='') %}{% for message in messages %}
{%- if message['role'] == 'system' %}{% set ns.last = message['content'] %}{% continue %}{% endif %}
{%- set role = 'model' if message.role == 'assistant' else message.role %}
{{- '<|im_start|>' + role + '\\n' + ns.last + message['content'] | trim + '<|im_end|>\\n' }}
{%- set ns.last = '' %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\\n' }}
{%- else %}{{ eos_token }}{% endif %}"""
# As Qwen3's: the last answer gets an empty block of thoughts; and what templates may call.
QWEN = """{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}
{%- if message.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}
{%- if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ message.content }}<|im_end|>
{%- endgeneration %}{{ '\\n' }}{% else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
TEMPLATES = {'smollm2': SMOLLM2, 'mistral': MISTRAL, 'gemma': GEMMA, 'qwen': QWEN,
             'chatml': chat_template.NAMED['chatml'][0], 'llama3': chat_template.NAMED['llama3'][0]}
NAMES = {'bos_token': '<s>', 'eos_token': '</s>'}
TURN = [{'role': 'user', 'content': 'Is it red?'}, {'role': 'assistant', 'content': 'the house '},
        {'role': 'user', 'content': '  Éva\n\n'}, {'role': 'assistant', 'content': '4'}]
SYSTEM = [{'role': 'system', 'content': 'Be brief.'}]


@pytest.fixture(scope='module')
def write(tmp_path_factory):
  """(content of a tokenizer.json, template) -> its folder."""
  def make(main, template: str | list) -> str:
    folder = tmp_path_factory.mktemp('tokenizer')
    beside = {**NAMES, 'chat_template': template, 'tokenizer_class': 'PreTrainedTokenizerFast'}
    return str(make_tokenizers.write(folder, main, tokenizer_config=beside))
  return make


def main_of(name: str) -> dict:
  """A tokenizer to match the template: one that adds a space in front, or one like Llama 3's."""
  if name == 'mistral':
    return make_tokenizers.space_marks('first')
  if name != 'llama3':
    return make_tokenizers.byte_level()
  cut = {'type': 'Split', 'pattern': {'Regex': r'\s*[\r\n]+| ?\w+|\s+(?!\S)|\s+|[^\s\w]'},
         'behavior': 'Isolated', 'invert': False}
  spell = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True,
           'use_regex': False}
  return functools.reduce(make_tokenizers.with_token, chat_template.NAMED['llama3'][1],
                          make_tokenizers.byte_level(pre_tokenizer={
                              'type': 'Sequence', 'pretokenizers': [cut, spell]}))


@pytest.mark.reference
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', TEMPLATES)
def test_chats_are_rendered_and_encoded_as_transformers_does(name, write):
  transformers = pytest.importorskip('transformers')
  folder = write(main_of(name), TEMPLATES[name])
  theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), tokenizer.load(folder)
  system = [] if name == 'mistral' else SYSTEM
  for messages in (TURN[:1], TURN[:3], TURN, system + TURN):
    for prompts in (False, True):
      expected = theirs.apply_chat_template(
          messages, tokenize=False, add_generation_prompt=prompts)
      assert ours.chat_template.render(messages, prompts) == expected
      assert theirs.encode(expected, add_special_tokens=False) == (
          chat_tokens.prompt_ids(ours, messages) if prompts else chat_tokens.encode(ours, [
              chats.parts(ours.chat_template, messages, ours.special)])[0].ids)


@pytest.mark.parametrize('name', TEMPLATES)
def test_a_model_writes_the_answer_and_the_end_of_its_turn(name, write):
  ours = tokenizer.load(write(main_of(name), TEMPLATES[name]))
  parts = chats.parts(ours.chat_template, TURN, ours.special)
  assert ''.join(part.text for part in parts) == ours.chat_template.render(TURN)
  answers = [part for part in parts if part.is_answer]
  end = {'mistral': '</s>', 'llama3': '<|eot_id|>'}.get(name, '<|im_end|>')
  assert [part.end for part in answers] == [end, end]
  assert [part.text.removesuffix(end).strip() for part in answers] == [
      'the house', '<think>\n\n</think>\n\n4' if name == 'qwen' else '4']
  # Before each answer a model reads the same ids in training as in generation.
  (ids, roles), = chat_tokens.encode(ours, [parts])
  begins = [i for i in range(1, len(ids)) if roles[i] and not roles[i - 1]]
  assert [ids[:i] for i in begins] == [chat_tokens.prompt_ids(ours, TURN[:n]) for n in (1, 3)]
  ends = [i for i in range(len(ids)) if roles[i] == chat_tokens.TURN_END]
  assert [ids[i] for i in ends] == [chat_tokens.stop_id(ours)] * 2
  spelled = [ours.decode(ids[first:end]) for first, end in zip(begins, ends)]
  assert spelled == [part.text.removesuffix(end).removeprefix(' ') for part in answers]


def test_an_answer_that_the_template_rewrites_is_read_only():
  drops = ChatTemplate(QWEN.replace('message.content }}<', "message.content.split('.')[-1] }}<"),
                       {}, 'x')
  messages = [*TURN[:1], {'role': 'assistant', 'content': 'I think. Yes'}, *TURN[2:]]
  parts = chats.parts(drops, messages, ['<|im_end|>'])
  assert [part.text for part in parts if part.is_answer] == [
      '<think>\n\n</think>\n\n4<|im_end|>']


def test_a_tokenizer_without_template_gets_one_by_name(write):
  folder = write(make_tokenizers.byte_level(), [
      {'name': 'tool_use', 'template': 'x'}, {'name': 'default', 'template': 'own'}])
  own, named = (tokenizer.load(folder, framing.Options(chat_template=name))
                for name in ('', 'chatml'))
  assert own.chat_template.render(TURN) == 'own'
  assert named.chat_template.source == chat_template.NAMED['chatml'][0]
  assert own.hash == named.hash and own.chat_template.hash != named.chat_template.hash


@pytest.mark.parametrize('source, message', [
    ("{{ 'a' * 10**9 }}", 'too much'), ("{{ ('a'.encode() * 10**8) | length }}", 'too much'),
    ('{{ 9 ** 99999 }}', 'too much'),
    ('{% for i in range(99999) %}{% for j in range(99999) %}' + 'a' * 99
     + '{% endfor %}{% endfor %}', 'too much'),
    ('{{ messages.append(1) }}', 'unsafe'), ('{{ messages.__class__.__mro__ }}', 'unsafe'),
    ('{{ namespace(_x=1) }}', "the name '_x'"), ('{{ 1 / 0 }}', 'division by zero'),
    ("{{ raise_exception('Only two roles') }}", 'conversation: Only two roles')])
def test_a_template_stays_in_its_sandbox(source, message):
  with pytest.raises(UsageError, match=message):
    ChatTemplate(source, {}, 'x').render(TURN)


def test_a_broken_template_is_refused_at_once():
  with pytest.raises(UsageError, match='is not valid Jinja: unexpected'):
    ChatTemplate('{% if', {}, 'x')
  assert json.loads(ChatTemplate('{{ messages | tojson }}', {}, 'x').render(TURN)) == TURN
