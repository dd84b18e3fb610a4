"""Decides which tokens begin and end a document, for every kind of tokenizer.

Begin mark: what the tokenizer itself puts before a text. The first of these that applies:

  1. the config's tokenizer.bos
  2. the post-processor of tokenizer.json, as transformers applies it
  3. add_bos_token of tokenizer_config.json
  4. the bos of a sentencepiece model, if it has one; none for a tokenizer.json

End mark: what stands between two documents. The first of these that applies:

  1. the config's tokenizer.eos
  2. the post-processor of tokenizer.json, if it puts a token after a text
  3. the eos_token; but if that ends a turn of a chat (<|im_end|>), the token of the same vocabulary
     that ends a text (<|endoftext|>), if there is one

The eos_token and bos_token are those of tokenizer_config.json or special_tokens_map.json; otherwise
those of the sentencepiece model; otherwise those of the model's config.json.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from btx_jax.errors import UsageError, nearest
from btx_jax.files import inputs

NONE = 'none'  # of tokenizer.bos and tokenizer.eos
TEXT, ENCODE = 'text', 'encode'  # of tokenizer.special
CONFIG = 'config.json'  # of the model that the tokenizer belongs to
TOKENIZER_JSON = 'tokenizer.json'
# Files that name the special tokens; the first counts.
NAMING = ('tokenizer_config.json', 'special_tokens_map.json')
# Ends of a turn in a chat, which finetuned models have as their eos_token ...
_TURN_ENDS = ('<|im_end|>', '<|eot_id|>', '<|eom_id|>', '<|end_of_turn|>', '<end_of_turn>',
              '<|end|>', '<|eot|>')
# ... and ends of a text, which the base models of such were trained with.
_TEXT_ENDS = ('<|endoftext|>', '<|end_of_text|>', '<eos>', '</s>')


class Options(NamedTuple):
  """What the section `tokenizer` of a config says about documents; see btx_jax/base.py."""
  bos: str = ''
  eos: str = ''
  special: str = TEXT
  chat_template: str = ''


AUTOMATIC = Options()


def options(section: Mapping[str, Any]) -> Options:
  """The options in a config's section `tokenizer`.

  Raises:
    UsageError: `special` is not a way to treat special tokens.
  """
  if section['special'] not in (TEXT, ENCODE):
    raise UsageError(f'tokenizer.special = {section["special"]!r}; '
                     f'{nearest(section["special"], (TEXT, ENCODE))}')
  return Options(section['bos'], section['eos'], section['special'], section['chat_template'])


class Mark(NamedTuple):
  """A token that begins or ends documents."""
  id: int
  name: str

  def __str__(self) -> str:
    return f'{self.name} ({self.id})'


class Framing(NamedTuple):
  """How a text becomes a document.

  Attributes:
    begin: put before the text; None if nothing is.
    end: put after the text; None if nothing is.
    special: 'text' if special tokens in the text are text, 'encode' if they are those tokens.
  """
  begin: Mark | None
  end: Mark | None
  special: str

  def __str__(self) -> str:
    """In words."""
    parts = [str(self.begin)] if self.begin else []
    parts += ['text', *([str(self.end)] if self.end else [])]
    special = 'are encoded' if self.special == ENCODE else 'are text'
    scored = '' if self.begin else '; without a begin mark, the first token is not scored'
    return f'a document is {" + ".join(parts)}; special tokens in text {special}{scored}'


class Special(NamedTuple):
  """The special tokens of a tokenizer.

  Attributes:
    bos, eos: the names of its bos_token and eos_token; None if it has none.
    all: the names of all special tokens.
  """
  bos: str | None
  eos: str | None
  all: Collection[str]


def special_tokens(files: Mapping[str, bytes], vocabulary: Mapping[str, int],
                   names: Collection[str], bos: str | None = None, eos: str | None = None
                   ) -> Special:
  """The special tokens of a tokenizer, as its files name them.

  Args:
    files: by name.
    vocabulary: the id of each token by name.
    names: of all special tokens.
    bos, eos: those of a sentencepiece model itself.
  """
  roles, model = named(files), read_json(files.get(CONFIG, b''))
  name_of = {i: name for name, i in vocabulary.items()}

  def find(role: str, own: str | None) -> str | None:
    name = roles.get(f'{role}_token')
    if name in vocabulary:
      return name
    given = model.get(f'{role}_token_id')
    given = given if isinstance(given, list) else [given]  # several for chat models
    return own or next((name_of[i] for i in given if isinstance(i, int) and i in name_of), None)

  return Special(find('bos', bos), find('eos', eos), names)


def named(files: Mapping[str, bytes]) -> dict[str, str]:
  """The names of special tokens by role, like 'eos_token'."""
  result = {}
  for file in reversed(NAMING):
    for role, token in read_json(files.get(file, b'')).items():
      name = token.get('content') if isinstance(token, dict) else token
      if role.endswith('_token') and isinstance(name, str) and name:
        result[role] = name
  return result


def decide(wanted: Options, files: Mapping[str, bytes], tokenizer: Mapping[str, Any],
           vocabulary: Mapping[str, int], special: Special, puts_bos: bool, path: str) -> Framing:
  """The framing of documents; see the top of this file.

  Args:
    wanted: what the config asks for.
    files: the tokenizer's files by name.
    tokenizer: the content of tokenizer.json, or {}.
    vocabulary: the id of each token by name.
    special: the tokenizer's special tokens.
    puts_bos: whether a bos is put before text if no file says so.
    path: of the tokenizer, for messages.

  Raises:
    UsageError: the options name a token that does not exist, or nothing says which one token ends
      documents.
  """
  before, after = _template(tokenizer)
  if before is None:
    adds = read_json(files.get(NAMING[0], b'')).get('add_bos_token')
    puts_bos = adds if isinstance(adds, bool) else puts_bos
    before = [special.bos] if puts_bos and special.bos else []
  if not after and special.eos:
    after = [_text_end(special.eos, special.all)]
  for field, names, role in (('bos', before, 'begins'), ('eos', after, 'ends')):
    if not getattr(wanted, field) and (len(names) > 1 or not (names or field == 'bos')):
      what = f'puts {" ".join(names)} around a text' if names else 'has no eos_token'
      raise UsageError(f'{path} {what}. Set tokenizer.{field} to the token that {role} documents, '
                       f"or to '{NONE}'.")
  return Framing(_mark('bos', wanted.bos, before, vocabulary, special.all, path),
                 _mark('eos', wanted.eos, after, vocabulary, special.all, path), wanted.special)


def _mark(field: str, wanted: str, automatic: Sequence[str], vocabulary: Mapping[str, int],
          names: Collection[str], path: str) -> Mark | None:
  if wanted == NONE or not (wanted or automatic):
    return None
  name = wanted or automatic[0]
  if name not in vocabulary:
    raise UsageError(f'tokenizer.{field} = {name!r} is not a token of {path}; '
                     f'{nearest(name, [*list(names)[:20], NONE])}')
  return Mark(vocabulary[name], name)


def _text_end(eos: str, names: Collection[str]) -> str:
  if eos not in _TURN_ENDS:
    return eos
  return next((name for name in _TEXT_ENDS if name in names), eos)


def components(tokenizer: Mapping[str, Any], step: str) -> Iterator[dict]:
  """The parts of a step of a tokenizer.json, like 'decoder': those of sequences one by one."""
  waiting = [tokenizer.get(step)]
  while waiting:
    part = waiting.pop(0)
    if isinstance(part, dict):
      inner = [each for value in part.values() if isinstance(value, list) for each in value]
      if part.get('type') == 'Sequence':
        waiting = inner + waiting
      else:
        yield part


def _template(tokenizer: Mapping[str, Any]) -> tuple[list[str] | None, list[str]]:
  """The tokens that the post-processor puts before a text (None if it is silent), and after."""
  for part in components(tokenizer, 'post_processor'):
    if part.get('type') == 'TemplateProcessing':
      before, after = [], []
      side = before
      for piece in part['single']:
        if 'Sequence' in piece:
          side = after
        else:
          side.append(piece['SpecialToken']['id'])
      return before, after
    if part.get('type') in ('RobertaProcessing', 'BertProcessing'):
      return [part['cls'][0]], [part['sep'][0]]
  return None, []


def marks(framing: Framing, ids: np.ndarray) -> tuple[list[int], list[int], list[list[int]]]:
  """What to put before and after the ids of a text; and the parts of these that are not scored.

  The first token of a document has nothing before it, and the end mark is no text: neither is
  scored. If special tokens are encoded, a text that brings its own marks does not get them twice.
  """
  begin, end, special = framing
  before, after, unscored = [begin.id] if begin else [], [end.id] if end else [], []
  if special == ENCODE:
    if before == ids[:1].tolist():
      before = []
    if after == ids[-1:].tolist() and len(ids) > 1:
      unscored.append(after)
      after = []
  if not before:
    unscored.append(ids[:1].tolist())
  return before, after, unscored


def read_json(content: bytes) -> dict:
  """The JSON object in a file, or {} if the file does not hold one."""
  try:
    found = inputs.parse_json(content)
  except ValueError:
    return {}
  return found if isinstance(found, dict) else {}
