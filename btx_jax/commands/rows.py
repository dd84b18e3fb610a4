"""The command `rows`: writes the row of every finished run; see study/rows.py."""

import functools
import statistics
from typing import Any

from btx_jax.errors import UsageError
from btx_jax.run import Run
from btx_jax.scoring import ledger, scores
from btx_jax.study import directories, manifest, routers, rows
from btx_jax.study.study import Study
from btx_jax.terminal import say
from btx_jax.training import metrics

# What a row keeps of a manifest. The rest is about files that only the working directory has.
_KEPT = ('name', 'state', 'identity', 'spec', 'rng_seed', 'ancestors', 'text', 'started',
         'steps_done', 'seconds', 'tokens_by_domain', 'versions', 'earlier_versions', 'devices',
         'processes', 'best', 'from_best', 'skipped_steps', 'loss_spike')


def write_rows(study: Study) -> list[str]:
  """Writes the rows of all runs that are complete and measured; returns the names of these runs.

  The same run gives the same bytes again. Prints what is written.

  Raises:
    UsageError: config.rows is empty; or a run, or a row that is there, is of another config, or was
      measured on other text. Nothing has been written then.
  """
  folder = study.config.rows
  if not folder:
    raise UsageError('rows needs a folder to write to: set config.rows, or add '
                     '--config.rows=FOLDER.')
  _check(study)
  written, unmeasured = [], []
  for run in study.runs.values():
    if study.state(run.name) != manifest.COMPLETE:
      continue
    if any(scores.read(study, run, model.stage) is None for model in scores.models_of(study, run)):
      unmeasured.append(run.name)
      continue
    row, before = of_run(study, run), rows.read(folder, run.name)
    if before and (largest := _difference(before, row)):
      say(f'{run.name}: scores differ from those of the existing row, by up to '
          f'{largest:.2g} bits per byte')
    rows.write(folder, run.name, row)
    written.append(run.name)
  say(f'{len(written)} of {len(study.runs)} runs are complete and measured; their rows are in '
      f'{folder}')
  if unmeasured:
    say(f'complete, but not measured, so without a row: {", ".join(unmeasured)}. The command '
        'without --run measures them')
  return written


def of_run(study: Study, run: Run) -> dict[str, Any]:
  """The row of a run that is complete and measured."""
  about = manifest.read(study.folder(run.name)) or {}
  fitted = routers.figures(study, run) or {}
  return {
      'manifest': {key: about[key] for key in _KEPT if key in about},
      **scores.stored(study, run),
      'training': _training(study.folder(run.name)),
      'cost': ledger.costs_to_publish(study, run),
      'fitted': {key: fitted[key] for key in fitted if key not in ('run', 'files')}}


def _check(study: Study) -> None:
  """Raises UsageError unless runs and rows are those of the config."""
  metas = {domain: meta for domain in study.config.domains if (meta := study.text_meta(domain))}
  if len(metas) < len(study.config.domains):
    return  # then nothing counts as measured
  tokenizer = next(iter(metas.values()))['made_from']['tokenizer']
  spec = functools.partial(manifest.full_spec, tokenizer=tokenizer, data={
      domain: meta['hash']['train'] for domain, meta in metas.items()})
  directories.check(study, spec)
  directories.check_rows(study, spec)
  scores.check_rows(study)


def _training(folder: str) -> dict[str, float]:
  """The last loss of a run and its median speed; {} if nothing was trained."""
  lines = [line for line in metrics.read(folder) if 'loss' in line]
  if not lines:
    return {}
  speeds = {key: [line[key] for line in lines if line.get(key) is not None]
            for key in ('tokens_per_second', 'mfu')}
  return {'step': lines[-1]['step'], 'loss': lines[-1]['loss'],
          **{key: statistics.median(values) for key, values in speeds.items() if values}}


def _difference(before: dict[str, Any], row: dict[str, Any]) -> float:
  """The largest difference between two rows' bits per byte of the final model; 0 if none."""
  was, now = (each['evaluation'].get(scores.FINAL, {}).get('domains', {})
              for each in (before, row))
  return max((abs(now[domain]['bits_per_byte'] - was[domain]['bits_per_byte'])
              for domain in now if domain in was), default=0.0)
