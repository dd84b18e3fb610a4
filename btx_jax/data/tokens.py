"""Text tokenized once into flat files on disk, with document boundaries and a held-out split.

The hash of its text alone decides whether a document is held out, so exact copies never end up on
both sides, and adding documents moves no other document. (One exception: if no document of a small
domain has a hash below the threshold, the one with the smallest hash is held out.)

Each document is compared with the text that its tokens stand for; see changes.py.

  DIR/train.bin, held_out.bin              token ids, uint16 or uint32; each document is
                                          begin mark, text, end mark (see framing.py)
  DIR/train.documents.npy, held_out...     [documents + 1, 2] int64: first token, first scored
                                          byte of the raw text; the last row holds the totals
  DIR/train.ids.jsonl, held_out.ids.jsonl  only if the domain has an id_field: the id of each
                                          document, one JSON string per line ("" if it has none)
  DIR/files.jsonl                         the files that they were made from, see origin.py
  DIR/meta.json                           what they were made from, and the skipped records;
                                          written last

The hash of the tokens does not cover the ids, so runs do not depend on them.
"""

import array
from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import uuid

import numpy as np

from btx_jax.data import corpora, framing, origin
from btx_jax.data.changes import Changes
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.errors import UsageError

SPLITS = ('train', 'held_out')
_BATCH = 256  # documents tokenized at a time
_BATCH_CHARS = 16_000_000  # ends a batch early: as lists of ids, text takes many times its size


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
  """
  ids: np.ndarray
  starts: np.ndarray
  bytes: np.ndarray
  hash: str
  begins: int = 1
  ends: int = 1

  @property
  def num_documents(self) -> int:
    return len(self.starts) - 1

  def sample(self, num_tokens: int) -> 'Tokens':
    """A random sample of whole documents: as many as fit in `num_tokens`, at least one."""
    order = np.random.default_rng(0).permutation(self.num_documents)
    total = np.cumsum(np.diff(self.starts)[order])
    chosen = np.sort(order[:max(1, np.searchsorted(total, num_tokens, side='right'))])
    after = lambda boundaries: np.concatenate([[0], np.cumsum(np.diff(boundaries)[chosen])])
    ids = np.concatenate([self.ids[self.starts[i]:self.starts[i + 1]] for i in chosen])
    return dataclasses.replace(
        self, ids=ids, starts=after(self.starts), bytes=after(self.bytes))


def share(text: str) -> float:
  """The hash of a document as a number from 0 to 1; it is held out if that is below `held_out`."""
  return _share(text.encode('utf-8'))


def _share(raw: bytes) -> float:
  return int.from_bytes(hashlib.sha256(raw).digest()[:8], 'big') / 2**64


def load(folder: str, split: str) -> Tokens:
  """Opens a split that `prepare` wrote.

  If the training tokens were deleted, the split is empty. Finished runs are unaffected; a run that
  needs the tokens is refused, because there are too few.
  """
  meta = read_meta(folder)
  tokens = os.path.join(folder, f'{split}.bin')
  if split == 'train' and not os.path.exists(tokens):
    nothing = np.zeros(1, np.int64)
    return Tokens(np.zeros(0, meta['dtype']), nothing, nothing, meta['hash'][split])
  documents = np.load(os.path.join(folder, f'{split}.documents.npy'))
  ids = np.memmap(tokens, dtype=meta['dtype'], mode='r')
  return Tokens(ids, documents[:, 0], documents[:, 1], meta['hash'][split],
                *(int(meta['made_from']['framing'][mark] is not None) for mark in ('begin', 'end')))


def document_id(folder: str, split: str, number: int) -> str:
  """The id of document `number`, counted from 0; '' if it has none or the domain has no ids."""
  path = os.path.join(folder, f'{split}.ids.jsonl')
  if not os.path.exists(path):
    return ''
  with open(path, encoding='utf-8') as file:
    return json.loads(next(itertools.islice(file, number, None)))


def prepare(folder: str, domain: corpora.Domain, tokenizer: Tokenizer, held_out: float,
            max_skipped: float = 0.1) -> dict:
  """Tokenizes a domain into `folder`, unless that exists.

  Args:
    folder: the folder of this domain.
    domain: where the text comes from.
    tokenizer: encodes the text.
    held_out: the share of documents to hold out.
    max_skipped: the largest share of records that may be unusable, and of documents that the
      tokenizer may lose.

  Returns:
    The content of meta.json. Among it are the numbers of documents, bytes and tokens of each
    split, `changes`: the fields of Changes, and `skipped`: the number of unusable records, in all
    and by reason, and the first places. `files`: what was read as what, and what was left out
    (corpora.Group). `notes`: what is odd about that, in words.

  Raises:
    UsageError: the domain has fewer than two documents or too many unusable records, the
      tokenizer loses text or changes every document, or `folder` was made from something else.
  """
  if os.path.exists(folder):
    origin.check(os.path.dirname(folder),
                 {domain.name: differences(folder, domain, tokenizer, held_out)})
    return read_meta(folder)

  made_from = _made_from(domain, tokenizer, held_out) | {'text': corpora.describe(domain)}
  partial = f'{folder}.{uuid.uuid4().hex[:8]}.partial'  # other jobs may be preparing too
  try:
    return _prepare(folder, partial, domain, tokenizer, held_out, max_skipped, made_from)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def differences(folder: str, domain: corpora.Domain, tokenizer: Tokenizer | None, held_out: float
                ) -> list[str]:
  """What the tokens in a folder were made from and is otherwise now, in words; see origin.py.

  Arguments as for `prepare`; without a tokenizer it is not compared.
  """
  now, paths = _made_from(domain, tokenizer, held_out), []
  with contextlib.suppress(UsageError):  # without the text, the tokens suffice
    paths = corpora.paths(domain)
    if not origin.is_noted(folder):
      now |= {'text': corpora.describe(domain)}
  return list(origin.differences(
      folder, domain.name, read_meta(folder)['made_from'], now, paths))


def _made_from(domain: corpora.Domain, tokenizer: Tokenizer | None, held_out: float) -> dict:
  """The settings that tokens are made with."""
  made_from: dict = {'domain': {**domain._asdict(), 'paths': list(domain.paths)}}
  if not domain.id_field:
    del made_from['domain']['id_field']  # folders older than this field stay valid
  if tokenizer:
    made_from |= {'framing': {field: mark and str(mark)
                              for field, mark in tokenizer.framing._asdict().items()},
                  'tokenizer': tokenizer.hash}
  return made_from | {'held_out': held_out}


def _prepare(folder, partial, domain, tokenizer, held_out, max_skipped, made_from) -> dict:
  tally = corpora.Tally()
  sizes, smallest, changes = _write(partial, domain, tokenizer, held_out, max_skipped, tally)
  if smallest is not None:  # nothing was held out: hold out the document of the smallest hash
    sizes, _, changes = _write(partial, domain, tokenizer, np.nextafter(smallest, 1), max_skipped,
                               corpora.Tally())
  meta = {'made_from': made_from, 'dtype': _dtype(tokenizer).name, 'hash': {},
          'changes': dataclasses.asdict(changes),
          'skipped': {'count': tally.skipped, 'reasons': tally.reasons, 'first': tally.first},
          'files': tally.read_as(), 'notes': tally.notes(domain)}
  for split in SPLITS:
    totals = np.load(os.path.join(partial, f'{split}.documents.npy'))
    meta[split] = {'documents': len(totals) - 1, 'tokens': int(totals[-1, 0]),
                   'bytes': sizes[split]}
    meta['hash'][split] = _hash_files(partial, split)
  origin.write(partial, corpora.paths(domain))
  with open(os.path.join(partial, 'meta.json'), 'w', encoding='utf-8') as file:
    json.dump(meta, file, indent=1)
  try:
    os.rename(partial, folder)
  except OSError:
    if not os.path.exists(folder):
      raise  # otherwise another job was faster
    return prepare(folder, domain, tokenizer, held_out, max_skipped)
  return meta


def _write(folder: str, domain, tokenizer, threshold: float, max_skipped: float,
           tally: corpora.Tally) -> tuple[dict[str, int], float | None, Changes]:
  """Writes both splits.

  Returns:
    The bytes of raw text of each split; the smallest hash if no document was held out, else None;
    and the documents that the tokenizer changed.
  """
  os.makedirs(folder, exist_ok=True)
  smallest, changes = None, Changes()
  with contextlib.ExitStack() as stack:
    splits = {split: stack.enter_context(_Writer(folder, split, tokenizer, bool(domain.id_field)))
              for split in SPLITS}
    kept = lambda: sum(writer.documents for writer in splits.values())
    for batch in _batches(corpora.documents(domain, max_skipped, tally)):
      encoded = tokenizer.encode([text for text, _, _ in batch])
      starts = [0, *itertools.accumulate(map(len, encoded))]
      all_ids = np.fromiter(itertools.chain.from_iterable(encoded), _dtype(tokenizer), starts[-1])
      for (text, name, _), (first, end), spelled in zip(
          batch, itertools.pairwise(starts), tokenizer.spell_each(all_ids, starts)):
        raw, ids = text.encode('utf-8'), all_ids[first:end]
        if spelled != raw:
          decoded = spelled.decode('utf-8', errors='replace')
          if not changes.is_normal_form(text, decoded):
            changes.check(domain.name, max_skipped, kept())
          elif _share(spelled) < threshold:  # on the side of a document of this form
            changes.left_out += 1
          else:
            changes.normalised += 1
            splits['train'].add(ids, len(raw), name)
          continue
        place = _share(raw)
        smallest = place if smallest is None else min(smallest, place)
        splits['held_out' if place < threshold else 'train'].add(ids, len(raw), name)
  changes.check(domain.name, max_skipped, kept(), at_end=True)
  train_count, held_out_count = (splits[split].documents for split in SPLITS)
  if train_count > 1 and smallest is None:
    raise UsageError(
        f'The tokenizer changes every document of domains.{domain.name}, for example '
        f'{changes.examples["normalised"]}, so none can be held out: bits per byte count the bytes '
        'of the raw text. Normalise the files first.')
  count = train_count + held_out_count
  if count == 1 or not train_count:
    raise UsageError(
        f'domains.{domain.name} has {count} document(s), and held-out text shares no document '
        f'with training: there must be at least two. Set domains.{domain.name}.separator '
        '(for example a blank line) to split text files into documents, or lower data.held_out.')
  sizes = {split: writer.raw_bytes for split, writer in splits.items()}
  return sizes, None if held_out_count else smallest, changes


class _Writer:
  """Writes the files of a split.

  Attributes:
    documents: their number so far.
    raw_bytes: of their text.
  """

  def __init__(self, folder: str, split: str, tokenizer: Tokenizer, has_ids: bool):
    path = os.path.join(folder, split)
    self._tokenizer, self._code = tokenizer, _dtype(tokenizer).char
    self._boundaries, self._boundaries_file = [(0, 0)], f'{path}.documents.npy'
    self.raw_bytes = 0
    self._tokens_file = open(f'{path}.bin', 'wb')
    self._ids_file = open(f'{path}.ids.jsonl', 'w', encoding='utf-8') if has_ids else None

  @property
  def documents(self) -> int:
    return len(self._boundaries) - 1

  def add(self, ids: np.ndarray, size: int, name: str):
    """Adds a document: the ids of its text, that text's bytes, and the id in its file."""
    before, after, unscored = framing.marks(self._tokenizer.framing, ids)
    for part in (array.array(self._code, before), ids.data, array.array(self._code, after)):
      self._tokens_file.write(part)
    if self._ids_file:
      self._ids_file.write(json.dumps(name) + '\n')
    self.raw_bytes += size
    for part in unscored:
      size -= len(self._tokenizer.spell(part))
    tokens, scored_bytes = self._boundaries[-1]
    count = len(before) + len(ids) + len(after)
    self._boundaries.append((tokens + count, scored_bytes + size))

  def __enter__(self) -> '_Writer':
    return self

  def __exit__(self, *error):
    self._tokens_file.close()
    if self._ids_file:
      self._ids_file.close()
    np.save(self._boundaries_file, np.array(self._boundaries, np.int64))


def _batches(documents: Iterator[corpora.Document]) -> Iterator[list[corpora.Document]]:
  batch, chars = [], 0
  for document in documents:
    batch.append(document)
    chars += len(document.text)
    if len(batch) == _BATCH or chars >= _BATCH_CHARS:
      yield batch
      batch, chars = [], 0
  if batch:
    yield batch


def _dtype(tokenizer: Tokenizer) -> np.dtype:
  return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def _hash_files(folder: str, split: str) -> str:
  digest = hashlib.sha256()
  for name in (f'{split}.bin', f'{split}.documents.npy'):
    with open(os.path.join(folder, name), 'rb') as file:
      while block := file.read(1 << 20):
        digest.update(block)
  return digest.hexdigest()[:16]


def read_meta(folder: str) -> dict:
  """The meta.json of a folder; raises UsageError if it has none."""
  try:
    with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as file:
      return json.load(file)
  except (OSError, json.JSONDecodeError) as error:
    raise UsageError(f'{folder} does not hold tokens written by btx_jax ({error}); use another '
                     '--workdir.') from error
