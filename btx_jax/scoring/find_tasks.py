"""Finds and loads tasks of lm-evaluation-harness, before a model is read.

The harness and the data sets of its tasks are optional (the extra `eval`). Nothing is downloaded,
and no code that a model has written is run, unless the caller allows it.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import difflib
import importlib
import io
import os
import re
import sys
from typing import Any, NamedTuple

from btx_jax.errors import UsageError
from btx_jax.files import inputs

_MAX_YAML, _MAX_DEPTH = 1_000_000, 500  # bytes of a file, and how deep its lists nest
_CLOSE = 3  # suggestions for an unknown name
_OFFLINE = ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE', 'HF_EVALUATE_OFFLINE')
_READERS = ('datasets.config', 'huggingface_hub.constants')  # modules that read the first
_ONE_PROCESS = 'DISABLE_MULTIPROC'  # stops the harness's bootstrap from starting processes
_RUN_CODE = 'HF_ALLOW_CODE_EVAL'  # the harness's metrics require it, too


class Wanted(NamedTuple):
  """A task by name.

  Attributes:
    name: the name of a task, a group or a tag of the harness.
    shots: examples before each question; None means the number in the task's file, or else 0.
  """
  name: str
  shots: int | None


class Loaded(NamedTuple):
  """Tasks that are ready to be scored.

  Attributes:
    wanted: the tasks by name, as requested.
    tasks, groups: the harness's objects by name.
    members: for each name in `wanted`, the names of its tasks and groups.
    limit: the most documents of each task; None means all.
    run_code: whether code that a model has written may run.
  """
  wanted: Sequence[Wanted]
  tasks: Mapping[str, Any]
  groups: Mapping[str, Any]
  members: Mapping[str, Sequence[str]]
  limit: int | None
  run_code: bool


def parse(names: Sequence[str], shots: int | None = None) -> list[Wanted]:
  """Parses names like 'arc_easy', or 'gsm8k:8' with a number of shots; `shots` is for the others.

  Raises:
    UsageError: a name is empty, or occurs twice.
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
  """Finds tasks and reads their data sets.

  Args:
    wanted: the tasks.
    include_path: a directory with your own tasks (YAML files), searched first; '' for none.
    limit: the most documents of each task; None means all.
    download: whether data sets may be downloaded from the Hugging Face Hub.
    run_code: whether tasks that run what the model writes are allowed.

  Raises:
    UsageError: the extra is missing, there is no such task, its data set is not on this machine, or
      it runs code without `run_code`.
  """
  _prepare_imports(download, run_code)
  if include_path and not os.path.isdir(include_path):
    raise UsageError(f'--include_path={include_path} is not a directory (looked from '
                     f'{os.getcwd()}).')
  if include_path:
    _check_files(include_path)
  with quiet():
    manager = _manager([each.name for each in wanted], include_path)
    tasks, groups, members = {}, {}, {}
    for name, _ in wanted:
      if name not in manager.task_index:
        raise UsageError(_unknown(name, manager.all_tasks))
      unsafe = [each for each in _reached(manager, name)
                if (manager.task_index[each].cfg or {}).get('unsafe_code')]
      if unsafe and not run_code:
        raise UsageError(f'The task {unsafe[0]!r} runs the code that the model writes, on this '
                         'machine and with your rights. Use a container or a separate machine, '
                         'and add --run_code; or omit the task.')
    for name, shots in wanted:
      found = _load_one(manager, name)
      if twice := tasks.keys() & found['tasks'].keys():
        raise UsageError(f'The task {min(twice)!r} belongs to {name!r} and to another name in '
                         '--tasks; name one of them.')
      for task in found['tasks'].values():
        _set_shots(task, shots)
      tasks |= found['tasks']
      groups |= found['groups']
      members[name] = [*found['tasks'], *found['groups']]
  return Loaded(wanted, tasks, groups, members, limit, run_code)


def _check_files(folder: str) -> None:
  """Raises UsageError for a YAML file below a folder that the harness could not parse in time."""
  for where, _, names in os.walk(folder):
    for path in (os.path.join(where, name) for name in names if name.endswith(('.yaml', '.yml'))):
      try:
        depth = 0
        for mark in re.findall(rb'[\[{]|[\]}]', inputs.read_bytes(path, _MAX_YAML)):
          depth = depth + 1 if mark in b'[{' else max(0, depth - 1)
          if depth > _MAX_DEPTH:
            raise ValueError('its lists and objects are nested too deeply')
      except (OSError, ValueError) as error:
        raise UsageError(f'{path} cannot be read as a task: {error}. Repair it, or remove it from '
                         '--include_path.') from error


def _set_shots(task, shots: int | None):
  """Sets the shots as the harness does: a task whose file sets 0 shots stays at 0."""
  fixed = task.get_config('num_fewshot')
  if fixed is None or (shots is not None and fixed != 0):
    task.set_config(key='num_fewshot', value=shots or 0)


def _load_one(manager, name: str) -> dict[str, Any]:
  """A task, or the tasks of a group or tag, with their data sets."""
  try:
    for each in _reached(manager, name):
      _find_data_beside(manager.task_index[each])
    return manager.load([name])
  except ImportError as error:
    raise UsageError(f'The task {name!r} needs a package that is not installed: {error}') from error
  except (ConnectionError, FileNotFoundError) as error:
    raise UsageError(
        f'The data set of the task {name!r} is not on this machine ({error}). To download it, add '
        '--download (in Python download=True); without a network, describe the task in a '
        'file beside its data, and name that directory in --include_path (docs/evaluate.md).'
    ) from error
  except Exception as error:  # a task contains code and templates by others
    raise UsageError(f'The task {name!r} cannot be loaded: {type(error).__name__}: {error}'
                     ) from error


def _find_data_beside(entry):
  """Makes relative data_files of an entry absolute if they lie beside its YAML file."""
  from lm_eval.tasks._yaml_loader import load_yaml
  files = ((entry.cfg or {}).get('dataset_kwargs') or {}).get('data_files')
  if not files or not entry.yaml_path:
    return
  folder = os.path.dirname(os.path.abspath(entry.yaml_path))

  def whole(path):
    if isinstance(path, str):
      there = os.path.join(folder, path)
      found = there if os.path.exists(there) and not os.path.exists(path) else path
      if os.path.exists(found) and not os.path.isdir(found):
        inputs.open_file(found).close()  # raises OSError for a named pipe, which is read forever
      return found
    if isinstance(path, dict):
      return {split: whole(each) for split, each in path.items()}
    return [whole(each) for each in path]

  found = load_yaml(entry.yaml_path, resolve_func=True)
  entry.cfg = {**found, 'dataset_kwargs': {**found['dataset_kwargs'], 'data_files': whole(files)}}
  entry.yaml_path = None  # the harness would read the file again


def _manager(names: Sequence[str], include_path: str):
  """The index of tasks. If include_path has all names, the harness's own tasks, which take seconds
  to read, are left out.
  """
  from lm_eval.tasks import TaskManager
  if include_path:
    own = TaskManager(include_path=include_path, include_defaults=False)
    if set(names) <= set(own.all_subtasks):
      return own
  return TaskManager(include_path=include_path or None)


def _reached(manager, name: str) -> Iterator[str]:
  """A name, and those of the tasks and groups that belong to it."""
  entry = manager.task_index.get(name)
  if entry is None:
    return
  yield name
  inner: list[Any] = sorted(entry.tags) if name in manager.all_tags else []
  if name in manager.all_groups:
    inner = (entry.cfg or {}).get('task') or []
  for each in inner:
    if isinstance(each, dict):
      each = each.get('group') or each.get('task')
    if isinstance(each, str) and each != name:
      yield from _reached(manager, each)


def _unknown(name: str, valid: Sequence[str]) -> str:
  close = difflib.get_close_matches(name, valid, n=_CLOSE, cutoff=0.6)
  hint = (f'did you mean {" or ".join(map(repr, close))}?' if close else
          'lm-eval ls tasks lists those of the harness, and --include_path adds your own.')
  return f'There is no task {name!r}; {hint}'


def _prepare_imports(download: bool, run_code: bool):
  """Sets the environment that the harness reads, and imports it.

  Raises:
    UsageError: the extra is missing.
  """
  for name in _OFFLINE:
    if download:
      os.environ[name] = '0'
    else:
      os.environ.setdefault(name, '1')
  if run_code:
    os.environ[_RUN_CODE] = '1'
  try:
    for name in ('lm_eval.evaluator', *_READERS):
      importlib.import_module(name)
  except ImportError as error:
    raise UsageError("Tasks need lm-evaluation-harness: pip install 'btx_jax[eval]' "
                     f'({error}).') from error
  # If they were imported before, they have read the environment already.
  offline = os.environ[_OFFLINE[0]] not in ('0', '')
  for name in _READERS:
    setattr(sys.modules[name], _OFFLINE[0], offline)


@contextlib.contextmanager
def settings_kept() -> Iterator[None]:
  """Gives back afterwards what `load` sets in this process, so that a caller can download."""
  names = (*_OFFLINE, _RUN_CODE)
  before = {name: os.environ.get(name) for name in names}
  offline = {name: getattr(sys.modules.get(name), _OFFLINE[0], None) for name in _READERS}
  try:
    yield
  finally:
    for name, value in before.items():
      os.environ.pop(name, None)
      if value is not None:
        os.environ[name] = value
    for name, value in offline.items():
      if name in sys.modules:  # one that was imported since has read what `load` set
        value = before[_OFFLINE[0]] not in (None, '', '0') if value is None else value
        setattr(sys.modules[name], _OFFLINE[0], value)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Discards what Python code prints, such as the progress bars of the harness and its libraries.

  It also keeps the harness from starting processes: forked beside jax's threads, they would hang.
  """
  before = os.environ.get(_ONE_PROCESS)
  os.environ[_ONE_PROCESS] = '1'
  try:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
      yield
  finally:
    del os.environ[_ONE_PROCESS]
    if before is not None:
      os.environ[_ONE_PROCESS] = before
