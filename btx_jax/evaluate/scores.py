"""The held-out scores of every model of a study, stored in the run directories."""

from collections.abc import Iterator
import json
import os
from typing import NamedTuple

from btx_jax.data import tokens
from btx_jax.errors import UsageError
from btx_jax.files import replacing
from btx_jax.model.config import Config
from btx_jax.run import MIX, Run, averaged_model, lineage
from btx_jax.study import manifest
from btx_jax.study.study import MERGES, Study

FINAL, START, AVERAGE, MERGE = 'final', 'start', 'average', 'merge_'


class Model(NamedTuple):
  """One model to compare.

  Attributes:
    name: of its row in the table.
    run: the run whose directory holds its scores.
    stage: 'final'; a mixture of different experts also has 'start', before its finetuning,
      'average', the plain average of these experts, and 'merge_...', see evaluate.ensemble.
    sizes: of the model, or of each of the models.
    trained: the runs whose training is in it.
    count: how many models of these sizes there are.
    used: how many of them are active per token.
  """
  name: str
  run: Run
  stage: str
  sizes: Config
  trained: list[Run]
  count: int = 1
  used: int = 1


def models(study: Study) -> Iterator[Model]:
  """Every model of the complete runs; a run whose manifest cannot be read has none."""
  for run in study.runs.values():
    try:
      if study.state(run.name) != manifest.COMPLETE:
        continue
    except UsageError:
      continue
    if run.vocabulary:
      continue  # the text has the ids of another vocabulary
    before = lineage(run)[1:]
    if run.init == MIX and len(run.sources) > 1:
      dense = averaged_model(run)
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
  """The first mixture of the same models: only it gets the `average` and `merge` rows."""
  return next(other for other in study.runs.values()
              if other.init == MIX and _shares(other) == _shares(run))


def _shares(mixture: Run) -> dict[str, float]:
  """The weight of each source in a mixture's mean."""
  return {source.name: weight for source, weight in zip(mixture.sources, mixture.recipe.mean)}


def sizes(run: Run, stage: str) -> Config:
  """The sizes of the model of a stage."""
  return averaged_model(run) if stage == AVERAGE else run.model


def read(study: Study, run: Run, stage: str) -> dict[str, dict] | None:
  """What evaluate.bits measured, by domain; None if it was not measured, or on other text."""
  try:
    with open(_path(study, run, stage), encoding='utf-8') as file:
      kept = json.load(file)
    return kept['domains'] if kept['measured_on'] == _measured_on(study, run) else None
  except (OSError, ValueError, KeyError, TypeError, UsageError):
    return None


def write(study: Study, run: Run, stage: str, scores: dict) -> None:
  """Stores what evaluate.bits measured, by domain."""
  with replacing(_path(study, run, stage)) as file:
    json.dump({'measured_on': _measured_on(study, run), 'domains': scores}, file)


def _path(study: Study, run: Run, stage: str) -> str:
  return os.path.join(study.folder(run.name), f'evaluation_{stage}.json')


def _measured_on(study: Study, run: Run) -> dict:
  return {
      'run': manifest.read(study.folder(run.name))['identity'],
      'length': study.config.data.seq_len, 'tokens': study.config.evaluation.tokens,
      'text': {domain: tokens.read_meta(os.path.join(study.data_folder, domain))['hash']['held_out']
               for domain in sorted(study.config.domains)}}
