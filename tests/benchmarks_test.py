"""`python -m tests.benchmarks`: each row from start to end, in tiny sizes; ratios by hand."""

import json

import pytest

from tests.benchmarks import __main__ as benchmarks
from tests.benchmarks import sizes
from tests.benchmarks.sides import Cost


def test_a_quick_run_prints_ratios_and_writes_all_figures(tmp_path, capsys):
  file = tmp_path / 'figures.json'
  benchmarks.main(['dense', 'tokenizing', '--quick', f'--json={file}'])
  printed, figures = capsys.readouterr().out, json.loads(file.read_text())
  assert set(figures['calls']) == {
      'ours dense float32', 'ours matmul float32', 'ours products float32', 'ours tokenizing',
      'ours tokenizer alone'}
  assert all(cost['seconds'] > 0 for taken in figures['calls'].values() for cost in taken)
  assert set(figures['versions']) >= {'jax', 'numpy', 'tokenizers'}
  assert figures['machine']['cores'] > 0
  for title in ('tokenizing', 'share of the matmul peak, dense float32',
                'share of the matmuls alone, ours dense float32'):
    assert figures['ratios'][title]['seconds'] > 0 and title in printed


def test_a_ratio_is_of_the_fastest_calls_and_the_median_of_turns():
  taken = lambda *seconds: [Cost(each, each) for each in seconds]
  costs = {'ours dense float32': taken(1, 2, 1), 'ours dense bfloat16': taken(3, 3, 3),
           'reference dense float32': taken(9, 9, 9), 'reference dense bfloat16': taken(2, 8, 5),
           'ours matmul float32': taken(.1, .1, .1), 'ours matmul bfloat16': taken(.1, .1, .1)}
  rows = benchmarks.compared(costs, sizes.Sizes())
  assert rows['dense step, best dtype'] == (
      Cost(4, 4), 'ours dense float32 against reference dense bfloat16')
  assert rows['dense step, float32'][0].seconds == 9
  assert not any(title.startswith('mixture') for title in rows)


@pytest.mark.parametrize('arguments, message', [
    (['dnse'], "'dnse' is not a row"), (['mixing'], 'needs --folder')])
def test_what_cannot_be_measured_is_refused(arguments, message, capsys):
  with pytest.raises(SystemExit):
    benchmarks.main(arguments)
  assert message in capsys.readouterr().err
