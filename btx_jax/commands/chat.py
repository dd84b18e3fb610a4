"""A conversation with a model, turn by turn: `generate --chat` without prompts."""

from collections.abc import Callable, Iterable, Sequence
import json

import numpy as np

from btx_jax import terminal
from btx_jax.commands import prompts
from btx_jax.data.chats import ASSISTANT
from btx_jax.generation.generate import Generator, TooLong
from btx_jax.generation.settings import Sampling
from btx_jax.generation.texts import LENGTH

RESET = '/reset'


def converse(write: Generator, lines: Iterable[str], system: str, max_new_tokens: int,
             sampling: Sampling, stop: Sequence[str], seed: int,
             show: Callable[[str, np.ndarray], None], as_json: bool) -> None:
  """Answers each line as a turn of the user; the model reads all turns before it.

  Args:
    write: the model.
    lines: the user's turns; RESET begins a new conversation.
    system: the system message of each conversation; '' for none.
    max_new_tokens, sampling, stop: as in Generator, for each answer.
    seed: the random seed of the first answer; it increases by one with each answer.
    show: prints a part of an answer, given the shares of the experts [E].
    as_json: whether to print, after each answer, only the conversation as a line of JSON.
  """
  terminal.console.print(f'{RESET} begins a new conversation, Ctrl-D exits.', soft_wrap=True)
  messages, answers = (), 0
  for line in lines:
    if line.strip() == RESET:
      messages = ()
      continue
    prompt = prompts.turn(line, system, messages)

    def on_text(prompt: int, number: int, new: str, shares_E: np.ndarray):
      del prompt, number
      if not as_json:
        show(new, shares_E)

    try:
      (answer,), = write([prompt.messages], max_new_tokens, sampling, stop, seed + answers,
                         on_text=on_text)
    except TooLong as error:
      terminal.console.print(
          f'The conversation does not fit: it has {error.length:,} tokens with this turn, and the '
          f'model has {write.context:,} positions. Enter a shorter turn, or {RESET} to begin a new '
          'conversation.', soft_wrap=True)
      continue
    messages, answers = (*prompt.messages, {'role': ASSISTANT, 'content': answer.text}), answers + 1
    if as_json:
      print(json.dumps({'messages': messages}, ensure_ascii=False), flush=True)
    else:
      terminal.console.print()
    if answer.ended == LENGTH and len(answer.ids) < max_new_tokens:
      terminal.console.print(
          f'The answer was cut off: the conversation fills the {write.context:,} positions of the '
          f'model. {RESET} begins a new conversation.', soft_wrap=True)
