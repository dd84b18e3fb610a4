"""Output on the terminal: lines, tables, and a progress bar for each run."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import re
import sys
import time

from rich import box, cells, progress
from rich import table as rich_table
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from btx_jax import escaping, storage

_PLAIN_EVERY = 10.0  # seconds between lines when the output is not a terminal
# Columns of a progress bar, and of 'loss 3.123  12,345 tokens/s  45 min left' with gaps.
_BAR, _LEAST_BAR, _TEXT, _SPEED = 40, 8, 46, 18
_GAP = 2  # columns between two columns of a table
_LEAST_NAME = 14  # columns that a folded name has at least
_LEAST_HEAD = 6  # columns of a broken head, if a word of it is not longer


class _VerbatimConsole(Console):
  """Prints strings as text: names may look like rich's markup, emoji codes, or escape codes."""

  def __init__(self, quiet: bool = False):
    super().__init__(highlight=False, markup=False, emoji=False, quiet=quiet)

  def render_str(self, text: str, **options) -> Text:
    return super().render_str(escaping.printable(text), **options)

  def render(self, renderable: RenderableType, options: ConsoleOptions | None = None
             ) -> Iterable[Segment]:
    if isinstance(renderable, Text) and renderable.plain != escaping.printable(renderable.plain):
      renderable = Text(escaping.printable(renderable.plain), renderable.style)
    return super().render(renderable, options)


console = _VerbatimConsole()


class Progress:
  """A bar for each run (loss, tokens/s, time left); plain lines when not on a terminal."""

  def __init__(self, runs: Mapping[str, tuple[int, int]]):
    """`runs` maps names to (steps done, steps in total)."""
    self._runs = runs
    self._printed = dict.fromkeys(runs, time.monotonic())  # when each run's last line was printed
    self._bars = None
    longest = max(map(cells.cell_len, runs), default=0)
    digits = max((len(str(steps)) for _, steps in runs.values()), default=0)
    room = console.width - longest - 2 * digits - _TEXT  # columns left for the bar
    self._has_speed = room >= _LEAST_BAR
    if console.is_terminal:
      bar = min(max(room + (0 if self._has_speed else _SPEED), _LEAST_BAR), _BAR)
      self._bars = progress.Progress(
          progress.TextColumn('{task.description}', markup=False, table_column=_folded()),
          progress.BarColumn(bar), progress.MofNCompleteColumn(),
          progress.TextColumn('{task.fields[text]}', table_column=_folded()), console=console)

  def __enter__(self):
    self._tasks = {}
    if self._bars:
      self._bars.start()
    for name, (start, steps) in self._runs.items():
      if self._bars:
        self._tasks[name] = self._bars.add_task(
            escaping.printable(name), total=steps, completed=start, text='compiling')
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
    if tokens_per_second and (self._has_speed or not self._bars):
      text += f'  {tokens_per_second:,.0f} tokens/s'
    if seconds_left is not None:
      text += f'  {duration(seconds_left)} left'
    if self._bars:
      self._bars.update(self._tasks[name], completed=step, text=text)
      return
    now, (_, steps) = time.monotonic(), self._runs[name]
    if now - self._printed[name] >= _PLAIN_EVERY or step == steps:
      self._printed[name] = now
      say(f'{name}: {step} of {steps}  {text}')


def _folded() -> rich_table.Column:
  """A column that folds text that is too wide, rather than cutting it."""
  return rich_table.Column(overflow='fold')


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
  """Prints a line, at once even if the output is piped.

  If the output goes to a file on a full disk, the line is lost, and the command goes on.
  """
  try:
    console.print(text, soft_wrap=True)
    sys.stdout.flush()
  except OSError as error:
    if not storage.disk_error(error):
      raise


def show(renderable: RenderableType):
  """Prints a table in the width of the terminal, or of COLUMNS if that is set; 80 columns if the
  output is piped."""
  _VerbatimConsole(quiet=console.quiet).print(renderable)


@dataclasses.dataclass(frozen=True)
class Table:
  """A table that fits the terminal, in the style that all commands share.

  Where it is too wide, heads are broken at their spaces, hyphens and slashes, names are folded, and
  columns of `drop` are left out. If that is not enough, it becomes several tables, each with the
  names and some of the figures. Nothing is cut.

  Attributes:
    headings: one for each column.
    rows: cells, as many as there are headings.
    names: number of leading columns with names, aligned left; the others hold figures.
    title: above the table.
    caption: below it.
    groups: (title, number of columns) of columns that belong together, in their order; together
      they are all figures. A table that is split begins a new one with each of them.
    first: headings of the figures that come first in a group that is split.
    drop: headings of figures that may be left out, least important first.
  """
  headings: Sequence[str]
  rows: Sequence[Sequence[str | Text]]
  names: int = 1
  title: str = ''
  caption: str = ''
  groups: Sequence[tuple[str, int]] = ()
  first: Sequence[str] = ()
  drop: Sequence[str] = ()

  def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
    width, caption = options.max_width, self.caption
    figures = list(range(self.names, len(self.headings)))
    dropped = self._dropped(width)
    figures = [at for at in figures if self.headings[at] not in dropped]
    if dropped:
      caption = f'{caption} More columns on a wider terminal: {", ".join(dropped)}.'.lstrip()
    tables = [(self.title, figures)]
    if not self._fits(figures, width):
      tables = list(self._split(figures, width))
    for title, columns in tables:
      if title:
        yield Text(title, style='italic')
      yield self._rendered(columns, width)
      yield ''
    if caption:
      yield Text(caption, style='dim')
      yield ''

  def _dropped(self, width: int) -> list[str]:
    """The headings of figures that do not fit."""
    figures, dropped = list(range(self.names, len(self.headings))), []
    for heading in self.drop:
      if self._fits(figures, width):
        break
      dropped.append(heading)
      figures.remove(self.headings.index(heading))
    for heading in reversed(dropped[:-1]):  # a narrow one may fit where a wide one did not
      if self._fits([*figures, self.headings.index(heading)], width):
        dropped.remove(heading)
        figures.append(self.headings.index(heading))
    return dropped

  def _split(self, figures: list[int], width: int) -> Iterator[tuple[str, list[int]]]:
    """The title and the figures of each table that the whole is split into."""
    end = self.names
    for i, (title, count) in enumerate(self.groups or [('', len(figures))]):
      left = [at for at in figures if end <= at < end + count]
      if not self._fits(left, width):
        left.sort(key=lambda at: self.headings[at] not in self.first)
      end += count
      title = title or ('' if i else self.title)
      while left:
        fitting = max((n for n in range(1, len(left) + 1) if self._fits(left[:n], width)),
                      default=1)
        yield title, left[:fitting]
        left, title = left[fitting:], ''

  def _fits(self, figures: Sequence[int], width: int) -> bool:
    """Whether these figures fit beside the names, if long names are folded."""
    share = 0.35 if self.drop else 0.4 if self.names == 1 else 0.54 / self.names
    least = max(_LEAST_NAME, int(share * width))
    widths = [min(self._width(at, self.headings[at]), least) for at in range(self.names)]
    widths += [self._width(at, self._broken(at)) for at in figures]
    return sum(widths) + _GAP * (len(widths) - 1) <= width

  def _rendered(self, figures: Sequence[int], width: int) -> rich_table.Table:
    columns = [*range(self.names), *figures]
    whole = sum(self._width(at, self.headings[at]) for at in columns) + _GAP * (len(columns) - 1)
    heads = {at: self.headings[at] if whole <= width else self._broken(at) for at in figures}
    taken = sum(self._width(at, head) + _GAP for at, head in heads.items())
    widths = _shared([self._width(at, self.headings[at]) for at in range(self.names)],
                     width - taken - _GAP * (self.names - 1))
    result = rich_table.Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False,
                              collapse_padding=True)
    for at in range(self.names):
      result.add_column(self.headings[at], overflow='fold', vertical='bottom')
    for head in heads.values():
      result.add_column(head, justify='right', overflow='fold', vertical='bottom',
                        no_wrap=taken <= width)
    for row in self.rows:
      names = [_wrapped(cell, widest) for cell, widest in zip(row, widths)]
      result.add_row(*names, *(row[at] for at in figures))
    return result

  def _width(self, at: int, heading: str) -> int:
    """The width of a column under a heading."""
    return max(cells.cell_len(line) for text in (heading, *(str(row[at]) for row in self.rows))
               for line in text.split('\n'))

  def _broken(self, at: int) -> str:
    """The heading of a column in lines about as wide as its cells; no word is broken."""
    return broken(self.headings[at], max(_LEAST_HEAD, self._width(at, '')))


def broken(text: str, width: int) -> str:
  """Breaks a text into lines of this width, after spaces, hyphens, underscores and slashes; longer
  words are not broken."""
  lines = ['']
  for word in re.findall(r'[^-_/ \n]*[-_/ \n]|[^-_/ \n]+', text):
    if lines[-1] and (lines[-1].endswith('\n')
                      or cells.cell_len(lines[-1] + word.rstrip()) > width):
      lines.append('')
    lines[-1] += word
  return '\n'.join(line.strip() for line in lines)


def _wrapped(cell: str | Text, width: int) -> Text:
  """A name broken into lines of this width, with its style."""
  style = '' if isinstance(cell, str) else cell.style
  return Text(broken(escaping.printable(str(cell)), width), style=style)


def _shared(widths: Sequence[int], total: int) -> list[int]:
  """The widths of columns that must share `total`: the widest are made narrower."""
  least = max(widths, default=0)
  while least > 1 and sum(min(width, least) for width in widths) > total:
    least -= 1
  return [min(width, least) for width in widths]


def format_number(value: float | None, form: str = '.2f') -> str:
  """`value` in a format like ',.0f' or '.1%'; '-' if it is not known."""
  return '-' if value is None else format(value, form)
