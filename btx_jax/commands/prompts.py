"""The prompts of the command `generate`: texts and conversations, from flags and files."""

from collections.abc import Iterator, Mapping, Sequence
import io
import json
from typing import Any, NamedTuple, TypeGuard

from btx_jax.data.chat_template import Message
from btx_jax.data.chats import ROLES, SYSTEM, USER
from btx_jax.errors import UsageError, nearest
from btx_jax.files import inputs

JSON_LINES = '.jsonl'
_MAX_BYTES = 100_000_000  # of a file of prompts


class Prompt(NamedTuple):
  """The input of a model: text to continue, or a conversation to answer.

  Attributes:
    text: the text; '' if this is a conversation.
    messages: the conversation; () if this is text.
  """
  text: str = ''
  messages: tuple[Message, ...] = ()

  def for_model(self) -> str | tuple[Message, ...]:
    """The prompt as a Generator takes it."""
    return self.messages or self.text

  def shown(self) -> str:
    """The text to print before the generated one."""
    return f'> {self.messages[-1]["content"]}\n' if self.messages else self.text

  def as_data(self) -> Mapping[str, Any]:
    """The prompt as it is in a file of JSON lines."""
    return {'messages': list(self.messages)} if self.messages else {'prompt': self.text}


def collect(texts: Sequence[str], path: str, chat: bool, system: str) -> list[Prompt]:
  """All prompts, in order.

  Args:
    texts: the values of --prompt.
    path: a file with further prompts, see `of_file`; '' for none.
    chat: whether each text is a turn of the user.
    system: the system message before such a turn; '' for none.

  Raises:
    UsageError: `system` has no effect, or see of_file.
  """
  if system and not chat:
    raise UsageError('--system has no effect without --chat, which makes each prompt a turn of a '
                     'conversation; add it, or omit --system.')
  found = [Prompt(text) for text in texts]
  if path:
    found += of_file(path)
  return [turn(prompt.text, system) if chat and not prompt.messages else prompt
          for prompt in found]


def turn(text: str, system: str = '', before: Sequence[Message] = ()) -> Prompt:
  """A conversation whose last turn is a user's text."""
  begin = [{'role': SYSTEM, 'content': system}] if system and not before else []
  return Prompt(messages=(*begin, *before, {'role': USER, 'content': text}))


def of_file(path: str) -> list[Prompt]:
  """The prompts of a file.

  Each non-empty line is a prompt. In a file named *.jsonl it is a JSON object with a field
  `prompt`, a string, or `messages`, a list of {"role": ..., "content": ...}.

  Raises:
    UsageError: the file cannot be read or has no prompt, or a line is not a prompt.
  """
  try:
    text = inputs.read_bytes(path, _MAX_BYTES).decode('utf-8-sig')
    lines = [(i, line.rstrip('\r\n')) for i, line in enumerate(io.StringIO(text, None), 1)
             if line.strip()]
  except (OSError, UnicodeDecodeError) as error:
    raise UsageError(f'--prompts={path} cannot be read: {error}') from error
  if not lines:
    raise UsageError(f'--prompts={path} has no prompts; every non-empty line is a prompt.')
  return list(_of_json(path, lines) if path.endswith(JSON_LINES) else
              (Prompt(line) for _, line in lines))


def _of_json(path: str, lines: Sequence[tuple[int, str]]) -> Iterator[Prompt]:
  for number, line in lines:
    where = f'--prompts={path}, line {number}'
    try:
      found = json.loads(line)
      json.dumps(found, ensure_ascii=False).encode('utf-8')  # fails on half of a surrogate pair
    except (ValueError, RecursionError) as error:
      raise UsageError(f'{where} is not JSON: {error}. If its lines are plain text, rename the '
                       f'file: only files named *{JSON_LINES} are read as JSON.') from error
    text, messages = (found.get(key) if isinstance(found, dict) else None
                      for key in ('prompt', 'messages'))
    if isinstance(text, str) and messages is None:
      yield Prompt(text)
    elif _are_messages(messages) and text is None:
      for message in messages:
        if message['role'] not in ROLES:
          raise UsageError(f'{where}: role = {message["role"]!r}; '
                           f'{nearest(message["role"], ROLES)}')
      yield Prompt(messages=tuple(messages))
    else:
      raise UsageError(f'{where} must be an object with `prompt`, a string, or `messages`, a list '
                       'of {"role": ..., "content": ...} whose values are strings.')


def _are_messages(found: Any) -> TypeGuard[list[dict[str, str]]]:
  return isinstance(found, list) and bool(found) and all(
      isinstance(message, dict) and isinstance(message.get('role'), str)
      and isinstance(message.get('content'), str) for message in found)
