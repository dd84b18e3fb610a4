"""What a run minimises, and over which parameters: fields of a config's section `train`."""

from collections.abc import Sequence
import dataclasses
import re

from btx_jax.errors import UsageError, nearest
from btx_jax.model import config as model_config


@dataclasses.dataclass(frozen=True)
class Objective:
  """Next-token loss, and what a mixture's routers add to it.

  Attributes:
    balance: alpha, weight of the balancing loss (paper 3.3); there is none by hash.
    balance_scope: 'microbatch' or 'batch', see train.make_train_step.
    router_z: weight of the mean of logsumexp(router logits)^2, added up over layers.
    balance_bias: change a step of the biases that balance the load without a loss; 0 is off.
    freeze: regexes; a parameter whose path one is found in stays as it is.
  """
  balance: float = 0.01
  balance_scope: str = 'microbatch'
  router_z: float = 0.0
  balance_bias: float = 0.0
  freeze: tuple[str, ...] = ()

  def __post_init__(self):
    object.__setattr__(self, 'freeze', tuple(self.freeze))
    for field in ('balance', 'router_z', 'balance_bias'):
      if getattr(self, field) < 0:
        raise UsageError(f'train.{field} = {getattr(self, field)} cannot be negative.')
    if self.balance_scope not in ('microbatch', 'batch'):
      raise UsageError(f'train.balance_scope = {self.balance_scope!r}; '
                       f"{nearest(self.balance_scope, ('microbatch', 'batch'))}")
    for pattern in self.freeze:
      try:
        re.compile(pattern)
      except re.error as error:
        raise UsageError(f'train.freeze: {pattern!r} is not a regular expression: {error}.'
                         ) from error

  def check(self, model: model_config.Config):
    """Raises UsageError if a model has nothing for a setting to act on."""
    if model.num_experts:
      if self.balance_bias and model.router not in model_config.SCORING:
        raise UsageError(f'train.balance_bias = {self.balance_bias}: the router {model.router!r} '
                         'does not choose the best by score, so that a bias would change '
                         f'nothing; set it to 0, or use {" or ".join(model_config.SCORING)}.')
      if self.router_z and not model.has_router:
        raise UsageError(f'train.router_z = {self.router_z}: the router {model.router!r} has no '
                         'logits to keep small; set it to 0.')
    paths = model_config.param_paths(model)
    for pattern in self.freeze:
      if not any(frozen(path, [pattern]) for path in paths):
        raise UsageError(f'train.freeze: {pattern!r} is found in no parameter; '
                         f'{nearest(pattern, paths)}')
    if not any(trains(path, self.freeze) for path in paths):
      raise UsageError(f'train.freeze = {self.freeze} leaves nothing to train of '
                       f'{", ".join(paths)}.')


def frozen(path: str, freeze: Sequence[str]) -> bool:
  """Whether one of the regexes is found in the path of a parameter."""
  return any(re.search(pattern, path) for pattern in freeze)


def trains(path: str, freeze: Sequence[str]) -> bool:
  """Whether the optimizer changes the parameter of this path: it has moments, and decays.

  The bias of routers is never the optimizer's, see routing.balanced_bias.
  """
  return not path.endswith('router_bias') and not frozen(path, freeze)
