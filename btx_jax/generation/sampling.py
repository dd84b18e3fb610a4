"""Chooses a token from logits: greedily, or sampled with a temperature, top-k, top-p and min-p.

The settings and their order are those of transformers: repetition penalty, temperature, top-k,
top-p, min-p. Each filter applies to the tokens that the previous one has kept.
"""

import functools

import jax
import jax.numpy as jnp

from btx_jax.generation.settings import Sampling


@functools.partial(jax.jit, static_argnums=0)
def sample(settings: Sampling, logits_BV, seen_BV, keys_B, number) -> jax.Array:
  """The next token of each row, [B].

  Args:
    settings: see Sampling.
    logits_BV: float32.
    seen_BV: True for tokens that the row already contains; None without a repetition penalty.
    keys_B: a key per row, so that a row's text does not depend on other rows.
    number: the index of the token in its text, folded into the keys.
  """
  logits_BV = penalised(settings, logits_BV, seen_BV)
  if not settings.temperature:
    return logits_BV.argmax(-1)
  keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)
  return jax.vmap(jax.random.categorical)(keys_B, filtered(settings, logits_BV))


def penalised(settings: Sampling, logits_BV, seen_BV) -> jax.Array:
  """Logits after the repetition penalty."""
  if settings.repetition_penalty == 1:
    return logits_BV
  lower_BV = jnp.where(logits_BV > 0, logits_BV / settings.repetition_penalty,
                       logits_BV * settings.repetition_penalty)
  return jnp.where(seen_BV, lower_BV, logits_BV)


def filtered(settings: Sampling, logits_BV) -> jax.Array:
  """Logits of the distribution to sample from; -inf for tokens that are filtered out."""
  logits_BV = logits_BV / settings.temperature
  V = logits_BV.shape[-1]
  if 0 < settings.top_k < V:
    least_B1 = jax.lax.top_k(logits_BV, settings.top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  if settings.top_p < 1:
    order_BV = jnp.argsort(-logits_BV)
    sorted_BV = jnp.take_along_axis(jax.nn.softmax(logits_BV), order_BV, -1)
    # A token is left out if the likelier ones add up to top_p already.
    out_BV = jnp.cumsum(sorted_BV, -1) - sorted_BV >= settings.top_p
    out_BV = jnp.take_along_axis(out_BV, jnp.argsort(order_BV), -1)
    logits_BV = jnp.where(out_BV, -jnp.inf, logits_BV)
  if settings.min_p:
    probs_BV = jax.nn.softmax(logits_BV)
    out_BV = probs_BV < settings.min_p * probs_BV.max(-1, keepdims=True)
    logits_BV = jnp.where(out_BV, -jnp.inf, logits_BV)
  return logits_BV
