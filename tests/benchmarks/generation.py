"""Greedy text against transformers', and the speed of both: tokens per second, side by side.

  python -m tests.benchmarks.generation FOLDER [FOLDER ...]

Each folder holds a Llama or Mixtral with its tokenizer. It needs torch and transformers; both
programs use float32 and as many threads as there are cores, and a row of its own has bfloat16 here
against float32 there. Decoding one row reads every weight that it uses once, so its speed is also
given as a share of the memory's: the speed at which torch reads a large matrix, to multiply it by a
vector, in the same run.
"""

import dataclasses
import os
import sys
import time

import numpy as np
import torch
import transformers

import btx_jax
from btx_jax.model.config import num_params

PROMPTS = [
    'The capital of France is', 'def fibonacci(n):', 'Once upon a time', 'Water boils at',
    'import numpy as np\n\ndef mean(values):\n', 'The three states of matter are', '2 + 2 =',
    'Dear Sir or Madam,', 'In 1492,', 'A prime number is a number that', 'SELECT name FROM',
    'The Pacific Ocean covers about', 'She opened the door and', 'Photosynthesis is',
    'The following is a list of all the countries that border Switzerland:', 'Yes']
NEW, SHORT, ROUNDS = 64, 8, 3


class Ours:
  """The texts of btx_jax."""

  def __init__(self, folder: str, config, params):
    self.config = config
    self._write = btx_jax.Generator(config, params, folder)

  def __call__(self, prompts, new: int) -> list[list[int]]:
    return [list(texts[0].ids) for texts in self._write(prompts, new)]


class Theirs:
  """The texts of transformers; rows are padded on the left, as it asks for."""

  def __init__(self, folder: str):
    self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # The balancing loss, which is for training, fails on rows that are padded.
    self._model.config.output_router_logits = False

  def __call__(self, prompts, new: int) -> list[list[int]]:
    longest, end = max(map(len, prompts)), self.tokenizer.eos_token_id
    pad = [longest - len(prompt) for prompt in prompts]
    found = self._model.generate(
        torch.tensor([[0] * n + prompt for n, prompt in zip(pad, prompts)]),
        attention_mask=torch.tensor([[0] * n + [1] * (longest - n) for n in pad]),
        max_new_tokens=new, do_sample=False, pad_token_id=end)
    rows = found[:, longest:].tolist()
    return [row[:row.index(end) + 1] if end in row else row for row in rows]


def bandwidth() -> float:
  """Bytes per second of a matrix that is read to multiply it by a vector."""
  matrix, vector = torch.ones(2**13, 2**14), torch.ones(2**14)
  return matrix.nbytes / min(_seconds(torch.mv, matrix, vector) for _ in range(9))


def per_token(call, prompts) -> float:
  """Seconds of one step: of long texts without what short ones take."""
  return (_seconds(call, prompts, NEW) - _seconds(call, prompts, SHORT)) / (NEW - SHORT)


def _seconds(call, *arguments) -> float:
  began = time.perf_counter()
  call(*arguments)
  return time.perf_counter() - began


def compare(folder: str, speed: float):
  """Prints how many texts are the same, and both speeds; `speed` is the memory's."""
  config, params = btx_jax.load(folder)
  ours, theirs = Ours(folder, config, params), Theirs(folder)
  half = Ours(folder, dataclasses.replace(config, dtype='bfloat16'), params)
  del params
  prompts = [theirs.tokenizer(prompt).input_ids for prompt in PROMPTS]
  together, alone = ours(prompts, NEW), [ours([prompt], NEW)[0] for prompt in prompts]
  expected = [theirs([prompt], NEW)[0] for prompt in prompts]
  print(f'{folder}\n  greedy texts of {NEW} tokens for {len(prompts)} prompts: '
        f'{_same(alone, expected)} as transformers, {_same(together, alone)} in one batch as alone')
  looked_up = 0 if config.tied_head else config.vocab_size * config.dim
  read = num_params(config, active=True) - looked_up
  for rows in (prompts[2:3], prompts):
    for call in (ours, half):
      call(rows, SHORT)  # compiles
    times = np.array([[per_token(call, rows) for call in (ours, half, theirs)]
                      for _ in range(ROUNDS)])
    them = len(rows) / times[:, 2].min()
    for i, (dtype, size) in enumerate((('float32', 4), ('bfloat16', 2))):
      us, ratio = len(rows) / times[:, i].min(), np.median(times[:, 2] / times[:, i])
      share = f', {size * read * us / speed:.0%} of the memory' if len(rows) == 1 else ''
      print(f'  batch {len(rows)}, {dtype}: {us:.1f} tokens/s, transformers {them:.1f}: '
            f'{ratio:.2f} times{share}', flush=True)


def _same(found, expected) -> int:
  return sum(a == b for a, b in zip(found, expected))


def main(folders: list[str]):
  torch.set_num_threads(os.cpu_count() or 1)
  speed = bandwidth()
  print(f'memory is read at {speed / 1e9:.1f} GB/s')
  for folder in folders:
    compare(folder, speed)


if __name__ == '__main__':
  main(sys.argv[1:] or sys.exit(__doc__))
