"""Text to token ids without loss: the bytes of the ids are those of the text.

A tokenizer is a sentencepiece model, handled here, or a tokenizer.json (fast_tokenizer.py).

Sentencepiece's defaults destroy newlines and indentation, so a model trained here does not
normalise, keeps whitespace pieces and falls back to bytes. One case remains, U+2581 in the text
itself, which spelling.py handles.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
import functools
import hashlib
import io
import os
from typing import Protocol

import numpy as np
import sentencepiece as spm

from btx_jax.data import chat_template, fast_tokenizer, framing, parser_check, spelling
from btx_jax.errors import UsageError
from btx_jax.files import inputs, places
from btx_jax.files.git_lfs import check_no_pointer

FILE = 'tokenizer.model'
# Files that belong to a tokenizer and are kept with it. The config.json is the model's.
COMPANIONS = (*framing.NAMING, framing.CONFIG, FILE, fast_tokenizer.FILE, 'added_tokens.json',
              chat_template.FILE, 'chat_template.json', 'vocab.json', 'merges.txt')
# Those of them that are JSON objects and read here.
_OBJECTS = (*framing.NAMING, framing.CONFIG, fast_tokenizer.FILE, 'chat_template.json')
_MAX_BYTES = 100_000_000  # of a file; the largest vocabularies have 35 MB
_SENTENCE = 4000  # characters of a training sentence; sentencepiece skips longer ones


class Tokenizer(Protocol):
  """The interface of all tokenizers.

  Attributes:
    files: its files by name, to be kept with the tokens and exported with a model.
    hash: identifies the tokenizer and the framing.
    vocab_size: all ids are below it.
    bos_id, eos_id: the tokens that it names so; None if it names none.
    framing: what begins and ends a document; bos_id and eos_id alone do not decide it.
    special: the names of its special tokens.
    template_name: the chat template that the config names; '' for the tokenizer's own.
  """
  files: dict[str, bytes]
  hash: str
  vocab_size: int
  bos_id: int | None
  eos_id: int | None
  framing: framing.Framing
  special: Collection[str]
  template_name: str

  @property
  def chat_template(self) -> chat_template.ChatTemplate:
    """Its chat template. Raises UsageError if it has none, see chat_template.of_tokenizer."""
    ...

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without begin and end marks."""
    ...

  def encode_chat(self, texts: Sequence[str], goes_on: bool = False) -> list[list[int]]:
    """Token ids of each part of a rendered conversation, with special tokens encoded as such.

    Args:
      texts: the parts.
      goes_on: whether other text precedes each part, so that no space is added in front of it.
    """
    ...

  def spell_chat(self, ids: Sequence[int]) -> bytes:
    """The bytes of a rendered conversation, including the names of special tokens."""
    ...

  def spell(self, ids: Sequence[int]) -> bytes:
    """The bytes of the text that the ids stand for."""
    ...

  def spell_each(self, ids: np.ndarray, starts: Sequence[int]) -> list[bytes]:
    """The same of several texts, whose ids [tokens] follow one another; see Spelling."""
    ...

  def sizes(self, ids: np.ndarray) -> np.ndarray:
    """The number of bytes that each token stands for, [tokens]; see Spelling."""
    ...

  def decode(self, ids: Sequence[int]) -> str:
    """The text of token ids."""
    ...

  def pieces(self, ids: Sequence[int]) -> list[str]:
    """The text of each token, for display."""
    ...

  def vocabulary(self) -> dict[str, int]:
    """Token name, as stored, to id; names are unique."""
    ...


class Sentencepiece(spelling.Spelling):
  """A sentencepiece model; see Tokenizer for the attributes."""
  num_threads = -1  # that encode; -1 means one per core

  def __init__(self, files: Mapping[str, bytes], path: str,
               options: framing.Options = framing.AUTOMATIC):
    """Reads `files`, tokenizer.model and its companions by name; `path` is for messages.

    Raises:
      UsageError: the model cannot be read, cannot do what `options` ask for, or see
        framing.decide.
    """
    proto = files[FILE]
    try:
      model = spm.SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
      raise UsageError(f'{path} is not a sentencepiece model: {error}') from error
    if options.special == framing.ENCODE:
      raise UsageError(f"tokenizer.special = '{framing.ENCODE}' needs a tokenizer.json, and {path} "
                       f"is a sentencepiece model. Set it to '{framing.TEXT}', or save the "
                       'tokenizer with transformers, which writes a tokenizer.json.')
    self._model = model
    self._options = options
    self.files = dict(files)
    self.vocab_size = model.vocab_size()
    self._vocabulary = {model.id_to_piece(i): i for i in range(self.vocab_size)}
    bos, eos = (model.id_to_piece(i) if i >= 0 else None
                for i in (model.bos_id(), model.eos_id()))
    special = framing.special_tokens(
        files, self._vocabulary,
        [name for name, i in self._vocabulary.items() if model.is_control(i)], bos, eos)
    self.special, self._path, self.template_name = special.all, path, options.chat_template
    self.bos_id, self.eos_id = (self._vocabulary.get(name or '')
                                for name in (special.bos, special.eos))
    self.framing = framing.decide(
        options, files, framing.read_json(files.get(fast_tokenizer.FILE, b'')), self._vocabulary,
        special, True, path)
    self.hash = hashlib.sha256(proto + str(self.framing).encode()).hexdigest()[:16]
    self._marks = spelling.Marks(self._vocabulary)
    puts_space = model.encode('a', out_type=str)[0].startswith(spelling.MARK)
    super().__init__([b'' if model.is_control(i) or model.is_unknown(i) else
                      spelling.of_space_marks(name) for name, i in self._vocabulary.items()],
                     puts_space)

  def __reduce__(self):
    return type(self), (self.files, self._path, self._options)

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without begin and end marks."""
    return self._marks.encode(functools.partial(
        self._model.encode, num_threads=self.num_threads), texts)

  @property
  def chat_template(self) -> chat_template.ChatTemplate:
    """Raises UsageError: this kind cannot encode special tokens in text."""
    raise self._no_chats()

  def encode_chat(self, texts: Sequence[str], goes_on: bool = False) -> list[list[int]]:
    """Raises UsageError: this kind cannot encode special tokens in text."""
    raise self._no_chats()

  def spell_chat(self, ids: Sequence[int]) -> bytes:
    """Raises UsageError: this kind cannot encode special tokens in text."""
    raise self._no_chats()

  def _no_chats(self) -> UsageError:
    return UsageError(
        f'Conversations need a tokenizer.json, and {self._path} is a sentencepiece model. Set '
        'tokenizer.path to the tokenizer.json beside it, or save the tokenizer with transformers, '
        'which writes one.')

  def vocabulary(self) -> dict[str, int]:
    """Token name, as stored, to id."""
    return dict(self._vocabulary)


def file_name(path: str, special: str = framing.TEXT) -> str:
  """The kind of tokenizer at a path, as its file name: 'tokenizer.model' or 'tokenizer.json'.

  Of a folder with both it is the sentencepiece model, which needs no further package, unless that
  is not one (beside Llama 3's tokenizer.json lies another format of that name), or `special` tokens
  are to be encoded.
  """
  if not places.is_folder(path):
    return fast_tokenizer.FILE if path.endswith('.json') else FILE
  model, fast = (os.path.join(path, name) for name in (FILE, fast_tokenizer.FILE))
  if not places.exists(model):
    return fast_tokenizer.FILE
  if places.exists(fast) and (special == framing.ENCODE or _is_tiktoken(model)):
    return fast_tokenizer.FILE
  return FILE


def _is_tiktoken(path: str) -> bool:
  """Whether a file has lines of a token in base64 and its rank, as tiktoken's have."""
  try:
    with inputs.open_file(path) as file:
      words = file.readline(1000).split()
  except OSError:
    return False  # whoever reads it next says why
  return len(words) == 2 and words[1].isdigit()


def load(path: str, options: framing.Options = framing.AUTOMATIC) -> Tokenizer:
  """Reads a sentencepiece model, a tokenizer.json, or a folder with either (see file_name).

  Other files of the tokenizer in that folder are added to its `files`.

  Raises:
    UsageError: the file cannot be read, is not a tokenizer, changes letters, or see
      framing.decide.
  """
  chat_template.check_name(options.chat_template)
  main = file_name(path, options.special)
  where = os.path.join(path, main) if places.is_folder(path) else path
  files = {name: os.path.join(os.path.dirname(where), name) for name in COMPANIONS}
  files = {name: file for name, file in files.items() if places.exists(file)} | {main: where}
  check_no_pointer(where)
  try:
    contents = {name: _read(file) for name, file in files.items()}
  except (OSError, ValueError) as error:
    raise UsageError(f'tokenizer.path = {path!r} cannot be read: {error}') from error
  tiktoken = main == FILE and _is_tiktoken(where)
  if tiktoken:
    raise UsageError(f'{where} is a tiktoken file, and no tokenizer.json lies beside it; save the '
                     'tokenizer with transformers, which writes one.')
  parser_check.check(contents, main, where)
  kind = fast_tokenizer.FastTokenizer if main == fast_tokenizer.FILE else Sentencepiece
  tokenizer = kind(contents, where, options)
  for letter, changed in (('A', 'a'), ('\u00e9', 'e')):  # what no share of documents would excuse
    if tokenizer.decode(tokenizer.encode([letter])[0]) == changed:
      raise UsageError(f'{where} turns {letter!r} into {changed!r}: a model cannot learn to write '
                       'what its tokenizer changes. Use a tokenizer that keeps letters as they '
                       'are, or leave tokenizer.path empty to train one.')
  return tokenizer


def vocabulary(path: str) -> dict[str, int]:
  """The id of each token by name, of a tokenizer that encodes no text here; see load."""
  return load(path, framing.Options(framing.NONE, framing.NONE)).vocabulary()


def _read(path: str) -> bytes:
  """The content of a file. Raises ValueError if it should be a JSON object and is not."""
  raw = inputs.read_bytes(path, _MAX_BYTES)
  if os.path.basename(path) in _OBJECTS and not isinstance(inputs.parse_json(raw), dict):
    raise ValueError(f'{path} is not a JSON object')
  return raw


def train_tokenizer(texts: Iterable[str], vocab_size: int,
                    options: framing.Options = framing.AUTOMATIC) -> Sentencepiece:
  """Trains a byte-pair sentencepiece model with byte fallback on a sample of the text.

  Raises:
    UsageError: the text is too small for `vocab_size` pieces; or `texts` raised it.
  """
  proto = io.BytesIO()
  raised = []

  def sentences() -> Iterator[str]:
    try:
      for text in texts:
        yield from (text[i:i + _SENTENCE] for i in range(0, len(text), _SENTENCE))
    except UsageError as error:
      raised.append(error)  # sentencepiece raises a RuntimeError in its place
      raise

  try:
    spm.SentencePieceTrainer.train(
        sentence_iterator=sentences(), model_writer=proto, vocab_size=vocab_size,
        model_type='bpe', byte_fallback=True, normalization_rule_name='identity',
        add_dummy_prefix=False, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, split_digits=True, character_coverage=0.9999,
        max_sentence_length=4 * _SENTENCE, minloglevel=2)
  except RuntimeError as error:
    if raised:
      raise raised[0] from None
    raise UsageError(f'A tokenizer of tokenizer.vocab_size = {vocab_size} pieces cannot be '
                     f'trained from the text of the domains: {error}') from error
  return Sentencepiece({FILE: proto.getvalue()}, 'the trained tokenizer', options)
