"""Questions about the demo's text, for the built-in tasks (scoring/builtin.py).

  arithmetic  new problems of each module, none of which is in the text of the demo
  factbook    the end of a line of a held-out document: the value of a field
  code        the end of a line of a held-out document, cut where the beginning does not parse

With the same packages and share of held-out documents, the questions are always the same.
"""

import ast
from collections.abc import Collection, Iterator
import functools
import importlib.metadata
import platform
import random
from typing import Any, NamedTuple
import warnings

from btx_jax.data import demo, splits
from btx_jax.errors import UsageError

# Questions of each subject. Arithmetic has 8 of each module; code has more because they are short.
COUNT = {'arithmetic': 136, 'factbook': 136, 'code': 272}
WRONG = 3  # wrong answers per question
_EXAMPLES = 2  # solved problems before a question whose answer is generated
# Characters of text before a question with answers to choose from (_SHORT, _SHORT_CODE), and before
# one whose answer is generated (_LONG).
_SHORT, _SHORT_CODE, _LONG = 100, 40, 400
# Characters of an answer. Shorter values in the factbook are mostly bare numbers.
_SHORTEST, _LONGEST = 6, 40


class Question(NamedTuple):
  """A line to complete.

  Attributes:
    module: the kind of question.
    prompt: the text before the answer, short.
    long_prompt: the same, with more text before it.
    answer: the rest of the line, as it follows the prompt.
    wrong: WRONG wrong answers.
    line: the part of the line in the prompt, for `parses`.
  """
  module: str
  prompt: str
  long_prompt: str
  answer: str
  wrong: tuple[str, ...]
  line: str = ''


def source(subject: str) -> str:
  """The source in demo.SOURCES that has a subject's text; '' if its questions are generated."""
  return {'factbook': 'factbook', 'code': 'stdlib'}.get(subject, '')


def version(subject: str) -> str:
  """The version of the text that a subject's questions are made from.

  Raises:
    UsageError: a package is missing.
  """
  if subject == 'factbook':
    demo.package_folder(*demo.FACTBOOK)
    return importlib.metadata.version(demo.FACTBOOK[1])
  return platform.python_version() if subject == 'code' else ''


@functools.cache
def of_subject(subject: str, held_out: float) -> tuple[Question, ...]:
  """The questions of a subject.

  Args:
    subject: 'arithmetic', 'factbook' or 'code'.
    held_out: the share of documents that are held out; unused for arithmetic.

  Raises:
    UsageError: a package is missing, or too little text is held out.
  """
  if subject == 'arithmetic':
    return tuple(arithmetic(COUNT[subject], demo.questions()))
  documents = [document for document in demo.SOURCES[source(subject)]()
               if splits.share(document) < held_out]
  make = {'factbook': factbook, 'code': code}[subject]
  found = tuple(make(documents, random.Random(subject), COUNT[subject]))
  if not found:
    raise UsageError(f'The held-out text of the task {subject!r} is too short for questions: a '
                     f'share of {held_out} has {len(documents)} documents. Raise data.held_out.')
  return found


def parses(line: str) -> bool:
  """Whether a line of Python parses by itself, with a body if it needs one."""
  for rest in ('', ' pass'):
    try:
      with warnings.catch_warnings(action='ignore'):
        ast.parse(line.strip() + rest)
      return True
    except (SyntaxError, ValueError, MemoryError, RecursionError):
      continue
  return False


def arithmetic(count: int, avoid: Collection[str]) -> Iterator[Question]:
  """New problems: modules and levels take turns, and wrong answers are those of other problems.

  Args:
    count: how many.
    avoid: questions to leave out.
  """
  draw, asked = demo.drawer('questions'), set(avoid)
  problems = []
  while len(problems) < count:
    turn = len(problems)
    module = demo.MODULES[turn % len(demo.MODULES)]
    level = demo.LEVELS[turn // len(demo.MODULES) % len(demo.LEVELS)]
    examples = [demo.problem(draw, *demo.FACTORS[level], module) for _ in range(_EXAMPLES)]
    question, answer = demo.problem(draw, *demo.FACTORS[level], module)
    if question not in asked:
      asked.add(question)
      problems.append((module, level, examples, question, answer))
  rng = random.Random('wrong answers')
  for module, level, examples, question, answer in problems:
    others = sorted({other for _, of_level, _, _, other in problems
                     if of_level == level and other != answer})
    solved = ''.join(f'{example} {solution}\n' for example, solution in examples)
    yield Question(module, f'Level: {level}\n{question}', f'Level: {level}\n{solved}{question}',
                   f' {answer}', _drawn(rng, [f' {other}' for other in others]))


def factbook(documents: list[str], rng: random.Random, count: int) -> Iterator[Question]:
  """Questions about documents of demo.factbook; wrong answers are values of other fields."""
  found = []
  for document in documents:
    lines = document.splitlines()
    for at, line in enumerate(lines[1:], 1):
      field, _, value = line.rpartition(': ')
      if field and _SHORTEST <= len(value) <= _LONGEST:
        found.append((lines, at, f'{field}:', value))
  rng.shuffle(found)
  values = sorted({value for *_, value in found})
  for lines, at, field, value in found[:count]:
    section = lines[0].rpartition(': ')[2]
    others = [f' {other}' for other in values if other != value]
    if len(others) >= WRONG:
      short, long = (_before(lines, at, size) + field for size in (_SHORT, _LONG))
      yield Question(section, short, long, f' {value}', _drawn(rng, others))


def code(documents: list[str], rng: random.Random, count: int) -> Iterator[Question]:
  """Questions about documents of demo.stdlib; wrong answers end other lines and do not parse here.
  """
  found = []
  for document in documents:
    lines = document.splitlines()
    for at, kind in sorted(_simple_statements(document).items()):
      text = lines[at].strip()
      cuts = [cut for cut in range(2, len(text) - 1)
              if (text[cut - 1] in '([{,=' or text[cut] == ' ') and not text[cut - 1].isspace()
              and len(text) - cut <= _LONGEST and not parses(text[:cut])]
      if cuts and parses(text):
        found.append((lines, at, kind, text, cuts))
  rng.shuffle(found)
  chosen = [(*rest, text, rng.choice(cuts)) for *rest, text, cuts in found]
  ends = sorted({text[cut:] for *_, text, cut in chosen})
  for lines, at, kind, text, cut in chosen[:count]:
    start, end = text[:cut], text[cut:]
    indent = lines[at][:len(lines[at]) - len(lines[at].lstrip())]
    wrong = []
    for other in rng.sample(ends, len(ends)):
      if len(wrong) < WRONG and not parses(start + other):
        wrong.append(other)
    if len(wrong) == WRONG:
      short, long = (_before(lines, at, size) + indent + start for size in (_SHORT_CODE, _LONG))
      yield Question(kind, short, long, end, tuple(wrong), start)


def _simple_statements(source_code: str) -> dict[int, str]:
  """The lines in functions that are a whole statement: index -> its kind, as ast names it."""
  result = {}
  nodes: Any = ast.walk(ast.parse(source_code))
  for function in nodes:
    if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
      for node in ast.walk(function):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and node.lineno == node.end_lineno and not is_text:
          result[node.lineno - 1] = type(node).__name__
  return result


def _before(lines: list[str], at: int, size: int) -> str:
  """The whole lines before a line, in about `size` characters."""
  first = at
  while first and sum(map(len, lines[first - 1:at])) < size:
    first -= 1
  return ''.join(f'{line}\n' for line in lines[first:at])


def _drawn(rng: random.Random, others: list[str]) -> tuple[str, ...]:
  return tuple(rng.sample(others, WRONG))
