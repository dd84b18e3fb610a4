"""WORKDIR/report: the comparison as report.json and as one picture."""

import json
import os

from btx_jax.evaluate import table as table_lib
from btx_jax.files import replacing


def write(folder: str, config_name: str, table: list[table_lib.Row], checks: list[dict]) -> str:
  """Writes report.json and bits_per_byte.png; returns the folder."""
  os.makedirs(folder, exist_ok=True)
  path = os.path.join(folder, 'report.json')
  with replacing(path) as file:
    json.dump({'config': config_name, 'rows': table, 'checks': checks}, file, indent=1)
  _picture(os.path.join(folder, 'bits_per_byte.png'), table)
  return folder


def _picture(path: str, table: list[table_lib.Row]):
  """One panel a domain and one for the mean, a bar for each model."""
  from matplotlib.figure import Figure  # imported late: it takes a second
  panels = {domain: [row['bits_per_byte'][domain] for row in table]
            for domain in table[0]['bits_per_byte']}
  panels['mean'] = [row['mean'] for row in table]
  names = [row['name'] for row in table]
  figure = Figure(figsize=(2.2 + 1.9 * len(panels), 1.2 + 0.3 * len(table)), dpi=130,
                  layout='constrained')
  axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
  for axis, (panel, values) in zip(axes, panels.items()):
    best = min(values)
    bars = axis.barh(names, values, color=['#c8553d' if v == best else '#8fa3bf' for v in values])
    axis.bar_label(bars, fmt='%.2f', padding=2, fontsize=8)
    axis.set_title(panel, fontsize=10)
    axis.set_xlim(0, 1.22 * max(values))
    axis.spines[['top', 'right', 'bottom']].set_visible(False)
    axis.tick_params(axis='x', bottom=False, labelbottom=False)
    axis.tick_params(axis='y', labelsize=8)
  axes[0].invert_yaxis()
  figure.suptitle('Bits per byte on held-out text (less is better; the best is red)', fontsize=10)
  figure.savefig(path)
