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
from btx_jax.training import metrics as metrics_file
from btx_jax.training import optim, routing_figures, sinks, spikes
from btx_jax.training.delivery import Deliveries
from btx_jax.training.metrics import Mark, MetricsFile


class Recorder(contextlib.ExitStack):
  """Keeps the sums of an interval, from one line to the next; a context manager.

  All processes keep them, because all must save the same position. Only process 0 writes.

  Attributes:
    domains: names of the domains.
    tokens_by_domain: number of targets trained on so far, by domain.
    skipped_in_a_row: number of consecutive skipped steps, up to the last step.
  """

  def __init__(self, run: Run, folder: str, domains: list[str], log_every: int, start: int,
               position: Mapping[str, Any], sink_names: Sequence[str], progress: Progress):
    """
    Args:
      run: the run to record.
      folder: the run's directory.
      domains: names of the domains, in the order of the figures of a step.
      log_every: steps between lines.
      start: the step of the checkpoint that the run continues from; 0 without one.
      position: what `position` returned when that checkpoint was saved; {} without one.
      sink_names: where lines are sent, see sinks.py.
      progress: the bars in the terminal.
    """
    super().__init__()
    self._run, self.domains, self._log_every = run, domains, log_every
    before = position.get('tokens_by_domain', {})
    self._targets = np.array([before.get(name, 0) for name in domains], np.int64)
    # A config may have gained or lost a domain since then.
    self._sums = {name: _for_domains(np.array(values, np.float64), name, list(before), domains)
                  for name, values in position.get('interval', {}).items()}
    self._since = None  # when the clock of this interval started; None while compiling
    self._steps, self._input_wait = 0, 0.0  # since then
    self.skipped_in_a_row: int = position.get('skipped_in_a_row', 0)
    self._skipped: int = position.get('skipped', 0)
    self._losses: list[float] = list(position.get('losses', []))  # of the last steps
    self._spike: str = position.get('spike', '')  # the first of the run, as a sentence
    self._unwritten: list[str] = list(position.get('unwritten', []))  # warnings for the next line
    self._schedule = optim.schedule_of(run)
    self._progress = progress
    self._file = None  # only process 0 has one, and only for a run that has lines to write
    mark = Mark(*position.get('metrics', ()))
    if not distributed.is_process_0():
      return
    if start == run.steps and not mark.late and not metrics_file.problem(folder, mark):
      return
    self._file = self.enter_context(MetricsFile(folder, start, mark))
    self._sinks = self.enter_context(Deliveries(
        sink_names, sinks.subject(run, folder), start, self._file.kept))
    self._warned = {tuple(trouble) for line in self._file.kept
                    for trouble in line.get('troubles', [])}
    self._peak_flops = hardware.peak_flops(run.model.dtype)

  @property
  def health(self) -> dict[str, Any]:
    """The fields of a manifest on trouble so far; see health_at."""
    return health_at({'skipped': self._skipped, 'spike': self._spike})

  @property
  def tokens_by_domain(self) -> dict[str, int]:
    return dict(zip(self.domains, self._targets.tolist()))

  def position(self) -> dict[str, Any]:
    """Plain data from which a continued run writes the same lines as one that was not stopped.

    All processes must call this. Lines written so far are on the disk when it returns.
    """
    return {'tokens_by_domain': self.tokens_by_domain,
            'interval': {name: sums.tolist() for name, sums in self._sums.items()},
            'skipped': self._skipped, 'skipped_in_a_row': self.skipped_in_a_row,
            'losses': self._losses, 'spike': self._spike, 'unwritten': self._unwritten,
            'metrics': distributed.broadcast(self._mark)}

  def _mark(self) -> list[int | str]:
    return [*self._file.mark()] if self._file else []

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
    self.skipped_in_a_row = 0
    self._notice_spike(step, float(metrics['loss']))
    self._end_step(step, metrics)

  def skip_step(self, step: int, problem: str):
    """Counts a step that was skipped because its numbers are not finite.

    `problem` says which they are, see not_finite.describe. It is printed the first time.
    """
    if not self._skipped:
      say(f'{self._run.name}: {problem}. The step is skipped, and so are others like it, at most '
          f'{self._run.skip_nonfinite} in a row')
    self._skipped += 1
    self.skipped_in_a_row += 1
    self._end_step(step, None)

  def _notice_spike(self, step: int, loss: float):
    if not self._spike:
      self._spike = spikes.describe(step, loss, self._losses)
      if self._spike:
        say(f'{self._run.name}: {self._spike}')
        self._unwritten.append(self._spike)
    self._losses = [*self._losses[1 - spikes.LAST:], loss]

  def _end_step(self, step: int, metrics: Mapping[str, Any] | None):
    """Ends the interval if a line is due; `metrics` are None if the step was skipped."""
    if self._since is None:  # the first step was compiled: the clock starts after it
      self._since, self._input_wait = time.monotonic(), 0.0
    else:
      self._steps += 1
    if step % self._log_every == 0 or step == self._run.steps:
      now = time.monotonic()  # writing waits for the devices, and belongs to the next interval
      if self._file:
        self._write_line(self._file, step, metrics, now)
      self._since, self._steps, self._input_wait = now, 0, 0.0
      self._sums, self._unwritten = {}, []

  def write_evaluation(self, step: int, result: Mapping[str, Mapping]):
    """Writes the bits per byte from bits.evaluate, and `preferred` for domains of pairs."""
    if not self._file:
      return
    found = {figure: {domain: values[figure] for domain, values in result.items()
                      if values.get(figure) is not None}
             for figure in ('bits_per_byte', 'preferred')}
    self._sinks.send(self._file.write(
        step, **{figure: of_domains for figure, of_domains in found.items() if of_domains}))

  def _write_line(self, file: MetricsFile, step: int, metrics: Mapping[str, Any] | None,
                  now: float):
    """Writes the line of an interval that ends `now`."""
    speed = self._speed(now)
    values = self._figures_of_sums()
    if metrics:
      values |= self._figures_of_step(metrics)
    warnings = self._unwritten
    if self._sums and self._run.model.num_experts:
      new = routing_figures.troubles(self._sums) - self._warned
      values |= {'troubles': sorted(new)} if new else {}
      warnings = [*warnings, *self._warnings_about(step, new)]
    self._sinks.send(file.write(
        step, **values, lr=float(np.asarray(self._schedule(self._run.schedule_start + step - 1))),
        tokens_by_domain=self.tokens_by_domain, **speed, memory=hardware.peak_memory(),
        **({'skipped': self._skipped} if self._skipped else {}),
        **({'warnings': warnings} if warnings else {})))
    if self._sums:
      rate = speed.get('tokens_per_second')
      self._progress.update(self._run.name, step, values['loss'], rate,
                            self._run.seconds_left(step, rate))

  def _figures_of_sums(self) -> dict[str, Any]:
    """The figures that are means over the interval; none if all its steps were skipped."""
    sums = self._sums
    if not sums:
      return {}
    summed, counts = 'nll', 'tokens'
    if self._run.objective.on_pairs:
      summed, counts = 'preferences.loss', 'preferences.pairs'
    count = max(sums[counts].sum(), 1)
    values: dict[str, Any] = {
        'loss': sums[summed].sum() / count,
        'loss_by_domain': {name: total / of_domain for name, total, of_domain in zip(
            self.domains, sums[summed], sums[counts]) if of_domain}}
    if self._run.objective.on_pairs:
      values['preferences'] = {name: sums[f'preferences.{name}'].sum() / count
                               for name in ('preferred', 'margin', 'chosen', 'rejected')}
    if self._run.model.num_experts:
      values['routing'] = routing_figures.describe(sums, self.domains)
    return values

  def _figures_of_step(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a single step."""
    names = ['grad_norm']
    if self._run.model.num_experts:
      names += ['balance', 'router_z']
    return {**{name: float(metrics[name]) for name in names},
            **{name: {part: float(norm) for part, norm in metrics[name].items()}
               for name in ('grad_norms', 'param_norms')}}

  def _speed(self, now: float) -> dict[str, float]:
    """The figures that depend on the clock; none for an interval without a timed step."""
    if not self._steps or self._since is None:
      return {}
    run, seconds = self._run, now - self._since
    rate = self._steps * run.batch_size * run.seq_len / seconds
    return {'tokens_per_second': rate, 'mfu': rate * run.flops_per_token / self._peak_flops,
            'input_wait': self._input_wait / seconds}

  def _warnings_about(self, step: int, new: set[tuple[str, int, int]]) -> list[str]:
    """Sentences about troubles of the routing that were not reported before; they are printed."""
    self._warned |= new
    warnings = routing_figures.warnings_about(new, self._run.expert_names)
    for warning in warnings:
      say(f'{self._run.name}, step {step}: {warning}')
    return warnings


def health_at(position: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a manifest on trouble up to a checkpoint with this Recorder.position."""
  return {'skipped_steps': position['skipped'], 'loss_spike': position['spike']}


def _for_domains(sums: np.ndarray, name: str, before: Sequence[str], domains: Sequence[str]
                 ) -> np.ndarray:
  """The sums of one figure, with an axis of the domains `before`, for these domains."""
  if list(before) == list(domains):
    return sums
  axis = 0 if name in ('nll', 'tokens') or name.startswith('preferences.') else 1
  padded = np.concatenate([sums, np.zeros_like(sums.take([0], axis))], axis)  # for new domains
  return padded.take([before.index(each) if each in before else -1 for each in domains], axis)
