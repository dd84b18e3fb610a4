"""The runs of a config at work: which are complete, what each starts from, and the rest done."""

from collections.abc import Callable
import dataclasses
import functools
import os
import time

import jax

from btx_jax import btx, checkpoint, loop, manifest, sharding
from btx_jax import plan as plan_lib
from btx_jax.data import corpora, mixture
from btx_jax.data import tokenizer as tokenizer_lib
from btx_jax.data import tokens as tokens_lib
from btx_jax.errors import UsageError, nearest
from btx_jax.evaluate import bits
from btx_jax.metrics import say
from btx_jax.model import config as model_config
from btx_jax.model import llama
from btx_jax.plan import Run


@dataclasses.dataclass(frozen=True)
class Text:
  """The tokenized text of all domains, by name (sorted: a row's domain is its index)."""
  tokenizer: tokenizer_lib.Tokenizer
  train: dict[str, tokens_lib.Tokens]
  held_out: dict[str, tokens_lib.Tokens]


class Pipeline:
  """A config in a working directory. Making one checks what can be checked beforehand.

  Attributes:
    config: as configs/base.py makes it.
    workdir: where everything goes.
    runs: by name, in the order in which they can be done.
    mesh: over all devices.
  """

  def __init__(self, config, workdir: str):
    self.config, self.workdir = config, workdir
    self._domains = sorted(corpora.from_config(config.domains), key=lambda d: d.name)
    if not 0 < config.data.held_out < 1:
      raise UsageError(f'data.held_out = {config.data.held_out} is a share between 0 and 1.')
    for field, value, least in (
        ('log_every', config.log_every, 1), ('checkpoint_every', config.checkpoint_every, 1),
        ('checkpoints_kept', config.checkpoints_kept, 1),
        ('evaluation.every', config.evaluation.every, 0),
        ('evaluation.tokens', config.evaluation.tokens, 1)):
      if value < least:
        raise UsageError(f'{field} = {value} must be at least {least}.')
    given = config.tokenizer.path
    vocab_size = (tokenizer_lib.load(given).vocab_size if given else
                  config.tokenizer.vocab_size)
    self.runs = plan_lib.make_plan(config, vocab_size)
    self.mesh = sharding.make_mesh(**config.mesh)
    sharding.check_rows(self.mesh, config.evaluation.batch_size, 'evaluation.batch_size')

  def folder(self, name: str) -> str:
    """The directory of a run."""
    return os.path.join(self.workdir, name)

  def state(self, name: str) -> str:
    """Of a run: 'missing', or what its manifest says."""
    found = manifest.read(self.folder(name))
    return found['state'] if found else 'missing'

  def train(self, only: str | None = None) -> bool:
    """Trains every run that is not complete, or only the one named; True if there was one.

    Raises:
      UsageError: there is no such run, it starts from one that is not complete, it cannot be
        laid on the mesh, or a run's directory belongs to another config. No run has been
        touched then.
    """
    if only is None:
      wanted = list(self.runs.values())
    elif only in self.runs:
      wanted = [self.runs[only]]
      for source in wanted[0].sources:
        if self.state(source) != manifest.COMPLETE:
          raise UsageError(f'--run={only} starts from {source!r}, which is '
                           f'{self.state(source)}; do --run={source} first.')
    else:
      raise UsageError(f'--run={only} is not a run of this config; {nearest(only, self.runs)}')
    wanted = [run for run in wanted if self.state(run.name) != manifest.COMPLETE]
    for run in wanted:
      self._check_layout(run)
    for name in self.runs:
      folder, found = self.folder(name), manifest.read(self.folder(name))
      if found:
        manifest.check(folder, found, self.spec(name))
      elif os.path.exists(os.path.join(folder, 'checkpoints')):
        raise UsageError(f'{folder} has checkpoints but no manifest.json that says what they '
                         'are; use another --workdir, or delete that folder to train anew.')
    orders = [self._order(run) for run in wanted]
    with jax.set_mesh(self.mesh):
      for run, order in zip(wanted, orders):
        with manifest.lock(self.folder(run.name)):
          self._train(run, order)
    return bool(wanted)

  def _check_layout(self, run: Run):
    sharding.check_rows(self.mesh, run.batch_size // run.accumulation,
                        f'runs.{run.name}: train.batch_size / train.accumulation')
    if run.model.num_experts:
      sharding.holds_experts(self.mesh.shape['expert'], run.model.num_experts)
    if run.model.attention == 'cudnn' and jax.default_backend() != 'gpu':
      raise UsageError(f"runs.{run.name}: model.attention = 'cudnn' needs an NVIDIA GPU, and "
                       f"this is a {jax.default_backend()}; use 'xla'.")

  def _order(self, run: Run):
    return mixture.training_order(
        self.text.train, run.weights, run.length, mixture.seed_of(run.name, run.seed))

  @functools.cached_property
  def text(self) -> Text:
    """The tokenized text; made on first use."""
    folder = os.path.join(self.workdir, 'data')
    tokenizer = self._tokenizer(folder)
    train, held_out = {}, {}
    for domain in self._domains:
      path = os.path.join(folder, domain.name)
      if not os.path.exists(path):
        say(f'{domain.name}: reading and tokenizing')
      meta = tokens_lib.prepare(path, domain, tokenizer, self.config.data.held_out)
      train[domain.name] = tokens_lib.load(path, 'train')
      held_out[domain.name] = tokens_lib.load(path, 'heldout').sample(
          self.config.evaluation.tokens)
      say(f'{domain.name}: {meta["train"]["documents"]:,} documents, '
          f'{meta["train"]["bytes"] / 1e6:.1f} MB, {meta["train"]["tokens"] / 1e6:.2f} M tokens '
          f'to train on; {meta["heldout"]["documents"]:,} documents held out')
    return Text(tokenizer, train, held_out)

  def _tokenizer(self, folder: str) -> tokenizer_lib.Tokenizer:
    """The given tokenizer, or one trained from the text, kept in `folder` either way."""
    settings = self.config.tokenizer
    kept = os.path.join(folder, 'tokenizer.model')
    if settings.path:
      tokenizer = tokenizer_lib.load(settings.path)
    elif os.path.exists(kept):
      tokenizer = tokenizer_lib.load(kept)
      if tokenizer.vocab_size != settings.vocab_size:
        raise UsageError(f'{kept} has {tokenizer.vocab_size} pieces, but tokenizer.vocab_size '
                         f'= {settings.vocab_size}. Use another --workdir.')
    else:
      say(f'tokenizer: training {settings.vocab_size:,} pieces')
      tokenizer = tokenizer_lib.train(self._sample(), settings.vocab_size)
    if not os.path.exists(kept):
      os.makedirs(folder, exist_ok=True)
      partial = f'{kept}.{os.getpid()}.partial'
      with open(partial, 'wb') as file:
        file.write(tokenizer.proto)
      os.replace(partial, kept)
    return tokenizer

  def _sample(self):
    """The first training documents of every domain, for training a tokenizer."""
    for domain in self._domains:
      left = self.config.tokenizer.sample_chars
      for text in corpora.documents(domain):
        if tokens_lib.share(text) < self.config.data.held_out:
          continue
        yield text[:left]
        left -= len(text)
        if left <= 0:
          break

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
    manifest.write(folder, found)
    began = time.monotonic()

    def on_checkpoint(step: int, tokens_by_domain: dict[str, int]):
      found.update(steps_done=step, tokens_by_domain=tokens_by_domain)
      manifest.write(folder, found)

    intervals = loop.Intervals(
        log=self.config.log_every, evaluate=self.config.evaluation.every,
        checkpoint=self.config.checkpoint_every, keep=self.config.checkpoints_kept)
    try:
      loop.train_run(
          run, folder, self.mesh, lambda: self.initial_params(run), order,
          list(self.text.train), intervals, functools.partial(self.evaluate, run.model),
          on_checkpoint)
      found['state'] = manifest.COMPLETE
    except BaseException as error:
      found |= {'state': manifest.FAILED, 'error': repr(error)}
      raise
    finally:
      found['seconds'] += time.monotonic() - began
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
        self.config.evaluation.batch_size, self.text.tokenizer.eos_id)

  def _sharded(self, f: Callable, *args):
    shardings = sharding.shardings(jax.eval_shape(f, *args), self.mesh)
    return jax.jit(f, out_shardings=shardings)(*args)
