"""manifest.json: what a run directory holds and its state; replaced as a whole at every change."""

from collections.abc import Mapping
import datetime
import hashlib
import json
import os
from typing import Any

from btx_jax.devices import distributed
from btx_jax.errors import UsageError
from btx_jax.files import sealed, shapes
from btx_jax.run import Run

RUNNING, STOPPED, COMPLETE, FAILED = 'running', 'stopped', 'complete', 'failed'
PUBLISHED = 'published'  # of a run that is complete, and only its row is here; see rows.py
FINISHED = COMPLETE, PUBLISHED
NAME = 'manifest.json'
# What the code that reads manifests relies on.
_SPEC = {
    'name?': str, 'steps?': int, 'of_steps?': int, 'step?': int, 'init?': str,
    'sources?': [(str, [str])], 'weights?': {str: float}, 'optimizer?': dict,
    'recipe?': (None, {'router_std': float}), 'tokenizer?': str, 'data?': {str: str},
    'model?': {'dim?': int, 'num_heads?': int, 'head_dim?': int}, 'edit?': object}
SHAPE = {
    'state': str, 'spec': _SPEC, 'identity': str, 'name?': str, 'steps_done?': int,
    'seconds?': float, 'tokens_by_domain?': {str: float}, 'versions?': dict,
    'earlier_versions?': list, 'saved?': str, 'started?': str, 'updated?': str, 'devices?': str,
    'processes?': int, 'error?': str, 'best?': (None, {'step': int, 'bits_per_byte': float}),
    'from_best?': object, 'metrics?': [int], 'storage?': [str]}


def identity(spec: dict) -> str:
  """A hash of everything that determines a run's result, including its sources."""
  return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def read(folder: str) -> dict | None:
  """The manifest of a run directory; None if there is no run there.

  Raises:
    UsageError: the file exists, but it is not a manifest.
  """
  path = os.path.join(folder, NAME)
  try:
    manifest = sealed.read(path)
    if wrong := shapes.misfit(manifest, SHAPE):
      raise ValueError(wrong)
  except FileNotFoundError:
    return None
  except NotADirectoryError:
    raise  # --workdir is wrong, not the manifest
  except (OSError, ValueError) as error:
    raise UsageError(f'{path} is not a btx_jax manifest, or is damaged ({error}); restore a copy, '
                     'use another --workdir, or delete that folder to train the run again.'
                     ) from error
  return manifest


def identity_in(folder: str) -> str | None:
  """The identity of the run in a directory; None if it has no manifest."""
  return (read(folder) or {}).get('identity')


def write(folder: str, manifest: dict):
  """Replaces the manifest of a run directory in one step, so that no reader sees half of it."""
  sealed.write(os.path.join(folder, NAME), manifest | {'updated': now()})


def begin(name: str, spec: dict) -> dict:
  """The manifest of a run that starts now."""
  return {
      'name': name, 'state': RUNNING, 'identity': identity(spec), 'spec': spec,
      'started': now(), 'steps_done': 0, 'seconds': 0.0, 'tokens_by_domain': {},
      'versions': _versions(),
  }


def _versions() -> dict[str, str]:
  return {'btx_jax': distributed.code_version(), **distributed.versions()}


def resume(manifest: dict) -> dict:
  """The manifest of a run that resumes; if versions changed, the earlier ones are kept."""
  manifest = {key: value for key, value in manifest.items() if key not in ('error', 'storage')}
  if manifest['versions'] != _versions():
    manifest['earlier_versions'] = [
        *manifest.get('earlier_versions', []), manifest['versions']]
  return manifest | {'state': RUNNING, 'versions': _versions()}


def full_spec(run: Run, tokenizer: str, data: Mapping[str, str]) -> dict[str, Any]:
  """Everything that decides the result of a run: the `spec` of its manifest.

  Args:
    run: the run.
    tokenizer: the hash of the tokenizer.
    data: the hash of the training text of each domain.
  """
  return run.spec() | {
      'tokenizer': tokenizer,
      'data': {domain: data[domain] for domain in run.domains},
      'sources': [[source.first_name, identity(full_spec(source, tokenizer, data))]
                  for source in run.sources]}


def source_names(spec: Mapping[str, Any]) -> list[str]:
  """The names of the runs that a run starts from; a manifest has them with their identities."""
  return [each[0] if isinstance(each, list) else each for each in spec.get('sources', [])]


def now() -> str:
  """The current time in the format of manifests: ISO 8601, UTC."""
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
