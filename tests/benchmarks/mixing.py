"""Mixing four pretrained models from folder to folder: ours, mergekit and cp, in one go.

  python -m tests.benchmarks.mixing FOLDER [BIN] [FORM ...]

Writes models of random bits in bfloat16 into FOLDER, of the shape of SmolLM2-135M ('small') and
TinyLlama-1.1B ('large', which takes 25 GB there), and deletes them at the end. For each, after all
inputs have been read once: four become a mixture by `export`; by mergekit 0.1.5, whose commands lie
in BIN, as its average and then, with that as the base, its mixture; and cp copies what we wrote.
Prints seconds until the command ends, seconds until all of it is on the disk, and the peak memory.
Then it compares what we and mergekit wrote.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import ml_dtypes
import numpy as np

from btx_jax.convert import config_json, export, hugging_face, names, safetensors, shards
from btx_jax.model.config import Config
from tests.benchmarks import sides

FORMS = {
    'small': Config(49152, 576, 1536, 30, 9, 3, tied_head=True),
    'large': Config(32000, 2048, 5632, 22, 32, 4),
}
TOKENIZER = pathlib.Path(__file__).parents[1] / 'fixtures' / 'tokenizer'
CONFIG = '''
from btx_jax import base

def get_config():
  config = base.get_config()
  config.tokenizer.path = {first!r}
  config.runs = {{f'r{{i}}': base.run(base.hugging_face(path))
                 for i, path in enumerate({paths!r})}}
  config.runs['btx'] = base.run(base.mix(list(config.runs), allow=('seed',)))
  return config
'''
LOW_MEMORY = '--lazy-unpickle', '--out-shard-size', '500M'  # of mergekit
_BITS = 1 << 22  # random numbers, over and over again


def write(folder: pathlib.Path, model: Config, seed: int):
  """A model of random weights around 0.02."""
  shutil.copytree(TOKENIZER, folder)
  rng = np.random.default_rng(seed)
  bits = (0.02 * rng.standard_normal(_BITS, np.float32)).astype(ml_dtypes.bfloat16)
  size = names.sizes(model)
  tensors = {name: names.stored_shape(row, size) for row in names.rows(model)
             for name, _ in names.tensors_of(row, size)}

  def pieces(name):
    rows, rest = tensors[name][0], int(np.prod(tensors[name][1:]))
    step = _BITS // rest // 2
    for start in range(0, rows, step):
      stop = min(start + step, rows)
      at = int(rng.integers(_BITS // 2))
      yield (bits[at:at + (stop - start) * rest].reshape(-1, *tensors[name][1:]),
             (slice(start, stop),), tensors[name])

  shards.write(str(folder), tensors, bits.dtype, pieces, export.MAX_SHARD)
  (folder / 'config.json').write_text(json.dumps(
      config_json.to_json(model, 'bfloat16', 2048, 0.0, 0, 1)))


def timed(*command: str):
  """Runs a command: what it printed, its seconds, those until all is on the disk, and its usage."""
  os.sync()
  began = time.monotonic()
  process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  with process.stdout as out:
    said = out.read().decode()
  _, status, used = os.wait4(process.pid, 0)
  ended = time.monotonic()
  os.sync()
  if status:
    sys.exit(said)
  return said, ended - began, time.monotonic() - began, used


def measure(title: str, *command: str):
  """Runs a command; prints its costs."""
  said, seconds, on_disk, used = timed(*command)
  print(f'{title:24} {seconds:8.1f} {on_disk:8.1f} '
        f'{used.ru_maxrss / 1024:8.0f} {used.ru_utime + used.ru_stime:8.1f} '
        f'{os.getloadavg()[0]:8.1f}', flush=True)
  return said


def compare(ours: str, theirs: str):
  """Experts have the same bits; averages differ by rounding."""
  ours, theirs = hugging_face.Folder(ours), hugging_face.Folder(theirs)
  worst, one = 0.0, slice(1, 2)
  for path in ours.shapes:
    if path.startswith('layers/') and not path.endswith('router'):
      index = (one, one) if '/experts/' in path else (one,)
      a, b = ours.read(path, index), theirs.read(path, index)
      if '/experts/' in path:
        assert np.array_equal(a.view(np.uint16), b.view(np.uint16)), path
      else:
        a, b = a.astype(np.float32), b.astype(np.float32)
        worst = max(worst, float(np.abs(a - b).max() / np.abs(a).max()))
  print(f'Expert 1 of layer 1 has the same bits; averages there differ by {worst:.1e} of the '
        'largest number', flush=True)


def beside_cp(folder: pathlib.Path, turns: int, form: str = 'large') -> dict[str, list[sides.Cost]]:
  """The costs of mixing four models and of cp of the result, in turns, until all is on the disk."""
  root = folder / 'mixing'
  root.mkdir()
  try:
    ours, copy = root / 'ours', root / 'copy'
    export_ours = export_command(root, form, ours)
    commands = {'mixing ours': (export_ours, ours), 'mixing cp': (('cp', '-r', ours, copy), copy)}

    def call(command, written):
      shutil.rmtree(written, ignore_errors=True)
      _, _, on_disk, used = timed(*map(str, command))
      return sides.Cost(on_disk, used.ru_utime + used.ru_stime)

    for command, written in commands.values():  # the first is to warm up
      call(command, written)
    costs = {name: [] for name in commands}
    for _ in range(turns):  # cp needs what ours has written
      for name, each in commands.items():
        costs[name].append(call(*each))
    return costs
  finally:
    shutil.rmtree(root)


def export_command(root: pathlib.Path, form: str, ours: pathlib.Path) -> tuple[str, ...]:
  """Writes four models, and returns the command that makes them a mixture in the folder `ours`."""
  paths = [str(root / f'{form}{i}') for i in range(4)]
  for i, path in enumerate(paths):
    write(pathlib.Path(path), FORMS[form], i)
  config = root / f'{form}.py'
  config.write_text(CONFIG.format(first=paths[0], paths=paths))
  return (sys.executable, '-m', 'btx_jax.main', f'--config={config}', '--run=btx', 'export',
          f'--to={ours}', f'--workdir={root / "work"}')


def run(root: pathlib.Path, form: str, commands: pathlib.Path | None):
  paths, ours = [str(root / f'{form}{i}') for i in range(4)], root / f'{form}_ours'
  export_ours = export_command(root, form, ours)
  read = sum(len(block) for path in paths for file in pathlib.Path(path).glob('*.safetensors')
             for block in _blocks(file))
  print(f'\n{form}: 4 models, {read / 1e9:.2f} GB\n{"":24} {"seconds":>8} {"on disk":>8} '
        f'{"peak MB":>8} {"CPU s":>8} {"load":>8}', flush=True)
  said = measure('ours', *export_ours)
  if commands:
    linear, moe = root / f'{form}_linear', root / f'{form}_moe'
    merge = {'merge_method': 'linear', 'dtype': 'bfloat16',
             'models': [{'model': path, 'parameters': {'weight': 1.0}} for path in paths]}
    (root / 'linear.yml').write_text(json.dumps(merge))
    mixture = {'base_model': str(linear), 'gate_mode': 'random', 'dtype': 'bfloat16',
               'experts': [{'source_model': path, 'positive_prompts': ['']} for path in paths]}
    (root / 'moe.yml').write_text(json.dumps(mixture))
    measure('mergekit-yaml (linear)', str(commands / 'mergekit-yaml'), str(root / 'linear.yml'),
            str(linear), *LOW_MEMORY)
    measure('mergekit-moe', str(commands / 'mergekit-moe'), str(root / 'moe.yml'), str(moe),
            *LOW_MEMORY)
  measure('cp of what we wrote', 'cp', '-r', str(ours), str(root / f'{form}_copy'))
  print(said.strip().splitlines()[-1])
  if commands:
    compare(str(ours), str(moe))


def _blocks(path: pathlib.Path):
  with open(path, 'rb') as file:
    while block := file.read(safetensors.PIECE):
      yield block


def main():
  root, *rest = sys.argv[1:]
  commands = pathlib.Path(rest.pop(0)) if rest and rest[0] not in FORMS else None
  root = pathlib.Path(root) / 'mixing'
  root.mkdir()
  try:
    for form in rest or FORMS:
      run(root, form, commands)
      for path in root.glob(f'{form}*'):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
  finally:
    shutil.rmtree(root)


if __name__ == '__main__':
  main()
