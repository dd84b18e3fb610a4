"""What goes wrong, told in a message with a way out instead of a traceback.

docs/errors.md lists every message.
"""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import difflib
import errno
import os
import re
import sys
import traceback
from typing import Any

from absl import flags


class UsageError(Exception):
  """What a person asked for cannot be; the message names the thing, its value, the way out."""


class RunError(Exception):
  """Something failed underway: a loss that is not finite, a checkpoint that is gone."""


def nearest(word: str, valid: Iterable[str]) -> str:
  """A sentence with the valid words, or the nearest of them where one is near."""
  valid = sorted(valid)
  close = difflib.get_close_matches(word, valid, n=1, cutoff=0.6)
  if close:
    return f'did you mean {close[0]!r}?'
  return f'valid: {", ".join(map(repr, valid)) or "(none)"}.'


def tell(error: BaseException, debug: bool = False) -> int:
  """Prints what a person needs to know of an error; returns the exit code.

  2: asked for what cannot be. 1: failed underway. 130: stopped by Ctrl-C. An error that was
  not foreseen shows its traceback, as all do with `debug`.
  """
  message, code = _explain(error)
  if debug or message is None:
    traceback.print_exception(error)
  print(f'btx_jax: {message or _UNFORESEEN}', file=sys.stderr)
  return code


_UNFORESEEN = ('this was not foreseen. What is complete is kept, and the same command again '
               'continues; if it happens again, please report it with the text above.')


def _explain(error: BaseException) -> tuple[str | None, int]:
  """Message, None for what was not foreseen, and exit code."""
  if isinstance(error, UsageError):
    return str(error), 2
  if isinstance(error, RunError):
    return str(error), 1
  if isinstance(error, KeyboardInterrupt):
    return 'stopped; the same command again continues from the last checkpoint.', 130
  if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
    return (f'No space is left for {error.filename or "a file"}. Free some, or use another '
            '--workdir. What is complete is kept, and the same command again continues.', 1)
  if isinstance(error, OSError) and error.errno in (
      errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
    return f'{error.filename} cannot be written or read: {error.strerror}.', 1
  if type(error).__name__ == 'JaxRuntimeError' and 'Gloo' in str(error):
    return ('Another process of this job is gone; what it printed says why. The same command '
            f'on all again continues from the last checkpoint. ({str(error).splitlines()[0]})', 1)
  if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error):
    return ('Out of memory. Lower train.batch_size, raise train.microbatches or mesh.fsdp, or '
            f"set model.remat = 'full'. ({str(error).strip().splitlines()[:1]})", 1)
  return None, 1


@contextlib.contextmanager
def of(thing: str):
  """Says of a UsageError raised in the block what it is about."""
  try:
    yield
  except UsageError as error:
    raise UsageError(f'{thing}: {error}') from error


_QUOTED = 'Traceback (most recent call last)'  # by ml_collections, in messages


def of_config(error: Exception, argv: Sequence[str]) -> UsageError:
  """An error raised while flags or a config file were read, as a UsageError."""
  result = _of_config(error, argv)
  result.__cause__ = error
  return result


def _of_config(error: Exception, argv: Sequence[str]) -> UsageError:
  slashed = next((arg for arg in argv if re.match(r'--config\.runs\.[^=\[]*/', arg)), None)
  if slashed:
    return UsageError(f'{slashed}: write the name of a run with a slash as in '
                      "--config.runs['expert/code'].steps=100")
  if isinstance(error, flags.Error) and _QUOTED not in str(error):
    return UsageError(f'{error}. See --help, and btx_jax/base.py for the fields of the config.')
  cause = error
  while cause.args and isinstance(cause.args[0], BaseException):
    cause = cause.args[0]
  what = str(cause) if isinstance(cause, SyntaxError | OSError) else (
      ' '.join(map(str, cause.args)) or repr(cause))
  place = _place(error, argv)
  field = re.search(r'Key "(.+?)" does not exist|^\'(\w+)\'\s*(?:$|Did)', what)
  if isinstance(error, AttributeError | KeyError) and field:
    name, near = field[1] or field[2], re.search(r'Did you mean "(.+?)"', what)
    if ', line ' not in place:  # the file went well, so it was a flag
      named = rf'--config\..*\b{re.escape(name)}\b'
      place = next((arg for arg in argv if re.match(named, arg)), place)
    hint = f'did you mean {near[1]!r}?' if near else 'btx_jax/base.py has them all.'
    if re.match(r'--config\.runs.*\.(model|optimizer|train)\.', place):
      hint = 'what a run has otherwise than the config is set in the config file.'
    return UsageError(f'{place}: there is no field {name!r} there; {hint}')
  what = what.strip().splitlines()[-1]
  if _QUOTED not in str(cause):
    what = f'{type(cause).__name__}: {what}'
  kinds = re.search(r"override field '(.+?)'.*?\)\. (.*) is of original type <class '(.+?)'> and "
                    r"cannot be casted to type <class '(.+?)'>", what)
  if kinds:
    field, value, was, wanted = kinds.groups()
    return UsageError(f'{place}: {field} = {value} is of type {was}, and must be of type '
                      f'{wanted.split(".")[-1]}.')
  return UsageError(f'{place}: {what} (--debug shows where it came from.)')


def _place(error: Exception, argv: Sequence[str]) -> str:
  """The line of the config file that an error came from, or only the file."""
  given = re.search(r'(?:^|\n)--?config[=\n]([^:\n]*)', '\n'.join(argv))
  path = given[1] if given else ''
  told = ''.join(traceback.format_exception(error))
  lines = [line for file, line in re.findall(r'File "([^"]*)", line (\d+)', told)
           if os.path.realpath(file) == os.path.realpath(path)]
  return f'{path}, line {lines[-1]}' if lines else path


def compare(was: Any, now: Any, path: str = '') -> Iterator[tuple[str, Any, Any]]:
  """(path, was, now) of every entry that two nested dicts do not have in common."""
  if isinstance(was, dict) and isinstance(now, dict):
    for key in sorted(was.keys() | now.keys()):
      yield from compare(was.get(key), now.get(key), f'{path}.{key}'.lstrip('.'))
  elif was != now:
    yield path, was, now
