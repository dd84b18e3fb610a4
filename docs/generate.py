"""Makes docs/config.md and docs/errors.md from the source: python docs/generate.py

So no field and no message is missing there; tests/docs_test.py fails where a page is not what
this makes.
"""

import ast
from collections.abc import Iterator
import glob
import os
import re
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Errors


class Message(NamedTuple):
  """What an error can say: texts and, in capitals, names of what stands between them."""
  module: str
  code: int
  parts: tuple[tuple[bool, str], ...]  # (whether it is fixed, text or name)

  def __str__(self) -> str:
    return ' '.join(''.join(text for _, text in self.parts).split())

  @property
  def fixed(self) -> str:
    return ''.join(text for is_fixed, text in self.parts if is_fixed)

  def between(self, said: str) -> str | None:
    """What stands between the texts in a message, behind the name of a run or domain (errors.of)
    or not; None if it is another message."""
    pattern = ''.join(re.escape(text) if is_fixed else '(.*?)' for is_fixed, text in self.parts)
    found = re.fullmatch(rf'(?:(?:runs|domains)\.(\S+): )?{pattern}', said, re.DOTALL)
    return ''.join(filter(None, found.groups())) if found else None


# Title, and which messages: those of modules, as a regex, that have a text. First match wins.
GROUPS = {
    'The command line and the config file': (
        ('main|study/fields', ''), ('errors', '--help|--debug|--config|PLACE|no flag')),
    'Devices and mesh': (('devices/(sharding|mesh)|training/layout', ''), ('preflight/.*', '')),
    'Several processes': (('devices/(distributed|rollcall)', ''),),
    'Working directory': (
        ('study/manifest|files', ''), ('data/(text|tokens)|pipeline', '--workdir'),
        ('errors', 'written or')),
    'Optimizer and training': (
        ('study/(plan|study)|run', r'\b(optimizer|train)\.|^FIELD|: FIELD'),),
    'Tokenizer': (('data/.*', '[Tt]okenizer|pieces?|sentencepiece'),),
    'Text': (('data/.*', ''), ('study/study', r'\bdata\.')),
    'Runs and models': (('study/.*|run|model/config|pipeline|recipe', ''),),
    'While training': (('training/.*|errors', ''),),
    'Looking on and measuring': (('evaluate/.*|commands/.*', ''),),
    'Hugging Face folders': (('convert/.*', ''),),
}
_ORDER = (0, 7, 4, 10, 6, 5, 1, 2, 3, 8, 9)  # as a person comes upon them

# Where a message does not say it already: a piece of it -> what it means, or what to do.
NOTES = {
    '(--debug shows where it came from.)': 'A config file is code, and this line of it raised an '
                                           'error.',
    'and must be WANTED': 'Python tells 1000 from 1e3, and 1 from \'1\'.',
    'One command at a time': 'Commands are `status`, `jobs`, `report`, `data`, `compare`, `export` '
                             'and `preflight`; without one, it trains.',
    'start from each other in a circle': 'Some run has to begin from `base.random()`.',
    'which is a mixture already': 'Mix dense runs. A mixture is trained on by '
                                  '`base.checkpoint(RUN)`.',
    'cannot mix models of': 'The table has a line for each field that differs, and a column for '
                            'each source.',
    'mixes models that differ': 'As above; then what each difference costs. A seed is known of '
                                'runs only; of folders, the cosine of some weights is compared.',
    'changes the parameters': 'What a run starts from has the shapes of its parameters; give '
                              'other sizes to the run with `base.random()`.',
    'at least one weight must be positive': 'Weights are shares of the rows; they need not add '
                                            'up to 1.',
    'training tokens, fewer than': 'Add text, or shorten `data.seq_len`.',
    'there is no text in': 'Files are there, but no record of them is a document.',
    'cannot be spread over mesh.expert': 'Each device of the axis holds the same number of '
                                         'experts.',
    'is not a manifest of ours': 'The file was written by something else, or damaged.',
    'holds no tokens of ours': 'The folder was written by something else, or damaged; if nothing '
                               'else is in it, it can be deleted.',
    'belongs to another config': 'Runs are not trained on under other settings than they were '
                                 'begun with: the table would not say what was compared.',
    'was made from another config': 'The tokens were made from other text or settings than '
                                    'those of the config.',
    'is sound. To train it': 'The loss, or the norm of its gradient, is not a finite number. '
                             'Nothing that is not finite is ever saved.',
    'stopped; the same command': 'Ctrl-C; or SIGTERM, in which case the checkpoint is of the step '
                                 'that was being done.',
    'Out of memory': 'The end of the line is what the device said.',
    'this was not foreseen': 'The traceback stands above it.',
}


def messages() -> list[Message]:
  """All that UsageError, RunError and errors.py say, without repetitions."""
  found = {}
  for folder in ('btx_jax', 'configs'):
    for path in sorted(glob.glob(os.path.join(ROOT, folder, '**', '*.py'), recursive=True)):
      module = os.path.relpath(path, os.path.join(ROOT, folder)).removesuffix('.py')
      raised = _raised(ast.parse(_read(path)), module)
      for node, code in sorted(raised, key=lambda found: found[0].lineno):
        message = Message(module, code, tuple(_parts(node)))
        if re.search('[a-z]{3}', message.fixed):  # else it only passes on what another says
          found.setdefault(str(message), message)
  return list(found.values())


def _raised(tree: ast.AST, module: str) -> Iterator[tuple[ast.expr, int]]:
  """Expressions of messages, and the exit code of each."""
  codes = {'UsageError': 2, 'RunError': 1}
  for node in ast.walk(tree):
    match node:
      case ast.Call(func=ast.Name(id='UsageError' | 'RunError' as name), args=[text, *_]):
        yield text, codes[name]
      case ast.Return(value=ast.Tuple(elts=[text, ast.Constant(value=int(code))])) if (
          module == 'errors'):
        yield text, code
      case ast.Assign(targets=[ast.Name(id='_UNFORESEEN')], value=text):
        yield text, 1


def _parts(node: ast.expr) -> Iterator[tuple[bool, str]]:
  """Of the expression of a message: its texts, and names for the rest."""
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
  groups = {list(GROUPS)[i]: [] for i in _ORDER}
  unused = set(NOTES)
  for message in messages():
    title = next((title for title, rules in GROUPS.items() for modules, has in rules
                  if re.fullmatch(modules, message.module) and re.search(has, str(message))), None)
    if title is None:
      raise ValueError(f'docs/generate.py: GROUPS has no place for {message.module}: {message}')
    notes = [note for piece, note in NOTES.items() if piece in str(message)]
    unused -= {piece for piece in NOTES if piece in str(message)}
    groups[title].append(f'| {_cell(_code(str(message)))} | {message.code} '
                         f'| {_cell(" ".join(notes))} |')
  if unused:
    raise ValueError(f'docs/generate.py: NOTES of no message: {unused}')
  return _PAGE + ''.join(
      f'\n## {title}\n\n| message | exit code | what it means |\n|---|--:|---|\n' +
      '\n'.join(rows) + '\n' for title, rows in groups.items())


_PAGE = """# Messages

<!-- Made by docs/generate.py from the source; change it there. -->

A mistake ends with one message on stderr and no traceback: what is wrong, its value, the nearest
valid choice where there is one, and the way out. `--debug` adds the traceback. The exit code is 2
where something was asked for that cannot be, most of it found before any work was done; 1 where
something failed underway; 130 after Ctrl-C; 0 otherwise.

Words in capitals, and `…`, stand for what the message names; `NEAREST` for
"did you mean 'expert/code'?" or the list of what is valid. Messages about the model, the optimizer
and the files of a domain begin with the name of their run or domain. The tests make every one of
these mistakes on the command line.
"""


# Config


def config_page() -> str:
  """docs/config.md."""
  source = _read(os.path.join(ROOT, 'btx_jax', 'base.py'))
  functions = [node for node in ast.parse(source).body
               if isinstance(node, ast.FunctionDef) and not node.name.startswith('_')]
  single, sections = [], []
  for node in functions[0].body:
    if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Attribute):
      continue
    name, about = node.targets[0].attr, _comment(source, node)
    match node.value:
      case ast.Call(args=[ast.Dict(keys=keys, values=values)]):
        rows = [(key.value, ast.get_source_segment(source, value), _comment(source, key))
                for key, value in zip(keys, values)]
        sections.append(f'\n## {name}\n\n{about}\n\n' + _fields(
            [(f'{name}.{key}', *rest) for key, *rest in rows]))
      case ast.Call():
        single.append((name, '', about))
      case value:
        single.append((name, ast.get_source_segment(source, value), about))
  made = [_function(node) for node in functions[1:]]
  return ('# Config\n\n<!-- Made by docs/generate.py from btx_jax/base.py; change it there. -->\n'
          '\nA config file has a function `get_config()` that takes `base.get_config()`, sets '
          'what is to be\notherwise, and adds `domains` and `runs`; `configs/demo.py` is one. '
          'Any field can be set on the\ncommand line too: `--config.optimizer.peak_lr=3e-4`, '
          "`\"--config.runs['expert/law'].steps=8000\"`.\n\n" + _fields(single) +
          ''.join(sections) + '\n# Domains and runs\n' + ''.join(made))


def _comment(source: str, node: ast.expr) -> str:
  """The comment above; raises ValueError if there is none."""
  lines, found = source.splitlines()[:node.lineno - 1], []
  while lines and lines[-1].lstrip().startswith('#'):
    found.insert(0, lines.pop().strip().lstrip('# '))
  if not found:
    raise ValueError(f'btx_jax/base.py, line {node.lineno}: a field without a comment above it.')
  return ' '.join(found)


def _function(node: ast.FunctionDef) -> str:
  """Its docstring, and its arguments as a table."""
  about, _, arguments = ast.get_docstring(node).partition('\n\nArgs:\n')
  defaults = dict(zip([arg.arg for arg in reversed(node.args.args)],
                      [ast.unparse(value) for value in reversed(node.args.defaults)]))
  rows = [(name, defaults.get(name.split(',')[0], ''), ' '.join(text.split())) for name, text in
          re.findall(r'^  ([\w, ]+): ((?:.*\n?(?:    .*\n?)*))', arguments, re.MULTILINE)]
  named = {name for row in rows for name in row[0].split(', ')}
  missing = [arg.arg for arg in (*node.args.args, node.args.vararg)
             if arg and arg.arg not in named]
  if missing:
    raise ValueError(f'btx_jax/base.py, {node.name}(): no text for {", ".join(missing)}.')
  return f'\n## base.{node.name}()\n\n{about}\n' + (
      '\n' + _fields(rows, 'argument') if rows else '')


def _fields(rows, heading: str = 'field') -> str:
  lines = [f'| `{name}` | {_code(default) if default else ""} | {_cell(about)} |'
           for name, default, about in rows]
  return f'| {heading} | default | what it is |\n|---|---|---|\n' + '\n'.join(lines) + '\n'


def _code(text: str) -> str:
  return f'`{text}`'


def _cell(text: str) -> str:
  return text.replace('|', '\\|')


def _read(path: str) -> str:
  with open(path, encoding='utf-8') as file:
    return file.read()


PAGES = {'config.md': config_page, 'errors.md': errors_page}

if __name__ == '__main__':
  for name, page in {name: make() for name, make in PAGES.items()}.items():
    with open(os.path.join(ROOT, 'docs', name), 'w', encoding='utf-8') as file:
      file.write(page)
