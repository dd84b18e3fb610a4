"""Opens an exported ensemble (export_ensemble.py) for `generate`."""

import dataclasses
import json
import math
import os
from typing import Any

import numpy as np

from btx_jax import base
from btx_jax.commands.export_ensemble import SELECTOR, WEIGHT, WEIGHTS
from btx_jax.convert.safetensors import File
from btx_jax.errors import UsageError
from btx_jax.files import inputs, naming, places
from btx_jax.run import ENSEMBLE, Run
from btx_jax.selector import Linear
from btx_jax.study.study import Study


def is_ensemble(folder: str) -> bool:
  """Whether a folder holds an exported ensemble."""
  return places.exists(os.path.join(folder, SELECTOR))


def opened(folder: str, chat_template: str = '') -> tuple[Study, Run, np.ndarray]:
  """Opens an exported ensemble as a run.

  Args:
    folder: the folder that `export_ensemble` wrote.
    chat_template: the name of a chat template; '' for that of the reader's tokenizer.

  Returns:
    a study with the models as runs; the ensemble; and the map [D, E] of its selector.

  Raises:
    UsageError: a file of the folder is missing or damaged.
  """
  path = os.path.join(folder, SELECTOR)
  try:
    with inputs.open_file(path) as file:
      about = json.load(file)
    names = tuple(dict.fromkeys([*about['experts'], about['reader']]))
    for name in names:  # each is that of a folder in this one
      naming.check('run', name)
    selector = Linear(
        about['kind'], rows=0, ridge=0.0, labels=tuple(about['domains']),
        reader=names.index(about['reader']), layers=about['layers'],
        forget=-1 / math.log2(about['decay']) if about['decay'] < 1 else 0.0,
        hysteresis=about['hysteresis'])
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UsageError(f'{path} is damaged ({error!r}); export the ensemble again.') from error
  config: Any = base.get_config()
  config.tokenizer.path = os.path.join(folder, about['reader'])
  config.tokenizer.chat_template = chat_template
  config.runs = {name: base.run(base.hugging_face(os.path.join(folder, name))) for name in names}
  study = Study(config, workdir='')
  models = tuple(study.runs[name] for name in names)
  run = dataclasses.replace(
      models[selector.reader], name=os.path.basename(os.path.normpath(folder)), init=ENSEMBLE,
      sources=models, expert_names=tuple(about['experts']), selector=selector, folder='')
  return study, run, File(places.local(os.path.join(folder, WEIGHTS))).read(WEIGHT).T
