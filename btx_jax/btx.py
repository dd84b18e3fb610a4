"""The method: branch a seed, stack experts that were trained apart, mix them into one model.

Pure functions on parameter trees (laid out as model/llama.py says).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def branch(params, n: int):
  """n copies of the seed, stacked: every leaf [...] becomes [n, ...]."""
  return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), params)


def stack(experts: Sequence):
  """Experts that were trained as separate jobs, in the form that `branch` gives.

  Raises:
    ValueError: the trees differ in structure or shapes.
  """
  shapes = [jax.tree.map(jnp.shape, params) for params in experts]
  for i, other in enumerate(shapes):
    if other != shapes[0]:
      raise ValueError(f'expert {i} differs from expert 0 in structure or shape: '
                       f'{other} against {shapes[0]}.')
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *experts)


def average(experts):
  """The uniform average of stacked experts: every leaf [E, ...] becomes [...]."""
  return jax.tree.map(lambda x: x.mean(0), experts)


def mix(experts, rng: jax.Array, router_std: float = 0.02):
  """Stacked dense experts become one mixture of experts (paper 3.2).

  Each layer keeps every expert's whole feed-forward network, and gains a router; all else
  is averaged. The paper does not say how routers begin; normal with a small deviation makes
  the first gates nearly even.

  Args:
    experts: leaves [E, ...], dense models.
    rng: for the routers.
    router_std: standard deviation of the routers' weights.

  Returns:
    Parameters of a mixture: layers/ffn becomes {router [L, D, E], experts [L, E, ...]}.
  """
  ffn = jax.tree.map(lambda x: x.swapaxes(0, 1), experts['layers']['ffn'])
  L, E, D, _ = ffn['up'].shape
  router = router_std * jax.random.normal(rng, (L, D, E))
  rest = {**experts, 'layers': {k: v for k, v in experts['layers'].items() if k != 'ffn'}}
  params = average(rest)
  params['layers']['ffn'] = {'experts': ffn, 'router': router}
  return params
