"""The text of all domains of a config, tokenized once into WORKDIR/data."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import os
import tempfile
from typing import Any

from btx_jax.data import (
  chat_template,
  chat_tokens,
  corpora,
  damage,
  domains,
  framing,
  kept_out,
  origin,
  packing,
  pair_rows,
  splits,
  tokens,
)
from btx_jax.data.changes import Changes
from btx_jax.data.domains import CHAT, PAIRS, TEXT, Domain
from btx_jax.data.tokenizer import Tokenizer, file_name, train_tokenizer
from btx_jax.data.tokenizer import load as load_tokenizer
from btx_jax.data.tokens import Tokens
from btx_jax.devices import distributed
from btx_jax.errors import UsageError
from btx_jax.files import places, sealed, writing
from btx_jax.terminal import say

_SUMS = 'tokenizer.sums.json'  # the length and hash of the files of the kept tokenizer


@dataclasses.dataclass(frozen=True)
class Text:
  """The tokenized text of all domains, by name (sorted: a row's domain is its index in `train`).

  Domains that are only measured are not in `train`.
  """
  tokenizer: Tokenizer
  train: dict[str, Tokens]
  held_out: dict[str, Tokens]


def prepare(config, folder: str) -> Text:
  """Reads and tokenizes the domains that are not in `folder` yet.

  Args:
    config: see btx_jax/base.py.
    folder: WORKDIR/data.

  Returns:
    All training tokens; and a sample of `evaluation.tokens` of the held-out text of each domain, or
    all of it if the domain names its files.

  Raises:
    UsageError: see tokens.prepare and kept_out.check; or the held-out files of a domain do not fill
      one window.
  """
  wanted = domains.from_config(config.domains)
  tokenizer = _tokenizer(config, folder, wanted)
  say(f'tokenizer: {tokenizer.framing}')
  for domain in wanted:
    _set_aside_damaged(config, folder, domain, tokenizer)
  return _open(config, folder, wanted, tokenizer)


def _set_aside_damaged(config, folder: str, domain: Domain, tokenizer: Tokenizer) -> None:
  """Renames the tokens of a domain if they are damaged and can be made again from the same text.

  Raises UsageError if they cannot.
  """
  path = os.path.join(folder, domain.name)
  if not _is_prepared(path):
    return
  try:
    tokens.check(path)
  except damage.Damaged as error:
    if not tokens.can_prepare(domain):
      raise error.without_text() from error
    if error.name not in (kept_out.META, origin.FILES):
      origin.check(folder, {domain.name: tokens.differences(
          path, domain, tokenizer, config.data.held_out)})
    renamed = writing.set_aside(path, 'damaged')
    say(f'{domain.name}: {error.what} The folder is now called {renamed}, and the text is '
        'tokenized again.')


def _open(config, folder: str, wanted: Sequence[Domain], tokenizer: Tokenizer) -> Text:
  """`prepare`, once the tokens that exist are sound."""
  found = changed(config, folder, tokenizer)
  origin.check(folder, found)
  train, held_out = {}, {}
  unless = _named_held_out(config, wanted, folder, tokenizer)
  shares = {domain.name: domain.share(config.data.held_out) for domain in wanted
            if domain.is_trained}
  # Domains with a smaller share come later: they may have copies of what a larger share holds out.
  for domain in sorted(wanted, key=lambda domain: -shares.get(domain.name, 0)):
    path = os.path.join(folder, domain.name)
    not_trained_on = unless if domain.is_trained else kept_out.NOTHING
    if domain.name in found:  # compared with the config already
      meta = tokens.reopen(path, domain, not_trained_on)
    else:
      if not _is_prepared(path):
        say(f'{domain.name}: reading and tokenizing')
      meta = tokens.prepare(path, domain, tokenizer, config.data.held_out, config.data.max_skipped,
                            not_trained_on, config.data.processes)
    measured = tokens.load(path, 'held_out')
    if domain.is_trained:
      train[domain.name] = tokens.load(path, 'train')
      if shares[domain.name] > min(shares.values()):
        unless = dict.fromkeys(measured.document_hashes.tolist(), domain.name) | unless
    held_out[domain.name] = (measured if domain.names_held_out else
                             measured.sample(config.evaluation.tokens))
    lines = _in_words(domain, meta)
    if domain.name in train and train[domain.name].roles is not None:
      about = pair_rows if train[domain.name].pairs else packing
      lines += about.in_words(train[domain.name], config.data.seq_len)
    for line in lines:
      say(f'{domain.name}: {line}')
  return Text(tokenizer, dict(sorted(train.items())), dict(sorted(held_out.items())))


def _named_held_out(config, wanted: Sequence[Domain], folder: str, tokenizer: Tokenizer
                    ) -> dict[int, str]:
  """The hash of each document in files that a domain names as held out -> that domain."""
  result = {}
  with contextlib.ExitStack() as stack:
    temporary = ''
    for domain in wanted:
      if not domain.names_held_out:
        continue
      path = os.path.join(folder, domain.name)
      if not _is_prepared(path):
        temporary = temporary or stack.enter_context(tempfile.TemporaryDirectory())
        path = os.path.join(temporary, domain.name)
        tokens.prepare(path, domain.only_measured(), tokenizer, 0.0, config.data.max_skipped,
                       processes=config.data.processes)
      measured = tokens.load(path, 'held_out')
      if measured.roles is None:
        _check_length(domain, measured, config.data.seq_len)
      result |= dict.fromkeys(measured.document_hashes.tolist(), domain.name)
  return result


def _check_length(domain: Domain, measured: Tokens, length: int):
  """Raises UsageError if the files that a domain names as held out do not fill one window."""
  if len(measured.ids) < length:
    raise UsageError(
        f'domains.{domain.name}.held_out has {len(measured.ids):,} tokens, fewer than one window '
        f'of data.seq_len = {length:,}. Name files with more text, or lower data.seq_len.')


def _is_prepared(path: str) -> bool:
  """Whether a domain is tokenized in the folder `path`."""
  return places.is_whole(path, kept_out.META)


def _in_words(domain: Domain, meta: Mapping[str, Any]) -> list[str]:
  """Lines that describe the token folder of a domain."""
  train, held_out = meta['train'], meta['held_out']
  kind = {TEXT: 'documents', CHAT: 'conversations', PAIRS: 'pairs'}[domain.format]
  lines = [f'{train["documents"]:,} {kind}, {train["bytes"] / 1e6:.1f} MB, '
           f'{train["tokens"] / 1e6:.2f} M tokens to train on; '
           f'{held_out["documents"]:,} {kind} held out' if domain.is_trained else
           f'{held_out["documents"]:,} {kind}, {held_out["bytes"] / 1e6:.1f} MB, '
           f'{held_out["tokens"] / 1e6:.2f} M tokens, only measured']
  if 'answers' in train:
    answers, written, all_tokens = (train[key] + held_out[key]
                                    for key in ('answers', 'written', 'tokens'))
    lines.append(f'{answers:,} answers, {written / all_tokens:.1%} of the tokens')
  return lines + kept_out.in_words(meta) + remarks(meta)


def remarks(meta: Mapping[str, Any]) -> list[str]:
  """Lines on what was skipped, changed, left out or looks odd, from the meta.json of a folder."""
  lines = []
  skipped = meta.get('skipped')
  if skipped and skipped['count']:
    more = skipped['count'] - len(skipped['first'])
    lines.append(f'{skipped["count"]:,} record(s) skipped: '
                 f'{"; ".join(skipped["first"])}{f"; and {more:,} more" if more else ""}')
  lines += Changes(**meta['changes']).in_words(
      meta['train']['documents'] + meta['held_out']['documents'])
  return lines + corpora.left_out(meta) + meta.get('notes', [])


def changed(config, folder: str, tokenizer: Tokenizer | None) -> dict[str, list[str]]:
  """For each domain, the differences between what its tokens were made from and the config.

  Without a tokenizer, tokenizers are not compared. Domains that are not tokenized yet are left out.
  """
  paths = {domain: os.path.join(folder, domain.name)
           for domain in domains.from_config(config.domains)}
  return {domain.name: tokens.differences(path, domain, tokenizer, config.data.held_out)
          for domain, path in paths.items() if _is_prepared(path)}


def open_prepared(config, folder: str) -> Text:
  """Waits until the files that process 0 writes by `prepare` appear here, and opens them."""
  distributed.wait_for(_kept(config, folder))
  for domain in config.domains:
    distributed.wait_for(os.path.join(folder, domain, kept_out.META))
  wanted = domains.from_config(config.domains)
  return _open(config, folder, wanted, _tokenizer(config, folder, wanted))


def tokenizer(config, folder: str) -> Tokenizer:
  """The tokenizer that `prepare` used."""
  return given(config, folder) or _load_kept(
      _kept(config, folder), framing.options(config.tokenizer))


def given(config, folder: str) -> Tokenizer | None:
  """The tokenizer that the config names, or None if one is to be trained.

  If its file is missing, the copy in `folder` is read.

  Raises:
    UsageError: see tokenizer.load; or there are domains of conversations or pairs, and it cannot
      render conversations.
  """
  options = framing.options(config.tokenizer)
  chat_template.check_name(options.chat_template)
  of_chats = [name for name, domain in config.domains.items() if domain.format != TEXT]
  path, kept = config.tokenizer.path, _kept(config, folder)
  if not path:
    if of_chats:
      raise UsageError(f'domains.{of_chats[0]}: conversations need a tokenizer with special '
                       'tokens, and one that is trained here has none; set tokenizer.path to a '
                       'tokenizer.json.')
    return None
  gone = not places.exists(path) and places.exists(kept)
  result = _load_kept(kept, options) if gone else load_tokenizer(path, options)
  if of_chats:
    chat_tokens.stop_id(result)  # fails early if its template cannot render a conversation
  return result


def _load_kept(path: str, options: framing.Options) -> Tokenizer:
  """The copy of the tokenizer beside the tokens. Raises UsageError if it is damaged."""
  folder, name = os.path.split(path)
  try:
    _check_kept(folder)
  except damage.Damaged as error:
    raise error.of_tokenizer() from error
  return load_tokenizer(os.path.join(_files_in(folder), name), options)


def _files_in(folder: str) -> str:
  """Where the files of the tokenizer in `folder` can be read on this machine."""
  return places.local(folder, deep=False)


def _check_kept(folder: str) -> None:
  """Raises damage.Damaged if the copy of the tokenizer is damaged."""
  folder = _files_in(folder)
  try:
    recorded = sealed.read(os.path.join(folder, _SUMS))
    if not damage.are_sums(recorded):
      raise ValueError('it does not hold lengths and hashes')
  except FileNotFoundError:
    return  # an earlier version wrote the copy
  except ValueError as error:
    raise damage.Damaged(folder, _SUMS, str(error)) from error
  damage.check(folder, recorded)


def _kept(config, folder: str) -> str:
  """Path of the tokenizer in `folder`, where its other files are too."""
  path = config.tokenizer.path
  gone = path and not places.exists(path)
  return os.path.join(folder, file_name(_files_in(folder) if gone else path,
                                        config.tokenizer.special))


def _tokenizer(config, folder: str, wanted: Sequence[Domain]) -> Tokenizer:
  """The given tokenizer, or one trained on the text; `folder` keeps a copy of either."""
  kept, size = _kept(config, folder), config.tokenizer.vocab_size
  tokenizer = given(config, folder)
  if not tokenizer and places.exists(kept):
    tokenizer = _load_kept(kept, framing.options(config.tokenizer))
    if tokenizer.vocab_size != size:
      raise UsageError(f'{kept} has {tokenizer.vocab_size} pieces, but tokenizer.vocab_size '
                       f'= {size}. Set that, or use another --workdir.')
  if not tokenizer:
    say(f'tokenizer: training {size:,} pieces')
    tokenizer = train_tokenizer(_sample(config, wanted), size, framing.options(config.tokenizer))
  missing = not places.exists(kept)
  if not missing:
    try:
      _check_kept(folder)
    except damage.Damaged as error:
      say(f'tokenizer: {error.what} It is written again from {config.tokenizer.path}.')
      missing = True
  if missing:
    last = os.path.basename(kept)  # written last: if it exists, all do
    for name in sorted(tokenizer.files, key=lambda name: name == last):
      with writing.replacing(os.path.join(folder, name), 'wb') as file:
        file.write(tokenizer.files[name])
    sealed.write(os.path.join(folder, _SUMS), damage.sums(_files_in(folder), list(tokenizer.files)))
  return tokenizer


def _sample(config, wanted: Sequence[Domain]) -> Iterator[str]:
  """The first training documents of every domain, to train a tokenizer on."""
  trained = [domain for domain in wanted if domain.is_trained]
  share = max((domain.share(config.data.held_out) for domain in trained), default=0.0)
  # Skipped records are reported later, when the domain is tokenized.
  named = {text for domain in wanted if domain.names_held_out
           for text, *_ in corpora.documents(domain.measured(), config.data.max_skipped)}
  for domain in trained:
    left = config.tokenizer.sample_chars
    for text, *_ in corpora.documents(domain, config.data.max_skipped):
      if splits.share(text) < share or text in named:
        continue
      yield text[:left]
      left -= len(text)
      if left <= 0:
        break
