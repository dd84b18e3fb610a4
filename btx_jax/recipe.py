"""The recipe of a mixture as plain data: what each source contributes. btx.py executes it.

An expert is assembled from hidden units of the sources' feed-forward layers: whole, split or
blended (paper 3.3). Everything else is a weighted mean of the sources, by rules on parameter paths.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import re

from btx_jax.errors import UsageError, nearest

WHOLE, SPLIT, PLAIN_SPLIT, BLEND = ARRANGEMENTS = ('whole', 'split', 'plain_split', 'blend')
UNIFORM, TOKENS = 'uniform', 'tokens'
ROUTER_STD = 0.02  # the default deviation of the routers' weights
NORMAL, MEAN, RIDGE = ROUTER_KINDS = ('normal', 'mean', 'ridge')
AS_BEFORE = ''  # the kind of an edited mixture's routers that follows the mixture's own

OWN = -1  # the number of the only expert of a dense run

Pieces = tuple[tuple[tuple[int, int, int], ...], ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How sources, which are numbered here, become a mixture.

  Attributes:
    pieces: for each expert, the pieces of its feed-forward layer in order: (source, first, end),
      the hidden units from `first` up to but not including `end` of that source.
    rest: (regex, weight of each source) for all other parameters; the first regex found in a path
      applies, and the last one is found in every path.
    scale: factor on the output of each expert.
    tied: this many consecutive experts start with the same router column.
    router_std: standard deviation of the routers' weights.

  Example:
    >>> recipe = Recipe(pieces=(((0, 0, 20),), ((1, 0, 20),)), rest=(('', (1.0, 3.0)),))
    >>> recipe.weights('embed')
    (1.0, 3.0)
  """
  pieces: Pieces
  rest: tuple[tuple[str, tuple[float, ...]], ...]
  scale: float = 1.0
  tied: int = 1
  router_std: float = ROUTER_STD

  def __post_init__(self):
    if not self.rest or self.rest[-1][0]:
      raise ValueError("Recipe.rest must end with ('', weights), for every other parameter.")

  @property
  def reference(self) -> int:
    """The first source in the mean: where sources differ, the mixture follows this one."""
    return next(i for i, weight in enumerate(self.mean) if weight)

  @property
  def mean(self) -> tuple[float, ...]:
    """The weight of each source in the mean, before any rule."""
    return self.rest[-1][1]

  def weights(self, path: str) -> tuple[float, ...]:
    """The weight of each source in the mean that becomes the parameter at this path."""
    return next(weights for pattern, weights in self.rest if re.search(pattern, path))

  def copying(self, paths: Sequence[str]) -> 'Recipe':
    """This recipe where the averaged sources have equal parameters at `paths`: one is copied.

    A mean of equal numbers need not have their bits. A rule that takes one source stays.
    """
    means = [path for path in paths if sum(map(bool, self.weights(path))) > 1]
    if not means:
      return self
    copy = uniform([self.reference], len(self.mean))
    return dataclasses.replace(self, rest=((f'^({"|".join(means)})$', copy), *self.rest))


@dataclasses.dataclass(frozen=True)
class RoutersFromText:
  """How a mixture's routers are set from text, before any training; see fitting/.

  Attributes:
    kind: 'mean', the mean router input of an expert's text; or 'ridge', the linear map that tells
      the text of each expert from that of the others.
    rows: training rows of each domain that are read. Four fifths set the routers, one fifth is
      kept to choose the temperature and to measure.
    ridge: lambda of the ridge regression, in units of the mean square of a router input's entries.
    temperature: divides the logits, whose deviation is 1 over the text; 0 chooses it by the loss.
    labels: for each expert, the domain whose text it should be sent.
  """
  kind: str
  rows: int
  ridge: float
  temperature: float
  labels: tuple[str, ...]

  @property
  def domains(self) -> tuple[str, ...]:
    """The domains whose text is read, each once."""
    return tuple(dict.fromkeys(self.labels))


@dataclasses.dataclass(frozen=True)
class Edit:
  """Which experts a mixture has that is made from another one by exchanging experts.

  Attributes:
    parts: for each expert, the run that it is from, as an index into the sources, and its number
      among that run's experts; OWN for the expert that a dense run is. Source 0 is the mixture.
    router_std: standard deviation of the routers' weights of new experts.
    stored: the domains whose sums over router inputs an earlier run has kept; see fitting/.
  """
  parts: tuple[tuple[int, int], ...]
  router_std: float = ROUTER_STD
  stored: tuple[str, ...] = ()

  @property
  def kept(self) -> dict[int, int]:
    """The number of each old expert here -> its number in the mixture."""
    return {i: number for i, (source, number) in enumerate(self.parts) if source == 0}

  def recipe(self, width: int) -> Recipe:
    """How the parts, each a dense model of its own, become the mixture.

    All but the experts is that of the first old expert, which is the mixture's, as it is.
    """
    count = len(self.parts)
    return Recipe(arrange(WHOLE, range(count), width), (('', uniform([min(self.kept)], count)),),
                  router_std=self.router_std)


def whole_experts(sources: Sequence[int], width: int, router_std: float = ROUTER_STD) -> Recipe:
  """The paper's form (3.2): each of `sources` becomes an expert, the rest is their mean.

  Args:
    sources: the number of each expert's source. A source named twice becomes two experts, and
      still counts once in the mean.
    width: F, hidden units of a feed-forward layer.
    router_std: standard deviation of the routers' weights.
  """
  return Recipe(arrange(WHOLE, sources, width), (('', uniform(sources, max(sources) + 1)),),
                router_std=router_std)


def uniform(chosen: Sequence[int], count: int) -> tuple[float, ...]:
  """Equal weights for the chosen ones of `count` sources, 0 for the others."""
  return tuple(float(i in chosen) for i in range(count))


def arrange(arrangement: str, sources: Sequence[int], width: int, chunks: int = 1) -> Pieces:
  """The pieces of a recipe's experts.

  Args:
    arrangement: 'whole'; 'split' or 'plain_split', which cut each source into `chunks` experts of
      width / chunks; or 'blend', where expert n is made of the n-th equal part of every source.
    sources: the number of each source.
    width: F of the sources.
    chunks: experts that a split source becomes.
  """
  if arrangement == WHOLE:
    return tuple(((source, 0, width),) for source in sources)
  count = len(sources) if arrangement == BLEND else chunks
  cuts = [(c * width // count, (c + 1) * width // count) for c in range(count)]
  if arrangement == BLEND:
    return tuple(tuple((source, *cut) for source in sources) for cut in cuts)
  return tuple(((source, *cut),) for source in sources for cut in cuts)


def expert_names(arrangement: str, names: Sequence[str], chunks: int = 1) -> tuple[str, ...]:
  """The names of the experts that sources of these names become."""
  if arrangement == WHOLE:
    return tuple(names)
  if arrangement == BLEND:
    return tuple(f'blend {i + 1}' for i in range(len(names)))
  return tuple(f'{name} {c + 1}/{chunks}' for name in names for c in range(chunks))


def from_config(init, names: Sequence[str], width: int, paths: Sequence[str],
                tokens: Sequence[int], router_std: float) -> Recipe:
  """The recipe that `base.mix(...)` describes.

  Args:
    init: what base.mix returns.
    names: of the sources, from `sources_of`.
    width: F of the sources.
    paths: of the parameters outside the experts.
    tokens: that each source was trained on since the common ancestor of those averaged.
    router_std: standard deviation of the routers' weights.

  Raises:
    UsageError: an unknown arrangement, sizes that do not divide, or a rule that matches nothing.
  """
  if init.arrangement not in ARRANGEMENTS:
    raise UsageError(f'mix: arrangement = {init.arrangement!r}; '
                     f'{nearest(init.arrangement, ARRANGEMENTS)}')
  splits = init.arrangement in (SPLIT, PLAIN_SPLIT)
  if splits != (init.chunks > 1) or init.chunks < 1:
    raise UsageError(f"mix: arrangement = {init.arrangement!r} and chunks = {init.chunks}; 'split' "
                     f"and 'plain_split' need 2 chunks or more, the others need chunks = 1.")
  parts = len(init.runs) if init.arrangement == BLEND else init.chunks
  if width % parts:
    raise UsageError(f'mix: ffn_dim = {width} is not divisible by {parts} pieces; it is divisible '
                     f'by {_divisors(width)}.')
  mean = [names.index(name) for name in dict.fromkeys(init.averaged or init.runs)]
  rest = []
  for pattern, how in [*init.rules, ('', UNIFORM)]:
    try:
      found = any(re.search(pattern, path) for path in paths)
    except re.error as error:
      raise UsageError(f'mix: rule {pattern!r} is not a regular expression: {error}.') from error
    if not found:
      raise UsageError(f'mix: rule {pattern!r} matches no averaged parameter; the parameters are '
                       f'{", ".join(paths)}.')
    if how == UNIFORM:
      weights = uniform(mean, len(names))
    elif how == TOKENS:
      weights = tuple(float(n) if i in mean else 0.0 for i, n in enumerate(tokens))
      if not any(weights):
        raise UsageError(f"mix: rule {pattern!r} weights runs by 'tokens', but none of "
                         f'{", ".join(names[i] for i in mean)} was trained since their common '
                         'ancestor.')
    else:
      weights = uniform([names.index(how)], len(names))
    rest.append((pattern, weights))
  pieces = arrange(init.arrangement, [names.index(name) for name in init.runs], width, init.chunks)
  exact = init.arrangement == SPLIT
  return Recipe(pieces, tuple(rest), scale=float(init.chunks) if exact else 1.0,
                tied=init.chunks if exact else 1, router_std=router_std)


def routers_from_config(given, names: Sequence[str], domain_of: Mapping[str, str],
                        domains: Sequence[str], router: str, arrangement: str = WHOLE
                        ) -> RoutersFromText | None:
  """How `base.mix(..., routers=...)` sets the routers; None if they are random.

  Args:
    given: what base.from_text returns.
    names: of the experts.
    domain_of: the domain of each expert for which it is known, by name.
    domains: of the config.
    router: the mixture's kind of router.
    arrangement: of the experts.

  Raises:
    UsageError: an unknown kind or label, an expert without a label, an arrangement whose experts
      are not runs, or a number that is out of range.
  """
  if given.kind not in ROUTER_KINDS:
    raise UsageError(f'routers: kind = {given.kind!r}; {nearest(given.kind, ROUTER_KINDS)}')
  if given.kind == NORMAL:
    refuse_labels(given)
    return None
  if router == 'hash':
    raise UsageError(f"routers: {given.kind!r} sets the routers' weights, and model.router = "
                     "'hash' has none; use another router.")
  if arrangement != WHOLE:
    raise UsageError(f'routers: {given.kind!r} sends the text of a run to its expert, and '
                     f'arrangement = {arrangement!r} makes experts of parts of runs; use '
                     f'{WHOLE!r}.')
  labels = labels_from_config('routers', given, names, domain_of, domains)
  return RoutersFromText(given.kind, given.rows, given.ridge, given.temperature, labels)


def refuse_labels(given) -> None:
  """Raises UsageError if random routers are given the domains of experts."""
  if given.labels:
    raise UsageError(f'routers: labels = {tuple(given.labels)} have no effect, because the routers '
                     f'are random; omit them, or use {MEAN!r} or {RIDGE!r}.')


def labels_from_config(where: str, given, experts: Sequence[str], domain_of: Mapping[str, str],
                       domains: Sequence[str]) -> tuple[str, ...]:
  """The domain of each expert, once what `base.from_text` returns has been checked.

  Args:
    where: what is set from text, for messages.
    given: what base.from_text returns.
    experts: names of the experts' runs.
    domain_of: for each expert's run that was trained on a single domain, that domain.
    domains: of the config.

  Raises:
    UsageError: a number that is out of range, an unknown label, or an expert without one.
  """
  for field, ok, range_ in (('rows', given.rows >= 5, 'at least 5'),
                            ('ridge', given.ridge > 0, 'positive'),
                            ('temperature', given.temperature >= 0, 'positive, or 0')):
    if not ok:
      raise UsageError(f'{where}: {field} = {given[field]} must be {range_}.')
  named = {}
  for name, domain in given.labels:
    if name not in experts:
      raise UsageError(f'{where}: labels names {name!r}, which is not an expert here; '
                       f'{nearest(name, experts)}')
    if domain not in domains:
      raise UsageError(f'{where}: labels names {domain!r}, which is not a domain; '
                       f'{nearest(domain, domains)}')
    named[name] = domain
  known = {**domain_of, **named}
  for name in experts:
    if name not in known:
      raise UsageError(f'{where}: {name!r} was not trained on the text of a single domain '
                       'here, so it is not known which text to send to it: name the domain, '
                       f'labels=(({name!r}, {next(iter(domains))!r}),).')
  return tuple(known[name] for name in experts)


def sources_of(init) -> tuple[str, ...]:
  """Every run that an initialiser names, each once, experts first."""
  reader = [init.reader] if init.get('reader') else []
  ruled = [how for _, how in init.get('rules', ()) if how not in (UNIFORM, TOKENS)]
  return tuple(dict.fromkeys([*init.runs, *init.get('averaged', ()), *ruled, *reader]))


def _divisors(n: int) -> str:
  return ', '.join(str(d) for d in range(2, min(n, 64) + 1) if n % d == 0)
