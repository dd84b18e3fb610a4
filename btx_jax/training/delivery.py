"""Delivers lines of metrics.jsonl to the sinks of a run, and handles sinks that fail.

TensorBoard is a file, and is written like metrics.jsonl. A service (Weights & Biases, MLflow) can
be slow or unreachable, so each has its own thread, which sends every line only once:
WORKDIR/RUN/wandb.json, or mlflow.json, has the id of the service's run and the last steps that were
sent. A run that was stopped continues the same run of the service. Steps that are trained again,
because they came after the last checkpoint, are not sent again. Lines that the service lacks,
because it failed or was not in the config, are sent when the run continues.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import functools
import os
import queue
import re
import threading
from typing import Any, Protocol

from btx_jax.files import places, sealed
from btx_jax.terminal import say
from btx_jax.training import sinks

_LATER = ('When the run is continued, missing lines are sent; delete {}.json in its directory to '
          'send all of them to a new run.')
_ADVICE = {
    sinks.TENSORBOARD: 'Check the disk, and the version of tensorboardX.',
    sinks.WANDB: 'Run `wandb login` or set WANDB_API_KEY; WANDB_MODE=offline needs no network. '
                 + _LATER.format(sinks.WANDB),
    sinks.MLFLOW: 'Check MLFLOW_TRACKING_URI, and that its server answers. '
                  + _LATER.format(sinks.MLFLOW)}
_WAIT = sinks.PATIENCE + 5  # seconds; so that a service can give up first, and report why
_SECRET = re.compile(r'KEY|TOKEN|PASSWORD|SECRET', re.IGNORECASE)  # in variables' names


class Service(sinks.Sink, Protocol):
  """A sink that has its own run; attributes as in sinks.WeightsAndBiases."""
  id: str
  place: str


_SERVICES: dict[str, Callable[[sinks.Subject, str | None], Service]] = {
    sinks.WANDB: sinks.WeightsAndBiases, sinks.MLFLOW: sinks.Mlflow}


class Deliveries:
  """All sinks of a run; a context manager, which closes them."""

  def __init__(self, names: Iterable[str], subject: sinks.Subject, resume_step: int,
               kept: Sequence[Mapping[str, Any]]):
    """`kept` are the lines up to `resume_step`, the step that the run continues from."""
    names = dict.fromkeys(names)
    self._board: sinks.Sink | None = None
    if sinks.TENSORBOARD in names:
      with self._no_board_if_it_fails():
        self._board = sinks.TensorBoard(subject.folder, resume_step)
    self._services = [_Delivery(name, subject) for name in names if name in _SERVICES]
    for service in self._services:
      for line in kept:
        service.send(line)

  def send(self, line: Mapping[str, Any]):
    """Sends a line of metrics.jsonl to all."""
    if self._board:
      with self._no_board_if_it_fails():
        self._board.write(line['step'], line['time'], dict(sinks.figures(line)))
    for service in self._services:
      service.send(line)

  def __enter__(self):
    return self

  def __exit__(self, error: type[BaseException] | None, *_):
    if self._board:
      with self._no_board_if_it_fails():
        self._board.close(error is None)
    for service in self._services:
      service.end(error is None)
    for service in self._services:
      service.wait()

  @contextlib.contextmanager
  def _no_board_if_it_fails(self):
    try:
      yield
    except Exception as error:  # as in _Delivery
      _warn(sinks.TENSORBOARD, f'{type(error).__name__}: {error}')
      failed, self._board = self._board, None
      if failed:
        with contextlib.suppress(Exception):
          failed.close(False)


class _Delivery:
  """Sends lines to one service, in order, without waiting for it."""

  def __init__(self, name: str, subject: sinks.Subject):
    self._name, self._subject = name, subject
    self._path = os.path.join(subject.folder, f'{name}.json')
    self._lines: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
    self._finished = False
    # A daemon thread: if it hangs, the process can still exit.
    self._thread = threading.Thread(target=self._work, daemon=True)
    self._thread.start()

  def send(self, line: Mapping[str, Any]):
    self._lines.put(line)

  def end(self, finished: bool):
    """Marks the end of the lines."""
    self._finished = finished
    self._lines.put(None)

  def wait(self):
    """Waits until the service has taken all lines, or _WAIT seconds."""
    self._thread.join(_WAIT)
    if self._thread.is_alive():
      _warn(self._name, 'it did not take the last figures in time')

  def _work(self):
    try:
      self._deliver()
    # A service's package may raise anything; nothing that it raises is a reason to stop training.
    except Exception as error:
      _warn(self._name, f'{type(error).__name__}: {error}')

  def _deliver(self):
    state: dict[str, Any] = {'id': None, 'training': 0, 'evaluation': 0}
    if places.exists(self._path):
      state |= sealed.read(self._path)
    service = _SERVICES[self._name](self._subject, state['id'])
    state['id'] = service.id
    self._save(state)
    say(_without_secrets(f'{self._subject.name}: {self._name}, {service.place}'))
    while (line := self._lines.get()) is not None:
      # A step can have one line of each kind.
      kind = 'evaluation' if 'bits_per_byte' in line else 'training'
      if line['step'] > state[kind]:
        service.write(line['step'], line['time'], dict(sinks.figures(line)))
        state[kind] = line['step']
        self._save(state)
    service.close(self._finished)

  def _save(self, state: Mapping[str, Any]):
    sealed.write(self._path, state)


def _warn(name: str, problem: str):
  """Prints that the sink `name` failed, and what to do."""
  _say_once(f'config.sinks: {name!r} failed, and training continues without it '
            f'({_without_secrets(problem)[:300]}). metrics.jsonl has all figures. {_ADVICE[name]}')


@functools.cache
def _say_once(text: str):
  """Prints a warning, unless this process has printed it already."""
  say(text)


def _without_secrets(text: str) -> str:
  """`text` on one line, without the values of secret variables and without users in URLs."""
  for name, value in os.environ.items():
    if len(value) > 5 and _SECRET.search(name):
      text = text.replace(value, '***')
  return ' '.join(re.sub(r'://[^/@\s]+@', '://***@', text).split())
