"""From a config to its runs: checked, complete, and in an order in which they can be trained.

Runs form a graph by what they start from. Neither this file nor anything later knows the name of a
phase: the seed, the experts and the finetune are runs like any other.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import os
import re

from btx_jax import errors, outer, selector
from btx_jax.convert.hugging_face import Folder
from btx_jax.data import domains
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.errors import UsageError, nearest
from btx_jax.files import naming, places
from btx_jax.model import config as model_config
from btx_jax.model.config import OF_REFERENCE, ROPE, SIZES
from btx_jax.recipe import Edit, Recipe, expert_names, routers_from_config, sources_of
from btx_jax.recipe import from_config as recipe_from_config
from btx_jax.run import (
  BEST,
  CHECKPOINT,
  EDIT,
  ENSEMBLE,
  HUGGING_FACE,
  INITIALISERS,
  MIX,
  OF_LOSSES,
  RANDOM,
  Objective,
  Optimizer,
  Run,
  lineage,
  lineage_of,
)
from btx_jax.study import compatibility, continued, edits

_RESERVED = ('data', 'report')
# Names of files and folders that a run keeps in its own directory.
_OF_RUN = re.compile(r'checkpoints|lock|profile|tensorboard|wandb|.*\.jsonl?', re.IGNORECASE)
# The fields of a model that its parameters depend on; the others may change between runs.
_SHAPES = ('vocab_size', *SIZES, 'num_experts')
# Further fields that a pretrained model was trained with.
_PRETRAINED = (*ROPE, 'norm_eps')
# Fields without effect on a dense model.
_ROUTING = ('router', 'top_k', 'capacity_factor')


def make_plan(config, vocab_size: int, tokenizer: Tokenizer | None = None,
              at_hand: bool = True, best: Mapping[str, int] | None = None) -> dict[str, Run]:
  """The runs of a config by name, each after the runs that it starts from.

  With config.seeds they are all runs of the first seed, then all of the second, and so on, so that
  a study that is stopped has whole seeds. Only the best steps in a plan depend on the seed.

  Args:
    config: a ConfigDict from base.get_config.
    vocab_size: of the tokenizer.
    tokenizer: the tokenizer, if it exists already.
    at_hand: pretrained models must exist; otherwise a missing one has the sizes of `config.model`.
    best: the steps that step='best' means, as far as they are known; see recorded.best_steps.

  Raises:
    UsageError: something in the config cannot run. No compute has been spent then.
  """
  if not config.runs:
    raise UsageError('config.runs is empty: there is nothing to do. See configs/demo.py.')
  for name in config.stacked:
    if name not in config.runs:
      raise UsageError(f'stacked names {name!r}, which is not a run; '
                       f'{nearest(name, config.runs)}')
  _check_seeds(config)
  names, best = _ordered(config.runs, config.stacked), best or {}

  def make(series: str) -> dict[str, Run]:
    runs: dict[str, Run] = {}
    for name in names:
      runs[name] = _make_run(name, config, runs, vocab_size, tokenizer, at_hand,
                             best.get(os.path.join(series, name)))
    _check_stacked([runs[name] for name in config.stacked])
    return runs

  if not config.seeds:
    return make('')
  of_all = None if best else make('')
  return {run.name: run for seed in config.seeds
          for run in _series((of_all or make(series_name(seed))).values(), seed)}


def _check_seeds(config):
  """Raises UsageError unless each seed can have a directory of its own."""
  seeds = list(config.seeds)
  for seed in seeds:
    if seed < 0:
      raise UsageError(f'config.seeds has {seed}, and seeds cannot be negative.')
    if seeds.count(seed) > 1:
      raise UsageError(f'config.seeds has {seed} twice; every run is trained once for each seed.')
  for name in config.runs:
    if naming.folded(name.split('/')[0]) in map(series_name, seeds):
      raise UsageError(f'{name!r} cannot be the name of a run while config.seeds = '
                       f'{tuple(seeds)}: {name.split("/")[0]} is the directory of the runs with '
                       'that seed. Rename the run.')


def _series(runs: Iterable[Run], seed: int) -> list[Run]:
  """The runs with this seed, in a series of their own.

  A pretrained model that is not trained depends on no seed: all series share it as it is.
  """
  series, made = series_name(seed), {}
  for run in runs:
    if run.init == HUGGING_FACE and not run.steps:
      made[run.name] = run
    else:
      made[run.name] = dataclasses.replace(
          run.on(made), name=f'{series}/{run.name}', series=series, seed=seed)
  return list(made.values())


def series_name(seed: int) -> str:
  """The directory of all runs with a seed."""
  return f'seed-{seed}'


def check_name(name: str) -> None:
  """Raises UsageError unless a run can have this name."""
  naming.check('run', name)
  if naming.folded(name.split('/')[0]) in _RESERVED:
    raise UsageError(f'{name!r} cannot be the name of a run: it is a directory in the working '
                     f'directory, where {" and ".join(_RESERVED)} are taken.')
  if re.search(r'[\s\'"]', name):
    raise UsageError(f'{name!r} cannot be the name of a run, because the launch scripts split '
                     'names at white space and quotes; use neither.')


def _check_inside(name: str, names: Iterable[str]):
  """Raises UsageError if a run's directory would be one that another run keeps its own files in."""
  for other in names:
    inside = name.removeprefix(f'{other}/')
    if inside != name and _OF_RUN.fullmatch(inside.split('/')[0]):
      raise UsageError(f'{name!r} cannot be the name of a run beside {other!r}, which keeps files '
                       'of its own under that name; rename either.')


def groups(runs: Iterable[Run], stacked: Sequence[str]) -> list[list[Run]]:
  """The runs in their order, grouped into those that one program trains together.

  Args:
    runs: in the order of a plan.
    stacked: the config's names of the runs that one program trains; of each series.
  """
  result: list[list[Run]] = []
  for run in runs:
    before = result[-1][0] if result else None
    if before and run.plain_name in stacked and before.plain_name in stacked and (
        run.series == before.series):
      result[-1].append(run)
    else:
      result.append([run])
  return result


def _check_stacked(runs: list[Run]):
  """Raises UsageError unless one program can train the runs."""
  for run in runs:
    if not run.steps:
      raise UsageError(f'stacked names {run.name!r}, which is not trained.')
    if run.model.num_experts:
      raise UsageError(f'stacked names {run.name!r}, which is a mixture; only dense runs can be '
                       'trained as one program.')
    if run.outer:
      raise UsageError(f'stacked names {run.name!r}, which has {run.workers} workers: they are one '
                       'program already. Take it out of stacked.')
  fields = [_fields_to_share(run) for run in runs]
  for run, own in zip(runs, fields):
    for field, value in own.items():
      if value != fields[0][field]:
        raise UsageError(f'stacked: {runs[0].name!r} and {run.name!r} cannot be trained as one '
                         f'program: {field} is {fields[0][field]!r} and {value!r}. Only domains, '
                         'steps and learning rates may differ.')


def _fields_to_share(run: Run) -> dict:
  """The fields that must be equal in stacked runs."""
  shared = {field: getattr(run, field) for field in (
      'seq_len', 'batch_size', 'microbatches', 'skip_nonfinite')}
  shared |= {f'model.{key}': value for key, value in dataclasses.asdict(run.model).items()}
  shared |= {f'train.{key}': getattr(run.objective, key) for key in ('freeze', *OF_LOSSES)}
  return shared | {
      f'optimizer.{key}': value for key, value in dataclasses.asdict(run.optimizer).items()
      if key not in ('peak_lr', 'schedule', 'warmup', 'decay', 'final_lr')}


def _ordered(entries, stacked: Sequence[str]) -> list[str]:
  """The names, each after its sources and those whose FLOPs it matches; stacked runs side by side.
  """
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
      for kind, names in (('init', sources_of(entry.init)), *_matched(entry)):
        for needed in names:
          if needed not in entries:
            raise UsageError(f'runs.{one}.{kind} names {needed!r}, which is not a run; '
                             f'{nearest(needed, entries)}')
          visit(needed, (*path, *together))
    order.extend(together)

  naming.check_distinct('run', entries)
  for name in entries:
    check_name(name)
    _check_inside(name, entries)
    visit(name, ())
  return order


def _matched(entry) -> list[tuple[str, tuple[str, ...]]]:
  """The fields that name runs whose FLOPs an entry matches, and the names."""
  total = entry.match_total_flops_of
  return [('match_flops_of', entry.match_flops_of),
          ('match_total_flops_of', (total,) if total else ())]


def _make_run(name: str, config, runs: Mapping[str, Run], vocab_size: int,
              tokenizer: Tokenizer | None, at_hand: bool, best: int | None) -> Run:
  entry, trained = config.runs[name], domains.trained(config.domains)
  train = {**config.train, **entry.train}
  _check_batch(name, config.data.seq_len, train['batch_size'], train['microbatches'])
  sources, recipe, edit, names = _start(name, config, runs, best)
  pretrained = _pretrained(name, config, at_hand)
  # A run without domains and steps is what it starts from.
  untrained = entry.init.kind != RANDOM and not (
      entry.domains or entry.steps or any(names for _, names in _matched(entry)))
  if entry.init.kind == ENSEMBLE and not untrained:
    raise UsageError(f'runs.{name} is an ensemble, which is several models and not trained as one: '
                     'give it no domains and steps. Train an expert further by a run that starts '
                     'from base.checkpoint(EXPERT), and name that run in the ensemble.')
  vocabulary = _vocabulary(name, config, runs, pretrained, untrained, vocab_size, tokenizer)
  model = _model(name, config, runs, recipe, edit, pretrained, vocab_size)
  names = names or tuple(f'expert {e}' for e in range(model.num_experts))  # of a pretrained mixture
  if model.vocab_size < vocab_size and not vocabulary:
    raise UsageError(f'runs.{name}: model.vocab_size = {model.vocab_size} is smaller than the '
                     f"tokenizer's {vocab_size}; set it to 0 to take the tokenizer's.")
  with errors.about(f'runs.{name}'):
    objective = Objective(**{field.name: train[field.name]
                             for field in dataclasses.fields(Objective)})
    # A model keeps the bias that it started with, because its routing depends on it.
    biased = model.num_experts > 0 and model.router in model_config.SCORING and (
        model.router_bias or (objective.balance_bias > 0 and not untrained))
    model = dataclasses.replace(model, router_bias=biased)
    objective.check(model)
    domain_of = {source.name: next(iter(source.weights)) for source in sources
                 if len(source.weights) == 1}
    routers = None if recipe is None else routers_from_config(
        entry.init.routers, entry.init.runs, domain_of, trained, model.router,
        entry.init.arrangement)
    selects = selector.from_config(
        entry.init, [source.name for source in sources], domain_of,
        [source.name for source in sources if source.steps], trained,
        model.num_layers) if entry.init.kind == ENSEMBLE else None
    optimizer = Optimizer(**{**config.optimizer, **entry.optimizer})
    workers = outer.from_config(train)
  run = Run(
      name=name, init=entry.init.kind, sources=sources, recipe=recipe, expert_names=names,
      weights={} if untrained else _weights(name, entry.domains, config.domains), model=model,
      optimizer=optimizer, seq_len=config.data.seq_len, batch_size=train['batch_size'],
      steps=0 if untrained else _steps(
          name, config, runs, sources, model, objective, train['batch_size']),
      microbatches=train['microbatches'], objective=objective, seed=config.seed,
      folder=pretrained.path if pretrained else '', content=pretrained.hash if pretrained else '',
      vocabulary=vocabulary, routers=routers, edit=edit, selector=selects,
      state=entry.init.get('state', False), outer=None if untrained else workers,
      redraw=float(entry.init.get('redraw', 0.0)), skip_nonfinite=train['skip_nonfinite'])
  if run.skip_nonfinite < 0:
    raise UsageError(f'runs.{name}: train.skip_nonfinite = {run.skip_nonfinite} cannot be '
                     'negative.')
  _check_workers(run)
  _check_redraw(run)
  continued.check_state(run)
  _check_loss(run, config.domains)
  if edit is None:
    return run
  with errors.about(f'runs.{name}'):
    routers, edit = edits.routers(entry.init, run, trained)
  biased = model.router_bias and (
      routers is None or (objective.balance_bias > 0 and not untrained))
  return dataclasses.replace(run, routers=routers, edit=edit,
                             model=dataclasses.replace(model, router_bias=biased))


def _check_workers(run: Run):
  """Raises UsageError if a run has several workers and settings that they do not support."""
  with errors.about(f'runs.{run.name}'):
    if run.state and run.sources[0].outer:
      raise UsageError(f'init.state = True: the optimizer state of {run.sources[0].name!r} is that '
                       f'of {run.sources[0].workers} workers, which no other run can take. Omit '
                       'it; then the moments start at zero.')
    if not run.outer:
      return
    run.outer.check(run.weights, run.batch_size, run.microbatches)
    if run.model.num_experts:
      raise UsageError(f'train.workers = {run.workers}: only dense models are trained by several '
                       'workers, and this is a mixture. Set train.workers = 1.')
    if run.objective.on_pairs:
      raise UsageError(f'train.workers = {run.workers} and train.loss = {run.objective.loss!r}: '
                       'several workers train on the next token only. Set train.workers = 1.')
    if run.state:
      raise UsageError(f'train.workers = {run.workers}: each worker starts with moments at zero, '
                       'so init.state = True has no effect. Omit it.')


def _check_redraw(run: Run):
  """Raises UsageError if hidden units cannot be re-initialised."""
  if not 0 <= run.redraw <= 1:
    raise UsageError(f'runs.{run.name}.init: redraw = {run.redraw} must be a share of the hidden '
                     'units, from 0 to 1.')
  if run.redraw and run.model.num_experts:
    raise UsageError(f'runs.{run.name}.init: redraw = {run.redraw}: {run.sources[0].name!r} is a '
                     'mixture. Set redraw for its dense runs, and then mix them.')
  if run.redraw and run.state:
    raise UsageError(f'runs.{run.name}.init: state = True with redraw = {run.redraw} would take '
                     'moments of weights that are gone. Omit one of them.')


def _check_loss(run: Run, config_domains):
  """Raises UsageError if a run's loss cannot be computed on one of its domains."""
  loss = run.objective.loss
  for domain in run.weights:
    if (config_domains[domain].format == domains.PAIRS) == run.objective.on_pairs:
      continue
    if run.objective.on_pairs:
      raise UsageError(f'runs.{run.name}: train.loss = {loss!r} is for pairs of answers, and '
                       f'domains.{domain} has format = {config_domains[domain].format!r}. Name '
                       f'domains with format = {domains.PAIRS!r}, or omit train.loss.')
    raise UsageError(f'runs.{run.name}: domains.{domain} has pairs of answers, and train.loss = '
                     f"{loss!r} is not for pairs. Set train={{'loss': 'dpo'}} in the run, or "
                     "'simpo'. To train on the chosen answers alone, put them into a domain with "
                     f'format = {domains.CHAT!r}.')


def _check_batch(name: str, seq_len: int, batch_size: int, microbatches: int):
  for field, value in (('data.seq_len', seq_len), ('train.batch_size', batch_size),
                       ('train.microbatches', microbatches)):
    if value < 1:
      raise UsageError(f'runs.{name}: {field} = {value} must be at least 1.')
  if batch_size % microbatches:
    raise UsageError(f'runs.{name}: train.batch_size = {batch_size} is not a multiple of '
                     f'train.microbatches = {microbatches}.')


def _steps(name: str, config, runs: Mapping[str, Run], sources: Sequence[Run],
           model: model_config.Config, objective: Objective, batch_size: int) -> int:
  """The steps of a run that is trained."""
  entry, seq_len = config.runs[name], config.data.seq_len
  given = [('steps', entry.steps), *_matched(entry)]
  given = [(field, value) for field, value in given if value]
  if len(given) > 1:
    fields = ' and '.join(f'{field} = {entry[field]!r}' for field, _ in given)
    raise UsageError(f'runs.{name} has {fields}; give one of them.')
  steps = entry.steps
  if entry.match_flops_of or entry.match_total_flops_of:
    per_step = batch_size * seq_len * model_config.train_flops_per_token(
        model, seq_len, objective.frozen_paths(model))
    steps = round(_flops_to_match(name, entry, runs, sources) / per_step)
  if steps < 1:
    raise UsageError(f'runs.{name}.steps = {steps} must be at least 1.')
  return steps


def _flops_to_match(name: str, entry, runs: Mapping[str, Run], sources: Sequence[Run]) -> int:
  """The FLOPs that a run takes itself, of which it gives no steps."""
  if entry.match_flops_of:
    return sum(runs[other].flops for other in entry.match_flops_of)
  total = sum(run.flops for run in lineage(runs[entry.match_total_flops_of]))
  spent = sum(run.flops for run in lineage_of(sources))
  if spent >= total:
    raise UsageError(
        f'runs.{name}.match_total_flops_of = {entry.match_total_flops_of!r}: that run takes '
        f'{total / 1e12:,.3g} TFLOP with all that it descends from, and what {name!r} starts from '
        f'takes {spent / 1e12:,.3g} already, so nothing is left to train it for. Name a longer '
        'run, or shorten those.')
  return total - spent


def _start(name: str, config, runs: Mapping[str, Run], best: int | None):
  """The sources, recipe, edit and expert names of a run; `best` is the step that 'best' means."""
  init = config.runs[name].init
  if init.kind not in INITIALISERS:
    raise UsageError(f'runs.{name}.init.kind = {init.kind!r}; '
                     f'{nearest(init.kind, INITIALISERS)}')
  for source in sources_of(init):
    if runs[source].init == ENSEMBLE:
      raise UsageError(f'runs.{name}.init: {source!r} is an ensemble, and no run can start from '
                       'several models; name one of its experts, '
                       f'{", ".join(runs[source].expert_names)}.')
  if init.kind in (CHECKPOINT, MIX, EDIT) and not init.runs:
    raise UsageError(f'runs.{name}.init: {init.kind} names no run to start from.')
  if init.kind == CHECKPOINT and len(init.runs) > 1:
    raise UsageError(f'runs.{name}.init: a checkpoint has one source, not {len(init.runs)}.')
  if init.kind == ENSEMBLE:
    sources = tuple(runs[source] for source in sources_of(init))
    compatibility.check_ensemble(name, sources, init.runs)
    return sources, None, None, tuple(dict.fromkeys(init.runs))
  if init.kind != MIX:
    sources = tuple(runs[source] for source in init.runs)
    if init.kind == EDIT:
      edit, names = edits.resolve(name, init, sources, config.mix.router_std)
      return sources, None, edit, names
    if init.kind == CHECKPOINT and init.step == BEST:
      sources = (continued.best_steps(name, sources[0], best, config.evaluation.every),)
    elif init.kind == CHECKPOINT and init.step:
      sources = (continued.first_steps(name, sources[0], init.step),)
    return sources, None, None, sources[0].expert_names if sources else ()
  names = sources_of(init)
  sources = tuple(runs[source] for source in names)
  compatibility.check(name, sources, init.allow)
  averaged = [runs[each] for each in init.averaged or init.runs]
  model = sources[0].model
  with errors.about(f'runs.{name}'):
    recipe = recipe_from_config(init, names, model.ffn_dim, model_config.shared_paths(model),
                                _tokens_apart(averaged, sources), config.mix.router_std)
    recipe = recipe.copying(compatibility.unchanged(averaged))
  compatibility.check_reference(name, sources[recipe.reference])
  return sources, recipe, None, expert_names(init.arrangement, init.runs, init.chunks)


def _tokens_apart(averaged: Sequence[Run], sources: Sequence[Run]) -> list[int]:
  """The tokens each source was trained on since the common ancestor of the averaged runs."""
  tokens = [{run.name: run.tokens for run in lineage(each)} for each in averaged]
  shared = {name: min(of_one[name] for of_one in tokens)
            for name in set.intersection(*map(set, tokens))}
  return [sum(run.tokens - shared.get(run.name, 0) for run in lineage(source))
          for source in sources]


def _pretrained(name: str, config, at_hand: bool) -> Folder | None:
  """The pretrained folder that the run starts from, if it starts from one that exists."""
  init = config.runs[name].init
  if init.kind != HUGGING_FACE or not (at_hand or places.exists(init.folder)):
    return None
  if not config.tokenizer.path:
    raise UsageError(f'runs.{name} starts from a pretrained model, which knows only the tokenizer '
                     f'that it was trained with: set tokenizer.path = {init.folder!r}.')
  with errors.about(f'runs.{name}'):
    return Folder(init.folder)


def _vocabulary(name: str, config, runs: Mapping[str, Run], pretrained: Folder | None,
                untrained: bool, vocab_size: int, tokenizer: Tokenizer | None) -> str:
  """`Run.vocabulary`. Raises UsageError if a run is trained in another vocabulary than the text."""
  init = config.runs[name].init
  if init.kind in (CHECKPOINT, EDIT) and runs[init.runs[0]].vocabulary:
    raise UsageError(f'runs.{name} starts from {init.runs[0]!r}, whose vocabulary is not that of '
                     f'tokenizer.path = {config.tokenizer.path!r}: such a model can only be mixed.')
  if not pretrained:
    return ''
  size = pretrained.model.vocab_size
  if tokenizer:
    with errors.about(f'runs.{name}'):
      own = compatibility.vocabulary_of(init.folder, unless=tokenizer)
    if own:
      clash = compatibility.contradiction(tokenizer.vocabulary(), own, size)
      if clash and not untrained:
        raise UsageError(
            f'runs.{name}: tokenizer.path = {config.tokenizer.path!r} is not the tokenizer of the '
            f'model in {init.folder}: {clash}. Set tokenizer.path to the model\'s own tokenizer.')
      return compatibility.vocabulary_hash(own) if clash else ''
  if size < vocab_size:
    raise UsageError(
        f'runs.{name}: the model in {init.folder} has {size} tokens, and tokenizer.path = '
        f"{config.tokenizer.path!r} has {vocab_size}. Set tokenizer.path to the model's own "
        'tokenizer, beside its config.json: added tokens beyond the model are then text.')
  return ''


def _model(name: str, config, runs: Mapping[str, Run], recipe: Recipe | None, edit: Edit | None,
           pretrained: Folder | None, vocab_size: int) -> model_config.Config:
  """The model of a run: the sizes of the config, or of what it starts from, with its overrides."""
  entry = config.runs[name]
  kind = entry.init.kind
  if kind == RANDOM or (kind == HUGGING_FACE and not pretrained):
    fields = dict(config.model)
    fields['vocab_size'] = fields['vocab_size'] or vocab_size
  elif pretrained:
    known = (*_SHAPES, *_PRETRAINED, *(_ROUTING if pretrained.model.num_experts else ()))
    fields = {**config.model, **{key: getattr(pretrained.model, key) for key in known}}
  else:
    fields = dataclasses.asdict(runs[entry.init.get('reader') or entry.init.runs[0]].model)
  if recipe:
    reference = runs[sources_of(entry.init)[recipe.reference]].model
    fields |= {field: getattr(reference, field) for field in OF_REFERENCE}
    fields['num_experts'] = len(recipe.pieces)
    fields['ffn_dim'] = sum(end - first for _, first, end in recipe.pieces[0])
  if edit:
    fields['num_experts'] = len(edit.parts)
    edits.check_model(name, runs[entry.init.runs[0]], {**fields, **entry.model}, len(edit.parts))
  sizes = dict(fields)
  with errors.about(f'runs.{name}'):
    model = model_config.Config(**{**fields, **entry.model})
  if kind != RANDOM:
    changed = [f'{key} = {entry.model[key]} (it starts from {sizes[key]})'
               for key in entry.model if key in _SHAPES and entry.model[key] != sizes[key]]
    if changed:
      raise UsageError(f'runs.{name}.model changes the parameters: {", ".join(changed)}.')
  before = sizes['router']
  if kind == CHECKPOINT and model.num_experts and before != model.router and (
      'hash' in (before, model.router)):
    raise UsageError(f'runs.{name}: model.router = {model.router!r}, but {entry.init.runs[0]!r} '
                     f"has {before!r}, and 'hash' has no router parameters to continue from; use "
                     'base.mix(...).')
  return model


def _weights(name: str, weights, config_domains) -> dict[str, float]:
  """Each domain's share of the rows, from weights that need not add up to 1."""
  trained = domains.trained(config_domains)
  for domain, weight in weights.items():
    if domain not in config_domains:
      raise UsageError(f'runs.{name}.domains names {domain!r}, which is not a domain; '
                       f'{nearest(domain, trained)}')
    if domain not in trained:
      raise UsageError(f'runs.{name}.domains names {domain!r}, which is only measured, as '
                       f'domains.{domain}.paths is empty. Name files to train on there, or another '
                       'domain here.')
    if not 0 <= weight < float('inf'):
      raise UsageError(f'runs.{name}.domains.{domain} = {weight}; weights are finite and not '
                       'negative.')
  total = sum(weights.values())
  if not total:
    raise UsageError(f'runs.{name}.domains = {dict(weights)}: at least one weight must be '
                     'positive.')
  return {domain: weight / total for domain, weight in sorted(weights.items()) if weight}
