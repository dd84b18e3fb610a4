"""Rotary embeddings and causal attention within packed documents."""

import math
import typing

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from btx_jax.devices import sharding
from btx_jax.devices.mesh import BATCH_AXES, BRANCH_BATCH_AXES
from btx_jax.model.config import Config
from btx_jax.model.overhead import LANES, attention_of, query_blocks
from btx_jax.model.products import is_bfloat16_on_cpu


def rope_frequencies(cfg: Config) -> np.ndarray:
  """Angular frequency of each pair of dimensions, [H / 2], scaled by `rope_scaling`.

  Scaling lengthens the context by `rope_factor`. Linear scaling slows all waves by it. Llama 3
  slows only slow waves (longer than original_length / low_freq_factor), keeps fast ones (shorter
  than original_length / high_freq_factor), and interpolates between them.
  """
  freq = cfg.rope_theta ** -(np.arange(0, cfg.head_dim, 2, dtype=np.float64) / cfg.head_dim)
  if cfg.rope_factor != 1:
    keep = 0.0
    if cfg.rope_scaling == 'llama3':
      turns = cfg.rope_original_length * freq / (2 * np.pi)  # over the original context
      low, high = cfg.rope_low_freq_factor, cfg.rope_high_freq_factor
      keep = np.clip((turns - low) / (high - low), 0, 1)
    freq = keep * freq + (1 - keep) * freq / cfg.rope_factor
  return freq.astype(np.float32)


def rope_tables(positions_BT: jax.Array, cfg: Config) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines, each [B, 1, T, H / 2]; float32, for bfloat16 confuses far positions."""
  frequencies = rope_frequencies(cfg)[None, None, None]
  angles = positions_BT[:, None, :, None].astype(jnp.float32) * frequencies
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BNTH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates the pairs (i, i + H/2) of each head; computed in float32, returned in x's dtype."""
  cos, sin = tables
  a, b = jnp.split(x_BNTH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BNTH.dtype)


def attention(q_BNTH, k_BKTH, v_BKTH, segment_ids_BT, implementation='auto',
              batch_axes=BATCH_AXES) -> jax.Array:
  """Causal attention in which a position sees only its own document.

  Args:
    q_BNTH, k_BKTH, v_BKTH: queries, keys and values; K divides N.
    segment_ids_BT: the document of each position, numbered within its row.
    implementation: 'xla', plain einsums that run anywhere; 'splash', the TPU kernel (elsewhere
      it is interpreted, very slowly; 'xla' if T is not a multiple of 128); 'cudnn', the kernel for
      NVIDIA GPUs, in bfloat16; or 'auto', the target platform's kernel where it supports such
      arrays, else 'xla'.
    batch_axes: the mesh axes over which rows are sharded.

  Returns:
    [B, N, T, H], in the dtype of the queries.
  """
  if implementation == 'auto':
    implementation = attention_of(sharding.platform(), q_BNTH.dtype.name, *q_BNTH.shape[2:])
  if implementation == 'splash' and q_BNTH.shape[2] % LANES == 0:
    return _splash(q_BNTH, k_BKTH, v_BKTH, segment_ids_BT, batch_axes)
  if implementation == 'cudnn':
    y_BNTH = _cudnn(q_BNTH, k_BKTH, v_BKTH, segment_ids_BT, batch_axes)
  else:
    y_BNTH = _plain(q_BNTH, k_BKTH, v_BKTH, segment_ids_BT)
  return checkpoint_name(y_BNTH, 'attended')


def _plain(q_BNTH, k_BKTH, v_BKTH, segment_ids_BT):
  # A block of queries needs only the keys up to its own end: blocks save 3/8 of the work and
  # keep the scores in cache. With heads before positions, and the division by the softmax's sum
  # after the sum over values, this is more than twice as fast on a CPU, forward and backward,
  # as jax.nn.dot_product_attention's XLA form.
  B, N, T, H = q_BNTH.shape
  K, dtype = k_BKTH.shape[1], q_BNTH.dtype
  if is_bfloat16_on_cpu(q_BNTH):  # rounding the gradients of each block takes long there
    q_BNTH, k_BKTH, v_BKTH = (x.astype(jnp.float32) for x in (q_BNTH, k_BKTH, v_BKTH))
  q_BKGTH = q_BNTH.reshape(B, K, N // K, T, H) * H**-0.5
  blocks = query_blocks(T)
  outputs = []
  for end in range(T // blocks, T + 1, T // blocks):
    start = end - T // blocks
    scores = jnp.einsum('bkgth,bksh->bkgts', q_BKGTH[..., start:end, :], k_BKTH[:, :, :end],
                        preferred_element_type=jnp.float32)
    visible = _visible(segment_ids_BT, start, end)[:, None, None]
    scores = jnp.where(visible, scores, -1e30)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - top)
    y = jnp.einsum('bkgts,bksh->bkgth', weights.astype(v_BKTH.dtype), v_BKTH[:, :, :end],
                   preferred_element_type=jnp.float32)
    outputs.append((y / weights.sum(-1, keepdims=True)).astype(dtype))
  return jnp.concatenate(outputs, axis=3).reshape(B, N, T, H)


def _cudnn(q_BNTH, k_BKTH, v_BKTH, segment_ids_BT, batch_axes):
  B, N, T, _ = q_BNTH.shape
  q, k, v = (x.swapaxes(1, 2) for x in (q_BNTH, k_BKTH, v_BKTH))
  mask = _visible(segment_ids_BT, 0, T)[:, None]
  if batch_axes == BRANCH_BATCH_AXES:  # mapped over branches: jax's vmap wants a mask of every head
    mask = jnp.broadcast_to(mask, (B, N, T, T))
  y = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation='cudnn')
  return y.swapaxes(1, 2)


def _splash(q_BNTH, k_BKTH, v_BKTH, segment_ids_BT, batch_axes):
  """The TPU kernel: skips blocks of keys that are all in the future, writes no scores to memory."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash
  mesh = jax.sharding.get_abstract_mesh()
  N, T, H = q_BNTH.shape[1:]
  heads_axis = None if mesh.empty else sharding.axis_that_cuts('tensor', k_BKTH.shape[1])
  heads = N // (mesh.shape['tensor'] if heads_axis else 1)
  # The largest blocks that divide T: fewer passes through the kernel's scratch memory.
  queries, keys = math.gcd(T, 512), math.gcd(T, 1024)
  sizes = splash.BlockSizes(
      block_q=queries, block_kv=keys, block_kv_compute=queries, block_q_dkv=queries,
      block_kv_dkv=keys, block_kv_dkv_compute=queries, block_q_dq=queries, block_kv_dq=keys)

  def local(q, k, v, segment_ids):
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.CausalMask((T, T))] * heads), block_sizes=sizes,
        residual_checkpoint_name='attended', interpret=sharding.platform() != 'tpu')
    y = jax.vmap(kernel)(q * H**-0.5, k, v, splash.SegmentIds(segment_ids, segment_ids))
    return typing.cast(jax.Array, y)  # a tuple only when the kernel is asked for residuals

  if mesh.empty:
    return local(q_BNTH, k_BKTH, v_BKTH, segment_ids_BT)
  rows, by_head = P(batch_axes), P(batch_axes, heads_axis)
  # A kernel does not declare the mesh axes that its outputs vary over.
  return jax.shard_map(local, in_specs=(by_head, by_head, by_head, rows), out_specs=by_head,
                       check_vma=False)(q_BNTH, k_BKTH, v_BKTH, segment_ids_BT)


def _visible(segment_ids_BT, start, end):
  """Mask [B, queries start..end, keys 0..end]: keys that are not later, of the same document."""
  same_document = segment_ids_BT[:, start:end, None] == segment_ids_BT[:, None, :end]
  causal = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None]
  return same_document & causal[None]
