"""The Jinja environment of chat templates: that of transformers, with bounded operators.

A template comes with a tokenizer, which may come from an unknown source. In the sandbox it can read
only the values it is given, and cannot change them. Its time is checked in every loop, macro and
call. The length of its text, and of every result of an operator, filter or method on text, is
checked before it is computed.
"""

from collections.abc import Mapping
import contextlib
import datetime
import functools
import json
import re
import threading
import time
import types
from typing import Any

import jinja2
from jinja2 import exceptions, ext, sandbox, utils

from btx_jax.data import template_nodes

MAX_CHARS = 64_000_000  # of the text that a template writes
MAX_SECONDS = 4.0
# Characters that a template may compute in all: a constant, and a multiple of its messages' length.
_COMPUTED, _PER_CHARACTER = 4_000_000, 32
_MAX_SOURCE = 1_000_000  # characters of a template
_MAX_DEPTH = 100  # of brackets in it
_MOST_BITS = 4096  # of a number that a template computes
_MOST_WIDTH = 10_000  # characters to which text is padded
_MOST_INDENT = 64  # spaces of JSON
_ITEM = 64  # characters that an item of a list counts as
# Filters and methods that pad text by a number that is their argument.
_PADDING = ('batch', 'center', 'expandtabs', 'indent', 'ljust', 'rjust', 'slice', 'truncate',
            'wordwrap', 'zfill')
# Filters and methods that can turn a text into a list of its characters.
_LISTING = ('batch', 'dictsort', 'groupby', 'list', 'map', 'max', 'min', 'reject', 'rejectattr',
            'select', 'selectattr', 'slice', 'sort', 'splitlines', 'sum', 'unique', 'wordcount')


class _Render(threading.local):
  """The budget of the rendering in this thread: when it must end, and the characters left."""
  until, left = 0.0, 0


class _Environment(sandbox.ImmutableSandboxedEnvironment):
  """An environment that bounds what templates compute.

  Operators, filters and methods whose result can be larger than their arguments are bounded before
  they run, and the sizes of all results are added up.
  """
  intercepted_binops = frozenset({'*', '**', '%', '+'})

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self.now = _Render()
    for name in ('pprint', 'urlize', 'xmlattr', 'filesizeformat', 'random'):
      del self.filters[name]  # of no use in a conversation
    self.filters = {name: self._bounded(name, function)
                    for name, function in self.filters.items()}
    self.filters |= {'joined': self._joined, 'counted': self._counted, 'repeated': self._repeated}

  def _parse(self, source, name, filename):
    return template_nodes.Bounds().visit(super()._parse(source, name, filename))

  def check_time(self) -> None:
    """Raises TimeoutError if the rendering in this thread has taken too long."""
    if time.monotonic() > self.now.until:
      raise TimeoutError(f'it takes more than {MAX_SECONDS:g} s')

  def spend(self, size: int) -> None:
    """Counts characters that are computed. Raises OverflowError if they are too many."""
    self.now.left -= size
    if self.now.left < 0:
      raise OverflowError('it computes too much text')

  def call_binop(self, context, operator, left, right):
    if operator == '+':
      if not isinstance(left, int):
        self.spend(_weight(left) + _weight(right))
      return left + right
    if operator == '%' and isinstance(left, str | bytes):
      _check_widths(left)
      given = right if isinstance(right, tuple) else (right,)
      self.spend(sum(map(_weight, given)) + len(left))
    elif operator == '*':
      for values, count in ((left, right), (right, left)):
        if isinstance(values, str | bytes | list | tuple) and isinstance(count, int):
          self.spend(_weight(values) * max(0, count))
    if isinstance(left, int) and isinstance(right, int) and operator != '%':
      bits = left.bit_length()
      _check_size(bits + right.bit_length() if operator == '*' else bits * right, _MOST_BITS)
    return super().call_binop(context, operator, left, right)

  def call(__self, __context, __obj, *args, **kwargs):  # names that no argument has
    owner = getattr(__obj, '__self__', None)
    if isinstance(owner, str | bytes | int):
      __self._check_arguments(__obj.__name__, owner, args, kwargs)
    __self.check_time()
    result = super().call(__context, __obj, *args, **kwargs)
    __self.spend(_weight(result))
    return result

  def wrap_str_format(self, value):
    form = super().wrap_str_format(value)
    if form is None:
      return None
    text = value.__self__

    def bounded(*args, **kwargs):
      _check_widths(text)
      if re.search(r'{[^}]*{', text):
        raise OverflowError('a width in a format cannot be computed here')
      self.spend(sum(_weight(each) for each in (*args, *kwargs.values())) * (1 + text.count('{')))
      return form(*args, **kwargs)
    return functools.update_wrapper(bounded, value)

  def _bounded(self, name, function):
    """A filter whose numbers and result are bounded."""
    passes = hasattr(function, 'jinja_pass_arg')  # the context or environment comes first

    @functools.wraps(function)
    def bounded(*args, **kwargs):
      self.check_time()
      value, *rest = args[passes:]
      self._check_arguments(name, value, rest, kwargs)
      result = function(*args, **kwargs)
      if isinstance(result, types.GeneratorType):
        return self._each(result)
      self.spend(_weight(result))
      return result
    return bounded

  def _each(self, items):
    """The items of a generator, within time and size."""
    for item in items:
      self.check_time()
      self.spend(8 + _weight(item))
      yield item

  def _check_arguments(self, name, value, args, kwargs):
    """Raises OverflowError if the filter or method `name` would make a value far larger."""
    given = [*args, *kwargs.values()]
    if name in _PADDING:
      mark = {'indent': '\n', 'expandtabs': '\t'}.get(name)
      lines = value.count(mark) if mark and isinstance(value, str) else 0
      for each in given:
        if isinstance(each, int | float):
          _check_size(each, _MOST_WIDTH)
        if isinstance(each, int | str) and not isinstance(each, bool):
          self.spend((len(each) if isinstance(each, str) else max(0, each)) * (1 + lines))
    elif name == 'replace' and len(given) > 1 and isinstance(value, str):
      old, new = map(str, given[:2])
      self.spend(value.count(old) * len(new))
    elif name == 'join' or name == 'joined':
      # The filter is applied to the list, the method to the separator.
      items, between = (args[0] if args else (), value) if isinstance(value, str | bytes) and (
          args and not isinstance(args[0], str)) else (value, given[0] if given else '')
      if isinstance(items, list | tuple | dict | str):
        self.spend(len(items) * len(str(between)) + sum(
            _weight(each) for each in items if isinstance(each, str)))
    elif name in ('split', 'rsplit'):
      separator = given[0] if given and isinstance(given[0], str) else ''
      self.spend(_ITEM * (value.count(separator) if separator else len(value)))
    elif name in _LISTING and isinstance(value, str):
      self.spend(_ITEM * len(value))
    elif name == 'format':
      _check_widths(str(value))
      self.spend(sum(map(_weight, given)) * str(value).count('%'))
    elif name == 'tojson':
      for each in given:
        if isinstance(each, int):
          _check_size(each, _MOST_INDENT)
    elif name in ('to_bytes', 'round'):
      for each in given:
        if isinstance(each, int):
          _check_size(abs(each), _MOST_WIDTH)

  # With the context as an argument, Jinja does not call these while it compiles.

  @staticmethod
  @jinja2.pass_context
  def _joined(context, items) -> str:
    """The result of `~`, which Jinja's own code joins without a bound."""
    texts = [str(item) for item in items]
    context.environment.spend(sum(map(len, texts)))
    return ''.join(texts)

  @staticmethod
  @jinja2.pass_context
  def _counted(context, value):
    """A value that is written, perhaps into a variable or the result of a macro."""
    context.environment.spend(_weight(value))
    return value

  @staticmethod
  @jinja2.pass_context
  def _repeated(context, size) -> None:
    """Counts one more pass through a loop or macro, which writes `size` characters of its own."""
    context.environment.check_time()
    context.environment.spend(size)


class _Namespace(utils.Namespace):
  """A namespace without names that begin with _, which would let templates leave the sandbox."""

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
  _check_size(len(source), _MAX_SOURCE)
  depth = most = 0
  for mark in re.findall(r'[(\[{]|[)\]}]', source):
    depth = depth + 1 if mark in '([{' else max(0, depth - 1)
    most = max(most, depth)
  _check_size(most, _MAX_DEPTH)  # the compiler calls itself for each
  environment = _environment()
  with _bounds(environment, 0):  # constant expressions are evaluated
    return environment.from_string(source)


def write(template: jinja2.Template, values: Mapping[str, Any]) -> str:
  """Renders a template.

  Raises OverflowError beyond MAX_CHARS, TimeoutError beyond MAX_SECONDS, or any error of the
  template.
  """
  pieces, size = [], 0
  with _bounds(_environment(), sum(
      len(value) for message in values.get('messages', ()) for value in message.values()
      if isinstance(value, str))):
    for piece in template.generate(values):
      pieces.append(piece)
      size += len(piece)
      _check_size(size, MAX_CHARS)
  return ''.join(pieces)


@contextlib.contextmanager
def _bounds(environment: _Environment, size: int):
  """Bounds the time and size of what is computed in the block for messages of `size` characters."""
  now = environment.now
  now.until = time.monotonic() + MAX_SECONDS
  now.left = _COMPUTED + _PER_CHARACTER * size
  yield


@functools.cache
def _environment() -> _Environment:
  extensions = [template_nodes.Generation, ext.loopcontrols]
  environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
  environment.filters['tojson'] = environment._bounded('tojson', _to_json)
  environment.globals |= {'raise_exception': _raise, 'strftime_now': _now, 'dict': _Dict(),
                          'namespace': _Namespace}
  for name in ('lipsum', 'cycler', 'joiner'):
    del environment.globals[name]
  return environment


def _raise(message):
  raise jinja2.TemplateError(message)


def _now(form):
  _check_widths(form)
  return datetime.datetime.now().strftime(form)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                    sort_keys=sort_keys)


def _check_name(name) -> None:
  if isinstance(name, str) and name.startswith('_'):
    raise exceptions.SecurityError(f'a namespace cannot have the name {name!r}')


def _weight(value) -> int:
  """The size of a value: a text's length, or 8 per item of a list, tuple or dict."""
  if isinstance(value, str | bytes):
    return len(value)
  return _ITEM // 8 * len(value) if isinstance(value, list | tuple | dict) else 0


def _check_widths(form: str | bytes) -> None:
  """Raises OverflowError if a format pads text to a large width, or to a computed one."""
  text = form.decode('latin1') if isinstance(form, bytes) else form
  if re.search(r'\d{5}|%[^a-zA-Z%]*\*', text):
    raise OverflowError(f'a format has a width of more than {_MOST_WIDTH:,} or a computed one')


def _check_size(size: float, most: int) -> None:
  if size > most:
    raise OverflowError(f'it computes or writes too much ({size:,} is more than {most:,})')
