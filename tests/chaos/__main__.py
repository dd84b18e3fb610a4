"""Kills, damages and counts: what happens to a study when things go wrong. By hand:

  python -m tests.chaos --kills=300 --flips=300 [--truncations=60] [--swaps=60] [--renames=30]
      [--minutes=90] [--results=FILE.jsonl] [--folder=FOLDER] [--seed=0]

Real processes are killed (kills.py), and files of a finished study are damaged (damage.py). Each
number is a total: what FILE.jsonl has already counts, so the same command continues. At the end it
prints what came of all of them. docs/reliability.md has the figures.
"""

import argparse
import collections
from collections.abc import Callable, Iterable, Mapping
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from typing import Any

import jax

from tests.chaos import damage, kills
from tests.chaos.workplace import Workplace

HARMS = {'flips': damage.flip, 'truncations': damage.truncate, 'swaps': damage.swap,
         'renames': damage.rename}


def main():
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for mode in ('kills', *HARMS):
    parser.add_argument(f'--{mode}', type=int, default=0)
  parser.add_argument('--minutes', type=float, default=float('inf'))
  parser.add_argument('--results')
  parser.add_argument('--folder')
  parser.add_argument('--seed', type=int, default=0)
  given = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  with contextlib.ExitStack() as stack:
    folder = given.folder or stack.enter_context(tempfile.TemporaryDirectory())
    results = given.results or os.path.join(folder, 'results.jsonl')
    workplace = Workplace(folder)
    jax.config.update('jax_compilation_cache_dir', os.path.join(workplace.folder, 'compiled'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    until = time.monotonic() + 60 * given.minutes

    def repeat(mode: str, wanted: int, once: Callable[[int, random.Random], dict[str, Any]]):
      while time.monotonic() < until:
        before = [each for each in _read(results) if each['mode'] == mode]
        if _count(before) >= wanted:
          return
        number = len(before)
        record = once(number, random.Random(f'{given.seed} {mode} {number}'))
        with open(results, 'a', encoding='utf-8') as file:
          file.write(json.dumps({'mode': mode, 'number': number, **record}) + '\n')
        if any(record.get(key) for key in ('problems', 'differences')) or (
            record.get('outcome') in damage.BAD):
          print(json.dumps(record, indent=1), file=sys.stderr, flush=True)

    repeat('kills', given.kills, lambda number, rng: kills.disturb(
        workplace, kills.STUDIES[number % len(kills.STUDIES)],
        os.path.join(workplace.folder, f'killed-{given.seed}-{number}'), rng))
    for mode, harm in HARMS.items():
      if getattr(given, mode):
        damaged = damage.Finished(workplace)
        repeat(mode, getattr(given, mode),
               lambda number, rng, damaged=damaged, harm=harm: damaged.trial(harm, rng))
    print(summary(_read(results)))


def _read(results: str) -> list[dict[str, Any]]:
  if not os.path.exists(results):
    return []
  with open(results, encoding='utf-8') as file:
    return [json.loads(line) for line in file]


def _count(records: Iterable[Mapping[str, Any]]) -> int:
  """How many kills, or how many trials of another kind."""
  return sum(len(each.get('kills', [None])) for each in records)


def summary(records: list[dict[str, Any]]) -> str:
  """What came of all trials, as tables in Markdown."""
  lines = []
  killed = [each for each in records if each['mode'] == 'kills']
  if killed:
    every = [kill for each in killed for kill in each['kills']]
    wrong = collections.Counter(_kind(each) for record in killed
                                for each in record['differences'] + record['problems'])
    equal = sum(not each['differences'] and not each['problems'] for each in killed)
    lines += [f'{len(every)} kills of {len(killed)} studies; {equal} ended like undisturbed ones',
              *(f'- {count} x {kind}' for kind, count in wrong.items()), '']
    lines += _table('stage', [(kill['stage'], ' '.join(kill['signals'])) for kill in every])
  for mode in HARMS:
    trials = [each for each in records if each['mode'] == mode]
    if trials:
      lines += ['', f'{len(trials)} {mode}', '']
      lines += _table('file', [(each['kind'], each['outcome']) for each in trials])
  return '\n'.join(lines)


def _kind(wrong: str) -> str:
  return ': '.join(wrong.split(': ')[:2 if wrong.startswith('export') else 1])


def _table(head: str, pairs: list[tuple[str, str]]) -> list[str]:
  """How often each pair occurs, as a table with sums."""
  counts = collections.Counter(pairs)
  columns = sorted({column for _, column in pairs})
  rows = list(dict.fromkeys(row for row, _ in pairs))
  lines = [[head, *columns, 'all'], ['--', *['--:'] * (len(columns) + 1)]]
  for row in [*rows, 'all']:
    found = [sum(counts[each, column] for each in (rows if row == 'all' else [row]))
             for column in columns]
    lines.append([row, *map(str, found), str(sum(found))])
  return [f'| {" | ".join(cells)} |' for cells in lines]


if __name__ == '__main__':
  main()
