"""What a training run is, and how runs come from each other: plain data.

A run = (initialiser, data mixture, model, optimizer), and nothing else.
"""

from collections.abc import Mapping
import dataclasses
import json
import zlib

from btx_jax import mixable
from btx_jax.errors import UsageError
from btx_jax.model import config as model_config
from btx_jax.objective import Objective
from btx_jax.recipe import Recipe

# Initialisers.
RANDOM, CHECKPOINT, MIX, HUGGING_FACE = 'random', 'checkpoint', 'mix', 'hugging_face'
# Fields of a model that say how it is computed, not what it computes.
COMPUTE = ('remat', 'attention', 'dispatch', 'dispatch_factor')


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW, see optim.py. Paper 4.1.2; what that leaves open (betas, epsilon, clipping) is
  as in Llama 2.

  Attributes:
    peak_lr: learning rate after the warmup.
    warmup: share of the steps during which the rate rises from 0.
    final_lr: end of the cosine, as a share of the peak.
    b1, b2, eps: of Adam.
    weight_decay: decoupled, times the learning rate.
    clip_norm: largest norm of the whole gradient.
  """
  peak_lr: float
  warmup: float = 0.05
  final_lr: float = 0.1
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0

  def __post_init__(self):
    if self.peak_lr <= 0:
      raise UsageError(f'optimizer.peak_lr = {self.peak_lr} must be positive.')
    if not 0 <= self.warmup < 1:
      raise UsageError(f'optimizer.warmup = {self.warmup} must be a share, from 0 to below 1.')
    if not 0 <= self.final_lr <= 1:
      raise UsageError(f'optimizer.final_lr = {self.final_lr} must be a share, from 0 to 1.')
    if self.clip_norm <= 0:
      raise UsageError(f'optimizer.clip_norm = {self.clip_norm} must be positive.')


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run.

  Attributes:
    name: also its directory, below the working directory.
    init: 'random'; 'checkpoint': the end of another run; 'mix': a mixture of several;
      'hugging_face': a pretrained model.
    sources: the runs that it starts from, each once.
    recipe: how they are mixed, where init is 'mix'.
    experts: what to call those of a mixture.
    weights: domain -> share of the rows, adding up to 1.
    model: sizes.
    optimizer: settings.
    steps: of the optimizer; a run of 0 steps is its start.
    length: T.
    batch_size: B, rows of a step.
    accumulation: microbatches of a step.
    objective: the losses, and what is frozen.
    seed: of the config; each run makes its own from it and its name.
    folder: of a pretrained model.
    content: identifies what is in that folder, wherever it is.
    vocabulary: identifies that of a pretrained model which gives ids to other tokens than the
      tokenizer of the config, so that it can only be mixed; else ''.
  """
  name: str
  init: str
  sources: tuple[str, ...]
  recipe: Recipe | None
  experts: tuple[str, ...]
  weights: dict[str, float]
  model: model_config.Config
  optimizer: Optimizer
  steps: int
  length: int
  batch_size: int
  accumulation: int
  objective: Objective
  seed: int
  folder: str = ''
  content: str = ''
  vocabulary: str = ''

  def spec(self) -> dict:
    """Everything of the run itself that decides its result, as plain data."""
    spec = dataclasses.asdict(self)
    del spec['experts']
    for key in COMPUTE:
      del spec['model'][key]
    del spec['folder']
    for key in ('content', 'vocabulary'):
      if not spec[key]:
        del spec[key]
    return json.loads(json.dumps(spec))  # with lists for tuples, as it is read back

  @property
  def tokens(self) -> int:
    """Positions that the run computes on."""
    return self.steps * self.batch_size * self.length

  @property
  def flops(self) -> int:
    """Model FLOPs of the whole run."""
    return self.tokens * model_config.train_flops_per_token(self.model, self.length)


def seed_of(name: str, seed: int) -> int:
  """A seed for the run or domain of this name, so that none repeats another's."""
  return zlib.crc32(f'{seed}/{name}'.encode()) % 2**31


def lineage(run: Run, runs: Mapping[str, Run]) -> list[Run]:
  """The run and all that it comes from, each once."""
  found = {run.name: run}
  for source in run.sources:
    found |= {r.name: r for r in lineage(runs[source], runs)}
  return list(found.values())


def averaged_model(run: Run, runs: Mapping[str, Run]) -> model_config.Config:
  """The sizes of the plain average of a mixture's sources."""
  like = {field: getattr(run.model, field) for field in mixable.OF_REFERENCE}
  return dataclasses.replace(runs[run.sources[0]].model, **like)
