"""The pictures of the report. Each function draws one and returns its PNG."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import functools
import io
import itertools

import numpy as np

from btx_jax import terminal

BEST = '#c8553d'
# For runs and experts in order; distinct for colour-blind readers too (Okabe and Ito).
COLORS = ('#4d4d4d', '#0072b2', '#009e73', '#e69f00', '#d55e00', '#cc79a7', '#56b4e9', '#a6761d')

_DPI = 110
_LABEL = 26  # characters in a line of a model's name


def color(index: int) -> str:
  """The colour of a run or expert, '#rrggbb'; colours repeat after the last."""
  return COLORS[index % len(COLORS)]


def differences(panels: Mapping[str, Sequence[Mapping]], names: Sequence[str], baseline: str
                ) -> bytes:
  """A panel for each domain and one for the mean: each model's difference from the baseline.

  Args:
    panels: see differences.panels; each has an entry for each name. A dark bar is one standard
      error to both sides; a light one is the spread over seeds.
    names: of the models.
    baseline: the name of the one with differences of 0.
  """
  write = _Writer([*panels, *names])
  labels = [terminal.broken(write(name), _LABEL) for name in names]
  lines = max(label.count('\n') for label in labels) + 1
  columns = min(len(panels), 3 if len(panels) <= 6 else 4)
  figure, axes = _panels(len(panels), columns, 0.75 + (0.07 + 0.13 * lines) * len(names),
                         left=0.15 + 0.07 * _longest(labels), between=1.0, right=0.95,
                         width=7.5 if columns < 4 else 10.0)
  means = [entry['difference'] for entry in panels['mean']]
  better = np.argsort(means)[:-(-len(means) // 2)]
  for i, (axis, (panel, entries)) in enumerate(zip(axes, panels.items())):
    values = [entry['difference'] for entry in entries]
    best = min(values)
    # A model that is far worse, like an expert on another domain, leaves the others no room.
    worst = max(0.0, *(values[at] for at in better))
    margin = 0.08 * (worst - min(0.0, best)) or 1.0
    for at, (name, entry) in enumerate(zip(names, entries)):
      value, shown = entry['difference'], entry['difference']
      if value > worst:
        shown = worst + 1.5 * margin
      tint = BEST if value == best else '#444444'
      for width, bar in ((4.0, entry['spread']), (1.4, entry['error'])):
        if bar and shown == value:
          axis.plot([value - bar, value + bar], [at, at], color=tint, linewidth=width,
                    alpha=0.3 if width > 2 else 1.0, solid_capstyle='butt')
      marker = 'o' if shown == value else '>'
      axis.plot(shown, at, marker=marker, color=tint, markersize=3, clip_on=False,
                markerfacecolor='white' if name == baseline else tint)
      error = f' ±{entry["error"]:.3f}' if entry['error'] else ''
      axis.text(1.04, at, f'{value:+.3f}{error}' if name != baseline else '0', fontsize=7,
                va='center',
                transform=axis.get_yaxis_transform(), color=tint,
                fontweight='bold' if value == best else 'normal')
    axis.axvline(0, color='#999999', linewidth=0.8, zorder=0)
    axis.set_yticks(range(len(labels)), labels if i % columns == 0 else [''] * len(labels),
                    fontsize=8, **write.style)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.set_xlim(min(0.0, best) - margin, worst + (2 if max(values) > worst else 1) * margin)
    axis.locator_params(axis='x', nbins=3)
    axis.grid(axis='y', color='#eeeeee', linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_title(write(panel), fontsize=9, **write.style)
    axis.spines[['left', 'right', 'top']].set_visible(False)
    axis.tick_params(left=False)
  return _png(figure)


def curves(runs: Mapping[str, Mapping]) -> bytes:
  """Training loss of all runs by tokens and by FLOPs; each curve begins where its sources ended.

  Args:
    runs: name -> `tokens`, `flops` and `loss`, sequences of equal length. A loss of NaN ends one
      line and begins the next.
  """
  figure, axes = _panels(2, 2, 3.0, legend=list(runs), above=0.1)
  for axis, by, unit in zip(axes, ('tokens', 'flops'), (' tokens', 'FLOP')):
    scale, prefix = _scale([run[by] for run in runs.values()])
    for i, run in enumerate(runs.values()):
      axis.plot(np.asarray(run[by]) / scale, run['loss'], color=color(i), linewidth=1.2)
    axis.set_xlabel(f'{prefix}{unit}, all ancestors included')
    axis.set_ylabel('loss, nats per token')
  _limits(axes, [run['loss'] for run in runs.values()])
  _legend(figure, axes[0], list(runs))
  return _png(figure)


def curves_by_domain(runs: Mapping[str, Mapping], domains: Sequence[str]) -> bytes:
  """Training loss by FLOPs, on the tokens of each domain alone.

  Args:
    runs: name -> `flops` and `loss_by_domain`, sequences of equal length.
    domains: a panel for each.
  """
  figure, axes = _panels(len(domains), 2, 2.4, legend=list(runs))
  scale, prefix = _scale([run['flops'] for run in runs.values()])
  write = _Writer(domains)
  for axis, domain in zip(axes, domains):
    for i, run in enumerate(runs.values()):
      loss = [at.get(domain, np.nan) for at in run['loss_by_domain']]
      axis.plot(np.asarray(run['flops']) / scale, loss, color=color(i), linewidth=1.2)
    _limits([axis], [[at[domain] for at in run['loss_by_domain'] if domain in at]
                     for run in runs.values()])
    axis.set_title(write(domain), fontsize=9, **write.style)
    axis.set_xlabel(f'{prefix}FLOP')
  _legend(figure, axes[0], list(runs))
  return _png(figure)


def experts(stages: Mapping[str, Mapping[str, Sequence]], names: Sequence[str]) -> bytes:
  """Mean gate of every expert in every layer: a heat map for each stage and domain.

  Args:
    stages: title -> domain -> gates [L][E].
    names: of the experts.
  """
  domains = list(next(iter(stages.values())))
  layers = len(next(iter(stages.values()))[domains[0]])
  write = _Writer([*domains, *names])
  labels = [terminal.broken(write(name), _LABEL) for name in names]
  lines = max(label.count('\n') for label in labels) + 1
  columns = min(len(domains), 4)
  rows = -(-len(domains) // columns)
  left = 0.2 + 0.065 * _longest(labels)
  figure, axes = _panels(len(stages) * rows * columns, columns,
                         0.75 + (0.08 + 0.13 * lines) * len(names), left=left, between=0.12)
  for stage, (title, by_domain) in enumerate(stages.items()):
    of_stage = axes[stage * rows * columns:(stage + 1) * rows * columns]
    for unused in of_stage[len(domains):]:
      unused.set_visible(False)
    for i, (axis, (domain, gates)) in enumerate(zip(of_stage, by_domain.items())):
      gates_EL = np.asarray(gates).T
      axis.imshow(gates_EL, vmin=0, vmax=1, cmap='Blues', aspect='auto')
      if (7.5 - left) / columns / layers > 0.24:  # inches of a cell
        for (expert, layer), gate in np.ndenumerate(gates_EL):
          axis.text(layer, expert, f'{gate:.2f}'.lstrip('0'), ha='center', va='center', fontsize=7,
                    color='white' if gate > 0.6 else 'black')
      axis.set_title(f'{write(domain)}\n{title}', fontsize=8, **write.style)
      axis.set_yticks(range(len(labels)), labels if i % columns == 0 else [''] * len(labels),
                      fontsize=7, **write.style)
      axis.set_xticks(range(layers) if layers <= 12 else range(0, layers, 4))
      axis.set_xlabel('layer')
      axis.tick_params(length=0, labelsize=7)
  return _png(figure)


def load(steps: Sequence[int], load_SLE: np.ndarray, information_SL: np.ndarray,
         entropy_SL: np.ndarray, names: Sequence[str]) -> bytes:
  """The load of each expert, mutual information and router entropy over the training steps.

  Args:
    steps: [S].
    load_SLE: each expert's share of the routing choices.
    information_SL: mutual information of domain and expert, in bits.
    entropy_SL: of the router's softmax, in nats.
    names: of the experts.
  """
  names = [f'{i} {name}' for i, name in enumerate(names)]
  figure, axes = _panels(3, 3, 2.3, legend=names, between=0.6)
  for i in range(len(names)):
    share = load_SLE[:, :, i]
    axes[0].plot(steps, share.mean(1), color=color(i), linewidth=1.2)
    axes[0].fill_between(steps, share.min(1), share.max(1), color=color(i), alpha=0.15,
                         linewidth=0)
  axes[0].axhline(1 / len(names), color='black', linewidth=0.6, linestyle=':')
  for axis, by_layer in zip(axes[1:], (information_SL, entropy_SL)):
    axis.plot(steps, by_layer.mean(1), color='black', linewidth=1.2)
    axis.fill_between(steps, by_layer.min(1), by_layer.max(1), color='black', alpha=0.15,
                      linewidth=0)
  for axis, title in zip(axes, ('load: share of choices', 'mutual information, bits',
                                'router entropy, nats')):
    axis.set_ylim(0)
    axis.set_title(title, fontsize=9)
    axis.set_xlabel('step')
  _legend(figure, axes[0], names)
  return _png(figure)


def graph(runs: Mapping[str, Sequence[str]], notes: Mapping[str, str]) -> bytes:
  """The runs as a graph, each to the right of those it starts from.

  Args:
    runs: name -> names of the runs it starts from; sources come first.
    notes: name -> further lines of text in its box.
  """
  write = _Writer([*runs, *notes.values()])
  depth: dict[str, int] = {}
  for name, sources in runs.items():
    depth[name] = 1 + max((depth[source] for source in sources), default=-1)
  columns = [[name for name in runs if depth[name] == d] for d in range(max(depth.values()) + 1)]
  tallest = max(map(len, columns))
  place = {name: (d, tallest / 2 - (i + 0.5) * tallest / len(column))
           for d, column in enumerate(columns) for i, name in enumerate(column)}
  row, skips = 0.72, any(depth[name] - depth[source] > 1
                         for name, sources in runs.items() for source in sources)
  above = 0.4 * skips  # for arrows that pass over a column of runs
  figure, (axis,) = _panels(1, 1, 0.2 + above + row * tallest, left=0.1, below=0.1,
                            above=0.1 + above)
  axis.axis('off')
  axis.set_xlim(-0.45, len(columns) - 0.55)
  axis.set_ylim(-tallest / 2 - 0.1, tallest / 2 + 0.1)
  for name, sources in runs.items():
    for source in dict.fromkeys(sources):
      # An arrow that skips a column rises by swing * length / 2, above the tallest column.
      length = (depth[name] - depth[source]) * 7.25 / (len(columns) - 0.1)
      swing = -(row * tallest + above) / length if depth[name] - depth[source] > 1 else 0.0
      axis.annotate('', place[name], place[source], arrowprops={
          'arrowstyle': '-|>', 'color': '#999999', 'shrinkA': 42, 'shrinkB': 46,
          'connectionstyle': f'arc3,rad={swing}'})
  for i, (name, (x, y)) in enumerate(place.items()):
    axis.text(x, y, f'{write(name)}\n{notes[name]}', ha='center', va='center', fontsize=8, bbox={
        'boxstyle': 'round,pad=0.5', 'facecolor': 'white', 'edgecolor': color(i),
        'linewidth': 1.5}, **write.style)
  return _png(figure)


def _panels(count: int, columns: int, height: float, left: float = 0.55,
            legend: Sequence[str] = (), width: float = 7.5, between: float = 0.45,
            below: float = 0.45, above: float = 0.3, right: float = 0.15):
  """A figure with a grid of axes.

  The layout is computed here, since matplotlib's layout engines take longer than all the drawing.

  Args:
    count: number of axes.
    columns: of the grid.
    height: of a row in inches, labels included.
    left: inches for the labels of the first column.
    legend: the entries of the figure's legend.
    width: of the figure in inches.
    between: inches between columns.
    below, above: inches of `height` that are below and above the axis.
    right: inches beside the last column.

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


def _scale(values: Sequence[Sequence[float]]) -> tuple[float, str]:
  """The unit that suits the largest value, and its SI prefix."""
  largest = max((max(v, default=0) for v in values), default=0)
  for scale, prefix in ((1e18, 'E'), (1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if largest >= scale:
      return scale, prefix
  return 1.0, ''


def _limits(axes, losses: Sequence[Sequence[float]]):
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


def _legend(figure, axis, names: Sequence[str]):
  """A legend of the first lines of an axis, below all panels."""
  write = _Writer(names)
  # The texts are set afterwards, since a label that begins with '_' is left out.
  legend = figure.legend(axis.get_lines()[:len(names)], ['-'] * len(names), loc='lower center',
                         ncol=_legend_columns(names), fontsize=8, frameon=False)
  for text, name in zip(legend.get_texts(), names):
    text.set(text=write(name), **write.style)


def _legend_columns(names: Sequence[str]) -> int:
  """How many columns of a legend fit a figure 7.5 inches wide."""
  return max(1, min(4, int(7.5 / (0.6 + 0.065 * _longest(names)))))


def _longest(texts: Sequence[str]) -> int:
  """The characters of the longest line."""
  return max((len(line) for text in texts for line in text.split('\n')), default=0)


class _Writer:
  """Makes names drawable: as they are, in a font that has their characters.

  Attributes:
    style: properties of a matplotlib text that shows names.
  """

  def __init__(self, names: Iterable[str]):
    from matplotlib import font_manager
    needed = {character for name in names for character in name if character.isprintable()}
    families, self._drawn = [], set()
    default = font_manager.findfont(font_manager.FontProperties())
    for family, path in itertools.chain([('sans-serif', default)], _fallbacks(default)):
      if not needed - self._drawn:
        break
      if has := _characters(path) & (needed - self._drawn):
        self._drawn |= has
        families.append(family)
    self.style = {'parse_math': False, 'fontfamily': families or ['sans-serif']}

  def __call__(self, name: str) -> str:
    """The name, with characters that no font has as escapes: '\\u65e5'."""
    return ''.join(character if character in self._drawn else
                   character.encode('unicode_escape').decode() for character in name)


def _fallbacks(default: str) -> Iterator[tuple[str, str]]:
  """The family and file of the other upright fonts that are installed.

  Last Resort, which comes with matplotlib, draws a box for any character, so it is none of them.
  """
  from matplotlib import font_manager
  fonts = {font.name: font.fname for font in font_manager.fontManager.ttflist
           if font.style == 'normal' and font.weight == 400 and font.fname != default
           and 'lastresort' not in font.name.replace(' ', '').lower()}
  yield from sorted(fonts.items())


@functools.lru_cache(maxsize=64)
def _characters(path: str) -> frozenset[str]:
  """The characters that a font file has; none if it cannot be read."""
  from matplotlib import font_manager
  try:
    return frozenset(map(chr, font_manager.get_font(path).get_charmap()))
  except (OSError, RuntimeError, ValueError):
    return frozenset()


def _png(figure) -> bytes:
  out = io.BytesIO()
  figure.savefig(out, format='png')
  return out.getvalue()
