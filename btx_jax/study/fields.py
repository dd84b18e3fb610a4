"""Whether a config has the fields of btx_jax/base.py, each with a value of its type.

ml_collections checks what is set field by field; what it lets pass is None, a section that was
replaced whole, and all that stands in `domains` and `runs`.
"""

from typing import Any

from ml_collections import ConfigDict

from btx_jax import base, files
from btx_jax.errors import UsageError, nearest

_OWN = ('model', 'optimizer', 'train')  # sections that a run may have some fields of


def check(config) -> None:
  """Raises UsageError for the first field that is missing, unknown or of another type."""
  like = base.get_config()
  _check_section('', config, like)
  files.check_path('tokenizer.path', config.tokenizer.path)
  for name, domain in config.domains.items():
    _check_section(f'domains.{name}', domain, base.domain())
    for path in domain.paths:
      files.check_path(f'domains.{name}.paths', path)
  for name, run in config.runs.items():
    kind = run.init.get('kind') if isinstance(run.get('init'), ConfigDict) else None
    init = {'mix': base.mix(rules={'': ''}), 'hugging_face': base.hugging_face('')}.get(
        kind, base.random())
    _check_section(f'runs.{name}', run, base.run(init, {}))
    files.check_path(f'runs.{name}.init.folder', run.init.get('folder', ''))
    for domain, weight in run.domains.items():
      _check_value(f'runs.{name}.domains.{domain}', weight, 0.0)
    for section in _OWN:
      for field, value in run[section].items():
        path = f'runs.{name}.{section}.{field}'
        if field not in like[section]:
          raise UsageError(f'{path} is not a field; {nearest(field, like[section])}')
        _check_value(path, value, like[section][field])


def _check_section(path: str, section: Any, like: ConfigDict) -> None:
  _check_value(path or 'the config', section, like)
  for field in section if like else ():  # what is empty in base.py is free
    if field not in like:
      path = f'{path}.{field}'.lstrip('.')
      raise UsageError(f'{path} is not a field; {nearest(field, like)}')
  for field, expected in like.items():
    inner = f'{path}.{field}'.lstrip('.')
    if field not in section:
      path = inner
      raise UsageError(f'{path} is missing. Start from base.get_config(), change fields of its '
                       'sections rather than replace one, and make domains by base.domain(...) '
                       'and runs by base.run(...).')
    if isinstance(expected, ConfigDict):
      _check_section(inner, section[field], expected)
    else:
      _check_value(inner, section[field], expected)


def _check_value(path: str, value: Any, like: Any) -> None:
  """Of the type of `like`, and a list one of texts, or of pairs if `like` has one."""
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  fits, wanted = {
      bool: (isinstance(value, bool), 'True or False'),
      int: (is_number and isinstance(value, int), 'a whole number'),
      float: (is_number, 'a number'),
      str: (isinstance(value, str), 'a text'),
      tuple: (_is_pairs(value), 'a list of pairs of texts') if like else (
          _is_texts(value), 'a list of texts'),
  }.get(type(like), (isinstance(value, ConfigDict), 'a group of fields'))
  if not fits:
    raise UsageError(f'{path} = {value!r} is of type {type(value).__name__}, and must be '
                     f'{wanted}.')


def _is_texts(value: Any) -> bool:
  return isinstance(value, tuple | list) and all(isinstance(v, str) for v in value)


def _is_pairs(value: Any) -> bool:
  return isinstance(value, tuple | list) and all(_is_texts(v) and len(v) == 2 for v in value)
