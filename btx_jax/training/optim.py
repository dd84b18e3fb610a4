"""AdamW as the paper and Llama use it (clipping, warmup, cosine), which parameters it is for,
and norms by part of a model."""

from collections.abc import Sequence
import re

from flax import traverse_util
import jax
import jax.numpy as jnp
import optax

from btx_jax.devices import sharding
from btx_jax.run import Optimizer, trains

# Norm scales carry no weight decay. By path, not by rank: layers are stacked, so that the
# scales of all layers are one matrix.
_NO_DECAY = re.compile(r'scale$')

# The parts of a model whose norms are told apart; first match wins.
_PARTS = (
    ('embed', r'(^|/)embed$'), ('head', r'(^|/)head$'), ('attention', r'attn/'),
    ('router', r'router$'), ('router_bias', r'router_bias$'), ('experts', r'experts/'),
    ('ffn', r'ffn/'), ('norm', r'scale$'))


def split(params, freeze: Sequence[str] = ()) -> tuple[dict, dict]:
  """Parameters that train, and the rest: what `freeze` has regexes for, and routers' biases.

  Both are nested dicts with the paths of the whole; `join` is the reverse.
  """
  flat = traverse_util.flatten_dict(params, sep='/')
  parts = ({}, {})
  for path, x in flat.items():
    parts[not trains(path, freeze)][path] = x
  return tuple(traverse_util.unflatten_dict(part, sep='/') for part in parts)


def join(trained, fixed) -> dict:
  """The whole of what `split` gave."""
  both = (traverse_util.flatten_dict(part, sep='/') for part in (trained, fixed))
  return traverse_util.unflatten_dict({k: v for part in both for k, v in part.items()}, sep='/')


def norms_by_part(tree) -> dict[str, jax.Array]:
  """The Euclidean norm of each part of a tree of parameters, or gradients."""
  squares: dict[str, list] = {}

  def add(path, leaf):
    part = next(name for name, pattern in _PARTS if re.search(pattern, sharding.path_of(path)))
    squares.setdefault(part, []).append(jnp.square(leaf.astype(jnp.float32)).sum())

  jax.tree.map_with_path(add, tree)
  return {part: jnp.sqrt(sum(values)) for part, values in squares.items()}


def schedule(cfg: Optimizer, steps: int) -> optax.Schedule:
  """Linear warmup from 0 to the peak, then a cosine down to its `final_lr` share."""
  return optax.warmup_cosine_decay_schedule(
      init_value=0.0, peak_value=cfg.peak_lr,
      warmup_steps=min(round(cfg.warmup * steps), steps - 1), decay_steps=steps,
      end_value=cfg.final_lr * cfg.peak_lr)


def adamw(cfg: Optimizer, rate: optax.Schedule) -> optax.GradientTransformation:
  """Clips the whole gradient by its norm, then AdamW with the learning rates of `rate`."""
  decayed = lambda params: jax.tree.map_with_path(
      lambda path, _: not _NO_DECAY.search(sharding.path_of(path)), params)
  return optax.chain(
      optax.clip_by_global_norm(cfg.clip_norm),
      optax.adamw(rate, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps,
                  weight_decay=cfg.weight_decay, mask=decayed))
