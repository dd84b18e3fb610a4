"""The held-out scores of every model of a study, kept in the run directories.

Measuring needs the devices; reading what was measured needs files only.
"""

from collections.abc import Iterator
import functools
import json
import os
from typing import NamedTuple

from btx_jax import run as run_lib
from btx_jax.data import tokens
from btx_jax.devices import distributed
from btx_jax.errors import UsageError
from btx_jax.files import replacing
from btx_jax.model import config as model_config
from btx_jax.run import Run
from btx_jax.study import manifest
from btx_jax.study.study import MERGES, Study
from btx_jax.terminal import say

FINAL, START, AVERAGE, MERGE = 'final', 'start', 'average', 'merge_'


class Model(NamedTuple):
  """One model to compare.

  Attributes:
    name: of its row in the table.
    run: in whose directory its scores are.
    stage: 'final', or of a mixture of different experts also 'start', before its finetuning,
      'average', the uniform average of these experts, and 'merge_...', see evaluate.ensemble.
    sizes: of the model, or each of the models.
    trained: the runs whose training is in it.
    held: how many models of these sizes there are.
    used: how many of them a token meets.
  """
  name: str
  run: Run
  stage: str
  sizes: model_config.Config
  trained: list[Run]
  held: int = 1
  used: int = 1


def models(study: Study) -> Iterator[Model]:
  """Every model that the complete runs give; a run whose manifest cannot be read has none."""
  for run in study.runs.values():
    try:
      if study.state(run.name) != manifest.COMPLETE:
        continue
    except UsageError:
      continue
    if run.vocabulary:
      continue  # it does not know the ids that text has here
    before = run_lib.lineage(run, study.runs)[1:]
    if run.init == run_lib.MIX and len(set(run.sources)) > 1:
      dense = _sizes(study, run, AVERAGE)
      if first_alike(study, run) is run:
        yield Model(f'average of {run.name}', run, AVERAGE, dense, before)
        for form in study.config.evaluation.merge:
          used = MERGES[form] or len(run.sources)
          yield Model(f'merge of {run.name}: {form}', run, MERGE + form, dense, before,
                      len(run.sources), min(used, len(run.sources)))
      if run.steps:
        yield Model(f'{run.name} unfinetuned', run, START, run.model, before)
    yield Model(run.name, run, FINAL, run.model, [*before, run])


def first_alike(study: Study, run: Run) -> Run:
  """The first mixture of the same models: it has their average, and what they say unmixed."""
  weights = lambda mixture: dict(zip(mixture.sources, mixture.recipe.rest[-1][1]))
  return next(other for other in study.runs.values()
              if other.init == run_lib.MIX and weights(other) == weights(run))


def _sizes(study: Study, run: Run, stage: str) -> model_config.Config:
  return run_lib.averaged_model(run, study.runs) if stage == AVERAGE else run.model


def read(study: Study, run: Run, stage: str) -> dict[str, dict] | None:
  """What evaluate.bits found, by domain; None if it was not measured, or on other text."""
  try:
    with open(_path(study, run, stage), encoding='utf-8') as file:
      kept = json.load(file)
    return kept['domains'] if kept['measured_on'] == _measured_on(study, run) else None
  except (OSError, ValueError, KeyError, TypeError, UsageError):
    return None


def measure(pipeline, run: Run) -> None:
  """Measures the models of a complete run that were not yet, under the pipeline's mesh."""
  def missing() -> list[list[str]]:
    return [[model.name, model.stage] for model in models(pipeline)
            if model.run is run and read(pipeline, run, model.stage) is None]

  def write(stage: str, scores: dict):
    with replacing(_path(pipeline, run, stage)) as file:
      json.dump({'measured_on': _measured_on(pipeline, run), 'domains': scores}, file)

  make = {FINAL: lambda run: pipeline.final_params(run.name), START: pipeline.initial_params,
          AVERAGE: pipeline.average_params}
  wanted = distributed.decided(missing)
  for name, stage in wanted:
    if stage in make:
      say(f'{name}: measuring')
      found = pipeline.evaluate(_sizes(pipeline, run, stage), make[stage](run))
      distributed.first(functools.partial(write, stage, found))
  forms = [stage.removeprefix(MERGE) for _, stage in wanted if stage not in make]
  for form, found in pipeline.merge(run, forms).items() if forms else ():
    distributed.first(functools.partial(write, MERGE + form, found))


def _path(study: Study, run: Run, stage: str) -> str:
  return os.path.join(study.folder(run.name), f'evaluation_{stage}.json')


def _measured_on(study: Study, run: Run) -> dict:
  return {
      'run': manifest.read(study.folder(run.name))['identity'],
      'length': study.config.data.seq_len, 'tokens': study.config.evaluation.tokens,
      'text': {domain: tokens.read_meta(os.path.join(study.data_folder, domain))['hash']['held_out']
               for domain in sorted(study.config.domains)}}
