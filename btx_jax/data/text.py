"""The text of a config, tokenized once into WORKDIR/data."""

import dataclasses
import os

from btx_jax.data import corpora
from btx_jax.data import tokenizer as tokenizer_lib
from btx_jax.data import tokens as tokens_lib
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.devices import distributed
from btx_jax.errors import UsageError
from btx_jax.files import replacing
from btx_jax.terminal import say


@dataclasses.dataclass(frozen=True)
class Text:
  """The tokenized text of all domains, by name (sorted: a row's domain is its index)."""
  tokenizer: Tokenizer
  train: dict[str, tokens_lib.Tokens]
  held_out: dict[str, tokens_lib.Tokens]


def prepare(config, folder: str) -> Text:
  """Reads and tokenizes what is not in `folder` already.

  Args:
    config: as btx_jax/base.py makes it.
    folder: WORKDIR/data.

  Returns:
    All training tokens, and of the held-out ones a sample of `evaluation.tokens` a domain.

  Raises:
    UsageError: see tokens.prepare.
  """
  domains = corpora.from_config(config.domains)
  tokenizer = _tokenizer(config, folder, domains)
  train, held_out = {}, {}
  for domain in domains:
    path = os.path.join(folder, domain.name)
    if not os.path.exists(path):
      say(f'{domain.name}: reading and tokenizing')
    meta = tokens_lib.prepare(
        path, domain, tokenizer, config.data.held_out, config.data.max_skipped)
    train[domain.name] = tokens_lib.load(path, 'train')
    held_out[domain.name] = tokens_lib.load(path, 'held_out').sample(config.evaluation.tokens)
    say(f'{domain.name}: {meta["train"]["documents"]:,} documents, '
        f'{meta["train"]["bytes"] / 1e6:.1f} MB, {meta["train"]["tokens"] / 1e6:.2f} M tokens '
        f'to train on; {meta["held_out"]["documents"]:,} documents held out')
    skipped = meta.get('skipped')
    if skipped and skipped['count']:
      more = skipped['count'] - len(skipped['first'])
      say(f'{domain.name}: {skipped["count"]:,} record(s) skipped: '
          f'{"; ".join(skipped["first"])}{f"; and {more:,} more" if more else ""}')
  return Text(tokenizer, train, held_out)


def open_prepared(config, folder: str) -> Text:
  """What `prepare` of process 0 has made, as soon as it is seen here."""
  distributed.wait_for(_kept(config, folder))
  for domain in config.domains:
    distributed.wait_for(os.path.join(folder, domain, 'meta.json'))
  return prepare(config, folder)


def tokenizer(config, folder: str) -> Tokenizer:
  """The tokenizer that `prepare` has used."""
  return given(config, folder) or tokenizer_lib.load(_kept(config, folder))


def given(config, folder: str) -> Tokenizer | None:
  """The tokenizer that the config names; None if one is to be trained.

  Where its file is not at hand, the copy in `folder` is as good.
  """
  path, kept = config.tokenizer.path, _kept(config, folder)
  if not path:
    return None
  return tokenizer_lib.load(path if os.path.exists(path) or not os.path.exists(kept) else kept)


def _kept(config, folder: str) -> str:
  """Where the tokenizer is kept; the files that belong to it are beside it."""
  return os.path.join(folder, tokenizer_lib.file_name(config.tokenizer.path))


def _tokenizer(config, folder: str, domains) -> Tokenizer:
  """The given tokenizer, or one trained from the text, kept in `folder` either way."""
  kept, size = _kept(config, folder), config.tokenizer.vocab_size
  tokenizer = given(config, folder)
  if not tokenizer and os.path.exists(kept):
    tokenizer = tokenizer_lib.load(kept)
    if tokenizer.vocab_size != size:
      raise UsageError(f'{kept} has {tokenizer.vocab_size} pieces, but tokenizer.vocab_size '
                       f'= {size}. Set that, or use another --workdir.')
  if not tokenizer:
    say(f'tokenizer: training {size:,} pieces')
    tokenizer = tokenizer_lib.train(_sample(config, domains), size)
  if not os.path.exists(kept):
    last = os.path.basename(kept)  # when it is there, all are
    for name in sorted(tokenizer.files, key=lambda name: name == last):
      with replacing(os.path.join(folder, name), 'wb') as file:
        file.write(tokenizer.files[name])
  return tokenizer


def _sample(config, domains):
  """The first training documents of every domain, for training a tokenizer."""
  for domain in domains:
    left = config.tokenizer.sample_chars
    # What is skipped is told when the domain is tokenized, next.
    for text, _, _ in corpora.documents(domain, config.data.max_skipped):
      if tokens_lib.share(text) < config.data.held_out:
        continue
      yield text[:left]
      left -= len(text)
      if left <= 0:
        break
