"""Several processes that compute as one: who they are, what they agree on, who writes.

All processes run the same program on the same config, and every jax computation is one of all
of them. What depends on files or clocks (which runs are complete, where to go on from) process
0 decides and tells the others, because shared storage may show each something else; and it
alone writes reports, manifests and metrics. With one process everything here does nothing.
"""

from collections.abc import Callable, Mapping
import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import signal
import sys
import threading
import time
from typing import Any, TypeVar

from btx_jax import terminal
from btx_jax.devices import rollcall
from btx_jax.errors import RunError, UsageError

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy',
             'sentencepiece')

# jax is imported where it is used: whoever looks at runs imports this too, and has no time.

T = TypeVar('T')
TIMEOUT = 300  # seconds that processes wait for each other at the start
_TICK = 5.0  # seconds after which those who wait for process 0 hear that it is at work
_GRACE = 5.0  # seconds for the others to come to the same error
_LAG = 120.0  # seconds after which shared storage must show what was written
_told = threading.Event()  # by SIGTERM, where there is one process
_beats = itertools.count(1)  # one for each step of any run: preemption is agreed on by number


def initialize(place: rollcall.Place | None, cluster: bool, facts: Mapping[str, Any],
               timeout: float = TIMEOUT):
  """Joins the processes of a job. To be called before jax is asked for devices.

  Args:
    place: of this process, from rollcall.place; or None.
    cluster: jax finds the others itself: TPU VMs, GKE, Slurm, Open MPI.
    facts: nested dicts of plain data that must be the same on all processes.
    timeout: seconds to wait for the others, and to look for the coordinator.

  Raises:
    UsageError: processes are missing, come twice or do not agree, on all of them.
  """
  if place and cluster:
    raise UsageError('--distributed finds coordinator and processes itself; leave it away, or '
                     'leave away --coordinator, --num_processes and --process_id.')
  if not place and not cluster:
    return
  facts = {**facts, 'versions': versions(), 'btx_jax': code_hash()}
  facts = json.loads(json.dumps(facts))  # tuples are lists, as they are for the others
  if place:
    rollcall.attend(place, facts, timeout)
  import jax
  if place:
    jax.distributed.initialize(
        place.coordinator, place.count, place.index, initialization_timeout=round(timeout),
        cluster_detection_method='deactivate')
  else:
    print(f'btx_jax: waiting for the other processes, at most {timeout:.0f} s. If jax ends this '
          'one with "Terminating process", not all of them came: see docs/processes.md',
          file=sys.stderr, flush=True)
    try:
      jax.distributed.initialize(initialization_timeout=round(timeout))
    except (ValueError, RuntimeError) as error:
      raise UsageError(
          f'--distributed: jax finds no cluster here ({error}). It knows TPU VMs, GKE, Slurm '
          '(srun) and Open MPI; elsewhere give --coordinator, --num_processes and --process_id. '
          'See docs/processes.md.') from error
  terminal.console.quiet = not is_first()
  # Devices can be told before anything is computed on them, and must be: what follows is.
  found: dict[int, dict[str, Any]] = {}
  for device in jax.devices():
    kinds = found.setdefault(device.process_index, {'devices': {}})['devices']
    kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1
  _refuse(rollcall.disagreement(found))
  agree(facts)


def code_hash() -> str:
  """Of the source of this package, so that another checkout is noticed."""
  digest = hashlib.sha256()
  folder = pathlib.Path(__file__).parents[1]
  for path in sorted(folder.rglob('*.py')):
    digest.update(f'{path.relative_to(folder)}\n'.encode())
    digest.update(path.read_bytes())
  return digest.hexdigest()[:16]


def _several() -> bool:
  import jax
  return jax.process_count() > 1


def is_first() -> bool:
  """Whether this is process 0, which writes; where there is one process, it is."""
  import jax
  return jax.process_index() == 0


def gather(value) -> list:
  """Plain data of all processes, by index. All of them must call it."""
  if not _several():
    return [value]
  from jax.experimental import multihost_utils
  import numpy as np
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array([len(data)], np.int32))[:, 0]
  room = 1 << int(sizes.max() - 1).bit_length()  # few sizes: each is compiled
  rows = multihost_utils.process_allgather(np.pad(data, (0, room - len(data))))
  return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def agree(facts: Mapping[str, Any]):
  """Raises UsageError on all processes, with both sides, unless all have the same facts."""
  _refuse(rollcall.disagreement(dict(enumerate(gather(facts)))))


def _refuse(disagreement: str | None):
  if disagreement:
    raise UsageError(disagreement)


def first(f: Callable[[], T]) -> T | None:
  """Process 0 does something while the others wait, however long it takes.

  What it raises is raised on all. `f` must not call anything that all processes have to.

  Returns:
    what `f` gave, on process 0; None on the others.
  """
  if not _several():
    return f()
  if is_first():
    # In a thread, so that the others hear every few seconds that it is still at work: no
    # barrier of jax waits for as long as text takes to be tokenized.
    pool = concurrent.futures.ThreadPoolExecutor(1)
    work = pool.submit(f)
    pool.shutdown(wait=False)
    while not concurrent.futures.wait([work], _TICK).done:
      gather(None)
    error = work.exception()
    told = {'error': error and str(error), 'usage': isinstance(error, UsageError)}
    gather(told)
    if error:
      raise error
    return work.result()
  while (told := gather(None)[0]) is None:
    pass
  if told['error'] is not None:
    raise (UsageError if told['usage'] else RunError)(f'process 0: {told["error"]}')
  return None


def decided(f: Callable[[], T]) -> T:
  """What `f` gives on process 0, plain data, told to all. What it raises is raised on all."""
  value = first(f)
  return gather(value)[0] if _several() else value


def check_shared(folder: str):
  """Raises UsageError, on all processes, unless all see the same folder."""
  if not _several():
    return
  path = os.path.join(folder, 'processes.partial')

  def put() -> str:
    os.makedirs(folder, exist_ok=True)
    mark = f'{os.getpid()} {time.time_ns()}'
    with open(path, 'w', encoding='utf-8') as file:
      file.write(mark)
    return mark

  mark = decided(put)

  def seen() -> bool:
    try:
      with open(path, encoding='utf-8') as file:
        return file.read() == mark
    except OSError:
      return False

  blind = [i for i, sees in enumerate(gather(_in_time(seen))) if not sees]
  first(lambda: os.remove(path))
  if blind:
    raise UsageError(
        f'--workdir={folder}: what process 0 writes there is not seen by process(es) '
        f'{", ".join(map(str, blind))}. The working directory must be on storage that all '
        'share. See docs/processes.md.')


def wait_for(path: str):
  """Waits until shared storage shows a file that process 0 has written."""
  if not _in_time(lambda: os.path.exists(path)):
    raise RunError(f'{path}, which process 0 has written, did not appear within {_LAG:.0f} s.')


def _in_time(holds: Callable[[], bool]) -> bool:
  until = time.monotonic() + _LAG
  while not holds():
    if time.monotonic() > until:
      return False
    time.sleep(0.2)
  return True


@contextlib.contextmanager
def until_preempted():
  """In the block, SIGTERM does not end this process, but makes `preempted` say so."""
  if _several():  # jax's preemption service takes it, of whatever process
    yield
    return
  _told.clear()
  before = signal.signal(signal.SIGTERM, lambda *_: _told.set())
  try:
    yield
  finally:
    # None, where C++ had put a handler, cannot be put back.
    signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def preempted() -> bool:
  """To be asked at every step: whether to save and stop, by the same step on all processes."""
  if not _several():
    return _told.is_set()
  from jax.experimental import multihost_utils
  return multihost_utils.reached_preemption_sync_point(next(_beats))


def leave(code: int) -> int:
  """Ends this process after an error; returns the exit code where it was alone.

  jax would wait minutes for processes that wait for this one. Those that came to the same
  error are let go in order; any other learns that this one is gone.
  """
  jax = sys.modules.get('jax')
  if jax is None or not jax.distributed.is_initialized():
    return code
  sys.stdout.flush()
  sys.stderr.flush()
  timer = threading.Timer(_GRACE, os._exit, [code])
  timer.daemon = True
  timer.start()
  with contextlib.suppress(RuntimeError):  # another was faster
    jax.distributed.shutdown()
  os._exit(code)


def versions() -> dict[str, str]:
  """Of Python and the packages that a result may depend on."""
  return {'python': platform.python_version(),
          **{name: importlib.metadata.version(name) for name in _PACKAGES}}
