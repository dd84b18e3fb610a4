"""Runs that differ in nothing but their names: often a rival that was copied and not changed."""

from collections.abc import Iterable, Iterator
import json

from btx_jax.run import Run
from btx_jax.study.changes import listed


def remarks(runs: Iterable[Run]) -> Iterator[str]:
  """A line for each set of trained runs with the same spec."""
  same: dict[tuple[str, str], list[str]] = {}
  for run in runs:
    if run.steps:
      spec = {key: value for key, value in run.spec().items() if key != 'name'}
      same.setdefault((run.series, json.dumps(spec, sort_keys=True)), []).append(run.name)
  for names in same.values():
    if len(names) > 1:
      yield (f'{listed(names)} differ only in their names, so they are one run with different '
             'random numbers. If one of them was meant to be another run, change it')
