"""Reads tokenizer.json, the format of Llama 3, SmolLM2 and most models, by `tokenizers`.

The interface is data.tokenizer.Tokenizer. Such a file describes steps (normalizer, pre-tokenizer,
model, decoder), and transformers has written the same tokenizer in several ways. Two habits of
theirs lose text that sentencepiece keeps, and are made up for here: a space is put before a text
unless it begins with one, so a text that does gets another; and U+2581 is taken for a space (see
spelling.py). What else a tokenizer changes is found by data/tokens.py in each document.
"""

from collections.abc import Collection, Mapping, Sequence
import hashlib
import json
import re
from typing import Any

from btx_jax.data import chat_template, framing, spelling
from btx_jax.errors import UsageError

FILE = framing.TOKENIZER_JSON
# Some tokenizers add a space before every text. To encode text that continues other text without
# that space, this is put before it, and its ids are removed from the result.
_BEFORE = '\n'
_MAX_IDS = 1 << 22  # more than any vocabulary has; tables have an entry for each


class FastTokenizer(spelling.Spelling):
  """A tokenizer.json; see data.tokenizer.Tokenizer for the attributes."""

  def __init__(self, files: Mapping[str, bytes], path: str,
               options: framing.Options = framing.AUTOMATIC):
    """Reads `files`, tokenizer.json and its companions by name; `path` is for messages.

    Raises:
      UsageError: tokenizer.json cannot be read, or see framing.decide.
    """
    try:
      import tokenizers
    except ImportError as error:
      raise UsageError(f"{path} needs the package 'tokenizers': pip install 'btx_jax[hf]'"
                       ) from error
    found = framing.read_json(files[FILE])
    added = _added_tokens(found, files, path)
    try:
      self._model = tokenizers.Tokenizer.from_str(json.dumps({**found, 'added_tokens': added}))
    except Exception as error:  # tokenizers raises nothing more specific
      raise UsageError(f'{path} is not a tokenizer of the package tokenizers: {error}') from error
    self._model.no_padding()
    self._model.no_truncation()
    self._model.encode_special_tokens = options.special == framing.TEXT
    self._vocabulary = self._model.get_vocab(with_added_tokens=True)
    self.vocab_size = 1 + max(self._vocabulary.values(), default=-1)
    if not 0 < self.vocab_size <= _MAX_IDS:
      raise UsageError(f'{path} has token ids up to {self.vocab_size - 1:,}, which must lie '
                       f'between 0 and {_MAX_IDS - 1:,}.')
    self.files, self._options = dict(files), options
    names = {token['content']: token.get('special', False) for token in added}
    special = framing.special_tokens(
        files, self._vocabulary, [name for name, is_special in names.items() if is_special])
    self.special, self._path, self.template_name = special.all, path, options.chat_template
    self._template: chat_template.ChatTemplate | None = None
    self.bos_id, self.eos_id = (self._vocabulary.get(name or '')
                                for name in (special.bos, special.eos))
    self.framing = framing.decide(options, files, found, self._vocabulary, special, False, path)
    identity = files[FILE] + f'{self.vocab_size} {self.framing}'.encode()
    self.hash = hashlib.sha256(identity).hexdigest()[:16]

    self._marks = spelling.Marks(self._vocabulary) if _writes_marks(found) else None
    # Added tokens that can occur in text, and cut it.
    cuts = [name for name, is_special in names.items()
            if options.special == framing.ENCODE or not is_special]
    before, after_cuts, self._missing = _space_before(found)
    after = cuts if after_cuts else []
    # Where a text begins with a space, or goes on with one after a cut, another has to be put.
    self._cut = re.compile(f'({"|".join(map(re.escape, after))}) ') if after else None
    self._puts_space = before
    bytes_of = _bytes_of(found, self._vocabulary, set(names), set(cuts))
    super().__init__(bytes_of, before, [self._vocabulary[name] for name in after])
    ids = {self._vocabulary[name]: name.encode('utf-8') for name in names}
    self._of_chats = spelling.Spelling(
        [ids.get(i, piece) for i, piece in enumerate(bytes_of)], before, ids if after_cuts else ())

  def __reduce__(self):
    return type(self), (self.files, self._path, self._options)

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without begin and end marks."""
    if self._missing:
      texts = [self._with_spaces(text) for text in texts]
    return self._marks.encode(self._ids, texts) if self._marks else self._ids(texts)

  @property
  def chat_template(self) -> chat_template.ChatTemplate:
    """Its chat template. Raises UsageError, see chat_template.of_tokenizer."""
    if self._template is None:
      self._template = chat_template.of_tokenizer(
          self.files, self.template_name, self._vocabulary, self._path)
    return self._template

  def encode_chat(self, texts: Sequence[str], goes_on: bool = False) -> list[list[int]]:
    """Token ids of each part of a rendered conversation; see data.tokenizer.Tokenizer."""
    kept = _BEFORE if goes_on and self._puts_space else ''
    before = self._model.encode_special_tokens
    self._model.encode_special_tokens = False
    try:
      first = self._ids([kept])[0] if kept else []
      found = self._ids([kept + text for text in texts])
      return [ids[len(first):] if ids[:len(first)] == first else self._ids([text])[0]
              for text, ids in zip(texts, found)]
    finally:
      self._model.encode_special_tokens = before

  def spell_chat(self, ids: Sequence[int]) -> bytes:
    """The bytes of a rendered conversation, including the names of special tokens."""
    return self._of_chats.spell(ids)

  def _ids(self, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in self._model.encode_batch_fast(
        list(texts), add_special_tokens=False)]

  def _with_spaces(self, text: str) -> str:
    if self._cut:
      text = self._cut.sub(r'\1  ', text)
    return f' {text}' if text.startswith(' ') else text

  def vocabulary(self) -> dict[str, int]:
    """Token name, as stored, to id."""
    return dict(self._vocabulary)


def _added_tokens(tokenizer: Mapping[str, Any], files: Mapping[str, bytes], path: str
                  ) -> list[dict]:
  """The added tokens that have a row in the embedding, as far as the model's config.json says.

  (A padding token is often added to a tokenizer and not to the model.) Those that a file beside
  names as bos_token, pad_token or the like are special, whatever tokenizer.json says.
  """
  size = framing.read_json(files.get(framing.CONFIG, b'')).get('vocab_size')
  named = set(framing.named(files).values())
  found = tokenizer.get('added_tokens') or []
  if not isinstance(found, list) or not all(
      isinstance(token, dict) and isinstance(token.get('content'), str)
      and type(token.get('id')) is int for token in found):
    raise UsageError(f"{path}: 'added_tokens' must be a list of objects with 'id', an integer, and "
                     "'content', a string.")
  return [{**token, 'special': token.get('special', False) or token['content'] in named}
          for token in found
          if not isinstance(size, int) or token['id'] < size]


def _writes_marks(tokenizer: Mapping[str, Any]) -> bool:
  """Whether a tokenizer writes U+2581 for a space."""
  parts = [part for step in ('normalizer', 'pre_tokenizer') for part in
           framing.components(tokenizer, step)]
  return any(part.get('type') == 'Metaspace' or part.get('content') == spelling.MARK
             for part in parts)


def _space_before(tokenizer: Mapping[str, Any]) -> tuple[bool, bool, bool]:
  """Whether a space is put before a text, and after added tokens in it; and only if none is there.
  """
  if any(part.get('type') == 'Prepend' for part in framing.components(tokenizer, 'normalizer')):
    return True, True, False
  for part in framing.components(tokenizer, 'pre_tokenizer'):
    if part.get('type') == 'Metaspace':
      scheme = part.get('prepend_scheme', 'always')
      return scheme != 'never', scheme == 'always', scheme != 'never'
    if part.get('type') == 'ByteLevel' and part.get('add_prefix_space'):
      return True, True, True
  return False, False, False


def _bytes_of(tokenizer: Mapping[str, Any], vocabulary: Mapping[str, int], added: set[str],
              cuts: Collection[str]) -> list[bytes]:
  """The bytes of each token by id; none for the unknown token, and added ones that never occur."""
  parts = [part for step in ('normalizer', 'pre_tokenizer', 'decoder')
           for part in framing.components(tokenizer, step)]
  byte_level = any(part.get('type') == 'ByteLevel' for part in parts)
  spell = spelling.of_byte_characters if byte_level else spelling.of_space_marks
  unknown = (tokenizer.get('model') or {}).get('unk_token')
  result = [b''] * (1 + max(vocabulary.values()))
  for name, i in vocabulary.items():
    if name in added:
      result[i] = name.encode('utf-8') if name in cuts and name != unknown else b''
    elif name != unknown:
      result[i] = spell(name)
  return result
