"""Sinks: a line reaches a service once, however often its run stops; no service stops a run.

Fakes stand for the packages wandb and mlflow, and note what they are asked.
"""

import collections
import json
import sys
import threading
import types
import zlib

import pytest

from btx_jax import base
from btx_jax.errors import UsageError
from btx_jax.study import plan
from btx_jax.terminal import Progress
from btx_jax.training import delivery, metrics, recorder, sinks
from tests import studies

SERVICES = (sinks.WANDB, sinks.MLFLOW)


class Fakes:
  """What the services were sent.

  Attributes:
    runs: (service, id) -> list of (step, figure, value), in order.
    asked: (what, its arguments) of every other call.
    fail: called with (service, step) before a step is taken; may raise.
  """

  def __init__(self):
    self.runs = collections.defaultdict(list)
    self.asked = []
    self.fail = lambda service, step: None

  def modules(self):
    """The packages, by name."""
    def init(**given):
      self.asked.append((sinks.WANDB, given))
      self.fail(sinks.WANDB, 0)

      def log(values, step):
        self.fail(sinks.WANDB, step)
        self.runs[sinks.WANDB, given['id']] += [(step, *each) for each in values.items()]
      return types.SimpleNamespace(
          url=None, dir='x/wandb/offline-run/files', log=log,
          finish=lambda **how: self.asked.append(('finish', how)))

    def log_batch(id, metrics=(), params=()):
      for key, value, _, step in metrics:
        self.fail(sinks.MLFLOW, step)
        self.runs[sinks.MLFLOW, id].append((step, key, value))
      self.asked.append(('params', dict(params)))

    def create_run(experiment, **given):
      self.fail(sinks.MLFLOW, 0)
      self.asked.append((sinks.MLFLOW, {'experiment': experiment, **given}))
      return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f'id {len(self.asked)}'))

    client = types.SimpleNamespace(
        create_run=create_run, log_batch=log_batch,
        update_run=lambda id, status: self.asked.append((status, id)),
        set_terminated=lambda id, status: self.asked.append((status, id)))
    return {
        'wandb': types.SimpleNamespace(init=init, setup=lambda settings: None, Settings=dict),
        'mlflow': types.SimpleNamespace(
            MlflowClient=lambda: client, get_tracking_uri=lambda: 'http://me:hidden1@host',
            set_experiment=lambda name: types.SimpleNamespace(experiment_id=name),
            entities=types.SimpleNamespace(Param=lambda *x: x, Metric=lambda *x: x))}


@pytest.fixture
def fakes(monkeypatch):
  made = Fakes()
  for name, module in made.modules().items():
    monkeypatch.setitem(sys.modules, name, module)
  delivery._say_once.cache_clear()
  return made


def mark_after(folder, step: int) -> metrics.Mark:
  """The place in metrics.jsonl that a checkpoint of this step remembers."""
  path = folder / metrics.NAME
  lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
  kept = b''.join(line for line in lines if json.loads(line)['step'] <= step)
  return metrics.Mark(len(kept), zlib.crc32(kept))


def train(folder, start, end, names=SERVICES, error=None):
  """A run that writes a line each step, from one checkpoint to a step; each other is evaluated."""
  of = sinks.Subject('expert/a', 'study', str(folder), {'model': {'dim': 4}, 'weights': ('a', 1)})
  with metrics.MetricsFile(str(folder), start, mark_after(folder, start)) as file:
    try:
      with delivery.Deliveries(names, of, start, file.kept) as deliveries:
        for step in range(start + 1, end + 1):
          deliveries.send(file.write(step, loss=1 / step))
          if step % 2 == 0:
            deliveries.send(file.write(step, bits_per_byte={'c++': 1 / step}))
        if error:
          raise error
    except KeyboardInterrupt:
      return


def expected(last, domain='c++'):
  lines = [[(step, 'loss', 1 / step), (step, f'bits_per_byte/{domain}', 1 / step)]
           for step in range(1, last + 1)]
  return [line for both in lines for line in both[:2 - both[0][0] % 2]]


def test_a_run_that_goes_on_is_one_run_of_the_service_and_repeats_no_step(fakes, tmp_path, capsys):
  train(tmp_path, 0, 5, error=KeyboardInterrupt())  # the last checkpoint is of step 3
  train(tmp_path, 3, 8)
  assert len(fakes.runs) == 2
  domains = {sinks.WANDB: 'c++', sinks.MLFLOW: 'c__'}  # MLflow has no + in names
  for (service, _), found in fakes.runs.items():
    assert found == expected(8, domains[service])
  asked = [given for what, given in fakes.asked if what == sinks.WANDB]
  assert len({given['id'] for given in asked}) == 1
  assert all(given['group'] == 'study' and given['dir'] == str(tmp_path) for given in asked)
  assert [how for what, how in fakes.asked if what == 'finish'] == [
      {'exit_code': 1}, {'exit_code': 0}]
  assert [what for what, _ in fakes.asked if what.isupper()] == ['KILLED', 'RUNNING', 'FINISHED']
  assert ('params', {'model.dim': '4', 'weights': '["a", 1]'}) in fakes.asked
  said = capsys.readouterr().out
  assert 'to upload it: wandb sync x/wandb/offline-run' in said and 'hidden1' not in said


@pytest.mark.parametrize('service', SERVICES)
@pytest.mark.parametrize('at', [0, 3])
def test_a_service_that_fails_stops_no_run_and_gets_later_what_it_missed(
    fakes, tmp_path, capsys, monkeypatch, service, at):
  monkeypatch.setenv('SOME_API_KEY', 'abcdef123')

  def fail(of, step):
    if of == service and step == at:
      raise OSError('https://me:topsecret@host refused abcdef123')

  fakes.fail = fail
  train(tmp_path / 'a', 0, 4, [service])
  (tmp_path / 'b').mkdir()
  train(tmp_path / 'b', 0, 4, [service])
  assert [line['step'] for line in metrics.read(str(tmp_path / 'a'))] == [1, 2, 2, 3, 4, 4]
  said = capsys.readouterr().out
  assert said.count('training continues without it') == 1  # for both runs
  assert '(OSError: https://***@host refused ***)' in said
  fakes.fail = lambda of, step: None
  train(tmp_path / 'a', 4, 6, [service])
  found = [lines for lines in fakes.runs.values() if len(lines) == 9]
  assert [[line[0] for line in lines] for lines in found] == [[1, 2, 2, 3, 4, 4, 5, 6, 6]]


def test_events_that_cannot_be_written_stop_no_run(fakes, tmp_path, capsys):
  (tmp_path / 'tensorboard').write_text('a file where the folder should be')
  train(tmp_path, 0, 4, [sinks.TENSORBOARD])
  assert len(metrics.read(str(tmp_path))) == 6
  assert "config.sinks: 'tensorboard' failed" in capsys.readouterr().out


def test_a_disk_that_fills_up_stops_no_run(fakes, tmp_path, capsys, monkeypatch):
  written = []

  def write(self, event):
    written.append(event)
    if len(written) > 5:
      raise OSError('No space left on device')

  monkeypatch.setattr('tensorboardX.event_file_writer.EventsWriter.write_event', write)
  train(tmp_path, 0, 40, [sinks.TENSORBOARD])
  assert len(metrics.read(str(tmp_path))) == 60 and len(written) == 6
  assert 'No space left on device' in capsys.readouterr().out


def test_a_service_that_is_named_later_gets_the_lines_before(fakes, tmp_path):
  train(tmp_path, 0, 5, (), error=KeyboardInterrupt())
  assert not fakes.asked
  train(tmp_path, 4, 6, [sinks.WANDB])
  found, = fakes.runs.values()
  assert found == expected(6)


def test_a_service_that_hangs_is_not_waited_for_long(fakes, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(delivery, '_WAIT', 0.1)
  ends = threading.Event()
  fakes.fail = lambda *_: ends.wait()
  train(tmp_path, 0, 4, [sinks.WANDB])
  ends.set()
  assert 'it did not take the last figures in time' in capsys.readouterr().out


def test_a_folder_that_a_service_left_is_not_its_package(tmp_path, monkeypatch):
  monkeypatch.setattr(sinks, '_PACKAGES', {'wandb': 'a_folder'})
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'a_folder').mkdir()
  with pytest.raises(UsageError, match=r"package a_folder: pip install 'btx_jax\[wandb\]'"):
    sinks.check(['wandb'])


def run_of(text, names):
  config = studies.get_config(text)
  config.sinks = names
  return plan.make_plan(config, 330)['expert/code']


def test_sinks_are_no_part_of_what_a_run_is(text):
  assert base.get_config().sinks == ()
  assert run_of(text, ()).spec() == run_of(text, SERVICES).spec()


def test_only_process_0_sends(fakes, text, tmp_path, monkeypatch):
  run = run_of(text, SERVICES)
  is_first = False
  monkeypatch.setattr(recorder.distributed, 'is_process_0', lambda: is_first)
  for is_first in (False, True):
    with recorder.Recorder(run, str(tmp_path / 'work' / run.name), ['code'], 1, 0, {}, SERVICES,
                           Progress({})):
      pass
    sent = [given for what, given in fakes.asked if what in SERVICES]
    assert len(sent) == 2 * is_first
  assert dict(fakes.asked)['wandb']['group'] == 'work'  # services are asked in any order
