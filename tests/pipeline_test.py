"""A study from text to table, stopped, resumed, and protected from other configs."""

import dataclasses
import glob
import gzip
import itertools
import json
import math
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from btx_jax import base, btx, load
from btx_jax.commands import claims, compare, report, table
from btx_jax.devices import sharding
from btx_jax.errors import RunError, UsageError
from btx_jax.model import llama
from btx_jax.pipeline import Pipeline
from btx_jax.scoring import scores
from btx_jax.study import manifest, sources
from btx_jax.study import params as params_lib
from btx_jax.study.study import Study
from btx_jax.training import metrics
from btx_jax.training.program import SingleRun
from tests import studies
from tests.helpers import assert_trees_equal, final_params, initial_params


@pytest.fixture(scope='module')
def study(text, tmp_path_factory):
  """A study that ran without interruption."""
  config = studies.get_config(text)
  config.evaluation.mask_experts = True
  pipeline = Pipeline(config, str(tmp_path_factory.mktemp('study') / 'work'))
  assert pipeline.train()
  return pipeline


@pytest.fixture
def copy(study, tmp_path):
  """The directory of the finished study, to do harm to."""
  return shutil.copytree(study.workdir, tmp_path / 'work')


def snapshot(folder):
  return {os.path.join(root, name): os.stat(os.path.join(root, name)).st_mtime_ns
          for root, _, names in os.walk(folder) for name in names}


OF_THE_MACHINE = ('time', 'tokens_per_second', 'mfu', 'input_wait', 'memory')


def metrics_of(pipeline, name):
  with open(os.path.join(pipeline.folder(name), 'metrics.jsonl'), encoding='utf-8') as file:
    lines = [json.loads(line) for line in file]
  return [{k: v for k, v in line.items() if k not in OF_THE_MACHINE} for line in lines]


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(study, text, tmp_path, monkeypatch):
  pipeline = Pipeline(studies.get_config(text), str(tmp_path / 'work'))
  batches = SingleRun.batches
  for name, last in (('seed', 5), ('expert/code', 3), ('btx', 5)):

    def interrupted(self, orders, first_step, last_step, name=name, last=last):
      for step, batch in enumerate(batches(self, orders, first_step, last_step), first_step):
        if self.runs[0].name == name and step == last:
          raise KeyboardInterrupt
        yield batch

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
      patched.setattr(SingleRun, 'batches', interrupted)
      pipeline.train()
    assert pipeline.state(name) == manifest.STOPPED
  with open(os.path.join(pipeline.folder('btx'), 'metrics.jsonl'), 'a', encoding='utf-8') as file:
    file.write('{"step": 5, "lo')  # what a kill leaves behind
  assert pipeline.train()
  for name in study.runs:
    assert_trees_equal(final_params(pipeline, name), final_params(study, name))
    assert metrics_of(pipeline, name) == metrics_of(study, name)
    ours, theirs = (manifest.read(p.folder(name)) for p in (pipeline, study))
    assert ours['tokens_by_domain'] == theirs['tokens_by_domain']
    assert ours['identity'] == theirs['identity']


def test_a_complete_study_is_left_alone(study):
  before = snapshot(study.workdir)
  assert not Pipeline(study.config, study.workdir).train()
  assert snapshot(study.workdir) == before


@pytest.mark.parametrize('function, missing', [
    ('mix', 'btx'), ('average', 'btx/evaluation_average.json')])
def test_a_study_mixes_and_averages_by_the_functions_of_the_method(
    study, copy, monkeypatch, function, missing):
  path = os.path.join(copy, missing)
  (shutil.rmtree if os.path.isdir(path) else os.remove)(path)

  def refuse(*_):
    raise ZeroDivisionError(function)

  monkeypatch.setattr(btx, function, refuse)
  with pytest.raises(ZeroDivisionError, match=function):
    Pipeline(study.config, str(copy)).train()


def test_a_run_directory_is_loaded_by_the_library(study):
  config, params = load(study.folder('btx'))
  assert dataclasses.replace(config, dispatch_factor=2.0) == study.runs['btx'].model
  assert_trees_equal(params, final_params(study, 'btx'))


def test_the_mixture_starts_from_its_sources(study):
  btx = study.runs['btx']
  sources = {run.name: final_params(study, run.name) for run in btx.sources}
  start = initial_params(study, 'btx')
  for e, name in enumerate(btx.expert_names):
    assert_trees_equal(jax.tree.map(lambda x, e=e: x[:, e], start['layers']['ffn']['experts']),
                       sources[name]['layers']['ffn'])
  mean = np.mean([params['embed'] for params in sources.values()], 0)
  np.testing.assert_allclose(start['embed'], mean, atol=1e-6)
  average = params_lib.average(study, btx, study.mesh)
  up = np.mean([params['layers']['ffn']['up'] for params in sources.values()], 0)
  np.testing.assert_allclose(average['layers']['ffn']['up'], up, atol=1e-6)


def test_experts_are_compared_with_their_seed(study, capsys):
  """By what lies in the directories, see compare_test.py for the figures."""
  compare.print_comparison(Study(study.config, study.workdir), 'btx')
  with open(os.path.join(study.workdir, 'compare.json'), encoding='utf-8') as file:
    found = json.load(file)
  assert (found['seed'], found['experts']) == ('seed', ['expert/code', 'expert/math'])
  seed, code, math = (final_params(study, name)['layers']['ffn']
                      for name in study.runs if name != 'btx')
  d, e = (np.concatenate([np.ravel(params[name][1] - seed[name][1]) for name in seed]).astype(
      np.float64) for params in (code, math))
  layer, = (each for each in found['components']
            if (each['component'], each['layer']) == ('feed-forward', 1))
  assert layer['cosine'][0][1] == pytest.approx(
      d @ e / np.linalg.norm(d) / np.linalg.norm(e), rel=1e-5)
  said = capsys.readouterr().out
  assert 'btx: differences from seed (their nearest common ancestor)' in said
  assert found['remarks'][-1] in said


def test_any_slice_of_a_checkpoint_is_that_of_the_whole(study):
  """And it is kept by layer and expert, so that one of them is read for little."""
  saved = sources.final(study, study.runs['btx'])
  for key_path, leaf in jax.tree.leaves_with_path(final_params(study, 'btx')):
    path = sharding.path_of(key_path)
    index = tuple(slice(n // 2, n) for n in leaf.shape)
    np.testing.assert_array_equal(saved.read(path, index), leaf[index])
    one = leaf.size // math.prod(leaf.shape[:('layers' in path) + ('experts' in path)])
    assert saved.scratch_bytes(path) == 4 * one, path


def test_manifests_say_where_a_run_came_from(study):
  found = manifest.read(study.folder('btx'))
  assert found['state'] == manifest.COMPLETE
  assert found['spec']['sources'][2] == [
      'expert/math', manifest.read(study.folder('expert/math'))['identity']]
  assert found['steps_done'] == 6
  assert found['spec']['tokenizer'] == study.prepare_text().tokenizer.hash
  assert found['spec']['model']['num_experts'] == 4
  assert found['versions']['jax'] == jax.__version__
  seen = manifest.read(study.folder('expert/math'))['tokens_by_domain']
  assert seen['math'] > 0 == seen['code'] == seen['prose']


def test_the_table_has_every_model_and_its_figures_are_right(study, copy):
  rows = table.rows(study)
  names = ['seed', 'expert/code', 'expert/math', 'average of btx', 'btx unfinetuned', 'btx']
  assert [row['name'] for row in rows] == names
  for row in rows:
    assert row['mean'] == pytest.approx(np.mean(list(row['bits_per_byte'].values())))
  by_name = {row['name']: row for row in rows}
  seed, code, btx = (study.runs[name] for name in ('seed', 'expert/code', 'btx'))
  assert by_name['expert/code']['train_flops'] == seed.flops + code.flops
  assert by_name['btx unfinetuned']['tokens'] == seed.tokens + 2 * code.tokens
  assert by_name['btx']['tokens'] == seed.tokens + 2 * code.tokens + btx.tokens
  assert by_name['btx']['active_params'] < by_name['btx']['total_params']
  assert by_name['average of btx']['total_params'] == by_name['seed']['total_params']
  checks = claims.checks(study, rows)
  assert {check['met'] for check in checks} == {None}  # a few documents of each domain
  assert any('expert/math has the largest mean gate' in check['name'] for check in checks)

  report.write_report(Study(study.config, str(copy)), 'tiny')
  with open(os.path.join(copy, 'report', 'report.json'), encoding='utf-8') as file:
    found = json.load(file)
  assert found['rows'] == table.without_units(rows)
  trained, = found['regressions']
  assert (trained['name'], trained['since']) == ('btx', 'btx unfinetuned')
  for change in trained['changes']:
    for when, name in (('before', 'btx unfinetuned'), ('after', 'btx')):
      assert change[when] == by_name[name]['bits_per_byte'][change['domain']]
  effect, = found['without_each_expert']
  assert effect['experts'] == ['seed', 'expert/code', 'expert/math', 'expert/code']
  assert {name: len(change) for name, change in effect['change'].items()} == dict.fromkeys(
      studies.WORDS, 4)
  with open(os.path.join(copy, 'report', 'differences.png'), 'rb') as file:
    assert file.read(4) == b'\x89PNG'


def test_bits_per_byte_divide_the_text_s_own_information_by_its_raw_bytes(study):
  """Against the probabilities of each document alone, added up in float64."""
  run = study.runs['seed']
  params = jax.tree.map(jax.numpy.asarray, jax.device_get(final_params(study, 'seed')))
  held_out = study.prepare_text().held_out['code']
  length, bits, size = run.seq_len, [], 0
  with jax.set_mesh(study.mesh):
    ours = study.evaluate(run.model, final_params(study, 'seed'))['code']
  score = jax.jit(lambda tokens, positions: jax.nn.log_softmax(llama.Llama(run.model).apply(
      {'params': params}, tokens, tokens * 0 + 1, positions)[0] @ llama.output_head(params)))
  for begin, end in zip(held_out.starts, held_out.starts[1:]):
    ids = np.asarray(held_out.ids[begin:end])
    bits.append(0.0)
    size += len(study.prepare_text().tokenizer.decode(ids[1:-1]).encode())
    # Cut where the windows of the whole stream cut.
    cuts = [0, *(c - begin for c in range(0, end, length) if begin < c), end - begin]
    for a, b in itertools.pairwise(cuts):
      tokens = np.zeros((1, length), np.int32)
      tokens[0, :b - a] = ids[a:b]
      log_probs = np.float64(score(tokens, np.arange(length)[None]))[0]
      bits[-1] -= sum(
          log_probs[i - a, ids[i + 1]] for i in range(a, b) if i + 2 < len(ids)) / np.log(2)
  assert ours['bytes'] == size == held_out.bytes[-1]
  assert ours['bits_per_byte'] == pytest.approx(sum(bits) / size, rel=1e-4)
  np.testing.assert_allclose(np.divide(ours['units']['nll'], np.log(2)), bits, rtol=1e-4)


def test_metrics_tell_what_a_person_wants_to_know(study):
  lines = [line for line in metrics.read(study.folder('btx')) if 'loss' in line]
  assert [line['step'] for line in lines] == [1, 2, 3, 4, 5, 6]
  seen = dict.fromkeys(study.config.domains, 0)
  for before, line in zip([{'tokens_by_domain': seen}, *lines], lines):
    tokens = {name: count - before['tokens_by_domain'][name]
              for name, count in line['tokens_by_domain'].items()}
    by_domain = sum(line['loss_by_domain'][name] * tokens[name] for name in line['loss_by_domain'])
    assert line['loss'] == pytest.approx(by_domain / sum(tokens.values()), rel=1e-5)
    assert set(line['grad_norms']) == {'embed', 'head', 'attention', 'router', 'experts', 'norm'}
    assert line['grad_norm']**2 == pytest.approx(sum(x**2 for x in line['grad_norms'].values()))
    assert line['memory']['host'] > 1e8
    figures = line['routing']
    assert len(figures['mutual_information']) == 2  # layers
    for gates in figures['gates'].values():
      np.testing.assert_allclose(np.sum(gates, 1), 1, atol=1e-3)
  last = lines[-1]
  assert 0 <= last['input_wait'] <= 1 and 0 < last['mfu'] < 1.5
  assert 'tokens_per_second' not in lines[0]  # it was compiled


def test_a_trace_and_events_for_tensorboard_are_written_when_asked_for(text, tmp_path):
  config = studies.get_config(text)
  config.sinks = ('tensorboard',)
  config.runs = {'seed': base.run(base.random(), {'code': 1}, steps=2)}
  pipeline = Pipeline(config, str(tmp_path / 'work'), profile=1)
  pipeline.train()
  traces = glob.glob(os.path.join(pipeline.folder('seed'), 'profile', '**', '*.*'), recursive=True)
  trace = next(path for path in traces if path.endswith('.xplane.pb'))  # for xprof
  planes = [plane.name for plane in jax.profiler.ProfileData.from_file(trace).planes]
  assert any('CPU' in name for name in planes)
  perfetto = next(path for path in traces if path.endswith('perfetto_trace.json.gz'))
  with gzip.open(perfetto) as file:
    names = {event.get('name', '') for event in json.load(file)['traceEvents']}
  assert any('train_step' in name for name in names)
  assert os.listdir(os.path.join(pipeline.folder('seed'), 'tensorboard'))


def test_the_report_of_a_finished_study(study, copy):
  path = report.write_report(Study(study.config, str(copy)), 'tiny')
  with open(path, encoding='utf-8') as file:
    page = file.read()
  assert '4 of 4 runs complete' in page
  for row in table.rows(study):
    assert row['name'] in page
  assert page.count('<b class="') == len(claims.checks(study, table.rows(study)))
  assert page.count('data:image/png') == 7
  assert '>since btx unfinetuned</span>' in page  # before and after
  assert '<td class="name">2 expert/math</td>' in page  # the mixture without it
  sample = scores.read(study, study.runs['btx'], scores.FINAL)['code']['sample']
  text = study.prepare_text()
  assert ''.join(sample['pieces']) in text.tokenizer.decode(text.held_out['code'].ids)
  assert len(sample['gates']) == len(sample['pieces'])
  np.testing.assert_allclose(np.sum(sample['gates'], 1), 1, atol=0.01)
  assert os.path.getsize(path) < 5e6


# What must not be lost, and what is refused


def change(path, value):
  def apply(config):
    *sections, field = path
    for section in sections:
      config = config[section]
    config[field] = value
  return apply


@pytest.mark.parametrize('apply, message', [
    (change(('runs', 'seed', 'steps'), 8), r'another config:\n  seed was trained with steps 6 and '
     r'has 8 now\n  expert/code, expert/math and btx start from seed, which was trained with'),
    (change(('model', 'dim'), 32), r'btx were trained with model.dim 16 and have 32 now\nNothing'),
    (change(('optimizer', 'peak_lr'), 1.0), r'optimizer.peak_lr 0.01 and have 1 now\nNothing'),
    (change(('runs', 'btx', 'domains'), {'code': 1.0}), r'btx was trained with domains 0.25 code '
     r'\+ 0.25 math \+ 0.5 prose and has 1 code now\nNothing'),
    (change(('data', 'held_out'), 0.2), r'code, math, prose: data.held_out was 0.1 and is 0.2 now'),
    (change(('tokenizer', 'vocab_size'), 340), r'330 pieces, but tokenizer.vocab_size = 340'),
    (change(('seed',), 1), r'btx were trained with seed 0 and have 1 now\nNothing'),
    (change(('runs', 'btx', 'init'), base.mix('expert/code', 'seed', 'expert/math', 'seed')),
     r'another config:\n  btx started from seed, expert/code, expert/math and starts from '),
])
def test_a_directory_of_another_config_is_refused_and_untouched(study, apply, message):
  config = study.config.copy_and_resolve_references()
  apply(config)
  before = snapshot(study.workdir)
  with pytest.raises(UsageError, match=message):
    Pipeline(config, study.workdir).train()
  assert snapshot(study.workdir) == before


def test_settings_that_do_not_change_results_may_change(study):
  config = study.config.copy_and_resolve_references()
  config.update(log_every=3, checkpoint_every=5)
  config.model.update(remat='full', dispatch_factor=1.0)
  assert not Pipeline(config, study.workdir).train()


def test_one_run_as_a_job_of_its_own(study, copy):
  shutil.rmtree(os.path.join(copy, 'expert', 'math'))
  shutil.rmtree(os.path.join(copy, 'btx'))
  pipeline = Pipeline(study.config, str(copy))
  with pytest.raises(UsageError, match="--run=btx starts from 'expert/math', which is missing"):
    pipeline.train('btx')
  with pytest.raises(UsageError, match=r"--run=expert/mth is not.*did you mean 'expert/math'"):
    pipeline.train('expert/mth')
  assert pipeline.train('expert/math')
  assert pipeline.state('btx') == 'missing'
  assert_trees_equal(final_params(pipeline, 'expert/math'), final_params(study, 'expert/math'))
  assert not pipeline.train('expert/math')


def test_a_checkpoint_that_is_gone_is_named(study, copy):
  shutil.rmtree(os.path.join(copy, 'btx'))
  shutil.rmtree(os.path.join(copy, 'expert', 'code', 'checkpoints'))
  with pytest.raises(RunError, match='checkpoints/5 is missing'):
    Pipeline(study.config, str(copy)).train()


def test_checkpoints_without_a_manifest_are_not_adopted(study, copy):
  os.remove(os.path.join(copy, 'btx', 'manifest.json'))
  with pytest.raises(UsageError, match=r'has checkpoints but no manifest\.json'):
    Pipeline(study.config, str(copy)).train()


def test_a_run_that_another_process_trains_is_left_to_it(study, copy):
  shutil.rmtree(os.path.join(copy, 'btx'))
  holder = subprocess.Popen(
      [sys.executable, '-c', 'import sys; from btx_jax.files import locks\n'
       f'with locks.lock_folder({os.path.join(copy, "btx")!r}):\n'
       '  print(flush=True)\n  sys.stdin.read()'],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  with holder:
    holder.stdout.readline()
    with pytest.raises(UsageError, match=f'in use by another process: .*{holder.pid}'):
      Pipeline(study.config, str(copy)).train()
    assert manifest.read(os.path.join(copy, 'btx')) is None
    holder.stdin.close()


def test_text_that_has_changed_is_noticed(study, text, copy):
  path = text / 'code.jsonl'
  before = path.read_text()
  try:
    path.write_text(before + '{"text": "one more"}\n')
    with pytest.raises(UsageError, match=r'code.jsonl had [\d,]+ bytes and has [\d,]+ now'):
      Pipeline(study.config, str(copy)).train()
    path.unlink()  # tokens are enough where the text is not at hand
    assert not Pipeline(study.config, str(copy)).train()
  finally:
    path.write_text(before)


def test_a_file_that_is_no_manifest_is_refused(study, copy):
  with open(os.path.join(copy, 'seed', 'manifest.json'), 'w', encoding='utf-8') as file:
    file.write('[]')
  with pytest.raises(UsageError, match='is not a btx_jax manifest'):
    Pipeline(study.config, str(copy)).train()


def test_a_loss_that_is_not_finite_stops_the_run(text, tmp_path):
  config = studies.get_config(text)
  config.runs = {'seed': base.run(base.random(), {'code': 1}, steps=40,
                                  optimizer={'peak_lr': 1e30, 'warmup': 0.0})}
  pipeline = Pipeline(config, str(tmp_path / 'work'))
  with pytest.raises(RunError, match=r'seed: step 1 on text of code: the updated parameters are '
                     r'not finite, or far too large, in all tensors; .* were finite\. No check'):
    pipeline.train()
  assert not [name for name in os.listdir(os.path.join(pipeline.folder('seed'), 'checkpoints'))
              if name.isdigit()]  # what is not finite was never saved
  assert pipeline.state('seed') == manifest.FAILED


@pytest.mark.parametrize('apply, message', [
    (lambda config: config.train.update(batch_size=12, microbatches=2),
     r'6 rows cannot be shared evenly by 4.*nearest.* 4 or'),
    (change(('mesh', 'fsdp'), 3), r'mesh.fsdp = 3.*cannot be laid on 8 device'),
    (change(('mesh', 'data'), 4), r'must multiply to 8'),
    (change(('evaluation', 'batch_size'), 3), r'evaluation.batch_size: 3 rows'),
    (change(('data', 'held_out'), 1.5), r'data.held_out = 1.5'),
    (change(('log_every',), 0), r'log_every = 0'),
    (change(('evaluation', 'batch_size'), -1), r'evaluation.batch_size = -1'),
    (change(('evaluation', 'every'), -1), r'evaluation.every = -1'),
    (change(('model', 'num_heads'), 0), r'num_heads = 0'),
])
def test_what_cannot_be_laid_on_the_mesh_is_refused_at_once(text, tmp_path, apply, message):
  config = studies.get_config(text)
  apply(config)
  with pytest.raises(UsageError, match=message):
    Pipeline(config, str(tmp_path / 'work')).train()
  assert not os.path.exists(tmp_path / 'work')


def test_experts_that_do_not_divide_among_the_devices_are_refused_at_once(text, tmp_path):
  config = studies.get_config(text)
  config.runs.btx.init = base.mix('seed', 'expert/code', 'expert/math')
  with pytest.raises(UsageError, match=r'3 experts cannot be spread over mesh.expert = 2'):
    Pipeline(config, str(tmp_path / 'work')).train()
  assert not os.path.exists(tmp_path / 'work')


def test_what_the_mesh_does_not_divide_is_told_before_a_run_starts(
    text, tmp_path, monkeypatch, capsys):
  config = studies.get_config(text)
  config.runs.btx.init = base.mix('seed', 'expert/code', 'expert/math')
  config.model.update(num_heads=1, num_kv_heads=1)
  config.mesh.update(fsdp=1, expert=4)
  monkeypatch.setattr(sharding, '_LARGE', 2000)
  monkeypatch.setattr(Pipeline, '_train', lambda *_: None)
  assert Pipeline(config, str(tmp_path / 'work')).train()
  said = capsys.readouterr().out
  whole = 'is whole on every device of mesh.tensor: 1 is not divisible by 2'
  assert said.count(f'layers/attn/q [2, 16, 1, 16] {whole}\n') == 1  # though of several runs
  assert said.count('runs.btx: 3 experts are fewer than mesh.expert = 4 devices') == 1
  assert 'norm' not in said
