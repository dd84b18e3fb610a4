"""The scripts in launch/: what they print is what the command understands, and what they start
runs. No cloud, cluster or GPU is there: stand-ins of their programs, and fake devices."""

import glob
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys

import pytest
import yaml

from btx_jax.commands import status
from btx_jax.study import manifest
from btx_jax.study.study import Study
from tests import studies
from tests.jobs import PATIENCE, ROOT, free_port, training, until

CONFIG = '''
import pathlib
from btx_jax import base
from tests import studies

def get_config():
  config = studies.get_config(pathlib.Path({text!r}))
  config.mesh.update(fsdp=0, expert=0, tensor=1)
  config.model.num_layers = 1
  config.evaluation.every = 0
  config.checkpoint_every = 10_000
  data = {{'prose': 1}}
  config.domains = {{'prose': config.domains.prose}}
  config.tokenizer.vocab_size = 290
  config.runs = {{'expert/a': base.run(base.random(), data, steps={steps}),
                 'expert/b': base.run(base.random(), data, steps=3),
                 'btx': base.run({last}, data, steps=2)}}
  return config
'''
FLAGS = ('--config=configs/demo.py:full', "--config.runs['expert/code'].steps=7",
         '--config.optimizer.peak_lr=1e-3')
SETTINGS = {'ZONE': 'us-east5-b', 'IMAGE': 'mine/btx', 'DELETE': '1'}
RUNS = [['seed'], ['dense', 'expert/code', 'expert/knowledge', 'expert/math', 'upcycled']]
CALLED = 'called'


def stand_in(folder, name: str, text: str):
  """A program that is found before the real one."""
  path = folder / name
  path.write_text(text)
  path.chmod(path.stat().st_mode | stat.S_IXUSR)


def environment(folder, **settings) -> dict[str, str]:
  """Where programs in `folder` come first, `python` is this one, and nothing compiles twice."""
  return {**os.environ, 'PATH': f'{folder}:{os.path.dirname(sys.executable)}:{os.environ["PATH"]}',
          'PYTHONPATH': ROOT,
          'JAX_COMPILATION_CACHE_DIR': os.path.join(folder, 'cache'),
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', **settings}


def launch(script: str, *arguments: str, **options) -> subprocess.CompletedProcess:
  return subprocess.run([f'launch/{script}', *arguments], cwd=ROOT, text=True, timeout=PATIENCE,
                        capture_output=True, **options)


def commands_in(printed: str) -> list[list[str]]:
  """The words behind `python -m btx_jax.main` of every line that has it, also inside of words."""
  found = []
  for line in printed.splitlines():
    words = shlex.split(line.strip())
    inner = next((word for word in words if 'btx_jax.main ' in word), None)
    if inner:  # of `ssh --command=...`
      words = shlex.split(inner.removeprefix('--command='))
    if 'btx_jax.main' in words and 'sbatch' not in words:
      found.append(words[words.index('btx_jax.main') + 1:])
  return found


@pytest.mark.parametrize('script, settings', [
    ('gpu_node.sh', {'EXPERTS': 'apart', 'GPUS': '8'}), ('slurm.sh', {}), ('tpu_vm.sh', {}),
    ('gke.sh', {})])
def test_a_dry_run_prints_what_the_command_understands_and_does_nothing(
    run, tmp_path, script, settings):
  for name in ('gcloud', 'kubectl', 'sbatch', 'srun', 'scontrol', 'tar'):
    stand_in(tmp_path, name, f'#!/bin/sh\ntouch {tmp_path / CALLED}\n')
  workdir = f'--workdir={tmp_path / "work"}'
  done = launch(script, '--dry-run', *FLAGS, workdir,
                env=environment(tmp_path, **SETTINGS, **settings))
  assert done.returncode == 0 and not done.stderr, done.stderr
  assert not (tmp_path / CALLED).exists() and not (tmp_path / 'work').exists()
  found = commands_in(done.stdout)
  for words in found:
    assert words[:4] == [*FLAGS, workdir]
    parsed = run(*words, 'jobs')
    if '--distributed' in words:
      assert 'jobs runs in a single process: omit --distributed' in parsed.stderr
    else:
      assert parsed.code == 0, parsed.stderr
  names = [[word.removeprefix('--run=') for word in words if word.startswith('--run=')]
           for words in found]
  assert [sorted(name for [name] in names[:1]), sorted(name for [name] in names[1:-1])] == RUNS
  assert names[-1] == []  # the finetune and the comparison
  if script == 'gke.sh':
    check_jobsets(done.stdout)


def check_jobsets(printed: str):
  texts = re.findall(r"<<'JOBSET'\n(.*?)\nJOBSET\n", printed, re.DOTALL)
  sets = [yaml.safe_load(text) for text in texts]
  names = [jobset['metadata']['name'] for jobset in sets]
  assert len(set(names)) == len(names) == 7
  for jobset in sets:
    assert re.fullmatch('[a-z0-9-]+', jobset['metadata']['name'])
    job = jobset['spec']['replicatedJobs'][0]['template']['spec']
    assert job['completions'] == job['parallelism'] == 4
    [container] = job['template']['spec']['containers']
    assert container['name'] == job['podFailurePolicy']['rules'][0]['onExitCodes']['containerName']
  assert '${' not in printed.replace('${...}', '')


def test_stages_leave_out_what_is_complete(text, tmp_path):
  study = Study(studies.get_config(text), str(tmp_path))
  assert status.stages(study) == [['seed'], ['expert/code', 'expert/math'], ['btx']]
  for name in ('seed', 'expert/math'):
    found = manifest.begin(name, study.runs[name].spec()) | {'state': manifest.COMPLETE}
    manifest.write(study.folder(name), found)
  assert status.stages(study) == [['expert/code'], ['btx']]


def test_what_can_only_be_one_job_is_one(tmp_path):
  done = launch('gpu_node.sh', '--dry-run', '--one-job', *FLAGS, env=environment(tmp_path))
  assert commands_in(done.stdout) == [list(FLAGS)]
  for seeds in ([], ['--config.seeds=0,1']):
    done = launch('gpu_node.sh', '--dry-run', '--config=configs/demo.py', *seeds,
                  env=environment(tmp_path, EXPERTS='stacked'))
    [[*_, stacked]] = commands_in(done.stdout)
    assert sorted(re.findall("'(.+?)'", stacked)) == RUNS[1][1:-1]
  done = launch('gpu_node.sh', '--run=seed', *FLAGS, env=environment(tmp_path))
  assert done.returncode == 2 and '--run=seed is set by this script; omit it' in done.stderr


@pytest.mark.parametrize('script, arguments, settings, why', [
    ('gpu_node.sh', [*FLAGS, '--workdir'], {}, 'Missing value for flag --workdir'),
    ('gpu_node.sh', FLAGS, {'GPUS': 'abc'}, 'GPUS=abc is not a number of GPUs'),
    ('gpu_node.sh', FLAGS, {'GPUS': '8', 'CUDA_VISIBLE_DEVICES': '4,5', 'JAX_PLATFORMS': ''},
     'GPUS=8, but there are 2'),
    ('tpu_vm.sh', FLAGS, {}, 'needs --workdir, like gs://BUCKET/NAME, which all machines see'),
    ('gke.sh', [f'--config={ROOT}/configs/demo.py', '--workdir=/mnt'], {},
     'needs a --config in configs/')])
def test_what_cannot_go_well_is_not_begun(tmp_path, script, arguments, settings, why):
  done = launch(script, *arguments, env=environment(tmp_path, **SETTINGS, **settings))
  assert done.returncode == 2 and why in done.stderr and not done.stdout


def test_gpus_are_those_that_are_visible(tmp_path):
  done = launch('gpu_node.sh', '--dry-run', '--config=configs/demo.py', env=environment(
      tmp_path, EXPERTS='apart', CUDA_VISIBLE_DEVICES='4,GPU-5,6,7', JAX_PLATFORMS='', GPUS='3'))
  assert re.findall(r'CUDA_VISIBLE_DEVICES=(\S+)', done.stdout) == [
      '4,GPU-5,6', '4', 'GPU-5', '6', '4,GPU-5,6']
  assert launch('gpu_node.sh', '--help').stdout.startswith('All runs of a config on the GPUs')


def test_shellcheck_finds_nothing():
  program = shutil.which('shellcheck', path=environment('')['PATH'])
  assert program, "pip install -e '.[test]'"
  scripts = [*sorted(glob.glob('launch/*.sh', root_dir=ROOT)), '.ci/run']
  assert len(scripts) == 8
  done = subprocess.run([program, '--external-sources', *scripts], cwd=ROOT, text=True,
                        capture_output=True)
  assert done.returncode == 0, done.stdout


def test_nothing_is_fetched_and_run_in_whatever_version_there_is_or_left_where_others_write():
  for path in [*glob.glob('launch/*.sh', root_dir=ROOT), '.ci/run']:
    with open(os.path.join(ROOT, path), encoding='utf-8') as file:
      script = file.read()
    assert not re.search(r'/tmp\b|TMPDIR|\| *(ba)?sh\b', script), path
  printed = launch('tpu_vm.sh', '--dry-run', *FLAGS, '--workdir=/mnt/x',
                   env=environment('', **SETTINGS))
  assert re.search(r'https://astral.sh/uv/\d+\.\d+\.\d+/install.sh', printed.stdout)


@pytest.mark.parametrize('stages, why', [
    ('"expert/a expert/b" btx', ''),
    ('"expert/a expert.a"', 'expert.a and expert/a would both be called btx-expert-a'),
    ('A a', 'a and A would both be called btx-a'),
    ('all', 'all and the finetune would both be called btx-all')])
def test_no_two_runs_share_a_machine(stages, why):
  script = f'. launch/common.sh --one-job; stages=({stages}); check_names_of_runs btx'
  done = subprocess.run(['bash', '-euo', 'pipefail', '-c', script, 'x.sh', '--one-job'], cwd=ROOT,
                        text=True, capture_output=True)
  assert done.returncode == (2 if why else 0) and why in done.stderr, done.stderr


def write_config(text, folder, steps: int, last: str) -> str:
  (folder / 'small.py').write_text(CONFIG.format(text=str(text), steps=steps, last=last))
  return f'--config={folder / "small.py"}'


@pytest.mark.launch
def test_one_node_trains_apart_is_stopped_and_goes_on_in_turn(text, tmp_path):
  """With the flags of launch/env.sh: jaxlib ends a process for one that it does not know."""
  mix = "base.mix('expert/a', 'expert/b', allow='seed')"
  arguments = [write_config(text, tmp_path, 150, mix), f'--workdir={tmp_path / "work"}']
  settings = environment(tmp_path, JAX_PLATFORMS='cpu', JAX_NUM_CPU_DEVICES='4')
  script = subprocess.Popen(['launch/gpu_node.sh', *arguments], cwd=ROOT, text=True,
                            env={**settings, 'EXPERTS': 'apart'}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)
  until(lambda: len(training(tmp_path / 'work', 'expert/a')) > 2 or script.poll() is not None)
  script.send_signal(signal.SIGTERM)
  _, errors = script.communicate(timeout=PATIENCE)
  assert script.returncode == 130, errors
  of_a = tmp_path / 'work' / 'expert' / 'a'
  found = manifest.read(str(of_a))
  assert found['state'] == manifest.STOPPED and found['steps_done'] > 2, errors
  assert found['devices'] == '2 x cpu'  # its share
  assert os.listdir(of_a / 'checkpoints') == [str(found['steps_done'])]

  done = launch('gpu_node.sh', *arguments, env=settings)
  assert done.returncode == 0, done.stderr
  assert f'expert/a: {found["steps_done"]} of 150 steps' in done.stdout
  assert 'Bits per byte' in done.stdout
  assert manifest.read(str(tmp_path / 'work' / 'btx'))['devices'] == '4 x cpu'


GCLOUD = '''#!/bin/bash
# Logs what it is asked for; one slice fails.
echo "$*" >> {folder}/log
case $* in
  *describe*) echo ACTIVE ;;
  *" ssh {broken} "*) exit 1 ;;
esac
'''
KUBECTL = '''#!/bin/bash
# Every JobSet ends as soon as it is there.
case $1 in
  apply)
    name=$(sed -n 's/^  name: //p')
    echo "create $name" >> {folder}/log
    touch {folder}/$name ;;
  get) [[ ! -e {folder}/$3 ]] || {{ [[ $3 == {broken} ]] && echo Failed || echo Completed; }} ;;
  delete) echo "delete $3" >> {folder}/log; rm {folder}/$3 ;;
esac
'''


@pytest.mark.parametrize('script, name, text', [
    ('tpu_vm.sh', 'gcloud', GCLOUD), ('gke.sh', 'kubectl', KUBECTL)])
def test_slices_are_made_stage_by_stage_and_none_after_a_failure(tmp_path, script, name, text):
  stand_in(tmp_path, 'sleep', '#!/bin/sh\n')
  ended = []
  for broken in ('none', 'btx-expert-math'):
    folder = tmp_path / broken
    folder.mkdir()
    stand_in(tmp_path, name, text.format(folder=folder, broken=broken))
    done = launch(script, '--config=configs/demo.py', f'--workdir={tmp_path / "work"}',
                  env=environment(tmp_path, **SETTINGS, QUEUED='1', TMPDIR=str(tmp_path)))
    log = (folder / 'log').read_text()
    ended.append((done.returncode, re.findall(r'create (\S+)', log), log))
  (code, [first, *experts, last], log), (failed, made, _) = ended
  assert (code, first, last) == (0, 'btx-seed', 'btx-all')
  assert sorted(experts) == ['btx-expert-code', 'btx-expert-knowledge', 'btx-expert-math']
  assert failed == 2 and made[0] == first and sorted(made[1:]) == sorted(experts)
  if script == 'gke.sh':
    done = launch(script, '--config=configs/demo.py', f'--workdir={tmp_path / "work"}',
                  env=environment(tmp_path, **SETTINGS))
    made = re.findall(r'(create|delete) (\S+)', (folder / 'log').read_text())[4:]
    assert made == [('delete', broken), ('create', broken)]  # and none that was complete
  if script == 'tpu_vm.sh':  # DELETE=1
    packages = re.findall(r'scp (\S+)/btx_jax.tgz ', log)
    assert len(packages) == 5 and os.path.dirname(packages[0]) == str(tmp_path)
    assert not os.path.exists(packages[0])
    assert sorted(re.findall(r'delete (\S+)', log)) == sorted([first, *experts, last])


SBATCH = '''#!/bin/bash
# Does the job at once; its id is the number of jobs so far. What it was asked for goes to a log.
set -euo pipefail
echo "$*" >> {folder}/log
tasks=0
while [[ $1 == --* ]]; do
  case $1 in
    --array=0-*) tasks=${{1#--array=0-}} ;;
    --ntasks-per-node=*) export SLURM_NTASKS=${{1#*=}} ;;
  esac
  shift
done
export SLURM_JOB_ID=$(wc -l < {folder}/log) SLURM_SUBMIT_DIR=$PWD
for i in $(seq 0 "$tasks"); do SLURM_ARRAY_TASK_ID=$i "$@" >> {folder}/out 2>&1; done
echo "$SLURM_JOB_ID;cluster"
'''
SRUN = '''#!/bin/bash
# Starts the processes of a job on this machine, as jax knows them from Slurm.
export SLURM_STEP_NODELIST=localhost
for ((i = 0; i < SLURM_NTASKS; i++)); do
  SLURM_LOCALID=$i SLURM_PROCID=$i "$@" & ids+=($!)
done
for id in "${ids[@]}"; do wait "$id" || code=$?; done
exit "${code:-0}"
'''


@pytest.mark.launch
def test_slurm_runs_an_array_of_experts_then_the_finetune_of_two_processes_each(text, tmp_path):
  stand_in(tmp_path, 'sbatch', SBATCH.format(folder=tmp_path))
  stand_in(tmp_path, 'srun', SRUN)
  last = "base.checkpoint('expert/a')"  # no mixture, which takes longest to compile
  config = write_config(text, tmp_path, 3, last)
  done = launch('slurm.sh', config, f'--workdir={tmp_path / "work"}',
                env=environment(tmp_path, GPUS='2', JAX_PLATFORMS='cpu', JAX_NUM_CPU_DEVICES='2',
                                JAX_COORDINATOR_PORT=str(free_port())))
  out = (tmp_path / 'out').read_text()
  assert done.returncode == 0, done.stderr + out
  assert done.stdout == '1 array(s) submitted, then job 2\n'
  first, last = (tmp_path / 'log').read_text().splitlines()
  assert '--array=0-1' in first and '--requeue' in first and '--dependency' not in first
  assert '--dependency=afterok:1 ' in last and '--array' not in last
  for name in ('expert/a', 'expert/b', 'btx'):
    found = manifest.read(str(tmp_path / 'work' / name))
    assert (found['state'], found['processes'], found['devices']) == ('complete', 2, '4 x cpu')
  assert 'Bits per byte' in out


@pytest.mark.parametrize('code, ended, requeued', [
    (130, False, True),  # warned that the time is up: saved
    (130, True, False),  # ended by Slurm, which knows what to do next
    (2, False, False)])
def test_a_job_that_was_told_to_stop_is_requeued(tmp_path, code, ended, requeued):
  stand_in(tmp_path, 'srun', f'#!/bin/sh\n{"kill $PPID" if ended else ""}\nexit {code}\n')
  stand_in(tmp_path, 'scontrol', f'#!/bin/sh\necho "$*" > {tmp_path / CALLED}\n')
  done = launch('slurm_job.sh', '', 'python', '-m', 'btx_jax.main',
                env=environment(tmp_path, SLURM_JOB_ID='7'))
  assert done.returncode == code
  assert (tmp_path / CALLED).exists() == requeued
  if requeued:
    assert (tmp_path / CALLED).read_text() == 'requeue 7\n'
