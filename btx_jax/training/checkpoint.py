"""Checkpoints of a run. The only file that knows orbax.

Parameters, optimizer state and position are saved as separate items, so that a mixture can read an
expert's parameters without its moments. A further item, `sums`, has the checksums of all
arrays, the step, and the identity of the run. Everything that is read is compared with it; see
damage.py.

A damaged checkpoint is set aside, as damaged-STEP beside the others; nothing is deleted.
"""

from collections.abc import Sequence
import errno
import json
import math
import os
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from btx_jax import storage
from btx_jax.devices import distributed, sharding
from btx_jax.files import for_orbax, naming, places
from btx_jax.terminal import say
from btx_jax.training import checksums, damage, saving, slices
from btx_jax.training.step import TrainState

_MARGIN = 1 << 26  # bytes that several processes leave for metadata, besides the arrays


class Checkpoints:
  """The checkpoints of one run; a context manager.

  Attributes:
    best: the step whose checkpoint is kept until another step is set; 0 is none.
    failures: the failed saves.
  """

  def __init__(self, folder: str, identity: str, newest: int = 2, every: int = 0,
               steps: Sequence[int] = (), patience: int = 1):
    """Keeps the `newest` checkpoints, those at multiples of `every` (0: none), and `steps`.

    `identity`: the identity of the run, 16 hexadecimal digits; see study/manifest.py.
    `patience`: how many saves in a row fail before an error is raised.
    """
    self.best, self.failures, self._identity = 0, saving.Failures(), identity
    self._newest, self._patience = newest, patience
    self._unfinished: _Save | None = None
    policies = ocp.training.preservation_policies
    kept = [policies.LatestN(newest), policies.CustomSteps(steps), _KeepsBest(self)]
    if every:
      kept.append(policies.EveryNSteps(every))
    self._folder = naming.checkpoint_path(folder)
    # orbax's own policies do not match the type that it declares for them.
    self._policy: Any = policies.AnyPreservationPolicy(kept)
    for_orbax.prepare(self._folder)
    saving.clear_unfinished(self._folder)
    self._steps: list[int] = []  # when there is no checkpointer
    self._checkpointer: ocp.training.Checkpointer | None = self._open()
    self._directory = saving.Directory(self._folder)

  def _open(self) -> ocp.training.Checkpointer:
    context = ocp.Context()
    context.array.saving.scoped_storage_options_creator = _chunks
    return ocp.training.Checkpointer(
        self._folder, context=context, preservation_policy=self._policy)

  def __enter__(self):
    return self

  def __exit__(self, _, error, __):
    """Waits until everything is written, even if the run ends with an error."""
    if error is None:
      self.wait()
    elif self._unfinished and (another := self._unfinished.wait()):
      say(f'the checkpoint of step {self._unfinished.step:,} could not be saved either: {another}')
      return
    if self._checkpointer:
      self._checkpointer.close()

  @property
  def _opened(self) -> ocp.training.Checkpointer:
    assert self._checkpointer, 'a save failed, and the next one was not begun'
    return self._checkpointer

  @property
  def steps(self) -> list[int]:
    """Steps of the complete checkpoints, in order."""
    if self._checkpointer:
      self._steps = sorted(each.step for each in self._checkpointer.checkpoints)
    return self._steps

  def save(self, step: int, state: TrainState, position: dict):
    """Saves in the background; the arrays may be donated as soon as this returns.

    A save that fails is counted in `failures`, now or at the next call of `wait`.

    Args:
      step: number of steps done.
      state: after that step.
      position: where the run stands: plain data.

    Raises:
      RunError: too many saves in a row failed, or the folder is gone.
    """
    self.wait()
    unknown = self._directory.check()
    items: dict[str, Any] = {
        'params': state.params, 'train': without_params(state), 'data': _as_json(position)}
    sums = {name: checksums.of_tree(items[name], damage.mesh_of(items[name]))
            for name in ('params', 'train')}
    items['sums'] = sums | damage.labels(self._identity, step, position)
    margin = _MARGIN if jax.process_count() > 1 else 0
    self._unfinished = _Save(step, state_bytes(state) + margin)
    if self._is_refused(self._unfinished.size):
      self._unfinished.fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    else:
      is_open, error = self._reopen(unknown)
      if error:
        self._unfinished.fail(error)
      elif is_open:
        self._unfinished.start(self._opened, items)
    if any(distributed.gather(self._unfinished.has_failed)):
      self.wait()

  def _is_refused(self, size: int) -> bool:
    """Whether a save is not tried, because it may not fit. A single process tries it.

    Of several, those that could write would wait in orbax for the one that could not.
    """
    if jax.process_count() == 1:
      return False
    free = distributed.broadcast(lambda: storage.free_bytes(self._folder))
    return free is not None and free < size

  def _reopen(self, error: Exception | None = None) -> tuple[bool, Exception | None]:
    """Opens the directory again if a failed save has closed it. All processes must call it.

    Of several processes, each first asks whether it can read there: in orbax, the others would wait
    for one that could not.

    Args:
      error: what keeps this process from writing there, if that is known.

    Returns:
      whether it is open, and what keeps this process from it.
    """
    if not error and (not self._checkpointer or jax.process_count() > 1):
      try:
        places.exists(self._folder)
      except OSError as problem:
        error = problem
    if any(distributed.gather(error is not None)):
      return False, error
    if not self._checkpointer:
      saving.clear_unfinished(self._folder, after_failure=True)
      try:
        self._checkpointer = self._open()
      except Exception as problem:  # orbax and tensorstore raise many kinds
        if jax.process_count() > 1:
          raise
        error = problem
    return self._checkpointer is not None, error

  def wait(self):
    """Waits for the save in the background. All processes must call it.

    Raises:
      RunError: too many saves in a row failed.
      Exception: a save failed for a reason other than storage.
    """
    save, self._unfinished = self._unfinished, None
    if save is None:
      return
    error = save.wait()
    self._directory.check()
    problem = saving.problem_in(error, self._folder, save.size) if error else None
    problems = distributed.gather(problem if problem or not error else repr(error))
    if not any(problems):
      self.failures.end_row()
      return
    if error and not problem:
      raise error
    self.failures.add(save.step, next(filter(None, problems)))
    say(f'{os.path.dirname(self._folder)}: {self.failures.sentence}')
    # This one would raise the error again. Without another one, these steps are what is known.
    self._steps = [step for step in self.steps if step != save.step]
    self._checkpointer = None
    self._reopen()  # if that cannot be done yet, the next save tries again
    if self.failures.in_a_row >= self._patience:
      raise self.failures.error(self._folder, self.steps)

  def wait_for(self, step: int):
    """Waits for the save of a step whose checkpoint is needed.

    Raises:
      RunError: it failed.
    """
    self.wait()
    if step not in distributed.broadcast(lambda: self.steps):
      raise self.failures.error(self._folder, self.steps)

  def shortage(self, size: int, saves: int) -> str:
    """A warning if the disk has too little room for the saves to come; '' if it has enough.

    Args:
      size: bytes of the state.
      saves: how many checkpoints are still to be saved. Only the newest are kept at the same time,
        besides the one that is being written.
    """
    count = min(saves, max(1, self._newest + 1 - len(self.steps)))
    return saving.shortage(self._folder, size, count) if saves else ''

  def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict]:
    """The state after a step, with the shapes, dtypes and shardings of `like`; the position.

    Raises:
      Damaged: it differs from what was saved, or belongs to another step or run.
    """
    slices.check_together(self._folder, step, self._identity)
    wanted = {'params': like.params, 'train': without_params(like), 'data': None, 'sums': None}
    with damage.reading(self._folder, step):
      for item in wanted:  # if one is missing, orbax does not wait for the others, and warns
        places.names(os.path.join(self._folder, str(step), item))
      loaded: dict[str, Any] = self._opened.load_checkpointables(step, wanted)
      if 'json' not in loaded['data']:
        raise damage.Damaged(self._folder, step, slices.EARLIER)
      loaded['data'] = json.loads(np.asarray(loaded['data']['json']).tobytes())
      damage.compare(self._folder, step, loaded, self._identity)
    return TrainState(params=loaded['params'], **loaded['train']), loaded['data']

  def newest(self, like: TrainState) -> tuple[int, TrainState | None, dict]:
    """The newest sound checkpoint; those after it are set aside.

    Args:
      like: as for `restore`.

    Returns:
      its step, state and position; 0, None and {} if there is none.

    Raises:
      RunError: there are checkpoints, and none of them is sound.
    """
    damaged, steps = None, distributed.broadcast(lambda: self.steps)
    for step in reversed(steps):
      try:
        state, position = self.restore(step, like)
      except damage.Damaged as error:
        say(error.what)
        damaged = damaged or error
        continue
      if damaged:
        say(f'continuing from step {step:,}, the newest sound checkpoint')
      break
    else:
      if damaged:
        raise damaged.is_the_last()
      return 0, None, {}
    for later in [each for each in steps if each > step]:
      distributed.on_process_0(lambda later=later: damage.set_aside(self._folder, later))
    if damaged:
      self._opened.reload()
    return step, state, position


class _Save:
  """A save in the background.

  Attributes:
    step: whose state is saved.
    size: bytes that it takes at most.
  """

  def __init__(self, step: int, size: int):
    self.step, self.size = step, size
    self._response, self._error = None, None

  def start(self, checkpointer: ocp.training.Checkpointer, items: dict[str, Any]):
    """Starts the save; keeps an error for `wait`."""
    try:
      self._response = checkpointer.save_checkpointables_async(self.step, items, force=True)
    except Exception as error:  # orbax and tensorstore raise many kinds
      self._error = error

  def fail(self, error: Exception):
    """Lets it fail without a try."""
    self._error = error

  @property
  def has_failed(self) -> bool:
    """Whether the save is already known to have failed."""
    return self._error is not None

  def wait(self) -> Exception | None:
    """Waits until the save is done; returns its error, or None."""
    try:
      if self._response is not None:
        self._response.result()
    except Exception as error:
      self._error = error
    self._response = None
    return self._error


def state_bytes(state: TrainState) -> int:
  """The bytes of a state over all devices. Its checkpoint is compressed, and takes less."""
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


class _KeepsBest:
  """A preservation policy of orbax: keeps the checkpoint of the best step."""

  def __init__(self, of: Checkpoints):
    self._of = of

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    """Whether each of the checkpoints is kept."""
    del context
    return [each.step == self._of.best for each in checkpoints]


def _chunks(key, value):
  """Chunks arrays by layer and expert first, so that `Saved` can read one of them cheaply."""
  del value
  stacked = checksums.leading_axes(sharding.path_of(key))
  return ocp.options.ArrayOptions.Saving.StorageOptions(
      chunk_byte_size=slices.CHUNK, shard_axes=tuple(range(stacked)))


def _as_json(position: dict) -> dict[str, np.ndarray]:
  """Plain data as JSON in an array: orbax saves arrays, and no names of domains."""
  return {'json': np.frombuffer(json.dumps(position).encode(), np.uint8)}


def without_params(state: TrainState) -> dict:
  """The saved state other than the parameters, as a tree."""
  return {'step': state.step, 'opt_state': state.opt_state}


def load_params(folder: str, step: int, like, identity: str):
  """The parameters alone, with the shapes, dtypes and shardings of `like`.

  Raises:
    Damaged: they differ from what was saved, or belong to another step or run.
  """
  path = slices.step_folder(folder, step)
  for_orbax.prepare(path)
  slices.check_together(folder, step, identity)
  with damage.reading(folder, step):
    loaded = {'params': ocp.load(path, like, checkpointable_name='params'),
              'sums': ocp.load(path, checkpointable_name='sums')}
    damage.compare(folder, step, loaded, identity)
  return loaded['params']
