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

from btx_jax.convert import hugging_face
from btx_jax.devices import sharding
from btx_jax.devices.mesh import make_mesh
from btx_jax.model import llama
from btx_jax.model.config import Config
from btx_jax.study import manifest
from btx_jax.training import slices

PROMPTS = (
    'def read_lines(path):\n    """Returns the lines of a file',
    'import os\n\nclass Cache:\n    def __init__(self, size',
    'Solve 5*x + 3 = 18 for x.',
    'What is the sum of 127 and 396?',
    'The economy of Portugal is based mostly on tourism',
    'The population of Iceland, its climate and its rivers',
    'The history of the printing press begins in the city of',
    'My fellow citizens, I come before this house to',
)
GIVEN, NEW = 8, 64  # tokens of each that are given, so that no row is padded, and that are new


def parameters(run: str, folder: str):
  """The model of a run, and its parameters rounded as an export has them."""
  told, exported = manifest.read(run), hugging_face.Folder(folder)
  model = Config(**told['spec']['model'])
  saved = slices.Saved(os.path.join(run, 'checkpoints'), told['spec']['steps'],
                           told['identity'])

  def read(key_path, like):
    path = sharding.path_of(key_path)
    values = np.asarray(saved.read(path, tuple(slice(0, n) for n in like.shape)))
    return values.astype(exported.dtypes[path]).astype(np.float32)

  return model, jax.tree.map_with_path(read, llama.shapes(model))


def generated(folder: str) -> tuple[np.ndarray, np.ndarray]:
  """Tokens [B, GIVEN + NEW], and the logits of the new ones [B, NEW, V]."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  start = torch.tensor([tokenizer(prompt)['input_ids'][:GIVEN] for prompt in PROMPTS])
  with torch.no_grad():
    found = model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=NEW,
        eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True)
  for row in found.sequences:
    print(repr(tokenizer.decode(row)))
  return found.sequences.numpy(), torch.stack(found.logits, 1).numpy()


def ours(model: Config, params, tokens: np.ndarray) -> np.ndarray:
  """The logits of the new tokens, as one forward pass gives them [B, NEW, V]."""
  positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)

  @jax.jit
  def logits(params, tokens, positions):
    hidden, _ = llama.Llama(model).apply(
        {'params': params}, tokens, jax.numpy.ones_like(tokens), positions)
    return hidden[:, GIVEN - 1:-1] @ llama.output_head(params)

  with jax.set_mesh(make_mesh()):
    return np.asarray(logits(params, tokens.astype(np.int32), positions))


def main():
  folder, run = sys.argv[1:]
  tokens, theirs = generated(folder)
  found = ours(*parameters(run, folder), tokens)
  same = found.argmax(-1) == tokens[:, GIVEN:]
  second, first = np.moveaxis(np.sort(found, -1)[..., -2:], -1, 0)
  apart, lead = abs(found - theirs).max(-1), first - second
  print(f'{"agree":>7} {"logits differ by":>18} {"smallest lead":>14}')
  for row in range(len(tokens)):
    print(f'{same[row].sum():2} / {NEW} {apart[row].max():18.1e} {lead[row].min():14.1e}')
  for row, at in np.argwhere(~same):
    print(f'text {row}, new token {at}: the lead is {lead[row, at]:.1e}')
  print(f'{same.sum()} of {same.size} tokens are the same')
  sys.exit(not same.all())


if __name__ == '__main__':
  main()
