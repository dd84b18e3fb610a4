"""The runs of a config at work: which are complete, what each starts from, and the rest done."""

from collections.abc import Callable
import functools
import os
import time

import jax

from btx_jax import btx, checkpoint, loop, manifest, sharding
from btx_jax import plan as plan_lib
from btx_jax.data import mixture
from btx_jax.data import text as text_lib
from btx_jax.errors import UsageError
from btx_jax.evaluate import bits, scores
from btx_jax.model import config as model_config
from btx_jax.model import llama
from btx_jax.plan import Run
from btx_jax.study import Study
from btx_jax.terminal import say


class Pipeline(Study):
  """A study at work. Making one checks what can be checked beforehand.

  Attributes:
    mesh: over all devices.
    profile: steps of each run to trace.
  """

  def __init__(self, config, workdir: str, profile: int = 0):
    super().__init__(config, workdir)
    self.profile = profile
    self.mesh = sharding.make_mesh(**config.mesh)
    sharding.check_rows(self.mesh, config.evaluation.batch_size, 'evaluation.batch_size')

  def train(self, only: str | None = None) -> bool:
    """Trains and measures every run that is not complete, or only the one named.

    Returns whether there was one to train.

    Raises:
      UsageError: there is no such run, it starts from one that is not complete, it cannot be
        laid on the mesh, or a run's directory belongs to another config. No run has been
        touched then.
    """
    if only is None:
      asked = list(self.runs.values())
    else:
      asked = [self.run(only)]
      for source in asked[0].sources:
        if self.state(source) != manifest.COMPLETE:
          raise UsageError(f'--run={only} starts from {source!r}, which is '
                           f'{self.state(source)}; do --run={source} first.')
    wanted = [run for run in asked if self.state(run.name) != manifest.COMPLETE]
    for run in wanted:
      self._check_layout(run)
    for name in self.runs:
      folder, found = self.folder(name), manifest.read(self.folder(name))
      if found:
        manifest.check(folder, found, self.spec(name))
      elif os.path.exists(os.path.join(folder, 'checkpoints')):
        raise UsageError(f'{folder} has checkpoints but no manifest.json that says what they '
                         'are; use another --workdir, or delete that folder to train anew.')
    orders = {run.name: self._order(run) for run in wanted}
    for line in dict.fromkeys(line for run in wanted for line in self._uneven(run)):
      say(line)
    with jax.set_mesh(self.mesh):
      for run in asked:
        if run.name in orders:
          with manifest.lock(self.folder(run.name)):
            self._train(run, orders[run.name])
        scores.measure(self, run)
    return bool(wanted)

  def _check_layout(self, run: Run):
    sharding.check_rows(self.mesh, run.batch_size // run.accumulation,
                        f'runs.{run.name}: train.batch_size / train.accumulation')
    if run.model.num_experts:
      sharding.holds_experts(self.mesh.shape['expert'], run.model.num_experts)
    if run.model.attention == 'cudnn' and jax.default_backend() != 'gpu':
      raise UsageError(f"runs.{run.name}: model.attention = 'cudnn' needs an NVIDIA GPU, and "
                       f"this is a {jax.default_backend()}; use 'xla'.")

  def _uneven(self, run: Run) -> list[str]:
    """What of a run's model the mesh does not divide, so that it costs memory or traffic."""
    like = jax.eval_shape(functools.partial(llama.init, run.model), jax.random.key(0))
    lines = sharding.left_whole(like, self.mesh)
    experts, devices = run.model.num_experts, self.mesh.shape['expert']
    if experts and not sharding.holds_experts(devices, experts):
      lines.append(f'runs.{run.name}: {experts} experts are fewer than mesh.expert = {devices} '
                   'devices: their weights are gathered where they are used, as by mesh.fsdp')
    return lines

  def _order(self, run: Run):
    return mixture.training_order(
        self.text.train, run.weights, run.length, mixture.seed_of(run.name, run.seed))

  @functools.cached_property
  def text(self) -> text_lib.Text:
    """The tokenized text; made on first use."""
    return text_lib.prepare(self.config, self.data_folder)

  def spec(self, name: str) -> dict:
    """All that decides the result of a run: its manifest's `spec`."""
    run = self.runs[name]
    return run.spec() | {
        'tokenizer': self.text.tokenizer.hash,
        'data': {domain: self.text.train[domain].hash for domain in run.weights},
        'sources': [[source, manifest.identity(self.spec(source))] for source in run.sources],
    }

  def _train(self, run: Run, order):
    folder = self.folder(run.name)
    found = manifest.read(folder)
    if found and found['state'] == manifest.COMPLETE:
      return  # by another job, since we looked
    found = manifest.go_on(found) if found else manifest.begin(run.name, self.spec(run.name))
    found['devices'] = f'{jax.device_count()} x {jax.devices()[0].device_kind}'
    manifest.write(folder, found)
    began, before = time.monotonic(), found['seconds']

    def on_checkpoint(step: int, tokens_by_domain: dict[str, int]):
      found.update(steps_done=step, tokens_by_domain=tokens_by_domain, saved=manifest.now(),
                   seconds=before + time.monotonic() - began)
      manifest.write(folder, found)

    settings = loop.Settings(
        log=self.config.log_every, evaluate=self.config.evaluation.every,
        checkpoint=self.config.checkpoint_every, keep=self.config.checkpoints_kept,
        tensorboard=self.config.tensorboard, profile=self.profile)
    try:
      loop.train_run(
          run, folder, self.mesh, lambda: self.initial_params(run), order,
          list(self.text.train), settings, functools.partial(self.evaluate, run.model),
          on_checkpoint)
      found['state'] = manifest.COMPLETE
    except KeyboardInterrupt:
      found['state'] = manifest.STOPPED
      raise
    except BaseException as error:
      found |= {'state': manifest.FAILED, 'error': str(error) or repr(error)}
      raise
    finally:
      found['seconds'] = before + time.monotonic() - began
      manifest.write(folder, found)

  def initial_params(self, run: Run):
    """The parameters that a run starts from."""
    rng = jax.random.key(mixture.seed_of(run.name, run.seed))
    if run.init == plan_lib.RANDOM:
      return self._sharded(functools.partial(llama.init, run.model), rng)
    if run.init == plan_lib.CHECKPOINT:
      return self.final_params(run.sources[0])
    return self._sharded(
        lambda experts, rng: btx.mix(btx.stack(experts), rng, run.router_std),
        [self.final_params(source) for source in run.sources], rng)

  def average_params(self, run: Run):
    """The uniform average of what a mixture was made from: the baseline without experts."""
    return self._sharded(
        lambda experts: btx.average(btx.stack(experts)),
        [self.final_params(source) for source in run.sources])

  def final_params(self, name: str):
    """The parameters of a complete run."""
    run = self.runs[name]
    like = jax.eval_shape(functools.partial(llama.init, run.model), jax.random.key(0))
    return checkpoint.load_params(
        os.path.join(self.folder(name), 'checkpoints'), run.steps,
        checkpoint.abstract(like, sharding.shardings(like, self.mesh)))

  def evaluate(self, model: model_config.Config, params) -> dict[str, dict]:
    """Bits per byte of every domain's held-out text, see evaluate.bits."""
    return bits.evaluate(
        model, params, self.text.held_out, self.mesh, self.config.data.length,
        self.config.evaluation.batch_size, self.text.tokenizer)

  def _sharded(self, f: Callable, *args):
    shardings = sharding.shardings(jax.eval_shape(f, *args), self.mesh)
    return jax.jit(f, out_shardings=shardings)(*args)
