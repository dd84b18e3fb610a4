"""Trains a small study on fifteen disks that are too small, or just large enough.

  python -m tests.benchmarks.disk [NUMBER]

Each disk is a tmpfs, so this needs root on Linux; NUMBER tries only so many sizes. A study must be
complete, or end with the sentence of a full disk. The disk is then made large, and the same command
must reach the parameters, optimizer state, scores and metrics of a study on a large disk.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

from btx_jax.training import metrics, slices
from tests import studies

LARGE = 1 << 30  # bytes
# Shares of the space that the finished study takes, which is the most it ever takes.
SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
SENTENCE = re.compile(r'btx_jax: .*(No space is left for|no space is left for)')
_OF_THE_MACHINE = ('time', 'tokens_per_second', 'mfu', 'input_wait', 'memory')

CONFIG = '''
import pathlib
from tests import studies

def get_config():
  config = studies.get_config(pathlib.Path({text!r}))
  config.mesh.update(fsdp=1, expert=1, tensor=1)
  config.runs = {{name: config.runs[name] for name in ('seed', 'expert/code')}}
  return config
'''


def train(config: pathlib.Path, work: pathlib.Path, cache: pathlib.Path) -> tuple[int, str]:
  """Runs the command; returns its exit code and all that it prints."""
  done = subprocess.run(
      [sys.executable, '-m', 'btx_jax', f'--config={config}', f'--workdir={work / "study"}'],
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': str(cache),
           'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'},
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
  return done.returncode, done.stdout


def result(work: pathlib.Path) -> dict:
  """What must be equal: the checksums of the last checkpoints, the scores and the metrics."""
  found = {}
  for manifest in sorted((work / 'study').rglob('manifest.json')):
    folder = manifest.parent
    values = json.loads(manifest.read_text())
    values = values.get('content', values)
    checkpoints = str(folder / 'checkpoints')
    step = slices.kept_steps(checkpoints)[-1]
    saved = slices.Saved(checkpoints, step, values['identity'])
    saved.check_all()
    lines = [{key: value for key, value in line.items() if key not in _OF_THE_MACHINE}
             for line in metrics.read(str(folder))]
    sums = {path: values for path, values in saved.sums().items()
            if path != 'data'}  # the position, with the checksum of metrics.jsonl
    found[values['name']] = step, sums, lines, [
        file.read_text() for file in sorted(folder.glob('*_*.json'))]
  return found


def differences(found: dict, expected: dict) -> list[str]:
  """What of each run differs."""
  parts = ('step', 'checksums', 'metrics', 'scores')
  return [f'{part} of {name}' for name, values in expected.items()
          for part, one, other in zip(parts, values, found.get(name, [None] * len(parts)))
          if one != other]


def mount(folder: pathlib.Path, size: int, *options: str) -> None:
  """Mounts a tmpfs, or with 'remount' changes its size."""
  subprocess.run(['mount', '-t', 'tmpfs', '-o', ','.join([f'size={size}', *options]), 'tmpfs',
                  str(folder)], check=True)


def main():
  number = int(sys.argv[1]) if len(sys.argv) > 1 else len(SHARES)
  with tempfile.TemporaryDirectory() as folder:
    base = pathlib.Path(folder)
    work, cache, text = base / 'work', base / 'cache', base / 'text'
    work.mkdir()
    text.mkdir()
    studies.write_text(text)
    (base / 'mine.py').write_text(CONFIG.format(text=str(text)))
    mount(work, LARGE)
    try:
      code, output = train(base / 'mine.py', work, cache)
      assert code == 0, output
      expected = result(work)
      free = os.statvfs(work)
      needed = (free.f_blocks - free.f_bfree) * free.f_frsize
      print(f'the study takes {needed:,} bytes', flush=True)
      bad = 0
      for share in SHARES[::-(-len(SHARES) // number)]:
        subprocess.run(['umount', str(work)], check=True)
        size = int(needed * share) // 4096 * 4096
        mount(work, size)
        began = time.monotonic()
        code, output = train(base / 'mine.py', work, cache)
        last = output.strip().splitlines()[-1] if output.strip() else ''
        outcome = ('complete' if not code else 'full' if SENTENCE.match(last) else 'WRONG')
        failed = output.count('could not be saved')
        mount(work, LARGE, 'remount')
        code, again = train(base / 'mine.py', work, cache)
        differing = differences(result(work), expected) if code == 0 else ['exit code']
        equal = f'DIFFERENT: {", ".join(differing)}' if differing else 'equal'
        bad += outcome == 'WRONG' or bool(differing)
        print(f'{size:>10,} bytes: {outcome}, {failed} lines on failed saves, then {equal} '
              f'({time.monotonic() - began:.0f} s)\n  {last[:240]}', flush=True)
        if outcome == 'WRONG' or differing:
          print(output[-3000:], again[-1500:] if code else '', flush=True)
      print(f'wrong outcomes: {bad}')
    finally:
      subprocess.run(['umount', str(work)], check=False)
  sys.exit(bool(bad))


if __name__ == '__main__':
  main()
