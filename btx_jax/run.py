"""A training run as plain data, and the graph of runs by what each starts from.

A run = (initialiser, data mixture, model, optimizer), and nothing else: the seed, the experts and
the finetune of a mixture are the same kind of thing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import json
import math
import re
import zlib

from btx_jax.errors import UsageError, nearest
from btx_jax.model import config as model_config
from btx_jax.model.config import OF_REFERENCE
from btx_jax.outer import Outer
from btx_jax.recipe import Edit, Recipe, RoutersFromText
from btx_jax.selector import Linear, Selector

# Initialisers.
RANDOM, CHECKPOINT, MIX, HUGGING_FACE = 'random', 'checkpoint', 'mix', 'hugging_face'
EDIT, ENSEMBLE = 'edit', 'ensemble'
INITIALISERS = (RANDOM, CHECKPOINT, MIX, EDIT, HUGGING_FACE, ENSEMBLE)
BEST = 'best'  # the step of a run with the lowest held-out loss
BALANCE_SCOPES = ('microbatch', 'batch')
# Losses; all but the first are on pairs of answers.
NEXT_TOKEN, DPO, SIMPO = LOSSES = ('next_token', 'dpo', 'simpo')
# Fields of an objective for its loss; the name of a setting begins with the name of its loss.
OF_LOSSES = ('loss', 'dpo_beta', 'simpo_beta', 'simpo_gamma')
# Schedules of the learning rate.
COSINE, CONSTANT, WSD = SCHEDULES = ('cosine', 'constant', 'wsd')
# Fields of a model that change how it is computed, not what it computes.
COMPUTE = ('remat', 'attention', 'dispatch', 'dispatch_factor')


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW as in the paper (4.1.2). It leaves betas, epsilon and clipping open: these are Llama 2's.

  Attributes:
    peak_lr: learning rate after the warmup.
    schedule: the learning rate after the warmup: 'cosine' falls until the last step; 'constant'
      stays at the peak; 'wsd' (warmup, stable, decay) stays at the peak and falls linearly over the
      last steps. Other runs can start before the decay and continue at the same rate.
    warmup: how long the learning rate rises from 0: a share of the steps if below 1, otherwise a
      number of steps. The last step is never part of it.
    decay: the share of the steps over which 'wsd' falls.
    final_lr: learning rate at the end of the cosine or of the decay, as a share of the peak.
    b1: Adam's decay rate for the mean of the gradients.
    b2: Adam's decay rate for the mean of the squared gradients.
    eps: Adam's epsilon.
    weight_decay: decoupled weight decay, multiplied by the learning rate; norm scales have none.
    clip_norm: largest norm of the whole gradient; a longer gradient is scaled down to it.
  """
  peak_lr: float = 1e-4
  schedule: str = 'cosine'
  warmup: float = 0.05
  decay: float = 0.2
  final_lr: float = 0.1
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0

  def __post_init__(self):
    object.__setattr__(self, 'warmup', float(self.warmup))  # 100 and 100.0: one identity
    if self.peak_lr <= 0:
      raise UsageError(f'optimizer.peak_lr = {self.peak_lr} must be positive.')
    if self.schedule not in SCHEDULES:
      raise UsageError(f'optimizer.schedule = {self.schedule!r}; '
                       f'{nearest(self.schedule, SCHEDULES)}')
    if self.warmup < 0 or (self.warmup >= 1 and self.warmup % 1):
      raise UsageError(f'optimizer.warmup = {self.warmup:g} must be a share of the steps, from 0 '
                       'to below 1, or a whole number of steps.')
    if not 0 < self.decay <= 1:
      raise UsageError(f'optimizer.decay = {self.decay} must be a share of the steps, above 0 and '
                       'at most 1.')
    if not 0 <= self.final_lr < 1:
      raise UsageError(f'optimizer.final_lr = {self.final_lr} must be a share, from 0 to below 1. '
                       "For a constant rate, set optimizer.schedule = 'constant'.")
    # Squares of a clipped gradient must be finite in float32.
    if not 0 < self.clip_norm <= 1e18:
      raise UsageError(f'optimizer.clip_norm = {self.clip_norm} must be positive, and at most '
                       '1e18.')
    for field, least, largest in (('b1', 0, 1), ('b2', 0, 1), ('eps', 0, math.inf),
                                  ('weight_decay', 0, math.inf)):
      value = getattr(self, field)
      if not least <= value < largest:
        raise UsageError(f'optimizer.{field} = {value} must be at least {least} and below '
                         f'{largest}.')

  def warmup_steps(self, steps: int) -> int:
    """The number of warmup steps of a run with this many steps."""
    return min(round(self.warmup * steps if self.warmup < 1 else self.warmup), steps - 1)

  def decay_steps(self, steps: int) -> int:
    """The number of steps over which 'wsd' falls, in a run with this many steps."""
    return max(round(self.decay * steps), 1)

  def spec(self) -> dict:
    """The settings that have an effect, as plain data.

    As in versions without schedules, a cosine has no `schedule`, and a constant rate is a rate
    whose final_lr is 1.
    """
    found = dataclasses.asdict(self)
    if self.schedule != WSD:
      del found['schedule'], found['decay']
    return found | ({'final_lr': 1.0} if self.schedule == CONSTANT else {})


@dataclasses.dataclass(frozen=True)
class Objective:
  """The loss, the terms that a mixture's routers add to it, and what stays frozen.

  Attributes:
    loss: 'next_token', averaged over targets; or on domains of pairs (a chosen and a rejected
      answer to one prompt), averaged over pairs: 'dpo' (arXiv 2305.18290), whose reference is the
      model that the run starts from, or 'simpo' (arXiv 2405.14734), which has no reference.
    dpo_beta: how strongly 'dpo' holds the model to its reference; larger values move it less.
    simpo_beta: 'simpo' multiplies the difference between the answers' mean log-probabilities per
      token by this.
    simpo_gamma: the target margin of 'simpo', which is subtracted from that product.
    balance_loss: alpha, weight of a mixture's load-balancing loss (paper 3.3). The router 'hash'
      has none.
    balance_scope: the tokens that the load-balancing loss is computed over: 'microbatch', or
      'batch', which is exact across microbatches and costs one more forward pass.
    router_z: weight of the router z-loss, the mean of logsumexp(router logits)^2 summed over
      layers, which keeps these logits small; 0 is off.
    balance_bias: balances the load without a loss: after every training step each expert's bias,
      which only the choice of experts uses, moves by this much towards an even load (arXiv
      2408.15664 uses 0.001); 0 is off.
    freeze: regular expressions; a parameter in whose path one of them is found does not change.
      Such lists: base.FREEZE_EXPERTS, base.FREEZE_ALL_BUT_EXPERTS, base.FREEZE_ALL_BUT_ROUTER.
  """
  loss: str = 'next_token'
  dpo_beta: float = 0.1
  simpo_beta: float = 2.0
  simpo_gamma: float = 1.0
  balance_loss: float = 0.01
  balance_scope: str = 'microbatch'
  router_z: float = 0.0
  balance_bias: float = 0.0
  freeze: tuple[str, ...] = ()

  def __post_init__(self):
    object.__setattr__(self, 'freeze', tuple(self.freeze))
    if self.loss not in LOSSES:
      raise UsageError(f'train.loss = {self.loss!r}; {nearest(self.loss, LOSSES)}')
    for field in ('dpo_beta', 'simpo_beta'):
      if not 0 < getattr(self, field) < math.inf:
        raise UsageError(f'train.{field} = {getattr(self, field)} must be positive.')
    for field in ('simpo_gamma', 'balance_loss', 'router_z', 'balance_bias'):
      if getattr(self, field) < 0:
        raise UsageError(f'train.{field} = {getattr(self, field)} cannot be negative.')
    if self.balance_scope not in BALANCE_SCOPES:
      raise UsageError(f'train.balance_scope = {self.balance_scope!r}; '
                       f'{nearest(self.balance_scope, BALANCE_SCOPES)}')
    for pattern in self.freeze:
      try:
        re.compile(pattern)
      except re.error as error:
        raise UsageError(f'train.freeze: {pattern!r} is not a regular expression: {error}.'
                         ) from error

  def check(self, model: model_config.Config):
    """Raises UsageError if a setting has no effect on the model."""
    if model.num_experts:
      if self.balance_bias and model.router not in model_config.SCORING:
        raise UsageError(f'train.balance_bias = {self.balance_bias}: the router {model.router!r} '
                         'does not choose experts by score, so a bias would change '
                         f'nothing; set it to 0, or use {" or ".join(model_config.SCORING)}.')
      if self.router_z and not model.has_router:
        raise UsageError(f'train.router_z = {self.router_z}: the router {model.router!r} has no '
                         'logits to keep small; set it to 0.')
    paths = model_config.param_paths(model)
    for pattern in self.freeze:
      if not any(frozen(path, [pattern]) for path in paths):
        raise UsageError(f'train.freeze: {pattern!r} matches no parameter; '
                         f'{nearest(pattern, paths)}')
    if not any(trains(path, self.freeze) for path in paths):
      raise UsageError(f'train.freeze = {self.freeze} leaves nothing to train of '
                       f'{", ".join(paths)}.')

  @property
  def on_pairs(self) -> bool:
    """Whether the loss is on pairs of answers."""
    return self.loss != NEXT_TOKEN

  @property
  def has_reference(self) -> bool:
    """Whether the loss compares the model with the one that the run starts from."""
    return self.loss == DPO

  def spec(self) -> dict:
    """The settings as plain data, without the settings of other losses.

    The next-token loss has no `loss` here, so that runs from before losses on pairs stay valid.
    """
    found = dataclasses.asdict(self)
    for field in OF_LOSSES:
      if not self.on_pairs or not field.startswith(('loss', self.loss)):
        del found[field]
    return found

  def frozen_paths(self, model: model_config.Config) -> tuple[str, ...]:
    """The paths of a model's parameters that have no gradient."""
    return tuple(path for path in model_config.param_paths(model)
                 if not trains(path, self.freeze))


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run.

  Attributes:
    name: also the name of its directory in the working directory: the config's name for it, after
      its series and a slash if it has one.
    init: 'random'; 'checkpoint', the end of another run; 'mix', a mixture of several; 'edit', a
      mixture with other experts; 'hugging_face', a pretrained model; or 'ensemble', several models
      beside each other.
    sources: the runs that it starts from, each once; of an edit, the mixture first.
    recipe: how they are mixed, if init is 'mix'.
    expert_names: what to call the experts of a mixture or an ensemble.
    weights: each domain's share of the rows; they add up to 1.
    model: the model's sizes; of an ensemble, those of the reader of a linear selector, and
      otherwise of the first expert.
    optimizer: its settings.
    steps: optimizer steps; a run of 0 steps is what it starts from.
    seq_len: T.
    batch_size: B, rows per step.
    microbatches: microbatches per step.
    objective: the losses, and what is frozen.
    seed: the config's, or one of its seeds; `rng_seed` is made from it.
    folder: the folder of a pretrained model.
    content: a hash of what is in that folder, wherever it is.
    vocabulary: a hash of a pretrained model's vocabulary if it contradicts the tokenizer of the
      config, so that the model can only be mixed; else ''.
    routers: how a mixture's routers are set from text; None if they are random.
    selector: how an ensemble predicts a token from its experts; None for any other run.
    series: the directory of all runs with this seed, if the config has several seeds and the run
      depends on them; else ''.
    edit: which experts it has, if init is 'edit'. Its recipe is None, as the mixture of an edit is
      not averaged with the other sources.
    state: whether the run takes the optimizer state of its first source, and reads on in the data
      where that source stopped.
    of_steps: if this Run stands for the first `steps` of a longer run, the steps of the longer run;
      otherwise 0. A run that starts from a step of another run has such a source.
    until_best: whether this Run stands for a longer run up to its best step, which is not known
      yet. Until it is, `steps` are all steps of the longer run.
    renamed_from: the name that the run was started under, if `rename` has changed it; else ''.
    outer: the settings of DiLoCo if the run has several workers; else None.
    redraw: the share of hidden units that are re-initialised when the run starts from a checkpoint.
    skip_nonfinite: the most steps in a row that are skipped because their numbers are not finite.
      It is not part of the spec, so a run that has failed can continue with it.
  """
  name: str
  init: str
  sources: tuple['Run', ...]
  recipe: Recipe | None
  expert_names: tuple[str, ...]
  weights: dict[str, float]
  model: model_config.Config
  optimizer: Optimizer
  steps: int
  seq_len: int
  batch_size: int
  microbatches: int
  objective: Objective
  seed: int
  folder: str = ''
  content: str = ''
  vocabulary: str = ''
  routers: RoutersFromText | None = None
  selector: Selector | None = None
  series: str = ''
  edit: Edit | None = None
  state: bool = False
  of_steps: int = 0
  until_best: bool = False
  renamed_from: str = ''
  outer: Outer | None = None
  redraw: float = 0.0
  skip_nonfinite: int = 0

  def first(self, steps: int) -> 'Run':
    """The first `steps` of this run, as a run; the run itself if these are all of its steps."""
    if steps == self.steps:
      return self
    return dataclasses.replace(self, steps=steps, of_steps=self.of_steps or self.steps)

  def on(self, made: Mapping[str, 'Run']) -> 'Run':
    """This run with its sources replaced by the runs of the same names in `made`."""
    return dataclasses.replace(self, sources=tuple(
        dataclasses.replace(made[source.name].first(source.steps), until_best=source.until_best)
        for source in self.sources))

  def spec(self) -> dict:
    """Everything in the run itself that decides its result, as plain data.

    The series does not: a run has the same spec whether its seed is the only one or one of several.
    The name is the one that the run was started under.
    """
    return json.loads(self._spec_json)

  @functools.cached_property
  def _spec_json(self) -> str:
    """`spec` as JSON, in which tuples are lists; `status` of a study needs it hundreds of times."""
    spec = dataclasses.asdict(dataclasses.replace(self, sources=()))
    spec['name'] = self.first_name
    spec['sources'] = [source.first_name for source in self.sources]
    spec['optimizer'] = self.optimizer.spec()
    spec['objective'] = self.objective.spec()
    for key in ('expert_names', 'series', 'until_best', 'renamed_from', 'skip_nonfinite'):
      del spec[key]
    for key in COMPUTE:
      del spec['model'][key]
    del spec['folder']
    spec['step'] = self.from_step
    for key in ('content', 'vocabulary', 'routers', 'edit', 'selector', 'state', 'of_steps',
                'step', 'outer', 'redraw'):
      if not spec[key]:
        del spec[key]
    return json.dumps(spec)

  @property
  def domains(self) -> tuple[str, ...]:
    """The domains whose text decides the result: of the training, and of what is fitted to it."""
    return tuple(dict.fromkeys([*self.weights, *(self.fitted.domains if self.fitted else ())]))

  @property
  def fitted(self) -> RoutersFromText | Linear | None:
    """How routers or a linear selector are set from text before training; None if neither is."""
    return self.selector if isinstance(self.selector, Linear) else self.routers

  @property
  def reader(self) -> 'Run':
    """The run whose hidden states a linear selector reads; ValueError without one."""
    return self.sources[linear_of(self).reader]

  @property
  def experts(self) -> tuple['Run', ...]:
    """The models that an ensemble predicts with; ValueError for any other run."""
    if self.selector is None:
      raise ValueError(f'{self.name} starts from {self.init}, and is one model.')
    return self.sources[:len(self.expert_names)]

  @property
  def plain_name(self) -> str:
    """The config's name for the run, the same in every series."""
    return self.name.removeprefix(f'{self.series}/') if self.series else self.name

  @property
  def first_name(self) -> str:
    """The name that the run had in the config when it was started."""
    return self.renamed_from or self.plain_name

  @property
  def label(self) -> str:
    """The name, and the step if it is not the end: runs with different parameters differ in it."""
    if self.until_best:
      return f'{self.name}, its best step'
    return f'{self.name}, step {self.steps:,}' if self.of_steps else self.name

  @property
  def from_step(self) -> int:
    """The step of its source that the run starts from; 0 if that is the source's end."""
    return self.sources[0].steps if self.sources and self.sources[0].of_steps else 0

  @property
  def rng_seed(self) -> int:
    """The seed of everything random at its start: different for each run and each seed."""
    return seed_of(self.first_name, self.seed)

  @property
  def training_seed(self) -> int:
    """The seed of the order of its data and of its routers' noise."""
    return self.sources[0].training_seed if self.state else self.rng_seed

  @property
  def schedule_start(self) -> int:
    """The step of the schedule at which this run starts: after the steps of the source whose state
    it takes, if the rate is constant before and after; else 0, for a schedule of its own."""
    if not self.state or self.optimizer.schedule == COSINE or not self.sources[0].is_stable:
      return 0
    return self.sources[0].schedule_start + self.sources[0].steps

  @property
  def warmup_steps(self) -> int:
    """The warmup steps of its schedule, which may lie in the run that it continues."""
    if self.schedule_start:
      return self.sources[0].warmup_steps
    return self.optimizer.warmup_steps(self.of_steps or self.steps)

  @property
  def is_stable(self) -> bool:
    """Whether its learning rate has not begun to fall at its end."""
    whole = self.of_steps or self.steps
    match self.optimizer.schedule:
      case 'constant':
        return True
      case 'wsd':
        return self.steps <= max(whole - self.optimizer.decay_steps(whole),
                                 self.warmup_steps - self.schedule_start)
    return False

  @property
  def workers(self) -> int:
    """The number of copies of the model that are trained apart; 1 is ordinary training."""
    return self.outer.workers if self.outer else 1

  @property
  def tokens(self) -> int:
    """Positions that the run is trained on."""
    return self.steps * self.batch_size * self.seq_len

  @property
  def trained_params(self) -> int:
    """The number of parameters that the optimizer changes."""
    return sum(size for path, size in model_config.param_sizes(self.model).items()
               if trains(path, self.objective.freeze))

  @property
  def gradient_bytes(self) -> int:
    """Bytes of a gradient of these parameters, which is in float32."""
    return 4 * self.trained_params

  @property
  def flops_per_token(self) -> int:
    """Model FLOPs of training, without the gradients that frozen parameters save."""
    return model_config.train_flops_per_token(
        self.model, self.seq_len, self.objective.frozen_paths(self.model))

  @property
  def flops(self) -> int:
    """Model FLOPs that the whole run takes."""
    return self.tokens * self.flops_per_token

  @property
  def flops_unfrozen(self) -> int:
    """Model FLOPs that the whole run would take if nothing were frozen."""
    return self.tokens * model_config.train_flops_per_token(self.model, self.seq_len)

  def seconds_left(self, step: int, tokens_per_second: float | None) -> float | None:
    """The time that its steps after `step` take at this rate; None if the rate is unknown."""
    if not tokens_per_second:
      return None
    return max(self.steps - step, 0) * self.batch_size * self.seq_len / tokens_per_second


def seed_of(name: str, seed: int) -> int:
  """A seed for the run or domain of this name, different for each."""
  return zlib.crc32(f'{seed}/{name}'.encode()) % 2**31


def lineage(run: Run, until: Callable[[Run], bool] = lambda _: False) -> list[Run]:
  """The run and all that it comes from, each once, nearest first; not past runs `until` accepts.

  If several runs start from different steps of one run, it is there once, with the most steps.
  """
  return [run, *lineage_of([] if until(run) else run.sources, until)]


def lineage_of(runs: Iterable[Run], until: Callable[[Run], bool] = lambda _: False) -> list[Run]:
  """These runs and all that they come from, each once; see lineage."""
  found: dict[str, Run] = {}
  for run in runs:
    for each in lineage(run, until):
      known = found.get(each.name, each)
      found[each.name] = max(known, each, key=_length)
  return list(found.values())


def _length(run: Run) -> int:
  return run.steps


def dense_ancestors(run: Run) -> dict[str, Run]:
  """A dense run and its ancestors, nearest first, by label; pretrained folders by their content.

  A run that trains a pretrained model is there twice: under its label, and with 0 steps under the
  content of the folder.
  """
  found = {}
  for each in lineage(run):
    if each.steps or not each.folder:
      found[each.label] = each
    if each.folder:
      found[each.content] = dataclasses.replace(each, steps=0)
  return found


def common_ancestors(runs: Sequence[Run]) -> dict[str, Run]:
  """What all of these dense runs descend from or are, nearest first; keys as dense_ancestors."""
  first, *others = (dense_ancestors(run) for run in runs)
  return {key: found for key, found in first.items() if all(key in other for other in others)}


def descent(run: Run) -> list[Run]:
  """The run, and those whose settings it keeps, nearest first.

  Of a mixture, that is the reference; of an edit, the mixture.
  """
  found = [run]
  while found[-1].sources:
    last = found[-1]
    found.append(last.sources[last.recipe.reference if last.recipe else 0])
  return found


def parts_of(run: Run) -> Edit:
  """Which experts an edit has; raises ValueError for any other run."""
  if run.edit is None:
    raise ValueError(f'{run.name} starts from {run.init}, and edits no mixture.')
  return run.edit


def recipe_of(run: Run) -> Recipe:
  """The recipe of a run that starts from a mixture; raises ValueError for any other run."""
  if run.recipe is None:
    raise ValueError(f'{run.name} starts from {run.init}, which has no recipe.')
  return run.recipe


def linear_of(run: Run) -> Linear:
  """The linear selector of an ensemble; raises ValueError for any other run."""
  if not isinstance(run.selector, Linear):
    raise ValueError(f'{run.name} has no linear selector, but {run.selector}.')
  return run.selector


def reader_model(run: Run) -> model_config.Config:
  """The sizes of that part of its reader which a linear selector computes."""
  layers = linear_of(run).layers or run.model.num_layers
  return dataclasses.replace(run.model, num_layers=layers)


def dense_model(model: model_config.Config) -> model_config.Config:
  """The sizes of one expert of a mixture beside the weights that all experts share."""
  return dataclasses.replace(model, num_experts=0, router_bias=False)


def averaged_model(run: Run) -> model_config.Config:
  """The sizes of the plain average of a mixture's sources."""
  like = {field: getattr(run.model, field) for field in OF_REFERENCE}
  return dataclasses.replace(run.sources[0].model, **like)


def frozen(path: str, freeze: Sequence[str]) -> bool:
  """Whether one of the regexes is found in the path of a parameter."""
  return any(re.search(pattern, path) for pattern in freeze)


def trains(path: str, freeze: Sequence[str]) -> bool:
  """Whether the optimizer changes the parameter at this path: it has moments, and decays.

  The routers' bias is never the optimizer's; see balance.balanced_bias.
  """
  return not path.endswith('router_bias') and not frozen(path, freeze)
