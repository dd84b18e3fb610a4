"""docs/study.py: the tables and pictures of docs/study.md, from made-up rows."""

import os
import re
import shutil

import numpy as np
import pytest

from btx_jax.commands import rows, table
from btx_jax.configs import study as config_of
from btx_jax.study.study import Study
from docs import study as page
from tests import finished

_SEEDS = {'': (0, 1)}  # of the form with a mean; the others have one


@pytest.fixture(scope='module')
def made_up(tmp_path_factory):
  """A folder with the rows of all forms, made up; without a working directory."""
  folder = tmp_path_factory.mktemp('study')
  for form in ('', 'crossover', 'split', 'later', 'routing', 'rates'):
    config = config_of.get_config(form)
    config.seeds, config.rows = _SEEDS.get(form, config.seeds), str(folder / 'rows')
    rows.write_rows(finished.write(config, str(folder / 'work')))
    shutil.rmtree(folder / 'work')
  return folder / 'rows'


def page_of(made_up, tmp_path):
  """The tables of the page: by the name of each, its lines as cells."""
  shutil.copy(os.path.join(page.FOLDER, 'study.md'), tmp_path)
  page.write(str(tmp_path / 'none'), str(made_up), str(tmp_path))
  text = (tmp_path / 'study.md').read_text()
  return {name: [[cell.strip() for cell in line.strip('|').split('|')]
                 for line in re.findall(r'^\|(?! ---).*\|$(?!\n\| ---)', lines, re.MULTILINE)]
          for name, lines in re.findall(r'<!-- (\w+): .*?-->(.*?)<!-- end -->', text, re.DOTALL)}


def test_the_tables_have_the_figures_of_the_rows(made_up, tmp_path):
  tables = page_of(made_up, tmp_path)
  config = config_of.get_config()
  config.seeds, config.rows = (0, 1), str(made_up)
  study = Study(config, str(tmp_path / 'none'))
  of_seeds = [{row['name']: row for row in table.rows(study, series)} for series in study.series]
  lines = {line[0].strip('`'): line for line in tables['main']}
  assert not any('-' in line for line in tables['main'])
  for name in ('dense/new', 'btx/finetuned', 'merge/learned'):
    means = np.array([[*found[name]['bits_per_byte'].values()] for found in of_seeds]).mean(1)
    dense = np.array([found['dense/blend']['mean'] for found in of_seeds])
    assert lines[name][1:3] == ['2', f'{means.mean():.3f} ±{means.std(ddof=1):.3f}']
    assert lines[name][7] == f'{(means - dense).mean():+.3f}'
    assert lines[name][9] == f'{(means - dense).std(ddof=1):.3f}'
    assert 0 < float(lines[name][8]) < 0.05
  assert {line[0] for line in tables['rates']} == {*config_of.RATES, *config_of.MEETINGS}
  assert [line[0] for line in tables['split']] == ['0', '0', '5', '10', '25', '50', '100']
  middle = tables['crossover'][1]
  gaps = [of_seeds[0][name]['mean'] - of_seeds[0]['dense/blend']['mean']
          for name in ('merge/learned', 'btx/finetuned', 'ffn/ridge')]
  assert [cell.split(' ')[0] for cell in middle[4:7]] == [f'{value:+.3f}' for value in gaps]
  assert middle[2:4] == [f'{of_seeds[0][name]["mean"]:.3f}' for name in ('seed', 'dense/blend')]
  seed, dense = (of_seeds[0][name]['mean'] for name in ('seed', 'dense/blend'))
  gains = [seed - dense - value for value in gaps]
  assert middle[7:10] == [f'{100 * gain / (seed - dense):.0f} %' for gain in gains]
  assert len(tables['later']) == 13
  routed = {line[0].strip('`'): line for line in tables['routing']}
  assert routed.keys() == {'btx/finetuned'} | {
      f'routing/{name}' for name in ('unbalanced', 'switch', 'soft', 'sample_top_1')}
  for name, line in routed.items():
    assert line[1] != '-' and 0 <= float(line[6]) <= 2 and 25 <= float(line[7]) <= 100, name
  for name in ('crossover', 'split'):
    assert (tmp_path / f'study_{name}.png').read_bytes().startswith(b'\x89PNG')


def test_what_is_not_trained_is_a_dash(made_up, tmp_path):
  few = tmp_path / 'rows'
  shutil.copytree(made_up, few)
  os.remove(few / 'seed-0' / 'dense' / 'blend.json')
  shutil.rmtree(few / 'seed-0' / 'seed_4')
  shutil.rmtree(few / 'seed-1' / 'btx')
  tables = page_of(few, tmp_path)
  lines = {line[0].strip('`'): line for line in tables['main']}
  assert lines['btx/finetuned'][1] == '1' and lines['btx/finetuned'][7] == '-'  # no seed has both
  assert lines['sparse/copies'][1] == '2' and lines['sparse/copies'][9] == '-'  # of one seed
  assert tables['crossover'][2][3:] == ['-'] * 8  # its seed model is there
  page_of(tmp_path / 'nowhere', tmp_path)
  assert (tmp_path / 'study.md').read_text().count('<!-- end -->') == 7
