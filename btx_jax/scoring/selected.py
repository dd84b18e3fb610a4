"""Scores an ensemble: its selector decides how much each expert counts for each token.

A linear selector chooses one expert; those of Branch-Train-Merge average several. An expert that is
computed for a token has read the whole window before it, so when it takes over, that is a fresh
pass over this text, whose FLOPs are counted. One model is in memory at a time.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from btx_jax.data import mixture
from btx_jax.data.text import Text
from btx_jax.data.tokens import Tokens
from btx_jax.fitting import samples, select
from btx_jax.model.config import forward_flops_per_token
from btx_jax.run import Run, reader_model
from btx_jax.scoring import ensemble
from btx_jax.selector import POSTERIOR, Linear, Merge, similarity_log_weights
from btx_jax.study import params
from btx_jax.study.study import Study
from btx_jax.terminal import say


def evaluate(study: Study, run: Run, text: Text, mesh: jax.sharding.Mesh) -> dict[str, dict]:
  """Bits per byte by domain of an ensemble. A linear selector must have been fitted.

  Returns:
    domain -> what ensemble.bits_per_byte returns, and what `usage` does.
  """
  found = _scored(study, run, text, mesh)
  result = {}
  for domain, tokens in text.held_out.items():
    nll_NE, log_weights_NE, computed_NE = found[domain]
    score = ensemble.bits_per_byte(nll_NE, log_weights_NE, tokens, text.tokenizer)
    result[domain] = score | usage(run, np.exp(log_weights_NE), computed_NE, tokens,
                                   study.config.evaluation.stride)
    say(f'{run.name}: {in_words(run, domain, result[domain])}')
  return result


def token_nll(study: Study, run: Run, text: Text, mesh: jax.sharding.Mesh) -> dict[str, np.ndarray]:
  """An ensemble's negative log likelihood of each token, [tokens] in nats, by domain of
  `text.held_out`. A linear selector must have been fitted."""
  return {domain: ensemble.averaged_nll(nll_NE, log_weights_NE) for
          domain, (nll_NE, log_weights_NE, _) in _scored(study, run, text, mesh).items()}


def _scored(study: Study, run: Run, text: Text, mesh: jax.sharding.Mesh
            ) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """For each domain three arrays [tokens, E]: each expert's negative log likelihood of each token,
  its log weight, and whether it is computed."""
  selector, held_out = run.selector, text.held_out
  if isinstance(selector, Merge) and selector.kind == POSTERIOR:
    computed = {domain: np.ones((len(tokens.ids), len(run.experts)), bool)
                for domain, tokens in held_out.items()}
    nll = _nll(study, run, text, mesh, computed)
    log_weights = {
        domain: ensemble.posterior_log_weights(nll[domain], tokens.starts, selector.top)
        for domain, tokens in held_out.items()}
  else:
    log_weights = (_by_similarity(run, text, selector) if isinstance(selector, Merge) else
                   _by_choice(study, run, text, mesh))
    computed = {domain: np.isfinite(found) for domain, found in log_weights.items()}
    nll = _nll(study, run, text, mesh, computed)
  return {domain: (nll[domain], log_weights[domain], computed[domain]) for domain in held_out}


def _by_choice(study: Study, run: Run, text: Text, mesh: jax.sharding.Mesh
               ) -> dict[str, np.ndarray]:
  """Log weights [tokens, E] by domain: 0 for the expert that a linear selector chooses."""
  say(f'{run.name}: {run.reader.name} reads, to choose experts')
  parameters, result = params.final(study, run.reader, mesh), {}
  for domain, tokens in text.held_out.items():
    chosen_N = select.choices(study, run, parameters, tokens, mesh)
    result[domain] = np.where(np.eye(len(run.experts), dtype=bool)[chosen_N], 0.0, -np.inf)
  return result


def _by_similarity(run: Run, text: Text, selector: Merge) -> dict[str, np.ndarray]:
  """Log weights [tokens, E] by domain, by tf-idf."""
  say(f'{run.name}: comparing texts by tf-idf')
  similarity = ensemble.Similarity([samples.seen(expert, text) for expert in run.experts])
  return {domain: similarity_log_weights(ensemble.similarities(
      similarity, tokens, text.tokenizer, len(run.experts)), selector.top)
          for domain, tokens in text.held_out.items()}


def _nll(study: Study, run: Run, text: Text, mesh: jax.sharding.Mesh,
         computed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Each expert's negative log likelihood of each token, [tokens, E] by domain.

  It is 0 for an expert that is computed for no token of the domain.

  Args:
    study, run, text, mesh: see `evaluate`.
    computed: whether each expert is computed for each token, [tokens, E] by domain.
  """
  nll = {domain: np.zeros(found.shape) for domain, found in computed.items()}
  for number, expert in enumerate(run.experts):
    wanted = [domain for domain, tokens in text.held_out.items()
              if computed[domain][tokens.has_score, number].any()]
    if not wanted:
      continue
    say(f'{run.name}: measuring {expert.name} on {", ".join(wanted)}')
    parameters = params.final(study, expert, mesh)
    for domain in wanted:
      nll[domain][:, number] = ensemble.token_nll(
          expert.model, parameters, text.held_out[domain], mesh, run.seq_len,
          study.config.evaluation.batch_size, study.config.evaluation.stride)
    del parameters  # one at a time
  return nll


def in_words(run: Run, domain: str, found: dict[str, Any]) -> str:
  """How an ensemble was used on a domain, as a line for a person."""
  shares = ', '.join(f'{name} {share:.1%}' for name, share in zip(run.expert_names, found['share'])
                     if share)
  return (f'tokens of {domain} by {shares}; {found["switches"]:.1f} switches per 1,000 tokens; '
          f'{found["forward_flops"] / 1e6:,.2f} MFLOP per token')


def usage(run: Run, weights_NE: np.ndarray, computed_NE: np.ndarray, tokens: Tokens,
          stride: int = 0) -> dict[str, Any]:
  """Which experts an ensemble used, and the FLOPs that this takes.

  FLOPs are those of matmuls, forward: of the reader and a linear selector for every token, of each
  expert that is computed for it, and of one that takes over for all text before it in the document
  and the window. Nothing is shared, not even if the reader is chosen or an expert returns.

  Args:
    run: the ensemble.
    weights_NE: of each expert for each token; they add up to 1.
    computed_NE: whether each expert is computed for each token.
    tokens: the text.
    stride: the stride of the windows, see bits.evaluate.

  Returns:
    `share`, the mean weight of each expert, [E]; `switches`, for how many tokens of 1,000 an expert
    takes over that was not computed for the token before; `forward_flops` per token.
  """
  counted_N, T = tokens.has_score, run.seq_len
  computed_NE = computed_NE[counted_N]
  inputs_N = np.flatnonzero(counted_N) - 1  # where the expert was chosen
  starts_N = np.asarray(tokens.starts)[np.searchsorted(tokens.starts, inputs_N, side='right') - 1]
  # Windows of text start at the beginning of the text, those of conversations at each conversation.
  first_N = 0 if tokens.roles is None else starts_N
  windows_N = first_N + mixture.window_starts(inputs_N - first_N, T, stride)
  # The number of tokens of the document that precede the input in its window.
  before_N = inputs_N - np.maximum(starts_N, windows_N)
  begins_NE = np.diff(computed_NE.astype(int), axis=0, prepend=0) > 0
  begins_NE &= (np.diff(starts_N, prepend=-1) == 0)[:, None]
  predict_E = np.array([forward_flops_per_token(each.model, T) for each in run.experts])
  again_E = np.array([forward_flops_per_token(each.model, T, head=False) for each in run.experts])
  flops_N = computed_NE @ predict_E + before_N * (begins_NE @ again_E)
  read = 0
  if isinstance(run.selector, Linear):
    reader = reader_model(run)
    read = forward_flops_per_token(reader, T, head=False) + 2 * reader.dim * len(run.experts)
  return {'share': weights_NE[counted_N].mean(0).tolist(),
          'switches': 1000 * float(begins_NE.any(1).mean()),
          'forward_flops': read + float(flops_N.mean())}
