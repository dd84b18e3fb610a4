"""Tables lose nothing, however narrow the terminal and whatever runs are called."""

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from btx_jax import terminal

NAME = 'expert/[bold]law[/bold] :book: <x>'


@pytest.fixture
def printed(capsys, monkeypatch):
  """Prints a table in some columns; returns the lines on the terminal."""
  def show(table, columns=80):
    monkeypatch.setenv('COLUMNS', str(columns))
    terminal.show(table)
    lines = capsys.readouterr().out.split('\n')
    assert max(map(cell_len, lines)) <= columns
    return lines

  return show


def test_names_that_look_like_markup_are_shown_verbatim(printed):
  said = printed(terminal.Table(['run', 'loss'], [[NAME, '1.234']], title=f'of {NAME}'))
  assert sum(NAME in line for line in said) == 2


HEADINGS = ['law-and-regulation', 'code', 'total parameters', 'x' * 30, 'mean']


@pytest.mark.parametrize('columns', [40, 80, 120, 400])
def test_a_table_that_is_too_wide_is_split_and_nothing_is_cut(printed, columns):
  names = ['seed', 'a/very_long_name-' * 4, '日本' * 20]
  cells = [[f'{row}.{column}00 ±0.0' for column in range(9)] for row in range(3)]
  headings = HEADINGS + [f'{heading}2' for heading in HEADINGS[:4]]
  table = terminal.Table(['model', *headings], [[name, *row] for name, row in zip(names, cells)],
                         groups=[('', 5), ('Cost', 4)], first=('mean',))
  said = printed(table, columns)
  for cell in [cell for row in cells for cell in row]:
    assert sum(cell in line for line in said) == 1
  heads = [line for line in said if not re.match('.*[.]', line)]
  for heading in headings:
    for word in re.split('[- ]', heading):
      assert any(word in line for line in heads), heading
  assert ('Cost' in said) == (columns < 400)
  if columns == 80:
    assert '0.400' in next(line for line in said if '±' in line)  # the mean comes first
    letters = re.sub(r'\s', '', ''.join(line[:32] for line in said))
    assert names[1] in letters and names[2] in letters  # folded, for each part of the table


def test_columns_are_left_out_by_importance_and_named(printed):
  table = terminal.Table(['run', 'state', *'abcd'], [['x' * 30, 'complete', *['1' * 9] * 4]],
                         names=2, drop=('d', 'b'))
  wide, narrow = (' '.join(' '.join(printed(table, columns)).split()) for columns in (120, 74))
  assert 'a b c d' in wide and 'wider' not in wide
  assert 'a b c' in narrow and narrow.endswith('More columns on a wider terminal: d.')
  assert printed(table, 50)[-3].endswith(': d, b.')


def test_heads_are_broken_only_where_they_must():
  assert terminal.broken('law-and_order/of the sea', 8) == 'law-and_\norder/of\nthe sea'
  assert terminal.broken('unbreakable', 4) == 'unbreakable'
  assert terminal.broken('held-out\nMB', 20) == 'held-out\nMB'
  assert terminal.broken('', 5) == ''


@pytest.mark.parametrize('columns', [80, 120])
def test_progress_fits_too(monkeypatch, columns):
  out = io.StringIO()
  monkeypatch.setattr(terminal, 'console', Console(
      width=columns, height=20, file=out, force_terminal=True, color_system=None))
  name = 'btx/of_the_first_three_only/then_everything'
  with terminal.Progress({'expert/knowledge': (0, 12000), name: (0, 400)}) as bars:
    for run, step in (('expert/knowledge', 5000), (name, 300)):
      bars.update(run, step, 3.1234, 12345, 2700)
  said = re.sub(r'\x1b\[[0-9;?]*[a-zA-Z]', '', out.getvalue()).split('\n')
  assert max(cell_len(line.split('\r')[-1]) for line in said) <= columns
  assert sum('loss 3.123' in line and '45 min left' in line for line in said) >= 2
  assert ('tokens/s' in ''.join(said)) == (columns == 120) and '…' not in ''.join(said)


def test_a_number_that_is_not_known_is_a_dash():
  assert terminal.format_number(None, ',.0f') == '-'
  assert terminal.format_number(12345.6, ',.0f') == '12,346'
  assert terminal.format_number(0) == '0.00'
