"""The studies that chaos disturbs: small, and together they have every kind of run.

  --config=tests/chaos/config.py:NAME:FOLDER

NAME is a key of STUDIES, FOLDER has the text of tests/studies.py. Checkpoints, lines of
metrics.jsonl and measurements come at steps that do not divide each other.
"""

import pathlib

from btx_jax import base
from tests import studies

BLEND = {'prose': 2, 'code': 1, 'math': 1}


def paper():
  """The paper's method: whole experts, averaged and mixed, then finetuned."""
  return {
      'seed': base.run(base.random(), BLEND, steps=8),
      'expert/code': base.run(base.checkpoint('seed'), {'code': 1}, steps=7),
      'expert/math': base.run(base.checkpoint('seed'), {'math': 1}, steps=7),
      'btx': base.run(base.mix('seed', 'expert/code', 'expert/math'), BLEND, steps=9),
  }


def modular():
  """Feed-forward experts trained as one program, with routers from text; and an ensemble."""
  code, math = (studies.modular_expert(name, steps=7) for name in ('code', 'math'))
  return {
      'seed': base.run(base.random(), BLEND, steps=8),
      'expert/code': code,
      'expert/math': math,
      'btx': base.run(base.mix('expert/code', 'expert/math',
                               routers=base.from_text('ridge', rows=8, ridge=0.1)), BLEND, steps=5),
      'routed': base.run(base.ensemble('expert/code', 'expert/math',
                                       selector=base.from_text('ridge', rows=8, ridge=0.1))),
  }


def processes():
  """For two processes of one device each."""
  return {
      'seed': base.run(base.random(), BLEND, steps=8),
      'expert/code': base.run(base.checkpoint('seed'), {'code': 1}, steps=7),
      'btx': base.run(base.mix('seed', 'expert/code'), BLEND, steps=7),
  }


def later():
  """The paper's study, and runs that come later: together they read everything it left."""
  return paper() | {
      'mixed_later': base.run(base.mix('seed', 'expert/code', 'expert/math'), BLEND, steps=2),
      'continued_later': base.run(base.checkpoint('btx', state=True), BLEND, steps=2),
  }


def short():
  """For the suite: one run, compiled soon."""
  return {'seed': base.run(base.random(), BLEND, steps=7)}


STUDIES = {'short': short, 'paper': paper, 'modular': modular, 'processes': processes,
           'later': later}


def get_config(arguments: str):
  name, _, folder = arguments.partition(':')
  config = studies.get_config(pathlib.Path(folder))
  config.mesh.update(fsdp=2 if name == 'processes' else 1, expert=1, tensor=1)
  config.evaluation.update(every=4, mask_experts=name in ('paper', 'later'))
  config.log_every = 3
  config.checkpoint_every = 2
  config.runs = STUDIES[name]()
  if name == 'modular':
    config.stacked = ('expert/code', 'expert/math')
  return config
