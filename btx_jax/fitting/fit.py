"""Sets a mixture's routers from text, once, into the directory of its run."""

from collections.abc import Sequence
import time
from typing import Any

import jax
import numpy as np

from btx_jax.data.mixture import Batch
from btx_jax.data.text import Text
from btx_jax.devices import distributed
from btx_jax.fitting import passes, samples, solve
from btx_jax.run import Run, dense_model
from btx_jax.study import edits, params, routers
from btx_jax.study.study import Study
from btx_jax.terminal import say

TEMPERATURES = (2.0, 1.0, 0.5, 0.25, 0.125, 0.0625)
# The highest temperature is taken whose loss exceeds the lowest by no more than this share: routers
# that are less certain cost nothing, and a finetune can still move them.
_CLOSE = 1e-3


def fit(study: Study, run: Run, text: Text, mesh: jax.sharding.Mesh) -> None:
  """Sets the routers of a run, unless that has been done.

  Args:
    study: whose run it is.
    run: a mixture with `routers`.
    text: the tokenized text.
    mesh: the devices to use.
  """
  if run.routers is None or routers.are_set(study, run):
    return
  began, settings = time.monotonic(), run.routers
  # Text of domains whose sums are kept may be gone.
  at_hand = distributed.broadcast(
      lambda: [domain for domain in settings.domains if samples.available(run, text, domain)])
  rows = {domain: samples.rows(run, text, domain) for domain in at_hand}
  before = edits.fitted(run.sources[0]) if run.edit and run.edit.stored else None
  kept = routers.sums(study, before) if before else {}
  if run.edit and before:
    say(f'{run.name}: sums of {", ".join(run.edit.stored)} are those of {before.name}')
  sums, reading = {}, samples.to_read(run)
  for domain in settings.domains:
    if domain not in reading:
      sums[domain] = kept[domain]
      continue
    # Experts with one label share it: text passes the first of them.
    number = settings.labels.index(domain)
    say(f'{run.name}: reading {domain} with the expert of {run.expert_names[number]}')
    parameters = params.expert(study, run, number, mesh)
    batches = samples.batches(study, samples.to_fit(rows[domain]))
    sums[domain] = passes.sums(dense_model(run.model), parameters, batches, mesh)
    del parameters  # one expert at a time
  columns_LDE = solve.columns(settings.kind, sums, settings.labels, settings.ridge)
  tried = (settings.temperature,) if settings.temperature else TEMPERATURES
  if before and len(rows) < len(settings.domains) and not settings.temperature:
    tried = (_temperature(study, before),)
  columns_LDE, figures = _choose_temperature(study, run, rows, columns_LDE, tried, mesh)
  figures |= samples.about(run, rows, began)
  routers.write(study, run, columns_LDE, sums, figures)
  for line in in_words(figures):
    say(f'{run.name}: {line}')


def in_words(figures: dict[str, Any]) -> list[str]:
  """What was measured when routers were set, as lines for a person."""
  def percent(shares) -> str:
    return ' '.join(f'{100 * share:.1f}' for share in shares)

  if not figures['losses']:
    return [f'routers by {figures["kind"]} from the sums that are kept, temperature '
            f'{figures["temperature"]:g}; no text is at hand to measure them on']
  losses = ', '.join(f'{loss:.4f} at {t:g}' for t, loss in figures['losses'].items())
  loads = [max(load) * len(load) for load in figures['load']]
  return [
      f'routers by {figures["kind"]} in {figures["seconds"]:.1f} s, from ' + ', '.join(
          f'{rows} rows of {domain}' for domain, rows in figures['rows'].items()),
      f'temperature {figures["temperature"]:g}; loss by temperature: {losses}',
      'by layer, % of tokens sent first to an expert of their domain: '
      f'{percent(figures["accuracy_alone"])} in the experts alone, '
      f'{percent(figures["accuracy"])} in the mixture',
      'by layer, entropy of the gates in nats: '
      f'{" ".join(f"{entropy:.2f}" for entropy in figures["entropy"])}; largest load, of a '
      f'balanced one: {" ".join(f"{load:.2f}" for load in loads)}']


def _temperature(study: Study, run: Run) -> float:
  """The temperature of routers that have been set."""
  return (routers.figures(study, run) or {})['temperature']


def _choose_temperature(study: Study, run: Run, rows: dict[str, list[Batch]],
                        columns_LDE: np.ndarray, tried: Sequence[float], mesh
                        ) -> tuple[np.ndarray, dict[str, Any]]:
  """The routers divided by the temperature, and what they do on the rows that are kept for it."""
  labels = samples.settings(run).labels
  if not rows:
    return columns_LDE / tried[0], {'temperature': tried[0], 'losses': {}}
  kept = {domain: samples.kept(of_domain) for domain, of_domain in rows.items()}
  own_GE = np.array([[label == domain for label in labels] for domain in kept])
  everything = [row | {'domain': np.array(i, np.int32)}
                for i, of_domain in enumerate(kept.values()) for row in of_domain]
  batches, parameters = samples.batches(study, everything), params.unrouted(study, run, mesh)
  found = {t: passes.routed(run.model, parameters, (columns_LDE / t).astype(np.float32), own_GE,
                            batches, mesh) for t in tried}
  losses = {t: float(of['nll'] / of['targets']) for t, of in found.items()}
  chosen = max(t for t, loss in losses.items() if loss <= (1 + _CLOSE) * min(losses.values()))
  columns_LDE = (columns_LDE / chosen).astype(np.float32)
  right, tokens = np.zeros(run.model.num_layers), 0
  for i, (domain, of_domain) in enumerate(kept.items()):
    alone = passes.expert_of(parameters, labels.index(domain))
    counted = passes.right(dense_model(run.model), alone, columns_LDE, own_GE[i],
                           samples.batches(study, of_domain), mesh)
    del alone
    right, tokens = right + counted['right'], tokens + counted['tokens']
  best = found[chosen]
  return columns_LDE, {
      'temperature': chosen, 'losses': losses,
      'accuracy_alone': (right / tokens).tolist(),
      'accuracy': (best['right'] / best['tokens']).tolist(),
      'entropy': (best['entropy'] / best['tokens']).tolist(),
      'load': (best['picks'] / best['picks'].sum(-1, keepdims=True)).tolist()}
