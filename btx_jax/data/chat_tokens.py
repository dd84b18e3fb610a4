"""Encodes conversations as token ids, and marks those that a model is to write.

The parts of a conversation (chats.py) are encoded one by one, in training and for generation.
"""

from collections.abc import Sequence
import itertools
from typing import NamedTuple

import numpy as np

from btx_jax.data import chats
from btx_jax.data.chat_template import Message
from btx_jax.data.chats import Part
from btx_jax.data.tokenizer import Tokenizer

# The role of a token: read only; to be written; or to be written as the end of a turn, which bits
# per byte leave out.
READ, WRITTEN, TURN_END = range(3)
# A pair is stored as one document: the conversation with the chosen answer, then the one with the
# rejected answer. This is added to the roles of the latter's tokens.
REJECTED = 3


class Encoded(NamedTuple):
  """A conversation.

  Attributes:
    ids: [tokens], without added begin and end marks: the template writes its own.
    roles: [tokens] uint8, READ, WRITTEN or TURN_END.
  """
  ids: list[int]
  roles: np.ndarray


def encode(tokenizer: Tokenizer, conversations: Sequence[Sequence[Part]]) -> list[Encoded]:
  """Encodes conversations, each given as its parts, part by part."""
  flat = list(itertools.chain.from_iterable(conversations))
  begins = {0, *itertools.accumulate(map(len, conversations))}
  found: dict[int, list[int]] = {}
  for goes_on in (False, True):
    chosen = [i for i in range(len(flat)) if (i not in begins) == goes_on]
    found |= zip(chosen, tokenizer.encode_chat([flat[i].text for i in chosen], goes_on))
  result, at = [], 0
  for conversation in conversations:
    ids, roles = [], []
    for part in conversation:
      new = found[at]
      ids += new
      roles += [WRITTEN if part.is_answer else READ] * len(new)
      if part.end:
        roles[-1] = TURN_END
      at += 1
    result.append(Encoded(ids, np.array(roles, np.uint8)))
  return result


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
  """The ids of a conversation and the generation prompt, for a model to answer.

  Args:
    tokenizer: encodes the text, and has the template.
    messages: the messages of the conversation; their content is a string.

  Raises:
    UsageError: the tokenizer has no chat template, or the template fails.
  """
  parts = chats.prompt(tokenizer.chat_template, messages, tokenizer.special)
  return encode(tokenizer, [parts])[0].ids


def stop_id(tokenizer: Tokenizer) -> int | None:
  """The id of the token that ends an assistant's turn; None if the template writes none.

  Raises:
    UsageError: the tokenizer has no chat template, or the template fails.
  """
  name = chats.turn_end(tokenizer.chat_template, tokenizer.special)
  return tokenizer.vocabulary()[name] if name else None
