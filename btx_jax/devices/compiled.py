"""Compiled programs, kept on disk from one command to the next by jax's own cache.

Whoever can write there decides what the next command executes. So a folder that others can write
to, or that belongs to another user, is not used.
"""

import contextlib
import hashlib
import os
import platform
import stat
import sys

from btx_jax.terminal import say

VARIABLE = 'JAX_COMPILATION_CACHE_DIR'


def check_chosen() -> None:
  """Creates the folder that JAX_COMPILATION_CACHE_DIR names; empties the variable if it is unsafe.

  Call it before jax is imported, which reads the variable. Buckets (URLs) are not checked.
  """
  folder = os.environ.get(VARIABLE, '')
  if not folder or '://' in folder:
    return
  why = _make_private(folder)
  if why:
    os.environ[VARIABLE] = ''  # keeps nothing
    # On stderr, because scripts read what `jobs` prints.
    print(f'btx_jax: compiled programs are not kept: {why}', file=sys.stderr)


def keep() -> None:
  """Turns jax's cache on, in the user's cache directory, unless the environment has decided.

  JAX_COMPILATION_CACHE_DIR names another directory, and keeps nothing if it is empty. Nothing is
  kept for several CPU devices either: programs that XLA 0.10 reads back from disk can wait for each
  other in their collectives, until XLA ends the process.
  """
  import jax
  if VARIABLE in os.environ:
    return
  if jax.default_backend() == 'cpu' and jax.device_count() > 1:
    return
  folder = default_folder()
  is_new = not os.path.isdir(folder)
  why = _make_private(folder)
  if why:
    say(f'compiled programs are not kept: {why}')
    return
  if is_new:
    say(f'compiled programs are kept in {folder}; JAX_COMPILATION_CACHE_DIR names another place')
  jax.config.update('jax_compilation_cache_dir', folder)


def _make_private(folder: str) -> str:
  """Creates a folder that only this user can write to, unless it exists.

  Returns:
    why it cannot be used, in words; '' if it can.
  """
  try:
    os.makedirs(os.path.dirname(os.path.abspath(folder)), exist_ok=True)
    with contextlib.suppress(FileExistsError):  # another process may make it at this moment
      os.mkdir(folder, 0o700)
    found = os.stat(folder)
  except OSError as error:
    return str(error)
  if found.st_uid not in (os.geteuid(), 0):
    return (f'{folder} belongs to user {found.st_uid}, who decides what would be executed here; '
            f'name a folder of your own in {VARIABLE}')
  if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
    return (f'others may write to {folder}, and decide what is executed here; empty it and run '
            f'chmod 700 {folder}, or name another folder in {VARIABLE}')
  return ''


def default_folder() -> str:
  """Where programs compiled on this machine are kept.

  It is named after the processor: a program compiled for the CPU may not run on another one.
  """
  caches = os.environ.get('XDG_CACHE_HOME') or os.path.join('~', '.cache')
  name = hashlib.sha256(_processor().encode()).hexdigest()[:12]
  return os.path.join(os.path.expanduser(caches), 'btx_jax', f'compiled-{name}')


def _processor() -> str:
  """The processor's model and its instruction sets, as the system lists them."""
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      lines = [line for line in file
               if line.startswith(('model name', 'flags', 'Features', 'CPU '))]
  except OSError:  # not Linux
    lines = [platform.processor()]
  return '\n'.join([platform.machine(), *sorted(set(lines))])
