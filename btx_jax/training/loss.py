"""Next-token cross-entropy straight from hidden states.

Key idea: logits [B, T, V] are the largest array of a language model, so they are computed,
used and discarded a few hundred tokens at a time. The gradient is computed along with the
value, while a chunk's logits are still in cache; the backward pass only scales it.

If the vocabulary is sharded over the `tensor` axis, each device has the logits of its own
shard: only the softmax's maximum and sum, the target's logit and the gradient of the hidden
states are combined.

`next_token_loss` is the sum over targets. Other losses, such as those on pairs, are computed from
`token_losses`.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from btx_jax.devices import sharding
from btx_jax.devices.mesh import BATCH_AXES
from btx_jax.model.overhead import TOKENS_PER_CHUNK
from btx_jax.model.products import outer, product, product_transposed


def next_token_loss(hidden_BTD, head_DV, targets_BT, mask_BT,
                    batch_axes=BATCH_AXES) -> tuple[jax.Array, jax.Array]:
  """Negative log likelihood in nats over the positions that `mask_BT` marks.

  Args:
    hidden_BTD: final hidden states, rows sharded over `batch_axes`.
    head_DV: the output head, in the dtype of the hidden states; V is sharded over `tensor` if
      that divides it.
    targets_BT: the token that follows each position.
    mask_BT: True where the target counts.
    batch_axes: the mesh axes over which rows are sharded.

  Returns:
    its sum, a float32 scalar, differentiable with respect to the hidden states and the head,
    and that of each position [B, T], for reports, through which no gradient flows.
  """
  def local(hidden, head, targets, mask, vocab_axis):
    total, nll_BT = _summed_nll(hidden, head, targets, mask, vocab_axis)
    if not jax.sharding.get_abstract_mesh().empty:
      total = jax.lax.psum(total, batch_axes)
    return total, jax.lax.stop_gradient(nll_BT)

  return _over_mesh(local, (P(), P(batch_axes)), batch_axes)(
      hidden_BTD, head_DV, targets_BT, mask_BT)


def token_losses(hidden_BTD, head_DV, targets_BT, mask_BT,
                 batch_axes=BATCH_AXES) -> tuple[jax.Array, jax.Array]:
  """Like next_token_loss, but gradients also flow through the loss of each position.

  The backward pass computes the logits again.
  """
  nll_BT = _over_mesh(_each_nll, P(batch_axes), batch_axes)(
      hidden_BTD, head_DV, targets_BT, mask_BT)
  return nll_BT.sum(), nll_BT


def _over_mesh(local: Callable, out_specs, batch_axes) -> Callable:
  """Returns a function of (hidden, head, targets, mask) that runs `local` on each device's part.

  Without a mesh it runs `local` on the whole arrays.

  Args:
    local: takes these four, and the mesh axis over which V is sharded; None if it is not.
    out_specs: the specs of its results.
    batch_axes: the mesh axes over which rows are sharded.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return lambda *arrays: local(*arrays, None)

  def over_mesh(hidden_BTD, head_DV, targets_BT, mask_BT):
    vocab_axis = sharding.axis_that_cuts('tensor', head_DV.shape[1])

    def of_device(hidden, head, targets, mask):
      return local(hidden, sharding.varying_like(head, hidden), targets, mask, vocab_axis)

    rows = P(batch_axes)
    return jax.shard_map(
        of_device, in_specs=(rows, P(None, vocab_axis), rows, rows), out_specs=out_specs)(
            hidden_BTD, head_DV, targets_BT, mask_BT)

  return over_mesh


def _nll(hidden_BTD, head_DV, targets_BT, mask_BT, vocab_axis) -> tuple[jax.Array, jax.Array]:
  """The sum, and the loss of each position [B, T], through which no gradient flows.

  `vocab_axis` is the mesh axis over which V is sharded; None if it is not.
  """
  def one_chunk(total, chunk):
    hidden, targets, mask = chunk
    nll, _ = _chunk_nll(hidden, targets, mask, head_DV, vocab_axis)
    return total + nll.sum(), nll

  zero = sharding.varying_like(jnp.zeros(()), hidden_BTD)
  total, nll = jax.lax.scan(one_chunk, zero, _chunks(hidden_BTD, targets_BT, mask_BT))
  return total, _joined(nll, hidden_BTD)


def _nll_and_gradients(hidden_BTD, head_DV, targets_BT, mask_BT, vocab_axis):
  def one_chunk(carry, chunk):
    total, dhead_DV = carry
    hidden, targets, mask = chunk
    nll, dlogits = _chunk_nll(hidden, targets, mask, head_DV, vocab_axis)
    dlogits = jnp.where(mask[:, None], dlogits, 0).astype(hidden.dtype)
    dhead_DV += outer(hidden, dlogits, jnp.float32)
    return (total + nll.sum(), dhead_DV), (product_transposed(dlogits, head_DV), nll)

  zeros = (sharding.varying_like(jnp.zeros(()), hidden_BTD),
           sharding.varying_like(jnp.zeros(head_DV.shape), head_DV))
  (total, dhead_DV), (dhidden, nll) = jax.lax.scan(
      one_chunk, zeros, _chunks(hidden_BTD, targets_BT, mask_BT))
  if vocab_axis:  # each device has the contribution of its own shard of the vocabulary
    dhidden = jax.lax.psum(dhidden, vocab_axis)
  residuals = _joined(dhidden, hidden_BTD), dhead_DV.astype(head_DV.dtype)
  return (total, _joined(nll, hidden_BTD)), residuals


def _scaled_gradients(vocab_axis, residuals, cotangents):
  del vocab_axis
  dhidden_BTD, dhead_DV = residuals
  g, _ = cotangents
  return dhidden_BTD * g.astype(dhidden_BTD.dtype), dhead_DV * g.astype(dhead_DV.dtype), None, None


_summed_nll = jax.custom_vjp(_nll, nondiff_argnums=(4,))
_summed_nll.defvjp(_nll_and_gradients, _scaled_gradients)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _each_nll(hidden_BTD, head_DV, targets_BT, mask_BT, vocab_axis) -> jax.Array:
  """The loss of each position [B, T]."""
  return _nll(hidden_BTD, head_DV, targets_BT, mask_BT, vocab_axis)[1]


def _each_nll_forward(hidden_BTD, head_DV, targets_BT, mask_BT, vocab_axis):
  arrays = hidden_BTD, head_DV, targets_BT, mask_BT
  return _each_nll(*arrays, vocab_axis), arrays


def _each_nll_backward(vocab_axis, residuals, g_BT):
  hidden_BTD, head_DV, targets_BT, mask_BT = residuals

  def one_chunk(dhead_DV, chunk):
    hidden, targets, mask, g = chunk
    _, dlogits = _chunk_nll(hidden, targets, mask, head_DV, vocab_axis)
    # Masked before the product: jax 0.10 cannot map `dlogits * g[:, None]` over branches.
    dlogits = (dlogits * jnp.where(mask, g, 0)[:, None]).astype(hidden.dtype)
    dhead_DV += outer(hidden, dlogits, jnp.float32)
    return dhead_DV, product_transposed(dlogits, head_DV)

  zeros = sharding.varying_like(jnp.zeros(head_DV.shape), head_DV)
  dhead_DV, dhidden = jax.lax.scan(
      one_chunk, zeros, _chunks(hidden_BTD, targets_BT, mask_BT, g_BT))
  if vocab_axis:
    dhidden = jax.lax.psum(dhidden, vocab_axis)
  return _joined(dhidden, hidden_BTD), dhead_DV.astype(head_DV.dtype), None, None


_each_nll.defvjp(_each_nll_forward, _each_nll_backward)


def _chunks(*arrays):
  """[B, T, ...] -> [chunks, tokens, ...]; the last chunk is padded with zeros."""
  tokens = arrays[0].shape[0] * arrays[0].shape[1]
  size = min(tokens, TOKENS_PER_CHUNK)
  fill = -tokens % size

  def cut(x):
    x = x.reshape(tokens, *x.shape[2:])
    x = jnp.pad(x, ((0, fill),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(-1, size, *x.shape[1:])

  return tuple(map(cut, arrays))


def _joined(chunks, like_BTD):
  """The inverse of `_chunks`: [chunks, tokens, ...] -> [B, T, ...]."""
  B, T, _ = like_BTD.shape
  flat = chunks.reshape(-1, *chunks.shape[2:])
  return flat[:B * T].reshape(B, T, *flat.shape[1:])


def _chunk_nll(hidden, targets, mask, head_DV, vocab_axis):
  """Loss [tokens] of one chunk and its gradient by the logits [tokens, V], in float32."""
  logits = product(hidden, head_DV, jnp.float32)
  V = logits.shape[1]
  top = logits.max(1)
  if vocab_axis:
    top = jax.lax.pmax(top, vocab_axis)
    targets = targets - V * jax.lax.axis_index(vocab_axis)
  logits -= top[:, None]
  here = (targets >= 0) & (targets < V)
  target = jnp.take_along_axis(logits, jnp.clip(targets, 0, V - 1)[:, None], axis=1)[:, 0]
  total, target = jnp.exp(logits).sum(1), jnp.where(here, target, 0)
  if vocab_axis:
    total, target = jax.lax.psum((total, target), vocab_axis)
  log_total = jnp.log(total)
  dlogits = jnp.exp(logits - log_total[:, None]) - jax.nn.one_hot(targets, V)
  return jnp.where(mask, log_total - target, 0), dlogits
