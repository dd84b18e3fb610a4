"""Tasks of lm-evaluation-harness: found, loaded and scored with a model that is computed here.

The harness and the data sets of its tasks are optional (the extra `eval`). Nothing is downloaded,
and no code that a model has written is run, unless the caller allows it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import difflib
import hashlib
import importlib
import io
import os
import random
import re
import sys
from typing import Any, NamedTuple

import numpy as np

from btx_jax.convert import config_json, generation
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.data.tokenizer import load as load_tokenizer
from btx_jax.errors import UsageError
from btx_jax.model.config import Config
from btx_jax.model.trees import check_params

CONTEXT = 2048  # tokens that a model reads if nothing says how many
_CLOSE = 3  # names that are suggested for one that is unknown
# Iterations of a bootstrap; the errors of means need none.
_BOOTSTRAP = 1000
# Read when the harness is imported: no processes that are forked beside jax's threads.
_ENVIRONMENT = {'LMEVAL_DISABLE_MULTIPROC': '1'}
_OFFLINE = ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE', 'HF_EVALUATE_OFFLINE')
_RUN_CODE = 'HF_ALLOW_CODE_EVAL'  # the harness's metrics ask for it too

# See harness.OnProgress.
OnProgress = Callable[[str, int, int], None]


class Wanted(NamedTuple):
  """A task by name.

  Attributes:
    name: of a task, a group or a tag of the harness.
    shots: examples before each question; None is the number in the task's file, or else 0.
  """
  name: str
  shots: int | None


class Loaded(NamedTuple):
  """Tasks that are ready to be scored.

  Attributes:
    wanted: what was asked for.
    tasks, groups: the harness's objects by name.
    members: for each name in `wanted`, the names of its tasks.
    limit: the most documents of each task; None is all.
    run_code: whether code that a model has written may run.
  """
  wanted: Sequence[Wanted]
  tasks: Mapping[str, Any]
  groups: Mapping[str, Any]
  members: Mapping[str, Sequence[str]]
  limit: int | None
  run_code: bool


def parse(names: Sequence[str], shots: int | None = None) -> list[Wanted]:
  """Reads names like 'arc_easy', or 'gsm8k:8' with a number of shots; `shots` is for the others.

  Raises:
    UsageError: there is no name, or a name comes twice.
  """
  result = []
  for name in names:
    found = re.fullmatch(r'(.+):(\d+)', name)
    result.append(Wanted(found[1], int(found[2])) if found else Wanted(name, shots))
  for number, (name, _) in enumerate(result):
    if not name or name in [other.name for other in result[:number]]:
      raise UsageError(f'The tasks {",".join(names)} have {name!r} twice, or an empty name; name '
                       'each task once.')
  return result


def load(wanted: Sequence[Wanted], include_path: str = '', limit: int | None = None,
         download: bool = False, run_code: bool = False) -> Loaded:
  """Finds tasks and reads their data sets; before a model is read.

  Args:
    wanted: the tasks.
    include_path: a directory with tasks of one's own (YAML files), searched first; '' is none.
    limit: the most documents of each task; None is all.
    download: whether data sets may be downloaded from the Hugging Face Hub.
    run_code: whether tasks that run what the model writes are allowed.

  Raises:
    UsageError: the extra is missing, there is no such task, its data set is not on this machine, or
      it runs code.
  """
  _prepare_imports(download, run_code)
  if include_path and not os.path.isdir(include_path):
    raise UsageError(f'--include_path={include_path} is not a directory (looked from '
                     f'{os.getcwd()}).')
  with _quiet():
    manager = _manager([each.name for each in wanted], include_path)
    tasks, groups, members = {}, {}, {}
    for name, shots in wanted:
      if name not in manager.task_index:
        raise UsageError(_unknown(name, manager.all_tasks))
      if not run_code and (unsafe := _runs_code(manager, name)):
        raise UsageError(f'The task {unsafe!r} runs the code that the model writes, on this '
                         'machine and with your rights. Use a container or a machine of its own, '
                         'and add --run_code; or leave the task out.')
      found = _load_one(manager, name)
      if twice := tasks.keys() & found['tasks'].keys():
        raise UsageError(f'The task {min(twice)!r} belongs to {name!r} and to another name in '
                         '--tasks; name one of them.')
      for task in found['tasks'].values():
        _set_shots(task, shots)
      tasks |= found['tasks']
      groups |= found['groups']
      members[name] = list(found['tasks'])
  return Loaded(wanted, tasks, groups, members, limit, run_code)


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
    tasks: names of the harness's tasks, groups or tags; 'gsm8k:8' is with 8 shots.
    include_path: a directory with tasks of your own.
    shots: for tasks that do not name their shots.
    limit: the most documents of each task.
    context: the most tokens that the model reads; 0 takes it from the folder's config.json, or else
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
    `harness`, its version; `context`; and `tasks`, a list with, of each task and group:
      `name`, `shots`, `version`; `limit`, null if all documents were scored; `documents`, how many
      were; `hash` of their questions and answers; `part_of`, the name that was asked for, if that is
      a group or tag; and `metrics`, a list of `metric`, `filter`, `value`, `error` (its standard
      error, or null) and `higher_is_better`. A group has the numbers of documents of its tasks
      together, and no hash.
    `samples`: by task, what the harness reports for each document: its requests and their answers.
  """
  from lm_eval import defaults, evaluator

  from btx_jax.scoring import harness
  model = harness.Model(config, params, tokenizer, context, stop_ids, batch_size,
                        on_progress=on_progress and _aloud(on_progress))
  random.seed(defaults.DEFAULT_RANDOM_SEED)
  np.random.seed(defaults.DEFAULT_OTHER_SEED)
  for task in loaded.tasks.values():
    task.set_fewshot_seed(seed=defaults.DEFAULT_OTHER_SEED)
  with _quiet():
    found: Any = evaluator.evaluate(
        model, {'tasks': dict(loaded.tasks), 'groups': dict(loaded.groups)}, limit=loaded.limit,
        bootstrap_iters=_BOOTSTRAP, confirm_run_unsafe_code=loaded.run_code)
  part_of = {member: name for name, members in loaded.members.items() for member in members
             if member != name}
  counts = {name: len({sample['doc_id'] for sample in samples})
            for name, samples in found['samples'].items()}
  tasks = []
  for name, figures in {**found.get('groups', {}), **found['results']}.items():
    if name in loaded.tasks:
      documents, hashed = counts[name], _hash(found['samples'][name])
    else:
      documents = sum(counts[task.task_name] for task in loaded.groups[name].get_all_tasks())
      hashed = None
    shots = found['n-shot'].get(name)
    if shots is None:  # of a group
      shots = max(found['n-shot'].get(task.task_name, 0)
                  for task in loaded.groups[name].get_all_tasks())
    asked = next((each for each, members in loaded.members.items()
                  if each == name or name in members or name in loaded.groups), name)
    tasks.append({
        'name': name, 'part_of': part_of.get(name) or (asked if asked != name else None),
        'shots': int(shots), 'version': found['versions'].get(name), 'limit': loaded.limit,
        'documents': documents, 'hash': hashed,
        'metrics': list(_metrics(figures, found['higher_is_better'].get(name, {})))})
  return {'harness': _version(), 'context': context, 'tasks': tasks, 'samples': found['samples']}


def _metrics(figures: Mapping[str, Any], higher_is_better: Mapping[str, Any]
             ) -> Iterator[dict[str, Any]]:
  """The figures of a task, which the harness names 'METRIC,FILTER' and 'METRIC_stderr,FILTER'."""
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


def _version() -> str:
  from importlib import metadata
  return metadata.version('lm_eval')


def _set_shots(task, shots: int | None):
  """As the harness does: a task whose file says 0 shots keeps them."""
  fixed = task.get_config('num_fewshot')
  if fixed is None or (shots is not None and fixed != 0):
    task.set_config(key='num_fewshot', value=shots or 0)


def _load_one(manager, name: str) -> dict[str, Any]:
  """A task, or the tasks of a group or tag, with their data sets."""
  spec: Any = name
  if own := _with_data_beside(manager, name):
    spec = own
  try:
    return manager.load([spec])
  except UsageError:
    raise
  except ImportError as error:
    raise UsageError(f'The task {name!r} needs a package that is not installed: {error}') from error
  except (ConnectionError, FileNotFoundError) as error:
    raise UsageError(
        f'The data set of the task {name!r} is not on this machine ({error}). To download it, add '
        '--download (in Python download=True); without a network, describe the task in a '
        'file beside its data, and name that directory in --include_path (docs/evaluate.md).'
    ) from error
  except Exception as error:  # a task is code and templates of anybody's
    raise UsageError(f'The task {name!r} cannot be loaded: {type(error).__name__}: {error}'
                     ) from error


def _with_data_beside(manager, name: str) -> dict[str, Any] | None:
  """A task's config whose data_files lie beside its own file; None if they do not, or none does."""
  from lm_eval.tasks._yaml_loader import load_yaml
  entry = manager.task_index[name]
  files = ((entry.cfg or {}).get('dataset_kwargs') or {}).get('data_files')
  if not files or not entry.yaml_path:
    return None
  folder = os.path.dirname(os.path.abspath(entry.yaml_path))

  def beside(path):
    if isinstance(path, str):
      there = os.path.join(folder, path)
      return there if os.path.exists(there) and not os.path.exists(path) else path
    if isinstance(path, dict):
      return {split: beside(each) for split, each in path.items()}
    return [beside(each) for each in path]

  found = load_yaml(entry.yaml_path, resolve_func=True)
  return {**found, 'dataset_kwargs': {**found['dataset_kwargs'], 'data_files': beside(files)}}


def _manager(names: Sequence[str], include_path: str):
  """The index of tasks; without the harness's own, which takes seconds to read, if none is asked for.
  """
  from lm_eval.tasks import TaskManager
  if include_path:
    own = TaskManager(include_path=include_path, include_defaults=False)
    if set(names) <= set(own.all_subtasks):
      return own
  return TaskManager(include_path=include_path or None)


def _runs_code(manager, name: str) -> str:
  """The first task among those of a name that runs what the model writes; '' if there is none."""
  entry = manager.task_index.get(name)
  if entry is None:
    return ''
  if (entry.cfg or {}).get('unsafe_code'):
    return name
  inner = [*sorted(entry.tags if entry.yaml_path is None else ()),
           *((entry.cfg or {}).get('task') or () if name in manager.all_groups else ())]
  inner = [each if isinstance(each, str) else each.get('task', '') for each in inner]
  return next((found for each in inner if isinstance(each, str) and each != name
               and (found := _runs_code(manager, each))), '')


def _unknown(name: str, valid: Sequence[str]) -> str:
  close = difflib.get_close_matches(name, valid, n=_CLOSE, cutoff=0.6)
  hint = (f'did you mean {" or ".join(map(repr, close))}?' if close else
          'lm-eval ls tasks lists those of the harness, and --include_path adds your own.')
  return f'There is no task {name!r}; {hint}'


def _prepare_imports(download: bool, run_code: bool):
  """Imports the harness with the environment that it is to see.

  Raises:
    UsageError: the extra is missing.
  """
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  for name in _OFFLINE:
    if download:
      os.environ[name] = '0'
    else:
      os.environ.setdefault(name, '1')
  if run_code:
    os.environ[_RUN_CODE] = '1'
  try:
    for name in ('lm_eval.evaluator', 'datasets.config', 'huggingface_hub.constants'):
      importlib.import_module(name)
  except ImportError as error:
    raise UsageError("Tasks need lm-evaluation-harness: pip install 'btx_jax[eval]' "
                     f'({error}).') from error
  # If a caller has imported them before, they have read the environment already.
  import datasets
  from huggingface_hub import constants
  offline = os.environ['HF_HUB_OFFLINE'] not in ('0', '')
  constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = offline


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Drops what Python code prints: the harness and its libraries have bars and lines of their own."""
  with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    yield


def _aloud(report: OnProgress) -> OnProgress:
  """`report`, which prints to where Python printed before `_quiet`."""
  out, errors = sys.stdout, sys.stderr

  def aloud(*progress):
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
      report(*progress)

  return aloud
