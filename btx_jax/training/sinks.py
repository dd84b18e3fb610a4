"""Sends the figures of a run to TensorBoard, Weights & Biases or MLflow, besides metrics.jsonl.

A config names its sinks, as in config.sinks = ('tensorboard', 'wandb'); by default nothing is sent.
A `Sink` takes the numbers of a line of metrics.jsonl by name. delivery.py decides which lines are
sent, and keeps a failing service from stopping the run. The packages are extras. They are imported
only here, and only when a run starts.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import errno
import importlib.util
import json
import os
import re
import time
from typing import Any, Protocol
import uuid

from btx_jax.errors import UsageError, nearest
from btx_jax.files import places
from btx_jax.run import Run

TENSORBOARD, WANDB, MLFLOW = 'tensorboard', 'wandb', 'mlflow'
_PACKAGES = {TENSORBOARD: 'tensorboardX', WANDB: 'wandb', MLFLOW: 'mlflow'}
_PROJECT = 'btx_jax'  # W&B project or MLflow experiment, unless their variables name one
# Limits of MLflow.
_MLFLOW_METRICS, _MLFLOW_PARAMS, _MLFLOW_CHARACTERS = 1000, 100, 500

_FLUSH_EVERY = 60.0  # seconds between writes of TensorBoard's events to the disk
PATIENCE = 30.0  # seconds a service may take to answer, and at the end to take the last lines


class Sink(Protocol):
  """Takes figures of one run. Any method may raise whatever its package raises."""

  def write(self, step: int, time: float, figures: Mapping[str, float]) -> None:
    """Takes the figures of a step, measured at `time` in seconds since 1970."""
    ...

  def close(self, finished: bool) -> None:
    """Closes the sink; `finished` is False if the run was stopped or has failed."""
    ...


@dataclasses.dataclass(frozen=True)
class Subject:
  """The run whose figures are sent.

  Attributes:
    name: the run's name.
    study: the name that groups the runs of a working directory.
    folder: the run's directory.
    settings: the settings that decide the run's result, from Run.spec.
  """
  name: str
  study: str
  folder: str
  settings: Mapping[str, Any]


def subject(run: Run, folder: str) -> Subject:
  """The Subject of a run; `folder` is the run's directory, WORKDIR/NAME."""
  workdir = places.absolute(folder).removesuffix(os.path.normpath(run.name))
  return Subject(run.name, os.path.basename(os.path.normpath(workdir)), folder, run.spec())


def check(names: Sequence[str]) -> None:
  """Raises UsageError unless all names are sinks whose packages are installed."""
  for name in names:
    if name not in _PACKAGES:
      several = f'write --config.sinks="{tuple(name.split(","))}".'
      hint = several if ',' in name else nearest(name, _PACKAGES)
      raise UsageError(f'config.sinks: {name!r} is not a sink; {hint}')
    spec = importlib.util.find_spec(_PACKAGES[name])
    # A folder `wandb` in the current directory is found too, as a package without an origin.
    if spec is None or spec.origin is None:
      raise UsageError(f'config.sinks: {name!r} needs the package {_PACKAGES[name]}: pip install '
                       f"'btx_jax[{name}]'")


class TensorBoard:
  """Event files in the folder `tensorboard` of the run's directory."""

  def __init__(self, folder: str, resume_step: int):
    """Events that an earlier start wrote after `resume_step` are replaced by new ones."""
    # Not its SummaryWriter, which writes in a thread, and waits for ever once that has failed.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2
    from tensorboardX.summary import scalar
    if places.is_in_bucket(folder):
      raise OSError(errno.EINVAL, 'event files are written to a disk', folder)
    path = os.path.join(folder, TENSORBOARD)
    os.makedirs(path, exist_ok=True)
    proto: Any = event_pb2  # its classes are made when it is imported
    self._event, self._scalar = proto.Event, scalar
    self._writer, self._flush_at = EventsWriter(os.path.join(path, 'events')), 0.0
    for about in ({'file_version': 'brain.Event:2'},
                  {'session_log': proto.SessionLog(status=proto.SessionLog.START)}):
      self._writer.write_event(self._event(
          step=resume_step + 1, wall_time=time.time(), **about))

  def write(self, step: int, time: float, figures: Mapping[str, float]) -> None:
    for name, value in figures.items():
      self._writer.write_event(self._event(
          step=step, wall_time=time, summary=self._scalar(name, value)))
    if time >= self._flush_at:  # waits for the disk
      self._writer.flush()
      self._flush_at = time + _FLUSH_EVERY

  def close(self, finished: bool) -> None:
    del finished
    self._writer.close()


class WeightsAndBiases:
  """A run of Weights & Biases.

  Attributes:
    id: the id of that run; a run of btx that is started again continues it.
    place: where to look at it.
  """

  def __init__(self, of: Subject, known: str | None):
    import wandb
    # Silent: otherwise wandb asks for a key on a terminal. `place` is printed instead.
    wandb.setup(settings=wandb.Settings(silent=True))
    self.id = known or uuid.uuid4().hex
    self._run = wandb.init(
        id=self.id, resume='allow', reinit='create_new', name=of.name, group=of.study,
        project=os.environ.get('WANDB_PROJECT', _PROJECT), dir=of.folder, config=dict(of.settings),
        save_code=False, settings=wandb.Settings(
            silent=True, console='off', init_timeout=PATIENCE, finish_timeout=PATIENCE,
            finish_timeout_raises=True))
    offline = f'offline; to upload it: wandb sync {os.path.dirname(self._run.dir)}'
    self.place = self._run.url or offline

  def write(self, step: int, time: float, figures: Mapping[str, float]) -> None:
    del time  # wandb uses its own clock
    self._run.log(dict(figures), step=step)

  def close(self, finished: bool) -> None:
    self._run.finish(exit_code=0 if finished else 1)


class Mlflow:
  """A run of MLflow. Attributes as in WeightsAndBiases."""

  def __init__(self, of: Subject, known: str | None):
    import mlflow
    self._client = mlflow.MlflowClient()
    if known:
      self.id = known
      self._client.update_run(known, status='RUNNING')
    else:
      experiment = mlflow.set_experiment(os.environ.get('MLFLOW_EXPERIMENT_NAME', _PROJECT))
      made = self._client.create_run(experiment.experiment_id, run_name=of.name,
                                     tags={'study': of.study})
      self.id = made.info.run_id
      params = [mlflow.entities.Param(_mlflow_name(name), value[:_MLFLOW_CHARACTERS])
                for name, value in _settings(of.settings)]
      for first in range(0, len(params), _MLFLOW_PARAMS):
        self._client.log_batch(self.id, params=params[first:first + _MLFLOW_PARAMS])
    self._metric = mlflow.entities.Metric
    self.place = f'run {self.id} in {mlflow.get_tracking_uri()}'

  def write(self, step: int, time: float, figures: Mapping[str, float]) -> None:
    metrics = [self._metric(_mlflow_name(name), value, int(time * 1000), step)
               for name, value in figures.items()]
    for first in range(0, len(metrics), _MLFLOW_METRICS):
      self._client.log_batch(self.id, metrics=metrics[first:first + _MLFLOW_METRICS])

  def close(self, finished: bool) -> None:
    self._client.set_terminated(self.id, 'FINISHED' if finished else 'KILLED')


def _mlflow_name(name: str) -> str:
  """`name` with only the characters that MLflow allows."""
  return re.sub(r'[^\w\-. :/]', '_', name)


def _settings(values: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, str]]:
  """(path, text) of each setting."""
  for key, value in values.items():
    if isinstance(value, Mapping) and value:
      yield from _settings(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value if isinstance(value, str) else json.dumps(value)


def figures(line: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, float]]:
  """(path, number) of each figure in a line of metrics.jsonl; a list over layers gives its mean."""
  for key, value in line.items():
    name = f'{prefix}{key}'
    if name in ('step', 'time', 'warnings', 'troubles'):
      continue  # not figures
    if isinstance(value, list) and value and isinstance(value[0], list):
      value = {str(e): _mean(gates) for e, gates in enumerate(zip(*value))}  # [L][E]: by expert
    elif isinstance(value, list) and value:
      value = _mean(value)
    if isinstance(value, dict):
      yield from figures(value, f'{name}/')
    elif isinstance(value, int | float):
      yield name, value


def _mean(values: Sequence[float]) -> float:
  return sum(values) / len(values)
