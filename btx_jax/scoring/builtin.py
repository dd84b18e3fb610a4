"""The built-in tasks: questions about the demo's text, in two forms.

  arithmetic, factbook         the text generated greedily must equal the answer
  code                         the line must parse with the end generated greedily; lines that a
                               number would complete are left out
  arithmetic_choice, ...       the right one of four answers must be the likeliest per byte

Small models fail nearly all questions of the first form; the second form shows what they know. A
choice needs only the likelihood of tokens, so the programs that measure bits per byte compute it,
also for ensembles, on meshes and on several processes.
"""

from collections.abc import Callable, Mapping, Sequence
import difflib
import importlib.util
import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from btx_jax.data import domains, questions
from btx_jax.data.questions import Question
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.data.tokens import Tokens
from btx_jax.errors import UsageError, nearest

_CHOICE = '_choice'
_SUBJECTS = ('arithmetic', 'factbook', 'code')
NAMES = tuple(f'{subject}{form}' for form in ('', _CHOICE) for subject in _SUBJECTS)
_VERSION = 1  # raise it when questions or scoring change: stored scores are then computed again
MAX_NEW_TOKENS = 64

# (prompts, the most new tokens) -> the text generated greedily for each, up to the end of a line.
Write = Callable[[Sequence[str], int], list[str]]


def check(names: Sequence[str], where: str) -> None:
  """Checks the tasks that a config or a flag names. Names that are not built in are the harness's.

  Args:
    names: the tasks.
    where: the field or flag that names them.

  Raises:
    UsageError: a built-in task needs a package that is not installed; or the harness is not
      installed, and a name resembles that of a built-in task.
  """
  for name in own(names):
    questions.version(_subject(name))
  for name in others(names) if importlib.util.find_spec('lm_eval') is None else ():
    if difflib.get_close_matches(name, NAMES, cutoff=0.8):
      raise UsageError(f'{where}: {name!r} is not a built-in task; {nearest(name, NAMES)} Tasks of '
                       "lm-evaluation-harness need pip install 'btx_jax[eval]'.")


def own(names: Sequence[str]) -> list[str]:
  """The names of built-in tasks among `names`, without duplicates."""
  return [name for name in dict.fromkeys(names) if name in NAMES]


def others(names: Sequence[str]) -> tuple[str, ...]:
  """The names among `names` that are not built in."""
  return tuple(name for name in names if name not in NAMES)


def is_generated(name: str) -> bool:
  """Whether a task needs generated text, not only the likelihood of tokens."""
  return not name.endswith(_CHOICE)


def made_from(name: str, config) -> dict[str, Any]:
  """Everything that determines the questions of a task, as plain data."""
  subject = _subject(name)
  held_out = {'held_out': _held_out(subject, config)} if questions.source(subject) else {}
  return {'version': _VERSION, 'source': questions.version(subject), **held_out}


def of_task(name: str, config) -> tuple[Question, ...]:
  """The questions of a task.

  Args:
    name: one of NAMES.
    config: the study's; its held-out share determines the documents that are asked about.
  """
  subject = _subject(name)
  found = questions.of_subject(subject, _held_out(subject, config))
  if subject == 'code' and is_generated(name):
    return tuple(question for question in found if not questions.parses(f'{question.line} 0'))
  return found


class Choices(NamedTuple):
  """The answers to choose from, as documents to measure.

  Attributes:
    tokens: a document for each answer, with the prompt before it; see `pack`.
    ends, sizes, bytes: for each answer, where it ends in `tokens`, and its number of tokens and of
      bytes.
  """
  tokens: Tokens
  ends: list[int]
  sizes: list[int]
  bytes: list[int]


def generated(found: Sequence[Question], write: Write) -> dict[str, Any]:
  """Scores generated answers; see `summary`."""
  texts = write([question.long_prompt for question in found], MAX_NEW_TOKENS)
  return summary(found, [_is_right(question, text) for question, text in zip(found, texts)], 0.0)


def choices(found: Sequence[Question], tokenizer: Tokenizer, length: int, stride: int = 0
            ) -> Choices:
  """The answers to choose from: for each question the right one, then the wrong ones.

  Args:
    found: the questions.
    tokenizer: the model's tokenizer.
    length, stride: of the windows that will be read, see bits.evaluate.
  """
  documents, sizes, bytes_of = [], [], []
  begin = [tokenizer.framing.begin.id] if tokenizer.framing.begin else []
  for question in found:
    prompt = tokenizer.encode([question.prompt])[0]
    for answer in (question.answer, *question.wrong):
      ids = tokenizer.encode([f'{question.prompt}{answer}\n'])[0]
      same = next((i for i, (a, b) in enumerate(zip(prompt, ids)) if a != b), len(prompt))
      documents.append([*begin, *ids][-length:])
      # Nothing predicts the first token of a document.
      sizes.append(min(len(ids) - same, len(documents[-1]) - 1))
      bytes_of.append(len(f'{answer}\n'.encode()))
  return Choices(*pack(documents, length, stride), sizes, bytes_of)


def chosen(found: Sequence[Question], answers: Choices, nll_N: np.ndarray) -> dict[str, Any]:
  """Scores choices; see `summary`.

  Args:
    found: the questions.
    answers: as returned by `choices`.
    nll_N: negative log likelihood of each of their tokens.
  """
  nll_D = np.array([nll_N[end - size:end].sum() for end, size in zip(answers.ends, answers.sizes)])
  likeliest = (nll_D / np.array(answers.bytes)).reshape(len(found), -1).argmin(1)
  return summary(found, (likeliest == 0).tolist(), 1 / (1 + questions.WRONG))


def pack(documents: Sequence[Sequence[int]], length: int, stride: int = 0
         ) -> tuple[Tokens, list[int]]:
  """Concatenates documents so that each lies within one window, with all its tokens as context.

  Args:
    documents: the ids of each document, at most `length`.
    length, stride: those of the windows, see bits.evaluate.

  Returns:
    the documents, with filler tokens in the gaps between them; and where each document ends.
  """
  ids: list[int] = []
  starts, ends = [], []
  for document in documents:
    start = len(ids)
    while (first := _window(start + len(document) - 2, length, stride)) > start:
      start = first
    if start > len(ids):
      starts.append(len(ids))
      ids += [documents[0][0]] * (start - len(ids))
    starts.append(start)
    ids += document
    ends.append(len(ids))
  bounds_D = np.array([*starts, len(ids)])
  return Tokens(np.array(ids), bounds_D, bounds_D, '', ends=0), ends


def summary(found: Sequence[Question], right: Sequence[bool], chance: float) -> dict[str, Any]:
  """The score of a task.

  Returns:
    `score`, the share of questions that were answered right; `error`, its binomial standard error;
    `questions`, their number; `chance`, the expected score of guessing; and `modules`: kind of
    question -> the number of right answers and of questions.
  """
  count = len(found)
  score = sum(right) / count
  by_module = sorted((question.module, bool(answer)) for question, answer in zip(found, right))
  groups = {module: [answer for _, answer in group]
            for module, group in itertools.groupby(by_module, lambda pair: pair[0])}
  return {'score': score, 'error': binomial_error(score, count), 'questions': count,
          'chance': chance,
          'modules': {module: [sum(group), len(group)] for module, group in groups.items()}}


def binomial_error(score: float, count: int) -> float:
  """The standard error of a share of `count` independent questions."""
  return math.sqrt(score * (1 - score) / count)


def mean(of_seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """The mean over seeds of what `summary` returned, with the error of a single seed.

  All seeds answer the same questions, so more seeds do not make that error smaller.
  """
  first = of_seeds[0]
  score = sum(each['score'] for each in of_seeds) / len(of_seeds)
  modules = {module: [sum(each['modules'][module][0] for each in of_seeds) / len(of_seeds), count]
             for module, (_, count) in first['modules'].items()}
  return {**first, 'score': score, 'error': binomial_error(score, first['questions']),
          'modules': modules}


def _subject(name: str) -> str:
  return name.removesuffix(_CHOICE)


def _held_out(subject: str, config) -> float:
  """The share of a subject's documents that the config holds out of training; the smallest one if
  several domains have that text."""
  shares = [domain.share(config.data.held_out) for domain in domains.from_config(config.domains)
            if domain.source == questions.source(subject) and domain.is_trained]
  return min(shares, default=config.data.held_out)


def _is_right(question: Question, text: str) -> bool:
  if question.line:
    return questions.parses(question.line + text)
  return text.strip() == question.answer.strip()


def _window(position: int, length: int, stride: int) -> int:
  """The start of the window in which a position counts; see mixture.window_starts."""
  from btx_jax.data import mixture  # late: status needs the rest of this file, and no grain
  return int(mixture.window_starts(np.array(max(position, 0)), length, stride))
