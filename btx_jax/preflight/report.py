"""Prints what preflight found: a table, and advice where a program does not fit; or JSON."""

from collections.abc import Mapping, Sequence
import json
import math
import types

from btx_jax import terminal
from btx_jax.devices.hardware import Chip
from btx_jax.files import places
from btx_jax.model.config import REMATS
from btx_jax.preflight import fitting, measure
from btx_jax.preflight.cost import Cost
from btx_jax.preflight.forecast import DENSE, MIXTURE, Ratio
from btx_jax.preflight.measure import Measured
from btx_jax.preflight.topology import Topology
from btx_jax.run import HUGGING_FACE, Run
from btx_jax.study.study import Study
from btx_jax.terminal import say, show

_TIMES = ('step: compute', 'step: memory', 'step: network (exposed)', 'step', 'MFU',
          'tokens per second', 'days, device-hours')
_FORECAST = 'forecast of the step, MFU'


def print_report(study: Study, topology: Topology, as_json: bool, only: str | None = None,
                 ratios: Mapping[str, Ratio] = types.MappingProxyType({})) -> bool:
  """Compiles every program of a study, or of the run `only`, and prints what it found.

  Args:
    study: whose programs.
    topology: the devices to compile for.
    as_json: whether to print JSON.
    only: the name of a run.
    ratios: from forecast.read, for a forecast beside the bound.

  Returns:
    Whether all of them fit.

  Raises:
    UsageError: a run cannot be laid on the topology.
  """
  found = []
  for program in measure.programs(study, topology, only):
    found.append(program)
    if not as_json:
      say(f'{_names(program)}: compiled in {program.compile_seconds:.0f} s'
          + (f'; {program.error}' if program.error else ''))
  fitted = fitting.measured(study, topology, only)
  fits = all(each.fits for each in (*found, *fitted))
  if as_json:
    data = as_data(found, topology, ratios) | {'from_text': [each.as_data() for each in fitted]}
    print(json.dumps(data, indent=1))
    return fits
  for each in fitted:
    say(each.in_words())
  if not found:
    say('This config trains no run, so there is no train step to compile.')
    return fits
  for line in missing_models(study):
    say(line)
  say(f'{topology.name}: {found[0].devices} devices, compiled by {topology.compiler}. Times assume '
      'the peak rates in btx_jax/devices/hardware.py; nothing was run.')
  for kind, ratio in ratios.items():
    say(f'{kind}: {ratio.of} program(s) were timed on such chips; a step took {ratio.times:.2f} '
        'times its bound')
  show(as_table(found, topology, ratios))
  for program in found:
    for line in program.uneven:
      say(line)
    for finding in program.findings:
      say(f'{"proven " if finding.holds else "REFUTED"}  {finding.text}')
    for line in advice(program):
      say(line)
  return fits


def missing_models(study: Study) -> list[str]:
  """A line for each pretrained model whose folder does not exist."""
  inits = [run.init for run in study.config.runs.values()]
  folders = {init.folder for init in inits if init.kind == HUGGING_FACE}
  return [f"{folder} does not exist: its sizes are assumed to be those of the config's section "
          'model' for folder in sorted(folders) if not places.exists(folder)]


def _names(program: Measured) -> str:
  names = (' | ' if program.stacked else ', ').join(
      run.plain_name for run in program.of_one_seed)
  seeds = len(program.runs) // len(program.of_one_seed)
  return names if seeds == 1 else f'{names} (each of {seeds} seeds)'


def as_table(found: list[Measured], topology: Topology, ratios: Mapping[str, Ratio]
             ) -> terminal.Table:
  """The figures, a column for each program."""
  sent = sorted({(axes, kind) for program in found if program.cost
                 for (kind, axes), size in program.cost.sent.items() if size > 1e3})
  columns = [_memory(program) | _traffic(program, sent) | _times(program, topology.chip)
             | _decisions(program, topology.chip) | _forecast(program, topology.chip, ratios)
             for program in found]
  return terminal.Table(
      ['', *map(_names, found)],
      [[label, *(column[label] for column in columns)] for label in columns[0]])


def _memory(program: Measured) -> dict[str, str]:
  """What is compiled, and the memory it takes, by label."""
  run = program.runs[0]
  return {
      'mesh': ' '.join(f'{axis} {n}' for axis, n in program.mesh.items()) or 'one device',
      'remat, microbatches, rows per step':
          f'{run.model.remat}, {run.microbatches}, {run.batch_size}',
      'parameters (active per token)':
          f'{_count(program.params)} ({_count(program.active_params)})',
      'model FLOPs per token, forward and backward': f'{program.flops_per_token / 1e9:.3g} G',
      'device: state and batch': _gb(program.arguments),
      'device: temporaries': _gb(program.temporaries),
      'device: peak memory': _share(program.peak, program.memory, program.fits_device),
      'host: while saving': _share(program.host, program.host_memory, program.fits_host),
      'checkpoint': _gb(program.state)}


def _share(needed: float, available: float | None, fits: bool) -> str:
  return (_gb(needed) + (f' of {_gb(available)}' if available else '')
          + ('' if fits else ' DOES NOT FIT'))


def _traffic(program: Measured, sent: list[tuple[tuple[str, ...], str]]) -> dict[str, str]:
  """What a device sends in a step with each of these collectives (axes, kind), by label."""
  return {f'sent per step: {kind} over {", ".join(axes)}':
          _gb(program.cost.sent.get((kind, axes), 0)) if program.cost else '-'
          for axes, kind in sent}


def _times(program: Measured, chip: Chip | None) -> dict[str, str]:
  """How long a step and the runs take, by label."""
  cost = program.cost
  if not cost or not chip:
    return dict.fromkeys(_TIMES, '-')
  days = (f'{days:.1f}, {days * 24 * program.devices:,.0f}'
          for days in _days(program, program.of_one_seed, cost))
  return dict(zip(_TIMES, (
      _seconds(cost.compute), _seconds(cost.memory),
      f'{_seconds(cost.network)} ({_seconds(cost.waiting)})', _seconds(cost.seconds),
      f'{program.mfu(chip):.1%}', f'{program.tokens / cost.seconds:,.0f}', '; '.join(days)),
      strict=True))


def _decisions(program: Measured, chip: Chip | None) -> dict[str, str]:
  """How often a GPU waits for its host in a step; a TPU decides by itself."""
  if not chip or chip.torus:
    return {}
  return {'step: waits for the host': f'{program.cost.decisions:,}' if program.cost else '-'}


def _forecast(program: Measured, chip: Chip | None, ratios: Mapping[str, Ratio]) -> dict[str, str]:
  """What a step will take if it is as far from its bound as those timed; nothing without any."""
  if not ratios:
    return {}
  foreseen = _foreseen(program, chip, ratios)
  return {_FORECAST: f'{_seconds(foreseen["step"])}, {foreseen["mfu"]:.1%}' if foreseen else '-'}


def _foreseen(program: Measured, chip: Chip | None, ratios: Mapping[str, Ratio]
              ) -> dict[str, float]:
  """The forecast of a step and its MFU; empty if no program of this kind was timed."""
  ratio = ratios.get(MIXTURE if program.runs[0].model.num_experts else DENSE)
  if not ratio or not program.cost or not chip:
    return {}
  return {'step': ratio.times * program.cost.seconds, 'mfu': program.mfu(chip) / ratio.times}


def _days(program: Measured, runs: Sequence[Run], cost: Cost) -> list[float]:
  """The days that each run takes, or all branches of a stacked program together."""
  steps = [run.steps for run in runs]
  if program.stacked:
    steps = [max(steps)]
  return [n * cost.seconds / 86400 for n in steps]


def advice(program: Measured) -> list[str]:
  """What to change if a program does not fit, cheapest first."""
  lines = []
  if program.host_memory is not None and not program.fits_host:
    lines.append(
        f'{_names(program)} needs {_gb(program.host - program.host_memory)} more than a host has. '
        'What would help: more hosts, so that each holds less of the state'
        + (", or a model.remat other than 'offload'"
           if program.runs[0].model.remat == 'offload' else ''))
  if program.fits_device:
    return lines
  run, axes = program.runs[0], program.mesh
  over = program.peak - program.memory if program.peak and program.memory else 0
  excess = f'needs {_gb(over)} more than a device has' if over else 'does not fit'
  lines.append(f'{_names(program)} {excess}. What would help, cheapest first:')
  spread = math.prod(n for axis, n in axes.items() if axis != 'tensor')
  rows = run.batch_size // run.microbatches
  if rows % 2 == 0 and rows // 2 % spread == 0:
    lines.append(f'  train.microbatches = {2 * run.microbatches}: half the activations, but '
                 'weights are gathered and gradients summed twice as often')
  if run.model.remat != REMATS[-1]:
    further = REMATS[REMATS.index(run.model.remat) + 1:]
    lines.append(f'  model.remat = {" or ".join(map(repr, further))}: fewer activations are kept, '
                 f'at the cost of up to a third more FLOPs; {REMATS[-1]!r} adds traffic to the '
                 'host')
  if axes.get('data', 1) > 1:
    lines.append(f'  mesh.fsdp = {2 * axes.get("fsdp", 1)}: each device holds less of the state, '
                 'but weights are gathered from more devices')
  if rows > spread and run.microbatches == 1:
    lines.append(f'  train.batch_size = {run.batch_size // 2}: this trains a different run')
  if program.devices >= 2 * axes.get('tensor', 1):
    lines.append(f'  mesh.tensor = {2 * axes.get("tensor", 1)}: every layer is split, and its '
                 'activations cross the network')
  lines.append(f'  more devices: of {2 * program.devices}, each holds half as much of the state')
  return lines


def as_data(found: list[Measured], topology: Topology, ratios: Mapping[str, Ratio]) -> dict:
  """Everything that was found as plain data, in bytes and seconds."""
  return {'topology': topology.name, 'compiler': topology.compiler,
          'programs': [_as_data(program, topology, ratios) for program in found]}


def _as_data(program: Measured, topology: Topology, ratios: Mapping[str, Ratio]) -> dict:
  result = {
      'runs': [run.name for run in program.runs], 'stacked': program.stacked,
      'mesh': program.mesh, 'devices': program.devices, 'fits': program.fits,
      'error': program.error, 'parameters': program.params,
      'active_parameters': program.active_params, 'flops_per_token': program.flops_per_token,
      'tokens_per_step': program.tokens, 'compile_seconds': program.compile_seconds,
      'memory': {'arguments': program.arguments, 'temporaries': program.temporaries,
                 'peak': program.peak, 'device': program.memory, 'host': program.host,
                 'of_host': program.host_memory, 'checkpoint': program.state},
      'uneven': program.uneven, 'findings': [finding._asdict() for finding in program.findings]}
  if cost := program.cost:
    result['sent'] = [{'kind': kind, 'axes': axes, 'bytes': sent}
                      for (kind, axes), sent in cost.sent.items()]
    result['flops'] = cost.flops
    result['decisions'] = cost.decisions
    if topology.chip:
      result['seconds'] = {name: getattr(cost, name) for name in (
          'compute', 'memory', 'network', 'waiting')} | {'step': cost.seconds}
      result['mfu'] = program.mfu(topology.chip)
      result['days'] = _days(program, program.runs, cost)
      if foreseen := _foreseen(program, topology.chip, ratios):
        result['forecast'] = foreseen
  return result


def _gb(size: float) -> str:
  unit, name = (1e9, 'GB') if size >= 1e7 else (1e6, 'MB')
  return f'{size / unit:,.2f} {name}' if size < 1e11 else f'{size / unit:,.0f} {name}'


def _seconds(seconds: float) -> str:
  return f'{seconds:.3f} s'


def _count(n: float) -> str:
  return f'{n / 1e9:.2f} B' if n >= 1e9 else f'{n / 1e6:.1f} M'
