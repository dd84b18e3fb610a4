"""Scores a model on tasks of lm-evaluation-harness."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import hashlib
from importlib import metadata
import os
import random
import sys
from typing import Any

import numpy as np

from btx_jax.convert import config_json, generation
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.data.tokenizer import load as load_tokenizer
from btx_jax.model.config import Config
from btx_jax.model.trees import check_params
from btx_jax.scoring.find_tasks import Loaded, load, parse, quiet, settings_kept

CONTEXT = 2048  # tokens that a model reads if its context length is unknown
# Iterations of the bootstrap for metrics that are not means; means need none.
_BOOTSTRAP = 1000
# See harness.OnProgress.
OnProgress = Callable[[str, int, int], None]


def evaluate(config: Config, params, tokenizer: str | Tokenizer, tasks: Sequence[str], *,
             include_path: str = '', shots: int | None = None, limit: int | None = None,
             context: int = 0, batch_size: int = 32, download: bool = False,
             run_code: bool = False) -> dict[str, Any]:
  """Scores a model on tasks of lm-evaluation-harness (pip install 'btx_jax[eval]').

  Under a mesh (`jax.set_mesh`) its devices share the work. With several processes all of them must
  call it, and each gets the result.

  Args:
    config: the model's sizes.
    params: its parameters, laid out as in model/llama.py.
    tokenizer: a folder or file with the model's tokenizer, or a Tokenizer.
    tasks: names of the harness's tasks, groups or tags; 'gsm8k:8' means 8 shots.
    include_path: a directory with your own tasks, as YAML files.
    shots: examples before each question, for tasks named without a number.
    limit: the most documents to score of each task.
    context: the most tokens that the model reads; 0 means that of the folder's config.json, or else
      2,048.
    batch_size: rows per batch.
    download: whether data sets may be downloaded.
    run_code: whether tasks that run what the model writes are allowed.

  Returns:
    what `score` returns.

  Raises:
    UsageError: see `load`.

  Example:
    >>> found = evaluate(config, params, folder, ['capitals'], include_path=own_tasks)
    >>> [task['name'] for task in found['tasks']]
    ['capitals']
  """
  check_params(config, params, 'evaluate')
  with settings_kept():
    loaded = load(parse(tasks, shots), os.path.expanduser(include_path), limit, download, run_code)
    stop_ids: Sequence[int] = ()
    if isinstance(tokenizer, str):
      folder = os.path.expanduser(tokenizer)
      tokenizer, stop_ids = load_tokenizer(folder), generation.read(folder).stop_ids
      found = config_json.of_folder(folder) if os.path.isdir(folder) else {}
      context = context or (config_json.context_length(found) if found else 0)
    return score(loaded, config, params, tokenizer, context or CONTEXT, stop_ids, batch_size)


def score(loaded: Loaded, config: Config, params, tokenizer: Tokenizer, context: int,
          stop_ids: Sequence[int] = (), batch_size: int = 32,
          on_progress: OnProgress | None = None) -> dict[str, Any]:
  """Scores a model on tasks that are loaded.

  Returns:
    `harness`, its version; `context`; `tasks`, a list of the tasks and groups; and `samples`: task
    -> what the harness reports for each document, its requests and their answers. A task or group
    has `name`, `shots`, `version`; `limit`, None if all documents were scored; `documents`, the
    number scored; `hash`, that of their prompts and targets; `part_of`, the requested group or tag
    that it belongs to, or None; and `metrics`, a list of `metric`, `filter`, `value`, `error` (its
    standard error, or None) and `higher_is_better`.
  """
  from lm_eval import defaults, evaluator

  from btx_jax.scoring import harness
  model = harness.Model(config, params, tokenizer, context, stop_ids, batch_size,
                        on_progress=on_progress and _aloud(on_progress))
  random.seed(defaults.DEFAULT_RANDOM_SEED)
  np.random.seed(defaults.DEFAULT_OTHER_SEED)
  for task in loaded.tasks.values():
    task.set_fewshot_seed(seed=defaults.DEFAULT_OTHER_SEED)
  with quiet():
    found: Any = evaluator.evaluate(
        model, {'tasks': dict(loaded.tasks), 'groups': dict(loaded.groups)}, limit=loaded.limit,
        bootstrap_iters=_BOOTSTRAP, confirm_run_unsafe_code=loaded.run_code)
  part_of = {member: name for name, members in loaded.members.items() for member in members
             if member != name}
  tasks = []
  for name, figures in {**found.get('groups', {}), **found['results']}.items():
    leaves = ([name] if name in loaded.tasks else
              [task.task_name for task in loaded.groups[name].get_all_tasks()])
    samples = [sample for leaf in leaves for sample in found['samples'][leaf]]
    tasks.append({
        'name': name, 'part_of': part_of.get(name),
        'shots': max(int(found['n-shot'][leaf]) for leaf in leaves),
        'version': found['versions'].get(name), 'limit': loaded.limit,
        'documents': sum(found['n-samples'][leaf]['effective'] for leaf in leaves),
        'hash': _hash(samples),
        'metrics': list(_metrics(figures, found['higher_is_better'].get(name, {})))})
  return {'harness': metadata.version('lm_eval'), 'context': context, 'tasks': tasks,
          'samples': found['samples']}


def _metrics(figures: Mapping[str, Any], higher_is_better: Mapping[str, Any]
             ) -> Iterator[dict[str, Any]]:
  """The metrics of a task; the harness names them 'METRIC,FILTER' and 'METRIC_stderr,FILTER'."""
  for key, value in figures.items():
    metric, comma, filtered = key.partition(',')
    if comma and not metric.endswith('_stderr') and isinstance(value, (int, float)):
      error = figures.get(f'{metric}_stderr,{filtered}')
      yield {'metric': metric, 'filter': filtered, 'value': float(value),
             'error': float(error) if isinstance(error, (int, float)) else None,
             'higher_is_better': higher_is_better.get(metric)}


def _hash(samples: Sequence[Mapping[str, Any]]) -> str:
  """Identifies the documents of a task, with their prompts and targets, in their order."""
  digest = hashlib.sha256()
  for sample in samples:
    digest.update(''.join(sample[f'{what}_hash'] for what in ('doc', 'prompt', 'target')).encode())
  return digest.hexdigest()[:16]


def _aloud(report: OnProgress) -> OnProgress:
  """`report`, printing to the streams that Python had before `quiet`."""
  out, errors = sys.stdout, sys.stderr

  def aloud(*progress):
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
      report(*progress)

  return aloud
