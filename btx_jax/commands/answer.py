"""Scores a run on built-in tasks, for `evaluate --tasks`."""

from collections.abc import Sequence
from typing import Any

import jax

from btx_jax.data import text
from btx_jax.errors import UsageError
from btx_jax.run import Run
from btx_jax.scoring import answers
from btx_jax.study import params
from btx_jax.study.study import Study
from btx_jax.training import layout


def check(run: Run, names: Sequence[str]) -> None:
  """Raises UsageError if a run cannot be scored on one of these built-in tasks."""
  for name in names:
    if reason := answers.why_not(run, name):
      raise UsageError(f'--tasks={name} cannot score {run.name!r}: {reason}. Name a task that ends '
                       'in _choice.')


def scores(study: Study, run: Run, names: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Scores a model on built-in tasks, by name; see builtin.summary. Nothing is written.

  Args:
    study: the study of the run.
    run: the run, which must be complete.
    names: the tasks.
  """
  mesh = layout.mesh_here(study.config, study.runs)
  study.config.evaluation.batch_size = layout.evaluation_rows(study.config, mesh)
  with jax.set_mesh(mesh):
    if run.selector:
      return answers.of_ensemble(
          study, run, names, text.prepare(study.config, study.data_folder), mesh)
    return answers.of_model(study, run.model, params.final(study, run, mesh), names,
                            text.tokenizer(study.config, study.data_folder), mesh)
