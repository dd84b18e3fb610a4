"""What goes wrong, told in a message with a way out instead of a traceback.

docs/errors.md lists every message.
"""

from collections.abc import Iterable
import difflib
import errno
import os
import re
import sys
import traceback


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
            '--workdir; the same command again continues from the last checkpoint.', 1)
  if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
    return f'{error.filename} cannot be written or read: {error.strerror}.', 1
  if type(error).__name__ == 'JaxRuntimeError' and 'Gloo' in str(error):
    return ('Another process of this job is gone; what it printed says why. The same command '
            f'on all again continues from the last checkpoint. ({str(error).splitlines()[0]})', 1)
  if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error):
    return ('Out of memory. Lower train.batch_size, raise train.accumulation or mesh.fsdp, or '
            f'set model.remat = True. ({str(error).strip().splitlines()[:1]})', 1)
  return None, 1


def of_config(error: Exception) -> Exception:
  """An error raised while flags or a config file were read, as a UsageError."""
  missing = isinstance(error, AttributeError | KeyError)
  cause = error
  while cause.args and isinstance(cause.args[0], BaseException):
    cause = cause.args[0]
  message = ' '.join(map(str, cause.args)) or repr(cause)
  if missing and message.startswith("'"):
    message = f'the config has no field {message}'
  if 'Traceback (most recent call last)' in message:  # ml_collections quotes one
    file, line = re.findall(r'File "([^"]*)", line (\d+)', message)[-1]
    message = f'{os.path.relpath(file)}, line {line}: {message.strip().splitlines()[-1]}'
  result = UsageError(message.replace('\n', ' '))
  result.__cause__ = error
  return result
