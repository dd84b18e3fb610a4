"""tokenizer.json, as Llama 3, SmolLM2 and most models have it, read by the package `tokenizers`.

The same interface as data.tokenizer.Sentencepiece. Whether text survives is not known of such a
file beforehand; what is tokenized is checked, see data/tokens.py.
"""

from collections.abc import Mapping, Sequence
import hashlib
import json
from typing import Any

from btx_jax.errors import UsageError

_SPACE_MARK = '\u2581'
FILE = 'tokenizer.json'
# Where the names of special tokens stand.
_SPECIAL = ('tokenizer_config.json', 'special_tokens_map.json')
# What else belongs to a tokenizer, and goes where it goes.
COMPANIONS = (*_SPECIAL, 'tokenizer.model', FILE, 'added_tokens.json', 'chat_template.jinja',
              'chat_template.json', 'vocab.json', 'merges.txt')


class Fast:
  """A tokenizer.json. `hash` identifies it; every document begins with `bos_id`.

  Attributes:
    files: its files by name, to be kept or exported.
  """

  def __init__(self, files: Mapping[str, bytes], name: str):
    """`files`: tokenizer.json and its companions; `name`: of the first, for messages."""
    try:
      import tokenizers
    except ImportError as error:
      raise UsageError(f"{name} needs the package 'tokenizers': pip install 'btx_jax[hf]'"
                       ) from error
    try:
      self._model = tokenizers.Tokenizer.from_str(files[FILE].decode())
    except Exception as error:  # it raises nothing more precise
      raise UsageError(f'{name} is not a tokenizer of the package tokenizers: {error}') from error
    self._model.no_padding()
    self._model.no_truncation()
    self._model.encode_special_tokens = True  # text that looks like a special token is text
    self._byte_level = json.loads(files[FILE]).get('decoder', {}).get('type') == 'ByteLevel'
    self.files = dict(files)
    special = {key: value for file in reversed(_SPECIAL) if file in files
               for key, value in _json(files[file]).items() if value}
    self.eos_id = self._id(special.get('eos_token'))
    if self.eos_id is None:
      raise UsageError(f'{name}: {" or ".join(_SPECIAL)} beside it must name an eos_token of its '
                       'vocabulary, which ends documents.')
    bos_id = self._id(special.get('bos_token'))
    self.bos_id = self.eos_id if bos_id is None else bos_id
    self.unk_id = self._id(special.get('unk_token'))
    vocabulary = self._model.get_vocab(with_added_tokens=True)
    self.vocab_size = 1 + max(vocabulary.values())
    self._special_ids = {i for i, token in self._model.get_added_tokens_decoder().items()
                         if token.special}
    told = files[FILE] + f'{self.bos_id} {self.eos_id}'.encode()
    self.hash = hashlib.sha256(told).hexdigest()[:16]

  def _id(self, token: Any) -> int | None:
    """Of a special token, which is a text or has one as its `content`."""
    content = token.get('content') if isinstance(token, dict) else token
    return self._model.token_to_id(content) if isinstance(content, str) else None

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without begin and end marks."""
    return [found.ids for found in self._model.encode_batch(
        list(texts), add_special_tokens=False)]

  def decode(self, ids: Sequence[int]) -> str:
    """The text of token ids; special tokens have none."""
    return self._model.decode([int(i) for i in ids], skip_special_tokens=True)

  def pieces(self, ids: Sequence[int]) -> list[str]:
    """The text of each token, to be looked at: special tokens are empty, and what is only a part
    of a character shows as U+FFFD."""
    return [self._piece(int(i)) for i in ids]

  def vocabulary(self) -> dict[str, int]:
    """The id of every token by its name, as it is stored, with marks."""
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
  """An object; what is none names nothing."""
  try:
    found = json.loads(content)
  except ValueError:
    return {}
  return found if isinstance(found, dict) else {}
