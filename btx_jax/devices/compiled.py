"""Compiled programs, kept on disk from one command to the next by jax's own cache."""

import hashlib
import os
import platform

import jax

from btx_jax.terminal import say


def keep() -> None:
  """Turns jax's cache on, in the user's cache directory, unless the environment has decided.

  JAX_COMPILATION_CACHE_DIR names another directory, and keeps nothing if it is empty. Nothing is
  kept for several CPU devices either: programs that XLA 0.10 reads back from disk can wait for each
  other in their collectives, until XLA ends the process.
  """
  if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
    return
  if jax.default_backend() == 'cpu' and jax.device_count() > 1:
    return
  folder = default_folder()
  if not os.path.isdir(folder):
    try:
      os.makedirs(folder)
    except OSError as error:
      say(f'compiled programs are not kept: {error}')
      return
    say(f'compiled programs are kept in {folder}; JAX_COMPILATION_CACHE_DIR names another place')
  jax.config.update('jax_compilation_cache_dir', folder)


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
