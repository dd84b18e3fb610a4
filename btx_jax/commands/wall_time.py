"""The command `wall_time`: how long each form of a study takes on several machines, on paper.

A row is a run that no other starts from, with all that it descends from. What all rows begin with
(the seed) is left out. Step times are those that runs in the working directory have measured; a
"machine" is what they were trained on.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
import json
import math
import statistics
from typing import Any, NamedTuple

from btx_jax.errors import UsageError, nearest
from btx_jax.run import Run, lineage, lineage_of
from btx_jax.study import wall_time
from btx_jax.study.study import Study
from btx_jax.study.wall_time import Branches, Form, Training
from btx_jax.terminal import Table, show
from btx_jax.training import metrics

_GBIT = 1e9 / 8  # bytes per second
_SAME = 0.01  # a relative difference of FLOPs up to which two rows are compared
_SYNCHRONOUS = 'synchronous'
_UNITS = ((86400, 'days'), (3600, 'h'), (60, 'min'), (1, 's'))


class Row(NamedTuple):
  """A way to train a model.

  Attributes:
    name: of its last run.
    kind: what happens on the machines, in words.
    form: its stages, without those that all rows share.
    flops: the model FLOPs that these stages take.
  """
  name: str
  kind: str
  form: Form
  flops: float


def print_wall_times(study: Study, machines: int, links: Sequence[float], name: str = '',
                     baseline: str = '', as_json: bool = False):
  """Prints the times of all rows, or of a run and the baseline alone.

  Args:
    study: the study; some of its runs have metrics.
    machines: W.
    links: Gbit/s, each way.
    name: of a run; '' means all.
    baseline: the row that the others' break-even links are with; '' means the first that is trained
      by all machines together.
    as_json: whether to print JSON.

  Raises:
    UsageError: no step has been timed, or the machines do not suit the runs; or a name is unknown.
  """
  used = {source.name for run in study.runs.values() for source in run.sources}
  ends = {run.plain_name: run for run in study.of_series(study.series[0]) if run.name not in used}
  for given, flag in ((name, 'run'), (baseline, 'baseline')):
    if given and given not in ends:
      raise UsageError(f'--{flag}={given} is not a row of wall_time, a run that no other starts '
                       f'from; {nearest(given, ends)}')
  for run in ends.values():
    if not name or run.plain_name in (name, baseline):
      _check_workers(run, machines)
  rows, missing, shared = _rows(ends.values(), _step_seconds(study))
  base = next((row for row in rows if row.name == baseline or (
      not baseline and row.kind == _SYNCHRONOUS)), None)
  if not rows or {name, baseline} & set(missing):
    raise UsageError('wall_time needs measured step times, and some are missing in '
                     f'{study.workdir}, for {", ".join(missing)}. Train what they consist of '
                     'first, for two steps or more.')
  found = _as_data([row for row in rows if not name or row.name == name or row is base],
                   base, machines, links)
  if as_json:
    print(json.dumps({'workdir': study.workdir, 'shared': shared, 'not_measured': missing, **found},
                     indent=2))
  else:
    _show(found, shared, missing)


def _check_workers(run: Run, machines: int):
  """Raises UsageError unless the workers of all runs before this can share the machines evenly."""
  for each in lineage(run):
    if machines % each.workers == 0:
      continue
    way_out = 'Change --machines, or name one of the other rows by --run.'
    if machines < each.workers:
      raise UsageError(f'--machines={machines}: the {each.workers} workers of {each.plain_name} '
                       f'need a machine each. {way_out}')
    raise UsageError(f'--machines={machines} cannot be shared evenly by the {each.workers} workers '
                     f'of {each.plain_name}. {way_out}')


def _rows(ends: Iterable[Run], seconds: Mapping[Hashable, float]
          ) -> tuple[list[Row], list[str], list[str]]:
  """The rows, the names of those whose steps have not been timed, and of the runs that all share.

  Args:
    ends: runs that no other starts from.
    seconds: of a step, by _program.
  """
  made, missing = [], []
  for run in ends:
    try:
      made.append((run, form_of(run, seconds)))
    except KeyError:
      missing.append(run.plain_name)
  made = [(run, form) for run, form in made if form]
  count = wall_time.shared_stages([form for _, form in made])
  shared = [stage.name for _, form in made[:1] for stage in form[:count]
            if isinstance(stage, Training)]
  rows = [Row(run.plain_name, _kind(form[count:]), form[count:], sum(
      each.flops for each in lineage(run) if each.plain_name not in shared)) for run, form in made]
  return rows, missing, shared


def _program(run: Run) -> Hashable:
  """Runs for which this is equal compute the same in a step.

  So do workers and a single run. But several workers on one machine have as many times the work of
  the optimizer, which on machines of their own they do at the same time.
  """
  return (run.model, run.seq_len, run.batch_size, run.microbatches, run.objective.loss,
          run.objective.freeze)


def _step_seconds(study: Study) -> dict[Hashable, float]:
  """The median time of a step on one machine, by program; of workers only if no other run has it.
  """
  of_one: dict[Hashable, list[float]] = {}
  of_workers: dict[Hashable, list[float]] = {}
  for run in study.runs.values():
    found = of_workers if run.workers > 1 else of_one
    found.setdefault(_program(run), []).extend(_measured(study, run))
  return {program: statistics.median(times) for found in (of_workers, of_one)
          for program, times in found.items() if times}


def _measured(study: Study, run: Run) -> list[float]:
  """Seconds of a step, for each line of a run's metrics that has them."""
  about = study.recorded(run.name)
  if not about or about.get('processes', 1) > 1:  # such times include communication
    return []
  row = study.row(run.name)
  lines = [row['training']] if row else metrics.read(study.folder(run.name))
  return [run.batch_size * run.seq_len / line['tokens_per_second']
          for line in lines if line.get('tokens_per_second')]


def form_of(run: Run, seconds: Mapping[Hashable, float]) -> Form:
  """The stages of a run and of all that it descends from.

  Args:
    run: any run.
    seconds: of a step, by _program. Raises KeyError if a program is not there.
  """
  tops = _trained_sources(run.sources)
  above = {each.name for top in tops for each in lineage_of(top.sources)}
  tops = [top for top in tops if top.name not in above]
  own = (_training(run, seconds),) if run.steps else ()
  if len(tops) < 2:
    return (*(form_of(tops[0], seconds) if tops else ()), *own)
  forms = [form_of(top, seconds) for top in tops]
  trunk = wall_time.shared_stages(forms)
  groups: list[tuple[Form, float]] = []
  for top, form in zip(tops, forms):
    # Models that share a part of their training are one branch.
    stages, size = dict.fromkeys(form[trunk:]), top.gradient_bytes
    for group in [group for group in groups if stages.keys() & set(group[0])]:
      groups.remove(group)
      stages, size = dict.fromkeys((*group[0], *stages)), size + group[1]
    groups.append((tuple(stages), size))
  return (*forms[0][:trunk], Branches(*map(tuple, zip(*groups))), *own)


def _trained_sources(sources: Sequence[Run]) -> list[Run]:
  """The nearest runs of at least one step that these are or come from, each once."""
  found: dict[str, Run] = {}
  for source in sources:
    for each in [source] if source.steps else _trained_sources(source.sources):
      found.setdefault(each.name, each)
  return list(found.values())


def _training(run: Run, seconds: Mapping[Hashable, float]) -> Training:
  return Training(run.plain_name, run.steps, seconds[_program(run)], run.batch_size,
                  run.gradient_bytes, run.outer)


def _kind(form: Form) -> str:
  if any(isinstance(stage, Branches) for stage in form):
    return 'branches' if isinstance(form[-1], Branches) else 'branches, finetune'
  has_workers = any(stage.outer for stage in form if isinstance(stage, Training))
  return 'DiLoCo' if has_workers else _SYNCHRONOUS


def _as_data(rows: Sequence[Row], base: Row | None, machines: int, links: Sequence[float]
             ) -> dict[str, Any]:
  """The tables as plain data, in seconds, bytes and Gbit/s."""
  result = []
  for row in rows:
    times = [wall_time.time_of(row.form, machines, link * _GBIT) for link in links]
    result.append({
        'name': row.name, 'kind': row.kind, 'flops': row.flops,
        'compute': wall_time.time_of(row.form, machines, math.inf).compute,
        'sent_by_each': max(time.sent for time in times),
        'on_one_machine': wall_time.time_of(row.form, 1, math.inf).total,
        'links': [{'gbit': link, 'exposed': time.exposed, 'total': time.total}
                  for link, time in zip(links, times)],
        'break_even': {} if base in (None, row) or abs(
            row.flops / base.flops - 1) > _SAME else {
                when: _break_even(row, base, machines, hidden) for when, hidden in (
                    ('after_backward', 0.0), ('during_backward', wall_time.BACKWARD))}})
  return {'machines': machines, 'baseline': base.name if base else None, 'rows': result}


def _break_even(row: Row, base: Row, machines: int, hidden: float) -> dict[str, Any]:
  bandwidth, is_below = wall_time.break_even(row.form, base.form, machines, hidden)
  if math.isinf(bandwidth):
    return {'faster': 'always' if is_below else 'never', 'gbit': None}
  return {'faster': 'below' if is_below else 'above', 'gbit': bandwidth / _GBIT}


def _show(found: Mapping[str, Any], shared: Sequence[str], missing: Sequence[str]):
  """Prints what _as_data returns as tables."""
  rows, machines = found['rows'], found['machines']
  caption = [f'Without what all rows share: {", ".join(shared)}.'] if shared else []
  caption += [f'Not measured yet: {", ".join(missing)}.'] if missing else []
  show(Table(
      ['', 'trained', 'TFLOP', 'compute', 'sent by each'],
      [[row['name'], row['kind'], f'{row["flops"] / 1e12:,.1f}', _time(row['compute']),
        _size_in_words(row['sent_by_each'])] for row in rows], names=2,
      title=f'On {machines} machines', caption=' '.join(caption)))
  alone = [f'{row["name"]} at {link["gbit"]:g} Gbit/s' for row in rows for link in row['links']
           if row['on_one_machine'] < link['total']]
  show(Table(
      ['', *(f'{link["gbit"]:g} Gbit/s' for link in rows[0]['links'])],
      [[row['name'], *(_time(link['total'], link['exposed']) for link in row['links'])]
       for row in rows], title='Wall time by link (of it, waiting for the link)',
      caption=f'Faster on one machine alone: {", ".join(alone)}.' if alone else ''))
  if compared := [row for row in rows if row['break_even']]:
    show(Table(
        ['', 'sent after the backward pass', 'sent during the backward pass'],
        [[row['name'], *map(_in_words, row['break_even'].values())] for row in compared],
        title=f'Links on which it is faster than {found["baseline"]}, if gradients are',
        caption='Only rows of the same FLOPs are compared.'))


def _in_words(found: Mapping[str, Any]) -> str:
  if found['gbit'] is None:
    return {'always': 'any', 'never': 'none'}[found['faster']]
  gbit = found['gbit']
  rate = f'{gbit:,.3g} Gbit/s' if gbit >= 0.1 else f'{1000 * gbit:,.3g} Mbit/s'
  return f'{found["faster"]} {rate}'


def _time(seconds: float, waiting: float | None = None) -> str:
  """A time, and a part of it in brackets, in the unit that suits it: '38.8 (19.1) s'."""
  unit, name = next(((unit, name) for unit, name in _UNITS if seconds >= 2 * unit), _UNITS[-1])
  part = '' if waiting is None else f' ({waiting / unit:,.1f})'
  return f'{seconds / unit:,.1f}{part} {name}'


def _size_in_words(size: float) -> str:
  return f'{size / 1e9:,.2f} GB' if size >= 1e8 else f'{size / 1e6:,.2f} MB'
