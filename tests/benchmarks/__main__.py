"""Our speed beside that of others, in one command, by turns.

  python -m tests.benchmarks [ROW ...] [--reference=PYTHON] [--turns=7] [--json=FILE]

ROW is dense, mixture, tokenizing or mixing; without one all but the last are taken. PYTHON belongs
to an environment with torch and transformers, against which steps are compared; without it only our
figures and the matmul peak are. Both sides run at once and take turns, a call each, on the
processors that this process may use (see taskset). mixing needs 35 GB in --folder.

Prints medians, and the medians of the ratios of each turn: above 1, we are faster. CPU seconds
stand beside seconds, because other work on the machine changes them less. --quick takes tiny sizes,
and says nothing about speed.
"""

import argparse
from collections.abc import Sequence
import contextlib
import json
import os
import pathlib
import platform
import statistics
import sys
from typing import Any

from tests.benchmarks import mixing, our_side, sides, sizes
from tests.benchmarks.sides import Cost

STEPS = ('dense', 'mixture')
DEFAULT, ROWS = (*STEPS, 'tokenizing'), (*STEPS, 'tokenizing', 'mixing')


def our_calls(row: str, dtypes: Sequence[str]) -> list[str]:
  """The calls of our side, see our_side.py."""
  if row == 'tokenizing':
    return ['tokenizing', 'tokenizer alone']
  kinds = {'dense': ('dense', 'matmul', 'products'), 'mixture': ('mixture', 'equal')}[row]
  return [f'{kind} {dtype}' for kind in kinds for dtype in dtypes]


def reference_calls(row: str, dtypes: Sequence[str]) -> list[str]:
  """The calls of the reference, see reference_side.py."""
  if row == 'tokenizing':
    return []
  if row == 'dense':
    return our_calls(row, dtypes)
  return [f'mixture {dtype} {experts}' for dtype in dtypes for experts in sizes.EXPERTS]


def machine() -> dict[str, Any]:
  """The processor, and how much of it this process may use."""
  with contextlib.suppress(OSError):
    for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
      if line.startswith('model name'):
        name = line.split(':')[1].strip()
        break
    else:
      name = platform.processor()
    return {'processor': name, 'cores': len(os.sched_getaffinity(0)), 'load': os.getloadavg()[0]}
  return {'processor': platform.processor(), 'cores': os.cpu_count()}


def median(costs: list[Cost]) -> Cost:
  return Cost(*map(statistics.median, zip(*costs, strict=True)))


def best(costs: dict[str, list[Cost]], prefix: str) -> str:
  """The fastest of the calls whose names begin so, by CPU seconds."""
  return min((name for name in costs if name.startswith(prefix)),
             key=lambda name: median(costs[name]).cpu_seconds)


def ratio(costs: dict[str, list[Cost]], ours: str, theirs: str) -> Cost:
  """How many times as long as ours theirs takes: the median over turns."""
  return median([Cost(*(b / max(a, 1e-9) for a, b in zip(*turn, strict=True)))
                 for turn in zip(costs[ours], costs[theirs], strict=True)])


def compared(costs: dict[str, list[Cost]], measured: sizes.Sizes) -> dict[str, tuple[Cost, str]]:
  """The rows of the table: title -> the ratio, and what it is of."""
  rows = {}

  def add(title, ours, theirs):
    if any(name.startswith(ours) for name in costs) and any(
        name.startswith(theirs) for name in costs):
      ours, theirs = best(costs, ours), best(costs, theirs)
      rows[title] = ratio(costs, ours, theirs), f'{ours} against {theirs}'

  add('dense step, best dtype', 'ours dense', 'reference dense')
  for dtype in measured.dtypes:
    add(f'dense step, {dtype}', f'ours dense {dtype}', f'reference dense {dtype}')
    add(f'matmul, {dtype}', f'ours matmul {dtype}', f'reference matmul {dtype}')
    add(f'matmuls of the dense step alone, {dtype}', f'ours products {dtype}',
        f'reference products {dtype}')
  add('mixture step, best dtype', 'ours mixture', 'reference mixture')
  for dtype in measured.dtypes:
    add(f'mixture step, {dtype}', f'ours mixture {dtype}', f'reference mixture {dtype}')
    add(f'mixture step against dense of equal FLOPs, {dtype}', f'ours mixture {dtype}',
        f'ours equal {dtype}')
  add('tokenizing', 'ours tokenizing', 'ours tokenizer alone')
  add('mixing', 'mixing ours', 'mixing cp')
  for owner in ('ours', 'reference'):
    for dtype in measured.dtypes:
      step, alone = f'{owner} dense {dtype}', f'{owner} products {dtype}'
      if step in costs and alone in costs:
        rows[f'share of the matmuls alone, {step}'] = (
            ratio(costs, step, alone), f'{alone} in {step}')
  flops = our_side.step_flops(measured, 'dense')
  for dtype in measured.dtypes:
    if f'ours dense {dtype}' in costs:
      peak = best(costs, f'ours matmul {dtype}')
      scale = flops / measured.matmul_flops  # matmuls of the peak that make a step
      rows[f'share of the matmul peak, dense {dtype}'] = (
          Cost(*(scale * x for x in ratio(costs, f'ours dense {dtype}', peak))),
          f'{peak}: {measured.matmul_flops / median(costs[peak]).seconds / 1e9:.0f} GFLOP/s')
  return rows


def take(asked: argparse.Namespace, measured: sizes.Sizes):
  """The costs of each call, and versions by library."""
  costs, versions = {}, {'python': platform.python_version()}
  rows = [row for row in asked.rows if row != 'mixing']
  with contextlib.ExitStack() as stack:
    start = lambda python, name: stack.enter_context(
        sides.Side(python, f'tests.benchmarks.{name}', measured.write()))
    started = {'ours': (start(sys.executable, 'our_side'), our_calls)} if rows else {}
    if asked.reference and rows:
      started['reference'] = start(asked.reference, 'reference_side'), reference_calls
    for side, _ in started.values():
      versions |= side.versions
    for row in rows:
      calls = {f'{owner} {name}': lambda side=side, name=name: side.call(name)
               for owner, (side, names) in started.items() for name in names(row, measured.dtypes)}
      costs |= sides.take_turns(calls, asked.turns)
  if 'mixing' in asked.rows:
    costs |= mixing.beside_cp(pathlib.Path(asked.folder), asked.turns)
  return costs, versions


def main(arguments=None):
  parser = argparse.ArgumentParser(
      prog='python -m tests.benchmarks', description=__doc__.split('\n')[0])
  parser.add_argument('rows', nargs='*', help=', '.join(ROWS))
  parser.add_argument('--reference', help='the Python of an environment with torch, transformers')
  parser.add_argument('--turns', type=int, default=7)
  parser.add_argument('--json', help='file for all figures')
  parser.add_argument('--folder', help='of mixing')
  parser.add_argument('--quick', action='store_true', help='tiny sizes, one turn')
  asked = parser.parse_args(arguments)
  asked.rows = asked.rows or list(DEFAULT)
  if wrong := sorted(set(asked.rows) - set(ROWS)):
    parser.error(f'{wrong[0]!r} is not a row; rows are {", ".join(ROWS)}')
  if 'mixing' in asked.rows and not asked.folder:
    parser.error('mixing needs --folder, a folder with 35 GB to spare')
  measured = sizes.Sizes()
  if asked.quick:
    measured, asked.turns = sizes.QUICK, 1
  costs, versions = take(asked, measured)
  rows = compared(costs, measured)
  about = machine()
  print(', '.join(f'{name} {value}' for name, value in (about | versions).items()))
  print(f'\n{"call, median":44} {"seconds":>10} {"CPU s":>10}')
  for name, taken in costs.items():
    print(f'{name:44} {median(taken).seconds:10.4f} {median(taken).cpu_seconds:10.4f}')
  print(f'\n{"ratio, above 1 we are faster":58} {"seconds":>8} {"CPU s":>8}')
  for title, (found, of) in rows.items():
    print(f'{title:58} {found.seconds:8.2f} {found.cpu_seconds:8.2f}  {of}')
  if asked.json:
    pathlib.Path(asked.json).write_text(json.dumps({
        'machine': about, 'versions': versions, 'turns': asked.turns,
        'ratios': {title: found._asdict() | {'of': of} for title, (found, of) in rows.items()},
        'calls': {name: [cost._asdict() for cost in taken] for name, taken in costs.items()},
    }, indent=1))


if __name__ == '__main__':
  main()
