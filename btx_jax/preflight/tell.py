"""What preflight found, as a table, as advice, and for machines."""

import json
import math
import os

from rich import box
from rich.table import Table

from btx_jax.model.config import REMATS
from btx_jax.preflight import measure
from btx_jax.preflight.measure import Measured
from btx_jax.preflight.topology import Topology
from btx_jax.run import HUGGING_FACE
from btx_jax.study.study import Study
from btx_jax.terminal import say, show

GB = 1e9


def tell(study: Study, topology: Topology, as_json: bool, only: str | None = None) -> bool:
  """Compiles and shows everything, or one run; whether it all fits."""
  found = []
  for program in measure.programs(study, topology, only):
    found.append(program)
    if not as_json:
      say(f'{_names(program)}: compiled in {program.compile_seconds:.0f} s'
          + (f'; {program.error}' if program.error else ''))
  if as_json:
    print(json.dumps(as_data(found, topology), indent=1))
    return all(program.fits for program in found)
  if not found:
    say('No run of this config is trained: there is nothing to compile.')
    return True
  for line in absent(study):
    say(line)
  say(f'{topology.name}: {found[0].devices} devices, compiled by {topology.compiler}. Times are '
      'those of the peaks in btx_jax/devices/hardware.py; nothing ran.')
  show(as_table(found, topology))
  for program in found:
    for line in program.uneven:
      say(line)
    for finding in program.findings:
      say(f'{"proven " if finding.holds else "REFUTED"}  {finding.text}')
    for line in advice(program):
      say(line)
  return all(program.fits for program in found)


def absent(study: Study) -> list[str]:
  """A line for each pretrained model that is not here."""
  inits = [study.config.runs[name].init for name in study.runs]
  folders = {init.folder for init in inits if init.kind == HUGGING_FACE}
  return [f'{folder} is not here: its sizes are taken to be those of the config\'s section model'
          for folder in sorted(folders) if not os.path.exists(folder)]


def _names(program: Measured) -> str:
  return (' | ' if program.stacked else ', ').join(run.name for run in program.runs)


def as_table(found: list[Measured], topology: Topology) -> Table:
  """A column for each program."""
  table = Table(box=box.SIMPLE)
  table.add_column('')
  for program in found:
    table.add_column(_names(program), justify='right')
  chip = topology.chip

  def row(name: str, value):
    table.add_row(name, *(value(program) for program in found))

  def of_time(value):
    return lambda p: value(p) if p.cost and chip else '-'

  row('mesh', lambda p: ' '.join(f'{axis} {n}' for axis, n in p.mesh.items()) or 'one device')
  row('remat, microbatches, rows a step', lambda p: ', '.join(map(str, (
      p.runs[0].model.remat, p.runs[0].microbatches, p.runs[0].batch_size))))
  row('parameters (a token meets)', lambda p: f'{_count(p.params)} ({_count(p.active_params)})')
  row('model FLOPs a token, forward and backward', lambda p: f'{p.flops_per_token / 1e9:.3g} G')
  row('device: state and batch', lambda p: _gb(p.arguments))
  row('device: temporaries', lambda p: _gb(p.temporaries))
  row('device: peak of memory', lambda p: _gb(p.peak) + (
      f' of {_gb(p.memory)}' if p.memory else '') + ('' if p.fits_device else ' DOES NOT FIT'))
  row('host: while it saves', lambda p: _gb(p.host) + (
      f' of {_gb(p.host_memory)}' if p.host_memory else '')
      + ('' if p.fits_host else ' DOES NOT FIT'))
  row('checkpoint', lambda p: _gb(p.state))
  keys = sorted({key for p in found if p.cost for key, sent in p.cost.sent.items() if sent > 1e3},
                key=lambda key: (key[1], key[0]))
  for kind, axes in keys:
    row(f'sent a step: {kind} over {", ".join(axes)}',
        lambda p, key=(kind, axes): _gb(p.cost.sent[key]) if p.cost else '-')
  row('step: compute', of_time(lambda p: _s(p.cost.compute)))
  row('step: memory', of_time(lambda p: _s(p.cost.memory)))
  row('step: network (of which nothing hides)', of_time(
      lambda p: f'{_s(p.cost.network)} ({_s(p.cost.waiting)})'))
  row('step', of_time(lambda p: _s(p.cost.seconds)))
  row('MFU', of_time(lambda p: f'{p.mfu(chip):.1%}'))
  row('tokens a second', of_time(lambda p: f'{p.tokens / p.cost.seconds:,.0f}'))
  row('days, device-hours', of_time(lambda p: '; '.join(
      f'{days:.1f}, {days * 24 * p.devices:,.0f}' for days in _days(p))))
  return table


def _days(program: Measured) -> list[float]:
  """Of each run, or of all branches of a program together."""
  steps = [run.steps for run in program.runs]
  if program.stacked:
    steps = [max(steps)]
  return [n * program.cost.seconds / 86400 for n in steps]


def advice(program: Measured) -> list[str]:
  """What to change when a program does not fit, the cheapest first."""
  lines = []
  if not program.fits_host:
    lines.append(
        f'{_names(program)} needs {_gb(program.host - program.host_memory)} more than a host has. '
        'What would help: more hosts, which hold less of the state each'
        + (", or another model.remat than 'offload'"
           if program.runs[0].model.remat == 'offload' else ''))
  if program.fits_device:
    return lines
  run, axes = program.runs[0], program.mesh
  over = program.peak - program.memory if program.peak and program.memory else 0
  much = f'needs {_gb(over)} more than a device has' if over else 'does not fit'
  lines.append(f'{_names(program)} {much}. What would help, the cheapest first:')
  spread = math.prod(n for axis, n in axes.items() if axis != 'tensor')
  rows = run.batch_size // run.microbatches
  if rows % 2 == 0 and rows // 2 % spread == 0:
    lines.append(f'  train.microbatches = {2 * run.microbatches}: half the activations; weights '
                 'are gathered, and gradients summed, twice as often')
  if run.model.remat != REMATS[-1]:
    further = REMATS[REMATS.index(run.model.remat) + 1:]
    lines.append(f'  model.remat = {" or ".join(map(repr, further))}: fewer activations are kept; '
                 'at most a third more FLOPs, and for the last traffic with the host')
  if axes.get('data', 1) > 1:
    lines.append(f'  mesh.fsdp = {2 * axes.get("fsdp", 1)}: the state is cut up further; weights '
                 'are gathered from more devices')
  if rows > spread and run.microbatches == 1:
    lines.append(f'  train.batch_size = {run.batch_size // 2}: another run than was planned')
  if program.devices >= 2 * axes.get('tensor', 1):
    lines.append(f'  mesh.tensor = {2 * axes.get("tensor", 1)}: each layer is cut up; activations '
                 'cross the network in every one')
  lines.append(f'  more devices: {2 * program.devices} have half the state each')
  return lines


def as_data(found: list[Measured], topology: Topology) -> dict:
  """Everything, as plain data, in bytes and seconds."""
  return {'topology': topology.name, 'compiler': topology.compiler,
          'programs': [_as_data(program, topology) for program in found]}


def _as_data(program: Measured, topology: Topology) -> dict:
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
    if topology.chip:
      result['seconds'] = {name: getattr(cost, name) for name in (
          'compute', 'memory', 'network', 'waiting')} | {'step': cost.seconds}
      result['mfu'] = program.mfu(topology.chip)
      result['days'] = _days(program)
  return result


def _gb(size: float) -> str:
  unit, name = (GB, 'GB') if size >= 1e7 else (1e6, 'MB')
  return f'{size / unit:,.2f} {name}' if size < 1e11 else f'{size / unit:,.0f} {name}'


def _s(seconds: float) -> str:
  return f'{seconds:.3f} s'


def _count(n: float) -> str:
  return f'{n / 1e9:.2f} B' if n >= 1e9 else f'{n / 1e6:.1f} M'
