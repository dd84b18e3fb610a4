"""AdamW as the paper and Llama use it: clipping, warmup and cosine, no decay of norm scales."""

import re

import jax
import optax

from btx_jax import sharding
from btx_jax.plan import Optimizer

# Norm scales carry no weight decay. By path, not by rank: layers are stacked, so that the
# scales of all layers are one matrix.
_NO_DECAY = re.compile(r'scale$')


def schedule(cfg: Optimizer, steps: int) -> optax.Schedule:
  """Linear warmup from 0 to the peak, then a cosine down to its `final_lr` share."""
  return optax.warmup_cosine_decay_schedule(
      init_value=0.0, peak_value=cfg.peak_lr,
      warmup_steps=min(round(cfg.warmup * steps), steps - 1), decay_steps=steps,
      end_value=cfg.final_lr * cfg.peak_lr)


def adamw(cfg: Optimizer, steps: int) -> optax.GradientTransformation:
  """Clips the whole gradient by its norm, then AdamW."""
  decayed = lambda params: jax.tree.map_with_path(
      lambda path, _: not _NO_DECAY.search(sharding.path_of(path)), params)
  return optax.chain(
      optax.clip_by_global_norm(cfg.clip_norm),
      optax.adamw(schedule(cfg, steps), b1=cfg.b1, b2=cfg.b2, eps=cfg.eps,
                  weight_decay=cfg.weight_decay, mask=decayed))
