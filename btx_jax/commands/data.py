"""The text of a config, described before anything is trained on it: the command `data`.

How much there is of each domain, how it begins, and whether its held-out text is really held
out: what training has seen word for word measures memory, not the model.
"""

import os
from typing import NamedTuple

from rich import box
from rich.table import Table

from btx_jax import terminal
from btx_jax.data import duplicates, text
from btx_jax.data import tokens as tokens_lib
from btx_jax.study.study import Study

_SAMPLE = 200  # characters


class Description(NamedTuple):
  """One domain.

  Attributes:
    name: of the domain.
    train, held_out: `documents`, `bytes` and `tokens` of each.
    skipped: how many records were; None if the tokens are older than that count.
    copies: training documents that repeat an earlier one of this domain.
    overlap: what held-out text shares with the training text of any domain.
    sample: the beginning of the first held-out document.
    sample_id: its id, '' if it has none.
    example: in words, where held-out text is in training text; '' if nowhere.
  """
  name: str
  train: dict[str, int]
  held_out: dict[str, int]
  skipped: int | None
  copies: int
  overlap: duplicates.Overlap
  sample: str
  sample_id: str
  example: str

  @property
  def bytes_per_token(self) -> float:
    """Of all its text, the marks of documents included."""
    return ((self.train['bytes'] + self.held_out['bytes'])
            / (self.train['tokens'] + self.held_out['tokens']))


def show(study: Study):
  """Prepares the text of a study where that is still to be done, and tells about it.

  Raises:
    UsageError: see text.prepare.
  """
  domains = describe(study.config, study.data_folder)
  terminal.show(as_table(domains))
  for line in lines(domains):
    terminal.say(line)


def describe(config, folder: str) -> list[Description]:
  """All domains of a config, by name; `folder` is WORKDIR/data, see text.prepare."""
  prepared = text.prepare(config, folder)
  tokenizer, train = prepared.tokenizer, prepared.train
  terminal.say('Looking for held-out text in training text')
  # Whole: what text.prepare gives is a sample.
  held_out = {name: tokens_lib.load(os.path.join(folder, name), 'held_out') for name in train}
  overlaps = duplicates.overlaps(held_out, train)
  result = []
  for name, tokens in held_out.items():
    path = os.path.join(folder, name)
    meta = tokens_lib.read_meta(path)
    first = tokens.ids[1:min(tokens.starts[1] - 1, 4 * _SAMPLE)]
    result.append(Description(
        name, meta['train'], meta['held_out'], meta.get('skipped', {}).get('count'),
        duplicates.copies(train[name]), overlaps[name], _beginning(tokenizer, first),
        tokens_lib.document_id(path, 'held_out', 0),
        _in_words(overlaps[name].example, name, folder, tokenizer)))
  return result


def as_table(domains: list[Description]) -> Table:
  """The figures."""
  table = Table(
      box=box.SIMPLE_HEAD, caption_justify='left', caption=(
          f'copies: training documents that repeat an earlier one. seen: held-out tokens in '
          f'runs of {duplicates.RUN} or more that the training text of any domain has too, and '
          'documents with such a run.'))
  table.add_column('domain')
  for column in ('documents', 'MB', 'tokens', 'bytes/token', 'copies', 'held out', 'MB',
                 'tokens', 'seen', 'documents', 'skipped'):
    table.add_column(column, justify='right', no_wrap=True)
  for domain in domains:
    train, held_out = domain.train, domain.held_out
    table.add_row(
        domain.name, f'{train["documents"]:,}', f'{train["bytes"] / 1e6:.2f}',
        f'{train["tokens"]:,}', f'{domain.bytes_per_token:.2f}', f'{domain.copies:,}',
        f'{held_out["documents"]:,}', f'{held_out["bytes"] / 1e6:.2f}',
        f'{held_out["tokens"]:,}', f'{domain.overlap.share:.1%}',
        f'{domain.overlap.documents:,}',
        '?' if domain.skipped is None else f'{domain.skipped:,}')
  return table


def lines(domains: list[Description]) -> list[str]:
  """A sample of each domain, and where held-out text was found in training text."""
  samples = [f'{domain.name}, held-out {_document(0, domain.sample_id)}: {domain.sample!r}'
             for domain in domains]
  return samples + [f'seen: {domain.example}' for domain in domains if domain.example]


def _in_words(example: duplicates.Example | None, name: str, folder: str, tokenizer) -> str:
  if not example:
    return ''
  ours = _document(example.document, tokens_lib.document_id(
      os.path.join(folder, name), 'held_out', example.document))
  theirs = _document(example.source, tokens_lib.document_id(
      os.path.join(folder, example.domain), 'train', example.source))
  return (f'{name}, held-out {ours}, shares {len(example.ids):,} tokens with {example.domain}, '
          f'training {theirs}: {_beginning(tokenizer, example.ids)!r}')


def _document(number: int, name: str) -> str:
  return f'document {number}{f" (id {name!r})" if name else ""}'


def _beginning(tokenizer, ids) -> str:
  return tokenizer.decode(ids[:4 * _SAMPLE])[:_SAMPLE]
