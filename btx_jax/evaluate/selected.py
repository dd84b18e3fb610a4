"""Scores an ensemble: each token is predicted by the expert that its selector chose.

The chosen expert has read the whole window before the token, so a switch is a fresh pass of the new
expert over that text, whose FLOPs are counted. One model is in memory at a time.
"""

from typing import Any

import jax
import numpy as np

from btx_jax.data.text import Text
from btx_jax.data.tokens import Tokens
from btx_jax.evaluate import ensemble
from btx_jax.fitting import select
from btx_jax.model.config import forward_flops_per_token
from btx_jax.run import Run, reader_model
from btx_jax.study import params
from btx_jax.study.study import Study
from btx_jax.terminal import say


def evaluate(study: Study, run: Run, text: Text, mesh: jax.sharding.Mesh) -> dict[str, dict]:
  """Bits per byte by domain of an ensemble whose selector has been fitted.

  Returns:
    domain -> what ensemble.bits_per_byte returns, and what `usage` does.
  """
  say(f'{run.name}: {run.reader.name} reads, to choose experts')
  parameters = params.final(study, run.reader, mesh)
  chosen = {domain: select.choices(study, run, parameters, tokens, mesh)
            for domain, tokens in text.held_out.items()}
  del parameters  # one at a time
  nll = {domain: np.zeros(len(tokens.ids)) for domain, tokens in text.held_out.items()}
  for number, expert in enumerate(run.experts):
    wanted = [domain for domain, tokens in text.held_out.items()
              if (chosen[domain][ensemble.counted(tokens)] == number).any()]
    if not wanted:
      continue
    say(f'{run.name}: measuring {expert.name} on {", ".join(wanted)}')
    parameters = params.final(study, expert, mesh)
    for domain in wanted:
      of_expert = ensemble.token_nll(
          expert.model, parameters, text.held_out[domain], mesh, run.seq_len,
          study.config.evaluation.batch_size)
      nll[domain] = np.where(chosen[domain] == number, of_expert, nll[domain])
    del parameters
  result = {}
  for domain, tokens in text.held_out.items():
    alone = np.zeros((len(tokens.ids), 1))
    result[domain] = (ensemble.bits_per_byte(nll[domain][:, None], alone, tokens, text.tokenizer)
                      | usage(run, chosen[domain], tokens))
    say(f'{run.name}: {in_words(run, domain, result[domain])}')
  return result


def in_words(run: Run, domain: str, found: dict[str, Any]) -> str:
  """How an ensemble was used on a domain, as a line for a person."""
  shares = ', '.join(f'{name} {share:.1%}' for name, share in zip(run.expert_names, found['share'])
                     if share)
  return (f'tokens of {domain} by {shares}; {found["switches"]:.1f} switches per 1,000 tokens; '
          f'{found["forward_flops"] / 1e6:,.2f} MFLOP per token')


def usage(run: Run, chosen_N: np.ndarray, tokens: Tokens) -> dict[str, Any]:
  """Which experts an ensemble used, and the FLOPs that this takes.

  FLOPs are those of matmuls, forward: of the reader and the selector for every token, of the chosen
  expert, and at a switch of the new expert for all text before it in the document and the window.
  Nothing is shared, not even if the reader is chosen or an expert returns.

  Args:
    run: the ensemble.
    chosen_N: the expert of each token, see select.choices.
    tokens: the text.

  Returns:
    `share` of the tokens by expert, [E]; `switches` per 1,000 tokens; `forward_flops` per token.
  """
  counted_N, reader, T = ensemble.counted(tokens), reader_model(run), run.seq_len
  chosen_N = chosen_N[counted_N]
  inputs_N = np.flatnonzero(counted_N) - 1  # where the choice was made
  starts_N = np.asarray(tokens.starts)[np.searchsorted(tokens.starts, inputs_N, side='right') - 1]
  before_N = inputs_N - np.maximum(starts_N, inputs_N // T * T)  # read before it, in the window
  switched_N = np.diff(chosen_N, prepend=chosen_N[:1]) != 0
  switched_N &= np.diff(starts_N, prepend=-1) == 0
  read = forward_flops_per_token(reader, T, head=False) + 2 * reader.dim * len(run.experts)
  predict = np.array([forward_flops_per_token(each.model, T) for each in run.experts])
  again = np.array([forward_flops_per_token(each.model, T, head=False) for each in run.experts])
  flops_N = read + predict[chosen_N] + np.where(switched_N, before_N * again[chosen_N], 0)
  return {'share': (np.bincount(chosen_N, minlength=len(run.experts)) / len(chosen_N)).tolist(),
          'switches': 1000 * float(switched_N.mean()), 'forward_flops': float(flops_N.mean())}
