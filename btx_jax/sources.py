"""The parameters of a run as a source: any slice of them, from wherever they are kept.

What a source is, convert/export.py says. A pretrained folder is read in place, and what was trained
from its checkpoint. A run of zero steps is its start: what it mixes is computed slice by slice
when it is asked for, and kept nowhere.
"""

from collections.abc import Iterator, Sequence
import functools
import os

import numpy as np

from btx_jax import run as run_lib
from btx_jax import vocabulary
from btx_jax.convert import hugging_face
from btx_jax.convert.export import Source
from btx_jax.convert.safetensors import Index, Stretch
from btx_jax.model.config import Config
from btx_jax.recipe import Recipe
from btx_jax.run import Run
from btx_jax.study import Study

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

    from btx_jax import btx, sharding
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
  from btx_jax import checkpoint
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
  aligned = vocabulary.aligned(
      study, [study.runs[source] for source in run.sources],
      [final(study, source) for source in run.sources], recipe.reference)
  return Mix(model, recipe, aligned, run_lib.seed_of(run.name, run.seed))


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
