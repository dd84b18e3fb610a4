"""What the devices could do and hold: peak FLOP/s, for the share that a run makes use of (MFU),
and memory."""

import functools
import resource
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

GIB, GB = 2**30, 1e9


class Chip(NamedTuple):
  """A kind of device.

  Attributes:
    kinds: what jax calls it (`device_kind`).
    flops: dense bfloat16 FLOP/s.
    memory: bytes that programs can use.
    bandwidth: of its memory.
    link: one way, over one link of a torus; of a switch, of all links together.
    torus: dimensions of the torus that links form; 0 is a switch, all to all.
    network: to other slices or nodes, its share of the host's.
    host_memory: its share of the host's.
    host_link: between it and the host's memory, one way.
  """
  kinds: tuple[str, ...]
  flops: float
  memory: float
  bandwidth: float
  link: float
  torus: int
  network: float
  host_memory: float
  host_link: float

# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, per chip: peak compute, HBM, bidirectional
# interconnect (both ways of 6 or 4 links), data centre network, host memory; of HBM what the
# compiler gives to programs. Host links: "How to Scale Your Model" (its chapter on TPUs,
# jax-ml.github.io/scaling-book). NVIDIA: data sheets of A100, H100, H200 and B200 (SXM; dense
# FLOPs; NVLink both ways, halved), DGX manuals for network adapters and host memory.
CHIPS = {
    'v4': Chip(('TPU v4',), 275e12, 30.75 * GIB, 1228 * GB, 50 * GB, 3, 6.25 * GB, 100 * GB,
               16 * GB),
    'v5e': Chip(('TPU v5 lite', 'TPU v5e'), 197e12, 15.75 * GIB, 819 * GB, 50 * GB, 2, 3.1 * GB,
                64 * GIB, 16 * GB),
    'v5p': Chip(('TPU v5', 'TPU v5p'), 459e12, 95.74 * GIB, 2765 * GB, 100 * GB, 3, 6.25 * GB,
                112 * GB, 16 * GB),
    'v6e': Chip(('TPU v6 lite', 'TPU v6e'), 918e12, 31.25 * GIB, 1638 * GB, 100 * GB, 2,
                12.5 * GB, 180 * GB, 32 * GB),
    'a100': Chip(('NVIDIA A100-SXM4-80GB', 'NVIDIA A100-SXM4-40GB'), 312e12, 79 * GIB,
                 2039 * GB, 300 * GB, 0, 25 * GB, 256 * GB, 32 * GB),
    'h100': Chip(('NVIDIA H100 80GB HBM3',), 989e12, 79.1 * GIB, 3352 * GB, 450 * GB, 0, 50 * GB,
                 256 * GB, 64 * GB),
    'h200': Chip(('NVIDIA H200',), 989e12, 139 * GIB, 4800 * GB, 450 * GB, 0, 50 * GB, 256 * GB,
                 64 * GB),
    'b200': Chip(('NVIDIA B200',), 2250e12, 178 * GIB, 7700 * GB, 900 * GB, 0, 50 * GB, 500 * GB,
                 64 * GB),
}
_INF = float('inf')
UNKNOWN = Chip((), _INF, _INF, _INF, _INF, 0, _INF, _INF, _INF)


@functools.cache
def peak_flops(dtype: str) -> float:
  """FLOP/s that all devices could do at most.

  Of a device that is not in the table, a CPU above all, it is what one large matmul in `dtype`
  achieves; the fake devices of one CPU share it.
  """
  chip = of_kind(jax.devices()[0].device_kind)
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


def of_kind(kind: str) -> Chip | None:
  """The chip that jax calls so."""
  return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)
