"""Small tokenizers in the forms that people have them in, and random text for them."""

import functools
import io
import json
import pathlib
import random

import sentencepiece

from btx_jax.data import framing, tokenizer

MARK = '\u2581'
SPECIAL = ('<unk>', '<s>', '</s>', '<|im_start|>', '<|im_end|>', '<|endoftext|>')
WORDS = ('the', 'red', 'house', 'of', 'Éva', 'def f(x):\n\treturn x', '日本', '  two  spaces', '\n')
BYTES = [f'<0x{byte:02X}>' for byte in range(256)]


@functools.cache
def sentencepiece_model(**options) -> bytes:
  """A byte-pair model with byte fallback that puts a space before a text, as Llama 2's does."""
  rng = random.Random(0)
  texts = [' '.join(rng.choices(WORDS, k=8)) for _ in range(300)]
  proto = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(**{
      'sentence_iterator': iter(texts), 'model_writer': proto, 'vocab_size': 345,
      'model_type': 'bpe', 'byte_fallback': True, 'normalization_rule_name': 'identity',
      'remove_extra_whitespaces': False, 'character_coverage': 1.0, 'minloglevel': 2,
      'allow_whitespace_only_pieces': True, 'hard_vocab_limit': False, **options})
  return proto.getvalue()


def _added(names, first, special=True):
  flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  return [{'id': first + i, 'content': name, **flags, 'special': special}
          for i, name in enumerate(names)]


@functools.cache
def _space_mark_model() -> dict:
  """The byte-pair model above as tokenizer.json has it: merges in the order of the scores."""
  model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
  ids = {model.id_to_piece(i): i for i in range(model.vocab_size())}
  merges = []
  for piece, i in ids.items():
    if not (model.is_control(i) or model.is_byte(i) or model.is_unknown(i)):
      merges += [(model.get_score(i), [piece[:at], piece[at:]]) for at in range(1, len(piece))
                 if piece[:at] in ids and piece[at:] in ids]
  merges = [pair for _, pair in sorted(merges, key=lambda merge: -merge[0])]
  return {'type': 'BPE', 'byte_fallback': True, 'fuse_unk': True, 'unk_token': '<unk>',
          'vocab': ids, 'merges': merges}


def space_marks(scheme: str) -> dict:
  """A tokenizer.json of the Llama 2 family.

  Args:
    scheme: 'first', 'always' or 'never', Metaspace's; 'prepend', as older versions of transformers
      saved it; or 'replace', as Gemma's, without a space before the text.
  """
  model = _space_mark_model()
  normalizers = {'prepend': [{'type': 'Prepend', 'prepend': MARK}], 'replace': []}
  result = {'normalizer': None, 'pre_tokenizer': None}
  if scheme in normalizers:
    result['normalizer'] = {'type': 'Sequence', 'normalizers': [*normalizers[scheme], {
        'type': 'Replace', 'pattern': {'String': ' '}, 'content': MARK}]}
  else:
    result['pre_tokenizer'] = {'type': 'Metaspace', 'replacement': MARK, 'split': False,
                               'prepend_scheme': scheme}
  size = len(model['vocab'])
  decoders = [{'type': 'Replace', 'pattern': {'String': MARK}, 'content': ' '},
              {'type': 'ByteFallback'}, {'type': 'Fuse'}]
  if scheme not in ('never', 'replace'):
    decoders.append({'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0})
  return _file(model, _added(SPECIAL[:3], 0) + _added(SPECIAL[3:], size), **result,
               decoder={'type': 'Sequence', 'decoders': decoders})


def byte_level(add_prefix_space: bool = False, **parts) -> dict:
  """A tokenizer.json with a token per byte and a few merges, as GPT-2, Llama 3 and Qwen have."""
  others = [byte for byte in range(256) if not (
      0x21 <= byte < 0x7f or 0xa1 <= byte < 0xad or byte >= 0xae)]
  alphabet = {byte: chr(byte) for byte in range(256)} | {
      byte: chr(256 + i) for i, byte in enumerate(others)}
  spaced = {'type': 'ByteLevel', 'add_prefix_space': add_prefix_space, 'trim_offsets': True,
            'use_regex': True}
  merges = [['t', 'h'], ['th', 'e'], [alphabet[32], 'the'], [alphabet[10], alphabet[10]]]
  vocab = {name: i for i, name in enumerate(
      [*alphabet.values(), *(a + b for a, b in merges)])}
  return _file({'type': 'BPE', 'vocab': vocab, 'merges': merges},
               _added(SPECIAL[1:], len(vocab)), **{
                   'normalizer': None, 'pre_tokenizer': spaced, 'decoder': spaced, **parts})


def letters(**parts) -> dict:
  """A tokenizer.json that has lower-case ASCII letters, space and nothing else."""
  vocab = {name: i for i, name in enumerate(['<unk>', *'abcdefghijklmnopqrstuvwxyz '])}
  return _file({'type': 'BPE', 'vocab': vocab, 'merges': [], 'unk_token': '<unk>'},
               _added(['</s>'], len(vocab)), **{'pre_tokenizer': None, 'normalizer': None, **parts})


def _file(model, added, **parts) -> dict:
  return {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added,
          'post_processor': None, 'decoder': None, **parts, 'model': model}


def template(before=(), after=()) -> dict:
  """A post-processor that puts special tokens around a text."""
  tokens = [{'SpecialToken': {'id': name, 'type_id': 0}} for name in before]
  tokens += [{'Sequence': {'id': 'A', 'type_id': 0}}]
  tokens += [{'SpecialToken': {'id': name, 'type_id': 0}} for name in after]
  return {'type': 'TemplateProcessing', 'single': tokens, 'pair': [
      *tokens, {'Sequence': {'id': 'B', 'type_id': 1}}], 'special_tokens': {
          name: {'id': name, 'ids': [1], 'tokens': [name]} for name in (*before, *after)}}


def with_token(found: dict, name: str, special: bool = True) -> dict:
  """A tokenizer.json with one more added token."""
  size = 1 + max([*found['model']['vocab'].values(), *(t['id'] for t in found['added_tokens'])])
  return {**found, 'added_tokens': [*found['added_tokens'], *_added([name], size, special)]}


def write(folder: pathlib.Path, main, **beside) -> pathlib.Path:
  """Writes a tokenizer to a folder: a tokenizer.json, or the bytes of a tokenizer.model.

  Args:
    folder: is made.
    main: content of tokenizer.json or tokenizer.model.
    beside: content of further files, by name without .json.
  """
  folder.mkdir(parents=True, exist_ok=True)
  if isinstance(main, bytes):
    (folder / 'tokenizer.model').write_bytes(main)
  else:
    (folder / 'tokenizer.json').write_text(json.dumps(main))
  for name, content in beside.items():
    (folder / f'{name}.json').write_text(json.dumps(content))
  return folder


def load(folder: pathlib.Path, main, bos='', eos='', special='text', **beside):
  """Writes a tokenizer (see write) and loads it; its eos_token is </s>, unless `beside` says."""
  beside = beside or {'tokenizer_config': {'eos_token': '</s>'}}
  write(folder, main, **beside)
  return tokenizer.load(str(folder), framing.Options(bos, eos, special))


# Every kind that must bring any text back, by name.
LOSSLESS = {
    'sentencepiece': lambda: sentencepiece_model(add_dummy_prefix=False),
    'sentencepiece, space before': sentencepiece_model,
    **{f'Metaspace {scheme}': functools.partial(space_marks, scheme)
       for scheme in ('first', 'always', 'never')},
    'Prepend and Replace': lambda: space_marks('prepend'),
    'Replace': lambda: space_marks('replace'),
    'byte-level': byte_level,
    'byte-level, space before': lambda: byte_level(add_prefix_space=True),
}


def random_text(rng: random.Random) -> str:
  """Characters of all planes, and many of those that tokenizers treat in their own way."""
  def character() -> str:
    match rng.randrange(8):
      case 0 | 1:
        return ' '
      case 2:
        return rng.choice(f'{MARK}\u0120\u010a\ue000\uf8ff\ufeff\u200d\u00a0\u3000\u0301\ufffd')
      case 3:
        return chr(rng.randrange(0x20))
      case 4 | 5:
        return rng.choice(['the', 'house', 'e', 'Á', '</s>', '<|im_start|>', '<0x0A>', MARK * 2])
    while 0xD800 <= (code := rng.randrange(0x110000) if rng.random() < 0.5 else rng.randrange(
        0x3000)) < 0xE000:
      pass
    return chr(code)

  return ''.join(character() for _ in range(rng.randrange(1, 25)))
