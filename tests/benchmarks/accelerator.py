"""Times train steps on the GPUs or TPUs of this machine, beside what preflight says of them.

  python -m tests.benchmarks.accelerator [--seconds=420] [--out=accelerator.json] [--quick]

gpu.sh and tpu.sh, in this folder, run the tests of the kernels first. Models are dense or have one
or four experts per device, in each form of dispatch. A line shows the seconds of a step and its
memory, each beside what preflight reads in the compiled program, and MFU. With the file that this
writes, `preflight --measured=accelerator.json` prints forecasts beside its bounds.

Each case is a process of its own. One that crashes, takes too long or does not fit is a line with
the reason, and the others go on; cases for which no time is left are lines too. --quick is a tiny
model, which runs anywhere.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from btx_jax import base
from btx_jax.configs import smollm2_135m, tinyllama_1b

_TRITON = 'JAX_RAGGED_DOT_USE_GPU_PALLAS_TRITON_LOWERING'
_LONGEST = 120.0  # seconds of a case
_TIMED = 5.0  # seconds of steps, once they are compiled
_MOST_STEPS = 50
_TINY = dict(vocab_size=64, dim=16, ffn_dim=32, num_layers=2, num_heads=2, num_kv_heads=2)
# Rows per device, and their length.
_ROWS = {'135M': (16, 2048), '1.1B': (8, 2048), 'tiny': (2, 32)}


@dataclasses.dataclass(frozen=True)
class Case:
  """A program to time.

  Attributes:
    model: a key of _ROWS.
    experts: on each device; 0 is a dense model.
    dispatch: as in the config.
    attention: as in the config.
    triton: whether grouped matmuls ('gather') are jax's Triton kernel, on a GPU.
    automatic: whether the config would choose this form of dispatch and of attention by itself.
  """
  model: str
  experts: int = 0
  dispatch: str = 'auto'
  attention: str = 'auto'
  triton: bool = False
  automatic: bool = True

  @property
  def name(self) -> str:
    of = f'{self.experts} expert(s) a device, {self.dispatch}' if self.experts else 'dense'
    return f'{self.model} {of}{" by Triton" * self.triton}, attention {self.attention}'


def cases(platform: str, quick: bool) -> list[Case]:
  """What to time, the most important first."""
  from btx_jax.model.config import DISPATCHES
  from btx_jax.model.overhead import dispatch_of
  models, forms, chosen = ('135M', '1.1B'), DISPATCHES[1:], dispatch_of(platform)
  if quick:
    models, forms = ('tiny',), ('pieces',)
  found = [Case(model) for model in models]
  for experts in (4,) if quick else (4, 1):
    for form in sorted(forms, key=lambda form: form != chosen):
      found += [Case(model, experts, form, automatic=form == chosen) for model in models]
    if platform == 'gpu' and not quick:
      found += [Case(model, experts, 'gather', triton=True, automatic=False) for model in models]
  if platform != 'cpu':
    found += [Case(model, attention='xla', automatic=False) for model in models]
  return found


def config_of(case: Case, devices: int):
  """The config of a case: a run `dense`, and a run `mixture` if it has experts."""
  config = base.get_config()
  if case.model == 'tiny':
    config.model.update(_TINY)
  else:
    recipe = smollm2_135m if case.model == '135M' else tinyllama_1b
    config.model.update(recipe.get_config().model)
    config.model.update(dtype='bfloat16', remat='projections')
  config.model.update(dispatch=case.dispatch, attention=case.attention)
  rows, config.data.seq_len = _ROWS[case.model]
  config.train.update(batch_size=rows * devices, microbatches=1)
  config.mesh.update(data=1, fsdp=-1, expert=devices if case.experts else 1, tensor=1)
  config.domains = {'text': base.domain('/none')}
  config.tokenizer.vocab_size = config.model.vocab_size
  config.runs = {'dense': base.run(base.random(), {'text': 1}, steps=1000)}
  if count := case.experts * devices:
    config.runs.mixture = base.run(base.mix(*['dense'] * count), {'text': 1}, steps=1000,
                                   model={'top_k': min(2, count)})
  return config


def time_case(case: Case) -> dict:
  """Compiles a case for the devices of this process, and times its steps.

  Returns:
    a row of the file: what was measured and what was predicted, in seconds and bytes.
  """
  import jax

  from btx_jax.devices import hardware
  from btx_jax.preflight import measure
  from btx_jax.preflight.topology import Topology
  from btx_jax.run import RANDOM
  from btx_jax.study import params
  from btx_jax.study.study import Study
  from btx_jax.training import layout
  from btx_jax.training.program import make_program
  from tests.benchmarks import turns
  devices = jax.devices()
  config = config_of(case, len(devices))
  study = Study(config, '/none', at_hand=False)
  chip = hardware.chip_of_kind(devices[0].device_kind)
  name = 'mixture' if case.experts else 'dense'
  predicted, = measure.programs(
      study, Topology(devices[0].device_kind, chip, devices, jax.__version__), only=name)
  if predicted.error:
    return {'error': predicted.error}
  run = study.runs[name]
  mesh = layout.mesh(config, study.runs, devices, chip.memory if chip else None)
  with jax.set_mesh(mesh):
    program = make_program([run], mesh, 1)
    state = program.create_state(
        params.initial(study, dataclasses.replace(run, init=RANDOM), mesh))
    batch = program.global_batch(turns.batch(run.model.vocab_size, run.batch_size, run.seq_len))
    seconds: list[float] = []
    while len(seconds) < 5 or (sum(seconds) < _TIMED and len(seconds) < _MOST_STEPS):
      began = time.perf_counter()
      state, metrics = program.step(state, batch, [True])
      jax.device_get(metrics)
      seconds.append(time.perf_counter() - began)
  step = statistics.median(seconds[2:])
  cost = predicted.cost if chip else None
  return {
      'seconds': step, 'steps': len(seconds) - 2, 'tokens': predicted.tokens,
      'flops_per_token': predicted.flops_per_token,
      'bound': cost.seconds if cost else None,
      'mfu': (predicted.tokens * predicted.flops_per_token
              / (step * len(devices) * chip.flops) if chip else None),
      'peak': hardware.peak_memory().get('device'), 'predicted_peak': predicted.peak}


def measured(case: Case, seconds: float, cache: str) -> dict:
  """The row of a case, timed by a process of its own within `seconds`; with `error` if it fails."""
  environment = {**os.environ, _TRITON: str(case.triton).lower(),
                 # Preflight and the run compile the same program: the second reads it.
                 'JAX_COMPILATION_CACHE_DIR': cache,
                 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  command = [sys.executable, '-m', 'tests.benchmarks.accelerator',
             f'--case={json.dumps(dataclasses.asdict(case))}']
  found = {'name': case.name, **dataclasses.asdict(case)}
  try:
    ended = subprocess.run(command, env=environment, capture_output=True, text=True,
                           timeout=seconds, check=False)
  except subprocess.TimeoutExpired:
    return found | {'error': f'was stopped after {seconds:.0f} s'}
  if ended.returncode:
    said = ended.stderr.strip().splitlines() or ['it said nothing']
    why = next((line for line in said if 'RESOURCE_EXHAUSTED' in line), said[-1])
    return found | {'error': f'exit code {ended.returncode}: {why.strip()[:300]}'}
  return found | json.loads(ended.stdout.splitlines()[-1])


def here() -> dict:
  """The devices of this machine, as a process that ends afterwards sees them."""
  code = ('import jax, json; from btx_jax.devices.hardware import chip_of_kind; '
          'd = jax.devices(); print(json.dumps({"platform": d[0].platform, '
          '"device_kind": d[0].device_kind, "devices": len(d), "jax": jax.__version__}))')
  said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  return json.loads(said.stdout.splitlines()[-1])


def line(row: dict) -> str:
  """A row in words."""
  if 'error' in row:
    return f'{row["name"]:52} {row["error"]}'
  bound, mfu, peak = (row[name] for name in ('bound', 'mfu', 'peak'))
  return ' '.join((
      f'{row["name"]:52} {row["seconds"]:8.4f} s',
      f'(bound {bound:.4f} s, {row["seconds"] / bound:.2f} times it)' if bound else '',
      f'MFU {mfu:.1%}' if mfu else '',
      f'{peak / 1e9:.2f} GB (predicted {row["predicted_peak"] / 1e9:.2f})' if peak else ''))


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--seconds', type=float, default=420.0)
  parser.add_argument('--out', default='accelerator.json')
  parser.add_argument('--quick', action='store_true')
  parser.add_argument('--case')
  flags = parser.parse_args()
  if flags.case:
    print(json.dumps(time_case(Case(**json.loads(flags.case)))))
    return
  end = time.monotonic() + flags.seconds
  machine = here()
  platform = 'gpu' if machine['platform'] in ('gpu', 'cuda') else machine['platform']
  rows = []
  with tempfile.TemporaryDirectory() as cache:
    for case in cases(platform, flags.quick):
      left = min(end - time.monotonic(), _LONGEST)
      rows.append(measured(case, left, cache) if left > 0 else
                  {'name': case.name, **dataclasses.asdict(case), 'error': 'no time was left'})
      print(line(rows[-1]), flush=True)
      # Written each time: what was measured stays if this is killed.
      with open(flags.out, 'w', encoding='utf-8') as file:
        json.dump({**machine, 'xla_flags': os.environ.get('XLA_FLAGS', ''), 'rows': rows}, file,
                  indent=1)
  print(f'written to {flags.out}, for preflight --measured={flags.out}')
  if not any('seconds' in row for row in rows):
    sys.exit('nothing could be measured')


if __name__ == '__main__':
  main()
