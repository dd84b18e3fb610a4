"""Scores a model on the built-in tasks."""

from collections.abc import Sequence
import contextlib
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from btx_jax.data.text import Text
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.generation.generate import Generator
from btx_jax.model.config import Config
from btx_jax.run import Run
from btx_jax.scoring import bits, builtin, selected
from btx_jax.study.study import Study

_ROWS = 32  # texts generated in one batch
# On one device: a mixture then reads only the experts that a token chose.
_NO_MESH = jax.sharding.Mesh(np.empty((), object), ())


def why_not(run: Run, name: str) -> str:
  """Why a run's models cannot be scored on a task; '' if they can."""
  if not builtin.is_generated(name):
    return ''
  if run.selector:
    return 'ensembles are scored on choices only'
  return 'several processes score choices only' if jax.process_count() > 1 else ''


def of_model(study: Study, cfg: Config, parameters, names: Sequence[str], tokenizer: Tokenizer, mesh
             ) -> dict[str, dict[str, Any]]:
  """The scores of a model on tasks, by name; see builtin.summary.

  Args:
    study: its config sets what is held out, and the sizes of windows and batches.
    cfg: the model's sizes.
    parameters: its parameters.
    names: the tasks.
    tokenizer: the model's.
    mesh: the devices to use.
  """
  result = {}
  settings, length = study.config.evaluation, study.config.data.seq_len
  for name in names:
    found = builtin.of_task(name, study.config)
    if builtin.is_generated(name):
      with jax.set_mesh(_NO_MESH) if mesh.size == 1 else contextlib.nullcontext():
        result[name] = builtin.generated(found, functools.partial(
            _write, Generator(cfg, parameters, tokenizer, batch_size=_ROWS)))
    else:
      answers = builtin.choices(found, tokenizer, length, settings.stride)
      result[name] = builtin.chosen(found, answers, bits.token_nll(
          cfg, parameters, answers.tokens, mesh, length, settings.batch_size, settings.stride))
  return result


def of_ensemble(study: Study, run: Run, names: Sequence[str], text: Text, mesh
                ) -> dict[str, dict[str, Any]]:
  """The scores of an ensemble on tasks with choices, by name; see builtin.summary.

  Args:
    study: the study of the run.
    run: the ensemble. A linear selector must have been fitted.
    names: the tasks.
    text: the tokenized text; selectors by tf-idf compare with it.
    mesh: the devices to use.
  """
  found = {name: builtin.of_task(name, study.config) for name in names}
  answers = {name: builtin.choices(of_task, text.tokenizer, run.seq_len,
                                   study.config.evaluation.stride)
             for name, of_task in found.items()}
  asked = dataclasses.replace(text, held_out={name: each.tokens for name, each in answers.items()})
  nll = selected.token_nll(study, run, asked, mesh)
  return {name: builtin.chosen(of_task, answers[name], nll[name])
          for name, of_task in found.items()}


def _write(generator: Generator, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
  return [texts[0].text for texts in generator(prompts, max_new_tokens, stop=['\n'])]
