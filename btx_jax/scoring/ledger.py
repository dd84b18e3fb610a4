"""Counts from files the cost of each model of a study, with everything that it descends from.

docs/ledger.md says what each figure counts. Those that cannot be known are None: of a run whose
manifest is missing or older, and of kernels, whose own work is not counted here.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
import os
from typing import Any, NamedTuple

from btx_jax.errors import UsageError
from btx_jax.files import shapes
from btx_jax.fitting.flops import FIGURES, fit_flops
from btx_jax.model.config import FLOP_PARTS, num_params, train_flops_by_part
from btx_jax.model.overhead import Overhead, attention_of, dispatch_of, overhead_per_token
from btx_jax.run import ENSEMBLE, MIX, Run, lineage
from btx_jax.scoring import scores
from btx_jax.study import routers, wall_time
from btx_jax.study.study import Study

MACHINES = 4  # unless the command says otherwise
_BYTES = 4  # of a parameter, a gradient or a moment: float32
# FLOPs that model FLOPs leave out, in the order of the columns.
OVERHEADS = (*Overhead._fields, 'fitting')
# Figures that follow from files that a finished row does not have.
_PUBLISHED = ('tokens', 'passes', 'most_passes', 'beyond', 'device_seconds')
Row = dict[str, Any]


def rows(study: Study, machines: int = MACHINES) -> list[Row]:
  """A row for every model of scores.models.

  A row has name; tokens and passes by domain, and most_passes, the largest of these; flops by part
  of the model (config.FLOP_PARTS), train_flops, their sum, and frozen, the FLOPs of gradients that
  were not computed; beyond, the FLOPs that these leave out, by each name of OVERHEADS;
  device_seconds; sent_by_all and checkpoint_bytes, see the functions of these names; active_params,
  total_params and forward_flops as in the table of results. What is not known is None.
  """
  branches, texts = branches_of(study.runs.values()), _targets(study)
  return [_row(study, model, branches, texts, machines) for model in scores.models(study)]


def _row(study: Study, model: scores.Model, branches: Collection[str],
         texts: Mapping[str, int | None], machines: int) -> Row:
  trained, own = model.trained, model.run
  # What the model is made of moves to it even if its own training came later, or never.
  made = [own, *(run for run in trained if run is not own)]
  manifests = {run.name: study.recorded(run.name) or {} for run in made}
  tokens = _tokens(trained, manifests)
  passes = {domain: _ratio(count, texts.get(domain)) for domain, count in (tokens or {}).items()}
  flops = {part: sum(run.tokens * _parts(run)[part] for run in trained) for part in FLOP_PARTS}
  overheads = [overhead_of(run, manifests[run.name].get('devices', ''))
               for run in trained if run.steps]
  measured = scores.read(study, own, model.stage)
  kept = (study.row(own.name) or {}).get('cost', {}).get(model.stage, {})
  fitted = [run for run in made if run.fitted and (model.stage != scores.AVERAGE or run is not own)]
  beyond = {name: _sum(each[name] for each in overheads) for name in Overhead._fields}
  return {
      'name': os.path.join(own.series, model.name), 'tokens': tokens, 'passes': passes,
      'most_passes': max((each for each in passes.values() if each is not None), default=None),
      'flops': flops, 'train_flops': sum(flops.values()),
      'frozen': sum(run.flops_unfrozen - run.flops for run in trained),
      'beyond': beyond | {'fitting': _sum(_fit_flops(study, run) for run in fitted)},
      'device_seconds': _sum(_device_seconds(run, manifests[run.name]) for run in trained),
      'sent_by_all': sum(sent_by_all(run, 1 if run.name in branches else machines)
                         for run in trained),
      'checkpoint_bytes': sum(checkpoint_bytes(run, branches) for run in made),
      'active_params': model.active_params, 'total_params': model.total_params,
      'forward_flops': (
          model.forward_flops(measured or {}) if measured or not own.selector else None),
      **kept}


def costs_to_publish(study: Study, run: Run) -> dict[str, Row]:
  """By stage, the figures of a run's models that only its own working directory can give."""
  branches, texts = branches_of(study.runs.values()), _targets(study)
  found = {model.stage: _row(study, model, branches, texts, MACHINES)
           for model in scores.models_of(study, run)}
  return {stage: {key: row[key] for key in _PUBLISHED} for stage, row in found.items()}


def overhead_of(run: Run, devices: str) -> dict[str, float | None]:
  """The FLOPs of a whole run in addition to its model FLOPs, by each field of Overhead.

  Args:
    run: a run with steps.
    devices: those of its manifest; if they are not known, nothing is.
  """
  count, platform = _devices(devices)
  if not count:
    return dict.fromkeys(Overhead._fields)
  model, objective = run.model, run.objective
  # A worker's microbatch is on one device, or on several that share it.
  tokens = run.batch_size * run.seq_len / run.microbatches / max(count, run.workers)
  form = model.dispatch
  if form == 'auto':
    form = dispatch_of(platform)
  found = overhead_per_token(
      model, run.seq_len, objective.frozen_paths(model), max(round(tokens), 1), form,
      second_pass=(model.has_router and objective.balance_loss > 0
                   and objective.balance_scope == 'batch'),
      logits_again=objective.on_pairs)
  result: dict[str, float | None] = {
      name: run.tokens * value for name, value in found._asdict().items()}
  attention = model.attention
  if attention == 'auto':
    attention = attention_of(platform, model.dtype, run.seq_len, model.head_dim)
  if attention != 'xla':
    result['masked'] = None
    if model.remat != 'none':
      result['recomputed'] = None
  if form == 'gather' and platform != 'cpu' and model.num_experts:
    result['padding'] = None
  return result


def sent_by_all(run: Run, machines: int) -> int:
  """Bytes that all machines together send to each other while a run trains.

  An ordinary run sums a gradient in each step, over `machines`. A run of DiLoCo sums as many bytes
  at each meeting, over one machine for each worker. See wall_time.all_reduce.
  """
  count, times = machines, run.steps
  if run.outer:
    count, times = run.workers, run.outer.meetings(run.steps)
  return times * round(count * wall_time.all_reduce(run.gradient_bytes, count))


def checkpoint_bytes(run: Run, branches: Collection[str]) -> int:
  """Bytes of the checkpoints that are moved between machines so that a run can start.

  A checkpoint moves when a branch starts from a run that is not one, or such a run from a branch:
  its parameters once, in float32, and with `Run.state` the two moments of what trains.

  Args:
    run: the run that starts.
    branches: see branches_of.
  """
  size = 0
  for i, source in enumerate(run.sources):
    if (run.name in branches) != (source.name in branches):
      size += num_params(source.model) + (2 * run.trained_params if run.state and not i else 0)
  return _BYTES * size


def branches_of(runs: Iterable[Run]) -> set[str]:
  """The names of the branches: runs that are trained apart, on a machine each.

  These are the runs that some, but not all, models of a mixture or an ensemble descend from or are.
  """
  found: set[str] = set()
  for run in runs:
    if run.init in (MIX, ENSEMBLE):
      of_each = [{each.name for each in lineage(source)} for source in run.sources]
      found |= set.union(*of_each) - set.intersection(*of_each)
  return found


def _parts(run: Run) -> dict[str, int]:
  return train_flops_by_part(run.model, run.seq_len, run.objective.frozen_paths(run.model))


def _tokens(trained: Sequence[Run], manifests: Mapping[str, dict]) -> dict[str, int] | None:
  """Targets by domain; None if a manifest does not say.

  Of a run that is used up to an earlier step, the share of its steps: all its batches have the same
  share of each domain, to within a row.
  """
  total: dict[str, float] = {}
  for run in trained:
    found = manifests[run.name]
    share = _share(run, found)
    if share is None or (run.steps and not found.get('tokens_by_domain')):
      return None
    for domain, count in found.get('tokens_by_domain', {}).items():
      total[domain] = total.get(domain, 0) + share * count
  return {domain: round(count) for domain, count in total.items() if count}


def _share(run: Run, found: Mapping[str, Any]) -> float | None:
  """The share of a run's recorded work that its first `steps` are; None if it is not known."""
  if 'steps_done' not in found:
    return None
  return run.steps / found['steps_done'] if found['steps_done'] else 1.0


def _targets(study: Study) -> dict[str, int | None]:
  """The targets in one pass over each domain's training text; None if it is not tokenized.

  In conversations these are the tokens to be written; in text all but the first of each document.
  """
  result = {}
  for domain in study.config.domains:
    train = (study.text_meta(domain) or {}).get('train')
    result[domain] = train and train.get('written', train['tokens'] - train['documents'])
  return result


def _device_seconds(run: Run, found: Mapping[str, Any]) -> float | None:
  share, (count, _) = _share(run, found), _devices(found.get('devices', ''))
  if share is None or not count or 'seconds' not in found:
    return None
  return share * found['seconds'] * count


class _Devices(NamedTuple):
  count: int
  platform: str


def _devices(text: str) -> _Devices:
  """The devices of a manifest, like '8 x NVIDIA H100 80GB HBM3'; 0 if that is not what it has."""
  count, _, kind = text.partition(' x ')
  if not kind or not count.isdigit():
    return _Devices(0, '')
  platform = 'tpu' if kind.startswith('TPU') else 'cpu' if kind == 'cpu' else 'gpu'
  return _Devices(int(count), platform)


def _fit_flops(study: Study, run: Run) -> int | None:
  try:
    figures = routers.figures(study, run)
  except UsageError:  # damaged
    return None
  return fit_flops(run, figures) if figures and not shapes.misfit(figures, FIGURES) else None


def _ratio(count: float, whole: int | None) -> float | None:
  return count / whole if whole else None


def _sum(values: Iterable[float | None]) -> float | None:
  """The sum; None if one of them is."""
  found = list(values)
  known = [value for value in found if value is not None]
  return sum(known) if len(known) == len(found) else None
