"""Several processes compute what one does, through the real command line; or say why not.

tests/benchmarks/processes.py is the longer form.
"""

import json
import os
import shutil
import signal

from jax.experimental import multihost_utils
import numpy as np
import pytest

from btx_jax.devices import distributed
from btx_jax.errors import RunError
from btx_jax.study import manifest
from btx_jax.training import metrics
from tests import studies
from tests.jobs import Job, training, until

CONFIG = '''
import pathlib
from btx_jax import base
from tests import studies

def get_config():
  config = studies.get_config(pathlib.Path({text!r}))
  config.evaluation.update(every=0, mask_experts=True)
  config.mesh.tensor = 1
  data = {{'prose': 2, 'code': 1, 'math': 1}}
  config.runs = {{'seed': base.run(base.random(), data, steps=3, train={{'microbatches': 2}}),
                 'code': base.run(base.checkpoint('seed'), {{'code': 1}}, steps=3),
                 'math': base.run(base.checkpoint('seed'), {{'math': 1}}, steps=2),
                 'btx': base.run(base.mix('code', 'math', routers=base.from_text(
                     'ridge', rows=8, ridge=0.1)), data, steps=4)}}
  config.stacked = ('code', 'math')
  return config
'''


def write_config(folder) -> str:
  studies.write_text(folder)
  (folder / 'small.py').write_text(CONFIG.format(text=str(folder)))
  return f'--config={folder / "small.py"}'


@pytest.fixture(scope='module')
def study(tmp_path_factory):
  """The same study, experts stacked, by one process of four devices, and by two of two."""
  folder = tmp_path_factory.mktemp('study')
  config = write_config(folder)
  jobs = {n: Job(n, 4 // n, config, f'--workdir={folder / f"by{n}"}') for n in (1, 2)}
  ended = {n: job.end() for n, job in jobs.items()}
  for processes in ended.values():
    errors = '\n'.join(errors[-4000:] for _, _, errors in processes)
    assert [code for code, _, _ in processes] == [0] * len(processes), errors
  return folder, config, ended


def assert_same_course(ours: list[dict], theirs: list[dict]):
  assert [line['step'] for line in ours] == [line['step'] for line in theirs]
  for a, b in zip(ours, theirs):
    assert a['tokens_by_domain'] == b['tokens_by_domain']
    assert a['loss'] == pytest.approx(b['loss'], abs=1e-5)
    assert a['loss_by_domain'] == pytest.approx(b['loss_by_domain'], abs=1e-5)
    assert a['grad_norm'] == pytest.approx(b['grad_norm'], rel=1e-4)


def test_two_processes_see_the_same_data_and_losses_as_one(study):
  folder, _, _ = study
  for name, steps in (('seed', 3), ('code', 3), ('math', 2), ('btx', 4)):
    one, two = (training(folder / f'by{n}', name) for n in (1, 2))
    assert len(one) == steps
    assert_same_course(two, one)


def test_two_processes_come_to_the_same_table(study):
  folder, _, ended = study
  reports = []
  for n in (1, 2):
    with open(folder / f'by{n}' / 'report' / 'report.json', encoding='utf-8') as file:
      reports.append(json.load(file))
  one, two = ({row['name']: row for row in report['rows']} for report in reports)
  assert one.keys() == two.keys() == {
      'seed', 'code', 'math', 'average of btx', 'btx unfinetuned', 'btx'}
  for name, row in one.items():
    assert two[name]['bits_per_byte'] == pytest.approx(row['bits_per_byte'], abs=1e-5)
  (one,), (two,) = (report['without_each_expert'] for report in reports)
  for domain, change in one['change'].items():
    assert two['change'][domain] == pytest.approx(change, abs=1e-5)
  assert 'Bits per byte' in ended[2][0][1]


def test_two_processes_set_the_same_routers_from_text(study):
  folder, _, _ = study
  one, two = (folder / f'by{n}' / 'btx' / 'routers' for n in (1, 2))
  for name, tolerance in (('0_outer.npy', 1e-5), ('1_sum.npy', 1e-5), ('columns.npy', 1e-3)):
    ours, theirs = np.load(one / name), np.load(two / name)
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max(), name


def test_process_0_alone_writes_and_speaks(study):
  folder, _, ended = study
  (_, out, _), (_, silent, errors) = ended[2]
  assert 'on 4 cpu device(s) of 2 processes' in out
  assert out.count('Report: ') == 1 and out.count('reading and tokenizing') == 3
  assert silent == '' and 'Traceback' not in errors
  files = {n: {os.path.relpath(os.path.join(root, name), folder / f'by{n}')
               for root, _, names in os.walk(folder / f'by{n}') for name in names
               if 'checkpoints' not in root} for n in (1, 2)}
  assert files[1] == files[2]  # nothing half-written
  steps = [line['step'] for line in metrics.read(str(folder / 'by2' / 'btx')) if 'loss' in line]
  assert steps == sorted(set(steps))  # nothing twice
  found = manifest.read(str(folder / 'by2' / 'btx'))
  assert (found['state'], found['processes'], found['devices']) == ('complete', 2, '4 x cpu')


def test_one_process_of_fewer_devices_goes_on_where_two_stopped(study, tmp_path):
  folder, config, _ = study
  workdir = tmp_path / 'work'
  shutil.copytree(folder / 'by2', workdir)
  run = workdir / 'btx'
  shutil.rmtree(run / 'checkpoints' / '4')
  found = manifest.read(str(run))
  manifest.write(str(run), found | {'state': manifest.STOPPED, 'steps_done': 2})
  [(code, out, errors)] = Job(1, 2, config, f'--workdir={workdir}', '--run=btx',
                              '--config.mesh.fsdp=1').end()
  assert code == 0, errors
  assert 'btx: 2 of 4 steps' in out
  assert_same_course(training(workdir, 'btx'), training(folder / 'by1', 'btx'))
  assert manifest.read(str(run))['tokens_by_domain'] == found['tokens_by_domain']


def test_stopped_by_a_signal_all_save_and_a_process_that_dies_is_noticed(study, tmp_path):
  _, config, _ = study
  workdir = tmp_path / 'work'
  arguments = [config, f'--workdir={workdir}', '--run=seed', '--config.runs.seed.steps=1000000',
               '--config.runs.seed.train.microbatches=1', '--config.checkpoint_every=1000000']
  job = Job(2, 2, *arguments)
  until(lambda: len(training(workdir, 'seed')) > 2 or job.started[0].poll() is not None)
  job.started[1].send_signal(signal.SIGTERM)
  for code, _, errors in job.end():
    assert code == 130 and 'continues from the last checkpoint' in errors, errors
  found = manifest.read(str(workdir / 'seed'))
  assert found['state'] == manifest.STOPPED and found['steps_done'] > 2
  assert os.path.isdir(workdir / 'seed' / 'checkpoints' / str(found['steps_done']))

  job = Job(2, 2, *arguments)
  more = found['steps_done'] + 2
  until(lambda: training(workdir, 'seed')[-1]['step'] > more or job.started[0].poll() is not None)
  job.started[0].kill()  # with it goes the coordinator, which the other hears of at once
  _, (code, _, errors) = job.end()
  assert code != 0
  assert 'Another process of this job is gone' in errors or 'Terminating process' in errors
  again = manifest.read(str(workdir / 'seed'))
  assert again['steps_done'] == found['steps_done']  # what was saved is still what it says


# What is refused before the first step


def test_different_configs_are_refused_on_the_command_line(study, tmp_path):
  _, config, _ = study
  job = Job(2, 1, config, f'--workdir={tmp_path / "work"}',
            last=('--config.optimizer.peak_lr=0.002',))
  for code, _, errors in job.end():
    assert code == 2, errors
    assert 'config.optimizer.peak_lr: process 0 has 0.01, process 1 has 0.002' in errors
    assert 'Traceback' not in errors
  assert not os.path.exists(tmp_path / 'work')


def test_an_error_on_process_0_while_the_others_wait_is_printed_by_all(study, tmp_path):
  _, config, _ = study
  job = Job(2, 2, config, f'--workdir={tmp_path / "work"}', '--config.tokenizer.vocab_size=3000',
            slurm=True)
  (code, _, errors), (other, _, theirs) = job.end()
  assert (code, other) == (2, 2), errors + theirs
  assert 'vocab' in errors
  assert f'process 0: {errors.splitlines()[-1].removeprefix("btx_jax: ")}' in theirs


def test_one_process_alone_needs_nobody():
  assert distributed.gather({'a': 1}) == [{'a': 1}]
  assert distributed.broadcast(lambda: 3) == distributed.on_process_0(lambda: 3) == 3
  with pytest.raises(RunError, match='as it is'):
    distributed.on_process_0(lambda: (_ for _ in ()).throw(RunError('as it is')))
  distributed.initialize(None, False, {})
  assert distributed.is_process_0() and distributed.leave_job(7) == 7


def test_a_process_that_does_something_else_ends_the_job_with_a_sentence(monkeypatch):
  monkeypatch.setattr(distributed, '_several_processes', lambda: True)
  monkeypatch.setattr(multihost_utils, 'process_allgather', lambda x: np.stack([x, 0 * x]))
  with pytest.raises(RunError, match='One process of this job has failed'):
    distributed.gather({'a': 1})
