"""What routers do, from their sums: who serves which domain, how sure, how even. NumPy only."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# An expert that fewer tokens than this pick, of every domain, is starved; one with more than
# this of all gate weight takes nearly all.
STARVED, TAKES_ALL = 0.01, 0.95


def describe(sums: Mapping[str, Any], domains: Sequence[str]) -> dict[str, Any]:
  """The figures of one interval of a run, as plain numbers.

  Args:
    sums: of model.routing.RoutingSums, by field: gates, picks [L, G, E], entropy,
      count [L, G], and dropped [L, G] of a router that drops.
    domains: names of the G domains.

  Returns:
    gates: by domain [L][E], the mean gate of each expert; a domain without tokens is left out.
    picks: by domain [L][E], the share of its tokens that picked the expert; adds up to k.
    load: [L][E], the share of all picks that the expert had; 1 / E is balance.
    largest_load, smallest_load: over all layers and experts.
    entropy: [L], mean entropy of the router's softmax over all experts, in nats.
    mutual_information: [L], between a token's domain and its expert (weighted by the gates),
      in bits: 0 where routing knows nothing of domains.
    dropped: [L], the share of all picks that passed by a full expert; only of a router that drops.
  """
  gates, picks, entropy, count = (
      np.asarray(sums[name], np.float64) for name in ('gates', 'picks', 'entropy', 'count'))
  present = [(name, g) for g, name in enumerate(domains) if count[0, g]]
  load = picks.sum(1) / picks.sum((1, 2))[:, None]
  by_domain = lambda x: {name: _rounded(x[:, g] / count[:, g, None]) for name, g in present}
  figures = {
      'gates': by_domain(gates),
      'picks': by_domain(picks),
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
  """Bits that group and expert tell about each other, [L], from weights that need no scale."""
  joint = weight_LGE / weight_LGE.sum((1, 2), keepdims=True)
  apart = joint.sum(2, keepdims=True) * joint.sum(1, keepdims=True)
  ratio = np.divide(joint, apart, out=np.ones_like(joint), where=joint > 0)
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


def tell(found: set[tuple[str, int, int]], experts: Sequence[str]) -> list[str]:
  """A sentence for each expert in trouble."""
  said = {'starved': f'gets under {STARVED:.0%} of the tokens of every domain',
          'takes_all': f'takes over {TAKES_ALL:.0%} of all tokens'}
  result = []
  for kind, expert in sorted({(kind, expert) for kind, _, expert in found}):
    layers = sorted(layer for k, layer, e in found if (k, e) == (kind, expert))
    where = f'layer{"s" * (len(layers) > 1)} {", ".join(map(str, layers))}'
    result.append(f'expert {expert} ({experts[expert]}) {said[kind]} in {where}')
  return result


def _rounded(x):
  return np.round(x, 4).tolist()
