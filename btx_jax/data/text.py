"""The text of all domains of a config, tokenized once into WORKDIR/data."""

import dataclasses
import os

from btx_jax.data import corpora, framing, origin, tokens
from btx_jax.data.changes import Changes
from btx_jax.data.tokenizer import Tokenizer, file_name, train_tokenizer
from btx_jax.data.tokenizer import load as load_tokenizer
from btx_jax.data.tokens import Tokens
from btx_jax.devices import distributed
from btx_jax.errors import UsageError
from btx_jax.files import replacing
from btx_jax.terminal import say


@dataclasses.dataclass(frozen=True)
class Text:
  """The tokenized text of all domains, by name (sorted: a row's domain is its index)."""
  tokenizer: Tokenizer
  train: dict[str, Tokens]
  held_out: dict[str, Tokens]


def prepare(config, folder: str) -> Text:
  """Reads and tokenizes the domains that are not in `folder` yet.

  Args:
    config: see btx_jax/base.py.
    folder: WORKDIR/data.

  Returns:
    All training tokens, and a sample of `evaluation.tokens` held-out tokens per domain.

  Raises:
    UsageError: see tokens.prepare.
  """
  domains = corpora.from_config(config.domains)
  tokenizer = _tokenizer(config, folder, domains)
  say(f'tokenizer: {tokenizer.framing}')
  origin.check(folder, changed(config, folder, tokenizer))
  train, held_out = {}, {}
  for domain in domains:
    path = os.path.join(folder, domain.name)
    if not os.path.exists(path):
      say(f'{domain.name}: reading and tokenizing')
      tokens.prepare(path, domain, tokenizer, config.data.held_out, config.data.max_skipped)
    meta = tokens.read_meta(path)
    train[domain.name] = tokens.load(path, 'train')
    held_out[domain.name] = tokens.load(path, 'held_out').sample(config.evaluation.tokens)
    say(f'{domain.name}: {meta["train"]["documents"]:,} documents, '
        f'{meta["train"]["bytes"] / 1e6:.1f} MB, {meta["train"]["tokens"] / 1e6:.2f} M tokens '
        f'to train on; {meta["held_out"]["documents"]:,} documents held out')
    skipped = meta.get('skipped')
    if skipped and skipped['count']:
      more = skipped['count'] - len(skipped['first'])
      say(f'{domain.name}: {skipped["count"]:,} record(s) skipped: '
          f'{"; ".join(skipped["first"])}{f"; and {more:,} more" if more else ""}')
    kept = meta['train']['documents'] + meta['held_out']['documents']
    for line in Changes(**meta['changes']).in_words(kept):
      say(f'{domain.name}: {line}')
    for note in corpora.left_out(meta) + meta.get('notes', []):
      say(f'{domain.name}: {note}')
  return Text(tokenizer, train, held_out)


def changed(config, folder: str, tokenizer: Tokenizer | None) -> dict[str, list[str]]:
  """For each domain, what its tokens were made from and is otherwise now, in words.

  Without a tokenizer it is not compared. Domains that are not tokenized yet are left out.
  """
  paths = {domain: os.path.join(folder, domain.name)
           for domain in corpora.from_config(config.domains)}
  return {domain.name: tokens.differences(path, domain, tokenizer, config.data.held_out)
          for domain, path in paths.items() if os.path.exists(path)}


def open_prepared(config, folder: str) -> Text:
  """Waits until the files that process 0 writes by `prepare` appear here, and opens them."""
  distributed.wait_for(_kept(config, folder))
  for domain in config.domains:
    distributed.wait_for(os.path.join(folder, domain, 'meta.json'))
  return prepare(config, folder)


def tokenizer(config, folder: str) -> Tokenizer:
  """The tokenizer that `prepare` used."""
  return given(config, folder) or load_tokenizer(
      _kept(config, folder), framing.options(config.tokenizer))


def given(config, folder: str) -> Tokenizer | None:
  """The tokenizer that the config names, or None if one is to be trained.

  If its file is missing, the copy in `folder` is read.
  """
  options = framing.options(config.tokenizer)
  path, kept = config.tokenizer.path, _kept(config, folder)
  if not path:
    return None
  path = path if os.path.exists(path) or not os.path.exists(kept) else kept
  return load_tokenizer(path, options)


def _kept(config, folder: str) -> str:
  """Path of the tokenizer in `folder`, where its other files are too."""
  path = config.tokenizer.path
  gone = path and not os.path.exists(path)
  return os.path.join(folder, file_name(folder if gone else path, config.tokenizer.special))


def _tokenizer(config, folder: str, domains) -> Tokenizer:
  """The given tokenizer, or one trained on the text; `folder` keeps a copy of either."""
  kept, size = _kept(config, folder), config.tokenizer.vocab_size
  tokenizer = given(config, folder)
  if not tokenizer and os.path.exists(kept):
    tokenizer = load_tokenizer(kept, framing.options(config.tokenizer))
    if tokenizer.vocab_size != size:
      raise UsageError(f'{kept} has {tokenizer.vocab_size} pieces, but tokenizer.vocab_size '
                       f'= {size}. Set that, or use another --workdir.')
  if not tokenizer:
    say(f'tokenizer: training {size:,} pieces')
    tokenizer = train_tokenizer(_sample(config, domains), size, framing.options(config.tokenizer))
  if not os.path.exists(kept):
    last = os.path.basename(kept)  # written last: if it exists, all do
    for name in sorted(tokenizer.files, key=lambda name: name == last):
      with replacing(os.path.join(folder, name), 'wb') as file:
        file.write(tokenizer.files[name])
  return tokenizer


def _sample(config, domains):
  """The first training documents of every domain, to train a tokenizer on."""
  for domain in domains:
    left = config.tokenizer.sample_chars
    # Skipped records are reported later, when the domain is tokenized.
    for text, _, _ in corpora.documents(domain, config.data.max_skipped):
      if tokens.share(text) < config.data.held_out:
        continue
      yield text[:left]
      left -= len(text)
      if left <= 0:
        break
