"""What is told of a run while it goes on: takes in the metrics of each step, writes a line of
metrics.jsonl an interval, moves the progress bar, warns."""

from collections.abc import Mapping
import contextlib
import math
import time

import numpy as np

from btx_jax.devices import distributed, hardware
from btx_jax.model import config as model_config
from btx_jax.run import Run
from btx_jax.terminal import Progress, say
from btx_jax.training import optim
from btx_jax.training import routing_figures as routing
from btx_jax.training.metrics import MetricsFile


class Recorder(contextlib.ExitStack):
  """Keeps the sums of an interval, from one line to the next; a context manager.

  Attributes:
    tokens_by_domain: targets trained on so far, by domain.
  """

  def __init__(self, run: Run, folder: str, domains: list[str], every: int, start: int,
               tokens_by_domain: Mapping[str, int], tensorboard: bool, progress: Progress):
    """`start` and `tokens_by_domain` are those of the checkpoint that the run goes on from."""
    super().__init__()
    self._run, self._domains, self._every = run, domains, every
    self._seen = np.array([tokens_by_domain.get(name, 0) for name in domains], np.int64)
    self._steps = self._waited = 0
    self._sums = None
    self._since = None  # when the clock of this interval was started; None while compiling
    self._schedule = optim.schedule(run.optimizer, run.steps)
    self._progress = progress
    self._file = None  # only process 0 has one, and only for a run that is not done
    if not distributed.is_first() or start == run.steps:
      return
    self._file = self.enter_context(MetricsFile(folder, start, tensorboard))
    self._warned = {tuple(trouble) for line in self._file.kept
                    for trouble in line.get('troubles', [])}
    self._peak = hardware.peak_flops(run.model.dtype)

  @property
  def tokens_by_domain(self) -> dict[str, int]:
    return dict(zip(self._domains, self._seen.tolist()))

  def waited(self, seconds: float):
    """The next batch was not ready at once."""
    self._waited += seconds

  def paused(self, seconds: float):
    """Something else than training took this long."""
    if self._since is not None:
      self._since += seconds

  def step(self, step: int, metrics):
    """Takes in a step's metrics, on the host. Called one step late, not to wait for the device.

    Raises:
      FloatingPointError: the loss or the norm of its gradient is not finite.
    """
    loss, norm = float(metrics['loss']), float(metrics['grad_norm'])
    if not math.isfinite(loss) or not math.isfinite(norm):
      raise FloatingPointError(
          f'the loss is {loss} and the norm of its gradient {norm} at step {step}')
    self._seen += metrics['tokens_by_domain']
    if not self._file:
      return
    sums = {'nll': metrics['nll_by_domain'], 'tokens': metrics['tokens_by_domain']}
    if 'routing' in metrics:
      sums |= {name: value for name, value in metrics['routing']._asdict().items()
               if value is not None}
    sums = {name: np.asarray(value, np.float64) for name, value in sums.items()}
    self._sums = ({name: value + sums[name] for name, value in self._sums.items()}
                  if self._sums else sums)
    if self._since is None:  # the first step was compiled: the clock starts behind it
      self._since, self._waited = time.monotonic(), 0
    else:
      self._steps += 1
    if step % self._every == 0 or step == self._run.steps:
      self._write(step, metrics)

  def _write(self, step: int, metrics):
    sums, run = self._sums, self._run
    loss = sums['nll'].sum() / max(sums['tokens'].sum(), 1)
    values = {
        'loss': loss,
        'loss_by_domain': {name: nll / tokens for name, nll, tokens in zip(
            self._domains, sums['nll'], sums['tokens']) if tokens},
        'lr': float(self._schedule(step - 1)),
        'grad_norm': float(metrics['grad_norm']),
        **{name: {part: float(norm) for part, norm in metrics[name].items()}
           for name in ('grad_norms', 'param_norms')},
        'tokens_by_domain': self.tokens_by_domain,
    }
    now = time.monotonic()
    rate = None
    if self._steps:
      seconds = now - self._since
      rate = self._steps * run.batch_size * run.seq_len / seconds
      flops = model_config.train_flops_per_token(run.model, run.seq_len)
      values |= {'tokens_per_second': rate, 'mfu': rate * flops / self._peak,
                 'input_wait': self._waited / seconds}
    values['memory'] = hardware.memory()
    if run.model.num_experts:
      values |= {'balance': float(metrics['balance']), 'router_z': float(metrics['router_z']),
                 'routing': routing.describe(sums, self._domains)}
      new = routing.troubles(sums) - self._warned
      if new:
        self._warned |= new
        values |= {'troubles': sorted(new), 'warnings': routing.tell(new, run.expert_names)}
        for warning in values['warnings']:
          say(f'{run.name}, step {step}: {warning}')
    self._file.write(step, **values)
    self._progress.update(run.name, step, loss, rate)
    self._since, self._steps, self._waited, self._sums = now, 0, 0, None

  def evaluated(self, step: int, result: Mapping[str, Mapping]):
    """Writes what evaluate.bits found."""
    if not self._file:
      return
    self._file.write(step, bits_per_byte={
        domain: values['bits_per_byte'] for domain, values in result.items()})
