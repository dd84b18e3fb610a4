"""A run's parameters as a Source: any slice of them, from wherever they are kept.

A pretrained folder is read in place, and a trained run from its checkpoint. A run of zero steps is
what it starts from: a mixture is computed slice by slice when it is read, and stored nowhere.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
import os

import numpy as np

from btx_jax.convert.hugging_face import Folder
from btx_jax.data import text
from btx_jax.data.tokenizer import vocabulary
from btx_jax.errors import UsageError
from btx_jax.model.config import param_paths
from btx_jax.model.source import Extent, Index, Source
from btx_jax.run import CHECKPOINT, HUGGING_FACE, Run, lineage, lineage_of, parts_of, recipe_of
from btx_jax.study import edits, manifest, routers
from btx_jax.study.redrawn import Redrawn
from btx_jax.study.study import Study
from btx_jax.terminal import say

# What needs jax or orbax is imported late: `status` and reading folders need neither.

_FEED_FORWARD, _ROUTER = 'layers/ffn/', 'layers/ffn/router'
_VOCABULARY_AXIS = {'embed': 0, 'head': 1}  # parameters with a row per token, and its dimension


def final(study: Study, run: Run) -> Source:
  """The parameters that a run has after its last step."""
  if not run.steps:
    return start(study, run)
  from btx_jax.training.slices import Saved
  return Saved(checkpoints(study, run), run.steps, identity(study, run))


def start(study: Study, run: Run) -> Source:
  """The parameters that a run starts from, unless they are random."""
  if run.init == HUGGING_FACE:
    return Folder(run.folder)
  if run.init == CHECKPOINT:
    source = final(study, run.sources[0])
    return Redrawn(source, run.model, run.redraw, run.rng_seed) if run.redraw else source
  return mixture(study, run, routers.of(study, run))


def mixture(study: Study, run: Run, routers: np.ndarray | None = None) -> Source:
  """The mixture that a run starts from.

  Args:
    study: whose run it is.
    run: the run.
    routers: [L, D, E]; None is random ones, of an edit for the new experts only.
  """
  import jax

  from btx_jax import btx
  rng = jax.random.key(run.rng_seed)
  if run.edit is None:
    return btx.mix(_finals(study, run), run.model, rng, run.recipe, routers)
  recipe = run.edit.recipe(run.model.ffn_dim)
  mixed = btx.mix(_parts(study, run), run.model, rng, recipe, routers)
  if routers is not None:
    return mixed
  before = run.sources[0]
  return KeptRouters(mixed, final(study, before), param_paths(before.model), run.edit.kept)


def _parts(study: Study, run: Run) -> list[Source]:
  """The experts of an edit, each as a dense model."""
  finals = [final(study, source) for source in run.sources]
  return [Expert(finals[source], number) if source == 0 else finals[source]
          for source, number in parts_of(run).parts]


def average(study: Study, run: Run) -> Source:
  """The plain average of a mixture's sources: the weights of its mean, without its rules."""
  from btx_jax import btx
  return btx.average(_finals(study, run), recipe_of(run).mean)


def _finals(study: Study, run: Run) -> list[Source]:
  """A mixture's sources, all in the vocabulary of the one that the mixture follows."""
  return aligned(study, run.sources, [final(study, source) for source in run.sources],
                 recipe_of(run).reference)


def trained(run: Run) -> list[Run]:
  """The runs whose checkpoints `final` reads."""
  return [each for each in lineage(run, until=lambda each: each.steps > 0) if each.steps]


def checkpoints(study: Study, run: Run) -> str:
  """The directory of a run's checkpoints."""
  return os.path.join(study.folder(run.name), 'checkpoints')


def identity(study: Study, run: Run) -> str:
  """The identity with which a run's checkpoints were saved; zeros if it has no manifest."""
  return manifest.identity_in(study.folder(run.name)) or '0' * 16


def kept(study: Study, run: Run) -> list[int]:
  """The steps of a run that have a checkpoint on disk, in order."""
  from btx_jax.training.slices import kept_steps
  return kept_steps(checkpoints(study, run))


def superseded(study: Study) -> list[Run]:
  """Failed runs whose kept steps suffice: every run that starts from one starts from a kept step.

  The study continues without them. They are tried again only with --run.
  """
  result = []
  for run in study.runs.values():
    after = [other for other in study.runs.values()
             if any(source.name == run.name for source in other.sources)]
    if after and all(other.from_step for other in after) and (
        study.state(run.name) == manifest.FAILED):
      steps = kept(study, run)
      if all(other.from_step in steps for other in after):
        result.append(run)
  return result


def check_complete(study: Study, needed: Iterable[Run], what: str) -> None:
  """Raises UsageError unless the parameters of all needed runs are here.

  Args:
    study: whose runs they are.
    needed: the runs; of those of which a step is needed, not the end, it is not checked.
    what: what needs them, and a verb.
  """
  for run in needed:
    state = study.state(run.name)
    if run.of_steps or state == manifest.COMPLETE:
      continue
    if state == manifest.PUBLISHED:
      raise UsageError(f'{what} {run.name!r}, of which only the row in {study.config.rows} is here,'
                       f' without its parameters; run --run={run.name} first.')
    raise UsageError(f'{what} {run.name!r}, which is {state}; run --run={run.name} first.')


def needs(run: Run) -> list[Run]:
  """The runs from whose directories a run is made: those that it starts from, and those that these
  are computed from."""
  found = lineage_of(run.sources, until=lambda each: each.steps > 0)
  if run.state and run.sources[0].objective.has_reference:  # their reference is the same
    found += needs(run.sources[0])
  if run.edit and run.edit.stored and (before := edits.fitted(run.sources[0])):
    found.append(before)  # it has the sums that the edit takes
  return found


def with_published(study: Study, runs: Iterable[Run]) -> list[str]:
  """The names of runs that are to be made, and of all published ones that they need for it."""
  found: dict[str, None] = {}

  def visit(run: Run):
    if run.name not in found:
      found[run.name] = None
      for each in needs(run):
        if study.state(each.name) == manifest.PUBLISHED:
          visit(study.runs[each.name])

  for run in runs:
    visit(run)
  return [name for name in study.runs if name in found]


class Expert:
  """One expert of a mixture beside the weights that all share: a dense model."""

  def __init__(self, mixture: Source, number: int):
    self._mixture, self._number = mixture, number

  def read(self, path: str, index: Index) -> np.ndarray:
    if not path.startswith(_FEED_FORWARD):
      return self._mixture.read(path, index)
    return self._mixture.read(*self._inside(path, index))[:, 0]

  def extent(self, path: str, index: Index) -> Extent | None:
    if path.startswith(_FEED_FORWARD):
      path, index = self._inside(path, index)
    return self._mixture.extent(path, index)

  def scratch_bytes(self, path: str) -> int:
    if path.startswith(_FEED_FORWARD):
      path = _in_mixture(path)
    return self._mixture.scratch_bytes(path)

  def _inside(self, path: str, index: Index) -> tuple[str, Index]:
    """A slice of the expert's feed-forward layers as one of the mixture's."""
    layers, *matrix = index
    return _in_mixture(path), (layers, slice(self._number, self._number + 1), *matrix)


def _in_mixture(path: str) -> str:
  return path.replace(_FEED_FORWARD, f'{_FEED_FORWARD}experts/')


class KeptRouters:
  """A mixture in which some experts have the routers of another one, bit for bit."""

  def __init__(self, mixture: Source, before: Source, paths: Collection[str],
               kept: Mapping[int, int]):
    """`before`, `paths`: the other mixture, and the paths of its parameters; `kept`: the number of
    an expert in the mixture -> its number in the other one."""
    self._mixture, self._before, self._paths, self._kept = mixture, before, paths, kept

  def read(self, path: str, index: Index) -> np.ndarray:
    # A bias may be new here.
    if not path.startswith(_ROUTER) or path not in self._paths:
      return self._mixture.read(path, index)
    whole = (slice(None),) * len(index)
    values, old = np.array(self._mixture.read(path, whole)), self._before.read(path, whole)
    values[..., list(self._kept)] = old[..., list(self._kept.values())]
    return values[index]

  def extent(self, path: str, index: Index) -> Extent | None:
    return self._mixture.extent(path, index)

  def scratch_bytes(self, path: str) -> int:
    return self._mixture.scratch_bytes(path)


class Aligned:
  """A source in the vocabulary of another one, the reference.

  All text of a study has the ids of its tokenizer. A pretrained model with a tokenizer of its own
  can still be a source: its rows of embedding and head are matched by the token's name. A token
  that it lacks gets the reference's row, so that the mean counts the reference once more there:
  simpler than weights per row, and the same where two models are mixed. Tokens that the reference
  lacks are not read.
  """

  def __init__(self, source: Source, reference: Source, rows_V: np.ndarray):
    """`rows_V`: the source's row for each token of the reference, from `matching_rows`."""
    self._source, self._reference = source, reference
    # The reference's rows are numbered on after the source's, so that a difference of 1 always
    # means adjacent rows of one source.
    self._first_of_reference = int(rows_V.max(initial=-1)) + 1
    self._rows = np.where(rows_V < 0, self._first_of_reference + np.arange(len(rows_V)), rows_V)

  def read(self, path: str, index: Index = ()) -> np.ndarray:
    """A slice of the parameter at this path; embedding and head as float32."""
    if path not in _VOCABULARY_AXIS:
      return self._source.read(path, index)
    axis, at = _VOCABULARY_AXIS[path], [*index, *[slice(None)] * (2 - len(index))]
    wanted, found = self._rows[at[axis]], []
    for group in np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1):
      first, source = int(group[0]), self._source
      if first >= self._first_of_reference:
        first, source = first - self._first_of_reference, self._reference
      at[axis] = slice(first, first + len(group))
      found.append(source.read(path, tuple(at)).astype(np.float32))
    return np.concatenate(found, axis)

  def extent(self, path: str, index: Index) -> Extent | None:
    return None if path in _VOCABULARY_AXIS else self._source.extent(path, index)

  def scratch_bytes(self, path: str) -> int:
    return max(self._source.scratch_bytes(path), self._reference.scratch_bytes(path))


def aligned(study: Study, runs: Sequence[Run], sources: Sequence[Source], reference: int
            ) -> list[Source]:
  """The sources, each in the vocabulary of the reference; prints how many tokens match.

  Args:
    study: whose runs they are.
    runs: the run of each source.
    sources: the parameters of each.
    reference: which of them is the reference.
  """
  size, result = runs[reference].model.vocab_size, list(sources)
  differing = [i for i, run in enumerate(runs) if run.vocabulary or run.model.vocab_size != size]
  if not differing:
    return result
  ours = text.tokenizer(study.config, study.data_folder).vocabulary()
  for i in differing:
    run = runs[i]
    theirs = vocabulary(run.folder) if run.vocabulary else ours
    rows = matching_rows(ours, size, theirs, run.model.vocab_size)
    result[i] = Aligned(sources[i], sources[reference], rows)
    shared = int((rows >= 0).sum())
    say(f'{run.name}: {shared:,} of {len(ours):,} tokens are matched by name; the mean takes the '
        f'others from {runs[reference].name}. {run.model.vocab_size - shared:,} rows of its own '
        'are left out')
  return result


def matching_rows(ours: Mapping[str, int], size: int, theirs: Mapping[str, int], their_size: int
                  ) -> np.ndarray:
  """The row of a source for each of the reference's tokens.

  Args:
    ours, size: tokens by name, and V, of the reference.
    theirs, their_size: the same of the source.

  Returns:
    [V] rows of the source; -1 for tokens that it lacks, and for rows of the reference that belong
    to no token.
  """
  result = np.full(size, -1)
  for token, i in ours.items():
    row = theirs.get(token, -1)
    if i < size and row < their_size:
      result[i] = row
  return result
