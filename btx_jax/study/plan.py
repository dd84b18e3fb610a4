"""From a config to runs: checked, with all that a run needs, in the order they can be done.

Runs are a graph by what they start from; nothing here, or after, knows a phase by name.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import os
import re

from btx_jax import errors
from btx_jax import recipe as recipe_lib
from btx_jax.convert import hugging_face
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.errors import UsageError, nearest
from btx_jax.model import config as model_config
from btx_jax.model.config import OF_REFERENCE, ROPE, SIZES
from btx_jax.recipe import Recipe
from btx_jax.run import CHECKPOINT, HUGGING_FACE, MIX, RANDOM, Objective, Optimizer, Run, lineage
from btx_jax.study import compatibility
from btx_jax.study import compatibility as mixable

_RESERVED = ('data', 'report')
# What the parameters are shaped by; the rest of a model's fields may change between runs.
_SHAPES = ('vocab_size', *SIZES, 'num_experts')
# What else a pretrained model was trained with.
_PRETRAINED = (*ROPE, 'norm_eps')
# Of no effect on a dense model.
_ROUTING = ('router', 'top_k', 'capacity_factor')


def make_plan(config, vocab_size: int, tokenizer: Tokenizer | None = None,
              at_hand: bool = True) -> dict[str, Run]:
  """The runs of a config by name, each behind those that it starts from.

  Args:
    config: ConfigDict as btx_jax/base.py makes it.
    vocab_size: of the tokenizer.
    tokenizer: that, where it is there already.
    at_hand: pretrained models are; else those that are not have the sizes of `config.model`.

  Raises:
    UsageError: anything that could not be run, said before any compute is spent.
  """
  if not config.runs:
    raise UsageError('config.runs is empty: there is nothing to do. See configs/demo.py.')
  for name in config.stacked:
    if name not in config.runs:
      raise UsageError(f'stacked names {name!r}, which is not a run; '
                       f'{nearest(name, config.runs)}')
  runs: dict[str, Run] = {}
  for name in _ordered(config.runs, config.stacked):
    runs[name] = _make_run(name, config, runs, vocab_size, tokenizer, at_hand)
  _check_stacked([runs[name] for name in config.stacked])
  return runs


def groups(runs: Iterable[Run], stacked: Sequence[str]) -> list[list[Run]]:
  """Runs in their order, those that are trained as one program together."""
  result: list[list[Run]] = []
  for run in runs:
    if result and run.name in stacked and result[-1][0].name in stacked:
      result[-1].append(run)
    else:
      result.append([run])
  return result


def _check_stacked(runs: list[Run]):
  """Raises UsageError unless the runs can be trained by one program."""
  for run in runs:
    if not run.steps:
      raise UsageError(f'stacked names {run.name!r}, which is not trained.')
    if run.model.num_experts:
      raise UsageError(f'stacked names {run.name!r}, which is a mixture; only dense runs can be '
                       'trained as one program.')
    shared = {field: getattr(run, field) for field in ('seq_len', 'batch_size', 'microbatches')}
    shared |= {f'model.{key}': value for key, value in dataclasses.asdict(run.model).items()}
    shared |= {'train.freeze': run.objective.freeze}
    shared |= {f'optimizer.{key}': value for key, value in dataclasses.asdict(run.optimizer).items()
               if key not in ('peak_lr', 'warmup', 'final_lr')}
    first = runs[0]
    if run is first:
      expected = shared
    for key, value in shared.items():
      if value != expected[key]:
        raise UsageError(f'stacked: {first.name!r} and {run.name!r} cannot be trained as one '
                         f'program: {key} is {expected[key]!r} and {value!r}. Only domains, steps '
                         'and learning rates may differ.')


def _ordered(entries, stacked: Sequence[str]) -> list[str]:
  """Names so that each stands behind its sources and what its length is measured by, and
  those that are stacked next to each other."""
  order: list[str] = []

  def visit(name: str, path: tuple[str, ...]):
    if name in path:
      raise UsageError('Runs start from each other in a circle: ' +
                       ' -> '.join((*path[path.index(name):], name)))
    if name in order:
      return
    together = stacked if name in stacked else (name,)
    for one in together:
      entry = entries[one]
      for kind in ('init', 'match_flops_of'):
        named = recipe_lib.names_in(entry.init) if kind == 'init' else entry.match_flops_of
        for needed in named:
          if needed not in entries:
            raise UsageError(f'runs.{one}.{kind} names {needed!r}, which is not a run; '
                             f'{nearest(needed, entries)}')
          visit(needed, (*path, *together))
    order.extend(together)

  for name in entries:
    if name.split('/')[0] in _RESERVED or name.startswith('/'):
      raise UsageError(f'{name!r} cannot be the name of a run: it is a directory below the '
                       f'working directory, where {" and ".join(_RESERVED)} are taken.')
    if re.search(r'[\s\'"]', name):
      raise UsageError(f'{name!r} cannot be the name of a run: scripts could not tell it from '
                       'others. Write it without white space and quotes.')
    visit(name, ())
  return order


def _make_run(name: str, config, runs: Mapping[str, Run], vocab_size: int,
              tokenizer: Tokenizer | None, at_hand: bool) -> Run:
  entry = config.runs[name]
  train = {**config.train, **entry.train}
  length, batch_size, microbatches = (
      config.data.seq_len, train['batch_size'], train['microbatches'])
  for field, value in (('data.seq_len', length), ('train.batch_size', batch_size),
                       ('train.microbatches', microbatches)):
    if value < 1:
      raise UsageError(f'runs.{name}: {field} = {value} must be at least 1.')
  if batch_size % microbatches:
    raise UsageError(f'runs.{name}: train.batch_size = {batch_size} is not a multiple of '
                     f'train.microbatches = {microbatches}.')
  sources, recipe, experts = _start(name, config, runs)
  pretrained = _pretrained(name, config, at_hand)
  untrained = entry.init.kind != RANDOM and not (
      entry.domains or entry.steps or entry.match_flops_of)
  vocabulary = _vocabulary(name, config, runs, pretrained, untrained, vocab_size, tokenizer)
  model = _model(name, config, runs, recipe, pretrained, vocab_size)
  if model.vocab_size < vocab_size and not vocabulary:
    raise UsageError(f'runs.{name}: model.vocab_size = {model.vocab_size} is smaller than the '
                     f"tokenizer's {vocab_size}; set it to 0 to take the tokenizer's.")
  with errors.about(f'runs.{name}'):
    objective = Objective(**{field.name: train[field.name]
                             for field in dataclasses.fields(Objective)})
    # A model keeps the bias that it started with, for its routing depends on it.
    biased = model.num_experts > 0 and model.router in model_config.SCORING and (
        model.router_bias or (objective.balance_bias > 0 and not untrained))
    model = dataclasses.replace(model, router_bias=biased)
    objective.check(model)
    optimizer = Optimizer(**{**config.optimizer, **entry.optimizer})
  steps = entry.steps
  if entry.match_flops_of:
    if steps:
      raise UsageError(f'runs.{name} has both steps = {steps} and match_flops_of; give one.')
    per_step = batch_size * length * model_config.train_flops_per_token(model, length)
    steps = round(sum(runs[other].flops for other in entry.match_flops_of) / per_step)
  if steps < 1 and not untrained:
    raise UsageError(f'runs.{name}.steps = {steps} must be at least 1.')
  return Run(
      name=name, init=entry.init.kind, sources=sources, recipe=recipe, experts=experts,
      weights={} if untrained else _weights(name, entry.domains, config.domains), model=model,
      optimizer=optimizer, steps=steps, seq_len=length, batch_size=batch_size,
      microbatches=microbatches, objective=objective, seed=config.seed,
      folder=pretrained.path if pretrained else '', content=pretrained.hash if pretrained else '',
      vocabulary=vocabulary)


def _start(name: str, config, runs: Mapping[str, Run]):
  """Sources, recipe and experts of a run."""
  init = config.runs[name].init
  if init.kind not in (RANDOM, CHECKPOINT, MIX, HUGGING_FACE):
    raise UsageError(f'runs.{name}.init.kind = {init.kind!r}; '
                     f'{nearest(init.kind, (RANDOM, CHECKPOINT, MIX, HUGGING_FACE))}')
  if init.kind in (CHECKPOINT, MIX) and not init.runs:
    raise UsageError(f'runs.{name}.init: {init.kind} names no run to start from.')
  if init.kind == CHECKPOINT and len(init.runs) > 1:
    raise UsageError(f'runs.{name}.init: a checkpoint has one source, not {len(init.runs)}.')
  if init.kind != MIX:
    return tuple(init.runs), None, runs[init.runs[0]].experts if init.runs else ()
  names = recipe_lib.names_in(init)
  sources = [runs[source] for source in names]
  mixable.check(name, sources, runs, init.allow)
  model = runs[names[0]].model
  with errors.about(f'runs.{name}'):
    recipe = recipe_lib.make(init, names, model.ffn_dim, model_config.shared_paths(model),
                             _tokens_apart(init.averaged or init.runs, names, runs),
                             config.mix.router_std)
  mixable.check_reference(name, sources[recipe.reference])
  return names, recipe, recipe_lib.labels(init.arrangement, init.runs, init.chunks)


def _tokens_apart(names: Sequence[str], of: Sequence[str], runs: Mapping[str, Run]):
  """What each run was trained on since the last run that all of `names` come from."""
  lines = [{run.name for run in lineage(runs[name], runs)} for name in names]
  return [sum(run.tokens for run in lineage(runs[name], runs)
              if run.name not in set.intersection(*lines)) for name in of]


def _pretrained(name: str, config, at_hand: bool) -> hugging_face.Folder | None:
  """The folder that the run starts from, if it is one, and is there or has to be."""
  init = config.runs[name].init
  if init.kind != HUGGING_FACE or not (at_hand or os.path.exists(init.folder)):
    return None
  if not config.tokenizer.path:
    raise UsageError(f'runs.{name} starts from a pretrained model, which knows the tokenizer that '
                     f'it was trained with and no other: set tokenizer.path = {init.folder!r}.')
  with errors.about(f'runs.{name}'):
    return hugging_face.Folder(init.folder)


def _vocabulary(name: str, config, runs: Mapping[str, Run],
                pretrained: hugging_face.Folder | None, untrained: bool, vocab_size: int,
                tokenizer: Tokenizer | None) -> str:
  """`Run.vocabulary`. A model that does not know the tokenizer's cannot be trained on."""
  init = config.runs[name].init
  if init.kind == CHECKPOINT and runs[init.runs[0]].vocabulary:
    raise UsageError(f'runs.{name} starts from {init.runs[0]!r}, whose vocabulary is not that of '
                     f'tokenizer.path = {config.tokenizer.path!r}: such a model can only be mixed.')
  if not pretrained:
    return ''
  with errors.about(f'runs.{name}'):
    own = compatibility.own(init.folder, tokenizer) if tokenizer else None
  size = pretrained.model.vocab_size
  if own:
    clash = compatibility.contradiction(tokenizer.vocabulary(), own, size)
    if clash and not untrained:
      raise UsageError(
          f'runs.{name}: tokenizer.path = {config.tokenizer.path!r} is not the tokenizer of the '
          f'model in {init.folder}: {clash}. Set tokenizer.path to the model\'s own tokenizer.')
    return compatibility.identify(own) if clash else ''
  if size < vocab_size:
    raise UsageError(
        f'runs.{name}: the model in {init.folder} knows {size} tokens, and '
        f'tokenizer.path = {config.tokenizer.path!r} has {vocab_size}; set tokenizer.path to the '
        "model's own tokenizer.")
  return ''


def _model(name: str, config, runs: Mapping[str, Run], recipe: Recipe | None,
           pretrained: hugging_face.Folder | None, vocab_size: int) -> model_config.Config:
  """Sizes from the config, or from what the run starts from, with the run's own changes."""
  entry = config.runs[name]
  kind = entry.init.kind
  if kind == RANDOM or (kind == HUGGING_FACE and not pretrained):
    fields = dict(config.model)
    fields['vocab_size'] = fields['vocab_size'] or vocab_size
  elif pretrained:
    known = (*_SHAPES, *_PRETRAINED, *(_ROUTING if pretrained.model.num_experts else ()))
    fields = {**config.model, **{key: getattr(pretrained.model, key) for key in known}}
  else:
    fields = dataclasses.asdict(runs[entry.init.runs[0]].model)
  if recipe:
    reference = runs[recipe_lib.names_in(entry.init)[recipe.reference]].model
    fields |= {field: getattr(reference, field) for field in OF_REFERENCE}
    fields['num_experts'] = len(recipe.experts)
    fields['ffn_dim'] = sum(end - first for _, first, end in recipe.experts[0])
  sizes = dict(fields)
  with errors.about(f'runs.{name}'):
    model = model_config.Config(**{**fields, **entry.model})
  if kind != RANDOM:
    changed = [f'{key} = {entry.model[key]} (it starts from {sizes[key]})'
               for key in entry.model if key in _SHAPES and entry.model[key] != sizes[key]]
    if changed:
      raise UsageError(f'runs.{name}.model changes the parameters: {", ".join(changed)}.')
  was = sizes['router']
  if kind == CHECKPOINT and model.num_experts and was != model.router and (
      'hash' in (was, model.router)):
    raise UsageError(f'runs.{name}: model.router = {model.router!r}, but {entry.init.runs[0]!r} '
                     f"has {was!r}, and by 'hash' there is none to train on; use base.mix(...).")
  return model


def _weights(name: str, weights, domains) -> dict[str, float]:
  for domain, weight in weights.items():
    if domain not in domains:
      raise UsageError(f'runs.{name}.domains names {domain!r}, which is not a domain; '
                       f'{nearest(domain, domains)}')
    if not 0 <= weight < float('inf'):
      raise UsageError(f'runs.{name}.domains.{domain} = {weight}; weights are finite and not '
                       'negative.')
  total = sum(weights.values())
  if not total:
    raise UsageError(f'runs.{name}.domains = {dict(weights)}: at least one weight must be '
                     'positive.')
  return {domain: weight / total for domain, weight in sorted(weights.items()) if weight}
