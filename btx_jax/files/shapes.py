"""Checks that plain data, read from JSON, has the structure that code relies on."""

from typing import Any

_WORDS = {int: 'an integer', float: 'a number', str: 'a string', bool: 'true or false',
          dict: 'an object', list: 'a list', None: 'null', object: 'anything'}
_EXACT = {float: {float, int}, int: {int}, str: {str}}


def misfit(value: Any, shape: Any, path: str = '') -> str:
  """Describes how a value misfits: "best.step = '3' is not an integer"; '' if it fits.

  Args:
    value: plain data.
    shape: a type, where float includes integers and object is anything; None, which is null; a
      tuple of shapes, one of which must fit; [shape], a list of such values; {str: shape}, an
      object of such values; or {'key': shape, 'other?': shape}, an object with these keys, where
      those with a ? may be missing; it may have further keys.
    path: where the value is, for the description.
  """
  if isinstance(shape, tuple):
    found = [misfit(value, each, path) for each in shape]
    return '' if '' in found else found[-1]
  if isinstance(shape, list):
    if not isinstance(value, list):
      return _wrong(value, list, path)
    if isinstance(shape[0], type) and {*map(type, value)} <= _EXACT.get(shape[0], set()):
      return ''  # a shortcut for long lists of numbers
    return next(filter(None, (misfit(each, shape[0], f'{path}[{i}]')
                              for i, each in enumerate(value))), '')
  if isinstance(shape, dict):
    if not isinstance(value, dict):
      return _wrong(value, dict, path)
    inside = f'{path}.' if path else ''
    for key, inner in shape.items():
      if key is str:
        pairs = value.items()
      else:
        name, optional = key.removesuffix('?'), key.endswith('?')
        if name not in value and not optional:
          return f'{inside}{name} is missing'
        pairs = [(name, value[name])] if name in value else []
      for name, each in pairs:
        if found := misfit(each, inner, f'{inside}{name}'):
          return found
    return ''
  return '' if _fits(value, shape) else _wrong(value, shape, path)


def _fits(value: Any, kind: Any) -> bool:
  if kind is None or kind is object:
    return kind is object or value is None
  kinds = (int, float) if kind is float else kind
  return isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))


def _wrong(value: Any, kind: Any, path: str) -> str:
  shown = repr(value)
  shown = shown if len(shown) <= 60 else f'{shown[:57]}...'
  return f'{path or "it"} = {shown} is not {_WORDS[kind]}'
