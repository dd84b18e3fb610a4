"""The process that makes our calls for `python -m tests.benchmarks`: steps, matmuls, tokenizing.

  python -m tests.benchmarks.our_side SIZES

SIZES is JSON, the fields of sizes.Sizes.
"""

import functools
import json
import pathlib
import shutil
import sys
import tempfile

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers

from btx_jax.data import demo, tokenizer, tokens
from btx_jax.data.domains import Domain
from btx_jax.devices.mesh import make_mesh
from btx_jax.model import products
from btx_jax.model.config import Config, train_flops_per_token
from tests.benchmarks import sides, turns
from tests.benchmarks.sizes import Sizes

TOKENIZER = sides.CHECKOUT / 'tests' / 'fixtures' / 'tokenizer'


def model(sizes: Sizes, kind: str, dtype: str) -> Config:
  """Our config of the model: 'dense', 'mixture' or 'equal', dense with a mixture's active FLOPs."""
  ffn_dim = sizes.ffn_dim * (sizes.top_k if kind == 'equal' else 1)
  return Config(
      vocab_size=sizes.vocab_size, dim=sizes.dim, ffn_dim=ffn_dim, num_layers=sizes.num_layers,
      num_heads=sizes.num_heads, num_kv_heads=sizes.num_heads, dtype=dtype,
      num_experts=sizes.num_experts if kind == 'mixture' else 0)


def step_flops(sizes: Sizes, kind: str) -> float:
  """Model FLOPs of one step."""
  return sizes.tokens * train_flops_per_token(model(sizes, kind, 'float32'), sizes.length)


def make_step(sizes: Sizes, kind: str, dtype: str):
  return turns.train_step(model(sizes, kind, dtype),
                          turns.batch(sizes.vocab_size, sizes.rows, sizes.length))


def make_matmul(sizes: Sizes, dtype: str):
  m, k, n = sizes.matmul
  a, b = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
  matmul = jax.jit(jnp.matmul)
  return lambda: matmul(a, b).block_until_ready()


def make_products(sizes: Sizes, dtype: str):
  """The matmuls of a dense step alone."""
  forward, of_input, of_weights = map(jax.jit, (
      products.product, products.product_transposed, products.outer))
  arrays = [(count, *(jnp.ones(shape, dtype) for shape in (
      (sizes.tokens, d), (sizes.tokens, f), (d, f)))) for d, f, count in sizes.products]

  def call():
    for count, x, y, w in arrays:
      for _ in range(count):
        jax.block_until_ready((forward(x, w), of_input(y, w), of_weights(x, y)))

  return call


def make_tokenizing(sizes: Sizes, folder: pathlib.Path, ours: bool):
  """Source code of the standard library, from files of JSON to files of tokens; or encoding alone.

  The latter has the text in memory already, in lists as long as ours, and drops what it encodes.
  """
  documents, characters = [], 0
  for document in demo.stdlib():
    documents.append(document)
    characters += len(document)
    if characters >= sizes.characters:
      break
  if not ours:
    alone = tokenizers.Tokenizer.from_file(str(TOKENIZER / 'tokenizer.json'))
    lists = [documents[i:i + 256] for i in range(0, len(documents), 256)]
    return lambda: [alone.encode_batch(texts, add_special_tokens=False) for texts in lists]
  path = folder / 'text.jsonl'
  path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in documents))
  found, domain = tokenizer.load(str(TOKENIZER)), Domain('text', paths=(str(path),))

  def prepare():
    shutil.rmtree(folder / 'tokens', ignore_errors=True)
    tokens.prepare(str(folder / 'tokens'), domain, found, 0.02)

  return prepare


def main():
  sizes = Sizes.read(sys.argv[1])
  versions = {'jax': jax.__version__, 'flax': flax.__version__, 'optax': optax.__version__,
              'numpy': np.__version__, 'tokenizers': tokenizers.__version__}
  with tempfile.TemporaryDirectory() as folder, jax.set_mesh(make_mesh()):
    makers = {f'{kind} {dtype}': functools.partial(make_step, sizes, kind, dtype)
              for kind in ('dense', 'mixture', 'equal') for dtype in sizes.dtypes}
    makers |= {f'{name} {dtype}': functools.partial(make, sizes, dtype)
               for name, make in (('matmul', make_matmul), ('products', make_products))
               for dtype in sizes.dtypes}
    makers |= {name: functools.partial(make_tokenizing, sizes, pathlib.Path(folder), ours)
               for name, ours in (('tokenizing', True), ('tokenizer alone', False))}
    sides.serve(versions, makers)


if __name__ == '__main__':
  main()
