"""Does the wall-time model hold? Two processes on a link of a known rate, counted and timed.

  python -m tests.benchmarks.wall_time [Mbit/s ...]

Trains a synchronous data-parallel run and a DiLoCo run, each by two processes (Gloo, over TCP) in
two network namespaces joined by a virtual cable. The cable is shaped by a token bucket and opened
again in turns within one training, so that both kinds of steps see the same load of the machine.
Prints the bytes that a machine sends and the seconds of a step, beside what study/wall_time.py
says. Fails if bytes differ by more than 1 % or seconds by more than 20 %.

Needs Linux, root, and `ip`, `tc` and `ss` (iproute2). About ten minutes on two cores.
"""

from collections.abc import Sequence
import os
import pathlib
import re
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from btx_jax import base
from btx_jax.run import Run
from btx_jax.study import wall_time
from btx_jax.study.study import Study
from btx_jax.training import metrics
from tests import studies
from tests.jobs import Job, training

SPACES, ADDRESSES, CABLE = ('btx_a', 'btx_b'), ('10.77.0.1', '10.77.0.2'), 'btx_cable'
RATES = (50, 100, 200)  # Mbit/s
# Of a full packet: what the token bucket counts (Ethernet, IP and TCP with time stamps), and data.
PACKET, DATA = 1514, 1448
TURNS, STEPS = 4, 12  # turns at each rate, and steps of a turn that are timed
ROWS, LENGTH, SYNC_EVERY = 4, 63, 2
SKIPPED = 2  # steps after a change of the rate that are not timed: metrics come a step late


def get_config(folder: str):
  config: Any = studies.get_config(pathlib.Path(folder))
  config.data.seq_len = LENGTH
  config.model.update(dim=192, ffn_dim=512, num_layers=4, num_heads=4, num_kv_heads=4)
  config.train.update(batch_size=ROWS, microbatches=1)
  config.mesh.update(data=-1, fsdp=1, expert=1, tensor=1)
  config.evaluation.every = 0
  config.checkpoint_every = 10**6
  run = lambda **train: base.run(base.random(), {'prose': 2, 'code': 1, 'math': 1}, steps=10**6,
                                 train=train)
  config.runs = {'synchronous': run(), 'diloco': run(workers=2, sync_every=SYNC_EVERY)}
  return config


class Cable:
  """Two network namespaces joined by a virtual cable; shaped while `shape` says so."""

  def __init__(self):
    self.port = 0  # of the coordinator, whose connections are not counted

  def __enter__(self):
    for space in SPACES:
      call('ip', 'netns', 'add', space)
    call('ip', 'link', 'add', CABLE, 'netns', SPACES[0], 'type', 'veth', 'peer', 'name', CABLE,
         'netns', SPACES[1])
    for space, address in zip(SPACES, ADDRESSES):
      call('ip', '-n', space, 'addr', 'add', f'{address}/24', 'dev', CABLE)
      for device in ('lo', CABLE):
        call('ip', '-n', space, 'link', 'set', device, 'up')
      # Others probe for the rate of the link, which changes from turn to turn.
      call('ip', 'netns', 'exec', space, 'sysctl', '-qw', 'net.ipv4.tcp_congestion_control=reno')
    return self

  def __exit__(self, *_):
    for space in SPACES:
      call('ip', 'netns', 'del', space)

  def inside(self) -> list[list[str]]:
    """What the command of each process begins with.

    Gloo listens at the address that the name of the host has, so that name is the address.
    """
    return [['ip', 'netns', 'exec', space, 'unshare', '--uts', 'sh', '-c',
             f'hostname {address} && exec "$@"', 'sh']
            for space, address in zip(SPACES, ADDRESSES)]

  def shape(self, rate: int | None):
    """Lets each side send at most `rate` Mbit/s; None is no limit."""
    for space in SPACES:
      if rate:
        call('tc', '-n', space, 'qdisc', 'replace', 'dev', CABLE, 'root', 'tbf', 'rate',
             f'{rate}mbit', 'burst', '32kb', 'limit', '16mb')
      elif 'tbf' in call('tc', '-n', space, 'qdisc', 'show', 'dev', CABLE):
        call('tc', '-n', space, 'qdisc', 'del', 'dev', CABLE, 'root')

  def sent(self) -> int:
    """Bytes of data that process 0 has sent to process 1 by Gloo, none of them twice."""
    found = call('ip', 'netns', 'exec', SPACES[0], 'ss', '-tinHO', 'dst', ADDRESSES[1])
    total = 0
    for line in found.splitlines():
      if f':{self.port} ' not in line:
        count = lambda name, line=line: int((re.search(rf'\b{name}:(\d+)', line) or [0, 0])[1])
        total += count('bytes_sent') - count('bytes_retrans')
    return total


def bandwidth(rate: float) -> float:
  """Bytes of data per second on a cable that is shaped to `rate` Mbit/s."""
  return rate * 1e6 / 8 * DATA / PACKET


def call(*command: str) -> str:
  return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def measure(cable: Cable, config: str, workdir: str, run: Run, rates: Sequence[int]
            ) -> tuple[dict[int | None, float], float]:
  """Trains the run. Returns seconds of a step at each rate (None: no limit), and bytes a step."""
  job = Job(2, 1, f'--config={config}', f'--workdir={workdir}', f'--run={run.name}',
            f'--config.mesh.expert={run.workers}', inside=cable.inside(), host=ADDRESSES[0])
  cable.port = job.port
  seconds: dict[int | None, list[float]] = {rate: [] for rate in (None, *rates)}
  counted = []

  def done() -> int:
    path = os.path.join(workdir, run.name, metrics.NAME)
    return pathlib.Path(path).read_bytes().count(b'\n') if os.path.exists(path) else 0

  def steps(count: int):
    """Waits until this many steps are done, and counts bytes after each."""
    last = done()
    while last < count:
      assert all(process.poll() is None for process in job.started), job.end()
      if (now := done()) > last:
        counted.append((now, cable.sent()))
        last = now
      time.sleep(0.02)

  try:
    steps(2 * SYNC_EVERY)
    del counted[:]
    for _ in range(TURNS):
      for rate in seconds:
        cable.shape(rate)
        first = done() + SKIPPED
        first += -first % SYNC_EVERY
        steps(first + STEPS)
        took = [ROWS * LENGTH / line['tokens_per_second']
                for line in training(workdir, run.name)[first:first + STEPS]]
        seconds[rate] += np.reshape(took, (-1, SYNC_EVERY)).mean(1).tolist()
  finally:
    for process in job.started:
      process.kill()
    job.end()
    cable.shape(None)
  count, sent = np.array(counted, float).T
  medians = {rate: statistics.median(found) for rate, found in seconds.items()}
  return medians, float(np.polyfit(count, sent, 1)[0])


def check(run: Run, measured: tuple[dict[int | None, float], float]) -> bool:
  """Prints what was measured beside what the model says; whether they agree."""
  seconds, sent = measured
  # With the link open, a step takes what it computes on one of two machines.
  stage = wall_time.Training(run.name, SYNC_EVERY, 2 * seconds[None], ROWS, run.gradient_bytes,
                             run.outer)
  expected = wall_time.time_of((stage,), 2, np.inf).sent / SYNC_EVERY
  print(f'{run.name}: {sent:,.0f} bytes a step, {expected:,.0f} expected '
        f'({sent / expected - 1:+.2%}); {seconds[None]:.3f} s a step on an open link', flush=True)
  good = abs(sent / expected - 1) < 0.01
  for rate, found in seconds.items():
    if rate:
      total = wall_time.time_of((stage,), 2, bandwidth(rate)).total / SYNC_EVERY
      print(f'  {rate:4} Mbit/s: {found:.3f} s a step, {total:.3f} expected '
            f'({found / total - 1:+.1%})', flush=True)
      good &= abs(found / total - 1) < 0.2
  return good


def main():
  rates = [int(each) for each in sys.argv[1:]] or RATES
  os.environ['BTX_JAX_TOKEN'] = secrets.token_hex(16)
  with tempfile.TemporaryDirectory() as folder, Cable() as cable:
    studies.write_text(pathlib.Path(folder))
    workdir = os.path.join(folder, 'work')
    good = [check(run, measure(cable, f'{__file__}:{folder}', workdir, run, rates))
            for run in Study(get_config(folder), workdir).runs.values()]
  sys.exit(not all(good))


if __name__ == '__main__':
  os.environ.setdefault('NPROC', '8')  # with one thread, collectives would wait for each other
  main()
