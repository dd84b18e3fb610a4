"""The parameters of a run as a source: any slice of them, from wherever they are kept.

What a source is, convert/export.py says. A pretrained folder is read in place, and what was trained
from its checkpoint. A run of zero steps is its start: what it mixes is computed slice by slice
when it is asked for, and kept nowhere.
"""

from collections.abc import Iterator, Mapping, Sequence
import functools
import os

import numpy as np

from btx_jax import run as run_lib
from btx_jax.convert import hugging_face
from btx_jax.convert.export import Source
from btx_jax.convert.safetensors import Index, Stretch
from btx_jax.data import text
from btx_jax.data import tokenizer as tokenizer_lib
from btx_jax.model.config import Config
from btx_jax.recipe import Recipe
from btx_jax.run import Run
from btx_jax.study.study import Study
from btx_jax.terminal import say

_AXIS = {'embed': 0, 'head': 1}  # parameters with a row a token, and where it is

# What needs jax or orbax is imported late: looking on and folders take neither.


class Mix:
  """A mixture of sources: btx.part, and of what is new btx.new."""

  def __init__(self, model: Config, recipe: Recipe, sources: Sequence[Source], seed: int = 0):
    """`seed`: of the routers."""
    self._model, self._recipe, self._sources, self._seed = model, recipe, sources, seed

  def read(self, path: str, index: Index) -> np.ndarray:
    from btx_jax import btx
    if btx.is_new(path):
      return self._new[path][index]
    return btx.part(self._recipe, path, index,
                    lambda source, path, index: self._sources[source].read(path, index))

  def stretch(self, path: str, index: Index) -> Stretch | None:
    from btx_jax import btx
    if btx.is_new(path) or not (found := btx.only(self._recipe, path, index)):
      return None
    source, path, index = found
    return self._sources[source].stretch(path, index)

  def room(self, path: str) -> int:
    if path.rsplit('/', 1)[-1] in ('router', 'router_bias'):
      return 16 * self._model.num_layers * self._model.dim * self._model.num_experts
    return max(source.room(path.replace('/experts/', '/')) for source in self._sources)

  @functools.cached_property
  def _new(self) -> dict[str, np.ndarray]:
    """Parameters that no source has, by path: made whole, on the CPU, so the same everywhere."""
    import jax

    from btx_jax import btx
    from btx_jax.devices import sharding
    from btx_jax.model import llama
    shapes = {sharding.path_of(path): leaf.shape
              for path, leaf in jax.tree.leaves_with_path(llama.shapes(self._model))}
    cpu = jax.sharding.Mesh(jax.local_devices(backend='cpu')[:1], ('one',))
    with jax.set_mesh(cpu):
      make = jax.jit(lambda: {
          path: btx.new(path, shape, self._recipe, jax.random.key(self._seed))
          for path, shape in shapes.items() if btx.is_new(path)})
      return jax.tree.map(np.asarray, make())


def final(study: Study, name: str) -> Source:
  """What a complete run ended with."""
  run = study.runs[name]
  if not run.steps:
    return start(study, run)
  from btx_jax.training import checkpoint
  return checkpoint.Saved(checkpoints(study, name), run.steps)


def start(study: Study, run: Run) -> Source:
  """What a run starts from, if that is not random."""
  if run.init == run_lib.HUGGING_FACE:
    return hugging_face.Folder(run.folder)
  if run.init == run_lib.CHECKPOINT:
    return final(study, run.sources[0])
  return mix(study, run, run.model, run.recipe)


def mix(study: Study, run: Run, model: Config, recipe: Recipe) -> Mix:
  """A mixture of what a run is made from, in the vocabulary of one of these."""
  matched = aligned(
      study, [study.runs[source] for source in run.sources],
      [final(study, source) for source in run.sources], recipe.reference)
  return Mix(model, recipe, matched, run_lib.seed_of(run.name, run.seed))


def trained(study: Study, run: Run) -> Iterator[str]:
  """The runs whose checkpoints `final` reads."""
  if run.steps:
    yield run.name
  else:
    for source in run.sources:
      yield from trained(study, study.runs[source])


def checkpoints(study: Study, name: str) -> str:
  """The directory of a run's checkpoints."""
  return os.path.join(study.folder(name), 'checkpoints')


def rows(ours: Mapping[str, int], size: int, theirs: Mapping[str, int], their_size: int
         ) -> np.ndarray:
  """Where a source has the row of each of our ids.

  Args:
    ours, size: tokens by name, and V, of the reference.
    theirs, their_size: the same of the source.

  Returns:
    [V] rows of the source, -1 where it has none: for tokens that it does not know, and for rows
    of the reference that are no token's.
  """
  result = np.full(size, -1)
  for token, i in ours.items():
    row = theirs.get(token, -1)
    if i < size and row < their_size:
      result[i] = row
  return result


class Aligned:
  """A source in the vocabulary of another, the reference, to be read slice by slice.

  A token that the source lacks has the reference's row, so that in the mean the reference counts
  for it once more: simpler than weights of each row, and the same where two models are mixed.
  Tokens that the reference lacks are not read.
  """

  def __init__(self, source, reference, rows_V: np.ndarray):
    """`rows_V`: as `rows` gives them."""
    self._source, self._reference = source, reference
    # Those of the reference are numbered on behind the source's, so that neighbours of either
    # are told by a difference of 1.
    self._behind = int(rows_V.max(initial=-1)) + 1
    self._rows = np.where(rows_V < 0, self._behind + np.arange(len(rows_V)), rows_V)

  def read(self, path: str, index: Index = ()) -> np.ndarray:
    """A slice of the parameter at the '/'-joined path; of embedding and head, as float32."""
    if path not in _AXIS:
      return self._source.read(path, index)
    axis, index = _AXIS[path], [*index, *[slice(None)] * (2 - len(index))]
    wanted, found = self._rows[index[axis]], []
    for group in np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1):
      first, source = int(group[0]), self._source
      if first >= self._behind:
        first, source = first - self._behind, self._reference
      index[axis] = slice(first, first + len(group))
      found.append(source.read(path, tuple(index)).astype(np.float32))
    return np.concatenate(found, axis)

  def stretch(self, path: str, index: Index) -> Stretch | None:
    return None if path in _AXIS else self._source.stretch(path, index)

  def room(self, path: str) -> int:
    return max(self._source.room(path), self._reference.room(path))


def aligned(study, runs: Sequence, sources: Sequence, reference: int) -> list:
  """The sources of a mixture, each in the vocabulary of the reference; tells what that means.

  Args:
    study: whose runs they are.
    runs: that the sources are the parameters of.
    sources: the parameters of each, as hugging_face.Folder and checkpoint.Saved give them.
    reference: which of them it is.
  """
  size, result = runs[reference].model.vocab_size, list(sources)
  apart = [i for i, run in enumerate(runs) if run.vocabulary or run.model.vocab_size != size]
  if not apart:
    return result
  ours = text.tokenizer(study.config, study.data_folder).vocabulary()
  for i in apart:
    run = runs[i]
    theirs = tokenizer_lib.load(run.folder).vocabulary() if run.vocabulary else ours
    found = rows(ours, size, theirs, run.model.vocab_size)
    result[i] = Aligned(sources[i], sources[reference], found)
    shared = int((found >= 0).sum())
    say(f'{run.name}: of {len(ours):,} tokens {shared:,} are matched by name; for the others the '
        f'mean has the rows of {runs[reference].name}. {run.model.vocab_size - shared:,} rows of '
        'its own are left out')
  return result
