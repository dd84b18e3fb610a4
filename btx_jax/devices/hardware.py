"""The peak FLOP/s and the memory of devices: for model FLOPs utilisation (MFU) and preflight."""

import functools
import resource
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

GIB, GB = 2**30, 1e9


class Chip(NamedTuple):
  """A kind of device. Rates are bytes per second.

  Attributes:
    kinds: jax's names for it (`device_kind`).
    flops: dense bfloat16 FLOP/s.
    memory: bytes that programs can use.
    bandwidth: of its memory.
    link: one way, over one link of a torus; to a switch, over all links together.
    torus: dimensions of the torus that the links form; 0 is a switch, all to all.
    network: to other slices or nodes; its share of the host's.
    host_memory: bytes; its share of the host's.
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
# interconnect (both ways of 6 or 4 links), data centre network, host memory; memory is the part of
# HBM that the compiler gives to programs. Host links: "How to Scale Your Model" (its chapter on
# TPUs, jax-ml.github.io/scaling-book). NVIDIA: data sheets of A100, H100, H200 and B200 (SXM; dense
# FLOPs; NVLink both ways, halved), DGX manuals for network adapters and host memory.
CHIPS = {
    'v4': Chip(
        kinds=('TPU v4',),
        flops=275e12, memory=30.75 * GIB, bandwidth=1228 * GB, link=50 * GB, torus=3,
        network=6.25 * GB, host_memory=100 * GB, host_link=16 * GB),
    'v5e': Chip(
        kinds=('TPU v5 lite', 'TPU v5e'),
        flops=197e12, memory=15.75 * GIB, bandwidth=819 * GB, link=50 * GB, torus=2,
        network=3.1 * GB, host_memory=64 * GIB, host_link=16 * GB),
    'v5p': Chip(
        kinds=('TPU v5', 'TPU v5p'),
        flops=459e12, memory=95.74 * GIB, bandwidth=2765 * GB, link=100 * GB, torus=3,
        network=6.25 * GB, host_memory=112 * GB, host_link=16 * GB),
    'v6e': Chip(
        kinds=('TPU v6 lite', 'TPU v6e'),
        flops=918e12, memory=31.25 * GIB, bandwidth=1638 * GB, link=100 * GB, torus=2,
        network=12.5 * GB, host_memory=180 * GB, host_link=32 * GB),
    'a100': Chip(
        kinds=('NVIDIA A100-SXM4-80GB', 'NVIDIA A100-SXM4-40GB'),
        flops=312e12, memory=79 * GIB, bandwidth=2039 * GB, link=300 * GB, torus=0,
        network=25 * GB, host_memory=256 * GB, host_link=32 * GB),
    'h100': Chip(
        kinds=('NVIDIA H100 80GB HBM3',),
        flops=989e12, memory=79.1 * GIB, bandwidth=3352 * GB, link=450 * GB, torus=0,
        network=50 * GB, host_memory=256 * GB, host_link=64 * GB),
    'h200': Chip(
        kinds=('NVIDIA H200',),
        flops=989e12, memory=139 * GIB, bandwidth=4800 * GB, link=450 * GB, torus=0,
        network=50 * GB, host_memory=256 * GB, host_link=64 * GB),
    'b200': Chip(
        kinds=('NVIDIA B200',),
        flops=2250e12, memory=178 * GIB, bandwidth=7700 * GB, link=900 * GB, torus=0,
        network=50 * GB, host_memory=500 * GB, host_link=64 * GB),
}
_INF = float('inf')
UNKNOWN = Chip((), _INF, _INF, _INF, _INF, 0, _INF, _INF, _INF)


def chip_of_kind(kind: str) -> Chip | None:
  """The chip that jax calls `kind`; None if it is not in the table."""
  return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)


@functools.cache
def peak_flops(dtype: str) -> float:
  """The peak FLOP/s of all devices together.

  For a device that is not in the table, such as a CPU, it is what one large matmul in `dtype`
  achieves; the fake devices of one CPU share that.
  """
  chip = chip_of_kind(jax.devices()[0].device_kind)
  if chip:
    return chip.flops * jax.device_count()
  shared = jax.default_backend() == 'cpu'
  return _measured_flops(dtype) * (jax.process_count() if shared else jax.device_count())


def _measured_flops(dtype: str, size: int = 1536) -> float:
  """FLOP/s of the fastest of several matmuls [size, size]; the first of them compiles."""
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
  """The memory of this process's smallest device, in bytes; None if a device does not report it."""
  limits = [(device.memory_stats() or {}).get('bytes_limit') for device in jax.local_devices()]
  known = [limit for limit in limits if limit]
  return min(known) if len(known) == len(limits) else None


def peak_memory() -> dict[str, int]:
  """The most bytes in use at once: 'host' for this process, 'device' for its fullest device."""
  result = {'host': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  used = [s['peak_bytes_in_use'] for s in stats if 'peak_bytes_in_use' in s]
  if used:
    result['device'] = max(used)
  return result
