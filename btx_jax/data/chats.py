"""Reads conversations from records, and finds the answers in their rendered text.

A record has one of these sets of fields:

  messages             messages with role, and content: a string or a list of {type: 'text', text}
  conversations        the same, or messages with from ('human', 'gpt') and value
  prompt, completion   strings, or lists of messages
  instruction, output  strings; input, if not empty, is appended to the instruction

When a model answers, it reads a conversation up to the template's generation prompt, and writes the
answer and the token that ends the turn. So the rendered text is cut there, and each part is encoded
by itself (chat_tokens.py): training and generation see the same ids.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
import re
from typing import Any

from btx_jax.data import records
from btx_jax.data.chat_template import ChatTemplate, Message
from btx_jax.data.records import Document, Fields, Part, Reader, Unusable
from btx_jax.errors import UsageError

SYSTEM, USER, ASSISTANT = ROLES = ('system', 'user', 'assistant')
_ROLE_OF = {'human': USER, 'gpt': ASSISTANT}  # other names
_OF_TOOLS = ('tool_calls', 'function_call', 'tools', 'functions')

# Why a record is unusable.
NO_MESSAGES, NO_ANSWER = 'has no conversation', 'has no answer of the assistant'
EMPTY_ANSWER, NOT_TEXT = 'has an empty answer', 'has a message that is not text'
ROLE, TOOLS = 'has a role other than system, user and assistant', 'uses tools'
REFUSED = 'is rejected by the chat template'


class Unfit(Exception):
  """A record that cannot be trained on as a conversation: the reason, and details."""

  def __init__(self, reason: str, detail: str = ''):
    super().__init__(reason, detail)
    self.reason, self.detail = reason, detail


def reader(template: ChatTemplate, special: Collection[str]) -> Reader:
  """Returns a function that makes a document of a record that is a conversation.

  Args:
    template: renders them.
    special: the names of the tokenizer's special tokens.
  """
  def render(record: Mapping[str, Any], fields: Fields) -> list[list[Part]]:
    rendered = parts(template, messages(record, fields.text), special)
    if not any(part.is_answer for part in rendered):
      raise Unfit(NO_ANSWER, ' to learn: the template rewrites it, or its weight is 0')
    return [rendered]

  return reader_of(render)


def reader_of(render: Callable[[Mapping[str, Any], Fields], Sequence[Sequence[Part]]]) -> Reader:
  """Returns a function that makes a document of a record that is one or two conversations.

  Args:
    render: the parts of each conversation of a record. It may raise Unfit, or the UsageError of a
      chat template that fails.
  """
  def read(record: Mapping[str, Any], place: str, fields: Fields) -> Document | Unusable:
    try:
      rendered = render(record, fields)
    except Unfit as unfit:
      return Unusable(place, unfit.reason, unfit.detail)
    except UsageError as error:
      return Unusable(place, REFUSED, f': {error}')
    text = ''.join(part.text for conversation in rendered for part in conversation)
    try:
      text.encode('utf-8')
    except UnicodeEncodeError:
      return Unusable(place, records.SURROGATE)
    return Document(text, records.id_of(record, fields), place, *map(tuple, rendered))

  return read


def messages(record: Mapping[str, Any], field: str = 'text') -> list[dict[str, Any]]:
  """The messages of a record, up to the last answer.

  Args:
    record: see the top of this file.
    field: the field with the messages. 'text', the default of text_field, means the usual ones.

  Returns:
    `role` and `content` of each message, and `weight` if it is 0.

  Raises:
    Unfit: the record cannot be trained on as a conversation.
  """
  if any(record.get(key) for key in _OF_TOOLS):
    raise Unfit(TOOLS)
  return to_last_answer([message(each) for each in _listed(record, field)])


def to_last_answer(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Messages up to the last answer. Raises Unfit if there is none, or if an answer is empty."""
  last = max((i for i, each in enumerate(found) if each['role'] == ASSISTANT), default=None)
  if last is None:
    raise Unfit(NO_ANSWER)
  if any(each['role'] == ASSISTANT and not each['content'].strip() for each in found):
    raise Unfit(EMPTY_ANSWER)
  return found[:last + 1]


def _listed(record: Mapping[str, Any], field: str) -> list:
  """The messages in the form that the record has."""
  names = ('messages', 'conversations') if field == 'text' else (field,)
  for name in names:
    if isinstance(record.get(name), list) and record[name]:
      return record[name]
  if field == 'text' and record.get('prompt') and record.get('completion'):
    return [*turn(USER, record['prompt']), *turn(ASSISTANT, record['completion'])]
  if field == 'text' and record.get('instruction') and 'output' in record:
    asked = [record['instruction'], record.get('input')]
    if not all(isinstance(each, str) for each in asked if each):
      raise Unfit(NOT_TEXT, ' (instruction, input)')
    return [{'role': USER, 'content': '\n\n'.join(filter(None, asked))},
            {'role': ASSISTANT, 'content': record['output']}]
  raise Unfit(NO_MESSAGES, f' in {" or ".join(map(repr, names))}; {records.names_of(record)}')


def turn(role: str, given: Any) -> list:
  """Makes a string a message of this role; returns a list of messages unchanged."""
  return given if isinstance(given, list) else [{'role': role, 'content': given}]


def message(given: Any) -> dict[str, Any]:
  """A message in the form that templates read. Raises Unfit if it is not a message."""
  if not isinstance(given, Mapping):
    raise Unfit(NOT_TEXT, f': {str(given)[:60]!r}')
  role = given.get('role') or given.get('from')
  role = _ROLE_OF.get(role, role) if isinstance(role, str) else role
  if role in ('tool', 'function') or any(given.get(key) for key in _OF_TOOLS):
    raise Unfit(TOOLS)
  if role not in ROLES:
    raise Unfit(ROLE, f': {role!r}')
  content = given.get('content', given.get('value'))
  if isinstance(content, list):
    texts = [part.get('text') if isinstance(part, Mapping) and part.get('type', 'text') == 'text'
             else None for part in content]
    content = None if None in texts else ''.join(map(str, texts))
  if content is None and role == ASSISTANT:
    content = ''
  if not isinstance(content, str):
    raise Unfit(NOT_TEXT, f' ({role})')
  weight = {'weight': 0} if given.get('weight') == 0 else {}
  return {'role': role, 'content': content} | weight


def parts(template: ChatTemplate, messages: Sequence[Message], special: Collection[str]
          ) -> list[Part]:
  """Cuts a rendered conversation into parts, whose concatenation is the rendered text.

  An answer is the text after the generation prompt, up to the special token that ends the turn, or
  to the end of its content if the template writes no such token. Answers that the template rewrites
  (some drop the reasoning of earlier turns) and answers with `weight` 0 are not marked as answers;
  they belong to the text between.

  Args:
    template: renders the conversation.
    messages: the messages of the conversation.
    special: the names of the tokenizer's special tokens.

  Raises:
    UsageError: the template fails, or an answer does not follow its generation prompt.
  """
  return _parts(template, messages, special, template.render(messages))


def prompt(template: ChatTemplate, messages: Sequence[Message], special: Collection[str]
           ) -> list[Part]:
  """The parts of a conversation and of the generation prompt, for a model to answer."""
  return _parts(template, messages, special, template.render(messages, add_generation_prompt=True))


def turn_end(template: ChatTemplate, special: Collection[str]) -> str:
  """The special token that ends an assistant's turn; '' if the template writes none."""
  found = parts(template, [{'role': USER, 'content': 'a'}, {'role': ASSISTANT, 'content': 'b'}],
                special)
  return next((part.end for part in found if part.is_answer), '')


def _parts(template: ChatTemplate, messages: Sequence[Message], special: Collection[str],
           whole: str) -> list[Part]:
  """The parts of `whole`, the rendered messages."""
  names = '|'.join(map(re.escape, special)) or r'(?!)'
  turn_ends, tail = re.compile(rf'\s*({names})'), re.compile(rf'(\s*({names}))*\s*\Z')
  result, at = [], 0
  for i, message in enumerate(messages):
    if message['role'] != ASSISTANT:
      continue
    before = template.render(messages[:i], add_generation_prompt=True)
    if not before:
      continue  # there is no token from which to predict its first token
    if not whole.startswith(before) or len(before) < at:
      raise UsageError('The chat template does not write its generation prompt before an answer.')
    content, first = message['content'].strip(), len(before)
    while whole[first:first + 1].isspace():
      first += 1
    if not whole.startswith(content, first):  # text precedes it, perhaps only in the last turn
      turn = template.render(messages[:i + 1])
      found = tail.search(turn, len(before))
      stop = found.start() if found else 0
      if not (turn[:stop].endswith(content) and whole.startswith(turn[:stop])):
        continue
      first = stop - len(content)
    if message.get('weight') == 0:
      continue
    stop = first + len(content)
    end = turn_ends.match(whole, stop)
    result.append(Part(whole[at:len(before)]))
    at = end.end() if end else stop
    result.append(Part(whole[len(before):at], True, end.group(1) if end else ''))
  return [*result, Part(whole[at:])] if whole[at:] else result
