"""Checks that a config has the fields of btx_jax/base.py, each with a value of its type.

ml_collections checks single assignments. It lets None pass, sections that are replaced whole, and
everything in `domains` and `runs`.
"""

from collections.abc import Iterable
import os
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from btx_jax import base
from btx_jax.errors import RENAMED, UsageError, nearest
from btx_jax.files import naming
from btx_jax.run import BEST, CHECKPOINT, EDIT, ENSEMBLE, HUGGING_FACE, MIX

_OVERRIDABLE = ('model', 'optimizer', 'train')  # sections whose fields a run may set
_LARGEST = float(np.finfo(np.float32).max)
_INTEGERS = ('seeds',)  # lists of integers; the others hold strings, or pairs of strings


def check(config) -> None:
  """Raises UsageError for the first field that is missing, unknown or of the wrong type."""
  like = base.get_config()
  _check_section('', config, like)
  naming.path('tokenizer.path', config.tokenizer.path)
  naming.local_path('rows', config.rows)
  for name, domain in config.domains.items():
    _check_value(f'domains.{name}', domain, like)
    _check_section(f'domains.{name}', domain, _domain_like(domain))
    for path in domain.paths:
      naming.path(f'domains.{name}.paths', path)
    for path in _files(domain.held_out):
      naming.path(f'domains.{name}.held_out', path)
  for name, run in config.runs.items():
    _check_value(f'runs.{name}', run, like)
    _check_section(f'runs.{name}', run, base.run(_init_like(run.get('init')), {}))
    naming.path(f'runs.{name}.init.folder', run.init.get('folder', ''))
    for domain, weight in run.domains.items():
      _check_value(f'runs.{name}.domains.{domain}', weight, 0.0)
    for section in _OVERRIDABLE:
      known = like.to_dict()[section]
      for field, value in run[section].items():
        if field not in known:
          raise _unknown(f'runs.{name}.', f'{section}.{field}', known)
        _check_value(f'runs.{name}.{section}.{field}', value, known[field])


def _domain_like(domain: Any) -> ConfigDict:
  """A domain with a value of the right type for each field; held_out may have several types."""
  held_out = domain.get('held_out', ()) if isinstance(domain, ConfigDict) else ()
  kind = 0.0 if isinstance(held_out, int | float) else '' if isinstance(held_out, str) else ()
  return base.domain(held_out=kind)


def _files(held_out: Any) -> list[str]:
  """The files that a domain's held_out names; none if it is a share."""
  if isinstance(held_out, int | float):
    return []
  return [held_out] if isinstance(held_out, str) else list(held_out)


def _init_like(init: Any) -> ConfigDict:
  """The initialiser of a run's kind, with a value of the right type for each of its fields."""
  if not isinstance(init, ConfigDict):
    return base.random()
  pairs = base.from_text('', labels=(('', ''),))
  step = BEST if init.get('step') == BEST else 0
  if init.get('kind') == ENSEMBLE:
    selector = init.get('selector')
    merges = isinstance(selector, ConfigDict) and 'top' in selector
    return base.ensemble(selector=base.tfidf() if merges else pairs)
  return {MIX: base.mix(rules={'': ''}, routers=pairs), HUGGING_FACE: base.hugging_face(''),
          EDIT: ConfigDict({**base.drop('', routers=pairs), 'runs': (), 'replaced': (('', ''),)}),
          CHECKPOINT: ConfigDict({**base.checkpoint('', step=step), 'runs': ()}),
          }.get(str(init.get('kind')), base.random())


def with_home(config) -> Any:
  """A copy of a config in which ~ is replaced by the home directory in every path."""
  result = config.copy_and_resolve_references()
  result.tokenizer.path = os.path.expanduser(config.tokenizer.path)
  result.rows = os.path.expanduser(config.rows)
  for run in result.runs.values():
    if 'folder' in run.init:
      run.init.folder = os.path.expanduser(run.init.folder)
  return result


def _check_section(path: str, section: Any, like: ConfigDict) -> None:
  _check_value(path or 'the config', section, like)
  for field in section if like else ():  # sections that are empty in base.py may have any field
    if field not in like:
      raise _unknown('', f'{path}.{field}'.lstrip('.'), like)
  for field, expected in like.items():
    inner = f'{path}.{field}'.lstrip('.')
    if field not in section:
      raise UsageError(f'{inner} is missing. Start from base.get_config(), set the fields of its '
                       'sections rather than replace one, and make domains by base.domain(...) '
                       'and runs by base.run(...).')
    if isinstance(expected, ConfigDict):
      _check_section(inner, section[field], expected)
    elif inner in _INTEGERS:
      _check_value(inner, section[field], (0,))
    else:
      _check_value(inner, section[field], expected)


def _unknown(owner: str, path: str, like: Iterable[str]) -> UsageError:
  """There is no field `path` in the config, or in the run `owner`."""
  if path in RENAMED:
    new = RENAMED[path]
    return UsageError(f'{owner}{path} is now {owner}{new}.')
  return UsageError(f'{owner}{path} is not a field; {nearest(path.rpartition(".")[2], like)}')


def _check_value(path: str, value: Any, like: Any) -> None:
  """Checks that a value has the type of `like`; lists hold strings, unless `like` has an item.

  Numbers must be finite in float32.
  """
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  fits, wanted = _fits_list(value, like) if isinstance(like, tuple) else {
      bool: (isinstance(value, bool), 'True or False'),
      int: (is_number and isinstance(value, int), 'an integer'),
      float: (is_number, 'a number'),
      str: (isinstance(value, str), 'a string'),
  }.get(type(like), (isinstance(value, ConfigDict), 'a section'))
  if not fits:
    raise UsageError(f'{path} = {value!r} is of type {type(value).__name__}, and must be '
                     f'{wanted}.')
  if type(like) is float and not abs(value) <= _LARGEST:
    raise UsageError(f'{path} = {value!r} must be a finite number, at most {_LARGEST:.1e}, the '
                     'largest in float32.')


def _fits_list(value: Any, like: tuple) -> tuple[bool, str]:
  """Whether a value is a list of what `like` holds, by its first item, and what that is."""
  if not like:
    return _is_strings(value), 'a list of strings'
  if isinstance(like[0], int):
    return _is_integers(value), 'a list of integers'
  return _is_pairs(value), 'a list of pairs of strings'


def _is_strings(value: Any) -> bool:
  return isinstance(value, tuple | list) and all(isinstance(v, str) for v in value)


def _is_integers(value: Any) -> bool:
  return isinstance(value, tuple | list) and all(type(v) is int for v in value)


def _is_pairs(value: Any) -> bool:
  return isinstance(value, tuple | list) and all(_is_strings(v) and len(v) == 2 for v in value)
