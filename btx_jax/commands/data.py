"""The command `data`: describes the text of a config before anything is trained on it.

How much text each domain has, how it begins, and whether its held-out text is really held out:
scores on text that was also trained on measure memory, not the model.
"""

import os
from typing import NamedTuple

from btx_jax import terminal
from btx_jax.data import duplicates, text
from btx_jax.data.corpora import Group
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.data.tokens import document_id, load, read_meta
from btx_jax.study.study import Study
from btx_jax.terminal import Table

_SAMPLE = 200  # characters
_ROWS = 20  # of files of a domain; the others are summed up


class Description(NamedTuple):
  """One domain.

  Attributes:
    name: of the domain.
    train, held_out: `documents`, `bytes` and `tokens` of each split; 0 to train on if the domain is
      only measured.
    skipped: number of unusable records; None if the folder is too old to have this count.
    groups: its files, by ending and by what they were read as.
    notes: what is odd about how they were read, in words.
    copies: training documents that repeat an earlier one of this domain.
    overlap: held-out text that also occurs in the training text of any domain.
    sample: the beginning of the first held-out document.
    sample_id: the id of that document; '' if it has none.
    example: one overlap in words; '' if there is none.
  """
  name: str
  train: dict[str, int]
  held_out: dict[str, int]
  skipped: int | None
  groups: list[Group]
  notes: list[str]
  copies: int
  overlap: duplicates.Overlap
  sample: str
  sample_id: str
  example: str

  @property
  def bytes_per_token(self) -> float:
    """Mean over both splits; the begin and end marks of documents count as tokens."""
    return ((self.train['bytes'] + self.held_out['bytes'])
            / (self.train['tokens'] + self.held_out['tokens']))


def print_description(study: Study):
  """Prepares the text of a study unless that is done already, and prints what it is like.

  Raises:
    UsageError: see text.prepare.
  """
  domains = describe(study.config, study.data_folder)
  terminal.show(as_table(domains))
  if any(domain.groups for domain in domains):
    terminal.show(files_table(domains))
  for domain in domains:
    terminal.say(f'{domain.name}, held-out {_document(0, domain.sample_id)}: {domain.sample!r}')
  for domain in domains:
    if domain.example:
      terminal.say(f'seen: {domain.example}')


def describe(config, folder: str) -> list[Description]:
  """Describes all domains of a config; `folder` is WORKDIR/data, see text.prepare."""
  prepared = text.prepare(config, folder)
  tokenizer, train = prepared.tokenizer, prepared.train
  terminal.say('Looking for held-out text in the training text')
  # All held-out text: text.prepare returns only a sample of it.
  held_out = {name: load(os.path.join(folder, name), 'held_out') for name in prepared.held_out}
  overlaps = duplicates.overlaps(held_out, train)
  result = []
  for name, tokens in held_out.items():
    path = os.path.join(folder, name)
    meta = read_meta(path)
    first = tokens.ids[tokens.begins:min(tokens.starts[1] - tokens.ends, 4 * _SAMPLE)]
    result.append(Description(
        name, meta['train'], meta['held_out'], meta.get('skipped', {}).get('count'),
        [Group(**group) for group in meta.get('files', [])], meta.get('notes', []),
        duplicates.copies(train[name]) if name in train else 0, overlaps[name],
        _beginning(tokenizer, first), document_id(path, 'held_out', 0),
        _in_words(overlaps[name].example, name, folder, tokenizer)))
  return result


def as_table(domains: list[Description]) -> Table:
  """The figures of all domains, a row for each."""
  rows = []
  for domain in domains:
    train, held_out = domain.train, domain.held_out
    rows.append([
        domain.name, f'{train["documents"]:,}', f'{train["bytes"] / 1e6:.2f}',
        f'{train["tokens"]:,}', f'{domain.bytes_per_token:.2f}', f'{domain.copies:,}',
        '?' if domain.skipped is None else f'{domain.skipped:,}',
        f'{held_out["documents"]:,}', f'{held_out["bytes"] / 1e6:.2f}',
        f'{held_out["tokens"]:,}', f'{domain.overlap.share:.1%}',
        f'{domain.overlap.documents:,}'])
  return Table(
      ['domain', 'documents', 'MB', 'tokens', 'bytes/token', 'copies', 'skipped',
       *(f'held-out\n{kind}' for kind in ('documents', 'MB', 'tokens')), 'seen',
       'documents\nwith seen'], rows, groups=[('Training text', 6), ('Held-out text', 5)],
      caption='copies: training documents that repeat an earlier one. seen: held-out tokens in '
              f'runs of {duplicates.RUN} or more that also occur in the training text of any '
              'domain, and the number of documents with such a run.')


def files_table(domains: list[Description]) -> Table:
  """How each file was read, its skipped records, and the files left out."""
  rows = []
  for domain in domains:
    shown, more = domain.groups[:_ROWS], domain.groups[_ROWS:]
    if more:
      shown.append(Group('others', 'of various kinds', True, *(
          sum(getattr(group, field) for group in more)
          for field in ('files', 'documents', 'skipped'))))
    for i, group in enumerate(shown):
      rows.append(['' if i else domain.name,
                   f'{group.name} ({group.files:,})' if group.files > 1 else group.name,
                   group.kind if group.is_read else f'left out: {group.kind}',
                   *(f'{count:,}' if group.is_read else '-'
                     for count in (group.documents, group.skipped))])
  return Table(['domain', 'files', 'read as', 'documents', 'skipped'], rows,
               names=3)


def _in_words(example: duplicates.Example | None, name: str, folder: str,
              tokenizer: Tokenizer) -> str:
  if not example:
    return ''
  ours = _document(example.document, document_id(
      os.path.join(folder, name), 'held_out', example.document))
  theirs = _document(example.source, document_id(
      os.path.join(folder, example.domain), 'train', example.source))
  return (f'{name}, held-out {ours}, shares {len(example.ids):,} tokens with {example.domain}, '
          f'training {theirs}: {_beginning(tokenizer, example.ids)!r}')


def _document(number: int, name: str) -> str:
  return f'document {number}{f" (id {name!r})" if name else ""}'


def _beginning(tokenizer: Tokenizer, ids) -> str:
  return tokenizer.decode(ids[:4 * _SAMPLE])[:_SAMPLE]
