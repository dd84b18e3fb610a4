"""Reads pairs of a chosen and a rejected answer from records.

A record has `chosen` and `rejected`, each a string or a list of messages (chats.py), and `prompt`:

  prompt a string, answers strings       the prompt and each answer become one message each
  prompt messages, answers messages      each answer follows the prompt
  answers messages                       the messages that both begin with are the prompt; a prompt
                                         that is a string, or that both repeat, is ignored

The assistant's answers in the prompt are not learned: they are the same in both conversations.
"""

from collections.abc import Collection, Mapping
from typing import Any

from btx_jax.data import chats, records
from btx_jax.data.chat_template import ChatTemplate
from btx_jax.data.chats import Unfit
from btx_jax.data.records import Fields, Part, Reader

# Why a record is unusable.
NO_PAIR, EQUAL = 'has no pair of answers', 'has equal answers'

Messages = list[dict[str, Any]]


def reader(template: ChatTemplate, special: Collection[str]) -> Reader:
  """Returns a function that makes a document of a record that is a pair: `parts` and `rejected`.

  Args:
    template: renders them.
    special: the names of the tokenizer's special tokens.
  """
  def render(record: Mapping[str, Any], fields: Fields) -> list[list[Part]]:
    del fields
    both = [chats.parts(template, found, special) for found in messages(record)]
    chosen, rejected = ([part.text for part in parts if part.is_answer] for parts in both)
    if not (chosen and rejected):
      raise Unfit(chats.NO_ANSWER, ' to learn: the template rewrites it')
    if chosen == rejected:
      raise Unfit(EQUAL)
    return both

  return chats.reader_of(render)


def messages(record: Mapping[str, Any]) -> tuple[Messages, Messages]:
  """The conversations with the chosen and the rejected answer, each up to its last answer.

  Args:
    record: see the top of this file.

  Returns:
    two lists of messages; answers in the prompt, with which both begin, have `weight` 0.

  Raises:
    Unfit: the record cannot be trained on as a pair.
  """
  given = [record.get(name) for name in ('chosen', 'rejected')]
  prompt = record.get('prompt')
  if not all(isinstance(each, list | str) and each for each in given):
    raise Unfit(NO_PAIR, f" in 'chosen' and 'rejected'; {records.names_of(record)}")
  are_texts = [isinstance(each, str) for each in given]
  if any(are_texts) != all(are_texts):
    raise Unfit(NO_PAIR, ': one is a string and the other a list')
  if all(are_texts) and not prompt:
    raise Unfit(NO_PAIR, " with its 'prompt', which answers that are texts need")
  shared = chats.turn(chats.USER, prompt) if all(are_texts) or isinstance(prompt, list) else []
  before = [chats.message(each) for each in shared]
  after = [[chats.message(each) for each in chats.turn(chats.ASSISTANT, answer)]
           for answer in given]
  if before and all(answer[:len(before)] == before for answer in after):
    before = []  # they repeat it
  if not before:
    common = next((i for i, (a, b) in enumerate(zip(*after)) if a != b), min(map(len, after)))
    before, after = after[0][:common], [answer[common:] for answer in after]
    if not any(after):
      raise Unfit(EQUAL)
  for answer in after:
    if answer and answer[0]['role'] != chats.ASSISTANT:
      raise Unfit(NO_PAIR, f": after what both begin with, one goes on as {answer[0]['role']!r}")
  read = [each | {'weight': 0} if each['role'] == chats.ASSISTANT else each for each in before]
  chosen, rejected = (read + chats.to_last_answer(answer) for answer in after)
  if chosen == rejected:
    raise Unfit(EQUAL)
  return chosen, rejected
