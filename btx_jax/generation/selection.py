"""Weights an ensemble's experts for the next token of each row of a batch.

These are the selectors of selector.py, applied to texts that grow. The weights are those that
scoring/selected.py computes for the same text: the choice for a token depends on all text before
it, from the first token on.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

from btx_jax import selector
from btx_jax.generation import decode
from btx_jax.generation.engine import padded
from btx_jax.generation.weights import Weights
from btx_jax.model.config import Config
from btx_jax.selector import Chooser, Linear

Texts = Sequence[Sequence[int]]


class State(Protocol):
  """The selector's state of a batch. Its arrays have one row per text, and no filling rows."""

  def computed(self) -> np.ndarray:
    """Whether each expert is computed for the next token, [rows, E]."""
    ...

  def log_weights(self, nll_RE: np.ndarray) -> np.ndarray:
    """Log weights of the experts for the next token, [rows, E]; -inf for experts without weight.

    Args:
      nll_RE: the negative log likelihood of the text so far by each expert, float64 in nats; valid
        only if the selection's `scores` is true.
    """
    ...

  def add(self, tokens_B: jax.Array, live: Sequence[bool]) -> None:
    """Reads one more token of each row; see engine.Rows."""
    ...


class Selection(Protocol):
  """A selector.

  Attributes:
    scores: whether its weights depend on the likelihood of the text so far.
  """
  scores: bool

  def start(self, texts: Texts, slots: int) -> State:
    """Reads prompts; see engine.Engine."""
    ...


class ByReader(NamedTuple):
  """Chooses one expert by a linear map of a reader's hidden states; see selector.Linear.

  Attributes:
    config: the reader's sizes, with only the layers that are read.
    weights: the reader's weights, as returned by `unstack`; further layers are not used.
    columns_DE: the map.
    settings: the settings of the selector.
  """
  config: Config
  weights: Weights
  columns_DE: np.ndarray
  settings: Linear
  scores = False

  def start(self, texts: Texts, slots: int) -> State:
    """See Selection."""
    return _Read(self, texts, slots)


class _Read:
  """See State."""

  def __init__(self, selection: ByReader, texts: Texts, slots: int):
    layers = selection.weights['layers'][:selection.config.num_layers]
    self._model = (selection.config, {**selection.weights, 'layers': layers},
                   selection.columns_DE)
    tokens_BT, self._lengths_B = padded(texts)
    logits_BTE, self._cache = decode.read_prompts(*self._model, tokens_BT, self._lengths_B, slots)
    settings = selection.settings
    self._choosers = [Chooser(settings.decay, settings.hysteresis) for _ in texts]
    self._chosen_RE = np.zeros((len(texts), logits_BTE.shape[-1]), bool)
    for row, logits_TE in enumerate(np.asarray(logits_BTE)[:len(texts)]):
      for logits_E in logits_TE[:len(texts[row])]:
        self._choose(row, logits_E)

  def computed(self) -> np.ndarray:
    return self._chosen_RE.copy()

  def log_weights(self, nll_RE: np.ndarray) -> np.ndarray:
    del nll_RE
    return np.where(self._chosen_RE, 0.0, -np.inf)

  def add(self, tokens_B: jax.Array, live: Sequence[bool]) -> None:
    logits_BE, self._cache = decode.read_token(*self._model, tokens_B, self._lengths_B,
                                               self._cache)
    self._lengths_B = self._lengths_B + 1
    for row, logits_E in enumerate(np.asarray(logits_BE)[:len(live)]):
      if live[row]:
        self._choose(row, logits_E)

  def _choose(self, row: int, logits_E: np.ndarray):
    self._chosen_RE[row] = False
    self._chosen_RE[row, self._choosers[row].add(logits_E)] = True


class ByPosterior(NamedTuple):
  """Weights the experts by the likelihood that they give to the text so far.

  Attributes:
    experts: E.
    top: the number of experts that have a weight; 0 means all.
  """
  experts: int
  top: int = 0
  scores = True

  def start(self, texts: Texts, slots: int) -> State:
    """See Selection."""
    del slots
    return _Posterior(self, len(texts))


class _Posterior:
  """See State."""

  def __init__(self, selection: ByPosterior, rows: int):
    self._top, self._shape = selection.top, (rows, selection.experts)

  def computed(self) -> np.ndarray:
    return np.ones(self._shape, bool)

  def log_weights(self, nll_RE: np.ndarray) -> np.ndarray:
    return selector.log_softmax_of_top(-nll_RE, self._top)

  def add(self, tokens_B: jax.Array, live: Sequence[bool]) -> None:
    pass


class BySimilarity(NamedTuple):
  """Weights experts by the similarity of their training text to the text so far, by tf-idf.

  Attributes:
    similarities: token ids of texts -> their similarity to each expert's text, [texts, E].
    experts: E.
    top: the number of experts that have a weight; 0 means all.
  """
  similarities: Callable[[Texts], np.ndarray]
  experts: int
  top: int = 0
  scores = False

  def start(self, texts: Texts, slots: int) -> State:
    """See Selection."""
    del slots
    return _Similar(self, texts)


class _Similar:
  """See State."""

  def __init__(self, selection: BySimilarity, texts: Texts):
    self._selection, self._texts = selection, [list(text) for text in texts]
    self._cosines_RE = np.zeros((len(texts), selection.experts))
    self._compare(range(len(texts)))

  def computed(self) -> np.ndarray:
    return np.isfinite(self.log_weights(self._cosines_RE))

  def log_weights(self, nll_RE: np.ndarray) -> np.ndarray:
    del nll_RE
    return selector.similarity_log_weights(self._cosines_RE, self._selection.top)

  def add(self, tokens_B: jax.Array, live: Sequence[bool]) -> None:
    for text, token in zip(self._texts, np.asarray(tokens_B).tolist()):
      text.append(token)
    self._compare([row for row, goes_on in enumerate(live)
                   if goes_on and len(self._texts[row]) % selector.BLOCK == 0])

  def _compare(self, rows: Sequence[int]):
    """Compares the complete blocks of these rows with the experts' text."""
    before = {row: self._texts[row][:len(self._texts[row]) // selector.BLOCK * selector.BLOCK]
              for row in rows}
    found = [row for row, ids in before.items() if ids]
    if found:
      self._cosines_RE[found] = self._selection.similarities([before[row] for row in found])
