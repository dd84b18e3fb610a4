"""Where a mixture's score comes from: its experts, their average, its routers, its finetune.

Bits per byte of a domain, of

  own           the domain's own expert, before it was mixed
  average       the plain average of all that was mixed
  oracle_start  the mixture before its finetune, where every token of the domain goes to the
                domain's own expert alone, in all layers
  start         the mixture before its finetune, with its first routers
  oracle_final  as oracle_start, after the finetune
  final         the mixture after the finetune

and from these `averaging` = oracle_start - own, what it cost the expert that all other weights were
averaged; `routing` = start - oracle_start, what it cost that routers choose the experts; and
`gained` = start - final, what the finetune gained. The final score is
own + averaging + routing - gained.

A domain's own expert is the one that was trained on this domain alone, or that routers from text
were set to send it to. Of several such experts it is the one with the best score on the domain, and
if there is none, it is the best of all experts. The best is chosen before the finetune for the
first scores, and after it for oracle_final.

Computed from stored scores alone, so it needs no devices.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from btx_jax.run import CHECKPOINT, MIX, Run, parts_of, recipe_of
from btx_jax.scoring import error_bars, scores
from btx_jax.study import edits
from btx_jax.study.study import Study

SCORES = ('own', 'average', 'oracle_start', 'start', 'oracle_final', 'final')
# What is computed from them: name -> (a score, the score that is subtracted from it).
COSTS = {'averaging': ('oracle_start', 'own'), 'routing': ('start', 'oracle_start'),
         'gained': ('start', 'final')}
# Routers whose gates add up to less than 1: with them even equal experts are not one expert.
_PARTIAL = ('softmax_top_k', 'switch')

# Scores with one model, domain -> a score as bits.evaluate returns it; None if not measured.
_Scores = Mapping[str, Mapping[str, Any]] | None


def why_not(run: Run) -> str:
  """Why the experts of a run cannot be measured alone; '' if they can."""
  if not run.model.num_experts:
    return 'it is not a mixture'
  recipe = first_mixture(run).recipe
  if recipe and any(len(pieces) != 1 or pieces[0][1] for pieces in recipe.pieces):
    return 'its experts are parts of runs'
  return ''


def first_mixture(run: Run) -> Run:
  """The run that made the experts of this one: itself, unless it continues a mixture."""
  while run.init == CHECKPOINT and run.model.num_experts:
    run = run.sources[0]
  return run


def of_study(study: Study) -> list[dict[str, Any]]:
  """The decomposition of each complete mixture whose experts were measured alone.

  Returns:
    for each: `name`, `run` and `series` (see Run.plain_name), `experts` (their names); `domains`:
    domain -> `expert` and `expert_final`, the number of its own expert before and after the
    finetune, the scores SCORES, the costs COSTS, and `errors`: cost -> its standard error from the
    text, paired by unit; `mean`: SCORES, COSTS and `errors` of the means over the domains; and
    `by_expert`: the scores of each expert on each domain, domain -> [E], as `own`, `oracle_start`
    and `oracle_final`. What was not measured is None: `oracle_final`, `final` and `gained` of a
    mixture that is not trained, and `own` of pretrained experts.
  """
  return list(filter(None, (_of_run(study, model.run) for model in scores.models(study)
                            if model.stage == scores.FINAL and not why_not(model.run))))


def remarks(study: Study) -> list[str]:
  """A line for each complete mixture for which `oracle` was set but no expert can stand alone."""
  if not study.config.evaluation.oracle:
    return []
  return [f'{model.run.name}: no expert is measured alone, because {why}.'
          for model in scores.models(study) if model.stage == scores.FINAL
          and model.run.model.num_experts and (why := why_not(model.run))]


def unmixed(run: Run) -> list[Run | None]:
  """The run that each expert of a mixture was before it was mixed; None if it was none."""
  if run.init == CHECKPOINT:
    return unmixed(run.sources[0])
  if run.init == MIX:
    return [run.sources[pieces[0][0]] for pieces in recipe_of(run).pieces]
  if run.edit:
    return [run.sources[source] if source else unmixed(run.sources[0])[number]
            for source, number in parts_of(run).parts]
  return [None] * run.model.num_experts


def _of_run(study: Study, run: Run) -> dict[str, Any] | None:
  """The decomposition of one run; None if its experts were not measured alone."""
  mixture = first_mixture(run)
  is_trained = run is not mixture or mixture.steps > 0
  stage = scores.START if mixture.steps else scores.FINAL
  own = [source and scores.read(study, source, scores.FINAL) for source in unmixed(mixture)]
  alone = {'oracle_start': scores.read(study, mixture, scores.ALONE[stage]), 'oracle_final':
           scores.read(study, run, scores.ALONE[scores.FINAL]) if is_trained else None}
  by_expert = {'own': own, **{kind: _split(found, run.model.num_experts)
                              for kind, found in alone.items()}}
  whole = {
      'average': _average(study, mixture), 'start': scores.read(study, mixture, stage),
      'final': scores.read(study, run, scores.FINAL) if is_trained else None}
  if mixture.init == MIX and len(mixture.sources) == 1 and mixture.steps:
    # Copies of one run: before the finetune each is that run, and so is their mixture.
    by_expert['oracle_start'] = own
    whole['start'] = None if mixture.model.router in _PARTIAL else own[0]
  if not alone['oracle_start'] and not alone['oracle_final']:
    return None
  labels = [edits.domain_of(run, number) for number in range(run.model.num_experts)]
  domains = {}
  for domain in study.config.domains:
    first = by_expert['own'] if all(own) else by_expert['oracle_start']
    before = _best(domain, labels, first)
    after = _best(domain, labels, by_expert['oracle_final'])
    found = {**whole, 'own': own[before], 'oracle_start': by_expert['oracle_start'][before],
             'oracle_final': by_expert['oracle_final'][after]}
    domains[domain] = {'expert': before, 'expert_final': after} | _costs(
        {kind: score and score[domain] for kind, score in found.items()})
  return {
      'name': run.name, 'run': run.plain_name, 'series': run.series,
      'experts': list(run.expert_names), 'domains': domains,
      'mean': _mean_of([*domains.values()]),
      'by_expert': {kind: {domain: [found and found[domain]['bits_per_byte']
                                    for found in of_experts] for domain in domains}
                    for kind, of_experts in by_expert.items() if any(of_experts)}}


def _average(study: Study, mixture: Run) -> _Scores:
  """The scores of the plain average of what was mixed; they are stored once for each average."""
  if mixture.init != MIX or len(mixture.sources) < 2:
    return None
  return scores.read(study, scores.first_equivalent(study, mixture), scores.AVERAGE)


def _split(found: _Scores, experts: int) -> Sequence[_Scores]:
  """Scores by expert, as bits.each_expert_alone returns them, as those of each expert."""
  if not found:
    return [None] * experts
  return [{domain: {'bits_per_byte': score['bits_per_byte'][number]} | ({'units': {
      'nll': score['units']['nll'][number], 'bytes': score['units']['bytes']}}
      if 'units' in score else {}) for domain, score in found.items()}
          for number in range(experts)]


def _best(domain: str, labels: Sequence[str], of_experts: Sequence[_Scores]) -> int:
  """The number of a domain's own expert: the best of those with its label, or else of all."""
  candidates = [number for number, label in enumerate(labels) if label == domain]

  def score(number: int) -> float:
    found = of_experts[number]
    return found[domain]['bits_per_byte'] if found else 0.0

  return min(candidates or range(len(labels)), key=score)


def _costs(found: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Any]:
  """SCORES, COSTS and their `errors` of a domain, from its scores with each model."""
  result: dict[str, Any] = {kind: score and score['bits_per_byte'] for kind, score in found.items()}
  errors = {}
  for cost, (kind, other) in COSTS.items():
    score, less = found[kind], found[other]
    result[cost] = errors[cost] = None
    if score and less:
      result[cost] = score['bits_per_byte'] - less['bits_per_byte']
      if 'units' in score and 'units' in less:
        errors[cost] = error_bars.error_of_difference(score['units'], less['units'])
  return {**result, 'errors': errors}


def _mean_of(domains: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """The means of SCORES and COSTS over the domains, and their `errors`."""
  result: dict[str, Any] = {
      kind: error_bars.mean([of_domain[kind] for of_domain in domains])
      for kind in (*SCORES, *COSTS)}
  return result | {'errors': {
      cost: error_bars.error_of_mean(of_domain['errors'][cost] for of_domain in domains)
      for cost in COSTS}}
