"""The compiled passes over text: sums over router inputs, and how well routers choose."""

from collections.abc import Callable, Iterable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from btx_jax.data.mixture import Batch
from btx_jax.devices import sharding
from btx_jax.model import llama
from btx_jax.model.config import Config
from btx_jax.study.routers import Sums
from btx_jax.training.step import forward


def router_inputs(cfg: Config, params, batch) -> jax.Array:
  """What a router in each layer of a dense model would read, [L, B, T, D] in float32."""
  outputs: Any = llama.Llama(cfg).apply(
      {'params': params}, batch['tokens'], batch['segment_ids'], batch['positions'],
      mutable=[llama.FFN_INPUTS])
  h_LBTD, = outputs[1][llama.FFN_INPUTS]['layers']['h']
  return h_LBTD.astype(jnp.float32)


def sums(cfg: Config, params, batches: Iterable[Batch], mesh) -> Sums:
  """Sums over the router inputs of a dense model, of all tokens but padding.

  A batch is added up in float32 on the devices, and the batches in float64 and in order.

  Args:
    cfg: the dense model.
    params: its parameters.
    batches: arrays [B, T], the whole batch on every process.
    mesh: the devices to use.
  """
  return as_sums(added_up(sums_program(cfg, mesh), (params,), batches, mesh))


def right(cfg: Config, params, columns_LDE, own_E, batches: Iterable[Batch], mesh
          ) -> dict[str, np.ndarray]:
  """How often routers would choose an expert of the text's domain in a dense model.

  Args:
    cfg: the dense model.
    params: its parameters.
    columns_LDE: the routers.
    own_E: for each expert, whether it is one of the domain.
    batches, mesh: as in `sums`.

  Returns:
    `right` [L], tokens whose largest logit is that of such an expert; and `tokens`.
  """
  return added_up(_right(cfg, mesh), (params, columns_LDE, own_E), batches, mesh)


def routed(cfg: Config, params, columns_LDE, own_GE, batches: Iterable[Batch], mesh
           ) -> dict[str, np.ndarray]:
  """Scores a mixture with these routers.

  Args:
    cfg: the mixture.
    params: its parameters; their routers are not used.
    columns_LDE: the routers.
    own_GE: for each domain, which experts are its own; a row's `domain` is an index into it.
    batches, mesh: as in `sums`.

  Returns:
    Sums over tokens: `nll` in nats, of `targets`; by layer `right` [L], tokens whose largest gate
    is that of an expert of their domain, `entropy` [L] of the softmax over all logits in nats,
    `picks` [L, E]; and `tokens`.
  """
  return added_up(routed_program(cfg, mesh), (params, columns_LDE, own_GE), batches, mesh)


def expert_of(params, number: int):
  """One expert of a mixture beside the weights that all share: a dense model."""
  layers = params['layers']
  ffn = jax.tree.map(lambda x: x[:, number], layers['ffn']['experts'])
  return {**params, 'layers': {**layers, 'ffn': ffn}}


def with_routers(params, columns_LDE):
  """A mixture's parameters with other routers."""
  layers = params['layers']
  return {**params, 'layers': {**layers, 'ffn': {**layers['ffn'], 'router': columns_LDE}}}


@functools.cache
def sums_program(cfg: Config, mesh):
  """Compiles (params of a dense model, batch [B, T]) -> what `as_sums` takes, for one batch."""
  def add_up(params, batch):
    counted_BT = batch['segment_ids'] > 0
    x_LBTD = jnp.where(counted_BT[None, ..., None], router_inputs(cfg, params, batch), 0)
    outer_LDD = jnp.einsum('lbtd,lbte->lde', x_LBTD, x_LBTD, precision=jax.lax.Precision.HIGHEST)
    return {'outer': outer_LDD, 'total': x_LBTD.sum((1, 2)), 'tokens': counted_BT.sum()}
  return sharding.jit_replicated(add_up, mesh)


@functools.cache
def _right(cfg: Config, mesh):
  def count(params, columns_LDE, own_E, batch):
    counted_BT = batch['segment_ids'] > 0
    logits_LBTE = jnp.einsum('lbtd,lde->lbte', router_inputs(cfg, params, batch), columns_LDE,
                             precision=jax.lax.Precision.HIGHEST)
    right_LBT = own_E[logits_LBTE.argmax(-1)] & counted_BT[None]
    return {'right': right_LBT.sum((1, 2)), 'tokens': counted_BT.sum()}
  return sharding.jit_replicated(count, mesh)


@functools.cache
def routed_program(cfg: Config, mesh):
  """Compiles (params of a mixture, routers, own_GE, batch [B, T]) -> what `routed` adds up."""
  def score(params, columns_LDE, own_GE, batch):
    found: Any = forward(cfg, with_routers(params, columns_LDE), batch)
    counted_BT = batch['segment_ids'] > 0
    gates, ids = found.routed.gates, found.routed.ids
    best_LBT = jnp.take_along_axis(ids, gates.argmax(-1, keepdims=True), -1)[..., 0]
    right_LBT = own_GE[batch['domain'][None, :, None], best_LBT] & counted_BT[None]
    of_rows = found.routed.sums
    return {'nll': found.nll, 'targets': found.tokens, 'right': right_LBT.sum((1, 2)),
            'entropy': of_rows.entropy.sum(1), 'picks': of_rows.picks.sum(1),
            'tokens': counted_BT.sum()}
  return sharding.jit_replicated(score, mesh)


def as_sums(found: dict[str, np.ndarray]) -> Sums:
  """Sums from `outer` [L, D, D], `total` [L, D] and `tokens`, as `added_up` returns them."""
  return Sums(found['outer'], found['total'], int(found['tokens']))


def added_up(compiled: Callable, inputs: tuple, batches: Iterable[Batch], mesh
             ) -> dict[str, np.ndarray]:
  """The sum of what a compiled pass returns for each batch, in float64."""
  result: dict[str, np.ndarray] = {}
  for batch in batches:
    found = jax.device_get(compiled(*inputs, sharding.from_whole(batch, mesh)))
    result = {name: result.get(name, 0) + np.asarray(value, np.float64)
              for name, value in found.items()}
  return result
