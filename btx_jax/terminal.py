"""Output on the terminal: lines, tables, and a progress bar for each run."""

from collections.abc import Iterable, Mapping, Sequence
import functools
import sys
import time

from rich import box, progress
from rich.console import Console, RenderableType
from rich.table import Table

_PLAIN_EVERY = 10.0  # seconds between lines when the output is not a terminal
_LEAST_WIDTH = 160  # columns; wide enough for every table of the demo
# Prints text verbatim: names of runs and domains may look like rich's markup or emoji codes.
_VerbatimConsole = functools.partial(Console, highlight=False, markup=False, emoji=False)

console = _VerbatimConsole()


class Progress:
  """A bar for each run (loss, tokens/s, time left); plain lines when not on a terminal."""

  def __init__(self, runs: Mapping[str, tuple[int, int]]):
    """`runs` maps names to (steps done, steps in total)."""
    self._runs = runs
    self._printed = dict.fromkeys(runs, time.monotonic())  # when each run's last line was printed
    self._bars = None
    if console.is_terminal:
      self._bars = progress.Progress(
          progress.TextColumn('{task.description}', markup=False), progress.BarColumn(),
          progress.MofNCompleteColumn(), progress.TextColumn('{task.fields[text]}'),
          console=console)

  def __enter__(self):
    self._tasks = {}
    if self._bars:
      self._bars.start()
    for name, (start, steps) in self._runs.items():
      if self._bars:
        self._tasks[name] = self._bars.add_task(
            name, total=steps, completed=start, text='compiling')
      else:
        console.print(f'{name}: {start} of {steps} steps, compiling')
    return self

  def __exit__(self, *_):
    if self._bars:
      self._bars.stop()

  def update(self, name: str, step: int, loss: float, tokens_per_second: float | None,
             seconds_left: float | None):
    """Shows that the run `name` has finished `step`."""
    text = f'loss {loss:.3f}'
    if tokens_per_second:
      text += f'  {tokens_per_second:,.0f} tokens/s'
    if seconds_left is not None:
      text += f'  {duration(seconds_left)} left'
    if self._bars:
      self._bars.update(self._tasks[name], completed=step, text=text)
      return
    now, (_, steps) = time.monotonic(), self._runs[name]
    if now - self._printed[name] >= _PLAIN_EVERY or step == steps:
      self._printed[name] = now
      console.print(f'{name}: {step} of {steps}  {text}')


def duration(seconds: float | None) -> str:
  """A time in the unit that suits it, as in '90 s', '45 min', '7.5 h' or '12.0 days'; or '-'."""
  if seconds is None:
    return '-'
  if seconds < 100:
    return f'{seconds:.0f} s'
  if seconds < 100 * 60:
    return f'{seconds / 60:.0f} min'
  if seconds < 100 * 3600:
    return f'{seconds / 3600:.1f} h'
  return f'{seconds / 86400:.1f} days'


def say(text: str):
  """Prints a line, at once even if the output is piped."""
  console.print(text, soft_wrap=True)
  sys.stdout.flush()


def show(renderable: RenderableType, width: int | None = None):
  """Prints a table in `width` columns; if None, in as many as the terminal has, at least 160 (on a
  narrower terminal its lines wrap)."""
  wide = _VerbatimConsole(width=width or max(console.width, _LEAST_WIDTH), quiet=console.quiet)
  wide.print(renderable)


def table(headings: Sequence[str], rows: Iterable[Sequence[RenderableType]], names: int = 1,
          title: str | None = None, caption: str | None = None) -> Table:
  """A table in the style that all commands share; where it is too wide, its cells wrap.

  Args:
    headings: one for each column.
    rows: cells, as many as there are headings.
    names: number of leading columns with names, aligned left; the others hold figures.
    title: above the table.
    caption: below it.
  """
  result = Table(title=title, title_justify='left', caption=caption, caption_justify='left',
                 box=box.SIMPLE_HEAD)
  for i, heading in enumerate(headings):
    result.add_column(heading, justify='left' if i < names else 'right', overflow='fold')
  for row in rows:
    result.add_row(*row)
  return result


def format_number(value: float | None, form: str = '.2f') -> str:
  """`value` in a format like ',.0f' or '.1%'; '-' if it is not known."""
  return '-' if value is None else format(value, form)
