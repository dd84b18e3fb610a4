"""AdamW as the paper and Llama use it (clipping, warmup, decay), the parameters it updates,
and norms by part of a model."""

from collections.abc import Sequence
import re

from flax import traverse_util
import jax
import jax.numpy as jnp
import optax

from btx_jax.devices import sharding
from btx_jax.run import CONSTANT, COSINE, Optimizer, Run, trains
from btx_jax.training import checksums

# Norm scales and biases do not decay. Selected by path, not by rank: layers are stacked, so the
# scales of all layers are one matrix.
_NO_DECAY = re.compile(r'(scale|_bias)$')

# The parts of a model whose norms are reported; first match wins.
_PARTS = (
    ('embed', r'(^|/)embed$'), ('head', r'(^|/)head$'), ('attention', r'attn/'),
    ('router', r'router$'), ('router_bias', r'router_bias$'), ('experts', r'experts/'),
    ('ffn', r'ffn/'), ('norm', r'scale$'))


def split(params, freeze: Sequence[str] = ()) -> tuple[dict, dict]:
  """The parameters that train, and the rest: those that `freeze` matches, and router biases.

  Both are nested dicts in which each parameter keeps its path; `join` is the inverse.
  """
  trained, fixed = {}, {}
  for path, x in traverse_util.flatten_dict(params, sep='/').items():
    (trained if trains(path, freeze) else fixed)[path] = x
  return (traverse_util.unflatten_dict(trained, sep='/'),
          traverse_util.unflatten_dict(fixed, sep='/'))


def join(trained, fixed) -> dict:
  """All parameters, from the two parts that `split` returns."""
  flat = traverse_util.flatten_dict(trained, sep='/') | traverse_util.flatten_dict(fixed, sep='/')
  return traverse_util.unflatten_dict(flat, sep='/')


def squares(tree) -> dict:
  """The sum of squares per layer and expert: a tree of float32 [layers, experts], or fewer axes.

  A sum is finite if all its numbers are, and their squares fit float32: none is above some 1e19.
  """
  def of(path, x):
    first = checksums.leading_axes(sharding.path_of(path))
    return jnp.square(x.astype(jnp.float32)).sum(range(first, x.ndim))

  return jax.tree.map_with_path(of, tree)


def are_finite(*trees) -> jax.Array:
  """Whether all numbers in these trees are finite: a bool scalar."""
  return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(trees)]).all()


def norms_by_part(squares) -> dict[str, jax.Array]:
  """The Euclidean norm of each part of a tree of parameters or gradients, from its `squares`."""
  found: dict[str, list] = {}
  for path, leaf in jax.tree.leaves_with_path(squares):
    part = next(name for name, pattern in _PARTS if re.search(pattern, sharding.path_of(path)))
    found.setdefault(part, []).append(leaf.sum())
  return {part: jnp.sqrt(sum(values)) for part, values in found.items()}


def unless(is_sound: jax.Array, opt_state: optax.OptState, before: optax.OptState
           ) -> optax.OptState:
  """The optimizer state, or `before` if `is_sound` is False.

  The count that determines the learning rate advances anyway: the rate follows the step.
  """
  counts = schedule_counts(before)
  return jax.tree.map_with_path(
      lambda path, new, old: (
          new if sharding.path_of(path) in counts else jnp.where(is_sound, new, old)),
      opt_state, before)


def schedule_of(run: Run) -> optax.Schedule:
  """The learning rates of a run, by the number of updates before, those of Run.schedule_start
  included."""
  return schedule(run.optimizer, run.steps, run.schedule_start, run.warmup_steps)


def schedule(cfg: Optimizer, steps: int, start: int = 0, warmup: int | None = None
             ) -> optax.Schedule:
  """Linear warmup from 0 to `peak_lr`, then by cfg.schedule: a cosine down to `final_lr` times
  that; the peak; or the peak until a linear decay to the same end.

  Args:
    cfg: the settings.
    steps: of the run.
    start: number of updates before its first step.
    warmup: steps of the warmup, counted from 0; None is that of a run of so many steps.
  """
  warmup = cfg.warmup_steps(steps) if warmup is None else warmup
  end, end_value = start + steps, cfg.final_lr * cfg.peak_lr
  if cfg.schedule == COSINE:
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0, peak_value=cfg.peak_lr, warmup_steps=warmup, decay_steps=end,
        end_value=end_value)
  stable = optax.join_schedules(
      [optax.linear_schedule(0.0, cfg.peak_lr, warmup), optax.constant_schedule(cfg.peak_lr)],
      [warmup])
  if cfg.schedule == CONSTANT:
    return stable
  begin = max(end - cfg.decay_steps(steps), warmup)
  return optax.join_schedules(
      [stable, optax.linear_schedule(cfg.peak_lr, end_value, end - begin)], [begin])


def schedule_counts(opt_state) -> set[str]:
  """The paths, in the state of `adamw`, of the counts that the learning rate is a function of."""
  return {f'{sharding.path_of(path)}/count' for path, node in jax.tree.leaves_with_path(
      opt_state, is_leaf=_is_of_schedule) if _is_of_schedule(node)}


def updates(opt_state: optax.OptState) -> jax.Array:
  """The count, in the state of `adamw`, that the learning rate is a function of."""
  found, = filter(_is_of_schedule, jax.tree.leaves(opt_state, is_leaf=_is_of_schedule))
  return found.count


def _is_of_schedule(node) -> bool:
  return isinstance(node, optax.ScaleByScheduleState)


def adamw(cfg: Optimizer, rate: optax.Schedule) -> optax.GradientTransformation:
  """Clips the gradient by its global norm, then AdamW at the learning rates of `rate`."""
  def decayed(params):
    return jax.tree.map_with_path(
        lambda path, _: not _NO_DECAY.search(sharding.path_of(path)), params)

  return optax.chain(
      optax.clip_by_global_norm(cfg.clip_norm),
      optax.adamw(rate, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps,
                  weight_decay=cfg.weight_decay, mask=decayed))
