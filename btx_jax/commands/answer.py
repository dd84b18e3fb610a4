"""`evaluate --tasks`: scores a run or a pretrained model on built-in tasks."""

from collections.abc import Sequence
import json

import jax

from btx_jax import terminal
from btx_jax.commands import models, tasks_table
from btx_jax.data import text
from btx_jax.devices import hardware
from btx_jax.errors import UsageError
from btx_jax.scoring import answers, builtin
from btx_jax.study import params
from btx_jax.study.study import Study
from btx_jax.training import layout

_LENGTH = 256  # tokens of a window without a config; questions are short


def print_scores(study: Study | None, run_name: str, folder: str, names: Sequence[str],
                 as_json: bool) -> None:
  """Scores a model on built-in tasks and prints the scores. Nothing is written.

  Args:
    study: the study of the run; None if there is no config, and then `folder` is given.
    run_name: the run; '' if a folder is scored.
    folder: a pretrained model in Hugging Face's format; '' if a run is scored.
    names: the tasks.
    as_json: whether to print JSON; everything else then goes to stderr.

  Raises:
    UsageError: there is no such task, run or folder, the run is not complete, or it cannot answer.
  """
  terminal.console.stderr = as_json
  builtin.check(names, '--tasks')
  opened, run = models.opened(study, run_name, folder, _LENGTH)
  for name in names:
    if reason := answers.why_not(run, name):
      raise UsageError(f'--tasks={name} cannot score {run.name!r}: {reason}. Name a task with '
                       '_choice.')
  models.check_readable(opened, run, 'evaluate')
  mesh = layout.mesh(opened.config, opened.runs, jax.devices(), hardware.device_memory())
  opened.config.evaluation.batch_size = layout.evaluation_rows(opened.config, mesh)
  with jax.set_mesh(mesh):
    if run.selector:
      found = answers.of_ensemble(
          opened, run, names, text.prepare(opened.config, opened.data_folder), mesh)
    else:
      found = answers.of_model(opened, run.model, params.final(opened, run, mesh), names,
                               text.tokenizer(opened.config, opened.data_folder), mesh)
  if as_json:
    print(json.dumps({'model': run_name or folder, 'tasks': found}, indent=1))
    return
  rows = [{'name': run_name or folder, 'tasks': found}]
  terminal.show(tasks_table.as_table(rows))
