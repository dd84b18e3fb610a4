"""How an ensemble chooses an expert for each token, as plain data; fitting/select.py fits it.

The selector reads the text so far, never the token that is to be predicted. Its logits are linear
in the mean of the reader's hidden states, so the mean of each position's logits is the same thing:
`choose` needs no hidden states.
"""

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

from btx_jax.errors import UsageError, nearest
from btx_jax.recipe import ROUTER_KINDS, labels_from_config

KINDS = ROUTER_KINDS[1:]  # random numbers choose nothing


@dataclasses.dataclass(frozen=True)
class Selector:
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


def choose(logits_TE: np.ndarray, decay: float, hysteresis: float) -> np.ndarray:
  """The expert for the token after each position of one document, [T].

  Args:
    logits_TE: of each position's own hidden state.
    decay: see Selector.decay.
    hysteresis: how far the mean logit of another expert must lead before it is chosen.
  """
  total, weight, chosen = np.zeros(logits_TE.shape[1]), 0.0, np.zeros(len(logits_TE), np.int32)
  for i, logits_E in enumerate(logits_TE.astype(np.float64)):
    total, weight = decay * total + logits_E, decay * weight + 1
    best = total.argmax()
    lead = (total[best] - total[chosen[i - 1]]) / weight
    chosen[i] = best if i == 0 or lead > hysteresis else chosen[i - 1]
  return chosen


def from_config(init, sources: Sequence[str], domain_of: Mapping[str, str],
                domains: Sequence[str], num_layers: int) -> Selector:
  """The selector that `base.ensemble(...)` describes.

  Args:
    init: what base.ensemble returns.
    sources: names of the ensemble's sources, experts first.
    domain_of: for each expert's run that was trained on a single domain, that domain.
    domains: of the config.
    num_layers: of the reader.

  Raises:
    UsageError: an unknown kind or label, an expert without a label, or a number that is out of
      range or has no effect.
  """
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
  return Selector(given.kind, given.rows, given.ridge, labels, reader, layers,
                  init.forget, init.hysteresis)
