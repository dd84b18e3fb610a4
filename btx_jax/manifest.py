"""What a run directory says about itself: manifest.json, replaced whole at every change."""

from collections.abc import Iterator
import contextlib
import datetime
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import time
from typing import Any

from btx_jax.errors import UsageError
from btx_jax.files import replacing

RUNNING, STOPPED, COMPLETE, FAILED = 'running', 'stopped', 'complete', 'failed'
_NAME, LOCK = 'manifest.json', 'lock'
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy',
             'sentencepiece')


def identity(spec: dict) -> str:
  """A hash of everything that decides a run's result, sources included."""
  return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def read(folder: str) -> dict | None:
  """The manifest of a run directory; None if there is no run there.

  Raises:
    UsageError: the file is there but not a manifest.
  """
  path = os.path.join(folder, _NAME)
  try:
    with open(path, encoding='utf-8') as file:
      manifest = json.load(file)
    manifest['state'], manifest['spec']  # what everything else relies on
  except FileNotFoundError:
    return None
  except NotADirectoryError:
    raise  # of the path, not of the file
  except (OSError, ValueError, TypeError, KeyError) as error:
    raise UsageError(f'{path} is not a manifest of ours ({error!r}); use another --workdir, or '
                     'delete that folder to train anew.') from error
  return manifest


def write(folder: str, manifest: dict):
  """Replaces the manifest in one step, so that a reader never sees half of it."""
  with replacing(os.path.join(folder, _NAME)) as file:
    json.dump(manifest | {'updated': now()}, file, indent=1)


def begin(name: str, spec: dict) -> dict:
  """The manifest of a run that starts now."""
  return {
      'name': name, 'state': RUNNING, 'identity': identity(spec), 'spec': spec,
      'started': now(), 'steps_done': 0, 'seconds': 0.0, 'tokens_by_domain': {},
      'versions': versions(),
  }


def go_on(manifest: dict) -> dict:
  """The manifest of a run that starts again; other versions than before are noted."""
  manifest = {key: value for key, value in manifest.items() if key != 'error'}
  if manifest['versions'] != versions():
    manifest['earlier_versions'] = [
        *manifest.get('earlier_versions', []), manifest['versions']]
  return manifest | {'state': RUNNING, 'versions': versions()}


@contextlib.contextmanager
def lock(folder: str):
  """Holds a directory for this process, until the end of the block or of the process.

  A file system that knows no locks lets everyone in.

  Raises:
    UsageError: another process holds it.
  """
  os.makedirs(folder, exist_ok=True)
  with open(os.path.join(folder, LOCK), 'a+', encoding='utf-8') as file:
    try:
      _lock(file)
    except OSError as error:
      if error.errno in (errno.EACCES, errno.EAGAIN):
        file.seek(0)
        raise UsageError(f'{folder} is in use by another process: {file.read().strip()}. '
                         'Wait for it, or stop it.') from error
    file.truncate(0)
    file.write(f'{socket.gethostname()}, process {os.getpid()}\n')
    file.flush()
    yield


def _lock(file, tries: int = 20):
  """Tries for a second: whoever asks whether a lock is held holds it for a moment."""
  for left in reversed(range(tries)):
    try:
      return fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      if not left:
        raise
      time.sleep(1 / tries)


def held(folder: str) -> bool:
  """Whether a process is at work in a run directory; True where that cannot be known."""
  try:
    with open(os.path.join(folder, LOCK), encoding='utf-8') as file:
      fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except FileNotFoundError:
    return False
  except OSError:
    return True
  return False


def check(folder: str, manifest: dict, spec: dict):
  """Raises UsageError if the run in `folder` is not the one that `spec` describes."""
  lines = differences(manifest, dict.fromkeys(manifest['spec']) | spec)
  if lines:
    raise UsageError(
        f'{folder} belongs to another config:\n' + '\n'.join(f'  {line}' for line in lines) +
        '\nNothing was touched. Use another --workdir, or delete that folder to train anew.')


def differences(manifest: dict, spec: dict) -> list[str]:
  """What `spec`, or a part of one, says otherwise than a manifest: 'steps: 6 there, 8 now'."""
  known = {key: manifest['spec'].get(key) for key in spec}
  return [f'{path}: {was!r} there, {now!r} now' for path, was, now in compare(known, spec)]


def compare(was: Any, now: Any, path: str = '') -> Iterator[tuple[str, Any, Any]]:
  """(path, was, now) of every entry that two nested dicts do not have in common."""
  if isinstance(was, dict) and isinstance(now, dict):
    for key in sorted(was.keys() | now.keys()):
      yield from compare(was.get(key), now.get(key), f'{path}.{key}'.lstrip('.'))
  elif was != now:
    yield path, was, now


def versions() -> dict[str, str]:
  """Of Python and the packages that a result may depend on."""
  return {'python': platform.python_version(),
          **{name: importlib.metadata.version(name) for name in _PACKAGES}}


def now() -> str:
  """The time as manifests write it."""
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
