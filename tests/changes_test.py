"""A working directory and a config that has changed since: what is said, what a new name keeps, and
the step with the lowest held-out loss. Through the command line."""

import json
import os
import pathlib
import shutil

import pytest

from btx_jax import base
from btx_jax.commands import status
from btx_jax.run import seed_of
from btx_jax.study import changes, directories, manifest
from btx_jax.study.study import Study
from btx_jax.training import metrics
from btx_jax.training.best import Best
from tests import studies

CONFIG = '''
import pathlib
from btx_jax import base
from tests import studies

ALL = {{'prose': 2, 'code': 1}}

def get_config():
  config = studies.get_config(pathlib.Path({text!r}))
  config.mesh.update(fsdp=1, expert=1, tensor=1)
  config.model.num_layers = 1
  config.evaluation.every = 1
  config.checkpoints_kept = 1
  # The first step has the rate 0, and the others ruin the model.
  config.optimizer.update(schedule='wsd', warmup=2, decay=0.5, peak_lr=2.0)
  config.runs = {{
      'seed': base.run(base.random(), ALL, steps=4),
      'best': base.run(base.checkpoint('seed', step='best')),
      'leaf': base.run(base.checkpoint('best')),
  }}
{lines}
  return config
'''


@pytest.fixture(scope='module')
def folder(run, tmp_path_factory):
  """Text, a config file, and a working directory where all runs are complete."""
  found = tmp_path_factory.mktemp('changes')
  studies.write_text(found)
  (found / 'mine.py').write_text(CONFIG.format(text=str(found), lines=''))
  done = run(f'--config={found / "mine.py"}', f'--workdir={found / "work"}')
  assert done.code == 0, done.stderr
  assert 'best starts from step 1 of seed, its best' in done.stdout
  return found


@pytest.fixture
def work(folder, tmp_path):
  """A copy of the working directory, to change."""
  return pathlib.Path(shutil.copytree(folder / 'work', tmp_path / 'work'))


def with_lines(folder, tmp_path, work, lines='', text=None):
  """Arguments for a config with these further lines."""
  written = CONFIG.format(text=str(text or folder), lines=lines)
  (tmp_path / 'mine.py').write_text(written)
  return f'--config={tmp_path / "mine.py"}', f'--workdir={work}'


def manifest_of(work, name):
  return json.loads((work / name / 'manifest.json').read_text())


def config_of(path):
  namespace: dict = {}
  exec(path.read_text(), namespace)
  return namespace['get_config']()


def test_the_best_step_is_kept_and_a_run_starts_from_it(folder, work):
  found = manifest_of(work, 'seed')
  measured = {line['step']: line['bits_per_byte'] for line in metrics.read(str(work / 'seed'))
              if 'bits_per_byte' in line}
  # Weighted as its training rows; math is not among them.
  loss = {step: (2 * each['prose'] + each['code']) / 3 for step, each in measured.items()}
  assert found['best']['step'] == 1 == min(loss, key=loss.__getitem__)
  assert found['best']['bits_per_byte'] == pytest.approx(loss[1])
  assert {int(name) for name in os.listdir(work / 'seed' / 'checkpoints')} == {1, 4}
  best = manifest_of(work, 'best')
  assert (best['spec']['step'], best['from_best']) == (1, True)
  study = Study(config_of(folder / 'mine.py'), str(work))
  assert study.runs['best'].sources[0].label == 'seed, step 1'
  shown = {each['name']: each for each in status.collect(study)['runs']}
  assert shown['seed']['best'] == found['best']
  assert shown['seed']['warnings'] == [
      f'held-out loss was lowest at step 1, with {loss[1]:.3f} bits per byte; that checkpoint is '
      'kept, and base.checkpoint(\'seed\', step="best") starts from it']
  # A run that has been started stays with the step that was the best then.
  manifest.write(str(work / 'seed'), found | {'best': {'step': 3, 'bits_per_byte': 0.1}})
  study = Study(config_of(folder / 'mine.py'), str(work))
  assert study.runs['best'].sources[0].steps == 1
  shown = {each['name']: each for each in status.collect(study)['runs']}
  assert 'started from step 1 of seed, the best one then; the best is now step 3' in (
      shown['best']['warnings'])


@pytest.mark.parametrize('lines, expected', [
    ('config.runs.seed.steps = 9', [
        'seed was trained with steps 4 and has 9 now',
        'best and leaf descend from seed, which was trained with steps 4 and has 9 now']),
    ('config.optimizer.peak_lr = 1.0\nconfig.train.batch_size = 8\n'
     'config.runs.seed.optimizer = {"schedule": "constant"}', [
         'seed, best and leaf were trained with optimizer.peak_lr 2 (1 now), train.batch_size 16 '
         '(8 now)',
         'seed was trained with optimizer.schedule wsd (constant now), optimizer.decay 0.5 (0.2 '
         'now)',
         'best and leaf descend from seed, which was trained with optimizer.schedule wsd (constant '
         'now), optimizer.decay 0.5 (0.2 now)']),
    ('config.runs.seed.domains = {"prose": 1}\n'
     'config.runs.best.init = base.checkpoint("seed", step=4)', [
        'seed was trained with domains 0.333 code + 0.667 prose and has 1 prose now',
        'best started from step 1 of seed and starts from its end now',
        'best and leaf descend from seed, which was trained with domains 0.333 code + 0.667 prose '
        'and has 1 prose now',
        'leaf starts from best, which started from step 1 of seed and starts from its end now']),
    ('config.runs.leaf.init = base.checkpoint("seed")', [
         'leaf started from best and starts from seed now']),
])
def test_what_changed_is_said_of_all_directories_at_once(run, folder, tmp_path, lines, expected):
  lines = ''.join(f'  {line}\n' for line in lines.splitlines())
  arguments = with_lines(folder, tmp_path, folder / 'work', lines)
  done = run(*arguments)
  assert [line.strip() for line in done.stderr.splitlines() if line[:1] == ' '] == expected
  own = 'seed' if 'seed was' in done.stderr else 'leaf'
  assert ('leave \'seed\' as it was, and add a run from base.checkpoint(\'seed\', step=4, ' in (
      done.stderr)) == (own == 'seed')
  shown = json.loads(run(*arguments, 'status', '--json').stdout)['runs']
  said = ' '.join(f'{each["name"]} {"; ".join(each["warnings"])}' for each in shown)
  alone = [line for line in expected if ' and leaf' not in line]
  assert alone and all(line.split(' with ')[-1] in said for line in alone)


def test_text_that_changed_is_named_by_file(run, folder, tmp_path):
  shutil.copytree(folder / 'work' / 'data', tmp_path / 'work' / 'data')
  text = tmp_path / 'text'
  text.mkdir()
  for name in studies.WORDS:
    shutil.copy(folder / f'{name}.jsonl', text)  # the same content, elsewhere
  lines = f'  for domain in config.domains.values():\n    domain.paths = ({str(text)!r},)\n'
  arguments = with_lines(folder, tmp_path, tmp_path / 'work', lines)
  # The folder of all domains, so that their paths differ, too.
  assert 'code: domains.code.paths was [' in run(*arguments).stderr
  shutil.rmtree(tmp_path / 'work' / 'data')
  lines = ''.join(f'  config.domains.{name}.paths = ({str(text)!r} + "/{name}*",)\n'
                  for name in studies.WORDS)
  arguments = with_lines(folder, tmp_path, tmp_path / 'work', lines)
  assert run(*arguments, 'data').code == 0
  code, math, prose = (text / f'{name}.jsonl' for name in ('code', 'math', 'prose'))
  os.utime(prose)  # another time, the same content
  assert run(*arguments, 'data').code == 0
  size = code.stat().st_size
  with open(code, 'a', encoding='utf-8') as file:
    file.write('{"text": "more"}\n')
  math.write_text(math.read_text().replace('1', '2'))
  shutil.copy(math, text / 'math2.jsonl')
  done = run(*arguments)
  expected = [f'code: {code} had {size:,} bytes and has {size + 17:,} now',
              f'math: {math} has different content of the same size',
              f'math: {text / "math2.jsonl"} is new, with {math.stat().st_size:,} bytes']
  assert [line.strip() for line in done.stderr.splitlines() if line.startswith('  ')] == expected
  assert 'give it a domain of another name, or use another --workdir' in done.stderr
  assert json.loads(run(*arguments, 'status', '--json').stdout)['text_changes'] == expected


def test_a_run_under_another_name_stays_the_same_run(run, folder, work, tmp_path):
  before = manifest_of(work, 'seed')
  arguments = with_lines(folder, tmp_path, work)
  config = tmp_path / 'mine.py'
  config.write_text(config.read_text().replace("'seed'", "'old/seed'"))
  # Renamed in the config only: the way out is named.
  done = run(*arguments, '--run=best')
  assert done.code == 2
  assert "If 'old/seed' is the run that was 'seed', `rename seed old/seed` moves it" in done.stderr
  assert run(*arguments, 'rename', 'seed/', 'old/seed/').code == 0
  for name in ('old/seed', 'best', 'leaf'):
    assert f'{name} is complete already' in run(*arguments, f'--run={name}').stdout
  after = manifest_of(work, 'old/seed')
  same = ('identity', 'spec', 'rng_seed', 'best', 'tokens_by_domain')
  assert {key: after[key] for key in same} == {key: before[key] for key in same}
  # Moved by hand, and named afterwards.
  os.rename(work / 'old' / 'seed', work / 'basis')
  config.write_text(config.read_text().replace("'old/seed'", "'basis'"))
  assert run(*arguments, 'rename', 'old/seed', 'basis').code == 0
  assert 'leaf is complete already' in run(*arguments, '--run=leaf').stdout
  # What has not been trained yet starts from it as if nothing had happened.
  config = config_of(config)
  config.runs.more = base.run(base.checkpoint('basis', state=True), {'prose': 2, 'code': 1}, 1)
  runs = Study(config, str(work)).runs
  assert runs['more'].training_seed == before['rng_seed'] == seed_of('seed', 0)
  assert runs['more'].spec()['sources'] == ['seed']
  assert not os.path.exists(work / 'old')


def test_a_source_that_was_deleted_since_is_described_by_what_is_recorded(folder, work):
  config = config_of(folder / 'mine.py')
  config.runs.seed.steps = 9
  shutil.rmtree(work / 'seed')
  study = Study(config, str(work))
  found = manifest_of(work, 'best')
  expected = ['starts from seed, which was trained with steps 4 and has 9 now']
  run = study.runs['best']
  assert list(directories.sentences(run, changes.of(study, run, found))) == expected
  del found['ancestors']  # as in manifests of earlier versions
  assert not changes.of(study, run, found)


def test_every_series_has_its_own_best_step(folder, tmp_path):
  config = config_of(folder / 'mine.py')
  config.seeds = (0, 1, 2)
  written = {f'seed-{i}': {'best': {'step': step, 'bits_per_byte': 1.0}} if step else {}
             for i, step in enumerate((1, 3, 0))}
  for series, best in written.items():
    manifest.write(str(tmp_path / series / 'seed'),
                   manifest.begin('seed', {}) | {'state': manifest.STOPPED} | best)
  runs = Study(config, str(tmp_path)).runs
  sources = [runs[f'{series}/best'].sources[0] for series in written]
  assert [each.label for each in sources] == [
      'seed-0/seed, step 1', 'seed-1/seed, step 3', 'seed-2/seed, its best step']
  assert runs['seed-1/leaf'].sources[0].sources[0].steps == 3


@pytest.mark.parametrize('step', ['"best"', '3'])
def test_a_kill_while_a_checkpoint_is_written_holds_up_no_run_that_starts_there(
    run, folder, work, tmp_path, step):
  """The manifest has the step already, and the checkpoint is not complete."""
  for path in ('best', 'leaf', 'seed/checkpoints/4'):
    shutil.rmtree(work / path)
  found = manifest_of(work, 'seed') | {
      'state': manifest.RUNNING, 'steps_done': 3, 'best': {'step': 3, 'bits_per_byte': 0.1}}
  manifest.write(str(work / 'seed'), found)
  arguments = with_lines(
      folder, tmp_path, work, f'  config.runs.best.init = base.checkpoint("seed", step={step})\n')
  refused = run(*arguments, '--run=best')
  assert 'keeps 1. Run --run=seed first.' in refused.stderr
  done = run(*arguments)
  assert done.code == 0, done.stderr
  after = manifest_of(work, 'seed')
  assert after['state'] == manifest.COMPLETE and after['best']['bits_per_byte'] > 0.1
  assert (work / 'seed' / 'checkpoints' / str(after['best']['step'])).exists()


def test_a_loss_that_is_not_finite_is_never_the_best():
  best = Best()
  assert [best.improves(step, loss) for step, loss in enumerate(
      (float('nan'), 2.0, float('nan'), 1.0, float('nan'), 1.5))] == [
          False, True, False, True, False, False]
  assert best.found == {'step': 3, 'bits_per_byte': 1.0}


def test_an_end_that_is_measured_anew_is_not_compared_with_other_text(run, folder, work, tmp_path):
  found = manifest_of(work, 'seed')
  manifest.write(str(work / 'seed'), found | {'best': {'step': 1, 'bits_per_byte': 99.0}})
  done = run(*with_lines(folder, tmp_path, work, '  config.evaluation.tokens = 100\n'))
  assert done.code == 0 and 'seed: measuring' in done.stdout
  assert manifest_of(work, 'seed')['best']['step'] == 1
