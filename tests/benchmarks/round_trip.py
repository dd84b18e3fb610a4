"""Share of random texts that each kind of tokenizer brings back, byte for byte.

  python -m tests.benchmarks.round_trip [--texts=20000] [FOLDER_OR_FILE ...]

The kinds are those of tests/make_tokenizers.py, with special tokens as text and encoded, and the
given tokenizers. The texts have characters of all planes, spaces, U+2581, controls and names of
special tokens. Beside it: what the package's own decoder brings back of the same texts, encoded
without what is made up for here, and how many texts have the ids that sentencepiece gives.
"""

import argparse
import pathlib
import random
import tempfile

import sentencepiece

from btx_jax.data import framing, tokenizer
from tests import make_tokenizers as make


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('paths', nargs='*')
  parser.add_argument('--texts', type=int, default=20_000)
  asked = parser.parse_args()
  rng = random.Random(0)
  texts = [make.random_text(rng) for _ in range(asked.texts)]
  print(f'{len(texts):,} texts, {sum(map(len, texts)):,} characters')
  print(f'{"tokenizer":34} {"special":>8} {"come back":>10} {"library":>9} '
        f'{"ids of sentencepiece":>21}')
  with tempfile.TemporaryDirectory() as temporary:
    folders = []
    for name, make_one in make.LOSSLESS.items():
      folder = make.write(pathlib.Path(temporary) / name, make_one(),
                          tokenizer_config={'eos_token': '</s>'})
      folders.append((name, str(folder)))
    folders += [(path, path) for path in asked.paths]
    expected = tokenizer.load(str(pathlib.Path(temporary) / 'sentencepiece, space before')
                              ).encode(texts)
    for name, path in folders:
      is_json = tokenizer.file_name(path) == 'tokenizer.json'
      for special in ('text', 'encode') if is_json else ('text',):
        found = tokenizer.load(path, framing.Options(special=special, eos='none'))
        ids = found.encode(texts)
        back = sum(found.spell(each) == text.encode() for text, each in zip(texts, ids))
        same = sum(a == b for a, b in zip(ids, expected))
        library = sum(map(str.__eq__, texts, _library(path, found, texts, special)))
        print(f'{name[-34:]:34} {special:>8} {back:>10,} {library:>9,} {same:>21,}', flush=True)


def _library(path: str, found, texts: list[str], special: str) -> list[str]:
  """The texts, encoded and decoded by the library alone."""
  if isinstance(found, tokenizer.Sentencepiece):
    model = sentencepiece.SentencePieceProcessor(model_proto=found.files['tokenizer.model'])
    return model.decode(model.encode(texts))
  import tokenizers
  model = tokenizers.Tokenizer.from_str(found.files['tokenizer.json'].decode())
  model.encode_special_tokens = special == framing.TEXT
  ids = [each.ids for each in model.encode_batch(texts, add_special_tokens=False)]
  return model.decode_batch(ids, skip_special_tokens=special == framing.TEXT)


if __name__ == '__main__':
  main()
