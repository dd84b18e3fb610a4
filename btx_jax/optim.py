"""AdamW as the paper and Llama use it: clipping, warmup and cosine, no decay of norm scales."""

import dataclasses
import re

import jax
import optax

from btx_jax import sharding
from btx_jax.errors import UsageError

# Norm scales carry no weight decay. By path, not by rank: layers are stacked, so that the
# scales of all layers are one matrix.
_NO_DECAY = re.compile(r'scale$')


@dataclasses.dataclass(frozen=True)
class Config:
  """Paper 4.1.2; betas, epsilon and clipping, which it leaves open, are those of Llama 2.

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
      raise UsageError(f'optimizer.warmup = {self.warmup} is a share, from 0 to below 1.')
    if not 0 <= self.final_lr <= 1:
      raise UsageError(f'optimizer.final_lr = {self.final_lr} is a share, from 0 to 1.')
    if self.clip_norm <= 0:
      raise UsageError(f'optimizer.clip_norm = {self.clip_norm} must be positive.')


def schedule(cfg: Config, steps: int) -> optax.Schedule:
  """Linear warmup from 0 to the peak, then a cosine down to its `final_lr` share."""
  return optax.warmup_cosine_decay_schedule(
      init_value=0.0, peak_value=cfg.peak_lr,
      warmup_steps=min(round(cfg.warmup * steps), steps - 1), decay_steps=steps,
      end_value=cfg.final_lr * cfg.peak_lr)


def adamw(cfg: Config, steps: int) -> optax.GradientTransformation:
  """Clips the whole gradient by its norm, then AdamW."""
  decayed = lambda params: jax.tree.map_with_path(
      lambda path, _: not _NO_DECAY.search(sharding.path_of(path)), params)
  return optax.chain(
      optax.clip_by_global_norm(cfg.clip_norm),
      optax.adamw(schedule(cfg, steps), b1=cfg.b1, b2=cfg.b2, eps=cfg.eps,
                  weight_decay=cfg.weight_decay, mask=decayed))
