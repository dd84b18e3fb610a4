"""Reads and writes the held-out scores of a study's models, stored in the run directories."""

from collections.abc import Iterator, Mapping
import contextlib
import os
import statistics
from typing import Any, NamedTuple

from btx_jax.data import tokens
from btx_jax.errors import UsageError
from btx_jax.files import sealed, shapes
from btx_jax.model.config import Config, forward_flops_per_token, num_params, param_sizes
from btx_jax.run import HUGGING_FACE, MIX, Run, averaged_model, lineage, reader_model
from btx_jax.scoring import builtin, routing
from btx_jax.selector import Merge
from btx_jax.study import manifest
from btx_jax.study.study import Study

FINAL, START, AVERAGE = 'final', 'start', 'average'
_SIZES = {'documents?': int, 'tokens?': int, 'bytes?': int, 'words?': int}
# What the code that reads scores relies on, by domain.
_SCORE = {'bits_per_byte': float, **_SIZES, 'units?': {'nll': [float], 'bytes': [int]},
          'gates?': [[float]], 'share?': [float], 'switches?': float, 'forward_flops?': float,
          'sample?': {'pieces': [str], 'gates': [[float]]}, 'routing?': routing.SHAPE}
_SCORES = {'bits_per_byte': [float], **_SIZES, 'units?': {'nll': [[float]], 'bytes': [int]}}
# Stages that are no rows of the results table: the final model without each of its experts; and by
# the stage of a mixture, each of its experts alone beside the weights that all share.
MASKED = 'masked'
ALONE = {START: 'alone_start', FINAL: 'alone_final'}
BY_EXPERT = (MASKED, *ALONE.values())


class Model(NamedTuple):
  """One measured model: a row of the results table.

  Attributes:
    name: name of its row, the same in every series.
    run: the run whose directory holds its scores.
    stage: 'final'. Mixtures of several models also have 'start', before finetuning, and 'average',
      the plain average of these models. Edits of a mixture, and pretrained mixtures that are
      trained, also have 'start'.
    sizes: sizes of the model; of an ensemble, Run.model.
    trained: the runs whose training went into it.
  """
  name: str
  run: Run
  stage: str
  sizes: Config
  trained: list[Run]

  @property
  def total_params(self) -> int:
    """Parameters of all models together."""
    if self.run.selector:
      return sum(num_params(source.model) for source in self.run.sources)
    return num_params(self.sizes)

  @property
  def active_params(self) -> int:
    """Parameters that one token uses; of an ensemble, those of its largest experts, as many as are
    computed for a token, and of the layers that a linear selector reads with."""
    if not self.run.selector:
      return num_params(self.sizes, active=True)
    largest = sorted((num_params(each.model) for each in self.run.experts), reverse=True)
    if isinstance(self.run.selector, Merge):
      return sum(largest[:self.run.selector.computed(len(largest))])
    sizes = param_sizes(reader_model(self.run))
    sizes.pop('head', None)
    return sum(sizes.values()) + largest[0]

  def forward_flops(self, measured: Mapping[str, dict]) -> float:
    """FLOPs of predicting a token: measured for an ensemble, as the mean of the domains.

    Args:
      measured: its scores by domain.
    """
    if self.run.selector:
      return statistics.fmean(score['forward_flops'] for score in measured.values())
    return forward_flops_per_token(self.sizes, self.run.seq_len)


def models(study: Study) -> Iterator[Model]:
  """Yields the models of all complete runs; skips runs whose manifest cannot be read."""
  for run in study.runs.values():
    try:
      if study.state(run.name) != manifest.COMPLETE:
        continue
    except UsageError:
      continue
    yield from models_of(study, run)


def models_of(study: Study, run: Run) -> Iterator[Model]:
  """Yields the models of a run that are measured once it is complete."""
  if run.vocabulary:
    return  # the held-out text is tokenized with a different vocabulary
  name, before = run.plain_name, lineage(run)[1:]
  if run.init == MIX and len(run.sources) > 1 and first_equivalent(study, run) is run:
    yield Model(f'average of {name}', run, AVERAGE, averaged_model(run), before)
  if run.steps and (run.edit or (run.init == MIX and len(run.sources) > 1)
                    or (run.init == HUGGING_FACE and run.model.num_experts)):
    yield Model(f'{name} unfinetuned', run, START, run.model, before)
  yield Model(name, run, FINAL, run.model, [*before, run])


def first_equivalent(study: Study, run: Run) -> Run:
  """The first mixture of the same series with the same average; only it gets the row for it."""
  return next(other for other in study.of_series(run.series) if _shares(other) == _shares(run))


def _shares(run: Run) -> dict[str, float]:
  """The weight of each source in a mixture's mean; {} for other runs."""
  mean = run.recipe.mean if run.recipe else ()
  return {source.name: weight for source, weight in zip(run.sources, mean)}


def sizes(run: Run, stage: str) -> Config:
  """The sizes of a run's model at a stage."""
  return averaged_model(run) if stage == AVERAGE else run.model


def read(study: Study, run: Run, stage: str) -> dict[str, dict] | None:
  """Reads the scores by domain, as `bits` returns them.

  None if there are none, or if they were measured on different text.
  """
  kept = sealed.read_if_sound(_path(study, run, stage))
  try:
    if kept['measured_on'] != _measured_on(study, run) or not (
        _are_sound(kept['domains'], study, stage)):
      return None
    return kept['domains']
  except (KeyError, TypeError, UsageError):
    return None


def _are_sound(domains: Any, study: Study, stage: str) -> bool:
  """Whether scores by domain are what the code that reads them relies on."""
  by_expert = stage in BY_EXPERT
  if shapes.misfit(domains, {str: _SCORES if by_expert else _SCORE}):
    return False
  measured = [score['units'] for score in domains.values() if 'units' in score]
  return {*domains} == {*study.config.domains} and all(
      len(nll) == len(units['bytes'])
      for units in measured for nll in (units['nll'] if by_expert else [units['nll']]))


def write(study: Study, run: Run, stage: str, scores: dict) -> None:
  """Stores the scores by domain that `bits` returned."""
  sealed.write(_path(study, run, stage),
               {'measured_on': _measured_on(study, run), 'domains': scores}, indent=None)


def read_answers(study: Study, run: Run, stage: str) -> dict[str, dict]:
  """Reads the scores on the built-in tasks that the config names, as builtin.summary returns them.

  Tasks that were not scored yet, or were scored on other questions, are left out.
  """
  result = {}
  kept = _kept_answers(study, run, stage)
  for name in builtin.own(study.config.evaluation.tasks):
    with contextlib.suppress(KeyError, TypeError, UsageError):
      if kept[name]['made_from'] == _answers_made_from(study, run, name):
        result[name] = kept[name]['found']
  return result


def write_answers(study: Study, run: Run, stage: str, found: Mapping[str, dict]) -> None:
  """Stores scores on built-in tasks by name, as builtin.summary returned them."""
  kept = _kept_answers(study, run, stage)
  kept |= {name: {'made_from': _answers_made_from(study, run, name), 'found': score}
           for name, score in found.items()}
  sealed.write(_path(study, run, stage, 'answers'), kept)


def _kept_answers(study: Study, run: Run, stage: str) -> dict[str, dict]:
  return sealed.read_if_sound(_path(study, run, stage, 'answers'))


def _answers_made_from(study: Study, run: Run, name: str) -> dict:
  found = manifest.read(study.folder(run.name)) or {}
  return {'run': found['identity'], **builtin.made_from(name, study.config)}


def _path(study: Study, run: Run, stage: str, kind: str = 'evaluation') -> str:
  return os.path.join(study.folder(run.name), f'{kind}_{stage}.json')


def _measured_on(study: Study, run: Run) -> dict:
  found = manifest.read(study.folder(run.name)) or {}
  stride = study.config.evaluation.stride
  return {
      'run': found['identity'],
      'length': study.config.data.seq_len, 'tokens': study.config.evaluation.tokens,
      **({'stride': stride} if stride else {}),
      'text': {domain: tokens.read_meta(os.path.join(study.data_folder, domain))['hash']['held_out']
               for domain in sorted(study.config.domains)}}
