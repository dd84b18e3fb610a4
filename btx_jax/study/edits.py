"""From base.extend, replace or drop to the experts of a mixture: resolved and checked, no compute.

Parameters and runs are compared by their origin: the run, or pretrained folder, in which a
parameter last changed. Parameters of one origin have the same bits.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from btx_jax.errors import UsageError, nearest
from btx_jax.model.config import ROPE, SIZES, param_paths, shared_paths
from btx_jax.recipe import (
  AS_BEFORE,
  OWN,
  Edit,
  RoutersFromText,
  refuse_labels,
  routers_from_config,
)
from btx_jax.run import CHECKPOINT, MIX, RANDOM, Run, frozen, lineage, parts_of, trains

SHARED = 'shared'  # what `allow` may name
_READ_WITH = (*ROPE, 'norm_eps', 'dtype')  # fields of a model that change its activations
_LISTED = 3  # parameters that a message names


def resolve(name: str, init, sources: Sequence[Run], router_std: float
            ) -> tuple[Edit, tuple[str, ...]]:
  """The experts of an edit, and their names.

  Args:
    name: of the run that starts from it.
    init: what base.extend, replace or drop returns.
    sources: the runs that it names, the mixture first.
    router_std: standard deviation of the routers' weights of new experts.

  Raises:
    UsageError: it starts from no mixture, names an expert that is unknown or ambiguous, keeps
      none, or adds one of other sizes or, unless allowed, from beside other shared weights.
  """
  mixture, *new = sources
  if not mixture.model.num_experts:
    raise UsageError(f'runs.{name}.init: {mixture.name!r} is not a mixture, so it has no experts '
                     'to exchange; name one that starts from base.mix(...).')
  for kind in init.allow:
    if kind != SHARED:
      raise UsageError(f'runs.{name}.init: allow = {kind!r}; {nearest(kind, (SHARED,))}')
  if not (init.added or init.replaced or init.dropped):
    raise UsageError(f'runs.{name}.init: an edit of {mixture.name!r} names no expert; to continue '
                     f'the mixture as it is, use base.checkpoint({mixture.name!r}).')
  place = {each.name: i for i, each in enumerate(sources)}
  parts: dict[int, tuple[int, int]] = {i: (0, i) for i in range(len(mixture.expert_names))}
  for old, run in init.replaced:
    number = _number(name, mixture, old)
    if parts[number][0]:
      raise UsageError(f'runs.{name}.init replaces {old!r} twice; name it once.')
    parts[number] = (place[run], OWN)
  for old in init.dropped:
    parts.pop(_number(name, mixture, old), None)
  parts |= {len(mixture.expert_names) + i: (place[run], OWN) for i, run in enumerate(init.added)}
  edit = Edit(tuple(parts.values()), router_std)
  if not edit.kept:
    raise UsageError(f'runs.{name}.init keeps no expert of {mixture.name!r}; make a new mixture '
                     'with base.mix(...).')
  for run in new:
    _check_new(name, mixture, run, allowed=SHARED in init.allow)
  return edit, tuple(mixture.expert_names[number] if source == 0 else sources[source].plain_name
                     for source, number in edit.parts)


def _number(name: str, mixture: Run, expert: str) -> int:
  """The number of the expert of this name."""
  found = [i for i, each in enumerate(mixture.expert_names) if each == expert]
  if not found:
    raise UsageError(f'runs.{name}.init: {mixture.name!r} has no expert {expert!r}; '
                     f'{nearest(expert, mixture.expert_names)}')
  if len(found) > 1:
    raise UsageError(f'runs.{name}.init: {expert!r} names {len(found)} experts of '
                     f'{mixture.name!r}, so it is not known which one; make a new mixture with '
                     'base.mix(...).')
  return found[0]


def check_model(name: str, mixture: Run, model: Mapping[str, Any], experts: int):
  """Raises UsageError if a mixture's model cannot have this number of experts.

  Args:
    name: of the run.
    mixture: the mixture.
    model: the fields of the model, with those that the run changes.
    experts: how many there will be.
  """
  if model['top_k'] > experts:
    raise UsageError(f'runs.{name}: model.top_k = {model["top_k"]}, and {mixture.name!r} is left '
                     f'with {experts}; keep more experts, or set model={{"top_k": {experts}}}.')
  if 'hash' in (mixture.model.router, model['router']):
    raise UsageError(f"runs.{name}: the router 'hash' sends a token to an expert by its id and "
                     'the number of experts, so any edit sends all tokens elsewhere; make a new '
                     'mixture with base.mix(...).')


def _check_new(name: str, mixture: Run, run: Run, allowed: bool):
  """Raises UsageError unless a run can become an expert beside a mixture's shared weights."""
  if run.model.num_experts:
    raise UsageError(f'runs.{name}.init: {run.name!r} is a mixture, and an expert is made from a '
                     'dense run.')
  wrong = [f'{field} = {getattr(run.model, field)}, not {getattr(mixture.model, field)}'
           for field in (*SIZES, 'vocab_size')
           if getattr(run.model, field) != getattr(mixture.model, field)]
  if wrong:
    raise UsageError(f'runs.{name}.init: {run.name!r} cannot be an expert of {mixture.name!r}: '
                     f'{"; ".join(wrong)}.')
  if not allowed and (found := beside_other(mixture, run)):
    raise UsageError(
        f'runs.{name}.init: {run.name!r} was not trained beside the shared weights of '
        f'{mixture.name!r}: {found}. Train it from a run that has these shared weights, with '
        "train={'freeze': base.FREEZE_ALL_BUT_EXPERTS} (and finetune the mixture with the same, if "
        f"it is finetuned), or accept it with allow=({SHARED!r},).")


def beside_other(mixture: Run, run: Run) -> str:
  """How the shared weights of a mixture and a dense run differ, in words; '' if not at all."""
  differing = [path for path in shared_paths(mixture.model)
               if origin(mixture, path) != origin(run, path)]
  fields = [f'{field} is {getattr(mixture.model, field)} and {getattr(run.model, field)}'
            for field in (*ROPE, 'norm_eps')
            if getattr(mixture.model, field) != getattr(run.model, field)]
  if run.vocabulary:
    fields.append('its tokens have other ids')
  if differing:
    more = len(differing) - _LISTED
    listed = ', '.join(differing[:_LISTED]) + (f' and {more} more' if more > 0 else '')
    path = differing[0]
    fields.append(f'{listed} are not known to be equal ({path} is from {_where(mixture, path)} '
                  f'there and from {_where(run, path)} here)')
  return '; '.join(fields)


def origin(run: Run, path: str) -> Any:
  """Where the shared parameter at a path last changed: equal for runs in which its bits are equal.

  The label of a run, the content of a pretrained folder, or the weights and origins of a mean.
  """
  if (run.steps and not frozen(path, run.objective.freeze)) or run.init == RANDOM:
    return run.label
  if not run.sources:
    return ('folder', run.content or run.folder)
  if run.recipe is None:
    return origin(run.sources[0], path)
  shares = tuple((weight, origin(source, path)) for weight, source in zip(
      run.recipe.weights(path), run.sources) if weight)
  return shares[0][1] if len(shares) == 1 else ('mean', shares)


def _where(run: Run, path: str) -> str:
  match origin(run, path):
    case ('mean', _):
      return 'an average'
    case ('folder', content):
      return 'the folder ' + next(each.folder for each in lineage(run)
                                  if content in (each.content, each.folder))
    case name:
      return str(name)


def routers(init, run: Run, domains: Sequence[str]) -> tuple[RoutersFromText | None, Edit]:
  """How an edit's routers are set, and the edit with the domains whose sums are kept already.

  Args:
    init: what base.extend, replace or drop returns.
    run: the run, complete but for its routers.
    domains: of the config.
  """
  edit, before = parts_of(run), fitted(run.sources[0])
  given = init.routers
  if given.kind == AS_BEFORE and before is None:
    refuse_labels(given)
    return None, edit
  known = {}
  for name, (source, number) in zip(run.expert_names, edit.parts):
    if source:
      new = run.sources[source]
      label = next(iter(new.weights)) if len(new.weights) == 1 else ''
    else:
      label = domain_of(run.sources[0], number)
    if label:
      known[name] = label
  if given.kind == AS_BEFORE and before and before.routers:
    given = type(given)({**given, **{field: getattr(before.routers, field) for field in (
        'kind', 'rows', 'ridge', 'temperature')}})
  found = routers_from_config(given, run.expert_names, known, domains, run.model.router)
  if found is None or before is None or before.routers is None:
    return found, edit
  earlier = before.routers.labels
  if found.rows != before.routers.rows or not _only_routers_since(run, before):
    return found, edit
  stored = tuple(
      domain for domain in found.domains if domain in earlier
      # The sums are of text that passed this expert.
      and edit.parts[found.labels.index(domain)] == (0, earlier.index(domain)))
  return found, dataclasses.replace(edit, stored=stored)


def fitted(mixture: Run) -> Run | None:
  """The nearest run in a mixture's descent whose routers were set from text; None without one.

  Between them no expert was exchanged.
  """
  while mixture.routers is None:
    if mixture.init != CHECKPOINT:
      return None
    mixture = mixture.sources[0]
  return mixture


def _only_routers_since(run: Run, before: Run) -> bool:
  """Whether nothing that an edit's router inputs depend on has changed since routers were set."""
  if any(getattr(run.model, field) != getattr(before.model, field) for field in _READ_WITH):
    return False
  mixture = run.sources[0]
  while True:
    if mixture.steps and any(trains(path, mixture.objective.freeze)
                             for path in param_paths(mixture.model) if '/router' not in path):
      return False
    if mixture is before:
      return True
    mixture = mixture.sources[0]


def domain_of(mixture: Run, number: int) -> str:
  """The domain of a mixture's expert; '' if it is not known."""
  if mixture.routers:
    return mixture.routers.labels[number]
  if mixture.edit:
    source, inner = mixture.edit.parts[number]
    return domain_of(mixture.sources[source], inner)
  if mixture.init == CHECKPOINT and mixture.model.num_experts:
    return domain_of(mixture.sources[0], number)
  if mixture.init == MIX:
    found = [each for each in mixture.sources if each.plain_name == mixture.expert_names[number]]
    return domain_of(found[0], OWN) if found else ''
  return next(iter(mixture.weights)) if number == OWN and len(mixture.weights) == 1 else ''


def remarks(run: Run) -> list[str]:
  """Lines about what an edit keeps, and where its experts do not belong together."""
  mixture, edit = run.sources[0], parts_of(run)
  lines = [f'{run.name}: {len(edit.kept)} of {len(run.expert_names)} experts, and all shared '
           f'weights, are those of {mixture.name}']
  lines += [f'{run.name}: {source.name} was not trained beside these shared weights: {found}'
            for source in run.sources[1:] if (found := beside_other(mixture, source))]
  return lines
