"""The real command, as one or several processes of this machine, with fake devices."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
import os
import re
import socket
import subprocess
import sys
import time

from btx_jax.training import metrics

# What Gloo's threads print from C++ piece by piece, so that lines of it may be mixed.
_GLOO = re.compile(r'\[Gloo\] Rank | is connected to | peer ranks\. |'
                   r'Expected number of connected peer ranks is : |\d+')
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Seconds after which a command surely hangs, also on a machine that does much else.
PATIENCE = 900


class Job:
  """A command as one or several processes of this machine.

  Args:
    processes: how many.
    devices: of each.
    arguments: of the command.
    last: further arguments of the last process alone.
    slurm: as `srun` would start it, so that jax finds the processes itself.
    inside: for each process the words that its command begins with, such as `taskset -c 0`.
    host: of process 0, as the others reach it.
  """

  def __init__(self, processes: int, devices: int, *arguments: str, last: tuple[str, ...] = (),
               slurm: bool = False, inside: Sequence[Sequence[str]] = (), host: str = 'localhost'):
    self.port = port = free_port()
    self.started = []
    for index in range(processes):
      environment = {**os.environ, 'PYTHONPATH': ROOT, 'JAX_PLATFORMS': 'cpu',
                     'JAX_NUM_CPU_DEVICES': str(devices)}
      place = []
      if slurm:
        place = ['--distributed']
        environment |= {
            'SLURM_JOB_ID': '1', 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_LOCALID': str(index),
            'SLURM_NTASKS': str(processes), 'SLURM_PROCID': str(index),
            'JAX_COORDINATOR_PORT': str(port)}
      elif processes > 1:
        place = [f'--coordinator={host}:{port}', f'--num_processes={processes}',
                 f'--process_id={index}']
      more = last if index == processes - 1 else ()
      self.started.append(subprocess.Popen(
          [*(inside[index] if inside else ()), sys.executable, '-m', 'btx_jax.main', *arguments,
           *place, *more], cwd=ROOT,
          env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))

  def end(self, timeout: float = PATIENCE) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each process, but for what Gloo prints from C++."""
    result = []
    try:
      with ThreadPoolExecutor(len(self.started)) as pool:
        outputs = list(pool.map(lambda p: p.communicate(timeout=timeout), self.started))
    finally:
      for process in self.started:
        process.kill()
    for process, (out, errors) in zip(self.started, outputs):
      lines = [line for line in out.splitlines()
               if not line.startswith('[Gloo]') and _GLOO.sub('', line).strip()]
      result.append((process.returncode, '\n'.join(lines), errors))
    return result


def free_port() -> int:
  with socket.socket() as found:
    found.bind(('', 0))
    return found.getsockname()[1]


def until(holds):
  end = time.monotonic() + PATIENCE
  while not holds():
    assert time.monotonic() < end, 'waited in vain'
    time.sleep(0.05)


def training(workdir, name: str) -> list[dict]:
  return [line for line in metrics.read(os.path.join(workdir, name)) if 'loss' in line]
