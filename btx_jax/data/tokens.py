"""Text tokenized once into flat files on disk, with document boundaries and a held-out split.

splits.py decides which documents are held out, and writes these files:

  DIR/train.bin, held_out.bin              token ids, uint16 or uint32; each document is
                                          begin mark, text, end mark (see framing.py)
  DIR/train.documents.npy, held_out...     [documents + 1, 2] int64: first token, first scored
                                          byte of the raw text; the last row holds the totals
  DIR/train.ids.jsonl, held_out.ids.jsonl  only if the domain has an id_field: the id of each
                                          document, one JSON string per line ("" if it has none)
  DIR/train.roles.bin, held_out...         conversations only: one byte per token, chat_tokens.py
  DIR/files.jsonl                         the files that the tokens were made from, see origin.py
  DIR/meta.json                           the settings they were made with, the skipped records,
                                          the documents kept out of training, and the length and
                                          hash of each file; written last
  DIR/checked.json                        which files were hashed already, see damage.py

The hash of the tokens does not cover the ids, so runs do not depend on them.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
import errno
import itertools
import json
import os

import numpy as np

from btx_jax.data import corpora, damage, kept_out, origin, splits, token_files
from btx_jax.data.chat_tokens import REJECTED, WRITTEN
from btx_jax.data.domains import PAIRS, TEXT, Domain
from btx_jax.data.framing import ENCODE
from btx_jax.data.splits import SPLITS
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.errors import UsageError
from btx_jax.files import leftovers, places, sealed, shapes, writing

_SPLIT = {'documents': int, 'tokens': int, 'bytes': int, 'answers?': int, 'written?': int}
# What the code that reads meta.json relies on.
_META = {
    'made_from': {'domain': dict, 'framing?': dict, 'tokenizer': str, 'text?': str,
                  'held_out_text?': str, 'held_out?': (float, [str])},
    'dtype?': str, 'hash': {'train': str, 'held_out': str}, 'train': _SPLIT, 'held_out': _SPLIT,
    'changes?': {str: object}, 'notes?': [str],
    'skipped?': {'count': int, 'first?': [str], 'reasons?': {str: int}},
    'files?': [{'name': str, 'kind': str, 'is_read': bool, 'files': int}], 'kept_out?': dict}


@dataclasses.dataclass(frozen=True)
class Tokens:
  """One split of one domain: memory-mapped token ids and document boundaries.

  Attributes:
    ids: [tokens], all documents one after another.
    starts: [documents + 1], first token of each document, then the number of tokens.
    bytes: [documents + 1], bytes of scored raw text before each document, then their number. If
      documents have no begin mark, their first token is not scored, and its bytes do not count.
    hash: identifies the ids and boundaries.
    begins, ends: 1 if each document has a begin mark, an end mark; else 0.
    roles: [tokens] uint8, which tokens of conversations a model is to write, see chat_tokens.py;
      None for text, where it writes all. With roles, `bytes` counts only the text of answers.
    pairs: whether each document is a pair of conversations, see chat_tokens.REJECTED.
  """
  ids: np.ndarray
  starts: np.ndarray
  bytes: np.ndarray
  hash: str
  begins: int = 1
  ends: int = 1
  roles: np.ndarray | None = None
  pairs: bool = False

  @property
  def cuts(self) -> np.ndarray:
    """[documents], for pairs: where the conversation with the rejected answer begins."""
    if self.roles is None or not self.pairs:
      raise ValueError('These documents are not pairs.')
    return np.flatnonzero(np.diff(np.asarray(self.roles) >= REJECTED, prepend=False))[::2]

  @property
  def has_score(self) -> np.ndarray:
    """[tokens] bool: the tokens that `bytes` counts, and that are scored.

    In text these are all but end marks and the first token of each document; in conversations the
    answers, without the ends of turns; and in pairs the chosen answers.
    """
    if self.roles is not None:
      return np.asarray(self.roles) == WRITTEN
    result = np.ones(len(self.ids), bool)
    result[self.starts[:-1]] = False
    if self.ends:
      result[self.starts[1:] - 1] = False
    return result

  @property
  def num_documents(self) -> int:
    return len(self.starts) - 1

  @property
  def document_hashes(self) -> np.ndarray:
    """[documents] uint64: documents of equal text have equal hashes, given one tokenizer."""
    return np.fromiter((kept_out.hash_of(self.ids[a:b].tobytes())
                        for a, b in itertools.pairwise(self.starts)), np.uint64, self.num_documents)

  def sample(self, num_tokens: int) -> 'Tokens':
    """A random sample of whole documents: as many as fit in `num_tokens`, at least one."""
    order = np.random.default_rng(0).permutation(self.num_documents)
    total = np.cumsum(np.diff(self.starts)[order])
    chosen = np.sort(order[:max(1, np.searchsorted(total, num_tokens, side='right'))])
    after = lambda boundaries: np.concatenate([[0], np.cumsum(np.diff(boundaries)[chosen])])
    of_chosen = lambda values: np.concatenate(
        [values[self.starts[i]:self.starts[i + 1]] for i in chosen])
    return dataclasses.replace(
        self, ids=of_chosen(self.ids), starts=after(self.starts), bytes=after(self.bytes),
        roles=None if self.roles is None else of_chosen(self.roles))


def load(folder: str, split: str) -> Tokens:
  """Opens a split that `prepare` wrote.

  If the training tokens were deleted, the split is empty. Finished runs are unaffected; a run that
  needs the tokens is refused, because there are too few.

  Raises:
    UsageError: the folder holds no tokens, or they are damaged.
  """
  folder = places.local(folder)
  meta = read_meta(folder)
  tokens = os.path.join(folder, f'{split}.bin')
  _check(folder, meta, split)
  if split == 'train' and not (os.path.exists(tokens) and os.path.getsize(tokens)):
    nothing = np.zeros(1, np.int64)
    return Tokens(np.zeros(0, meta['dtype']), nothing, nothing, meta['hash'][split])
  documents = np.load(os.path.join(folder, f'{split}.documents.npy'))
  ids = np.memmap(tokens, dtype=meta['dtype'], mode='r')
  of_roles = os.path.join(folder, f'{split}{token_files.ROLES}')
  roles = np.memmap(of_roles, np.uint8, mode='r') if os.path.exists(of_roles) else None
  begins, ends = (int(meta['made_from']['framing'][mark] is not None) for mark in ('begin', 'end'))
  return Tokens(
      ids, documents[:, 0], documents[:, 1], meta['hash'][split], begins, ends, roles,
      meta['made_from']['domain'].get('format') == PAIRS)


def check(folder: str) -> None:
  """Raises damage.Damaged if a file in a folder that `prepare` wrote has changed since."""
  here = places.local(folder)
  try:
    _check_all(here)
  except damage.Damaged:
    if here == folder:
      raise
    _check_all(places.local(folder, refresh=True))  # only the copy may be damaged


def _check_all(folder: str) -> None:
  meta = read_meta(folder)
  damage.check(folder, {name: each for name, each in meta.get(damage.SUMS, {}).items()
                        if name == origin.FILES})
  for split in SPLITS:
    _check(folder, meta, split)


def _check(folder: str, meta: Mapping, split: str) -> None:
  """Raises damage.Damaged if a split is damaged. Training tokens may have been deleted."""
  if split == 'train' and not os.path.exists(os.path.join(folder, 'train.bin')):
    return
  if damage.SUMS in meta:
    recorded = {name: each for name, each in meta[damage.SUMS].items()
                if name.startswith(f'{split}.')}
    if f'{split}.bin' in damage.check(folder, recorded):
      damage.check_numbers(folder, split, meta['dtype'], meta.get('vocab_size'))
  else:  # an earlier version
    damage.check_numbers(folder, split, meta['dtype'], None)
    if token_files.hash_of_files(folder, split) != meta['hash'][split]:
      raise damage.Damaged(folder, f'{split}.bin', 'its content is not what was written')


def document_id(folder: str, split: str, number: int) -> str:
  """The id of document `number`, counted from 0; '' if it has none or the domain has no ids."""
  path = os.path.join(places.local(folder), f'{split}.ids.jsonl')
  if not os.path.exists(path):
    return ''
  with open(path, encoding='utf-8') as file:
    return json.loads(next(itertools.islice(file, number, None)))


def prepare(folder: str, domain: Domain, tokenizer: Tokenizer, held_out: float,
            max_skipped: float = 0.1, unless: Mapping[int, str] = kept_out.NOTHING,
            processes: int = 0) -> dict:
  """Tokenizes a domain into `folder`, unless that exists.

  Args:
    folder: the folder of this domain.
    domain: where the text comes from.
    tokenizer: encodes the text.
    held_out: the share of documents to hold out, unless the domain has its own share or files.
    max_skipped: the largest share of records that may be unusable, and of documents that the
      tokenizer may lose.
    unless: hash of a document that must not be trained on -> the domain that it is held out for;
      see Tokens.document_hashes.
    processes: the number of processes that tokenize; if 0, one per core.

  Returns:
    The content of meta.json. Among it are the numbers of documents, bytes and tokens of each
    split, and for conversations those of token_files.Writer.of_chats; `changes`: the fields of
    Changes; and `skipped`: the number of unusable records, in all and by reason, and the first
    places. `files`: what was read as what, and what was left out
    (corpora.Group). `notes`: what is odd about that, in words. `kept_out`: see kept_out.py.

  Raises:
    UsageError: the domain has fewer than two documents or too many unusable records, the
      tokenizer loses text or changes every document, nothing is left to train on, or `folder` was
      made from something else.
    RunError: a process that tokenizes ended early.
  """
  if places.is_whole(folder, kept_out.META):
    origin.check(os.path.dirname(folder),
                 {domain.name: differences(folder, domain, tokenizer, held_out)})
    return reopen(folder, domain, unless)

  made_from = _made_from(domain, tokenizer, held_out) | _describe(domain)
  try:
    with writing.new_folder(folder, kept_out.META) as partial:
      return _write(partial, domain, tokenizer, held_out, max_skipped, made_from, unless, processes)
  except OSError as error:
    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
      raise
  # Another job finished first.
  return prepare(folder, domain, tokenizer, held_out, max_skipped, unless, processes)


def reopen(folder: str, domain: Domain, unless: Mapping[int, str]) -> dict:
  """Opens a folder that has no `differences`; raises UsageError if it trains on documents of
  `unless`, see kept_out.check."""
  return kept_out.check(folder, domain.name, read_meta(folder), load(folder, 'train'), unless)


def differences(folder: str, domain: Domain, tokenizer: Tokenizer | None, held_out: float
                ) -> list[str]:
  """The differences between what the tokens in a folder were made from and the config, in words.

  See origin.py. Arguments as for `prepare`; without a tokenizer, tokenizers are not compared.
  """
  now, paths = _made_from(domain, tokenizer, held_out), []
  with contextlib.suppress(UsageError):  # if the text is gone, the tokens suffice
    paths = _paths(domain)
    if not origin.is_noted(folder):
      now |= _describe(domain)
  return list(origin.differences(
      folder, domain.name, read_meta(folder)['made_from'], now, paths))


def _parts(domain: Domain) -> dict[str, Domain]:
  """The text to train on and the text that is only measured, by their names in meta.json."""
  found = {'text': domain} if domain.is_trained else {}
  return found | ({'held_out_text': domain.measured()} if domain.names_held_out else {})


def _paths(domain: Domain) -> list[str]:
  """The files of both parts."""
  return [path for part in _parts(domain).values() for path in corpora.paths(part)]


def _describe(domain: Domain) -> dict[str, str]:
  """A short description of the files of each part."""
  return {name: corpora.describe(part) for name, part in _parts(domain).items()}


def _made_from(domain: Domain, tokenizer: Tokenizer | None, held_out: float) -> dict:
  """The settings that tokens are made with, as plain data."""
  fields = {**domain._asdict(), 'paths': list(domain.paths)}
  del fields['held_out'], fields['field']
  # Folders older than these fields stay valid.
  if not domain.id_field:
    del fields['id_field']
  if domain.format == TEXT:
    del fields['format']
  made_from: dict = {'domain': fields}
  if tokenizer:
    framing = {field: mark and str(mark) for field, mark in tokenizer.framing._asdict().items()}
    if domain.format != TEXT:
      framing = {'begin': None, 'end': None, 'special': ENCODE,
                 'chat_template': tokenizer.chat_template.hash}
    made_from |= {'framing': framing, 'tokenizer': tokenizer.hash}
  return made_from | {'held_out': list(domain.measured().paths) if domain.names_held_out else
                      domain.share(held_out)}


def can_prepare(domain: Domain) -> bool:
  """Whether the text of a domain exists."""
  try:
    _describe(domain)
  except UsageError:
    return False
  return True


def _write(partial, domain, tokenizer, held_out, max_skipped, made_from, unless,
           processes) -> dict:
  # Each domain that is read, with the share of its documents to hold out.
  parts = [(domain, domain.share(held_out))] if domain.is_trained else []
  if domain.names_held_out:
    parts.append((domain.measured(), splits.ALL))
  # Before they are read: what changes meanwhile is then noticed.
  origin.write(partial, _paths(domain))
  tallies = [corpora.Tally() for _ in parts]
  written = splits.write(partial, parts, tokenizer, max_skipped, tallies, unless, processes)
  if written.smallest is not None:
    # Nothing was held out: hold out the document with the smallest hash.
    written = splits.write(partial, [(domain, np.nextafter(written.smallest, 1))], tokenizer,
                           max_skipped, [corpora.Tally()], unless, processes)
  meta = {'made_from': made_from, 'dtype': token_files.dtype_of(tokenizer).name,
          'vocab_size': tokenizer.vocab_size, 'hash': {},
          'changes': dataclasses.asdict(written.changes), **corpora.summary(tallies),
          'notes': [note for (part, _), tally in zip(parts, tallies) for note in tally.notes(part)]}
  if unless:
    meta['kept_out'] = written.removed.as_meta(unless)
  for split in SPLITS:
    totals = np.load(os.path.join(partial, f'{split}.documents.npy'))
    meta[split] = {'documents': len(totals) - 1, 'tokens': int(totals[-1, 0]),
                   'bytes': written.sizes[split], **written.answers[split]}
    meta['hash'][split] = token_files.hash_of_files(partial, split)
  meta[damage.SUMS] = damage.sums(
      partial, sorted(name for name in os.listdir(partial) if name != leftovers.LOCK))
  sealed.write(os.path.join(partial, kept_out.META), meta)
  return meta


def read_meta(folder: str) -> dict:
  """The meta.json of a folder; raises UsageError if it has none, or damage.Damaged."""
  try:
    found = sealed.read(os.path.join(folder, kept_out.META))
    if wrong := shapes.misfit(found, _META):
      raise ValueError(wrong)
    if not damage.are_sums(found.get(damage.SUMS, {})):
      raise ValueError(f'{damage.SUMS} does not hold lengths and hashes')
  except OSError as error:
    raise UsageError(f'{folder} does not hold tokens written by btx_jax ({error}); use another '
                     '--workdir.') from error
  except ValueError as error:
    raise damage.Damaged(folder, kept_out.META, str(error)) from error
  return found
