"""The domains of a config as plain data: where text comes from, and which part is held out."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from btx_jax.data import demo
from btx_jax.errors import UsageError, nearest
from btx_jax.files import naming

TEXT, CHAT, PAIRS = FORMATS = ('text', 'chat', 'pairs')


class Domain(NamedTuple):
  """Where the text of a domain comes from.

  Attributes:
    name: the domain's name.
    source: 'files', or a key of demo.SOURCES.
    paths: directories, globs or files, if the source is 'files'.
    text_field: the JSON field or Parquet column that holds the text; 'a.b' is field b of a.
    separator: splits a plain text file into documents; if '', a file is one document.
    id_field: the field or column that holds a document's id; '' if there is none.
    held_out: the share of its documents that is held out; or files that are measured instead; or
      (), which means the share data.held_out.
    field: the config field that names the files: 'paths', or 'held_out' if `measured` returned
      this domain.
    format: what its records are: TEXT; CHAT, conversations; or PAIRS, pairs of conversations.
  """
  name: str
  source: str = 'files'
  paths: tuple[str, ...] = ()
  text_field: str = 'text'
  separator: str = ''
  id_field: str = ''
  held_out: float | tuple[str, ...] = ()
  field: str = 'paths'
  format: str = TEXT

  @property
  def is_trained(self) -> bool:
    """Whether the domain has text to train on; otherwise it is only measured."""
    return self.source != 'files' or bool(self.paths)

  @property
  def names_held_out(self) -> bool:
    """Whether the config names files as the held-out text of this domain."""
    return isinstance(self.held_out, tuple) and bool(self.held_out)

  def share(self, default: float) -> float:
    """The share of its documents that is held out; `default` is the config's share."""
    if isinstance(self.held_out, tuple):
      return 0.0 if self.held_out else default
    return self.held_out

  def measured(self) -> 'Domain':
    """The files that `held_out` names, as a domain."""
    assert isinstance(self.held_out, tuple)
    return self._replace(source='files', paths=self.held_out, held_out=(), field='held_out')

  def only_measured(self) -> 'Domain':
    """The domain without text to train on."""
    return self._replace(source='files', paths=())


def from_config(domains: Mapping[str, Mapping]) -> list[Domain]:
  """The domains of a config, sorted by name.

  Raises:
    UsageError: a source does not exist, a domain of files names no files, a share is not between 0
      and 1, or two names clash.
  """
  result = []
  naming.check_distinct('domain', domains)
  for name, fields in sorted(domains.items()):
    _check_name(name, domains)
    held_out = fields['held_out']
    if not isinstance(held_out, int | float):
      held_out = (held_out,) if isinstance(held_out, str) else tuple(held_out)
    domain = Domain(
        name, **{**fields, 'paths': tuple(fields['paths']), 'held_out': held_out})
    valid = ('files', *demo.SOURCES)
    if domain.source not in valid:
      raise UsageError(f'domains.{name}.source = {domain.source!r} is not a source; '
                       f'{nearest(domain.source, valid)}')
    if domain.format not in FORMATS:
      raise UsageError(f'domains.{name}.format = {domain.format!r} is not a format; '
                       f'{nearest(domain.format, FORMATS)}')
    if domain.format != TEXT and domain.source != 'files':
      raise UsageError(f'domains.{name}.source = {domain.source!r} is text, and format = '
                       f'{domain.format!r} is for files; omit one of them.')
    if isinstance(domain.held_out, int | float) and not 0 < domain.held_out < 1:
      raise UsageError(f'domains.{name}.held_out = {domain.held_out} must be a share between 0 and '
                       '1, or name the files that are measured.')
    if not domain.is_trained and not domain.names_held_out:
      raise UsageError(f'domains.{name}.paths is empty; name a directory, a glob or files. For '
                       'text that is only measured, name them in held_out.')
    result.append(domain)
  return result


def trained(domains: Mapping[str, Mapping]) -> list[str]:
  """The names of a config's domains that have text to train on; the others are only measured."""
  return [domain.name for domain in from_config(domains) if domain.is_trained]


def _check_name(name: str, domains: Iterable[str]):
  """Raises UsageError unless a domain can have a token folder of its own under this name."""
  naming.check('domain', name)
  inside = next((other for other in domains if name.startswith(f'{other}/')), None)
  if inside is not None:
    raise UsageError(f'{name!r} cannot be the name of a domain beside {inside!r}, because its '
                     f'tokens would be written into the folder of {inside!r}; rename either.')
