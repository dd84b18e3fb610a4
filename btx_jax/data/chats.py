"""Conversations: messages, and the parts of their rendered text that a model is to write.

A model reads a conversation up to the generation prompt of the template, and writes the answer and
the token that ends its turn. So the rendered text is cut there, and each part is encoded by itself
(chat_tokens.py): training sees the ids that generation sees.
"""

from collections.abc import Collection, Sequence
import re
from typing import NamedTuple

from btx_jax.data.chat_template import ChatTemplate, Message
from btx_jax.errors import UsageError

SYSTEM, USER, ASSISTANT = ROLES = ('system', 'user', 'assistant')


class Part(NamedTuple):
  """A part of a rendered conversation.

  Attributes:
    text: of it.
    is_answer: whether a model is to write it.
    end: the special token at the end of `text` that ends the turn; '' if there is none.
  """
  text: str
  is_answer: bool = False
  end: str = ''


def parts(template: ChatTemplate, messages: Sequence[Message], special: Collection[str]
          ) -> list[Part]:
  """The rendered conversation in parts, which join to it.

  An answer is what follows the generation prompt, up to the special token that ends its turn, or
  to the end of its content if the template writes none there. Answers that the template rewrites
  (some drop the reasoning of earlier turns), and those of `weight` 0, are not answers here, and
  belong to the text between.

  Args:
    template: renders it.
    messages: of the conversation.
    special: the names of the tokenizer's special tokens.

  Raises:
    UsageError: the template fails, or writes an answer in another way than it prompts for one.
  """
  return _parts(template, messages, special, template.render(messages))


def prompt(template: ChatTemplate, messages: Sequence[Message], special: Collection[str]
           ) -> list[Part]:
  """The parts of a conversation and of the generation prompt, for a model to go on from."""
  return _parts(template, messages, special, template.render(messages, add_generation_prompt=True))


def turn_end(template: ChatTemplate, special: Collection[str]) -> str:
  """The special token that ends a turn of the assistant; '' if the template writes none."""
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
    if not whole.startswith(before) or len(before) < at:
      raise UsageError('The chat template writes an answer in another way than it prompts for one.')
    content, first = message['content'].strip(), len(before)
    while whole[first:first + 1].isspace():
      first += 1
    if not whole.startswith(content, first):  # something stands before it, perhaps only at the end
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
