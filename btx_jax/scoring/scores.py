"""Reads and writes the held-out scores of a study's models, stored in the run directories.

Where only the row of a run is here (study/rows.py), its scores are read from the row.
"""

from collections.abc import Iterator, Mapping
import contextlib
import os
import statistics
from typing import Any, NamedTuple

from btx_jax.errors import UsageError
from btx_jax.files import places, sealed, shapes
from btx_jax.model.config import Config, forward_flops_per_token, num_params, param_sizes
from btx_jax.run import HUGGING_FACE, MIX, Run, averaged_model, lineage, reader_model
from btx_jax.scoring import builtin, routing
from btx_jax.selector import Merge
from btx_jax.study import changes, manifest, rows
from btx_jax.study.study import Study

FINAL, START, AVERAGE = 'final', 'start', 'average'
EVALUATION, ANSWERS = 'evaluation', 'answers'  # kinds of scores: bits per byte, and tasks
# Fields of the config that scores depend on, by their names in `measured_on`.
_FIELDS = {'length': 'data.seq_len', 'tokens': 'evaluation.tokens', 'stride': 'evaluation.stride'}
_SIZES = {'documents?': int, 'tokens?': int, 'bytes?': int, 'words?': int}
# What the code that reads scores relies on, by domain.
_SCORE = {'bits_per_byte': float, **_SIZES, 'units?': {'nll': [float], 'bytes': [int]},
          'gates?': [[float]], 'share?': [float], 'switches?': float, 'forward_flops?': float,
          'sample?': {'pieces': [str], 'gates': [[float]]}, 'routing?': routing.SHAPE}
_SCORES = {'bits_per_byte': [float], **_SIZES, 'units?': {'nll': [[float]], 'bytes': [int]}}
# Stages that are no rows of the results table: the final model without each of its experts; and by
# the stage of a mixture, each of its experts alone beside the weights that all share.
_PIECES_IN_ROW = 50
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
  """Yields the models of all finished runs; skips runs whose manifest cannot be read."""
  for run in study.runs.values():
    try:
      if study.state(run.name) not in manifest.FINISHED:
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

  None if there are none, or if they were measured on different text. The scores of a row count also
  if the text is not here.
  """
  try:
    kept = _kept(study, run, stage)
    text = kept['measured_on']['text'] if study.row(run.name) else {}
    if kept['measured_on'] != _measured_on(study, run, text) or not (
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
  sealed.write(path(study, run, stage), {
      'stage': stage, 'measured_on': _measured_on(study, run), 'domains': scores}, indent=None)


def read_answers(study: Study, run: Run, stage: str) -> dict[str, dict]:
  """Reads the scores on the built-in tasks that the config names, as builtin.summary returns them.

  Tasks that were not scored yet, or were scored on other questions, are left out.
  """
  result = {}
  kept = _kept(study, run, stage, ANSWERS)
  for name in builtin.own(study.config.evaluation.tasks):
    with contextlib.suppress(KeyError, TypeError, UsageError):
      if kept[name]['made_from'] == _answers_made_from(study, run, name):
        result[name] = kept[name]['found']
  return result


def write_answers(study: Study, run: Run, stage: str, found: Mapping[str, dict]) -> None:
  """Stores scores on built-in tasks by name, as builtin.summary returned them."""
  kept = _kept(study, run, stage, ANSWERS)
  sealed.write(path(study, run, stage, ANSWERS), kept | {'stage': stage} | {
      name: {'made_from': _answers_made_from(study, run, name), 'found': score}
      for name, score in found.items()})


def stored(study: Study, run: Run) -> dict[str, dict[str, dict]]:
  """All scores in the directory of a run, as its row has them: by kind and stage.

  Bits per byte that were measured otherwise than this config measures are left out, and so are the
  samples of text with gates. Of the tokens whose experts were counted, few are kept.
  """
  result: dict[str, dict[str, dict]] = {}
  for kind in (EVALUATION, ANSWERS):
    names = [name for name in places.names(study.folder(run.name))
             if name.startswith(f'{kind}_') and name.endswith('.json')]
    stages = [name[len(kind) + 1:-len('.json')] for name in names]
    result[kind] = {stage: found for stage in stages if (found := _kept(study, run, stage, kind))}
  measured_on = _measured_on(study, run)
  result[EVALUATION] = {
      stage: found | {'domains': {
          domain: _short(score) for domain, score in found['domains'].items()}}
      for stage, found in result[EVALUATION].items() if found.get('measured_on') == measured_on}
  return result


def _short(score: Mapping[str, Any]) -> dict[str, Any]:
  """A score of a domain without what would make a row long."""
  found = {key: value for key, value in score.items() if key != 'sample'}
  if 'routing' in found:
    found['routing'] = routing.shorter(found['routing'], _PIECES_IN_ROW)
  return found


def check_rows(study: Study) -> None:
  """Raises UsageError if a row has scores that cannot be compared with those measured here.

  Text that is not tokenized yet is not compared.
  """
  found: dict[str, list[str]] = {}
  for run in study.runs.values():
    row = rows.read(study.config.rows, run.name) or {}
    clauses = {clause for kept in row.get(EVALUATION, {}).values()
               for clause in _measured_otherwise(study, kept['measured_on'])}
    for clause in sorted(clauses):
      found.setdefault(clause, []).append(run.name)
  if found:
    lines = '\n'.join(f'  {changes.listed(names)}: {clause}' for clause, names in found.items())
    files = dict.fromkeys(rows.path(study.config.rows, name)
                          for names in found.values() for name in names)
    raise UsageError(f'{study.config.rows} has rows that were measured otherwise than this config '
                     f'measures:\n{lines}\nNothing was changed. Set config.rows to another folder, '
                     f'or delete {", ".join(files)} to train and measure again.')


def _measured_otherwise(study: Study, was: Mapping[str, Any]) -> Iterator[str]:
  """How the measuring of scores differs from that of the config, as clauses."""
  now = _measured_as(study.config)
  for field in ('length', 'tokens', 'stride'):
    if was.get(field, 0) != now.get(field, 0):
      yield (f'{_FIELDS[field]} was {was.get(field, 0):,} and is {now.get(field, 0):,} now')
  text = _held_out(study, was['text'])
  if differing := [domain for domain in sorted({*text, *was['text']})
                   if was['text'].get(domain) != text.get(domain)]:
    yield f'on different held-out text of {changes.listed(differing)}'


def _kept(study: Study, run: Run, stage: str, kind: str = EVALUATION) -> dict[str, Any]:
  """What was stored of a run at a stage, in its directory or in the row that stands for it."""
  if row := study.row(run.name):
    return row[kind].get(stage, {})
  return sealed.read_if_sound(path(study, run, stage, kind), stage)


def _answers_made_from(study: Study, run: Run, name: str) -> dict:
  found = study.manifest_of(run.name) or {}
  return {'run': found['identity'], **builtin.made_from(name, study.config)}


def path(study: Study, run: Run, stage: str, kind: str = EVALUATION) -> str:
  """The file with the scores of a run at a stage; `kind` is EVALUATION or ANSWERS."""
  return os.path.join(study.folder(run.name), f'{kind}_{stage}.json')


def _measured_on(study: Study, run: Run, otherwise: Mapping[str, str] | None = None) -> dict:
  """What scores depend on; `otherwise` has the hashes of text that is not tokenized here."""
  found = study.manifest_of(run.name) or {}
  return {'run': found['identity'], **_measured_as(study.config),
          'text': _held_out(study, otherwise or {})}


def _measured_as(config) -> dict[str, int]:
  stride = config.evaluation.stride
  return {'length': config.data.seq_len, 'tokens': config.evaluation.tokens,
          **({'stride': stride} if stride else {})}


def _held_out(study: Study, otherwise: Mapping[str, str]) -> dict[str, str | None]:
  """The hash of each domain's held-out text; from `otherwise` if it is not tokenized here."""
  metas = {domain: study.text_meta(domain) for domain in sorted(study.config.domains)}
  return {domain: meta['hash']['held_out'] if meta else otherwise.get(domain)
          for domain, meta in metas.items()}
