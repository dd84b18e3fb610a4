"""Branch-Train-MiX (arXiv 2403.07816) in JAX and Flax.

Branch a pretrained Llama into one copy per domain, train the copies without any communication, mix
them into one mixture-of-experts model, and finetune that. As a command: `btx --config=demo`. As a
library, all of it on plain parameter trees (docs/library.md):

  Config, Llama         a model's sizes, and the network
  load, save, logits    a Hugging Face folder or a run directory in; a folder out; a forward pass
  generate              continues prompts; Generator and Sampling give more control
  evaluate              scores tasks of lm-evaluation-harness
  branch, stack         copies of a seed; experts that were trained apart, in the same form
  average, mix, Recipe  the dense baseline; the mixture of experts, and what it is made of
  make_train_step       the train step of experts and mixtures alike; create_state, its state

Names are imported when they are first used, so `import btx_jax` takes no time.

The letters after an underscore name the dimensions of an array:

  B  batch rows             T  positions in a row       D  model width
  F  feed-forward width     V  vocabulary               L  layers
  N  attention heads        K  key-value heads          H  head size
  E  experts                k  experts per token        C  expert capacity
  G  groups: of tokens in statistics, of query heads in attention

and on one device, while tokens are at their experts:

  n  tokens                 p  pairs (token, choice)    s  slots that rows are moved to
  S  devices that share     e  experts of the device    R  rows of an expert's buffer, S * C
     the experts            r  rows of all its experts  m  rows of one matmul
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from btx_jax.btx import average, branch, mix, stack
  from btx_jax.generation.generate import Generator, generate
  from btx_jax.generation.settings import Sampling
  from btx_jax.library import load, logits, save
  from btx_jax.model.config import Config
  from btx_jax.model.llama import Llama
  from btx_jax.recipe import Recipe
  from btx_jax.scoring.tasks import evaluate
  from btx_jax.training.step import create_state, make_train_step

  __version__: str

_HOME = {
    'Config': 'model.config', 'Generator': 'generation.generate', 'Llama': 'model.llama',
    'Recipe': 'recipe', 'Sampling': 'generation.settings', 'average': 'btx', 'branch': 'btx',
    'create_state': 'training.step', 'evaluate': 'scoring.tasks',
    'generate': 'generation.generate', 'load': 'library', 'logits': 'library',
    'make_train_step': 'training.step', 'mix': 'btx', 'save': 'library', 'stack': 'btx'}

__all__ = ['Config', 'Generator', 'Llama', 'Recipe', 'Sampling', '__version__', 'average', 'branch',
           'create_state', 'evaluate', 'generate', 'load', 'logits', 'make_train_step', 'mix',
           'save', 'stack']


def __getattr__(name: str) -> Any:
  if name == '__version__':
    from importlib import metadata
    return metadata.version('btx_jax')
  if name not in _HOME:
    raise AttributeError(f'module btx_jax has no attribute {name!r}; it has {", ".join(__all__)}.')
  return getattr(import_module(f'btx_jax.{_HOME[name]}'), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
