"""Several processes that compute as one: how they start, agree, write and stop.

All processes run the same program on the same config, and take part in every jax computation.
Process 0 decides whatever depends on files or clocks (which runs are complete, which step to
resume from) and broadcasts it, because shared storage may show each process something else. It
alone writes reports, manifests and metrics. With a single process everything here does nothing.
"""

from collections.abc import Callable, Mapping
import concurrent.futures
import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import threading
import time
from typing import Any, TypeVar

from btx_jax import terminal
from btx_jax.devices import rollcall
from btx_jax.errors import RunError, UsageError
from btx_jax.files import inputs, places, writing

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy',
             'sentencepiece')

# jax is imported inside functions: `status` imports this module too, and must start fast.

T = TypeVar('T')
TIMEOUT = 300  # seconds that processes wait for each other at the start
_TICK = 5.0  # seconds between signs of life from process 0 while the others wait for it
_GRACE = 5.0  # seconds for the other processes to reach the same error
_STORAGE_LAG = 120.0  # seconds within which shared storage must show a file that was written
_terminated = threading.Event()  # set by SIGTERM; used with a single process only
_step_numbers = itertools.count(1)  # of all runs: processes agree on preemption by step number


def initialize(place: rollcall.Place | None, cluster: bool, facts: Mapping[str, Any],
               timeout: float = TIMEOUT):
  """Joins the processes of a job. Call it before anything asks jax for devices.

  Args:
    place: of this process, from rollcall.place_from_flags; or None.
    cluster: whether jax finds the other processes itself: TPU VMs, GKE, Slurm, Open MPI.
    facts: nested dicts of plain data that must be equal on all processes.
    timeout: seconds to wait for the other processes, and to look for the coordinator.

  Raises:
    UsageError: on all processes, if some are missing, two have the same id, or facts differ. Or
      BTX_JAX_TOKEN is missing.
  """
  if place and cluster:
    raise UsageError('--distributed finds the coordinator and all processes itself: omit it, or '
                     'omit --coordinator, --num_processes and --process_id.')
  if not place and not cluster:
    return
  facts = {**facts, 'versions': versions(), 'btx_jax': code_hash()}
  facts = json.loads(json.dumps(facts))  # tuples become lists, as on the other processes
  if place:
    from btx_jax.devices import meeting  # asyncio takes time to import
    # Removed, since what a job starts, such as code that a model wrote, need not inherit it.
    place = rollcall.bind(place, os.environ.get(rollcall.BIND))
    token = rollcall.secret(place, os.environ.pop(rollcall.TOKEN, None))
    bound = meeting.meet_processes(place, token, facts, timeout)
    import jax
    jax.distributed.initialize(
        place.coordinator, place.count, place.index, initialization_timeout=round(timeout),
        cluster_detection_method='deactivate', coordinator_bind_address=bound)
  else:
    import jax
    print(f'btx_jax: waiting up to {timeout:.0f} s for the other processes. If jax ends this one '
          'with "Terminating process", not all of them connected: see docs/processes.md',
          file=sys.stderr, flush=True)
    try:
      jax.distributed.initialize(initialization_timeout=round(timeout))
    except (ValueError, RuntimeError) as error:
      raise UsageError(
          f'--distributed: jax finds no cluster here ({error}). It supports TPU VMs, GKE, Slurm '
          '(srun) and Open MPI; elsewhere set --coordinator, --num_processes and --process_id. '
          'See docs/processes.md.') from error
  terminal.console.quiet = not is_process_0()
  # Compare the devices first: `check_equal` already computes on them.
  found: dict[int, dict[str, Any]] = {}
  for device in jax.devices():
    kinds = found.setdefault(device.process_index, {'devices': {}})['devices']
    kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1
  _check_agreement(found)
  check_equal(facts)


def code_hash() -> str:
  """A hash of this package's source, so that a process with another checkout is noticed."""
  digest = hashlib.sha256()
  folder = pathlib.Path(__file__).parents[1]
  for path in sorted(folder.rglob('*.py')):
    digest.update(f'{path.relative_to(folder)}\n'.encode())
    digest.update(path.read_bytes())
  return digest.hexdigest()[:16]


def _several_processes() -> bool:
  import jax
  return jax.process_count() > 1


def is_process_0() -> bool:
  """Whether this is process 0, the only one that writes and prints; true for a single process."""
  import jax
  return jax.process_index() == 0


def gather(value) -> list:
  """The values of all processes, by index; plain data. All processes must call it."""
  if not _several_processes():
    return [value]
  from jax.experimental import multihost_utils
  import numpy as np
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array([len(data)], np.int32))[:, 0]
  padded = 1 << int(sizes.max() - 1).bit_length()  # a power of 2: each size is compiled
  rows = multihost_utils.process_allgather(np.pad(data, (0, padded - len(data))))
  try:
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]
  except ValueError as error:
    raise RunError('One process of this job has failed, and the others cannot continue without it; '
                   'see its output for the reason. The same command on all processes continues '
                   'from the last checkpoint.') from error


def check_equal(facts: Mapping[str, Any]):
  """Raises UsageError on all processes, with the values that differ, unless all are equal."""
  _check_agreement(dict(enumerate(gather(facts))))


def _check_agreement(facts_of: Mapping[int, Mapping[str, Any]]):
  """The same for facts that are known already, by process index."""
  found = rollcall.disagreement(facts_of)
  if found:
    raise UsageError(found)


def on_process_0(f: Callable[[], T]) -> T | None:
  """Calls `f` on process 0 while the others wait, however long it takes.

  If `f` raises, all processes raise. `f` must not call anything that all processes must call.

  Returns:
    the result of `f` on process 0; None on the others.
  """
  if not _several_processes():
    return f()
  if is_process_0():
    # In a thread, so that the others get a sign of life every few seconds: no barrier of jax
    # waits as long as tokenizing a corpus takes.
    pool = concurrent.futures.ThreadPoolExecutor(1)
    work = pool.submit(f)
    pool.shutdown(wait=False)
    while not concurrent.futures.wait([work], _TICK).done:
      gather(None)
    error = work.exception()
    gather({'error': error and str(error), 'usage': isinstance(error, UsageError)})
    if error:
      raise error
    return work.result()
  while (outcome := gather(None)[0]) is None:
    pass
  if outcome['error'] is not None:
    raise (UsageError if outcome['usage'] else RunError)(f'process 0: {outcome["error"]}')
  return None


def broadcast(f: Callable[[], T]) -> T:
  """Calls `f` on process 0 and returns its result, plain data, on all; if it raises, all raise."""
  return gather(on_process_0(f))[0]


def check_shared(folder: str):
  """Raises UsageError, on all processes, unless all of them see the same folder."""
  if not _several_processes():
    return
  path = os.path.join(folder, 'processes.partial')

  def write_mark() -> str:
    mark = f'{os.getpid()} {time.time_ns()}'
    with writing.replacing(path) as file:
      file.write(mark)
    return mark

  mark = broadcast(write_mark)

  def sees_mark() -> bool:
    try:
      with inputs.open_file(path) as file:
        return file.read().decode() == mark
    except OSError:
      return False

  blind = [i for i, sees in enumerate(gather(_becomes_true(sees_mark))) if not sees]
  on_process_0(lambda: writing.remove(path))
  if blind:
    raise UsageError(
        f'--workdir={folder}: process(es) {", ".join(map(str, blind))} cannot see what process 0 '
        'writes there. The working directory must be on storage that all processes share. See '
        'docs/processes.md.')


def wait_for(path: str):
  """Waits until shared storage shows a file that process 0 has written."""
  if not _becomes_true(lambda: places.exists(path)):
    raise RunError(f'{path}, which process 0 has written, did not appear within '
                   f'{_STORAGE_LAG:.0f} s.')


def _becomes_true(holds: Callable[[], bool]) -> bool:
  """Waits for a condition on shared storage; returns whether it came true in time."""
  until = time.monotonic() + _STORAGE_LAG
  while not holds():
    if time.monotonic() > until:
      return False
    time.sleep(0.2)
  return True


@contextlib.contextmanager
def deferring_sigterm():
  """In the block, SIGTERM does not end this process; instead `preempted` becomes true."""
  if _several_processes():  # jax's preemption service handles it, whichever process receives it
    yield
    return
  _terminated.clear()
  before = signal.signal(signal.SIGTERM, lambda *_: _terminated.set())
  try:
    yield
  finally:
    # `before` is None if C++ had installed the handler; that one cannot be restored.
    signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def preempted() -> bool:
  """Whether to save and stop now; call it once per step. All processes get the same answer."""
  if not _several_processes():
    return _terminated.is_set()
  from jax.experimental import multihost_utils
  return multihost_utils.reached_preemption_sync_point(next(_step_numbers))


def leave_job(code: int) -> int:
  """Ends this process after an error; if it is the only one, returns the exit code instead.

  jax would wait minutes for processes that wait for this one. Those that reach the same error
  shut down in order; any other notices that this one is gone.
  """
  jax = sys.modules.get('jax')
  if jax is None or not jax.distributed.is_initialized():
    return code
  sys.stdout.flush()
  sys.stderr.flush()
  timer = threading.Timer(_GRACE, os._exit, [code])
  timer.daemon = True
  timer.start()
  with contextlib.suppress(RuntimeError):  # another process was faster
    jax.distributed.shutdown()
  os._exit(code)


@functools.cache
def code_version() -> str:
  """The version of this package: its number, and in a checkout the git commit, with a hash of the
  source if it has uncommitted changes."""
  def git(*arguments: str) -> str:
    return subprocess.run(['git', '-C', folder, *arguments], capture_output=True, text=True,
                          check=True, timeout=10).stdout.strip()

  folder = str(pathlib.Path(__file__).parents[1])
  try:
    number = importlib.metadata.version('btx_jax')
  except importlib.metadata.PackageNotFoundError:
    number = 'not installed'
  try:
    if not git('ls-files', '__init__.py'):  # installed below a repository of something else
      return f'{number}, source {code_hash()}'
    commit, changed = git('rev-parse', '--short=12', 'HEAD'), git('status', '--porcelain', '.')
  except (OSError, subprocess.SubprocessError):
    return f'{number}, source {code_hash()}'
  return f'{number}, commit {commit}' + (f' with changes, source {code_hash()}' if changed else '')


def versions() -> dict[str, str]:
  """The versions of Python and of the packages that a result may depend on."""
  return {'python': platform.python_version(),
          **{name: importlib.metadata.version(name) for name in _PACKAGES}}
