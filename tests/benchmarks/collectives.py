"""How long Gloo's collectives take on a link of a known rate, beside their bytes at that rate.

  python -m tests.benchmarks.collectives [Mbit/s]

Two processes send 4 MB in one array and in ten, over the cable of wall_time.py, by each kind of
collective. Says how much longer they took than the bytes that a machine sends. Needs what
wall_time.py needs. About half a minute.
"""

import os
import statistics
import subprocess
import sys
import time

from tests.benchmarks.wall_time import ADDRESSES, Cable, bandwidth

SIZE, ARRAYS, TIMES = 4_000_000, (1, 10), 5
RATE = 100  # Mbit/s, unless another is given
PORT = 7100


def run_process(process: int, rate: int):
  """One of the two processes; the first one prints."""
  import jax
  from jax.sharding import NamedSharding
  from jax.sharding import PartitionSpec as P
  import numpy as np

  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(f'{ADDRESSES[0]}:{PORT}', 2, process)
  jax.set_mesh(jax.make_mesh((2,), ('x',), axis_types=(jax.sharding.AxisType.Auto,)))
  half = lambda x: x[:, :x.shape[1] // 2]
  kinds = {  # and the share of an array that each machine sends
      'all-reduce': (lambda x: jax.lax.psum(x, 'x'), 1),
      'reduce-scatter': (lambda x: jax.lax.psum_scatter(x[0], 'x', tiled=True)[None], 0.5),
      'all-gather': (lambda x: jax.lax.all_gather(half(x), 'x').reshape(1, -1), 0.5),
      'all-to-all': (lambda x: jax.lax.all_to_all(x.reshape(2, -1), 'x', 0, 0), 0.5),
      'collective-permute': (lambda x: jax.lax.ppermute(x, 'x', [(0, 1), (1, 0)]), 1),
  }
  for count in ARRAYS:
    whole = np.ones((2, SIZE // 4 // count), np.float32)
    arrays = [jax.make_array_from_callback(
        whole.shape, NamedSharding(jax.sharding.get_mesh(), P('x')), whole.__getitem__)] * count
    for kind, (collective, share) in kinds.items():
      of_all = jax.jit(jax.shard_map(
          lambda arrays, collective=collective: [collective(x + i) for i, x in enumerate(arrays)],
          in_specs=(P('x'),), out_specs=P('x'), check_vma=False))
      took = []
      for _ in range(TIMES):
        start = time.perf_counter()
        jax.block_until_ready(of_all(arrays))
        took.append(time.perf_counter() - start)
      if not process:
        expected = share * SIZE / bandwidth(rate)
        print(f'{kind}, {count} arrays: {statistics.median(took):.3f} s, '
              f'{statistics.median(took) / expected:.2f} x its bytes', flush=True)


def main():
  rate = int(sys.argv[1]) if sys.argv[1:] else RATE
  with Cable() as cable:
    cable.shape(rate)
    started = [subprocess.Popen([*inside, sys.executable, '-m', __spec__.name, str(rate), str(i)])
               for i, inside in enumerate(cable.inside())]
    sys.exit(max(process.wait() for process in started))


if __name__ == '__main__':
  if len(sys.argv) == 3:
    os.environ['NPROC'] = '8'
    run_process(int(sys.argv[2]), int(sys.argv[1]))
  else:
    main()
