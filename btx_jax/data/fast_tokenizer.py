"""Reads tokenizer.json, the format of Llama 3, SmolLM2 and most models, by `tokenizers`.

The interface is data.tokenizer.Tokenizer. Such a file does not show whether it loses text, so
data/tokens.py checks the text that it tokenizes.
"""

from collections.abc import Mapping, Sequence
import hashlib
import json
from typing import Any

from btx_jax.errors import UsageError

_SPACE_MARK = '\u2581'
FILE = 'tokenizer.json'
# Files that name the special tokens.
_SPECIAL = ('tokenizer_config.json', 'special_tokens_map.json')
# Files that belong to a tokenizer and are copied with it.
COMPANIONS = (*_SPECIAL, 'tokenizer.model', FILE, 'added_tokens.json', 'chat_template.jinja',
              'chat_template.json', 'vocab.json', 'merges.txt')


class FastTokenizer:
  """A tokenizer.json; see data.tokenizer.Tokenizer for the attributes."""

  def __init__(self, files: Mapping[str, bytes], path: str):
    """Reads `files`, tokenizer.json and its companions by name; `path` is for messages.

    Raises:
      UsageError: tokenizer.json cannot be read, or no companion names an end-of-text token.
    """
    try:
      import tokenizers
    except ImportError as error:
      raise UsageError(f"{path} needs the package 'tokenizers': pip install 'btx_jax[hf]'"
                       ) from error
    try:
      self._model = tokenizers.Tokenizer.from_str(files[FILE].decode())
    except Exception as error:  # tokenizers raises nothing more specific
      raise UsageError(f'{path} is not a tokenizer of the package tokenizers: {error}') from error
    self._model.no_padding()
    self._model.no_truncation()
    self._model.encode_special_tokens = True  # text that looks like a special token is text
    self._byte_level = json.loads(files[FILE]).get('decoder', {}).get('type') == 'ByteLevel'
    self.files = dict(files)
    special = {key: value for file in reversed(_SPECIAL) if file in files
               for key, value in _json(files[file]).items() if value}
    eos_id = self._id(special.get('eos_token'))
    if eos_id is None:
      raise UsageError(f'{path}: {" or ".join(_SPECIAL)} beside it must name an eos_token of its '
                       'vocabulary, which ends documents.')
    bos_id = self._id(special.get('bos_token'))
    self.eos_id = eos_id
    self.bos_id = eos_id if bos_id is None else bos_id
    self.unk_id = self._id(special.get('unk_token'))
    vocabulary = self._model.get_vocab(with_added_tokens=True)
    self.vocab_size = 1 + max(vocabulary.values())
    self._special_ids = {i for i, token in self._model.get_added_tokens_decoder().items()
                         if token.special}
    identity = files[FILE] + f'{self.bos_id} {self.eos_id}'.encode()
    self.hash = hashlib.sha256(identity).hexdigest()[:16]

  def _id(self, token: Any) -> int | None:
    """The id of a special token, given as a string or as an object with a `content`."""
    content = token.get('content') if isinstance(token, dict) else token
    return self._model.token_to_id(content) if isinstance(content, str) else None

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without begin and end marks."""
    return [encoding.ids for encoding in self._model.encode_batch(
        list(texts), add_special_tokens=False)]

  def decode(self, ids: Sequence[int]) -> str:
    """The text of token ids; special tokens are omitted."""
    return self._model.decode([int(i) for i in ids], skip_special_tokens=True)

  def pieces(self, ids: Sequence[int]) -> list[str]:
    """The text of each token, for display: '' for special tokens, U+FFFD for a part of a
    character."""
    return [self._piece(int(i)) for i in ids]

  def vocabulary(self) -> dict[str, int]:
    """Token name, as stored, to id."""
    return self._model.get_vocab(with_added_tokens=True)

  def _piece(self, i: int) -> str:
    piece = self._model.id_to_token(i)
    if piece is None or i in self._special_ids:
      return ''
    if self._byte_level:
      return self._model.decode([i])
    if len(piece) == 6 and piece.startswith('<0x'):
      return bytes([int(piece[3:5], 16)]).decode('utf-8', errors='replace')
    return piece.replace(_SPACE_MARK, ' ')


def _json(content: bytes) -> dict:
  """The JSON object in a file, or {} if the file does not hold one."""
  try:
    found = json.loads(content)
  except ValueError:
    return {}
  return found if isinstance(found, dict) else {}
