"""Makes docs/config.md, errors.md and terminal.md: python docs/generate.py

So no field is missing there, and no text stands twice; tests/docs_test.py fails if a page differs
from what this makes.
"""

import ast
from collections.abc import Iterator
import glob
import os
import re
import sys
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Errors


class Message(NamedTuple):
  """An error message as the source has it: its fixed text and, in capitals, names of the rest."""
  code: int
  module: str
  parts: tuple[tuple[bool, str], ...]  # (whether it is fixed, text or name)

  def __str__(self) -> str:
    return ' '.join(''.join(text for _, text in self.parts).split())

  @property
  def fixed(self) -> str:
    return ''.join(text for is_fixed, text in self.parts if is_fixed)

  def variable(self, printed: str) -> str | None:
    """The variable text of a printed message, which may begin with the name of a run or domain
    (errors.about); None if it is another message."""
    pattern = ''.join(re.escape(text) if is_fixed else '(.*?)' for is_fixed, text in self.parts)
    found = re.fullmatch(rf'(?:(?:runs|domains)\.(\S+): )?{pattern}', printed, re.DOTALL)
    return ''.join(filter(None, found.groups())) if found else None


# What helps beyond a message, by a piece of its text.
NOTES = {
    'The config': {
        '--debug shows the traceback': 'A config file is Python, and this line of it failed.',
        'is of type': 'To Python 1e3 is a float, 1000 an integer and \'1\' a string. An integer '
                      'is accepted as a float.',
    },
    'Runs and mixtures': {
        'start from each other in a circle': 'At least one run must start from `base.random()` or '
                                             '`base.hugging_face(FOLDER)`.',
        'which is a mixture already': 'Mix dense runs. To train a mixture further, start from '
                                      '`base.checkpoint(RUN)`.',
        'cannot mix models of different': 'The table has a row for each field that differs, and a '
                                          'column for each source.',
        'mixes models that differ': 'The same table, then what each difference costs. The seed '
                                    'is known for runs only: for folders, the cosine of some '
                                    'weights is compared.',
        'model changes the parameters': 'A run keeps the shapes of the parameters that it starts '
                                        'from. Only runs from `base.random()` can have other '
                                        'sizes.',
        'experts cannot be spread over mesh.expert': 'Each device of that axis holds the same '
                                                     'number of experts.',
    },
    'Text': {
        'there is no text in': 'The files exist, but none of their records is a document.',
        'training tokens, fewer than': 'Add text, or lower `data.seq_len`.',
    },
    'The working directory': {
        'belong to another config': 'A run is never continued with other settings than it was '
                                     'started with: the table would not say what it compares.',
        'was made from another config': 'The tokens there were made from other text, or with other '
                                       'settings. Files are compared by their size, and by 1 MB at '
                                       'each end if their time stamp differs.',
        'does not hold tokens written': 'Something else wrote this folder, or it is damaged. If it '
                                        'holds nothing else, delete it.',
        'is not a btx_jax manifest': 'Something else wrote this file, or it is damaged.',
        'so it cannot be tokenized again': 'The lengths of token files are compared at every '
                                           'start, and a file that has changed since it was '
                                           'written is hashed. Where the text is still there, '
                                           'damaged tokens are renamed and made again.',
        'has files that this export did not write': 'An export only removes files that an '
                                                    'interrupted export left.',
    },
    'During a run': {
        'All numbers in its checkpoints': 'The loss, the gradient and the updated parameters of '
                                          'every step are checked, so such numbers are never '
                                          'saved.',
        'stopped; the same command': 'After Ctrl-C or SIGTERM. After SIGTERM the checkpoint is of '
                                     'the step in progress.',
        'Out of memory': 'The text in brackets is the device\'s. `preflight` shows what fits '
                         '(docs/preflight.md).',
        'unexpected error': 'The traceback precedes it.',
    },
}


def messages() -> list[Message]:
  """All messages of UsageError, RunError and errors.py, each once."""
  found = {}
  for folder in ('btx_jax', 'configs'):
    for path in sorted(glob.glob(os.path.join(ROOT, folder, '**', '*.py'), recursive=True)):
      module = os.path.relpath(path, os.path.join(ROOT, folder)).removesuffix('.py')
      raised = _raised(ast.parse(_read(path)), module)
      for node, code in sorted(raised, key=lambda found: found[0].lineno):
        message = Message(code, module, tuple(_parts(node)))
        if re.search('[a-z]{3}', message.fixed):  # else it only passes on another message
          found.setdefault(str(message), message)
  return list(found.values())


def _raised(tree: ast.AST, module: str) -> Iterator[tuple[ast.expr, int]]:
  """The expressions of messages, each with its exit code."""
  codes = {'UsageError': 2, 'RunError': 1}
  for node in ast.walk(tree):
    match node:
      case ast.Call(func=ast.Name(id='UsageError' | 'RunError' as name), args=[text, *_]):
        yield text, codes[name]
      case ast.Return(value=ast.Tuple(elts=[text, ast.Constant(value=int(code))])) if (
          module == 'errors'):
        yield text, code
      case ast.Assign(targets=[ast.Name(id='_UNEXPECTED')], value=text):
        yield text, 1


def _parts(node: ast.expr) -> Iterator[tuple[bool, str]]:
  """The parts of a message: its fixed text, and names for the rest."""
  match node:
    case ast.Constant(value=str(text)):
      yield True, text
    case ast.JoinedStr(values=values):
      for value in values:
        yield from _parts(value)
    case ast.BinOp(left=left, right=right):
      yield from _parts(left)
      yield from _parts(right)
    case ast.FormattedValue(value=value, conversion=conversion):
      name = _name(value)
      yield False, f"'{name}'" if conversion == ord('r') else name
    case ast.Call(func=ast.Attribute(attr='join')):
      yield False, '…'
    case _:
      yield False, _name(node)


def _name(node: ast.expr) -> str:
  match node:
    case ast.Attribute(attr='__name__'):
      return 'TYPE'
    case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Subscript(
        slice=ast.Constant(value=str(name))):
      return name.strip('_').upper()
    case ast.Call(func=ast.Name(id='nearest')):
      return 'NEAREST'
    case ast.Call(func=ast.Name(id='len')):
      return 'NUMBER'
    case ast.Call(func=ast.Attribute(attr='getcwd')):
      return 'FOLDER'
  return '…'


def errors_page() -> str:
  """docs/errors.md."""
  page, found = _PAGE, messages()
  for title, notes in NOTES.items():
    page += f'\n## {title}\n\n| message | exit code | what helps |\n|---|--:|---|\n'
    for piece, note in notes.items():
      noted = [message for message in found if piece in message.fixed]
      if not noted:
        raise ValueError(f'docs/generate.py: no message has {piece!r}, which NOTES names.')
      page += ''.join(f'| {_cell(_code(str(message)))} | {message.code} | {_cell(note)} |\n'
                      for message in noted)
  return page


_PAGE = """# Messages

<!-- Made by docs/generate.py from the source; change it there. -->

A mistake ends the command with one message on stderr: what is wrong, its value, the nearest valid
choice if there is one, and how to fix it. `--debug` adds the traceback. Most mistakes are found
before anything is computed.

| exit code | meaning |
|--:|---|
| 0 | done |
| 1 | a run failed, or `preflight` found one that does not fit |
| 2 | the request is invalid; change the command, the config or the files |
| 130 | stopped by Ctrl-C |

Most messages need no more than themselves. Below are those with something to add; words in capitals
and `…` stand for what a message names.
"""


# Config


def config_page() -> str:
  """docs/config.md."""
  source = _read(os.path.join(ROOT, 'btx_jax', 'base.py'))
  body = ast.parse(source).body
  functions = [node for node in body
               if isinstance(node, ast.FunctionDef) and not node.name.startswith('_')]
  single, sections = [], []
  for node in functions[0].body:
    if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Attribute):
      continue
    name, about = node.targets[0].attr, _comment(source, node)
    match node.value:
      case ast.Call(func=ast.Name(id='_section'), args=classes, keywords=keywords):
        rows = _section(source, body, [ast.unparse(cls) for cls in classes], keywords)
      case ast.Call(args=[ast.Dict(keys=keys, values=values)]):
        rows = [(key.value, _default(source, body, value), _comment(source, key))
                for key, value in zip(keys, values) if isinstance(key, ast.Constant)]
      case ast.Call():
        single.append((name, '', about))
        continue
      case value:
        single.append((name, _source_of(source, value), about))
        continue
    sections.append(f'\n## {name}\n\n{about}\n\n' + _fields(
        [(f'{name}.{field}', *rest) for field, *rest in rows]))
  made = [_function(node) for node in functions[1:]]
  return ('# Config\n\n<!-- Made by docs/generate.py from btx_jax/base.py and the dataclasses that '
          'it names; change it there. -->\n'
          '\nA config file has a function `get_config()`. It starts from `base.get_config()`, sets '
          'the fields that\ndiffer, adds `domains` and `runs`, and returns the config; '
          '`configs/demo.py` is an example. Any field\ncan also be set on the command line: '
          '`--config.optimizer.peak_lr=3e-4`,\n'
          "`\"--config.runs['expert/law'].steps=8000\"`.\n\n" + _fields(single) +
          ''.join(sections) + '\n# Domains and runs\n' + ''.join(made))


def _section(source: str, body: list[ast.stmt], classes: list[str], keywords: list[ast.keyword]
             ) -> list[tuple[str, str, str]]:
  """(field, default, text) of a section that base.py takes from dataclasses: _section(A, B, ...).
  """
  without = [value for key in keywords if key.arg == 'without' for value in ast.literal_eval(
      key.value)]
  own = {key.arg: key for key in keywords if key.arg and key.arg != 'without'}
  fields = {name: field for cls in classes for name, field in _dataclass(body, cls).items()}
  rows = [(name, _source_of(source, key.value), _comment(source, key))
          for name, key in own.items() if name not in fields]
  return rows + [
      (name, _source_of(source, own[name].value) if name in own else default, text)
      for name, (default, text) in fields.items() if name not in without]


def _dataclass(body: list[ast.stmt], cls: str) -> dict[str, tuple[str, str]]:
  """field -> (default, text of its `Attributes:` entry) of a dataclass that a file imports."""
  module, source = _imported(body, cls)
  node = next(node for node in ast.parse(source).body
              if isinstance(node, ast.ClassDef) and node.name == cls)
  _, texts = _entries(node, 'Attributes')
  fields = {ast.unparse(field.target): _source_of(source, field.value) if field.value else ''
            for field in node.body if isinstance(field, ast.AnnAssign)}
  if missing := fields.keys() - texts:
    raise ValueError(f'{module}, {cls}: no text for {", ".join(sorted(missing))}.')
  return {name: (default, texts[name]) for name, default in fields.items()}


def _imported(body: list[ast.stmt], name: str) -> tuple[str, str]:
  """The module that a file imports a name from, and its source."""
  module = next(node.module for node in body if isinstance(node, ast.ImportFrom) and node.module
                and any(alias.name == name for alias in node.names))
  return module, _read(os.path.join(ROOT, *module.split('.')) + '.py')


def _default(source: str, body: list[ast.stmt], value: ast.expr) -> str:
  """A default as the source has it; that of a constant as the module has it that defines it."""
  if not isinstance(value, ast.Name):
    return _source_of(source, value)
  _, source = _imported(body, value.id)
  return next(_source_of(source, node.value) for node in ast.parse(source).body
              if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == value.id)


def _source_of(source: str, node: ast.expr) -> str:
  return ast.get_source_segment(source, node) or ''


def _comment(source: str, node: ast.stmt | ast.expr | ast.keyword) -> str:
  """The comment above; raises ValueError if there is none."""
  lines, found = source.splitlines()[:node.lineno - 1], []
  while lines and lines[-1].lstrip().startswith('#'):
    found.insert(0, lines.pop().strip().lstrip('# '))
  if not found:
    raise ValueError(f'btx_jax/base.py, line {node.lineno}: a field without a comment above it.')
  return ' '.join(found)


def _entries(node: ast.FunctionDef | ast.ClassDef, heading: str) -> tuple[str, dict[str, str]]:
  """The docstring before a heading ('Args'), and the text of each name below it."""
  about, _, entries = (ast.get_docstring(node) or '').partition(f'\n\n{heading}:\n')
  return about, {names: ' '.join(text.split()) for names, text in
                 re.findall(r'^  ([\w, ]+): ((?:.*\n?(?:    .*\n?)*))', entries, re.MULTILINE)}


def _function(node: ast.FunctionDef) -> str:
  """A function's docstring, and its arguments as a table."""
  about, texts = _entries(node, 'Args')
  defaults = dict(zip([arg.arg for arg in reversed(node.args.args)],
                      [ast.unparse(value) for value in reversed(node.args.defaults)]))
  rows = [(names, defaults.get(names.split(',')[0], ''), text) for names, text in texts.items()]
  named = {name for names in texts for name in names.split(', ')}
  missing = [arg.arg for arg in (*node.args.args, node.args.vararg)
             if arg and arg.arg not in named]
  if missing:
    raise ValueError(f'btx_jax/base.py, {node.name}(): no text for {", ".join(missing)}.')
  return f'\n## base.{node.name}()\n\n{about}\n' + (
      '\n' + _fields(rows, 'argument') if rows else '')


def _fields(rows, heading: str = 'field') -> str:
  lines = [f'| `{name}` | {_code(default) if default else ""} '
           f'| {_cell(text[:1].upper() + text[1:])} |' for name, default, text in rows]
  return f'| {heading} | default | meaning |\n|---|---|---|\n' + '\n'.join(lines) + '\n'


def _code(text: str) -> str:
  return f'`{text}`'


def _cell(text: str) -> str:
  return text.replace('|', '\\|')


def _read(path: str) -> str:
  with open(path, encoding='utf-8') as file:
    return file.read()


def terminal_page() -> str:
  """docs/terminal.md."""
  from docs import terminal  # imports the commands, which the other pages do not need
  return terminal.page()


PAGES = {'config.md': config_page, 'errors.md': errors_page, 'terminal.md': terminal_page}

if __name__ == '__main__':
  sys.path.insert(0, ROOT)
  for name, page in {name: make() for name, make in PAGES.items()}.items():
    with open(os.path.join(ROOT, 'docs', name), 'w', encoding='utf-8') as file:
      file.write(page)
