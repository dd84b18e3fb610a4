"""The report's pictures of several mixtures at once: what each costs and gains, and how it routes.

Each function draws one and returns its PNG.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from btx_jax import terminal
from btx_jax.commands import drawing, pictures
from btx_jax.scoring.decomposition import COSTS

_LABEL = 26  # characters in a line of a mixture's name
_COLORS = dict(zip(COSTS, ('#d55e00', '#e69f00', '#009e73')))
_LEGEND = ('averaging', 'routing', 'finetune')


def decomposition(panels: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> bytes:
  """A panel for each domain and one for the mean: from the own expert's score to the mixture's.

  For each mixture, an open circle is the score of the domain's own expert, and a full one the last
  score of the mixture. Three bars lead from one to the other: averaging, routing, the finetune.

  Args:
    panels: domain, or 'mean' -> name of a mixture -> its scores, see decomposition.SCORES. The
      mixtures of all panels are the same; what was not measured is not drawn.
  """
  names = list(next(iter(panels.values())))
  write = drawing.Writer([*panels, *names])
  labels = [terminal.broken(write(name), _LABEL) for name in names]
  lines = max(label.count('\n') for label in labels) + 1
  columns = min(len(panels), 3)
  figure, axes = drawing.panels(
      len(panels), columns, 0.75 + (0.22 + 0.13 * lines) * len(names), legend=_LEGEND,
      left=0.15 + 0.07 * drawing.longest(labels), between=0.2)
  for i, (axis, (panel, mixtures)) in enumerate(zip(axes, panels.items())):
    for color in _COLORS.values():
      axis.plot([], [], color=color, linewidth=5)  # for the legend
    for row, scores in enumerate(mixtures.values()):
      _draw_parts(axis, row, scores)
    axis.set_yticks(range(len(labels)), labels if i % columns == 0 else [''] * len(labels),
                    fontsize=8, **write.style)
    axis.set_title(write(panel), fontsize=9, **write.style)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.use_sticky_edges = False  # else a bar that ends at the edge would cut its circle
    axis.margins(x=0.06)
    axis.locator_params(axis='x', nbins=4)
    axis.grid(axis='x', color='#eeeeee', linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines['left'].set_visible(False)
    axis.tick_params(left=False)
  drawing.legend(figure, axes[0], _LEGEND)
  return drawing.png(figure)


def _draw_parts(axis, row: int, scores: Mapping[str, float | None]):
  """The bars and circles of one mixture."""
  for at, (cost, ends) in enumerate(COSTS.items()):
    end, begin = (scores[kind] for kind in ends)
    if begin is not None and end is not None:
      axis.barh(row + 0.2 * (at - 1), end - begin, left=begin, height=0.18, color=_COLORS[cost])
  last = next((scores[kind] for kind in ('final', 'start') if scores[kind] is not None), None)
  for at, score, face in ((-0.2, scores['own'], 'white'), (0.2, last, '#444444')):
    if score is not None:
      axis.plot(score, row + at, marker='o', markersize=4, color='#444444', markerfacecolor=face)


def choices(mixtures: Mapping[str, Mapping[str, Sequence]], experts: Mapping[str, Sequence[str]]
            ) -> bytes:
  """Which experts are the first choice: a row for each mixture, a column for each domain.

  In each panel the shares of the experts are stacked over the layers, as in the paper's figures 3
  to 6.

  Args:
    mixtures: title -> domain -> shares [L][E]. All have the same domains.
    experts: title -> the names of the mixture's experts. Experts of one name have one colour.
  """
  domains = list(next(iter(mixtures.values())))
  names = list(dict.fromkeys(name for each in experts.values() for name in each))
  write = drawing.Writer([*domains, *mixtures])
  columns = len(domains)
  figure, axes = drawing.panels(
      len(mixtures) * columns, columns, 1.4, legend=names, between=0.15, left=0.35, above=0.45,
      below=0.25, width=max(7.5, 1.4 * columns))
  for i, (axis, (title, domain)) in enumerate(zip(axes, (
      (title, domain) for title in mixtures for domain in domains))):
    for at in range(len(names)):
      axis.plot([], [], color=pictures.color(at), linewidth=5)  # for the legend
    shares_LE = np.asarray(mixtures[title][domain])
    below_L = np.zeros(len(shares_LE))
    for name, share_L in zip(experts[title], shares_LE.T):
      axis.bar(range(len(shares_LE)), share_L, bottom=below_L, width=0.92,
               color=pictures.color(names.index(name)), edgecolor='white', linewidth=0.3)
      below_L += share_L
    axis.set_ylim(0, 1)
    axis.set_xlim(-0.6, len(shares_LE) - 0.4)
    axis.set_yticks([0, 0.5, 1], ['0', '', '1'] if i % columns == 0 else [''] * 3)
    axis.set_xticks(range(len(shares_LE)) if len(shares_LE) <= 12 else range(0, len(shares_LE), 4))
    axis.tick_params(length=0, labelsize=7)
    axis.spines[['left', 'bottom']].set_visible(False)
    axis.set_title(write(domain), fontsize=8, **write.style)
    if i % columns == 0:
      axis.text(0, 1.32, write(title), transform=axis.transAxes, fontsize=8, fontweight='bold',
                **write.style)
  drawing.legend(figure, axes[0], names)
  return drawing.png(figure)
