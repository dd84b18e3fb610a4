"""The runs of a config carried out: trained in their order, and measured."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import functools
import os
import time
from typing import Any

import jax
import numpy as np

from btx_jax import storage
from btx_jax.data import mixture
from btx_jax.data.text import Text, open_prepared, prepare
from btx_jax.devices import distributed
from btx_jax.errors import RunError, UsageError
from btx_jax.files import locks, places
from btx_jax.fitting import fit, reference, samples, select
from btx_jax.model.config import Config
from btx_jax.run import BEST, Run
from btx_jax.scoring import (
  answers,
  bits,
  builtin,
  decomposition,
  ensemble,
  regression,
  scores,
  selected,
)
from btx_jax.selector import TFIDF, Merge
from btx_jax.study import (
  changes,
  compatibility,
  context,
  continued,
  directories,
  manifest,
  params,
  plan,
  recorded,
  sources,
  state,
  twins,
)
from btx_jax.study.study import MISSING, Study
from btx_jax.terminal import say
from btx_jax.training import damage, layout, loop, metrics, saving, sinks
from btx_jax.training.best import Best, held_out_loss


class Pipeline(Study):
  """A study on devices. Creating one checks what can be checked beforehand.

  Attributes:
    mesh: over all devices.
    profile: steps of each run to trace.
  """

  def __init__(self, config, workdir: str, profile: int = 0):
    super().__init__(config, workdir)
    builtin.check(self.config.evaluation.tasks, 'evaluation.tasks')
    self.profile = profile
    self._text: Text | None = None
    if any(isinstance(run.selector, Merge) and run.selector.kind == TFIDF
           for run in self.runs.values()):
      ensemble.tfidf_vectorizer()  # notices a missing package now, not after training
    self.mesh = layout.mesh_here(config, self.runs)
    self.config.evaluation.batch_size = layout.evaluation_rows(config, self.mesh)
    self._follow_best()

  def train(self, only: str | None = None) -> bool:
    """Trains and measures every run that is not complete, or only the one named.

    Returns:
      whether there was a run to train.

    Raises:
      UsageError: there is no such run, it starts from one that is not complete, it does not fit
        the mesh, a sink cannot be used, or a run's directory belongs to another config. No run has
        been touched then.
      RunError: numbers of a step are not finite; or a checkpoint that is needed is damaged. That
        checkpoint is set aside, and the same command then trains its run again from a sound one.
    """
    try:
      return self._train_all(only)
    except damage.Damaged as error:
      raise self._set_aside(error) from error

  def _train_all(self, only: str | None) -> bool:
    distributed.on_process_0(lambda: sinks.check(self.config.sinks))
    asked = self._not_superseded() if only is None else [self.run(only)]
    incomplete = distributed.broadcast(lambda: self._incomplete(asked, only))
    wanted = [run for run in asked if run.name in incomplete]
    groups = [asked] if only else plan.groups(asked, self.config.stacked)
    to_train = [[run for run in group if run.name in incomplete] for group in groups]
    for group in to_train:
      for run in group:
        layout.check(run, self.mesh, stacked=len(group) > 1)
    self._check_processes_agree()
    distributed.on_process_0(self._check_manifests)
    self._say_remarks(wanted)
    for run in wanted:
      samples.check(run, self.prepare_text())
      if run.steps:
        self._order(run)  # refuses text that is too short
    branches = None
    with jax.set_mesh(self.mesh):
      if only and not wanted:
        self._check_end(asked[0])
      for i, (group, left) in enumerate(zip(groups, to_train)):
        self._follow_best()
        group, left = ([self.runs[run.name] for run in runs] for runs in (group, left))
        with contextlib.ExitStack() as stack:
          for run in left:
            lock = locks.lock_folder(self.folder(run.name))
            distributed.on_process_0(functools.partial(stack.enter_context, lock))
          branches = self._train(left, branches)
        # They stay in memory for the run that mixes them, if it comes next, and for no other.
        follows = to_train[i + 1] if i + 1 < len(groups) else []
        if branches and not (len(follows) == 1 and params.mixes(follows[0], branches.runs)):
          branches = None
        for run in group:
          self._measure(run)
          distributed.on_process_0(functools.partial(self._note_end, run, run in left))
    return bool(wanted)

  def prepare_text(self) -> Text:
    """The tokenized text. The first call tokenizes it on process 0 while the others wait."""
    if self._text is None:
      made = distributed.on_process_0(lambda: prepare(self.config, self.data_folder))
      self._text = made or open_prepared(self.config, self.data_folder)
    return self._text

  def spec(self, run: Run) -> dict:
    """Everything that decides the result of a run: its manifest's `spec`."""
    text = self.prepare_text()
    return manifest.full_spec(run, text.tokenizer.hash,
                              {domain: tokens.hash for domain, tokens in text.train.items()})

  def evaluate(self, model: Config, parameters, measure=bits.evaluate) -> dict[str, dict]:
    """Bits per byte of every domain's held-out text, by a function of scoring/bits.py."""
    text = self.prepare_text()
    return measure(
        model, parameters, text.held_out, self.mesh, self.config.data.seq_len,
        self.config.evaluation.batch_size, text.tokenizer, self.config.evaluation.stride)

  # Before the training

  def _not_superseded(self) -> list[Run]:
    left = distributed.broadcast(lambda: [run.name for run in sources.superseded(self)])
    for name in left:
      say(f'{name} failed and is not tried again, because other runs start from its kept steps; '
          f'--run={name} tries it again')
    return [run for run in self.runs.values() if run.name not in left]

  def _incomplete(self, asked: list[Run], only: str | None) -> list[str]:
    for source in asked[0].sources if only else ():
      if source.until_best:
        raise UsageError(f'--run={only} starts from the best step of {source.name!r}, which is '
                         f'{self.state(source.name)}. That step is known once the run is complete, '
                         'or has been stopped after an evaluation; run '
                         f'--run={source.name} first.')
    if only:
      sources.check_complete(self, sources.needs(asked[0]), f'--run={only} starts from')
      incomplete = [run.name for run in asked if self.state(run.name) != manifest.COMPLETE]
    else:
      incomplete = self._to_train(asked)
    for name in incomplete:
      self._check_step(self.runs[name], only)
    return incomplete

  def _to_train(self, asked: list[Run]) -> list[str]:
    """The runs that are not finished, and the published ones whose parameters are needed."""
    left = [run for run in asked if self.state(run.name) not in manifest.FINISHED]
    # Their sources are read once more, to measure what the run started from.
    complete = [run for run in asked if self.state(run.name) == manifest.COMPLETE
                and any(not run.steps or stage in (scores.START, scores.AVERAGE)
                        for _, stage, *_ in self._unmeasured(run))]
    made = {run.name for run in complete}
    return [name for name in sources.with_published(self, [*left, *complete])
            if name not in made]

  def _check_step(self, run: Run, only: str | None):
    """Raises UsageError if a run starts from a step that is not kept, and will not be saved."""
    if not run.from_step or sources.kept(self, run):
      return
    source = run.sources[0]
    kept, found = sources.kept(self, source), manifest.read(self.folder(source.name)) or {}
    done = found.get('steps_done', 0)
    if found.get('state') != manifest.COMPLETE:
      # A kill may have come before the last of these were written; the source goes on from here.
      done = max(kept, default=0)
    if only or done >= source.steps:
      continued.check_kept(run, done, kept)

  def _check_end(self, run: Run):
    """Raises Damaged if the model of a complete run is not what was saved: the message
    of a command that has noticed it names `train`."""
    if distributed.broadcast(lambda: damage.has_sums(
        sources.checkpoints(self, run), run.steps)):
      params.final(self, run, self.mesh)

  def _check_processes_agree(self):
    distributed.check_shared(self.workdir)
    text = self.prepare_text()
    distributed.check_equal({
        'tokens': {name: tokens.hash for name, tokens in text.train.items()},
        'tokenizer': text.tokenizer.hash,
        'seeds': {run.name: run.rng_seed for run in self.runs.values()},
        'pretrained': {run.folder: run.content for run in self.runs.values()}})

  def _check_manifests(self):
    directories.check(self, self.spec)
    directories.check_rows(self, self.spec)
    scores.check_rows(self)

  def _say_remarks(self, wanted: Sequence[Run]):
    lines = [line for run in wanted for line in layout.uneven(run, self.mesh)]
    lines += [line for run in wanted if (line := context.remark(run))]
    lines += continued.remarks([run for run in wanted if self.state(run.name) == MISSING])
    lines += self._about_rows(wanted)
    if wanted:
      lines += twins.remarks(self.runs.values())
    for line in dict.fromkeys(lines):
      say(line)
    for run in wanted:
      for line in compatibility.remarks(run):
        say(line)

  def _about_rows(self, wanted: Sequence[Run]) -> Iterator[str]:
    """Lines on the runs whose rows are here: what is trained in spite of them, and what they lack.
    """
    needed = [run.name for run in wanted if self.state(run.name) == manifest.PUBLISHED]
    left = [run for run in self.runs.values()
            if run.name not in needed and self.state(run.name) == manifest.PUBLISHED]
    if left:
      yield f'{len(left)} runs are not trained, because {self.config.rows} has their rows'
    if needed:
      yield (f'{", ".join(needed)}: trained again, because other runs need the parameters, which '
             'rows do not have')
    versions: dict[str, list[str]] = {}
    for run in left:
      version = (self.manifest_of(run.name) or {})['versions'].get('btx_jax', 'unknown')
      versions.setdefault(version, []).append(run.name)
      if missing := self._unmeasured(run):
        stages = ', '.join(dict.fromkeys(stage for _, stage, *_ in missing))
        yield (f'{run.name}: its row lacks scores that this config asks for ({stages}); '
               f'--run={run.name} trains and measures it')
    here = distributed.code_version() if versions else ''
    for version, names in versions.items():
      if version != here:
        yield f'the rows of {len(names)} runs are of btx_jax {version}; this is {here}'

  def _follow_best(self):
    """Updates the plan with the current best steps, if any run starts from a best step."""
    if any(entry.init.get('step') == BEST for entry in self.config.runs.values()):
      self.runs = self.plan(distributed.broadcast(
          lambda: recorded.best_steps(self.config, self.recorded, self.folder)))

  def _order(self, run: Run, references: Mapping[str, np.ndarray] | None = None):
    return mixture.order_of(run, self.prepare_text().train, references)

  # Training

  def _train(self, runs: list[Run], branches: params.Branches | None) -> params.Branches | None:
    """Trains runs as one program; returns them where they are several that ended together."""
    began = time.monotonic()
    manifests, jobs = {}, []
    for run in runs:
      found = distributed.broadcast(functools.partial(self._begin, run))
      if found:
        manifests[run.name] = found
    if not manifests:
      return None
    before = {name: found['seconds'] for name, found in manifests.items()}

    def note(names=tuple(manifests), **changes):
      for name in names:
        # Runs that train together share the time.
        seconds = before[name] + (time.monotonic() - began) / len(manifests)
        manifests[name].update(seconds=seconds, **changes)
        if distributed.is_process_0():
          manifest.write(self.folder(name), manifests[name])

    def note_in_training(names, **changes):
      """`note`, unless the disk is full or fails: the next note comes with the next checkpoint."""
      for name in names:
        saving.check_present(self.folder(name))
      try:
        note(names, **changes)
      except OSError as error:
        if not storage.disk_error(error):
          raise
        say(f'{", ".join(names)}: manifest.json could not be written: {error.strerror}')

    def on_checkpoint(name: str, step: int, tokens_by_domain: dict[str, int],
                      best: dict[str, Any] | None, health: dict[str, Any]):
      note_in_training([name], steps_done=step, tokens_by_domain=tokens_by_domain,
                       saved=manifest.now(), best=best, **health)

    def on_trouble(name: str, changes: dict[str, Any]):
      note_in_training([name], **changes)

    settings = loop.Settings(
        log_every=self.config.log_every, evaluation_every=self.config.evaluation.every,
        checkpoint_every=self.config.checkpoint_every,
        checkpoints_kept=self.config.checkpoints_kept,
        checkpoints_kept_every=self.config.checkpoints_kept_every,
        checkpoint_patience=self.config.checkpoint_patience,
        sinks=self.config.sinks, profile=self.profile)
    try:
      for run in runs:
        if run.name in manifests:
          fit.fit(self, run, self.prepare_text(), self.mesh)
          select.fit(self, run, self.prepare_text(), self.mesh)
          reference.compute(self, run, self.prepare_text(), self.mesh)
          if run.steps:
            make = functools.partial(state.initial, self, run, self.mesh, branches)
            jobs.append(loop.Job(run, self.folder(run.name), make,
                                 self._order(run, reference.of(self, run)),
                                 manifests[run.name]['identity'],
                                 continued.steps_needed(run, self.runs.values()),
                                 manifests[run.name].get('best')))
      stacked = loop.run(jobs, self.mesh, list(self.prepare_text().train), settings,
                         self.evaluate, on_checkpoint, on_trouble) if jobs else None
      for name in manifests:
        note([name], state=manifest.COMPLETE, metrics=list(metrics.end_of(self.folder(name))[:2]))
    except KeyboardInterrupt:
      with contextlib.suppress(OSError, RunError):  # of a disk that is full, or gone
        note_in_training(tuple(manifests), state=manifest.STOPPED)
      raise
    except BaseException as error:
      with contextlib.suppress(OSError, RunError):
        note_in_training(tuple(manifests), state=manifest.FAILED, error=str(error) or repr(error))
      raise
    if stacked is None or len(jobs) == 1:
      return None
    return params.Branches([job.run for job in jobs], stacked)

  def _begin(self, run: Run) -> dict | None:
    """The manifest of a run that starts or resumes; None if another job has completed it."""
    folder = self.folder(run.name)
    found = manifest.read(folder)
    if found and found['state'] == manifest.COMPLETE:
      return None
    found = manifest.resume(found) if found else self._first_manifest(run)
    found['devices'] = f'{jax.device_count()} x {jax.devices()[0].device_kind}'
    found['processes'] = jax.process_count()
    manifest.write(folder, found)
    return found

  def _set_aside(self, error: damage.Damaged) -> RunError:
    """Sets a damaged checkpoint aside, so that its run continues from an earlier one next time.

    It is left in place if its run has no earlier checkpoint, is not in this config, or has later
    checkpoints, from which it would continue.
    """
    if not distributed.is_process_0():
      return error
    folder = places.absolute(error.folder)
    run = next((each for each in self.runs.values()
                if places.absolute(sources.checkpoints(self, each)) == folder), None)
    kept = [step for step in sources.kept(self, run)
            if damage.has_sums(error.folder, step)] if run else []
    before = max((step for step in kept if step < error.step), default=0)
    if not run or not before:
      return error.is_the_last()
    if max(kept) > error.step:
      return error.has_later()
    with locks.lock_folder(self.folder(run.name)):
      found = manifest.read(self.folder(run.name)) or {}
      found.pop('end_compared', None)  # the end comes again, perhaps after steps that count anew
      manifest.write(self.folder(run.name), found | {
          'state': manifest.STOPPED, 'steps_done': before})
      return error.set_aside(run.name, before)

  def _first_manifest(self, run: Run) -> dict:
    """The manifest of a run that starts now."""
    from_best = self.config.runs[run.plain_name].init.get('step') == BEST
    if from_best:
      source = run.sources[0]
      say(f'{run.name} starts from step {source.steps:,} of {source.name}, its best')
    return manifest.begin(run.name, self.spec(run)) | {
        'rng_seed': run.rng_seed,
        # So that a later change of an ancestor can be described.
        'ancestors': dict(self._ancestors(run)),
        'text': changes.text_of(self, run.domains),
        **({'from_best': True} if from_best else {})}

  def _ancestors(self, run: Run) -> Iterator[tuple[str, dict]]:
    """The spec of each run that a run descends from, by its identity."""
    for source in run.sources:
      spec = self.spec(source)
      yield manifest.identity(spec), spec
      yield from self._ancestors(source)

  # Measuring

  def _unmeasured(self, run: Run) -> list[tuple[str, str, bool, list[str]]]:
    """The missing scores of a finished run: (name, stage, whether bits per byte are missing, the
    missing tasks)."""
    if self.state(run.name) not in manifest.FINISHED:
      return []
    models = [(model.name, model.stage) for model in scores.models_of(self, run)]
    tasks = [name for name in builtin.own(self.config.evaluation.tasks)
             if not answers.why_not(run, name)]
    result = []
    for name, stage in models:
      scored = scores.read_answers(self, run, stage)
      result.append((name, stage, scores.read(self, run, stage) is None,
                     [task for task in tasks if task not in scored]))
      if self.config.evaluation.oracle and stage in scores.ALONE and (
          not decomposition.why_not(run)):
        alone = scores.ALONE[stage]
        result.append((name, alone, scores.read(self, run, alone) is None, []))
    if models and self.config.evaluation.mask_experts and not regression.why_unmasked(run.model):
      result.append((run.name, scores.MASKED, scores.read(self, run, scores.MASKED) is None, []))
    return [each for each in result if each[2] or each[3]]

  def _measure(self, run: Run) -> None:
    """Measures the models of a run that were not measured yet, if its parameters are here."""
    make = {scores.START: params.initial, scores.AVERAGE: params.average,
            scores.FINAL: params.final, scores.MASKED: params.final,
            scores.ALONE[scores.START]: params.initial, scores.ALONE[scores.FINAL]: params.final}
    wanted = distributed.broadcast(lambda: [] if self.row(run.name) else self._unmeasured(run))
    made = parameters = None
    for name, stage, is_unmeasured, unanswered in wanted:
      if not run.selector and made is not make[stage]:  # several stages use one model
        made, parameters = make[stage], None  # one model at a time
        parameters = made(self, run, self.mesh)
      shown = os.path.join(run.series, name)
      if is_unmeasured:
        found = self._scores(run, stage, parameters, shown)
        distributed.on_process_0(functools.partial(scores.write, self, run, stage, found))
      if unanswered:
        say(f'{shown}: answering questions of {", ".join(unanswered)}')
        answered = (
            answers.of_ensemble(self, run, unanswered, self.prepare_text(), self.mesh)
            if run.selector else
            answers.of_model(self, scores.sizes(run, stage), parameters, unanswered,
                             self.prepare_text().tokenizer, self.mesh))
        distributed.on_process_0(
            functools.partial(scores.write_answers, self, run, stage, answered))

  def _scores(self, run: Run, stage: str, parameters, shown: str) -> dict[str, dict]:
    """The scores by domain of a run's model at a stage; `shown` is its name in messages."""
    if run.selector:
      return selected.evaluate(self, run, self.prepare_text(), self.mesh)
    if stage == scores.MASKED:
      say(f'{shown}: measuring without each of its {run.model.num_experts} experts')
      return self.evaluate(run.model, parameters, bits.without_each_expert)
    if stage in scores.BY_EXPERT:
      say(f'{shown}: measuring each of its {run.model.num_experts} experts alone')
      return self.evaluate(run.model, parameters, bits.each_expert_alone)
    say(f'{shown}: measuring')
    found = self.evaluate(scores.sizes(run, stage), parameters)
    for domain, values in found.items():
      if values.get('preferred') is not None:
        say(f'{shown}: held-out pairs of {domain} whose chosen answer is likelier per token: '
            f'{values["preferred"]:.1%}')
    return found

  def _note_end(self, run: Run, trained: bool):
    """Records the end of a run as its best step if it is; if not, says so after training."""
    found, folder = scores.read(self, run, scores.FINAL), self.folder(run.name)
    if not found or not run.steps or not self.config.evaluation.every:
      return
    before = manifest.read(folder)
    if before is None or before.get('end_compared'):
      # Either only its row is here, or it is being measured again. That may be on other text or in
      # other windows, and such scores are not comparable.
      return
    best = Best(before.get('best'))
    if not best.improves(run.steps, held_out_loss(run, found)) and best.found and trained:
      say(f'{run.name}: held-out loss was lowest at step {best.step:,}, not at its end; that '
          'checkpoint is kept')
    manifest.write(folder, before | {'best': best.found, 'end_compared': True})
