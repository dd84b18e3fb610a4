"""The compiled passes of a linear selector: the mean hidden states it reads, and its logits."""

from collections.abc import Iterable
import functools

import jax
import jax.numpy as jnp
import numpy as np

from btx_jax.data.mixture import Batch
from btx_jax.devices import sharding
from btx_jax.fitting import passes
from btx_jax.model import llama
from btx_jax.model.config import Config
from btx_jax.study.routers import Sums

_EXACT = jax.lax.Precision.HIGHEST


def hidden_states(cfg: Config, params, batch) -> jax.Array:
  """The hidden states after the first layers of a model and its final norm, [B, T, D] in float32.

  Args:
    cfg: the model, with as many layers as are to be computed.
    params: of the model with all its layers.
    batch: arrays [B, T].
  """
  first = jax.tree.map(lambda x: x[:cfg.num_layers], params['layers'])
  h_BTD, _ = llama.Llama(cfg).apply({'params': {**params, 'layers': first}}, batch['tokens'],
                                    batch['segment_ids'], batch['positions'])
  return h_BTD.astype(jnp.float32)


def means_so_far(x_BTD, segment_ids_BT, decay) -> jax.Array:
  """The mean over each position and those before it in its document, [B, T, D].

  A position counts `decay` times less with each one that follows it.
  """
  begins_BT = jnp.diff(segment_ids_BT, axis=1, prepend=-1) != 0
  kept_BT1 = jnp.where(begins_BT, 0.0, decay)[..., None]
  weighed_BTD = jnp.concatenate([x_BTD, jnp.ones_like(kept_BT1)], -1)  # the last one counts

  def join(before, after):
    return before[0] * after[0], before[1] * after[0] + after[1]

  _, sums_BTD = jax.lax.associative_scan(join, (kept_BT1, weighed_BTD), axis=1)
  return sums_BTD[..., :-1] / sums_BTD[..., -1:]


def sums(cfg: Config, params, decay: float, batches: Iterable[Batch], mesh) -> Sums:
  """Sums over what a selector reads at every position but padding; L is 1.

  Args:
    cfg, params: see hidden_states.
    decay: see means_so_far.
    batches: arrays [B, T], the whole batch on every process.
    mesh: the devices to use.
  """
  return passes.as_sums(passes.added_up(
      sums_program(cfg, mesh), (params, np.float32(decay)), batches, mesh))


def logits(cfg: Config, params, columns_DE, batches: Iterable[Batch], mesh) -> np.ndarray:
  """The logits of each position's own hidden state, [rows, T, E].

  Those of a mean of hidden states are the mean of these.
  """
  program = logits_program(cfg, mesh)
  return np.concatenate([
      np.asarray(program(params, columns_DE, sharding.from_whole(batch, mesh)))
      for batch in batches])


@functools.cache
def sums_program(cfg: Config, mesh):
  """Compiles (params, decay, batch [B, T]) -> what `passes.as_sums` takes, for one batch."""
  def add_up(params, decay, batch):
    counted_BT = batch['segment_ids'] > 0
    means_BTD = means_so_far(hidden_states(cfg, params, batch), batch['segment_ids'], decay)
    x_BTD = jnp.where(counted_BT[..., None], means_BTD, 0)
    outer_DD = jnp.einsum('btd,bte->de', x_BTD, x_BTD, precision=_EXACT)
    return {'outer': outer_DD[None], 'total': x_BTD.sum((0, 1))[None], 'tokens': counted_BT.sum()}
  return sharding.jit_replicated(add_up, mesh)


@functools.cache
def logits_program(cfg: Config, mesh):
  """Compiles (params, columns [D, E], batch [B, T]) -> logits [B, T, E]."""
  def logits_of(params, columns_DE, batch):
    return jnp.dot(hidden_states(cfg, params, batch), columns_DE, precision=_EXACT)
  return sharding.jit_replicated(logits_of, mesh)
