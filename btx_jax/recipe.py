"""Of what a mixture is made: plain data, which btx.py carries out.

A mixture's feed-forward layers are put together of hidden units of its sources' (whole, split or
blended, paper 3.3); all else is a weighted mean of them, by rules on the path of a parameter.
"""

from collections.abc import Sequence
import dataclasses
import re

from btx_jax.errors import UsageError, nearest

WHOLE, SPLIT, PLAIN_SPLIT, BLEND = ARRANGEMENTS = ('whole', 'split', 'plain_split', 'blend')
UNIFORM, TOKENS = 'uniform', 'tokens'


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How sources, which have numbers here, become a mixture.

  Attributes:
    experts: of each expert, the pieces of its feed-forward layer in order: (source, first, end),
      the hidden units from `first` to before `end` of that source.
    rest: (pattern, weight of each source) for all other parameters; the first pattern that is
      found in the path counts, and the last is found in every path.
    scale: of what each expert gives.
    tied: so many experts in a row have the same router column at first.
    router_std: standard deviation of the routers' weights.
  """
  experts: tuple[tuple[tuple[int, int, int], ...], ...]
  rest: tuple[tuple[str, tuple[float, ...]], ...]
  scale: float = 1.0
  tied: int = 1
  router_std: float = 0.02

  @property
  def reference(self) -> int:
    """The first source in the mean: where sources differ, the mixture is as this one is."""
    return next(i for i, weight in enumerate(self.rest[-1][1]) if weight)

  def weights(self, path: str) -> tuple[float, ...]:
    """Of each source in the mean that becomes the parameter of this path."""
    return next(weights for pattern, weights in self.rest if re.search(pattern, path))


def whole(sources: Sequence[int], width: int, router_std: float = 0.02) -> Recipe:
  """The paper's form (3.2): each of `sources` an expert, the rest the mean of them all.

  Args:
    sources: number of each expert's source; twice the same one gives two copies of it, which
      still counts once in the mean.
    width: F, hidden units of a feed-forward layer.
    router_std: standard deviation of the routers' weights.
  """
  return Recipe(arrange(WHOLE, sources, width), (('', uniform(sources, max(sources) + 1)),),
                router_std=router_std)


def uniform(chosen: Sequence[int], count: int) -> tuple[float, ...]:
  """Equal weights of the chosen ones among `count` sources."""
  return tuple(float(i in chosen) for i in range(count))


def arrange(arrangement: str, sources: Sequence[int], width: int, chunks: int = 1):
  """The experts of a recipe.

  Args:
    arrangement: 'whole'; 'split' or 'plain_split', each source cut into `chunks` experts of
      width / chunks; 'blend', expert n is made of the n-th of equal pieces of every source.
    sources: number of each one's source.
    width: F of the sources.
    chunks: pieces of a source that is split.
  """
  if arrangement == WHOLE:
    return tuple(((source, 0, width),) for source in sources)
  count = len(sources) if arrangement == BLEND else chunks
  cuts = [(c * width // count, (c + 1) * width // count) for c in range(count)]
  if arrangement == BLEND:
    return tuple(tuple((source, *cut) for source in sources) for cut in cuts)
  return tuple(((source, *cut),) for source in sources for cut in cuts)


def labels(arrangement: str, names: Sequence[str], chunks: int = 1) -> tuple[str, ...]:
  """What to call the experts."""
  if arrangement == WHOLE:
    return tuple(names)
  if arrangement == BLEND:
    return tuple(f'blend {i + 1}' for i in range(len(names)))
  return tuple(f'{name} {c + 1}/{chunks}' for name in names for c in range(chunks))


def make(init, names: Sequence[str], width: int, paths: Sequence[str], tokens: Sequence[int],
         router_std: float) -> Recipe:
  """The recipe of `base.mix(...)`.

  Args:
    init: as base.mix makes it.
    names: of the sources, from names_in.
    width: F of the sources.
    paths: of the parameters that are not experts.
    tokens: that each source was trained on since those that are averaged parted.
    router_std: standard deviation of the routers' weights.

  Raises:
    UsageError: a variant nobody knows, sizes that do not divide, a rule for nothing.
  """
  if init.arrangement not in ARRANGEMENTS:
    raise UsageError(f'mix: arrangement = {init.arrangement!r}; '
                     f'{nearest(init.arrangement, ARRANGEMENTS)}')
  splits = init.arrangement in (SPLIT, PLAIN_SPLIT)
  if splits != (init.chunks > 1) or init.chunks < 1:
    raise UsageError(f"mix: arrangement = {init.arrangement!r} and chunks = {init.chunks}; 'split' "
                     f"and 'plain_split' need 2 chunks or more, the others have none (1).")
  pieces = len(init.runs) if init.arrangement == BLEND else init.chunks
  if width % pieces:
    raise UsageError(f'mix: a feed-forward width of {width} cannot be cut into {pieces} equal '
                     f'pieces; it can into {_divisors(width)}.')
  mean = [names.index(name) for name in dict.fromkeys(init.averaged or init.runs)]
  rest = []
  for pattern, what in [*init.rules, ('', UNIFORM)]:
    try:
      found = any(re.search(pattern, path) for path in paths)
    except re.error as error:
      raise UsageError(f'mix: rule {pattern!r} is not a regular expression: {error}.') from error
    if not found:
      raise UsageError(f'mix: rule {pattern!r} is found in no parameter that is averaged; '
                       f'these are {", ".join(paths)}.')
    if what == UNIFORM:
      weights = uniform(mean, len(names))
    elif what == TOKENS:
      weights = tuple(float(n) if i in mean else 0.0 for i, n in enumerate(tokens))
      if not any(weights):
        raise UsageError(f"mix: rule {pattern!r} weighs by 'tokens', but none of "
                         f'{", ".join(names[i] for i in mean)} was trained since they parted.')
    else:
      weights = uniform([names.index(what)], len(names))
    rest.append((pattern, weights))
  experts = arrange(init.arrangement, [names.index(name) for name in init.runs], width, init.chunks)
  exact = init.arrangement == SPLIT
  return Recipe(experts, tuple(rest), scale=float(init.chunks) if exact else 1.0,
                       tied=init.chunks if exact else 1, router_std=router_std)


def names_in(init) -> tuple[str, ...]:
  """Every run that an initialiser names, each once, experts first."""
  ruled = [what for _, what in init.get('rules', ()) if what not in (UNIFORM, TOKENS)]
  return tuple(dict.fromkeys([*init.runs, *init.get('averaged', ()), *ruled]))


def _divisors(n: int) -> str:
  return ', '.join(str(d) for d in range(2, min(n, 64) + 1) if n % d == 0)
