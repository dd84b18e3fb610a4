"""Records a run while it trains: sums the metrics of each step, writes a line of metrics.jsonl
every few steps, sends it to the sinks, moves the progress bar, and warns."""

from collections.abc import Mapping, Sequence
import contextlib
import time
from typing import Any

import numpy as np

from btx_jax.devices import distributed, hardware
from btx_jax.run import Run
from btx_jax.terminal import Progress, say
from btx_jax.training import optim, routing_figures, sinks
from btx_jax.training.delivery import Deliveries
from btx_jax.training.metrics import Mark, MetricsFile


class Recorder(contextlib.ExitStack):
  """Keeps the sums of an interval, from one line to the next; a context manager.

  All processes keep them, because all must save the same. Process 0 writes.

  Attributes:
    tokens_by_domain: number of targets trained on so far, by domain.
  """

  def __init__(self, run: Run, folder: str, domains: list[str], log_every: int, start: int,
               position: Mapping[str, Any], sink_names: Sequence[str], progress: Progress):
    """
    Args:
      run: what is recorded.
      folder: the run's directory.
      domains: names of the domains, in the order of the figures of a step.
      log_every: steps between lines.
      start: the step of the checkpoint that the run continues from; 0 without one.
      position: what `position` returned when that checkpoint was saved; {} without one.
      sink_names: where lines are sent, see sinks.py.
      progress: the bars in the terminal.
    """
    super().__init__()
    self._run, self._domains, self._log_every = run, domains, log_every
    before = position.get('tokens_by_domain', {})
    self._targets = np.array([before.get(name, 0) for name in domains], np.int64)
    # A config may have gained or lost a domain since then.
    self._sums = {name: _for_domains(np.array(values, np.float64), name, list(before), domains)
                  for name, values in position.get('interval', {}).items()}
    self._since = None  # when the clock of this interval started; None while compiling
    self._steps, self._input_wait = 0, 0.0  # since then
    self._schedule = optim.schedule_of(run)
    self._progress = progress
    self._file = None  # only process 0 has one, and only for a run that is not done
    if not distributed.is_process_0() or start == run.steps:
      return
    self._file = self.enter_context(
        MetricsFile(folder, start, Mark(*position.get('metrics', ()))))
    self._sinks = self.enter_context(Deliveries(
        sink_names, sinks.subject(run, folder), start, self._file.kept))
    self._warned = {tuple(trouble) for line in self._file.kept
                    for trouble in line.get('troubles', [])}
    self._peak_flops = hardware.peak_flops(run.model.dtype)

  @property
  def tokens_by_domain(self) -> dict[str, int]:
    return dict(zip(self._domains, self._targets.tolist()))

  def position(self) -> dict[str, Any]:
    """All that a run which continues from here needs for the same lines; plain data.

    All processes must call it. Lines written so far are on the disk when it returns.
    """
    return {'tokens_by_domain': self.tokens_by_domain,
            'interval': {name: sums.tolist() for name, sums in self._sums.items()},
            'metrics': distributed.broadcast(self._mark)}

  def _mark(self) -> list[int]:
    return list(self._file.mark()) if self._file else []

  def add_input_wait(self, seconds: float):
    """Counts time that was spent waiting for the next batch."""
    self._input_wait += seconds

  def exclude(self, seconds: float):
    """Takes time that was not spent on training off the clock."""
    if self._since is not None:
      self._since += seconds

  def record_step(self, step: int, metrics: Mapping[str, Any]):
    """Adds a step's metrics, on the host. Called one step late, not to wait for the device."""
    self._targets += metrics['tokens_by_domain']
    sums = {'nll': metrics['nll_by_domain'], 'tokens': metrics['tokens_by_domain']}
    if 'preferences' in metrics:
      sums |= {f'preferences.{name}': value
               for name, value in metrics['preferences']._asdict().items()}
    if 'routing' in metrics:
      sums |= {name: value for name, value in metrics['routing']._asdict().items()
               if value is not None}
    for name, value in sums.items():
      self._sums[name] = self._sums.get(name, 0) + np.asarray(value, np.float64)
    if self._since is None:  # the first step was compiled: the clock starts after it
      self._since, self._input_wait = time.monotonic(), 0.0
    else:
      self._steps += 1
    if step % self._log_every == 0 or step == self._run.steps:
      if self._file:
        self._write_line(self._file, step, metrics)
      self._since, self._steps, self._input_wait = time.monotonic(), 0, 0.0
      self._sums = {}

  def write_evaluation(self, step: int, result: Mapping[str, Mapping]):
    """Writes the bits per byte from bits.evaluate, and `preferred` for domains of pairs."""
    if not self._file:
      return
    found = {figure: {domain: values[figure] for domain, values in result.items()
                      if values.get(figure) is not None}
             for figure in ('bits_per_byte', 'preferred')}
    self._sinks.send(self._file.write(
        step, **{figure: of_domains for figure, of_domains in found.items() if of_domains}))

  def _write_line(self, file: MetricsFile, step: int, metrics: Mapping[str, Any]):
    """Writes the line of an interval."""
    sums = self._sums
    summed, counts = 'nll', 'tokens'
    if self._run.objective.on_pairs:
      summed, counts = 'preferences.loss', 'preferences.pairs'
    loss = sums[summed].sum() / max(sums[counts].sum(), 1)
    speed = self._speed(time.monotonic())
    values = {
        'loss': loss,
        'loss_by_domain': {name: total / count for name, total, count in zip(
            self._domains, sums[summed], sums[counts]) if count},
        'lr': float(np.asarray(self._schedule(self._run.schedule_start + step - 1))),
        'grad_norm': float(metrics['grad_norm']),
        **{name: {part: float(norm) for part, norm in metrics[name].items()}
           for name in ('grad_norms', 'param_norms')},
        'tokens_by_domain': self.tokens_by_domain,
        **speed,
        'memory': hardware.peak_memory(),
    }
    if self._run.objective.on_pairs:
      values['preferences'] = {
          name: sums[f'preferences.{name}'].sum() / max(sums[counts].sum(), 1)
          for name in ('preferred', 'margin', 'chosen', 'rejected')}
    if self._run.model.num_experts:
      values |= {'balance': float(metrics['balance']), 'router_z': float(metrics['router_z']),
                 'routing': routing_figures.describe(sums, self._domains),
                 **self._new_warnings(step, sums)}
    self._sinks.send(file.write(step, **values))
    rate = speed.get('tokens_per_second')
    self._progress.update(self._run.name, step, loss, rate, self._run.seconds_left(step, rate))

  def _speed(self, now: float) -> dict[str, float]:
    """The figures that depend on the clock; none for an interval without a timed step."""
    if not self._steps or self._since is None:
      return {}
    run, seconds = self._run, now - self._since
    rate = self._steps * run.batch_size * run.seq_len / seconds
    return {'tokens_per_second': rate, 'mfu': rate * run.flops_per_token / self._peak_flops,
            'input_wait': self._input_wait / seconds}

  def _new_warnings(self, step: int, sums: Mapping[str, np.ndarray]) -> dict[str, list]:
    """The troubles of the routing that were not reported before; they are printed, too."""
    new = routing_figures.troubles(sums) - self._warned
    if not new:
      return {}
    self._warned |= new
    warnings = routing_figures.warnings_about(new, self._run.expert_names)
    for warning in warnings:
      say(f'{self._run.name}, step {step}: {warning}')
    return {'troubles': sorted(new), 'warnings': warnings}


def _for_domains(sums: np.ndarray, name: str, before: Sequence[str], domains: Sequence[str]
                 ) -> np.ndarray:
  """The sums of one figure, with an axis of the domains `before`, for these domains."""
  if list(before) == list(domains):
    return sums
  axis = 0 if name in ('nll', 'tokens') or name.startswith('preferences.') else 1
  padded = np.concatenate([sums, np.zeros_like(sums.take([0], axis))], axis)  # for new domains
  return padded.take([before.index(each) if each in before else -1 for each in domains], axis)
