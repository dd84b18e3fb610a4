"""Layout, legends and fonts of the report's figures; fonts are chosen by the characters needed."""

from collections.abc import Iterable, Iterator, Sequence
import functools
import io
import itertools

import numpy as np

_DPI = 110


def panels(count: int, columns: int, height: float, left: float = 0.55,
            legend: Sequence[str] = (), width: float = 7.5, between: float = 0.45,
            below: float = 0.45, above: float = 0.3, right: float = 0.15):
  """A figure with a grid of axes.

  The layout is computed here, since matplotlib's layout engines take longer than drawing does.

  Args:
    count: the number of axes.
    columns: the number of columns.
    height: the height of a row in inches, labels included.
    left: inches for the labels of the first column.
    legend: the entries of the figure's legend.
    width: the width of the figure in inches.
    between: inches between columns.
    below, above: inches of `height` that are below and above the axis.
    right: inches to the right of the last column.

  Returns:
    The figure, and the list of its axes.
  """
  from matplotlib.figure import Figure  # imported late: it takes half a second
  legend_height = 0.22 * -(-len(legend) // _legend_columns(legend))
  rows = -(-count // columns)
  figure = Figure(figsize=(width, rows * height + legend_height + 0.05), dpi=_DPI)
  total = rows * height + legend_height + 0.05
  each = (width - left - right - between * (columns - 1)) / columns
  axes = []
  for i in range(count):
    row, column = divmod(i, columns)
    bottom = legend_height + (rows - 1 - row) * height
    axes.append(figure.add_axes((
        (left + column * (each + between)) / width, (bottom + below) / total,
        each / width, (height - below - above) / total)))
  for axis in axes:
    axis.spines[['top', 'right']].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.xaxis.label.set_fontsize(8)
    axis.yaxis.label.set_fontsize(8)
  return figure, axes


def scale(values: Sequence[Sequence[float]]) -> tuple[float, str]:
  """The unit that suits the largest value, as a factor and its SI prefix."""
  largest = max((max(v, default=0) for v in values), default=0)
  for scale, prefix in ((1e18, 'E'), (1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if largest >= scale:
      return scale, prefix
  return 1.0, ''


def limits(axes, losses: Sequence[Sequence[float]]):
  """Sets the range of the y-axes from the lowest loss to the 97th percentile.

  The first steps of a random model would leave no room for the rest.
  """
  flat = np.concatenate([np.asarray(loss, float) for loss in losses] or [np.zeros(1)])
  flat = flat[~np.isnan(flat)]
  if len(flat):
    low, high = flat.min(), np.quantile(flat, 0.97)
    margin = 0.05 * (high - low) or 0.5
    for axis in axes:
      axis.set_ylim(low - margin, high + margin)


def legend(figure, axis, names: Sequence[str]):
  """Draws a legend of the first lines of an axis, below all panels."""
  write = Writer(names)
  # The texts are set afterwards, since matplotlib leaves out labels that begin with '_'.
  legend = figure.legend(axis.get_lines()[:len(names)], ['-'] * len(names), loc='lower center',
                         ncol=_legend_columns(names), fontsize=8, frameon=False)
  for text, name in zip(legend.get_texts(), names):
    text.set(text=write(name), **write.style)


def _legend_columns(names: Sequence[str]) -> int:
  """How many columns of a legend fit a figure 7.5 inches wide."""
  return max(1, min(4, int(7.5 / (0.6 + 0.065 * longest(names)))))


def longest(texts: Sequence[str]) -> int:
  """The number of characters in the longest line."""
  return max((len(line) for text in texts for line in text.split('\n')), default=0)


class Writer:
  """Makes names drawable: unchanged, in fonts that have their characters, or escaped.

  Attributes:
    style: properties of a matplotlib text that shows names.
  """

  def __init__(self, names: Iterable[str]):
    from matplotlib import font_manager
    needed = {character for name in names for character in name if character.isprintable()}
    families, self._drawn = [], set()
    default = font_manager.findfont(font_manager.FontProperties())
    for family, path in itertools.chain([('sans-serif', default)], fallbacks(default)):
      if not needed - self._drawn:
        break
      if has := characters(path) & (needed - self._drawn):
        self._drawn |= has
        families.append(family)
    self.style = {'parse_math': False, 'fontfamily': families or ['sans-serif']}

  def __call__(self, name: str) -> str:
    """The name, with characters that no font has as escapes: '\\u65e5'."""
    return ''.join(character if character in self._drawn else
                   character.encode('unicode_escape').decode() for character in name)


def fallbacks(default: str) -> Iterator[tuple[str, str]]:
  """The family and file of each other upright font that is installed.

  Last Resort, which comes with matplotlib, draws a box for any character, so it is left out.
  """
  from matplotlib import font_manager
  fonts = {font.name: font.fname for font in font_manager.fontManager.ttflist
           if font.style == 'normal' and font.weight == 400 and font.fname != default
           and 'lastresort' not in font.name.replace(' ', '').lower()}
  yield from sorted(fonts.items())


@functools.lru_cache(maxsize=64)
def characters(path: str) -> frozenset[str]:
  """The characters that a font file has; none if it cannot be read."""
  from matplotlib import font_manager
  try:
    return frozenset(map(chr, font_manager.get_font(path).get_charmap()))
  except (OSError, RuntimeError, ValueError):
    return frozenset()


def png(figure) -> bytes:
  out = io.BytesIO()
  figure.savefig(out, format='png')
  return out.getvalue()
