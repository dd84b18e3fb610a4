"""Next-token cross-entropy straight from hidden states.

Key idea: logits [B, T, V] are the largest array of a language model, so they are made,
used and forgotten a few hundred tokens at a time. The gradient is computed along with the
value, while a chunk's logits are still in cache; the backward pass only scales it.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from btx_jax import sharding

TOKENS_PER_CHUNK = 512


def next_token_loss(hidden_BTD, head_DV, targets_BT, mask_BT,
                    batch_axes=sharding.BATCH_AXES):
  """Negative log likelihood in nats, summed over the positions that `mask_BT` marks.

  Args:
    hidden_BTD: final hidden states, rows sharded over `batch_axes`.
    head_DV: the output head, in the dtype of the hidden states.
    targets_BT: the token that follows each position.
    mask_BT: True where the target counts.
    batch_axes: the mesh axes over which rows are sharded.

  Returns:
    A float32 scalar, differentiable in the hidden states and the head.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return _summed_nll(hidden_BTD, head_DV, targets_BT, mask_BT)

  def local(hidden, head, targets, mask):
    head = sharding.varying_like(head, hidden)
    return jax.lax.psum(_summed_nll(hidden, head, targets, mask), batch_axes)

  rows = P(batch_axes)
  return jax.shard_map(local, in_specs=(rows, P(), rows, rows), out_specs=P())(
      hidden_BTD, head_DV, targets_BT, mask_BT)


@jax.custom_vjp
def _summed_nll(hidden_BTD, head_DV, targets_BT, mask_BT):
  def one_chunk(total, chunk):
    return total + _chunk_nll(*chunk, head_DV)[0], None

  zero = sharding.varying_like(jnp.zeros(()), hidden_BTD)
  return jax.lax.scan(one_chunk, zero, _chunks(hidden_BTD, targets_BT, mask_BT))[0]


def _summed_nll_fwd(hidden_BTD, head_DV, targets_BT, mask_BT):
  def one_chunk(carry, chunk):
    total, dhead_DV = carry
    hidden, targets, mask = chunk
    nll, log_probs = _chunk_nll(*chunk, head_DV)
    dlogits = jnp.exp(log_probs) - jax.nn.one_hot(targets, head_DV.shape[1])
    dlogits = jnp.where(mask[:, None], dlogits, 0).astype(hidden.dtype)
    dhead_DV += jnp.dot(hidden.T, dlogits, preferred_element_type=jnp.float32)
    return (total + nll, dhead_DV), dlogits @ head_DV.T

  zeros = (jnp.zeros(()), jnp.zeros(head_DV.shape))
  (total, dhead_DV), dhidden = jax.lax.scan(
      one_chunk, sharding.varying_like(zeros, hidden_BTD),
      _chunks(hidden_BTD, targets_BT, mask_BT))
  B, T, D = hidden_BTD.shape
  dhidden_BTD = dhidden.reshape(-1, D)[:B * T].reshape(B, T, D)
  return total, (dhidden_BTD, dhead_DV.astype(head_DV.dtype))


def _summed_nll_bwd(residuals, g):
  dhidden_BTD, dhead_DV = residuals
  return dhidden_BTD * g.astype(dhidden_BTD.dtype), dhead_DV * g.astype(dhead_DV.dtype), None, None


_summed_nll.defvjp(_summed_nll_fwd, _summed_nll_bwd)


def _chunks(*arrays):
  """[B, T, ...] -> [chunks, tokens, ...]; the last chunk is filled up with zeros."""
  tokens = arrays[0].shape[0] * arrays[0].shape[1]
  size = min(tokens, TOKENS_PER_CHUNK)
  fill = -tokens % size

  def cut(x):
    x = x.reshape(tokens, *x.shape[2:])
    x = jnp.pad(x, ((0, fill),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(-1, size, *x.shape[1:])

  return tuple(map(cut, arrays))


def _chunk_nll(hidden, targets, mask, head_DV):
  """Summed loss and log probabilities [tokens, V] of one chunk, in float32."""
  logits = jnp.dot(hidden, head_DV, preferred_element_type=jnp.float32)
  log_probs = jax.nn.log_softmax(logits)
  nll = -jnp.take_along_axis(log_probs, targets[:, None], axis=1)[:, 0]
  return jnp.where(mask, nll, 0).sum(), log_probs
