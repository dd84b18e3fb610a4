"""How training a mixture changed its score on each domain, and which expert helps which domain.

Computed from stored scores alone, so it needs no devices.
"""

from collections.abc import Iterator, Mapping
import math
from typing import Any

from btx_jax.model.config import Config
from btx_jax.run import CHECKPOINT, Run
from btx_jax.scoring import error_bars, scores
from btx_jax.study.study import Study


def changes(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]
            ) -> list[dict[str, Any]]:
  """The change of each domain's bits per byte, the largest increase first.

  Args:
    before, after: scores by domain.

  Returns:
    for each domain of `after`: `domain`; `before` and `after`, its bits per byte; `percent`, the
    change in percent of `before`; and `percent_error`, its standard error from the text, paired by
    unit. Percent is None where it is undefined (a score of 0 before, or one that is not finite);
    these come first. The error is None if it is not known.
  """
  rows = []
  for domain, score in after.items():
    was, units = before[domain]['bits_per_byte'], before[domain].get('units')
    percent, error = _percent(was, score['bits_per_byte']), None
    if percent is not None and units and 'units' in score:
      error = error_bars.error_of_percent(score['units'], units)
    rows.append({'domain': domain, 'before': was, 'after': score['bits_per_byte'],
                 'percent': percent, 'percent_error': error})
  return sorted(rows, key=lambda row: (
      row['percent'] is not None, -(row['percent'] or 0)))


def _percent(before: float, after: float) -> float | None:
  percent = 100 * (after - before) / before if before else math.nan
  return percent if math.isfinite(percent) else None


def regressions(study: Study) -> list[dict[str, Any]]:
  """The changes of every complete run that changed a mixture, in the order of the runs.

  A mixture of several models is compared with itself before its finetuning, a run that continues a
  mixture with the run it starts from, and an edit that is not trained with the mixture it is of. A
  run is left out while one of the two scores is
  missing.

  Returns:
    for each run: `name`, `since` (the row of the results table that has the scores before), and
    `changes`, see above.
  """
  result = []
  for run in _complete(study):
    since, source, stage = _start(run)
    before = scores.read(study, source, stage) if source else None
    after = scores.read(study, run, scores.FINAL)
    if before and after:
      result.append({'name': run.name, 'since': since,
                     'changes': changes(before, after)})
  return result


def _start(run: Run) -> tuple[str, Run | None, str]:
  """The row, run and stage of the scores that a trained mixture had before; else no run."""
  if run.edit and not run.steps:
    return run.sources[0].name, run.sources[0], scores.FINAL
  if not run.steps or not run.model.num_experts:
    return '', None, ''
  if run.from_step:
    return '', None, ''  # a step before the end is not measured
  if run.init == CHECKPOINT:
    return run.sources[0].name, run.sources[0], scores.FINAL
  return f'{run.name} unfinetuned', run, scores.START


def effects(study: Study) -> list[dict[str, Any]]:
  """Which expert helps which domain: for each mixture that was measured without each expert.

  Returns:
    for each mixture: `name`, `experts` (their names), `change`: domain -> for each expert, the
    bits per byte without it minus those with all experts; more than 0 is worse without it; and
    `error`: domain -> the standard error of each change from the text, paired by unit, None if it
    is not known.
  """
  result = []
  for run in _complete(study):
    whole = scores.read(study, run, scores.FINAL)
    masked = scores.read(study, run, scores.MASKED)
    if whole and masked and len(run.expert_names) > 1:
      bits = _bits(whole)
      result.append({
          'name': run.name, 'experts': list(run.expert_names),
          'change': {domain: [without - bits[domain] for without in score['bits_per_byte']]
                     for domain, score in masked.items()},
          'error': {domain: _errors(score, whole[domain]) for domain, score in masked.items()}})
  return result


def _errors(masked: Mapping[str, Any], whole: Mapping[str, Any]) -> list[float | None]:
  """The errors of a domain's changes without each expert."""
  if 'units' not in masked or 'units' not in whole:
    return [None] * len(masked['bits_per_byte'])
  size = masked['units']['bytes']
  return [error_bars.error_of_difference({'nll': nll, 'bytes': size}, whole['units'])
          for nll in masked['units']['nll']]


def why_unmasked(model: Config) -> str:
  """Why the experts of a model cannot be masked one by one; '' if they can."""
  if not model.num_experts:
    return 'it is not a mixture'
  if model.num_experts == 1:
    return 'it has a single expert'
  if not model.has_router:
    return f'the router {model.router!r} has no scores to choose another by'
  return ''


def remarks(study: Study) -> list[str]:
  """A line for each complete mixture for which mask_experts was set but no expert can be masked."""
  if not study.config.evaluation.mask_experts:
    return []
  return [f'{run.name}: no expert is masked, because {why}.'
          for run in _complete(study)
          if run.model.num_experts and (why := why_unmasked(run.model))]


def _complete(study: Study) -> Iterator[Run]:
  return (model.run for model in scores.models(study) if model.stage == scores.FINAL)


def _bits(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
  return {domain: score['bits_per_byte'] for domain, score in found.items()}
