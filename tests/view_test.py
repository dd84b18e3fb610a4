"""What a finished study shows: in 80 columns, in the report, and as files for other programs. The
study has seven domains and two mixtures with long names, and nothing of it was computed."""

import csv
import io
import json
import os
import re
import sys

import pytest
from rich.cells import cell_len

from btx_jax import base, main, terminal
from btx_jax.commands import (
  claims,
  compare,
  data,
  decomposition,
  differences,
  measured,
  mixture_pictures,
  pictures,
  regression,
  report,
  seeds,
  status,
  table,
  table_files,
)
from btx_jax.commands import ledger as ledger_table
from btx_jax.data import duplicates
from btx_jax.data.corpora import Group
from btx_jax.scoring import decomposition as parts_of
from btx_jax.scoring import error_bars, ledger, routing, scores
from btx_jax.scoring.regression import regressions
from btx_jax.study.study import Study
from tests import finished

ROUTERS, LAST = (f'btx/of_the_first_three_only/{name}' for name in ('routers', 'then_everything'))


@pytest.fixture(scope='module', params=[(), (0, 1)], ids=['one seed', 'two seeds'])
def study(request, tmp_path_factory):
  config = finished.two_mixtures()
  config.seeds = request.param
  return finished.write(config, str(tmp_path_factory.mktemp('work')))


@pytest.fixture(scope='module')
def single(tmp_path_factory):
  return finished.write(finished.two_mixtures(), str(tmp_path_factory.mktemp('work')))


@pytest.fixture(scope='module', autouse=True)
def _no_pictures():
  """Drawing takes seconds; pictures_test.py draws."""
  with pytest.MonkeyPatch.context() as patch:
    for name in ('differences', 'curves', 'curves_by_domain', 'experts', 'load', 'graph'):
      patch.setattr(pictures, name, lambda *_: b'drawn')
    for name in ('decomposition', 'choices'):
      patch.setattr(mixture_pictures, name, lambda *_: b'drawn')
    yield


# In 80 columns


def described(names):
  """What `data` knows of domains."""
  return [data.Description(
      name, {'documents': 1234567, 'bytes': 98765432101, 'tokens': 23456789012},
      {'documents': 54321, 'bytes': 9876543, 'tokens': 2345678}, 12345,
      [Group('*.json.gz', 'JSON lines, gzip', True, 20, 54321, 17)], [], 1234,
      duplicates.Overlap(0.123, 45, None), 'text', '', '') for name in names]


def compared():
  """What `compare` finds of three experts."""
  figures = {'cosine': [[0.5] * 3] * 3, 'norm_ratio': [[1.25] * 3] * 3, 'moved': [0.25] * 3,
             'conflicts': [[0.123] * 3] * 3}
  return {'run': 'btx', 'seed': 'seed', 'seed_is': 'their nearest common ancestor',
          'experts': ['expert/code', 'expert/knowledge', 'expert/biomedical-abstracts'],
          'all': dict.fromkeys((compare.AVERAGED, compare.FEED_FORWARD), figures),
          'components': [{'component': 'attention and norms', 'layer': 3, **figures}]}


def shown_tables(study):
  """Everything that the commands print as tables."""
  results = seeds.results(study)
  found = [status.as_table(status.collect(study)), table.as_table(results.rows, results.note),
           measured.as_table(results.rows), regression.changes_table(regressions(study)),
           claims.as_text(results.checks), ledger_table.as_table(ledger.rows(study), 4),
           data.as_table(described(finished.DOMAINS)),
           data.files_table(described(finished.DOMAINS)), compare.summary_table(compared()),
           compare.layer_table(compared())]
  parts = decomposition.over_seeds(parts_of.of_study(study))
  found += [decomposition.means_table(parts), decomposition.domains_table(parts[0])]
  return found


@pytest.mark.parametrize('columns', [80, 120])
def test_no_line_is_too_long_and_no_head_is_cut(study, monkeypatch, capsys, columns):
  monkeypatch.setenv('COLUMNS', str(columns))
  for shown in shown_tables(study):
    terminal.show(shown)
    said = capsys.readouterr().out
    assert max(cell_len(line) for line in said.split('\n')) <= columns
    assert '…' not in said
    tables = [shown] if isinstance(shown, terminal.Table) else [
        each for each in shown.renderables if isinstance(each, terminal.Table)]
    for each in tables:
      for heading in each.headings:
        for word in re.findall(r'[^-_/ \n]+', heading):
          assert re.search(rf'(?<![^\W_]){re.escape(word)}(?![^\W_])', said), heading
      for row in each.rows:  # no figure is cut or folded
        for heading, cell in list(zip(each.headings, row))[each.names:]:
          assert str(cell) in said or heading in each.drop


def test_the_state_of_a_run_is_always_whole(study, monkeypatch, capsys):
  monkeypatch.setenv('COLUMNS', '80')
  terminal.show(status.as_table(status.collect(study)))
  said = capsys.readouterr().out
  assert said.count('complete') == len(study.runs)
  assert said.strip().endswith('More columns on a wider terminal: MFU, checkpoint.')


# Claims


def test_claims_are_grouped_by_mixture_and_said_once(study):
  checks = seeds.results(study).checks
  names = [check['name'] for check in checks]
  assert len(set(names)) == len(names)
  groups = claims.by_subject(checks)
  assert [subject for subject, _ in groups] == [claims.EXPERTS, 'btx', ROUTERS, LAST]
  assert [len(found) for found in groups.values()] == [2 * 6, 1 + 7 + 2 * 6, *[1 + 7 + 2 * 3] * 2]


def test_a_run_that_continues_a_mixture_is_measured_against_its_specialists(single):
  checks = claims.checks(single, table.rows(single))
  last = [check for check in checks if check['about'] == LAST]
  assert last[0]['compared'] == [
      'seed', 'expert/code', 'expert/knowledge', 'expert/math', f'average of {ROUTERS}',
      f'{ROUTERS} unfinetuned', ROUTERS, LAST]
  mixture, seed, code = (next(row for row in table.rows(single) if row['name'] == name)
                         for name in (LAST, 'seed', 'expert/code'))
  for rival, beginning in ((seed, 'beats seed'), (code, 'is within 0.05 of expert/code')):
    check, = (each for each in last if each['name'].startswith(f'{LAST} {beginning} on code'))
    found = table.difference(mixture, rival, 'code')
    assert (check['difference'], check['error']) == (found.value, found.error)
  gates, = (each for each in last if 'on code, expert/code has' in each['name'])
  assert 'largest: ' in gates['name']


def test_a_mixture_that_continues_from_a_step_has_claims_too(tmp_path):
  config = finished.two_mixtures()
  del config.runs[ROUTERS], config.runs[LAST]
  config.runs['more'] = base.run(base.checkpoint('btx', step=100), finished.BLEND, steps=50)
  study = finished.write(config, str(tmp_path))
  groups = claims.by_subject(claims.checks(study, table.rows(study)))
  assert [subject for subject, _ in groups] == [claims.EXPERTS, 'btx', 'more']


def test_copies_that_nothing_has_trained_are_no_experts_with_claims(tmp_path):
  config = finished.two_mixtures()
  copies = ('redrawn/0', 'redrawn/1')
  config.runs.update(dict.fromkeys(copies, base.run(base.checkpoint('seed', redraw=0.5))))
  config.runs['redrawn'] = base.run(base.mix('seed', *copies), finished.BLEND, steps=50)
  study = finished.write(config, str(tmp_path))
  assert 'redrawn' in {row['name'] for row in table.rows(study)}
  groups = claims.by_subject(claims.checks(study, table.rows(study)))
  assert [subject for subject, _ in groups] == [claims.EXPERTS, 'btx', ROUTERS, LAST]


# Differences


def test_differences_have_the_errors_of_paired_units_and_the_spread_of_pairs(study):
  results = seeds.results(study)
  base_row = differences.baseline(results.rows, 'dense_with_the_same_flops')
  by_series = [results.by_series[series] for series in results.complete]
  found = differences.of_rows(results.rows, base_row, by_series)
  row, entry = next((row, entry) for row, entry in zip(results.rows, found)
                    if row['name'] == 'btx')
  for domain in finished.DOMAINS:
    expected = table.difference(row, base_row, domain)
    got = entry['bits_per_byte'][domain]
    assert (got['difference'], got['error']) == (expected.value, expected.error)
    assert got['error'] == error_bars.error_of_difference(
        row['units'][domain], base_row['units'][domain])
  of_seeds = [dict(zip(names, means)) for names, means in (
      zip(*((each['name'], each['mean']) for each in rows)) for rows in by_series)]
  pairs = [means['btx'] - means[base_row['name']] for means in of_seeds]
  assert entry['mean']['spread'] == (
      pytest.approx(abs(pairs[0] - pairs[1]) / 2**0.5) if pairs else None)
  own = next(each for each in found if each['name'] == base_row['name'])
  assert own['mean']['difference'] == 0 == own['mean']['error']
  assert list(differences.panels(found)) == [*sorted(finished.DOMAINS), 'mean']


# The report


@pytest.fixture(scope='module')
def written(study):
  path = report.write_report(study, 'two', 'btx')
  with open(path, encoding='utf-8') as page, \
       open(path.replace('html', 'json'), encoding='utf-8') as figures:
    return page.read(), json.load(figures)


def test_the_page_has_what_a_reviewer_asks_for(study, written):
  page, _ = written
  assert '<h3>Differences from btx</h3>' in page
  section = page[page.index('id="settings"'):page.index('id="text"')].replace('<wbr>', '')
  for value in ('0.003', '0.002', '0.0001', '1,852,544', '>256</td>', 'commit 0123456789ab',
                'python 3.11.7', 'optimizer.weight_decay', 'frozen', '^(?!.*/router)'):
    assert value in section, value
  rows = re.findall(r'data-head="run">(.*?)</td>', section)
  assert rows == list(dict.fromkeys(run.plain_name for run in study.runs.values()))
  if study.config.seeds:
    assert section.count('>0, 1</td>') == len(rows)


def test_times_are_in_a_unit_that_suits_them(written):
  page, _ = written
  costs = page[page.index('id="runs"'):page.index('id="settings"')]
  assert '>52 s</td>' in costs and '>3 min</td>' in costs and '0 min' not in costs


def test_the_page_has_the_ledger_of_every_model(study, written):
  page, _ = written
  shown = page[page.index('id="ledger"'):page.index('id="settings"')].replace('<wbr>', '')
  rows = ledger.rows(study)
  for group in ledger_table.groups(rows, ledger.MACHINES):
    assert f'<h3>{group.title}</h3>' in shown
    for row, cells in zip(rows, group.cells):
      cells = ''.join(f'<td>{cell}</td>' for cell in cells)
      assert f'<td class="name">{row["name"]}</td>{cells}' in re.sub(r'\n', '', shown)


def test_heads_are_aligned_as_their_cells(written):
  page, _ = written
  for head, row in re.findall(r'<tr>(<th.*?)</tr>\s*<tr>\s*(<td(?! class="name group).*?)</tr>',
                              page, re.DOTALL):
    kinds = [['name' in tag for tag in re.findall(f'<{kind}([^>]*)>', part)]
             for kind, part in (('th', head), ('td', row))]
    assert kinds[0] == kinds[1]


def test_documents_of_a_sample_are_apart(written):
  page, _ = written
  sample = page[page.index('<div class="text">'):]
  documents = sample[:sample.index('</div></div>')].split('<div>')[1:]
  assert [len(re.findall('<span', document)) for document in documents] == [40, 48]


def test_the_json_has_all_that_the_page_has(study, written):
  _, figures = written
  results = seeds.results(study)
  assert figures['rows'] == json.loads(json.dumps(table.without_units(results.rows)))
  assert figures['rows'][0]['measured']['code']['units'] == 30
  assert figures['differences']['baseline'] == 'btx'
  assert figures['manifests'].keys() == study.runs.keys()
  assert figures['text']['code']['held_out']['documents'] == 21
  assert figures['ledger'] == json.loads(json.dumps(ledger.rows(study)))


def test_the_csv_has_all_figures_unrounded(study, written):
  path = os.path.join(study.workdir, 'report', 'report.csv')
  with open(path, encoding='utf-8') as file:
    lines = list(csv.DictReader(file))
  rows = seeds.results(study).rows
  assert [line['model'] for line in lines] == [row['name'] for row in rows]
  for line, row in zip(lines, rows):
    assert float(line['code']) == row['bits_per_byte']['code']
    assert float(line['error of mean']) == row['error']['mean']
    assert int(line['train_flops']) == row['train_flops']
    if study.config.seeds:
      assert float(line['spread of web']) == row['spread']['bits_per_byte']['web']


ODD = r'a_b 50% & {x} $1 #2 ~ ^ \n <i> --- "q" | [z]'


def test_latex_prints_names_as_they_are(study):
  assert table_files.escaped(ODD) == (
      r'a\_b 50\% \& \{x\} \$1 \#2 \textasciitilde{} \textasciicircum{} \textbackslash{}n '
      r'\textless{}i\textgreater{} -{}-- \textquotedbl{}q\textquotedbl{} \textbar{} [z]')
  results = seeds.results(study)
  rows = [results.rows[0] | {'name': name} for name in (ODD, '[a]', '*b', 'two\nlines')]
  lines = table_files.as_latex(rows, 'a note').split('\n')
  begin = next(i for i, line in enumerate(lines) if line == r'\midrule') + 1
  names = [line.split(' & ')[0] for line in lines[begin:]]
  assert names[1:4] == ['{}[a]', '{}*b', 'two lines']
  columns = re.search(r'tabular}{@{}(l?r+)@', '\n'.join(lines))[1]
  for line in lines[begin:begin + 4]:
    assert len(re.findall(r'(?<!\\)&', line)) == len(columns) - 1 and line.endswith(r' \\')
  assert (r'$\pm$' in lines[begin]) == bool(study.config.seeds)
  assert r'\textbf{' in lines[begin] and '% a note' in lines


def test_the_csv_quotes_names(single):
  row = table.rows(single)[0] | {'name': 'a,"b"\nc'}
  line, = csv.DictReader(io.StringIO(table_files.as_csv([row])))
  assert line['model'] == 'a,"b"\nc'


def test_the_page_takes_each_mixture_apart_and_shows_where_tokens_go(study, written):
  page, figures = written
  mixtures = ['btx', ROUTERS, LAST]
  section = page[page.index('id="parts"'):page.index('id="routing"')].replace('<wbr>', '')
  means = parts_of.of_study(study)
  assert [each['run'] for each in means if each['series'] in ('', 'seed-0')] == mixtures
  assert figures['decomposition'] == json.loads(json.dumps(means))
  for name in mixtures:
    assert f'{name} by domain</summary>' in section
  assert ('sample standard deviation' in section) == bool(study.config.seeds)
  routed = page[page.index('id="routing"'):page.index('id="experts-1"')].replace('<wbr>', '')
  rows = re.findall(r'<td class="name">(.*?)</td>', routed)
  assert rows == ['btx unfinetuned', 'btx', f'{ROUTERS} unfinetuned', ROUTERS, LAST]
  where = page[page.index('Which tokens go where'):].replace('<wbr>', '')
  assert re.search('\u201c\u2423the\u201d [0-9]+ of [0-9]+', where)
  assert figures['routing'][0]['labels'][:2] == ['seed', 'code']
  for each in figures['routing']:
    found = scores.read(study, study.runs[each['run']], each['stage'])
    assert each.items() >= json.loads(json.dumps(routing.describe(found))).items()


# The command line


@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # of ml_collections
def test_report_prints_latex_and_takes_a_baseline(single, tmp_path, monkeypatch, capsys):
  path = tmp_path / 'two.py'
  path.write_text('from tests import finished\n\ndef get_config():\n'
                  '  return finished.two_mixtures()\n')
  flags = main.flags.FLAGS

  def run(*arguments):
    flags.unparse_flags()
    argv = ['btx', f'--config={path}', f'--workdir={single.workdir}', *arguments]
    main.run_command(main._parse_flags(argv))
    return capsys.readouterr().out

  monkeypatch.setattr(sys, 'argv', ['btx'])
  assert run('report', '--latex') == report.latex_table(single)
  assert run('report', '--nolatex', '--baseline=btx').startswith('Report: ')
  with open(os.path.join(single.workdir, 'report', 'report.json'), encoding='utf-8') as file:
    assert json.load(file)['differences']['baseline'] == 'btx'


# Pretrained mixtures


def test_a_pretrained_mixture_has_its_score_before_training_and_a_report(tmp_path):
  config = finished.two_mixtures()
  folder = os.path.join(os.path.dirname(__file__), 'fixtures', 'mixtral')
  config.tokenizer.update(path='some', vocab_size=40)
  config.runs = {
      'given': base.run(base.hugging_face(folder)),
      'tuned': base.run(base.hugging_face(folder), finished.BLEND, steps=20),
      'further': base.run(base.checkpoint('tuned'), finished.BLEND, steps=20)}
  study = finished.write(config, str(tmp_path), at_hand=False)
  assert {model.name for model in scores.models(study)} == {
      'given', 'tuned unfinetuned', 'tuned', 'further'}
  changes = regressions(study)
  assert [(each['name'], each['since']) for each in changes] == [
      ('tuned', 'tuned unfinetuned'), ('further', 'tuned')]
  with open(report.write_report(study, 'given'), encoding='utf-8') as file:
    page = file.read()
  for name in ('given', 'tuned', 'further'):
    assert f'>Experts of {name}</h2>' in page
  assert '3 expert 3' in page
  assert Study(config, str(tmp_path), at_hand=False).runs['further'].expert_names
