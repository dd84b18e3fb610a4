"""Whether transformers generates from an export what the run's own logits say.

  python -m tests.benchmarks.generates FOLDER RUN_DIRECTORY

FOLDER is what `export` wrote of the run in RUN_DIRECTORY, whose last checkpoint is read. From each
of eight beginnings transformers continues greedily by 64 tokens; one forward pass of ours over all
of that must then have each of these tokens as the largest logit at the place before. (That is what
generating ourselves would give, for one pass.) Prints, of each beginning, how many tokens agree,
the largest difference of a logit, and the smallest lead of a largest logit over the next: where it
is below that difference, which comes first is not decided by the model.
"""

import os
import sys

os.environ['HF_HUB_OFFLINE'] = '1'  # before transformers is imported

import jax
import numpy as np
import torch
import transformers

from btx_jax import checkpoint, manifest, sharding
from btx_jax.convert import hugging_face
from btx_jax.model import llama
from btx_jax.model.config import Config

PROMPTS = (
    'def read_lines(path):\n    """Returns the lines of a file."""\n',
    'import os\n\nclass Cache:\n    def __init__(self, size):\n',
    'Solve 5*x + 3 = 18 for x.\n',
    'What is the sum of 127 and 396?\n',
    'The economy of Portugal is based on',
    'Population of Iceland, its climate and natural resources:',
    'The history of the printing press begins',
    'My fellow citizens,',
)
NEW = 64


def parameters(run: str, folder: str):
  """The model of a run, and its parameters rounded as an export has them."""
  told, exported = manifest.read(run), hugging_face.Folder(folder)
  model = Config(**told['spec']['model'])
  saved = checkpoint.Saved(os.path.join(run, 'checkpoints'), told['spec']['steps'])

  def read(key_path, like):
    path = sharding.path_of(key_path)
    values = np.asarray(saved.read(path, tuple(slice(0, n) for n in like.shape)))
    return values.astype(exported.dtypes[path]).astype(np.float32)

  return model, jax.tree.map_with_path(read, llama.shapes(model))


def generated(folder: str) -> tuple[list[list[int]], list[np.ndarray]]:
  """Of each beginning: its tokens and those that follow, and the logits of these [NEW, V]."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  rows, logits = [], []
  for prompt in PROMPTS:
    start = tokenizer(prompt, return_tensors='pt')
    with torch.no_grad():
      found = model.generate(
          **start, do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0,
          return_dict_in_generate=True, output_logits=True)
    rows.append(found.sequences[0].tolist())
    logits.append(torch.cat(found.logits).numpy())
    print(repr(tokenizer.decode(rows[-1])), flush=True)
  return rows, logits


def ours(model: Config, params, rows: list[list[int]]) -> list[np.ndarray]:
  """The logits of each row's last NEW tokens, as one forward pass gives them [NEW, V]."""
  length = max(map(len, rows))
  tokens = np.array([row + [0] * (length - len(row)) for row in rows], np.int32)
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
  real = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows], np.int32)

  @jax.jit
  def logits(params, tokens, real, positions):
    hidden, _ = llama.Llama(model).apply({'params': params}, tokens, real, positions)
    return hidden @ llama.output_head(params)

  with jax.set_mesh(sharding.make_mesh()):
    found = np.asarray(logits(params, tokens, real, positions))
  return [each[len(row) - NEW - 1:len(row) - 1] for each, row in zip(found, rows)]


def main():
  folder, run = sys.argv[1:]
  rows, theirs = generated(folder)
  model, params = parameters(run, folder)
  agree = 0
  print(f'{"agree":>8} {"logits differ by":>18} {"smallest lead":>14}')
  for row, a, b in zip(rows, ours(model, params, rows), theirs):
    same = a.argmax(-1) == np.array(row[-NEW:])
    first, second = np.sort(a, -1)[:, [-1, -2]].T
    print(f'{same.sum():5} / {NEW} {np.abs(a - b).max():15.1e} {(first - second).min():14.1e}')
    for at in np.flatnonzero(~same):
      print(f'  token {at}: {row[at - NEW]} there, {a[at].argmax()} here; its lead here is '
            f'{a[at].max() - a[at, row[at - NEW]]:.1e}')
    agree += int(same.sum())
  print(f'{agree} of {NEW * len(rows)} tokens are the same')
  sys.exit(agree < NEW * len(rows))


if __name__ == '__main__':
  main()
