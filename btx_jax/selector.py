"""How an ensemble predicts a token from its experts, as plain data.

Either a linear map of hidden states chooses one expert for each token (Linear, which
fitting/select.py fits), or the experts' probabilities are averaged with weights (Merge). Both
follow from the text so far, never from the token that is to be predicted.

The logits of a linear selector are linear in the mean of the reader's hidden states, so the mean of
each position's logits is the same thing: `choose` needs no hidden states.
"""

from collections.abc import Collection, Mapping, Sequence
import dataclasses

import numpy as np

from btx_jax.errors import UsageError, nearest
from btx_jax.recipe import ROUTER_KINDS, labels_from_config

KINDS = ROUTER_KINDS[1:]  # random numbers choose nothing
TFIDF, POSTERIOR = MERGES = ('tfidf', 'posterior')
BLOCK = 64  # tokens between tf-idf's comparisons of the text so far
TEMPERATURE = 0.1  # c-BTM's (Gururangan et al. 2023), of squared distances


@dataclasses.dataclass(frozen=True)
class Linear:
  """A linear map from a mean hidden state of the text so far to a logit for each expert.

  The experts are the first sources of the ensemble, as many as there are labels.

  Attributes:
    kind: 'ridge' or 'mean', see base.from_text.
    rows: training rows of each domain that are read.
    ridge: lambda of the regression, in units of the mean square of a feature's entries.
    labels: for each expert, the domain whose text it should be chosen for.
    reader: which source's hidden states are read.
    layers: how many of its layers; 0 is all.
    forget: tokens after which a hidden state counts half in the mean; 0 never forgets.
    hysteresis: how far the logit of another expert must lead before it is chosen.
  """
  kind: str
  rows: int
  ridge: float
  labels: tuple[str, ...]
  reader: int
  layers: int = 0
  forget: float = 0.0
  hysteresis: float = 0.0

  @property
  def domains(self) -> tuple[str, ...]:
    """The domains whose text is read, each once."""
    return tuple(dict.fromkeys(self.labels))

  @property
  def decay(self) -> float:
    """The factor on the weight of all earlier hidden states at each new one; 1 keeps them."""
    return 0.5 ** (1 / self.forget) if self.forget else 1.0


@dataclasses.dataclass(frozen=True)
class Merge:
  """Branch-Train-Merge: the weighted mean of the experts' probabilities predicts a token.

  The experts are the sources of the ensemble.

  Attributes:
    kind: what the weights follow from, 'tfidf' or 'posterior'; see base.tfidf and base.posterior.
    top: how many experts have a weight; 0 is all.
  """
  kind: str
  top: int

  def computed(self, experts: int) -> int:
    """How many of the experts are computed for a token, once there is text to compare."""
    return self.top if self.top and self.kind == TFIDF else experts


Selector = Linear | Merge


class Chooser:
  """Chooses the expert for the next token of one document, position by position."""

  def __init__(self, decay: float, hysteresis: float):
    """
    Args:
      decay: see Linear.decay.
      hysteresis: how far the mean logit of another expert must lead before it is chosen.
    """
    self._decay, self._hysteresis = decay, hysteresis
    self._total_E, self._weight, self._chosen = 0.0, 0.0, -1

  def add(self, logits_E: np.ndarray) -> int:
    """The expert for the token after this position, given the logits from its hidden state."""
    total_E = self._total_E = self._decay * self._total_E + logits_E.astype(np.float64)
    self._weight = self._decay * self._weight + 1
    best = int(total_E.argmax())
    if self._chosen < 0 or (total_E[best] - total_E[self._chosen]) / self._weight > (
        self._hysteresis):
      self._chosen = best
    return self._chosen


def choose(logits_TE: np.ndarray, decay: float, hysteresis: float) -> np.ndarray:
  """The expert for the token after each position of one document, [T]; see Chooser."""
  chooser = Chooser(decay, hysteresis)
  return np.array([chooser.add(logits_E) for logits_E in logits_TE], np.int32)


def similarity_log_weights(cosines_NE: np.ndarray, top: int) -> np.ndarray:
  """Log weights [tokens, E] of the most similar experts: a softmax of squared distances."""
  return log_softmax_of_top(2 * cosines_NE / TEMPERATURE, top)  # |a - b|^2 = 2 - 2 cos


def log_softmax_of_top(logits_NE: np.ndarray, top: int) -> np.ndarray:
  """Log softmax over the `top` largest logits of each token, all if 0; -inf for the others.

  Logits equal to the smallest of these are kept, too.
  """
  if top:
    least_N1 = np.sort(logits_NE, 1)[:, -top, None]
    logits_NE = np.where(logits_NE >= least_N1, logits_NE, -np.inf)
  return logits_NE - logsumexp(logits_NE)


def logsumexp(x_NE: np.ndarray) -> np.ndarray:
  """log(sum(exp(x))) over the last axis, which becomes 1."""
  most = x_NE.max(1, keepdims=True)
  return most + np.log(np.exp(x_NE - most).sum(1, keepdims=True))


def from_config(init, sources: Sequence[str], domain_of: Mapping[str, str],
                trained: Collection[str], domains: Sequence[str], num_layers: int) -> Selector:
  """The selector that `base.ensemble(...)` describes.

  Args:
    init: what base.ensemble returns.
    sources: names of the ensemble's sources, experts first.
    domain_of: for each expert's run that was trained on a single domain, that domain.
    trained: names of the sources that are trained here.
    domains: of the config.
    num_layers: of the reader.

  Raises:
    UsageError: an unknown kind or label, an expert without a label or without the text that it is
      compared by, or a number that is out of range or has no effect.
  """
  if 'top' in init.selector:
    return _merge(init, sources, trained)
  return _linear(init, sources, domain_of, domains, num_layers)


def _merge(init, sources: Sequence[str], trained: Collection[str]) -> Merge:
  given = init.selector
  if given.kind not in MERGES:
    raise UsageError(f'ensemble: selector: kind = {given.kind!r}; {nearest(given.kind, MERGES)}')
  for field in ('reader', 'layers', 'forget', 'hysteresis'):
    if init[field]:
      raise UsageError(f'ensemble: {field} = {init[field]!r} has no effect with '
                       f'base.{given.kind}(...), which reads no hidden states; omit it, or use '
                       'base.from_text(...).')
  if not 0 <= given.top <= len(sources):
    raise UsageError(f'ensemble: selector: top = {given.top} must lie between 1 and the number of '
                     f'experts, {len(sources)}; 0 is all of them.')
  for name in sources if given.kind == TFIDF else ():
    if name not in trained:
      raise UsageError(f'ensemble: selector: {name!r} is not trained here, so it has no training '
                       'text to compare with; use base.posterior(...), or base.from_text(...) with '
                       'labels.')
  return Merge(given.kind, given.top)


def _linear(init, sources: Sequence[str], domain_of: Mapping[str, str], domains: Sequence[str],
            num_layers: int) -> Linear:
  given = init.selector
  if given.kind not in KINDS:
    raise UsageError(f'ensemble: selector: kind = {given.kind!r}; {nearest(given.kind, KINDS)}')
  experts = tuple(dict.fromkeys(init.runs))
  labels = labels_from_config('ensemble: selector', given, experts, domain_of, domains)
  if given.temperature:
    raise UsageError(f'ensemble: selector: temperature = {given.temperature} changes nothing, '
                     'because the expert with the largest logit is chosen; leave it at 0.')
  if not 0 <= init.layers <= num_layers:
    raise UsageError(f'ensemble: layers = {init.layers} must lie between 1 and the {num_layers} '
                     'layers of the reader; 0 is all of them.')
  for field in ('forget', 'hysteresis'):
    if init[field] < 0:
      raise UsageError(f'ensemble: {field} = {init[field]} cannot be negative.')
  reader = sources.index(init.reader) if init.reader else 0
  layers = init.layers if init.layers < num_layers else 0
  return Linear(given.kind, given.rows, given.ridge, labels, reader, layers,
                init.forget, init.hysteresis)
