"""Documents of two domains in turn: how late does an ensemble notice, and what does that cost?

  python -m tests.benchmarks.switching WORKDIR [seed] [tokens]

WORKDIR is of a complete `--config=configs/modular.py --config.seeds=...`. For each pair of domains
a document is made of held-out text: `tokens` (200) of one, as many of the other, and so on, ten
spans in all. Prints for each ensemble of the config, over all pairs: the share of tokens for which
an expert of their domain is chosen; how many tokens after a change of domain such an expert is
first chosen (median, and 90th percentile); switches per 1,000 tokens (the text has 4.5 at spans of
200); how much higher the loss per token is than that of the right experts; and the forward FLOPs of
a token, with the passes at switches, relative to those of the right expert alone. Then, for the
seed, the dense rival and the mixture of feed-forward experts: how much higher their loss is.
"""

import itertools
import sys

import jax
import numpy as np

from btx_jax.configs import modular
from btx_jax.data.tokens import Tokens
from btx_jax.fitting import select
from btx_jax.model.config import forward_flops_per_token
from btx_jax.pipeline import Pipeline
from btx_jax.run import Run, linear_of
from btx_jax.scoring import ensemble, selected
from btx_jax.selector import Linear
from btx_jax.study import params

SPANS = 10
RIVALS = 'seed', 'dense/1e-3', 'mixed/ridge'


def in_turn(held_out: dict[str, Tokens], size: int) -> tuple[Tokens, np.ndarray]:
  """A document for each pair of domains, and the domain of each token.

  Each starts with the begin mark, whose domain is the first one's.
  """
  text = {domain: _without_marks(tokens) for domain, tokens in held_out.items()}
  begin = next(iter(held_out.values())).ids[:1]
  used = dict.fromkeys(text, 0)
  ids, domains, starts = [], [], [0]
  for pair in itertools.permutations(text, 2):
    ids.append(begin)
    domains.append(pair[:1])
    for domain in itertools.islice(itertools.cycle(pair), SPANS):
      at = used[domain] % (len(text[domain]) - size)
      ids.append(text[domain][at:at + size])
      domains.append([domain] * size)
      used[domain] = at + size
    starts.append(sum(map(len, ids)))
  no_bytes = np.zeros(len(starts), np.int64)
  return (Tokens(np.concatenate(ids), np.array(starts), no_bytes, '', begins=1, ends=0),
          np.concatenate(domains))


def _without_marks(tokens: Tokens) -> np.ndarray:
  marks = np.concatenate([tokens.starts[:-1] if tokens.begins else [],
                          tokens.starts[1:] - 1 if tokens.ends else []]).astype(int)
  return np.delete(tokens.ids, marks)


def measure(pipeline: Pipeline, run: Run, tokens: Tokens, domain_N: np.ndarray,
            nll_NE: np.ndarray) -> dict[str, float]:
  """The figures of one ensemble; `nll_NE` has the loss of each of its experts for each token."""
  reader = params.final(pipeline, run.reader, pipeline.mesh)
  chosen_N = select.choices(pipeline, run, reader, tokens, pipeline.mesh)
  right_N = np.array(linear_of(run).labels)[chosen_N] == domain_N
  changes = np.flatnonzero(domain_N[1:] != domain_N[:-1]) + 1
  changes = changes[~np.isin(changes, tokens.starts)]
  ends = np.append(changes[1:], len(domain_N))
  late = [int(np.argmax(np.append(right_N[first:end], True))) for first, end in zip(changes, ends)]
  chosen_NE = np.eye(len(run.experts), dtype=bool)[chosen_N]
  usage = selected.usage(run, chosen_NE, chosen_NE, tokens)
  alone = np.mean([forward_flops_per_token(expert.model, run.seq_len) for expert in run.experts])
  counted_N = tokens.has_score
  return {'right': right_N[counted_N].mean(), 'late': np.median(late),
          'late 90 %': np.quantile(late, 0.9), 'switches': usage['switches'],
          'loss': nll_NE[chosen_NE & counted_N[:, None]].mean(),
          'FLOPs': usage['forward_flops'] / alone}


def main(workdir: str, seed: str = '0', size: str = '200'):
  config = modular.get_config()
  config.seeds = (int(seed),)
  pipeline = Pipeline(config, workdir)
  tokens, domain_N = in_turn(pipeline.prepare_text().held_out, int(size))
  ensembles = [run for run in pipeline.runs.values() if isinstance(run.selector, Linear)]
  experts, labels = ensembles[0].experts, list(linear_of(ensembles[0]).labels)
  right_NE = domain_N[:, None] == np.array(labels)
  counted_N = tokens.has_score

  def loss(run: Run) -> np.ndarray:
    return ensemble.token_nll(run.model, params.final(pipeline, run, pipeline.mesh), tokens,
                              pipeline.mesh, run.seq_len, config.evaluation.batch_size)

  with jax.set_mesh(pipeline.mesh):
    nll_NE = np.stack([loss(expert) for expert in experts], 1)
    least = nll_NE[right_NE & counted_N[:, None]].mean()
    print(f'{len(domain_N):,} tokens in {tokens.num_documents} documents, spans of {size}')
    for run in ensembles:
      assert run.experts == experts
      found = measure(pipeline, run, tokens, domain_N, nll_NE)
      print(f'{run.plain_name:24} right {found["right"]:.1%}; late by {found["late"]:.0f} tokens '
            f'({found["late 90 %"]:.0f}); {found["switches"]:.1f} switches per 1,000; '
            f'loss {found["loss"] / least - 1:+.1%}; {found["FLOPs"]:.1f} times the FLOPs')
    for name in RIVALS:
      mean = loss(pipeline.run(f'seed-{seed}/{name}'))[counted_N].mean()
      print(f'{name:24} loss {mean / least - 1:+.1%}')


if __name__ == '__main__':
  main(*sys.argv[1:])
