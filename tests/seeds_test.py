"""config.seeds: a series of runs for each seed, and the mean and spread of their figures."""

import json
import os

import numpy as np
import pytest

from btx_jax import base
from btx_jax.commands import claims, report, seeds, status, table
from btx_jax.errors import UsageError
from btx_jax.model.config import forward_flops_per_token
from btx_jax.pipeline import Pipeline
from btx_jax.preflight import measure, topology
from btx_jax.scoring import scores
from btx_jax.study import manifest, plan, sources
from btx_jax.study.study import Study
from tests import studies
from tests.helpers import assert_trees_equal, final_params

BOTH = ('expert/code', 'expert/math')
NAMES = ('seed', *BOTH, 'btx')


def config_of(text, *of_seeds, seed=0):
  config = studies.get_config(text)
  config.mesh.update(fsdp=1, expert=1, tensor=1)
  config.seed, config.seeds = seed, of_seeds
  return config


def test_a_series_for_each_seed_one_after_the_other(text):
  config = config_of(text, 3, 0)
  config.runs = {**config.runs, 'dense': base.run(base.checkpoint('seed'), {'code': 1},
                                                 match_flops_of=(*BOTH, 'btx'))}
  config.stacked = BOTH
  runs = plan.make_plan(config, 330)
  assert list(runs) == [f'seed-{s}/{name}' for s in (3, 0) for name in (*NAMES, 'dense')]
  for s in (3, 0):
    alone = plan.make_plan(config_of(text, seed=s), 330)
    for name in NAMES:
      run = runs[f'seed-{s}/{name}']
      assert (run.plain_name, run.seed, run.rng_seed) == (name, s, alone[name].rng_seed)
      assert {source.series for source in run.sources} <= {f'seed-{s}'}
      assert run.spec() == alone[name].spec()  # so the directory of one can become the other's
      assert run.expert_names == alone[name].expert_names
  assert runs['seed-3/btx'].rng_seed != runs['seed-0/btx'].rng_seed
  assert runs['seed-0/dense'].steps == runs['seed-3/dense'].steps > 5
  # Stacked runs of two seeds are never one program, even side by side.
  stacked = [runs[f'seed-{s}/{name}'] for s in (3, 0) for name in BOTH]
  assert plan.groups(stacked, BOTH) == [stacked[:2], stacked[2:]]


def test_a_pretrained_model_is_shared_by_all_seeds(text):
  config = config_of(text, 0, 1)
  config.runs.base = base.run(base.hugging_face('/none'))
  config.runs.tuned = base.run(base.hugging_face('/none'), {'code': 1}, steps=1)
  config.runs.more = base.run(base.mix('base', 'tuned', allow=('seed',)), {'code': 1}, steps=1)
  runs = plan.make_plan(config, 330, at_hand=False)
  assert [name for name, run in runs.items() if not run.series] == ['base']
  for s in (0, 1):
    assert [run.name for run in runs[f'seed-{s}/more'].sources] == ['base', f'seed-{s}/tuned']


def test_commands_have_the_runs_of_all_seeds(text, tmp_path, monkeypatch):
  study = Study(config_of(text, 0, 1), str(tmp_path))
  assert status.stages(study) == [
      ['seed-0/seed', 'seed-1/seed'],
      [f'seed-{s}/{name}' for s in (0, 1) for name in BOTH], ['seed-0/btx', 'seed-1/btx']]
  with pytest.raises(UsageError, match=r'--run=btx .* name one of seed-0/btx, seed-1/btx\.'):
    study.run('btx')
  with pytest.raises(UsageError, match=r"seed-1/btz is not a run .* did you mean 'seed-1/btx'"):
    study.run('seed-1/btz')
  # Each program is compiled once.
  monkeypatch.setattr(measure, '_measure', lambda groups, *_: [
      run.name for group in groups for run in group])
  programs = list(measure.programs(study, topology.get('cpu:8')))
  assert programs == [[f'seed-{s}/{name}' for s in (0, 1) for name in NAMES[:3]],
                      ['seed-0/btx', 'seed-1/btx']]


def test_a_run_of_one_of_several_seeds_is_that_of_its_seed_alone(text, tmp_path, monkeypatch):
  monkeypatch.setattr(Pipeline, '_measure', lambda *_: None)
  found = []
  for name, config in (('x', config_of(text, seed=1)), ('seed-1/x', config_of(text, 0, 1))):
    config.runs = {'x': base.run(base.random(), {'code': 1, 'prose': 1}, steps=2),
                   'mix': base.run(base.mix('x', 'x'))}
    config.model.num_layers = 1
    config.evaluation.every = 0
    pipeline = Pipeline(config, str(tmp_path / name.replace('/', '_')))
    assert pipeline.train(name)
    mixture = pipeline.runs[f'{os.path.dirname(name)}/mix'.lstrip('/')]
    found.append((final_params(pipeline, name), manifest.read(pipeline.folder(name)),
                  sources.final(pipeline, mixture).read('layers/ffn/router', ()),
                  pipeline.spec(mixture)))
  alone, one_of_two = found
  assert_trees_equal(one_of_two[0], alone[0])
  assert one_of_two[1]['identity'] == alone[1]['identity']
  np.testing.assert_array_equal(one_of_two[2], alone[2])
  assert one_of_two[3] == alone[3]


@pytest.fixture
def measured(text, tmp_path, monkeypatch):
  """A study of three seeds, and its scores by run, stage and domain: bits per byte, gates [L][E] of
  mixtures, and how an ensemble was used.

  What is not in the scores is not complete.
  """
  config = config_of(text, 0, 1, 2)
  config.runs.both = base.run(base.ensemble(*BOTH, selector=base.posterior()))
  study = Study(config, str(tmp_path / 'work'))
  rng = np.random.default_rng(0)
  found = {}
  for run in study.runs.values():
    for model in scores.models_of(study, run):
      found[run.name, model.stage] = {domain: {
          'bits_per_byte': rng.uniform(1, 2),
          'sample': {'pieces': ['a', 'b'], 'gates': [[0.4, 0.3, 0.2, 0.1]] * 2},
          **({'gates': rng.dirichlet([1] * 4, 2).tolist()} if model.sizes.num_experts else {}),
          **({'share': rng.dirichlet([1] * 2).tolist(), 'switches': rng.uniform(0, 9),
              'forward_flops': rng.uniform(1e6, 2e6)} if run.selector else {})}
          for domain in studies.WORDS}
  monkeypatch.setattr(scores, 'read', lambda _, run, stage: found.get((run.name, stage)))
  monkeypatch.setattr(Study, 'state', lambda _, name: (
      manifest.COMPLETE if (name, scores.FINAL) in found else 'missing'))
  return study, found


def test_rows_are_means_over_seeds_with_their_spread(measured):
  study, found = measured
  results = seeds.results(study)
  names = ['seed', *BOTH, 'both', 'average of btx', 'btx unfinetuned', 'btx']
  assert [row['name'] for row in results.rows] == names
  stages = {'average of btx': ('btx', 'average'), 'btx unfinetuned': ('btx', 'start')}
  texts = table.scored(results.rows)
  for row, cells in zip(results.rows, texts):
    name, stage = stages.get(row['name'], (row['name'], 'final'))
    bits = np.array([[score['bits_per_byte'] for score in found[f'seed-{s}/{name}', stage].values()]
                     for s in (0, 1, 2)])
    bits = np.concatenate([bits, bits.mean(1, keepdims=True)], 1)
    mean, spread = bits.mean(0), bits.std(0, ddof=1)
    np.testing.assert_allclose([*row['bits_per_byte'].values(), row['mean']], mean)
    np.testing.assert_allclose(
        [*row['spread']['bits_per_byte'].values(), row['spread']['mean']], spread)
    assert [text for text, _ in cells] == [f'{m:.3f} ±{s:.3f}' for m, s in zip(mean, spread)]
    assert row['tokens'] == next(each for each in results.by_series['seed-2']
                                 if each['name'] == row['name'])['tokens']
  assert results.note == 'Mean ± sample standard deviation over 3 seeds: seed-0, seed-1, seed-2.'


def test_a_check_is_met_if_every_seed_meets_it(measured):
  study, found = measured
  for s in (0, 1, 2):  # btx beats seed on code in two seeds, and in the mean
    found[f'seed-{s}/seed', 'final']['code']['bits_per_byte'] = 1.5
    found[f'seed-{s}/btx', 'final']['code']['bits_per_byte'] = 1.6 if s == 1 else 1.1
  checks = seeds.results(study).checks
  check, = (each for each in checks if each['name'].startswith('btx beats seed on code'))
  assert check == {'name': 'btx beats seed on code (0.233): met in 2 of 3 seeds', 'met': False,
                   'met_in': 2, 'seeds': 3, 'difference': pytest.approx(-0.7 / 3), 'error': None,
                   'limit': 0.0, 'close': False, 'units': None, 'about': 'btx', 'compared': [
                       'seed', *BOTH, 'average of btx', 'btx unfinetuned', 'btx']}
  for s in (0, 2):
    alone = claims.checks(study, table.rows(study, f'seed-{s}'), f'seed-{s}')
    assert ('btx beats seed on code (0.400)', True) in [
        (each['name'], each['met']) for each in alone]


def test_seeds_that_are_not_complete_enter_no_mean(measured):
  study, found = measured
  del found['seed-1/btx', 'final'], found['seed-2/btx', 'average']
  alone = seeds.results(study)
  assert alone.complete == ['seed-0'] and alone.rows == table.rows(study, 'seed-0')
  assert alone.note == 'Of seed-0 alone. Not complete: seed-1, seed-2.'
  assert alone.checks == claims.checks(study, alone.rows, 'seed-0') != []
  assert not any('±' in text for row in table.scored(alone.rows) for text, _ in row)
  del found['seed-0/btx', 'final'], found['seed-0/seed', 'final']
  none = seeds.results(study)
  assert none.rows == table.rows(study, 'seed-2')  # the fullest
  assert none.note == 'Of seed-2 alone, which is not complete. Not complete: seed-0, seed-1.'


def test_the_report_has_means_and_the_rows_of_each_seed(measured):
  study, _ = measured
  for run in study.runs.values():
    manifest.write(study.folder(run.name), manifest.begin(run.name, run.spec()))
    if not run.steps:
      continue
    with open(os.path.join(study.folder(run.name), 'metrics.jsonl'), 'w', encoding='utf-8') as file:
      for step in (1, 2):
        file.write(json.dumps({'step': step, 'time': 0, 'loss': 2.0}) + '\n')
  path, results = report.write_report(study, 'three'), seeds.results(study)
  with open(path.replace('html', 'json'), encoding='utf-8') as file:
    found = json.load(file)
  assert found['rows'] == table.without_units(results.rows) and found['checks'] == results.checks
  assert {series: of_seed['rows'] for series, of_seed in found['seeds'].items()} == {
      series: table.without_units(rows) for series, rows in results.by_series.items()}
  with open(path, encoding='utf-8') as file:
    page = file.read()
  for cells in table.scored(results.rows):
    assert all(f'>{text}</td>' in page for text, _ in cells)
  assert page.count('Experts of seed-') == 2  # a mixture of the first seed, and a link to it
  both = next(row for row in results.rows if row['name'] == 'both')
  cells = [f'{share:.1%}' for share in both['share']['code']] + [f'{both["switches"]["code"]:.1f}']
  assert '>Experts of both</h2>' in page
  assert '<td class="name">code</td>' + ''.join(f'<td>{cell}</td>' for cell in cells) in page


def test_ensembles_have_their_mean_use_and_all_rows_what_a_token_costs(measured):
  study, found = measured
  rows = {row['name']: row for row in seeds.results(study).rows}
  of_seeds = [found[f'seed-{s}/both', 'final'] for s in (0, 1, 2)]
  for domain in studies.WORDS:
    for kind in ('share', 'switches'):
      mean = np.mean([scored[domain][kind] for scored in of_seeds], 0)
      np.testing.assert_allclose(rows['both'][kind][domain], mean)
  flops = np.mean([[score['forward_flops'] for score in scored.values()] for scored in of_seeds])
  sizes = study.runs['seed-0/seed'].model
  column = table.headings([*rows.values()])[4:].index('MFLOP per token')
  assert column == 2  # after active and total parameters
  shown = {name: cells[column] for name, cells in zip(rows, table.costs([*rows.values()]))}
  assert shown['both'] == f'{flops / 1e6:,.2f}'
  assert shown['seed'] == f'{forward_flops_per_token(sizes, 15) / 1e6:,.2f}'
  assert 'MFLOP per token' not in table.headings([rows['seed'], rows['btx']])
