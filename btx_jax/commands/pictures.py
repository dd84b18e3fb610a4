"""The pictures of the report. Each function draws one and returns its PNG."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from btx_jax import terminal
from btx_jax.commands import drawing

BEST = '#c8553d'
# For runs and experts in order; distinct for colour-blind readers too (Okabe and Ito).
COLORS = ('#4d4d4d', '#0072b2', '#009e73', '#e69f00', '#d55e00', '#cc79a7', '#56b4e9', '#a6761d')

_LABEL = 26  # characters in a line of a model's name


class Picture(NamedTuple):
  """A picture of the HTML page.

  Attributes:
    src: its PNG as a data URL.
    alt: its description for people who cannot see it.
  """
  src: str
  alt: str


# Saves a picture as a file, given its name without ending, its PNG and its description.
SavePicture = Callable[[str, bytes, str], Picture]


def color(index: int) -> str:
  """The colour of a run or expert, '#rrggbb'; colours repeat after the last."""
  return COLORS[index % len(COLORS)]


def differences(panels: Mapping[str, Sequence[Mapping]], names: Sequence[str], baseline: str
                ) -> bytes:
  """A panel for each domain and one for the mean: each model's difference from the baseline.

  Args:
    panels: see differences.panels; each has an entry for each name. A dark bar is one standard
      error to both sides; a light one is the spread over seeds.
    names: the names of the models.
    baseline: the name of the baseline, whose differences are 0.
  """
  write = drawing.Writer([*panels, *names])
  labels = [terminal.broken(write(name), _LABEL) for name in names]
  lines = max(label.count('\n') for label in labels) + 1
  columns = min(len(panels), 3 if len(panels) <= 6 else 4)
  figure, axes = drawing.panels(len(panels), columns, 0.75 + (0.07 + 0.13 * lines) * len(names),
                         left=0.15 + 0.07 * drawing.longest(labels), between=1.0, right=0.95,
                         width=7.5 if columns < 4 else 10.0)
  means = [entry['difference'] for entry in panels['mean']]
  better = np.argsort(means)[:-(-len(means) // 2)].tolist()
  for i, (axis, (panel, entries)) in enumerate(zip(axes, panels.items())):
    _draw_differences(axis, entries, names.index(baseline), better)
    axis.set_yticks(range(len(labels)), labels if i % columns == 0 else [''] * len(labels),
                    fontsize=8, **write.style)
    axis.set_title(write(panel), fontsize=9, **write.style)
  return drawing.png(figure)


def _draw_differences(axis, entries: Sequence[Mapping], baseline: int, better: Sequence[int]):
  """Draws a panel of `differences`; its range covers the models `better` and those near them."""
  values = [entry['difference'] for entry in entries]
  best = min(values)
  # A model that is far worse, like an expert on another domain, would leave the others no room.
  worst = max(0.0, *(values[at] for at in better), *(v for v in values if v < -best / 3))
  low = min(0.0, *(entry['difference'] - max(entry['error'] or 0.0, entry['spread'] or 0.0)
                   for entry in entries))
  margin = 0.08 * (worst - low) or 1.0
  for at, (value, entry) in enumerate(zip(values, entries)):
    is_far, color = value > worst, BEST if value == best else '#444444'
    for width, alpha, bar in ((4.0, 0.3, entry['spread']), (1.4, 1.0, entry['error'])):
      if bar and not is_far:
        axis.plot([value - bar, value + bar], [at, at], color=color, linewidth=width, alpha=alpha,
                  solid_capstyle='butt')
    axis.plot(worst + 1.5 * margin if is_far else value, at, marker='>' if is_far else 'o',
              color=color, markersize=3, clip_on=False,
              markerfacecolor='white' if at == baseline else color)
    error = f' ±{entry["error"]:.3f}' if entry['error'] else ''
    axis.text(1.04, at, '0' if at == baseline else f'{value:+.3f}{error}', fontsize=7,
              color=color, fontweight='bold' if value == best else 'normal', va='center',
              transform=axis.get_yaxis_transform())
  axis.axvline(0, color='#999999', linewidth=0.8, zorder=0)
  axis.set_ylim(len(entries) - 0.4, -0.6)
  axis.set_xlim(low - margin, worst + (2 if max(values) > worst else 1) * margin)
  axis.locator_params(axis='x', nbins=3)
  axis.grid(axis='y', color='#eeeeee', linewidth=0.8)
  axis.set_axisbelow(True)
  axis.spines[['left', 'right', 'top']].set_visible(False)
  axis.tick_params(left=False)


def curves(runs: Mapping[str, Mapping]) -> bytes:
  """Training loss of all runs by tokens and by FLOPs; each curve begins where its sources ended.

  Args:
    runs: name -> `tokens`, `flops` and `loss`, sequences of equal length. A loss of NaN ends one
      line and begins the next.
  """
  figure, axes = drawing.panels(2, 2, 3.0, legend=list(runs), above=0.1)
  for axis, by, unit in zip(axes, ('tokens', 'flops'), (' tokens', 'FLOP')):
    scale, prefix = drawing.scale([run[by] for run in runs.values()])
    for i, run in enumerate(runs.values()):
      axis.plot(np.asarray(run[by]) / scale, run['loss'], color=color(i), linewidth=1.2)
    axis.set_xlabel(f'{prefix}{unit}, all ancestors included')
    axis.set_ylabel('loss, nats per token')
  drawing.limits(axes, [run['loss'] for run in runs.values()])
  drawing.legend(figure, axes[0], list(runs))
  return drawing.png(figure)


def curves_by_domain(runs: Mapping[str, Mapping], domains: Sequence[str]) -> bytes:
  """Training loss by FLOPs, on the tokens of each domain alone.

  Args:
    runs: name -> `flops` and `loss_by_domain`, sequences of equal length.
    domains: a panel for each.
  """
  figure, axes = drawing.panels(len(domains), 2, 2.4, legend=list(runs))
  scale, prefix = drawing.scale([run['flops'] for run in runs.values()])
  write = drawing.Writer(domains)
  for axis, domain in zip(axes, domains):
    for i, run in enumerate(runs.values()):
      loss = [at.get(domain, np.nan) for at in run['loss_by_domain']]
      axis.plot(np.asarray(run['flops']) / scale, loss, color=color(i), linewidth=1.2)
    drawing.limits([axis], [[at[domain] for at in run['loss_by_domain'] if domain in at]
                     for run in runs.values()])
    axis.set_title(write(domain), fontsize=9, **write.style)
    axis.set_xlabel(f'{prefix}FLOP')
  drawing.legend(figure, axes[0], list(runs))
  return drawing.png(figure)


def experts(stages: Mapping[str, Mapping[str, Sequence]], names: Sequence[str]) -> bytes:
  """Mean gate of every expert in every layer: a heat map for each stage and domain.

  Args:
    stages: title -> domain -> gates [L][E].
    names: of the experts.
  """
  domains = list(next(iter(stages.values())))
  layers = len(next(iter(stages.values()))[domains[0]])
  write = drawing.Writer([*domains, *names])
  labels = [terminal.broken(write(name), _LABEL) for name in names]
  lines = max(label.count('\n') for label in labels) + 1
  columns = min(len(domains), 4)
  rows = -(-len(domains) // columns)
  left = 0.2 + 0.065 * drawing.longest(labels)
  figure, axes = drawing.panels(len(stages) * rows * columns, columns,
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
  return drawing.png(figure)


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
  figure, axes = drawing.panels(3, 3, 2.3, legend=names, between=0.6)
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
  drawing.legend(figure, axes[0], names)
  return drawing.png(figure)


def graph(runs: Mapping[str, Sequence[str]], notes: Mapping[str, str]) -> bytes:
  """The runs as a graph, each to the right of those it starts from.

  Args:
    runs: name -> names of the runs it starts from; sources come first.
    notes: name -> further lines of text in its box.
  """
  write = drawing.Writer([*runs, *notes.values()])
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
  figure, (axis,) = drawing.panels(1, 1, 0.2 + above + row * tallest, left=0.1, below=0.1,
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
  return drawing.png(figure)
