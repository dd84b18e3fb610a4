"""Exports an ensemble: a Hugging Face folder for each model, and a linear selector beside them."""

from collections.abc import Iterator
import json
import os

import numpy as np

from btx_jax.commands.export import check_complete, export_run, identity, scores_section
from btx_jax.convert import export, unfinished
from btx_jax.convert.safetensors import Writer
from btx_jax.errors import UsageError
from btx_jax.escaping import markdown
from btx_jax.files import writing
from btx_jax.run import Run, linear_of, reader_model
from btx_jax.selector import Merge
from btx_jax.study import routers
from btx_jax.study.study import Study
from btx_jax.terminal import say

SELECTOR, WEIGHTS = 'selector.json', 'selector.safetensors'
WEIGHT = 'weight'  # as torch's Linear has it


def export_ensemble(study: Study, name: str, folder: str, dtype: str) -> None:
  """Writes the models of an ensemble, as `export_run` does, into folders that have their names.

  Beside them are selector.safetensors, selector.json and a README.md that says how to use them.
  All is written to FOLDER.partial, which is renamed in the end. After an interruption, the next
  call for the same export keeps the models that are complete there.

  Args:
    study: the study of the run.
    name: name of the ensemble.
    folder: the folder to write; must not exist, or be empty.
    dtype: dtype of the models' weights; the selector's are float32.

  Raises:
    UsageError: the selector is not linear or not fitted, a model is not complete, FOLDER.partial
      has files that this export did not write, or see export_run.
  """
  run = study.run(name)
  if isinstance(run.selector, Merge):
    raise UsageError(f'{name!r} weights its experts by base.{run.selector.kind}, and only a linear '
                     'selector can be exported: make an ensemble with '
                     "selector=base.from_text('ridge'), or export each expert, "
                     f'{", ".join(run.expert_names)}.')
  export.check(folder, run.model, dtype)
  check_complete(study, run)
  columns_1DE = routers.of(study, run)
  assert columns_1DE is not None
  this = {'identity': identity(study, run), 'dtype': dtype}
  if not unfinished.was_completed(folder, this):
    with unfinished.folder_for(folder) as partial:
      _write(study, run, columns_1DE[0], partial, dtype, this)
      export.check(folder, run.model, dtype)  # another process may have finished it just now
  say(f'{name} is in {folder}: {len(run.sources)} models and their selector')


def _write(study: Study, run: Run, columns_DE: np.ndarray, partial: str, dtype: str, this: dict
           ) -> None:
  """Writes what the unfinished folder lacks."""
  unfinished.begin_several(partial, this)
  # Sorted, because 'expert' must be there before 'expert/code' is written into it.
  for source in sorted(run.sources, key=lambda source: source.plain_name):
    into = os.path.join(partial, source.plain_name)
    if not os.path.exists(os.path.join(into, 'config.json')) or unfinished.is_marked(into):
      export_run(study, source.name, into, dtype)
  weight_ED = np.ascontiguousarray(columns_DE.T)
  with Writer(os.path.join(partial, WEIGHTS),
              {WEIGHT: (weight_ED.shape, weight_ED.dtype)}) as writer:
    writer.write(WEIGHT, weight_ED)
  with writing.replacing(os.path.join(partial, SELECTOR)) as file:
    json.dump(about(run), file, indent=2)
  with writing.replacing(os.path.join(partial, export.CARD)) as file:
    file.writelines(_card(study, run))


def about(run: Run) -> dict:
  """The contents of selector.json: all that is needed to choose an expert but the weights."""
  settings = linear_of(run)
  return {'reader': run.reader.plain_name, 'layers': reader_model(run).num_layers,
          'experts': [expert.plain_name for expert in run.experts],
          'domains': list(settings.labels), 'decay': settings.decay,
          'hysteresis': settings.hysteresis, 'kind': settings.kind}


def _card(study: Study, run: Run) -> Iterator[str]:
  """Yields the text of README.md."""
  yield f'# {markdown(run.name)}\n\n{_USE}\n| expert | chosen for text like |\n|---|---|\n'
  for expert, domain in zip(run.experts, linear_of(run).labels):
    yield f'| {markdown(expert.plain_name)} | {markdown(domain)} |\n'
  yield from scores_section(study, run)


_USE = """An ensemble, made with btx_jax: whole models, each in a folder of its own that
transformers loads, of which one predicts each token. A selector chooses it from the text so far:
the mean, over the document so far, of the reader's hidden states, times `weight` of
selector.safetensors. The largest logit wins; another expert takes over only if its logit leads by
more than `hysteresis`. With `decay` below 1, earlier hidden states count less.

```python
import json

from safetensors.torch import load_file
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

about = json.load(open('selector.json'))
weight = load_file('selector.safetensors')['weight']  # [experts, width]
reader = AutoModelForCausalLM.from_pretrained(about['reader'], dtype=torch.float32).model
reader.layers = reader.layers[:about['layers']]
tokenizer = AutoTokenizer.from_pretrained(about['reader'])


@torch.no_grad()
def choose(text):
  \"\"\"The folder of the model that should predict the next token.\"\"\"
  states = reader(**tokenizer(text, return_tensors='pt'), use_cache=False).last_hidden_state[0]
  total, count, chosen = 0.0, 0.0, None
  for logits in states @ weight.T:
    total, count = about['decay'] * total + logits, about['decay'] * count + 1
    best = int(total.argmax())
    if chosen is None or (total[best] - total[chosen]) / count > about['hysteresis']:
      chosen = best
  return about['experts'][chosen]
```

A model that takes over reads the whole text first. While one generates, keep `total`, `count` and
the reader's cache, and add each new token to them.
"""
