"""The command `generate`: continues prompts with a run of a study or a pretrained model."""

from collections.abc import Iterable, Mapping, Sequence
import contextlib
import dataclasses
import json
import sys
from typing import NamedTuple

import numpy as np
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text

from btx_jax import terminal
from btx_jax.commands import chat, exported, generators, models
from btx_jax.commands.prompts import Prompt
from btx_jax.data import chat_template, chat_tokens, text
from btx_jax.data.tokenizer import Sentencepiece
from btx_jax.errors import UsageError
from btx_jax.generation.generate import Generator
from btx_jax.generation.settings import Sampling
from btx_jax.generation.texts import Completion
from btx_jax.run import Run
from btx_jax.selector import Linear
from btx_jax.study import sources
from btx_jax.study.study import Study

# The colours of experts, in order; they repeat.
_COLOURS = ('cyan', 'yellow', 'green', 'magenta', 'blue', 'red')
# A terminal obeys these; a model may write them.
_CONTROL = {code: '\ufffd' for code in (*range(32), *range(127, 160)) if chr(code) not in '\t\n\r'}


class Asked(NamedTuple):
  """The texts to generate, and how to generate them.

  Attributes:
    prompts: the prompts; if there are none, each line of the standard input is one.
    chat: whether lines of the standard input are turns of a conversation.
    system: the system message of that conversation; '' for none.
    chat_template: the name of a chat template for a model in a folder; '' for its tokenizer's own.
      A run's template is in its config.
    max_new_tokens, sampling, stop, seed, n: as in Generator.
    step: the step of the run to use; 0 is its end.
    colours: whether each token gets the colour of the expert that contributed most.
    dtype: the type of the weights; '' means that of the model.
  """
  prompts: Sequence[Prompt]
  chat: bool = False
  system: str = ''
  chat_template: str = ''
  max_new_tokens: int = 256
  sampling: Sampling = Sampling()
  stop: Sequence[str] = ()
  seed: int = 0
  n: int = 1
  step: int = 0
  colours: bool = False
  dtype: str = ''


def print_texts(study: Study | None, run_name: str, folder: str, asked: Asked, as_json: bool
                ) -> None:
  """Generates texts and prints them.

  Args:
    study: the study of the run; None if there is no config, and then `folder` is given.
    run_name: the run that generates; '' if a folder does.
    folder: a pretrained model in Hugging Face's format, or an exported ensemble; '' if a run
      generates.
    asked: the prompts and settings.
    as_json: whether to print a line of JSON for each prompt; everything else then goes to stderr.

  Raises:
    UsageError: there is no such run, step or folder; the run is not complete; or a prompt cannot be
      continued.
  """
  terminal.console.stderr = as_json
  chats = asked.chat or any(prompt.messages for prompt in asked.prompts)
  columns_DE = None
  if folder and exported.is_ensemble(folder):
    opened, whole, columns_DE = exported.opened(folder, asked.chat_template)
  else:
    opened, whole = models.opened(study, run_name, folder, chat_template=asked.chat_template,
                                  chats=chats)
  run = _run(opened, whole, asked)
  if chats:
    _check_chats(opened)
  with contextlib.ExitStack() as stack:
    write = generators.open_generator(opened, run, asked.dtype, stack, columns_DE)
    names = run.expert_names if asked.colours else ()
    if names:
      terminal.console.print(_legend(run, names))
    if asked.prompts:
      _print(write, asked.prompts, asked, names, as_json)
    elif asked.chat:
      chat.converse(write, _lines(), asked.system, asked.max_new_tokens, asked.sampling, asked.stop,
                    asked.seed, lambda new, shares_E: _show(_piece(new, shares_E, names)), as_json)
    else:
      for line in _lines():
        _print(write, [Prompt(line)], asked, names, as_json)


def _run(study: Study, run: Run, asked: Asked) -> Run:
  """The run, or its first steps. Raises UsageError if it cannot generate text."""
  if asked.colours and not run.expert_names:
    raise UsageError(f'{run.name!r} is a dense model; --experts colours the text of a mixture or '
                     'an ensemble.')
  if not asked.step:
    models.check_readable(study, run, 'generate')
    return run
  kept = sources.kept(study, run)
  if asked.step not in kept:
    raise UsageError(f'--step={asked.step} of {run.name!r} is not kept. Kept steps: '
                     f'{", ".join(map(str, kept)) or "none"}.')
  return run.first(asked.step)


def _check_chats(study: Study) -> None:
  """Raises UsageError unless the tokenizer can render conversations; see chat_template.py."""
  tokenizer, name = text.tokenizer(study.config, study.data_folder), study.config.tokenizer
  if not (isinstance(tokenizer, Sentencepiece) or name.chat_template
          or chat_template.own_source(tokenizer.files)):
    raise UsageError('The tokenizer has no chat template. Name one, as in --chat_template=chatml '
                     f'(valid: {", ".join(chat_template.NAMED)}), or put a {chat_template.FILE} '
                     'beside the tokenizer.')
  chat_tokens.stop_id(tokenizer)


def _lines() -> Iterable[str]:
  """The lines of the standard input, as prompts; on a terminal, asks for each."""
  if not sys.stdin.isatty():
    yield from (line for line in sys.stdin.read().splitlines() if line)
    return
  with contextlib.suppress(EOFError):
    while True:
      yield terminal.console.input('> ')
  terminal.console.print()


def _print(write: Generator, prompts: Sequence[Prompt], asked: Asked, names: Sequence[str],
           as_json: bool):
  """Generates and prints texts for prompts; a single text is printed as it grows."""
  pieces: dict[tuple[int, int], list[Segment]] = {}
  single = len(prompts) == asked.n == 1 and not as_json

  def on_text(prompt: int, number: int, new: str, shares_E):
    piece = _piece(new, shares_E, names)
    if single:
      _show(piece)
    pieces.setdefault((prompt, number), []).append(piece)

  if single:
    _show(Segment(prompts[0].shown()))
  found = write([prompt.for_model() for prompt in prompts], asked.max_new_tokens, asked.sampling,
                asked.stop, asked.seed, asked.n, on_text)
  for i, (prompt, texts) in enumerate(zip(prompts, found)):
    if as_json:
      print(json.dumps(_as_data(prompt, texts), ensure_ascii=False), flush=True)
    for j in () if as_json or single else range(asked.n):
      _show(Segment(prompt.shown()), *pieces[i, j], Segment('\n\n'))
  if single:
    terminal.console.print()


def _piece(new: str, shares_E: np.ndarray, names: Sequence[str]) -> Segment:
  """Colours a piece of text by the expert that contributed most; without names, it has no colour.
  """
  colour = _COLOURS[int(shares_E.argmax()) % len(_COLOURS)] if names else ''
  return Segment(new, Style.parse(colour) if colour else None)


def _show(*pieces: Segment):
  """Prints text as it is, but no control characters on a terminal. As a Text, its tabs would become
  spaces."""
  if terminal.console.is_terminal:
    pieces = tuple(piece._replace(text=piece.text.translate(_CONTROL)) for piece in pieces)
  terminal.console.print(Segments(pieces), end='', soft_wrap=True)
  sys.stdout.flush()


def _as_data(prompt: Prompt, texts: Sequence[Completion]) -> Mapping:
  return {**prompt.as_data(), 'texts': [dataclasses.asdict(each) for each in texts]}


def _legend(run: Run, names: Sequence[str]) -> Text:
  shown = ('the expert with the largest mean gate' if run.selector is None else
           'the expert that was chosen' if isinstance(run.selector, Linear) else
           'the expert with the largest weight')
  return Text.assemble(f'{shown}: ', *(
      (f'{name}  ', _COLOURS[i % len(_COLOURS)]) for i, name in enumerate(names)))
