"""The Jinja environment of chat templates: that of transformers, with bounded operators.

A template comes with a tokenizer, which may come from an unknown source. In the sandbox it can read
only the values it is given, and cannot change them. The length of its text is bounded, and so are
products and powers. Its running time is not, because a template can loop without writing anything.
Filters that pad text can use any amount of memory.
"""

from collections.abc import Mapping
import datetime
import functools
import json
from typing import Any, ClassVar

import jinja2
from jinja2 import exceptions, ext, nodes, sandbox, utils

MAX_CHARS = 64_000_000  # of the text that a template writes
_MOST_BITS = 4096  # of a number that a template computes


class _Generation(ext.Extension):
  """{% generation %} marks answers in some templates; its body is written unchanged."""
  tags: ClassVar[set[str]] = {'generation'}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return nodes.CallBlock(self.call_method('inside'), [], [], body).set_lineno(line)

  def inside(self, caller):
    return caller()


class _Environment(sandbox.ImmutableSandboxedEnvironment):
  intercepted_binops = frozenset({'*', '**'})

  def call_binop(self, context, operator, left, right):
    if operator == '*':
      for text, count in ((left, right), (right, left)):
        if isinstance(text, str | bytes | list | tuple) and isinstance(count, int):
          _check_size(len(text) * count, MAX_CHARS)
    if isinstance(left, int) and isinstance(right, int):
      bits = left.bit_length()
      _check_size(bits + right.bit_length() if operator == '*' else bits * right, _MOST_BITS)
    return super().call_binop(context, operator, left, right)


class _Namespace(utils.Namespace):
  """A namespace without underscored names, by which a template could leave the sandbox."""

  def __init__(*args, **kwargs):  # without `self`, which may be one of its names
    self, *rest = args
    found = dict(*rest, **kwargs)
    for name in found:
      _check_name(name)
    utils.Namespace.__init__(self, found)

  def __setitem__(self, name, value):
    _check_name(name)
    super().__setitem__(name, value)


class _Dict:
  """dict(...) in a template, without the attributes of the class."""

  def __call__(self, *args, **kwargs):
    return dict(*args, **kwargs)

  def fromkeys(self, *args):
    return dict.fromkeys(*args)


def compile_template(source: str) -> jinja2.Template:
  """Compiles a template. Raises errors of many kinds if `source` is not a template."""
  return _environment().from_string(source)


def write(template: jinja2.Template, values: Mapping[str, Any]) -> str:
  """Renders a template. Raises OverflowError beyond MAX_CHARS, or any error of the template."""
  pieces, size = [], 0
  for piece in template.generate(values):
    pieces.append(piece)
    size += len(piece)
    _check_size(size, MAX_CHARS)
  return ''.join(pieces)


@functools.cache
def _environment() -> jinja2.Environment:
  environment = _Environment(
      trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols])
  environment.filters['tojson'] = _to_json
  environment.globals |= {'raise_exception': _raise, 'strftime_now': _now, 'dict': _Dict(),
                          'namespace': _Namespace}
  return environment


def _raise(message):
  raise jinja2.TemplateError(message)


def _now(form):
  return datetime.datetime.now().strftime(form)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                    sort_keys=sort_keys)


def _check_name(name) -> None:
  if isinstance(name, str) and name.startswith('_'):
    raise exceptions.SecurityError(f'a namespace cannot have the name {name!r}')


def _check_size(size: int, most: int) -> None:
  if size > most:
    raise OverflowError(f'it computes or writes too much ({size:,} is more than {most:,})')
