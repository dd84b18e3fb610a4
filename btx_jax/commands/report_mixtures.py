"""The report's sections on all mixtures together: what averaging and routing cost each of them, and
which tokens each sends to which expert."""

from collections.abc import Sequence
from typing import Any

from btx_jax.commands import decomposition as decomposition_table
from btx_jax.commands import mixture_pictures, pictures
from btx_jax.scoring import routing, scores
from btx_jax.study import edits
from btx_jax.study.study import Study


def parts(found: Sequence[dict[str, Any]], save: pictures.SavePicture) -> dict[str, Any] | None:
  """Where the score of each mixture comes from; `found` is of decomposition.of_study."""
  mixed = decomposition_table.over_seeds(found)
  if not mixed:
    return None
  panels = {domain: {each['name']: each['parts'][domain] for each in mixed}
            for domain in mixed[0]['parts']}
  return {
      'picture': save('parts', mixture_pictures.decomposition(panels),
                      'Costs of averaging and routing, and gain of the finetune, by mixture'),
      'headings': decomposition_table.HEADINGS, 'about': decomposition_table.ABOUT,
      'seeds': max(each['seeds'] for each in mixed),
      'means': [[each['name'], *decomposition_table.cells(each['parts']['mean'])]
                for each in mixed],
      'by_domain': [{'name': each['name'], 'rows': decomposition_table.domains_cells(each)}
                    for each in mixed]}


def routings(study: Study) -> list[dict[str, Any]]:
  """How each measured mixture routes held-out text, before and after its training.

  Returns:
    for each mixture and stage: `name`, `run`, `stage` (see scores.Model), `experts`, `labels`
    (the domain of each expert, or its name if that is not known), and what routing.describe
    returns.
  """
  result = []
  for model in scores.models(study):
    found = scores.read(study, model.run, model.stage)
    if found and model.stage != scores.AVERAGE and (described := routing.describe(found)):
      labels = [edits.domain_of(model.run, number) or name
                for number, name in enumerate(model.run.expert_names)]
      result.append({'name': model.name, 'run': model.run.name, 'stage': model.stage,
                     'experts': list(model.run.expert_names), 'labels': labels, **described})
  return result


def side_by_side(routed: Sequence[dict[str, Any]], save: pictures.SavePicture
                 ) -> dict[str, Any] | None:
  """The routing of all mixtures, see `routings`; of several seeds only the first is shown."""
  shown: dict[str, dict[str, Any]] = {}
  for each in routed:
    shown.setdefault(each['name'], each)
  if not shown:
    return None
  layers = max(len(each['mutual_information']) for each in shown.values())
  return {
      'picture': save('choices', mixture_pictures.choices(
          {name: each['share'] for name, each in shown.items()},
          {name: each['labels'] for name, each in shown.items()}),
                      'First choices of experts by mixture, domain and layer'),
      'headings': ['mixture', *(f'layer {layer}' for layer in range(layers))],
      'rows': [[name, *(f'{bits:.3f}' for bits in each['mutual_information'])]
               for name, each in shown.items()]}


def tokens(routed: dict[str, Any]) -> dict[str, Any]:
  """The tokens and classes of tokens that go to each expert of one mixture."""
  names = list(enumerate(routed['experts']))
  return {
      'tokens': [[f'{layer}', f'{number} {name}', '  '.join(
          f'{_visible(piece)} {chosen} of {every}' for piece, chosen, every in of_layer[number])]
                 for layer, of_layer in zip(routed['layers'], routed['tokens'])
                 for number, name in names],
      'class_headings': ['layer', 'tokens', *(f'{number} {name}' for number, name in names)],
      'classes': [[f'{layer}', kind, *(f'{share:.1%}' for share in shares)]
                  for layer, of_layer in zip(routed['layers'], routed['classes'])
                  for kind, shares in zip(routing.CLASSES, of_layer) if shares]}


def _visible(piece: str) -> str:
  """A token between marks, in which a space is shown too."""
  for hidden, shown in ((' ', '\u2423'), ('\n', '\u23ce'), ('\t', '\u21e5')):
    piece = piece.replace(hidden, shown)
  return f'\u201c{piece}\u201d'
