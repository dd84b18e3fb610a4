"""Makes a Generator for a run: from its model, or from the models of an ensemble."""

from collections.abc import Sequence
import contextlib
import dataclasses
import os

import jax
import numpy as np

from btx_jax.commands.export import generation_of
from btx_jax.data import text, tokens
from btx_jax.data.text import Text
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.errors import UsageError
from btx_jax.fitting import samples
from btx_jax.generation.engine import Engine, Model
from btx_jax.generation.ensemble import Ensemble
from btx_jax.generation.generate import Generator
from btx_jax.generation.selection import ByPosterior, ByReader, BySimilarity, Selection
from btx_jax.run import Run, linear_of, reader_model
from btx_jax.scoring.ensemble import Similarity
from btx_jax.selector import POSTERIOR, Merge
from btx_jax.study import context, params, routers
from btx_jax.study.study import Study
from btx_jax.training import layout


def open_generator(study: Study, run: Run, dtype: str, stack: contextlib.ExitStack,
                   columns_DE: np.ndarray | None = None) -> Generator:
  """A Generator with the parameters of a run in memory; nothing is written.

  Args:
    study: the study of the run.
    run: a run that can be read, see models.check_readable.
    dtype: the type of the weights; '' means that of the run's model.
    stack: gets the mesh as a context if there are several devices.
    columns_DE: the map of a linear selector; None to read it from the run's directory.

  Raises:
    UsageError: a selector has not been fitted, or the text with which it compares is missing.
  """
  tokenizer = text.tokenizer(study.config, study.data_folder)
  return Generator.of(open_engine(study, run, dtype, stack, columns_DE), tokenizer,
                      generation_of(run, tokenizer).stop_ids, context.length(run))


def open_engine(study: Study, run: Run, dtype: str, stack: contextlib.ExitStack,
                columns_DE: np.ndarray | None = None) -> Engine:
  """The engine of a run; see open_generator."""
  mesh = layout.mesh_here(study.config, study.runs)
  parts = run.sources if run.selector else (run,)
  parameters = [params.final(study, each, mesh) for each in parts]
  if mesh.size > 1:
    stack.enter_context(jax.set_mesh(mesh))
  engines = {}
  for each in parts:  # frees each model's training layout once its decoding layout exists
    model = dataclasses.replace(each.model, dtype=dtype or each.model.dtype)
    engines[each.name] = Model(model, parameters.pop(0))
  if run.selector is None:
    return engines[run.name]
  return Ensemble([engines[expert.name] for expert in run.experts],
                  _selection(study, run, engines, columns_DE))


def _selection(study: Study, run: Run, engines: dict[str, Model], columns_DE: np.ndarray | None
               ) -> Selection:
  selector, E = run.selector, len(run.experts)
  if isinstance(selector, Merge):
    if selector.kind == POSTERIOR:
      return ByPosterior(E, selector.top)
    tokenizer = text.tokenizer(study.config, study.data_folder)
    similarity = Similarity(_seen(study, run, tokenizer))

    def similarities(texts: Sequence[Sequence[int]]) -> np.ndarray:
      return similarity([tokenizer.decode(list(ids)) for ids in texts])

    return BySimilarity(similarities, E, selector.top)
  reader = engines[run.reader.name]
  config = dataclasses.replace(reader.config, num_layers=reader_model(run).num_layers)
  return ByReader(config, reader.weights, _fitted(study, run) if columns_DE is None else columns_DE,
                  linear_of(run))


def _fitted(study: Study, run: Run) -> np.ndarray:
  columns_1DE = routers.of(study, run)
  assert columns_1DE is not None
  return columns_1DE[0]


def _seen(study: Study, run: Run, tokenizer: Tokenizer) -> list[list[str]]:
  """Samples of the text that each expert was trained on."""
  train = {}
  for domain in {domain for expert in run.experts for domain in expert.weights}:
    folder = os.path.join(study.data_folder, domain)
    if not os.path.exists(folder):
      raise UsageError(f'{run.name!r} compares texts with the training text of its experts, and '
                       f'{folder} does not exist; run --run={run.name} first.')
    train[domain] = tokens.load(folder, 'train')
  return [samples.seen(expert, Text(tokenizer, train, {})) for expert in run.experts]
