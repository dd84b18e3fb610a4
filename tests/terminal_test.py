"""Tables lose nothing, however narrow the terminal and whatever runs are called."""

import pytest

from btx_jax import terminal

NAME = 'expert/[bold]law[/bold] :book: <x>'


@pytest.fixture
def printed(capsys):
  """Prints a table; returns what stands on the terminal."""
  def show(table):
    terminal.show(table)
    return capsys.readouterr().out

  return show


def test_names_that_look_like_markup_are_shown_verbatim(printed):
  said = printed(terminal.table(['run', 'loss'], [[NAME, '1.234']], title=f'of {NAME}'))
  assert said.count(NAME) == 2


def test_a_table_that_is_too_wide_wraps(printed):
  said = printed(terminal.table(['run', *['loss'] * 12], [['x' * 70, *['0123456789'] * 12]]))
  assert said.count('x') == 70
  assert sum(map(str.isdigit, said)) == 12 * 10


def test_a_number_that_is_not_known_is_a_dash():
  assert terminal.format_number(None, ',.0f') == '-'
  assert terminal.format_number(12345.6, ',.0f') == '12,346'
  assert terminal.format_number(0) == '0.00'
