"""Chat templates render a conversation as one text, as transformers' apply_chat_template does.

A template is a Jinja program that comes with a tokenizer, or one of NAMED. It runs in a sandbox
(sandbox.py), and reads the messages and the names of the tokenizer's special tokens.
"""

from collections.abc import Mapping, Sequence
import hashlib
import json
from typing import Any

from btx_jax.data import framing
from btx_jax.errors import UsageError, nearest

FILE = 'chat_template.jinja'

_CHATML = """\
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""
_LLAMA_3 = """\
{{- '<|begin_of_text|>' -}}
{%- for message in messages -%}
  {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'
      + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
"""
# Templates by name, for tokenizers that have none, and the special tokens that each writes.
NAMED = {
    'chatml': (_CHATML, ('<|im_start|>', '<|im_end|>')),
    'llama3': (_LLAMA_3, ('<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>',
                          '<|eot_id|>')),
}

# A message has the keys 'role' and 'content', both strings; templates may read others.
Message = Mapping[str, Any]


class ChatTemplate:
  """A template that is ready to render.

  Attributes:
    source: the Jinja program.
    hash: identifies the template and the special tokens that it may write.

  Example:
    >>> template = ChatTemplate(NAMED['chatml'][0], {}, 'chatml')
    >>> template.render([{'role': 'user', 'content': 'Hi'}], add_generation_prompt=True)
    '<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n'
  """

  def __init__(self, source: str, special: Mapping[str, str], where: str):
    """
    Args:
      source: the Jinja program.
      special: the names of special tokens by role, like 'eos_token'.
      where: where the template comes from, for messages.

    Raises:
      UsageError: it is not a template.
    """
    self.source, self._special, self._where = source, dict(special), where
    identity = json.dumps([source, sorted(self._special.items())])
    self.hash = hashlib.sha256(identity.encode()).hexdigest()[:16]
    from btx_jax.data import sandbox  # imported late: status and other commands need no jinja2
    self._write = sandbox.write
    try:
      self._template = sandbox.compile_template(source)
    except Exception as error:  # not only syntax errors: constant expressions are evaluated
      raise UsageError(f'The chat template of {where} is not valid Jinja: {error}. Repair it, or '
                       'name another in tokenizer.chat_template: '
                       f'{", ".join(NAMED)}.') from error

  def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """The text of a conversation.

    Args:
      messages: the messages in order. Keys whose value is None are dropped.
      add_generation_prompt: whether to add the text that precedes an answer, so that a model
        writes one.

    Raises:
      UsageError: the template fails on these messages, rejects them, or writes too much.
    """
    plain = [{key: value for key, value in message.items() if value is not None}
             for message in messages]
    values = {**self._special, 'messages': plain, 'tools': None, 'documents': None,
              'add_generation_prompt': add_generation_prompt}
    try:
      return self._write(self._template, values)
    except Exception as error:  # a template can raise any error
      raise UsageError(f'The chat template of {self._where} fails on this conversation: '
                       f'{str(error) or type(error).__name__}') from error


def check_name(name: str) -> None:
  """Raises UsageError unless `name`, of the config field tokenizer.chat_template, is '' or known.
  """
  if name and name not in NAMED:
    raise UsageError(f'tokenizer.chat_template = {name!r} is not a template; '
                     f"{nearest(name, NAMED)} '' is the tokenizer's own, in {FILE} beside it.")


def of_tokenizer(files: Mapping[str, bytes], name: str, vocabulary: Mapping[str, int], path: str
                 ) -> ChatTemplate:
  """The chat template of a tokenizer.

  Args:
    files: the tokenizer's files by name. Its own template is chat_template.jinja, or
      `chat_template` in tokenizer_config.json or chat_template.json: a string, or a list of named
      templates, of which 'default' is used.
    name: the name of a template in NAMED to use instead; '' for the tokenizer's own.
    vocabulary: the id of each token by name.
    path: the path of the tokenizer, for messages.

  Raises:
    UsageError: there is no such template, or the tokenizer lacks its tokens.
  """
  special = framing.named(files)
  if not name:
    source = own_source(files)
    if source is None:
      raise UsageError(f'{path} has no chat template. Set tokenizer.chat_template to one of '
                       f'{", ".join(NAMED)}, or put a {FILE} beside the tokenizer.')
    return ChatTemplate(source, special, path)
  check_name(name)
  source, tokens = NAMED[name]
  if missing := [token for token in tokens if token not in vocabulary]:
    raise UsageError(f'tokenizer.chat_template = {name!r} writes {", ".join(missing)}, which '
                     f'{path} does not have as tokens; use another template, or put a {FILE} '
                     'beside the tokenizer that writes tokens it has.')
  return ChatTemplate(source, special, f'tokenizer.chat_template = {name!r}')


def own_source(files: Mapping[str, bytes]) -> str | None:
  """The template in a tokenizer's files, see of_tokenizer; None if there is none.

  Raises:
    UsageError: it is not UTF-8 text.
  """
  if FILE in files:
    try:
      return files[FILE].decode('utf-8')
    except UnicodeDecodeError as error:
      raise UsageError(f'{FILE} is not UTF-8 text: {error}. Save it as UTF-8.') from error
  for name in ('chat_template.json', framing.NAMING[0]):
    found = framing.read_json(files.get(name, b'')).get('chat_template')
    if isinstance(found, list):
      found = {each.get('name'): each.get('template') for each in found if isinstance(each, dict)
               }.get('default')
    if isinstance(found, str):
      return found
  return None
