"""The FLOPs of setting routers or a linear selector from text, counted without jax."""

from collections.abc import Mapping
from typing import Any

from btx_jax.model.config import forward_flops_per_token
from btx_jax.run import Run, dense_model, reader_model
from btx_jax.selector import Linear

# What is needed of the figures: tokens fitted to and rows read by domain, and for routers the loss
# at each temperature.
FIGURES = {'tokens': {str: int}, 'rows': {str: int}, 'losses?': {str: float}}


def fit_flops(run: Run, figures: Mapping[str, Any]) -> int:
  """FLOPs of the matmuls on the devices that set a run's routers, or its selector, from text.

  Tokens that are fitted to pass a model without its head, and each outer product of what is read
  takes 2 D^2 in each layer. On the rows kept apart, of which all positions count, a selector
  computes its logits, and routers score the mixture at each temperature and choose in one expert.
  Sums that an edit takes from its mixture cost nothing. NumPy solves for the maps; that is not
  counted.

  Args:
    run: with `fitted` settings.
    figures: study/routers.figures of it, as FIGURES has them.
  """
  T, model = run.seq_len, run.model
  stored = run.edit.stored if run.edit else ()
  fitted_to = sum(tokens for domain, tokens in figures['tokens'].items() if domain not in stored)
  apart = T * sum(-(-rows // 5) for rows in figures['rows'].values())  # as samples.kept
  if isinstance(run.selector, Linear):
    reader = reader_model(run)
    hidden = forward_flops_per_token(reader, T, head=False)
    return (fitted_to * (hidden + 2 * reader.dim**2)
            + apart * (hidden + 2 * reader.dim * len(run.experts)))
  inputs = forward_flops_per_token(dense_model(model), T, head=False)
  of_layers = 2 * model.num_layers * model.dim
  scored = len(figures.get('losses', {})) * forward_flops_per_token(model, T)
  chosen = inputs + of_layers * model.num_experts
  return fitted_to * (inputs + of_layers * model.dim) + apart * (scored + chosen)
