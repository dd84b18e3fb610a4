"""What the devices could do and hold: peak FLOP/s, for the share that a run makes use of (MFU),
and memory."""

import functools
import resource
import time

import jax
import jax.numpy as jnp

from btx_jax import chips


@functools.cache
def peak_flops(dtype: str) -> float:
  """FLOP/s that all devices could do at most.

  Of a device that is not in the table, a CPU above all, it is what one large matmul in `dtype`
  achieves; the fake devices of one CPU share it.
  """
  chip = chips.of_kind(jax.devices()[0].device_kind)
  if chip:
    return chip.flops * jax.device_count()
  shared = jax.default_backend() == 'cpu'
  return _measured_flops(dtype) * (jax.process_count() if shared else jax.device_count())


def _measured_flops(dtype: str, size: int = 1536) -> float:
  """The best of several matmuls, after one that is not counted."""
  best = float('inf')
  with jax.set_mesh(jax.make_mesh((1,), ('one',), devices=jax.local_devices()[:1])):
    x = jnp.ones((size, size), dtype)
    matmul = jax.jit(jnp.matmul)
    for _ in range(6):
      began = time.perf_counter()
      matmul(x, x).block_until_ready()
      best = min(best, time.perf_counter() - began)
  return 2 * size**3 / best


def device_memory() -> int | None:
  """Bytes that the smallest device of this process can hold; None if it does not say."""
  limits = [(device.memory_stats() or {}).get('bytes_limit') for device in jax.local_devices()]
  return min(limits) if all(limits) else None


def memory() -> dict[str, int]:
  """Most bytes that were in use at once: of this process, and of its fullest device."""
  result = {'host': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  used = [s['peak_bytes_in_use'] for s in stats if 'peak_bytes_in_use' in s]
  if used:
    result['device'] = max(used)
  return result
