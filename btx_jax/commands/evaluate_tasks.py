"""`evaluate --tasks`: scores a run or a pretrained model on built-in tasks, and on tasks of
lm-evaluation-harness.

With several processes, each runs the harness on the same requests, and their devices share the
rows. A run's scores from the harness are kept in its directory, where the report finds them. Scores
on built-in tasks are only printed here; the training command keeps those that the config names.
"""

import contextlib
import json
import time
from typing import Any, NamedTuple

import jax

from btx_jax import terminal
from btx_jax.commands import answer, answers_table, models, task_table
from btx_jax.commands.export import generation_of
from btx_jax.data import text
from btx_jax.devices import distributed
from btx_jax.errors import UsageError
from btx_jax.run import Run
from btx_jax.scoring import builtin, find_tasks, task_scores, tasks
from btx_jax.study import context, params
from btx_jax.study.study import Study
from btx_jax.terminal import say
from btx_jax.training import layout

_EVERY = 10.0  # seconds between lines of progress


class Asked(NamedTuple):
  """The tasks, and how to score them.

  Attributes:
    names: the names of the tasks, see find_tasks.parse.
    include_path, limit, download, run_code: as in find_tasks.load.
    shots: as in find_tasks.parse.
    length: the most tokens that the model reads; 0 means its context length.
  """
  names: tuple[str, ...]
  include_path: str = ''
  shots: int | None = None
  limit: int | None = None
  download: bool = False
  run_code: bool = False
  length: int = 0


def print_scores(study: Study | None, run_name: str, folder: str, asked: Asked, as_json: bool
                 ) -> None:
  """Scores a model on tasks and prints the scores; a run's scores from the harness are kept, too.

  Args:
    study: the study of the run; None without a config, when `folder` is scored.
    run_name: the run to score; '' to score `folder`.
    folder: a pretrained model in Hugging Face's format; '' to score a run.
    asked: the tasks.
    as_json: whether to print JSON; everything else then goes to stderr.

  Raises:
    UsageError: there is no such run, folder or task; the run is not complete; it is an ensemble,
      and a task cannot score these; or see find_tasks.load.
  """
  terminal.console.stderr = as_json
  builtin.check(asked.names, '--tasks')
  own, others = builtin.own(asked.names), builtin.others(asked.names)
  opened, run = models.opened(study, run_name, folder, asked.length)
  answer.check(run, own)
  if run.selector and others:
    raise UsageError(f'{run.name!r} is an ensemble; --tasks={others[0]} needs a single model. Name '
                     'a mixture or an expert.')
  models.check_readable(opened, run, 'evaluate')
  loaded = find_tasks.load(
      find_tasks.parse(others, asked.shots), asked.include_path, asked.limit, asked.download,
      asked.run_code) if others else None
  found: dict[str, Any] = {'model': run_name or folder}
  if own:
    found['answers'] = answer.scores(opened, run, own)
  if loaded:
    found |= _score(opened, run, loaded, asked.length)
    del found['samples']
  if not distributed.is_process_0():
    return
  if run_name and loaded:
    task_scores.write(opened, run, found)
  if as_json:
    print(json.dumps(found, indent=1))
    return
  if own:
    terminal.show(answers_table.as_table([{'name': found['model'], 'answers': found['answers']}]))
  if loaded:
    terminal.show(task_table.as_table(found))
    if run_name:
      say(f'Kept in {opened.folder(run.name)}; the command report shows the scores of all runs')


def _score(study: Study, run: Run, loaded: find_tasks.Loaded, length: int) -> dict:
  mesh = layout.mesh_here(study.config, study.runs)
  with contextlib.ExitStack() as stack:
    parameters = params.final(study, run, mesh)
    if mesh.size > 1:
      stack.enter_context(jax.set_mesh(mesh))
    tokenizer = text.tokenizer(study.config, study.data_folder)
    return tasks.score(
        loaded, run.model, parameters, tokenizer, length or context.length(run),
        generation_of(run, tokenizer).stop_ids, layout.evaluation_rows(study.config, mesh),
        _progress())


def _progress() -> tasks.OnProgress:
  """Returns a function that prints how many requests are done, every ten seconds."""
  printed = time.monotonic()

  def report(what: str, done: int, of: int):
    nonlocal printed
    if time.monotonic() - printed >= _EVERY:
      printed = time.monotonic()
      say(f'{done:,} of {of:,} requests {what}')

  return report
