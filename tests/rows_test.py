"""Finished rows: what the working directory no longer has is shown as before, and is trained again
only if a run needs its parameters."""

import json
import os
import pathlib
import shutil

import pytest

from btx_jax import base
from btx_jax.commands import report, rows, seeds, status
from btx_jax.devices import distributed
from btx_jax.errors import UsageError
from btx_jax.pipeline import Pipeline
from btx_jax.scoring import scores
from btx_jax.study import manifest
from btx_jax.study.study import Study
from tests import studies

EXPERTS = ('expert/code', 'expert/math')


def config_of(text, folder):
  config = studies.get_config(text)
  config.mesh.update(fsdp=1, expert=1, tensor=1)
  config.evaluation.mask_experts = True
  config.runs['routed'] = base.run(base.ensemble('seed', *EXPERTS, selector=base.posterior()))
  config.runs['by_text'] = base.run(base.mix('seed', *EXPERTS, routers=base.from_text(
      'ridge', labels=(('seed', 'prose'),))))
  config.rows = str(folder)
  return config


@pytest.fixture(scope='module')
def finished(text, tmp_path_factory):
  """A study that is complete, with the rows that were written."""
  folder = tmp_path_factory.mktemp('finished')
  pipeline = Pipeline(config_of(text, folder / 'rows'), str(folder / 'work'))
  assert pipeline.train()
  assert rows.write_rows(pipeline) == list(pipeline.runs)
  return pipeline


@pytest.fixture
def only_rows(text, finished, tmp_path):
  """The config of a study of which a copy of the rows is all there is."""
  shutil.copytree(finished.config.rows, tmp_path / 'rows')
  return config_of(text, tmp_path / 'rows')


def content(folder):
  return {path: path.read_bytes() for path in pathlib.Path(folder).rglob('*.json')}


def trained(workdir):
  """The runs that have a directory."""
  return {os.path.relpath(path.parent, workdir)
          for path in pathlib.Path(workdir).rglob(f'*{os.sep}manifest.json')}


def test_the_same_run_gives_the_same_bytes(finished):
  before = content(finished.config.rows)
  assert len(before) == len(finished.runs)
  assert max(map(len, before.values())) < 40_000
  rows.write_rows(Study(finished.config, finished.workdir))
  assert content(finished.config.rows) == before


def test_what_is_shown_is_that_of_the_working_directory(finished, only_rows, tmp_path):
  study = Study(only_rows, str(tmp_path / 'work'))
  assert seeds.results(study) == seeds.results(finished)
  for run in study.runs.values():
    for stage in (scores.START, scores.AVERAGE, scores.FINAL, scores.MASKED):
      found, before = (scores.read(each, run, stage) for each in (study, finished))
      assert found == _as_in_a_row(before)
  of_rows, before = (status.collect(each)['runs'] for each in (study, finished))
  for now, then in zip(of_rows, before, strict=True):
    assert (now['state'], then['state']) == (manifest.PUBLISHED, manifest.COMPLETE)
    for key in ('name', 'step', 'steps', 'loss', 'bits_per_byte', 'best', 'error'):
      assert now[key] == then[key]
    assert now['checkpoint'] is None
  assert status.stages(study) == []
  report.write_report(study, 'rows')
  report.write_report(finished, 'rows')
  ours, theirs = (json.loads((pathlib.Path(each.workdir) / 'report' / 'report.json').read_text())
                  for each in (study, finished))
  for key in ('rows', 'differences', 'checks', 'regressions', 'without_each_expert'):
    assert ours[key] == theirs[key]


def _as_in_a_row(found):
  """Scores without samples, and with the 50 most frequent tokens whose experts were counted."""
  result = json.loads(json.dumps(found)) or {}
  for score in result.values():
    score.pop('sample', None)
    if counts := score.get('routing'):
      counts['pieces'] = counts['pieces'][:50]
      counts['by_piece'] = [table[:50] for table in counts['by_piece']]
  return result or None


def test_nothing_is_trained_again(only_rows, tmp_path, capfd):
  pipeline = Pipeline(only_rows, str(tmp_path / 'work'))
  assert not pipeline.train()
  assert trained(pipeline.workdir) == set()
  assert '6 runs are not trained, because' in capfd.readouterr().out


def test_a_new_run_brings_back_what_it_starts_from(finished, only_rows, tmp_path, capfd):
  only_rows.runs['more'] = base.run(base.checkpoint('expert/code'), {'math': 1}, steps=2)
  pipeline = Pipeline(only_rows, str(tmp_path / 'work'))
  assert status.stages(pipeline) == [['seed'], ['expert/code'], ['more']]
  assert pipeline.train()
  assert trained(pipeline.workdir) == {'seed', 'expert/code', 'more'}
  out = ' '.join(capfd.readouterr().out.split())
  assert 'seed, expert/code: trained again, because other runs need the parameters' in out
  for name in ('seed', 'expert/code'):  # the same figures, to what a compiler may change
    again, before = (scores.read(each, each.runs[name], scores.FINAL)
                     for each in (pipeline, finished))
    for domain in before:
      assert again[domain]['bits_per_byte'] == pytest.approx(
          before[domain]['bits_per_byte'], rel=1e-5)
  before = content(only_rows.rows)
  assert rows.write_rows(pipeline) == ['seed', 'expert/code', 'more']
  after = content(only_rows.rows)
  kept = {path for path in before if path.stem not in ('seed', 'code')}
  assert {path: after[path] for path in kept} == {path: before[path] for path in kept}
  assert {path.stem for path in after.keys() - before.keys()} == {'more'}


def test_a_mixture_without_steps_brings_back_what_it_is_computed_from(only_rows, tmp_path):
  only_rows.runs['edited'] = base.run(base.drop('by_text', 'expert/math'))
  pipeline = Pipeline(only_rows, str(tmp_path / 'work'))
  assert status.stages(pipeline) == [['seed'], list(EXPERTS)]
  assert pipeline.train()
  assert trained(pipeline.workdir) == {'seed', *EXPERTS, 'by_text', 'edited'}
  assert scores.read(pipeline, pipeline.runs['edited'], scores.FINAL)


def test_rows_of_another_version_are_mentioned(only_rows, tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(distributed, 'code_version', lambda: '9.9')
  assert not Pipeline(only_rows, str(tmp_path / 'work')).train()
  out = ' '.join(capfd.readouterr().out.split())
  assert 'the rows of 6 runs are of btx_jax ' in out and '; this is 9.9' in out


def test_scores_that_a_row_lacks_are_named(only_rows, tmp_path, capfd):
  path = os.path.join(only_rows.rows, 'btx.json')
  with open(path, encoding='utf-8') as file:
    row = json.load(file)
  row = {key: value for key, value in row.items() if key not in ('checksum', 'has_checksum')}
  del row['evaluation'][scores.MASKED]
  with open(path, 'w', encoding='utf-8') as file:
    json.dump(row, file)
  assert not Pipeline(only_rows, str(tmp_path / 'work')).train()
  out = ' '.join(capfd.readouterr().out.split())
  assert ('btx: its row lacks scores that this config asks for (masked); --run=btx trains and '
          'measures it') in out


def test_a_row_measured_on_other_text_is_refused_by_name(text, only_rows, tmp_path):
  path = os.path.join(only_rows.rows, 'seed.json')
  with open(path, encoding='utf-8') as file:
    row = json.load(file)
  row = {key: value for key, value in row.items() if key not in ('checksum', 'has_checksum')}
  row['evaluation'][scores.FINAL]['measured_on']['text']['math'] = 'other'
  with open(path, 'w', encoding='utf-8') as file:
    json.dump(row, file)
  pipeline = Pipeline(only_rows, str(tmp_path / 'work'))
  with pytest.raises(UsageError, match=r'  seed: on different held-out text of math\n(.|\n)*'
                     r'delete .*seed\.json to train and measure again'):
    pipeline.train()
  assert trained(pipeline.workdir) == set()
