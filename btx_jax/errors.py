"""Errors for the person at the command line: one message with a way out, and no traceback.

docs/errors.md adds to the messages that need more.
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

from btx_jax import escaping, storage

# What was called otherwise before version 0.1.0: fields of the config, and a command.
RENAMED = {'data.length': 'data.seq_len', 'train.accumulation': 'train.microbatches',
           'train.balance': 'train.balance_loss', 'fit': 'compare',
           'tensorboard': "sinks, as in config.sinks = ('tensorboard',)",
           'evaluation.merge': 'a run of its own, base.run(base.ensemble(EXPERTS, selector='
                               'base.posterior())) or base.tfidf()'}


class UsageError(Exception):
  """The request is invalid. The message names the thing, its value and how to fix it."""


class RunError(Exception):
  """A run failed: the loss is not finite, a checkpoint is missing."""


def nearest(word: str, valid: Iterable[str]) -> str:
  """A sentence that suggests the valid word closest to `word`, or lists all of them."""
  valid = sorted(valid)
  close = difflib.get_close_matches(word, valid, n=1, cutoff=0.6)
  if close:
    return f'did you mean {close[0]!r}?'
  return f'valid: {", ".join(map(repr, valid)) or "(none)"}.'


def report_error(error: BaseException, debug: bool = False) -> int:
  """Prints the message of an error, and returns the exit code.

  2: the request is invalid. 1: a run failed. 130: stopped by Ctrl-C. Unexpected errors are printed
  with their traceback; `debug` does so for all.
  """
  message, code = _explain(error)
  if debug or message is None:
    traceback.print_exception(error)
  print(f'btx_jax: {escaping.printable(message or _UNEXPECTED)}', file=sys.stderr)
  return code


def report_unraisable(found: 'sys.UnraisableHookArgs') -> None:
  """For sys.unraisablehook: prints errors that cannot be caught, except two that are harmless.

  If an interrupt or a full disk ends a save, orbax closes its asyncio loop. tensorstore then fails
  to report finished writes to that loop, and Python would print a traceback for each. If one array
  of a checkpoint cannot be read, orbax abandons the reads of the others, and each turns the
  GeneratorExit by which Python ends it into an error of its own.
  """
  error = found.exc_value
  if str(error) == 'Event loop is closed' or isinstance(
      error and error.__cause__, GeneratorExit):
    return
  sys.__unraisablehook__(found)


_UNEXPECTED = ('unexpected error. Completed work is kept, and the same command continues from '
               'there; if it happens again, please report it with the text above.')


def _explain(error: BaseException) -> tuple[str | None, int]:
  """The message of an error, None if it is unexpected, and the exit code."""
  if isinstance(error, UsageError):
    return str(error), 2
  if isinstance(error, RunError):
    return str(error), 1
  if isinstance(error, KeyboardInterrupt):
    return 'stopped; the same command continues from the last checkpoint.', 130
  disk = storage.disk_error(error)
  if disk and disk.errno in storage.FULL:
    return (f'No space is left for {_path_of(disk)} ({_left(disk)}). Free some, or use another '
            '--workdir. Completed work is kept, and the same command continues from there.', 1)
  if disk:
    where = _path_of(disk) if '://' in _path_of(disk) else f'The disk of {_path_of(disk)}'
    return (f'{where} cannot be written or read: {disk.strerror}. Completed work is kept. Once it '
            'works, the same command continues from there.', 1)
  if isinstance(error, OSError) and error.errno in (
      errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR,
      errno.ENAMETOOLONG):
    return f'{error.filename} cannot be written or read: {error.strerror}.', 1
  if type(error).__name__ in ('JaxRuntimeError', 'ValueError') and 'Gloo' in str(error):
    return ('Another process of this job is gone; see its output for the reason. The same command '
            'on all processes continues from the last checkpoint. '
            f'({str(error).splitlines()[0]})', 1)
  if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error):
    return ('Out of memory. Lower train.batch_size, raise train.microbatches or mesh.fsdp, or '
            f"set model.remat = 'full'. ({str(error).strip().splitlines()[:1]})", 1)
  return None, 1


def _path_of(error: OSError) -> str:
  """The path in an error; writes through an open file have none."""
  return str(error.filename or 'a file')


def _left(error: OSError) -> str:
  """The cause or the free bytes of an error of a full disk, in words."""
  if error.errno == errno.EDQUOT:
    return 'the quota is used up'
  if error.errno == errno.EFBIG:
    return 'files of this size are not allowed there'
  free = storage.free_bytes(str(error.filename)) if error.filename else None
  return 'the disk is full' if free is None else f'{storage.size(free)} are free there'


@contextlib.contextmanager
def about(subject: str):
  """Prefixes the message of a UsageError raised in the block with its subject."""
  try:
    yield
  except UsageError as error:
    raise UsageError(f'{subject}: {error}') from error


_QUOTED = 'Traceback (most recent call last)'  # by ml_collections, in messages


def from_config(error: Exception, argv: Sequence[str]) -> UsageError:
  """An error raised while the flags or the config file were read, as a UsageError."""
  result = _from_config(error, argv)
  result.__cause__ = error
  return result


def _from_config(error: Exception, argv: Sequence[str]) -> UsageError:
  slashed = next((arg for arg in argv if re.match(r'--config\.runs\.[^=\[]*/', arg)), None)
  if slashed:
    return UsageError(f'{slashed}: write the name of a run with a slash as in '
                      "--config.runs['expert/code'].steps=100")
  if isinstance(error, flags.Error) and _QUOTED not in str(error):
    return UsageError(f'{error}. See --help, and docs/config.md for the fields of the config.')
  cause = error
  while cause.args and isinstance(cause.args[0], BaseException):
    cause = cause.args[0]
  what = str(cause) if isinstance(cause, SyntaxError | OSError) else (
      ' '.join(map(str, cause.args)) or repr(cause))
  place = _place(error, argv)
  field = re.search(r'Key "(.+?)" does not exist|^\'(\w+)\'\s*(?:$|Did)', what)
  if isinstance(error, AttributeError | KeyError) and field:
    return _no_field(field[1] or field[2], what, place, error, argv)
  if isinstance(error, ImportError) and re.match(
      r"No module named 'configs(\.base)?'|cannot import name 'base' from 'configs'", str(error)):
    return UsageError(f'{place}: write `from btx_jax import base`, and for one of the recipes '
                      '`from btx_jax.configs import demo`; there is no package configs any more.')
  if isinstance(error, ModuleNotFoundError):
    return UsageError(f'{place}: the module {error.name!r} is not installed for {sys.executable}. '
                      'Install it there or correct the name; a module of your own must be on '
                      'PYTHONPATH.')
  if isinstance(error, AttributeError) and error.name == 'get_config' and ', line ' not in place:
    return UsageError(f'{place} has no function get_config(). A config file defines one, which '
                      'starts from base.get_config() and returns it; see configs/demo.py.')
  what = what.strip().splitlines()[-1]
  if _QUOTED not in str(cause):
    what = f'{type(cause).__name__}: {what}'
  types = re.search(r"override field '(.+?)'.*?\)\. (.*) is of original type <class '(.+?)'> and "
                    r"cannot be casted to type <class '(.+?)'>", what)
  if types:
    field, value, was, wanted = types.groups()
    return UsageError(f'{place}: {field} = {value} is of type {was}, and must be of type '
                      f'{wanted.split(".")[-1]}.')
  return UsageError(f'{place}: {what} (--debug shows the traceback.)')


def _no_field(name: str, what: str, place: str, error: Exception, argv: Sequence[str]
              ) -> UsageError:
  """The config has no field of this name, according to the message `what` of ml_collections."""
  near = re.search(r'Did you mean "(.+?)"', what)
  if ', line ' not in place:  # the file was read without error, so a flag is wrong
    flag = rf'--config\..*\b{re.escape(name)}\b'
    place = next((arg for arg in argv if re.match(flag, arg)), place)
  seen = ''.join(traceback.format_exception(error)) + place
  for old, new in RENAMED.items():
    # The section shows in the flag or the line of code, or by the other fields that it has.
    sibling = new.rpartition('.')[2]
    if name == old.rpartition('.')[2] and (
        re.search(rf'\b{re.escape(old)}\b', seen) or f"'{sibling}'" in what):
      return UsageError(f'{place}: {old} is now {new}.')
  hint = f'did you mean {near[1]!r}?' if near else 'docs/config.md lists all fields.'
  if re.match(r'--config\.runs.*\.(model|optimizer|train)\.', place):
    hint = 'fields that differ in one run are set in the config file.'
  return UsageError(f'{place}: there is no field {name!r} there; {hint}')


def _place(error: Exception, argv: Sequence[str]) -> str:
  """'FILE, line N' of the config file where an error came from, or only its path."""
  given = re.search(r'(?:^|\n)--?config[=\n]([^:\n]*)', '\n'.join(argv))
  path = given[1] if given else ''
  lines = [line for file, line in re.findall(r'File "([^"]*)", line (\d+)',
                                             ''.join(traceback.format_exception(error)))
           if os.path.realpath(file) == os.path.realpath(path)]
  return f'{path}, line {lines[-1]}' if lines else path


def nested_differences(was: Any, now: Any, path: str = '') -> Iterator[tuple[str, Any, Any]]:
  """(path, was, now) of every entry in which two nested dicts differ."""
  if isinstance(was, dict) and isinstance(now, dict):
    for key in sorted(was.keys() | now.keys()):
      yield from nested_differences(was.get(key), now.get(key), f'{path}.{key}'.lstrip('.'))
  elif was != now:
    yield path, was, now
