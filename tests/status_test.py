"""Status and report: read from files alone, fast, and whatever state the runs are in."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from btx_jax import base
from btx_jax.commands import report, status
from btx_jax.files import locks
from btx_jax.study import manifest
from btx_jax.study.study import Study
from btx_jax.training import metrics
from tests import studies

SPEC_STEPS = 6


@pytest.fixture
def study(text, tmp_path):
  """A study that has not been started."""
  return Study(studies.get_config(text), str(tmp_path / 'work'))


def start(study, name, state=manifest.RUNNING, lines=(), **fields):
  """Writes a run's directory as its job would, in the given state."""
  spec = json.loads(json.dumps(study.runs[name].spec()))
  found = manifest.begin(name, spec) | {'state': state, **fields}
  manifest.write(study.folder(name), found)
  with open(os.path.join(study.folder(name), metrics.NAME), 'w', encoding='utf-8') as file:
    for line in lines:
      file.write(line if isinstance(line, str) else json.dumps(line) + '\n')


def status_of(study, name):
  return next(run for run in status.collect(study)['runs'] if run['name'] == name)


def line(step, loss=2.0, **values):
  return {'step': step, 'time': time.time(), 'loss': loss, **values}


def words_of(path):
  """The text of a file with its white space collapsed, as lines of the page break anywhere."""
  with open(path, encoding='utf-8') as file:
    return ' '.join(file.read().split())


def test_a_study_that_has_not_been_started_gets_a_note(study):
  found = status.collect(study)
  assert 'does not exist yet' in found['notes'][0]
  assert {run['state'] for run in found['runs']} == {'missing'}
  os.makedirs(study.workdir)
  assert 'is empty' in status.collect(study)['notes'][0]


def test_a_directory_without_runs_of_this_config_gets_a_note(study):
  os.makedirs(os.path.join(study.workdir, 'holiday'))
  assert 'holds no run of this config (it holds holiday)' in status.collect(study)['notes'][0]


def test_a_run_goes_through_its_states(study):
  start(study, 'seed')
  assert status_of(study, 'seed')['state'] == 'stopped'  # its lock is free
  with locks.lock_folder(study.folder('seed')):
    held = subprocess.run([sys.executable, '-c', f'''if True:
      from btx_jax.files import locks
      print(locks.is_locked({study.folder('seed')!r}))'''], capture_output=True, text=True)
  assert held.stdout.strip() == 'True'
  for state in (manifest.STOPPED, manifest.FAILED, manifest.COMPLETE):
    start(study, 'seed', state)
    assert status_of(study, 'seed')['state'] == state


@pytest.fixture
def at_work(monkeypatch):
  """As if another process held every run directory."""
  monkeypatch.setattr(locks, 'is_locked', lambda folder: True)


def test_a_run_that_is_still_compiling_is_starting(study, at_work):
  start(study, 'seed')
  found = status_of(study, 'seed')
  assert (found['state'], found['step'], found['loss']) == ('starting', 0, None)


def test_progress_speed_and_time_left(study, at_work):
  run = study.runs['seed']
  start(study, 'seed', lines=[
      line(1), {'step': 2, 'bits_per_byte': {'code': 3.0, 'math': 1.0}},
      line(3, 1.5, tokens_per_second=10.0, mfu=0.25)], steps_done=2, saved=manifest.now())
  found = status_of(study, 'seed')
  assert (found['state'], found['step'], found['loss']) == ('running', 3, 1.5)
  assert found['seconds_left'] == 3 * run.batch_size * run.seq_len / 10
  assert found['mfu'] == 0.25
  assert found['bits_per_byte'] == {'code': 3.0, 'math': 1.0}
  assert found['checkpoint'] == 2 and 0 <= found['checkpoint_age'] < 60


def test_skipped_steps_and_a_spike_stay_visible(study, at_work):
  start(study, 'seed', lines=[line(1, warnings=['the loss rose to 9']), line(2, skipped=3)],
        skipped_steps=2, loss_spike='the loss rose to 9')
  assert status_of(study, 'seed')['warnings'] == [
      'the loss rose to 9', 'steps skipped because their numbers were not finite: 3']
  start(study, 'seed', lines=[line(2)], loss_spike='the loss rose to 9')
  assert status_of(study, 'seed')['warnings'] == ['the loss rose to 9']


def test_full_disks_stay_visible(study, at_work):
  start(study, 'seed', lines=[line(1)], storage=['the checkpoint of step 2 could not be saved: x'])
  assert status_of(study, 'seed')['warnings'] == ['the checkpoint of step 2 could not be saved: x']


def test_half_written_and_invalid_lines_are_skipped(study, at_work):
  start(study, 'seed', lines=[
      line(1, 3.0), '[1, 2]\n', '\n', '{"loss": 9.0}\n', '\x00\x00\n', line(2, 2.5),
      '{"step": 3, "lo'])
  assert status_of(study, 'seed')['loss'] == 2.5
  assert [x['step'] for x in metrics.read(study.folder('seed'))] == [1, 2]


def test_only_the_end_of_a_long_file_is_read(study, monkeypatch):
  start(study, 'seed', lines=[line(step, float(step)) for step in range(1, 200)])
  monkeypatch.setattr(metrics, '_TAIL', 500)
  found = metrics.tail(study.folder('seed'))
  assert found[-1]['step'] == 199 and len(found) < 15


def test_clocks_of_other_machines_may_be_ahead_or_behind(study, at_work):
  start(study, 'seed', lines=[line(1) | {'time': time.time() + 9000}],
        saved='2999-01-01T00:00:00+00:00', steps_done=1)
  found = status_of(study, 'seed')
  assert found['checkpoint_age'] == 0 and not found['warnings']
  start(study, 'seed', lines=[line(1) | {'time': time.time() - 7200}])
  assert 'without new metrics for 2.0 h' in str(status_of(study, 'seed')['warnings']) or (
      'without new metrics for 120 min' in str(status_of(study, 'seed')['warnings']))


@pytest.mark.parametrize('harm, problem', [
    (lambda data: data.replace(b'2.0', b'1.0'), 'is damaged'),
    (lambda data: data[:-3], 'has lost lines'),
    (lambda data: data + data, 'has lines that the run did not write')])
def test_a_changed_metrics_file_of_a_complete_run_is_reported(study, harm, problem):
  start(study, 'seed', lines=[line(1), line(2)])
  folder = study.folder('seed')
  found = manifest.read(folder) | {
      'state': manifest.COMPLETE, 'metrics': list(metrics.end_of(folder)[:2])}
  manifest.write(folder, found)
  assert not status_of(study, 'seed')['warnings']
  with open(os.path.join(folder, metrics.NAME), 'r+b') as file:
    data = harm(file.read())
    file.seek(0)
    file.truncate()
    file.write(data)
  assert problem in ' '.join(status_of(study, 'seed')['warnings'])


def test_warnings_errors_and_another_config_are_reported(study):
  start(study, 'btx', manifest.FAILED, error='the loss is nan', lines=[
      line(1, warnings=['expert 1 gets under 1% of the tokens'])])
  found = status_of(study, 'btx')
  assert found['error'] == 'the loss is nan'
  assert found['warnings'] == ['expert 1 gets under 1% of the tokens']
  study.config.runs.btx.steps = 9
  changed = Study(study.config, study.workdir)
  assert status_of(changed, 'btx')['warnings'][1] == 'was trained with steps 6 and has 9 now'
  study.config.runs.btx.steps = 6


def test_a_low_terminal_shows_the_runs_that_are_not_complete(study):
  start(study, 'seed', manifest.COMPLETE)
  start(study, 'expert/code', manifest.FAILED, error='the loss is nan')
  found = status.collect(study)
  shown = [(status.that_fit(found, height)) for height in (30, 11, 9)]
  assert [[run['name'] for run in each['runs']] for each in shown] == [
      ['seed', 'expert/code', 'expert/math', 'btx'], ['expert/code', 'expert/math', 'btx'],
      ['expert/code']]
  assert len(status.that_fit(found | {'runs': found['runs'][2:3] * 9}, 11)['runs']) == 4
  assert shown[2]['notes'] == ['Runs that do not fit on the terminal: 1 that are complete, 2 that '
                               'are missing.']


def test_an_invalid_manifest_affects_its_own_run_only(study):
  start(study, 'seed', manifest.COMPLETE)
  os.makedirs(study.folder('btx'))
  with open(os.path.join(study.folder('btx'), 'manifest.json'), 'w', encoding='utf-8') as file:
    file.write('{"name": "half')
  assert status_of(study, 'btx')['state'] == 'unreadable'
  assert 'is not a btx_jax manifest' in status_of(study, 'btx')['error']
  assert status_of(study, 'seed')['state'] == 'complete'
  assert 'is not a btx_jax manifest' in words_of(report.write_report(study, 'half'))


def test_a_run_is_taken_as_running_where_locks_are_not_supported(study, monkeypatch):
  def no_locks(*_):
    raise OSError(37, 'No locks available')

  start(study, 'seed', lines=[line(1)])
  with locks.lock_folder(study.folder('seed')):
    pass
  monkeypatch.setattr(fcntl, 'lockf', no_locks)
  assert status_of(study, 'seed')['state'] == 'running'


def routing_line(step, study):
  E, L = 4, 2
  even = np.full((L, E), 0.25).tolist()
  return line(step, loss_by_domain={'code': 2.0, 'prose': 3.0}, tokens_per_second=5.0, mfu=0.1,
              routing={'gates': {'code': even}, 'load': even, 'entropy': [1.0, 1.1],
                       'mutual_information': [0.2, 0.1]})


def test_a_report_of_unfinished_runs_shows_what_is_known(study):
  start(study, 'seed', manifest.COMPLETE, lines=[line(s, loss_by_domain={}) for s in (1, 2)])
  lines = [routing_line(s, study) for s in (1, 2, 3)]
  lines[0]['routing']['dropped'], lines[2]['routing']['dropped'] = [0.3, 0.1], [0.0, 0.06]
  start(study, 'btx', lines=lines)
  path = report.write_report(study, 'half <b>way</b>')
  page = words_of(path)
  assert '1 of 4 runs complete' in page
  assert ('dropped 20.0% of all choices at step 1 and 3.0% at step 3, where the layer that dropped '
          'most dropped 6.0%.') in page
  assert 'half &lt;b&gt;way&lt;/b&gt;' in page and '<b>way' not in page
  assert page.count('data:image/png;base64,') == 4
  assert not [word for word in ('src="http', 'href="http', '<script', '@import') if word in page]
  assert {'curves.png', 'load_btx.png', 'graph.png'} <= set(os.listdir(os.path.dirname(path)))


def test_a_report_of_one_run_that_has_just_started(study):
  start(study, 'seed')
  assert 'seed is stopped, step 0 of 6' in words_of(report.write_report(study, 'begun'))


def test_the_names_of_runs_are_escaped(text, tmp_path):
  config = studies.get_config(text)
  config.runs = {'a<b>': base.run(base.random(), {'code': 1}, steps=3)}
  study = Study(config, str(tmp_path / 'work'))
  start(study, 'a<b>', lines=[line(1, warnings=['<i>'])])
  page = words_of(report.write_report(study, 'x'))
  assert 'a<b>' not in page and '<i>' not in page and 'a&lt;b&gt;' in page


def test_status_imports_fast_and_nothing_heavy():
  """Seconds are the processor's, so other work on the machine hardly counts."""
  code = ('import sys, time; began = time.process_time(); '
          'import btx_jax.main, btx_jax.commands.status; '
          'print(time.process_time() - began, "jax" in sys.modules, "grain" in sys.modules, '
          '"matplotlib" in sys.modules)')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  seconds, *heavy = done.stdout.split()
  assert float(seconds) < 2 and heavy == ['False'] * 3


def test_status_works_where_the_tokenizer_is_missing(study, text, tmp_path):
  from btx_jax.data.tokenizer import train_tokenizer
  proto = train_tokenizer(['some words, and more words'] * 40, 290).files['tokenizer.model']
  kept = os.path.join(study.data_folder, 'tokenizer.model')
  os.makedirs(study.data_folder)
  with open(kept, 'wb') as file:
    file.write(proto)
  config = studies.get_config(text)
  config.tokenizer.path = str(tmp_path / 'gone.model')
  assert Study(config, study.workdir).runs['seed'].model.vocab_size == 290
  shutil.rmtree(study.workdir)
