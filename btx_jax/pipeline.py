"""The runs of a config at work: which are complete, what each starts from, and the rest done."""

import contextlib
import dataclasses
import functools
import os
import time

import jax
import numpy as np

from btx_jax import files
from btx_jax import run as run_lib
from btx_jax.convert import export
from btx_jax.data import mixture
from btx_jax.data import text as text_lib
from btx_jax.devices import distributed, hardware, sharding
from btx_jax.errors import UsageError
from btx_jax.evaluate import bits, ensemble, scores
from btx_jax.model import config as model_config
from btx_jax.model import llama
from btx_jax.run import Run
from btx_jax.study import compatibility as mixable
from btx_jax.study import manifest, sources
from btx_jax.study import plan as plan_lib
from btx_jax.study.study import Study
from btx_jax.terminal import say
from btx_jax.training import checkpoint, layout, loop


class Pipeline(Study):
  """A study at work. Making one checks what can be checked beforehand.

  Attributes:
    mesh: over all devices.
    profile: steps of each run to trace.
  """

  def __init__(self, config, workdir: str, profile: int = 0):
    super().__init__(config, workdir)
    self.profile = profile
    if set(config.evaluation.merge) - {ensemble.POSTERIOR}:
      ensemble.vectorizer()  # so that it is missed now and not after the training
    self.mesh = layout.mesh(config, self.runs, jax.devices(), hardware.device_memory())

  def train(self, only: str | None = None) -> bool:
    """Trains and measures every run that is not complete, or only the one named.

    Returns whether there was one to train.

    Raises:
      UsageError: there is no such run, it starts from one that is not complete, it cannot be
        laid on the mesh, or a run's directory belongs to another config. No run has been
        touched then.
    """
    asked = list(self.runs.values()) if only is None else [self.run(only)]
    incomplete = distributed.decided(lambda: self._incomplete(asked, only))
    wanted = [run for run in asked if run.name in incomplete]
    groups = [asked] if only else plan_lib.groups(asked, self.config.stacked)
    todos = [[run for run in group if run.name in incomplete] for group in groups]
    for todo in todos:
      for run in todo:
        layout.check(run, self.mesh, stacked=len(todo) > 1)
    distributed.check_shared(self.workdir)
    distributed.agree({'tokens': {name: tokens.hash for name, tokens in self.text.train.items()},
                       'tokenizer': self.text.tokenizer.hash,
                       'pretrained': {run.folder: run.content for run in self.runs.values()}})
    distributed.first(self._check_manifests)
    for line in dict.fromkeys(line for run in wanted for line in layout.uneven(run, self.mesh)):
      say(line)
    for run in wanted:
      for line in mixable.remarks(run, self.runs) if run.init == run_lib.MIX else ():
        say(line)
    orders = {run.name: self._order(run) for run in wanted if run.steps}
    with jax.set_mesh(self.mesh):
      for group, todo in zip(groups, todos):
        with contextlib.ExitStack() as stack:
          for run in todo:
            lock = files.lock(self.folder(run.name))
            distributed.first(functools.partial(stack.enter_context, lock))
          self._train(todo, orders)
        for run in group:
          scores.measure(self, run)
    return bool(wanted)

  def _incomplete(self, asked: list[Run], only: str | None) -> list[str]:
    for source in asked[0].sources if only else ():
      if self.state(source) != manifest.COMPLETE:
        raise UsageError(f'--run={only} starts from {source!r}, which is '
                         f'{self.state(source)}; do --run={source} first.')
    return [run.name for run in asked if self.state(run.name) != manifest.COMPLETE]

  def _check_manifests(self):
    for name in self.runs:
      folder, found = self.folder(name), manifest.read(self.folder(name))
      if found:
        manifest.check(folder, found, self.spec(name))
      elif os.path.exists(os.path.join(folder, 'checkpoints')):
        raise UsageError(f'{folder} has checkpoints but no manifest.json that says what they '
                         'are; use another --workdir, or delete that folder to train anew.')

  def _order(self, run: Run):
    return mixture.training_order(
        self.text.train, run.weights, run.seq_len, run_lib.seed_of(run.name, run.seed))

  @functools.cached_property
  def text(self) -> text_lib.Text:
    """The tokenized text; made on first use, by process 0 alone."""
    made = distributed.first(lambda: text_lib.prepare(self.config, self.data_folder))
    return made or text_lib.open_prepared(self.config, self.data_folder)

  def spec(self, name: str) -> dict:
    """All that decides the result of a run: its manifest's `spec`."""
    run = self.runs[name]
    return run.spec() | {
        'tokenizer': self.text.tokenizer.hash,
        'data': {domain: self.text.train[domain].hash for domain in run.weights},
        'sources': [[source, manifest.identity(self.spec(source))] for source in run.sources],
    }

  def _train(self, runs: list[Run], orders):
    """Trains runs as one program, each on the rows of its order."""
    began = time.monotonic()
    manifests, jobs = {}, []
    for run in runs:
      found = distributed.decided(functools.partial(self._begin, run))
      if found:
        manifests[run.name] = found
        if run.steps:
          jobs.append(loop.Job(run, self.folder(run.name),
                               functools.partial(self.initial_params, run), orders[run.name]))
    if not manifests:
      return
    before = {name: found['seconds'] for name, found in manifests.items()}

    def note(names=tuple(manifests), **changes):
      for name in names:
        # Of the time each run has its share, if several run at once.
        seconds = before[name] + (time.monotonic() - began) / len(manifests)
        manifests[name].update(seconds=seconds, **changes)
        if distributed.is_first():
          manifest.write(self.folder(name), manifests[name])

    def on_checkpoint(name: str, step: int, tokens_by_domain: dict[str, int]):
      note([name], steps_done=step, tokens_by_domain=tokens_by_domain, saved=manifest.now())

    settings = loop.Settings(
        log_every=self.config.log_every, evaluation_every=self.config.evaluation.every,
        checkpoint_every=self.config.checkpoint_every,
        checkpoints_kept=self.config.checkpoints_kept,
        tensorboard=self.config.tensorboard, profile=self.profile)
    try:
      if jobs:
        loop.run(jobs, self.mesh, list(self.text.train), settings, self.evaluate, on_checkpoint)
      note(state=manifest.COMPLETE)
    except KeyboardInterrupt:
      note(state=manifest.STOPPED)
      raise
    except BaseException as error:
      note(state=manifest.FAILED, error=str(error) or repr(error))
      raise

  def _begin(self, run: Run) -> dict | None:
    """The manifest of a run that begins or goes on; None if another job has completed it."""
    folder = self.folder(run.name)
    found = manifest.read(folder)
    if found and found['state'] == manifest.COMPLETE:
      return None
    found = manifest.go_on(found) if found else manifest.begin(run.name, self.spec(run.name))
    found['devices'] = f'{jax.device_count()} x {jax.devices()[0].device_kind}'
    found['processes'] = jax.process_count()
    manifest.write(folder, found)
    return found

  def initial_params(self, run: Run):
    """The parameters that a run starts from."""
    if run.init == run_lib.RANDOM:
      rng = jax.random.key(run_lib.seed_of(run.name, run.seed))
      shardings = sharding.shardings(llama.shapes(run.model), self.mesh)
      return jax.jit(functools.partial(llama.init, run.model), out_shardings=shardings)(rng)
    if run.init == run_lib.CHECKPOINT:
      source = run.sources[0]
      params, biased = self.final_params(source), self.runs[source].model.router_bias
    elif run.init == run_lib.HUGGING_FACE:
      plain = dataclasses.replace(run.model, router_bias=False)
      params, biased = self._read(sources.start(self, run), plain), False
    else:
      return self._mix(run, run.model, sources.start(self, run))
    if run.model.router_bias == biased:
      return params
    shardings = sharding.shardings(llama.shapes(run.model), self.mesh)
    return jax.jit(functools.partial(llama.with_bias, run.model), out_shardings=shardings)(params)

  def average_params(self, run: Run):
    """The uniform average of what a mixture was made from: the baseline without experts."""
    # The weights of the mean without its rules, for the feed-forward layers too.
    mean = dataclasses.replace(run.recipe, rest=run.recipe.rest[-1:])
    dense = run_lib.averaged_model(run, self.runs)
    return self._mix(run, dense, sources.mix(self, run, dense, mean))

  def _mix(self, run: Run, model: model_config.Config, mix: sources.Mix):
    """What a mixture starts from, or another mixture of the same runs."""
    began = time.monotonic()
    params = jax.block_until_ready(self._read(mix, model))
    say(f'{", ".join(run.sources)}: read and mixed in {time.monotonic() - began:.1f} s, peak '
        f'memory {hardware.memory()["host"] / 1e9:.1f} GB')
    return params

  def _read(self, source: export.Source, model: model_config.Config):
    """Parameters of a source, of which each process reads what its devices hold."""
    return jax.tree.map_with_path(
        lambda key_path, like: sharding.from_slices(
            like, functools.partial(source.read, sharding.path_of(key_path))),
        self._like(model))

  def final_params(self, name: str):
    """The parameters of a complete run."""
    run = self.runs[name]
    if not run.steps:
      return self.initial_params(run)
    return checkpoint.load_params(
        sources.checkpoints(self, name), run.steps, self._like(run.model))

  def _like(self, model: model_config.Config):
    shapes = llama.shapes(model)
    return sharding.abstract(shapes, sharding.shardings(shapes, self.mesh))

  def merge(self, run: Run, forms: list[str]) -> dict[str, dict[str, dict]]:
    """Bits per byte by form and domain of what a mixture was made from, unmixed: see
    evaluate.ensemble."""
    unmixed = [self.runs[name] for name in run.sources]
    likeness = None
    if set(forms) != {ensemble.POSTERIOR}:
      likeness = ensemble.Likeness([self._seen(source) for source in unmixed])
      for domain, tokens in self.text.held_out.items():
        taken = ensemble.taken_for(likeness, tokens, self.text.tokenizer)
        say(f'{run.name}: by tf-idf, documents of {domain} are like those of ' + ', '.join(
            f'{source.name} {share:.0%}' for source, share in zip(unmixed, taken)))
    nll = {domain: [] for domain in self.text.held_out}
    for source in unmixed:
      say(f'{source.name}: measuring for the merge of {run.name}')
      params = self.final_params(source.name)
      for domain, tokens in self.text.held_out.items():
        nll[domain].append(ensemble.token_nll(
            source.model, params, tokens, self.mesh, self.config.data.seq_len,
            self.config.evaluation.batch_size))
      del params  # one at a time
    return ensemble.evaluate(forms, {domain: np.stack(of_one, 1) for domain, of_one in nll.items()},
                             self.text.held_out, likeness, self.text.tokenizer)

  def _seen(self, run: Run, rows: int = 1000) -> list[str]:
    """Some of the text that a run was trained on."""
    order = self._order(run)
    return [self.text.tokenizer.decode(order[i]['tokens'].tolist())
            for i in range(min(rows, run.steps * run.batch_size))]

  def evaluate(self, model: model_config.Config, params) -> dict[str, dict]:
    """Bits per byte of every domain's held-out text, see evaluate.bits."""
    return bits.evaluate(
        model, params, self.text.held_out, self.mesh, self.config.data.seq_len,
        self.config.evaluation.batch_size, self.text.tokenizer)
