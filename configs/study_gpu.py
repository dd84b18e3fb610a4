"""Is it worth it for your text? The main rows of configs/study.py, from a pretrained model.

SmolLM2-135M, or another dense model in a Hugging Face folder, is the seed. Each domain gets an
expert, and every row spends the FLOPs of all experts together. It needs one GPU, or several of one
host. docs/gpu_node.md has its time and memory by preflight; no GPU has run it yet.

  python -m btx_jax.main --config=configs/study_gpu.py:MODEL,code=/data/code,math=/data/math

After the colon, in any order, with commas between them:

  MODEL      the seed's folder; /models/SmolLM2-135M if it is left out.
  NAME=PATH  a domain, and its text: a folder, a glob or a file. At least two get experts. `general`
             gets none: it stands for the text that the seed learned, which is not at hand. Without
             it, the rows `dense/new` and `dense/replay` are left out, and the seed is no expert in
             the rows where text sets routers or a selector (`merge/learned`, `btx/ridge`,
             `ffn/ridge` and `ffn/finetuned`). If no domain is named, the text is that of
             configs/demo.py, with its prose in place of `general`.
  steps=N    steps of an expert, 4 or more, of about 65,536 tokens each. The default is 1,000: give
             a domain 20 M tokens or more, and no row reads them more than four times. The demo's
             text has about 2 M tokens per domain: there the default is 120.
  rates      instead of the rows, each kind of run at three learning rates, half as long, with a
             seed that is in no table. RATES is where the rows take theirs from.
"""

import re

from btx_jax import base
from btx_jax.configs import smollm2_135m, study

MODEL = '/models/SmolLM2-135M'
GENERAL = 'general'
STEPS, STEPS_OF_DEMO = 1000, 120  # of an expert
ROWS = 64  # a step, or the nearest number that the workers of DiLoCo and eight devices can share
# Not tuned: the smallest candidate for all families, because the seed's own rate ended far below.
RATES = dict.fromkeys(study.RATES, 3e-4)
_FORM = '[MODEL][,NAME=PATH,NAME=PATH...][,steps=N][,rates]'


def get_config(form: str = ''):
  folder, text, steps, of_rates = _parsed(form)
  config = study.get_config('rates' if of_rates else '')
  if text:
    config.domains = {name: base.domain(path) for name, path in text.items()}
  old = GENERAL if GENERAL in text else '' if text else study.OLD
  setting = study.Setting(
      new=tuple(name for name in text if name != GENERAL) or study.NEW, old=old,
      expert=steps or (STEPS if text else STEPS_OF_DEMO), rates=RATES)

  config.tokenizer.path = folder
  config.data.seq_len = 1024
  config.model = smollm2_135m.get_config(folder).model
  config.model.update(dtype='bfloat16', remat='projections')
  shared = 8 * len(setting.blend)
  config.train.batch_size = max(round(ROWS / shared), 1) * shared
  # The workers of DiLoCo and the experts of mixtures share this axis of devices. Without a general
  # domain they differ in number.
  config.mesh.expert = 0 if old else 1
  config.evaluation.update(tokens=131_072, batch_size=0)
  config.checkpoint_every = 250
  config.checkpoints_kept = 1
  config.rows = 'docs/study/rows_gpu'
  rows = study.rates(setting) if of_rates else study.main(setting=setting)
  config.runs = {'seed': base.run(base.hugging_face(folder)), **rows}
  return config


def _parsed(form: str) -> tuple[str, dict[str, str], int, bool]:
  """What the form asks for: the model's folder, text by domain, steps (0: by default), `rates`."""
  folders, text, steps, of_rates = [], {}, 0, False
  for part in form.split(',') if form else ():
    name, equals, value = part.partition('=')
    if part == 'rates':
      of_rates = True
    elif not equals:
      folders.append(part)
    elif name == 'steps':
      steps = int(value) if re.fullmatch('[0-9]{1,9}', value) else 0
      if steps < 4:
        raise _error(f'{part!r} is not a number of steps, which is a whole number from 4')
    elif not re.fullmatch(r'\w[\w.-]*', name):
      raise _error(f'{name!r} cannot be the name of a domain here, because it also names runs: use '
                   'letters, digits, - and _')
    elif not value:
      raise _error(f'{name!r} has no path')
    elif name in text:
      raise _error(f'{name!r} is named twice; a glob can name several files')
    else:
      text[name] = value
  if len(folders) > 1 or '' in folders:
    raise _error(f'it names {len(folders)} folders of a model: {folders}')
  experts = [name for name in text if name != GENERAL]
  if text and len(experts) < 2:
    raise _error(f'domains that get an expert: {", ".join(experts) or "none"}. Two or more are '
                 f'needed, and {GENERAL!r} gets none')
  return folders[0] if folders else MODEL, text, steps, of_rates


def _error(what: str) -> ValueError:
  return ValueError(f'configs/study_gpu.py:{_FORM}: {what}.')
