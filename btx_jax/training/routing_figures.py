"""Figures on routing, from its sums: which experts serve which domain, how evenly, how surely.

NumPy only.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# An expert is starved if no domain sends it this share of its tokens; it takes nearly all if
# it has more than this share of all gate weight.
STARVED, TAKES_ALL = 0.01, 0.95


def describe(sums: Mapping[str, Any], domains: Sequence[str]) -> dict[str, Any]:
  """The figures of one interval of a run, as plain numbers.

  Args:
    sums: the fields of balance.RoutingSums: gates, picks [L, G, E], entropy, count [L, G], and,
      if the router drops tokens, dropped [L, G].
    domains: names of the G domains.

  Returns:
    gates: by domain [L][E], the mean gate of each expert; a domain without tokens is left out.
    picks: by domain [L][E], the share of its tokens that picked the expert; adds up to k.
    load: [L][E], each expert's share of all picks; 1 / E is perfect balance.
    largest_load, smallest_load: over all layers and experts.
    entropy: [L], mean entropy of the router's softmax over all experts, in nats.
    mutual_information: [L], between a token's domain and its expert (weighted by the gates),
      in bits: 0 if routing does not depend on the domain.
    dropped: [L], the share of all picks that found their expert full; only if the router drops
      tokens.
  """
  gates, picks, entropy, count = (
      np.asarray(sums[name], np.float64) for name in ('gates', 'picks', 'entropy', 'count'))
  present = [(name, g) for g, name in enumerate(domains) if count[0, g]]
  load = picks.sum(1) / picks.sum((1, 2))[:, None]
  figures = {
      'gates': {name: _rounded(gates[:, g] / count[:, g, None]) for name, g in present},
      'picks': {name: _rounded(picks[:, g] / count[:, g, None]) for name, g in present},
      'load': _rounded(load),
      'largest_load': _rounded(load.max()),
      'smallest_load': _rounded(load.min()),
      'entropy': _rounded(entropy.sum(1) / count.sum(1)),
      'mutual_information': _rounded(mutual_information(gates)),
  }
  if 'dropped' in sums:
    figures['dropped'] = _rounded(np.asarray(sums['dropped']).sum(1) / picks.sum((1, 2)))
  return figures


def mutual_information(weight_LGE) -> np.ndarray:
  """Mutual information of group and expert in bits, [L], from weights of any scale."""
  joint = weight_LGE / weight_LGE.sum((1, 2), keepdims=True)
  product = joint.sum(2, keepdims=True) * joint.sum(1, keepdims=True)
  ratio = np.divide(joint, product, out=np.ones_like(joint), where=joint > 0)
  return (joint * np.log2(ratio)).sum((1, 2))


def troubles(sums: Mapping[str, Any]) -> set[tuple[str, int, int]]:
  """(kind, layer, expert) of every expert that is 'starved' or 'takes_all' over an interval.

  `sums` as for `describe`.
  """
  gates, picks, count = (np.asarray(sums[name], np.float64)
                         for name in ('gates', 'picks', 'count'))
  some = count[0] > 0
  starved = (picks[:, some] < STARVED * count[:, some, None]).all(1)
  takes_all = gates.sum(1) > TAKES_ALL * count.sum(1)[:, None]
  return {(kind, int(layer), int(expert))
          for kind, found in (('starved', starved), ('takes_all', takes_all))
          for layer, expert in np.argwhere(found)}


def warnings_about(found: set[tuple[str, int, int]], expert_names: Sequence[str]) -> list[str]:
  """A sentence for each expert that `troubles` found."""
  problem = {'starved': f'gets under {STARVED:.0%} of the tokens of every domain',
             'takes_all': f'takes over {TAKES_ALL:.0%} of all tokens'}
  result = []
  for kind, expert in sorted({(kind, expert) for kind, _, expert in found}):
    layers = sorted(layer for k, layer, e in found if (k, e) == (kind, expert))
    where = f'layer{"s" * (len(layers) > 1)} {", ".join(map(str, layers))}'
    result.append(f'expert {expert} ({expert_names[expert]}) {problem[kind]} in {where}')
  return result


def _rounded(x):
  return np.round(x, 4).tolist()
