"""Which tokens of held-out text go to which expert: the routing analysis of the paper (4.3.2).

A token's first choice is the expert with its largest gate. bits.evaluate counts first choices by
domain, layer and expert, and in three layers also by token; what is shown follows from the counts.
NumPy only.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from btx_jax.data.tokenizer import Tokenizer
from btx_jax.data.tokens import Tokens
from btx_jax.training import routing_figures

CLASSES = ('digits', 'word start', 'word part', 'punctuation', 'white space', 'other')
_FREQUENT = 400  # tokens that are counted one by one: those with most occurrences in all domains
# What the code that reads a score relies on; see `count`.
SHAPE = {'first': [[int]], 'layers': [int], 'pieces': [str], 'by_piece': [[[int]]],
         'by_class': [[[int]]]}
_SHOWN = 8  # tokens of each expert


def count(firsts: Mapping[str, np.ndarray], held_out: Mapping[str, Tokens], tokenizer: Tokenizer,
          experts: int) -> dict[str, dict[str, Any]]:
  """Counts the first choices of a mixture on held-out text.

  Args:
    firsts: domain -> [tokens - 1, L], for each token but the last the number of its first choice
      plus 1; 0 for tokens that the model did not read.
    held_out: domain -> the text.
    tokenizer: the tokenizer of the text.
    experts: E.

  Returns:
    domain -> `first`, the number of first choices, [L][E]; `layers`, the first, the middle and the
    last one; `pieces`, the P most frequent tokens of all domains, the same for each domain; and
    the first choices in these layers, `by_piece` [layers][P][E] and `by_class` of CLASSES,
    [layers][classes][E].
  """
  layers = _some_layers(next(iter(firsts.values())).shape[1])
  seen, at = np.unique(np.concatenate([_ids(held_out[domain]) for domain in firsts]),
                       return_inverse=True)
  frequent = np.argsort(-np.bincount(at), kind='stable')[:_FREQUENT]
  pieces = tokenizer.pieces(seen.tolist())
  classes = np.array([CLASSES.index(class_of(piece)) for piece in pieces])
  result, begin = {}, 0
  for domain, firsts_NL in firsts.items():
    of_domain = at[begin:begin + len(firsts_NL)]
    begin += len(firsts_NL)
    by_piece = [_table(of_domain, firsts_NL[:, layer], len(seen), experts) for layer in layers]
    everything = np.zeros(len(firsts_NL), int)
    result[domain] = {
        'first': [_table(everything, firsts_N, 1, experts)[0].tolist() for firsts_N in firsts_NL.T],
        'layers': layers, 'pieces': [pieces[i] for i in frequent],
        'by_piece': [table[frequent].tolist() for table in by_piece],
        'by_class': [[table[classes == i].sum(0).tolist() for i in range(len(CLASSES))]
                     for table in by_piece]}
  return result


def shorter(counts: Mapping[str, Any], pieces: int) -> dict[str, Any]:
  """The counts of a domain with only this many of the most frequent tokens."""
  return {**counts, 'pieces': counts['pieces'][:pieces],
          'by_piece': [table[:pieces] for table in counts['by_piece']]}


def describe(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
  """What the counts of a mixture show.

  Args:
    found: domain -> its score, see bits.evaluate.

  Returns:
    `share`: domain -> the share of its tokens whose first choice is the expert, [L][E];
    `mutual_information`: [L], of the domain and the first choice of a token, in bits, where every
    domain has the same weight: 0 if the choice does not depend on the domain; and for each of
    `layers`, by expert, `tokens`: the most over-represented ones among its first choices, as
    (token, its first choices there, all of its occurrences); and `classes`: [classes][E], the share
    of first choices in the tokens of each of CLASSES, None for a class without tokens. None for
    scores that an earlier version measured.
  """
  counts = {domain: score['routing'] for domain, score in found.items() if score.get('routing')}
  if not counts or len(counts) < len(found):
    return None
  shares = {domain: _shares(of_domain['first']) for domain, of_domain in counts.items()}
  one = next(iter(counts.values()))
  by_piece, by_class = (sum(np.asarray(of_domain[kind]) for of_domain in counts.values())
                        for kind in ('by_piece', 'by_class'))
  totals = np.asarray(by_class).sum(1)  # [layers, E]
  return {
      'share': {domain: share.tolist() for domain, share in shares.items()},
      'mutual_information': mutual_information([*shares.values()]).tolist(),
      'layers': list(one['layers']),
      'tokens': [[over_represented(one['pieces'], table, total, expert)
                  for expert in range(table.shape[1])]
                 for table, total in zip(np.asarray(by_piece), totals)],
      'classes': [[share.tolist() if table.sum() else None
                   for share, table in zip(_shares(tables), tables)]
                  for tables in np.asarray(by_class)]}


def mutual_information(shares: Sequence[np.ndarray]) -> np.ndarray:
  """Of domain and first choice in bits, [L], from the shares [L, E] of each domain."""
  return routing_figures.mutual_information(np.stack(shares, 1))


def over_represented(pieces: Sequence[str], counts_PE: np.ndarray, totals_E: np.ndarray,
                     expert: int) -> list[tuple[str, int, int]]:
  """The tokens that are most over-represented among an expert's first choices.

  A token that makes up the share p of these and q of all text is ranked by p log(p / q), what it
  adds to the divergence between the two; and p > q.

  Args:
    pieces: the tokens.
    counts_PE: first choices by token and expert.
    totals_E: first choices by expert, over all tokens.
    expert: its number.

  Returns:
    (token, its first choices for this expert, its first choices for any) for at most 8 tokens.
  """
  every_P = counts_PE.sum(1)
  p_P, q_P = counts_PE[:, expert] / max(totals_E[expert], 1), every_P / max(totals_E.sum(), 1)
  ratio_P = np.divide(p_P, q_P, out=np.ones_like(q_P), where=p_P > 0)
  adds_P = p_P * np.log(ratio_P)
  most = map(int, np.argsort(-adds_P, kind='stable')[:_SHOWN])
  return [(pieces[i], int(counts_PE[i, expert]), int(every_P[i])) for i in most if adds_P[i] > 0]


def class_of(piece: str) -> str:
  """The class of a token by its text, one of CLASSES.

  Words may begin with a space. 'other' are marks without text, parts of characters, and mixtures.

  Example:
    >>> [class_of(piece) for piece in (' king', 'dom', '12', '):', '    ', '')]
    ['word start', 'word part', 'digits', 'punctuation', 'white space', 'other']
  """
  text = piece.strip()
  if not piece or '\ufffd' in piece:
    return 'other'
  if not text:
    return 'white space'
  if text.isdigit():
    return 'digits'
  if text.isalpha():
    return 'word start' if piece[0].isspace() else 'word part'
  return 'other' if any(map(str.isalnum, text)) else 'punctuation'


def _some_layers(count: int) -> list[int]:
  """The first, the middle and the last of so many layers."""
  return sorted({0, count // 2, count - 1})


def _ids(tokens: Tokens) -> np.ndarray:
  return np.asarray(tokens.ids[:-1])


def _table(rows_N: np.ndarray, firsts_N: np.ndarray, rows: int, experts: int) -> np.ndarray:
  """How often each row goes with each first choice, [rows, E]; a first choice of 0 is none."""
  counts = np.bincount(rows_N * (experts + 1) + firsts_N, minlength=rows * (experts + 1))
  return counts.reshape(rows, experts + 1)[:, 1:]


def _shares(counts) -> np.ndarray:
  """Each row's counts as shares of their sum."""
  counts = np.asarray(counts, np.float64)
  return counts / np.maximum(counts.sum(-1, keepdims=True), 1)
