"""Greedy text against transformers', and the speed of both: tokens per second, side by side.

  python -m tests.benchmarks.generation FOLDER [FOLDER ...]

Each folder holds a Llama or Mixtral with its tokenizer. It needs torch and transformers; both
programs use float32 and as many threads as there are cores. Decoding one row reads every weight
that it uses once, so its speed is also given as a share of the memory's, which is that of a copy of
a large array in the same run.
"""

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

  def __init__(self, folder: str):
    self.config, params = btx_jax.load(folder)
    self._write = btx_jax.Generator(self.config, params, folder)

  def __call__(self, prompts, new: int) -> list[list[int]]:
    return [list(texts[0].ids) for texts in self._write(prompts, new)]


class Theirs:
  """The texts of transformers; rows are padded on the left, as it asks for."""

  def __init__(self, folder: str):
    self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

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
  """Bytes per second that a copy of a large array reads and writes."""
  array, to = torch.ones(2**27), torch.zeros(2**27)
  return 2 * array.nbytes / min(_seconds(to.copy_, array) for _ in range(9))


def per_token(call, prompts) -> float:
  """Seconds of one step: of long texts without what short ones take."""
  return (_seconds(call, prompts, NEW) - _seconds(call, prompts, SHORT)) / (NEW - SHORT)


def _seconds(call, *arguments) -> float:
  began = time.perf_counter()
  call(*arguments)
  return time.perf_counter() - began


def compare(folder: str, speed: float):
  """Prints how many texts are the same, and both speeds; `speed` is the memory's."""
  ours, theirs = Ours(folder), Theirs(folder)
  prompts = [theirs.tokenizer(prompt).input_ids for prompt in PROMPTS]
  together, alone = ours(prompts, NEW), [ours([prompt], NEW)[0] for prompt in prompts]
  expected = [theirs([prompt], NEW)[0] for prompt in prompts]
  print(f'{folder}\n  greedy texts of {NEW} tokens for {len(prompts)} prompts: '
        f'{_same(alone, expected)} as transformers, {_same(together, alone)} in one batch as alone')
  cfg = ours.config
  looked_up = 0 if cfg.tied_head else cfg.vocab_size * cfg.dim
  read = 4 * (num_params(cfg, active=True) - looked_up)
  for rows in (prompts[2:3], prompts):
    times = np.array([[per_token(call, rows) for call in (ours, theirs)] for _ in range(ROUNDS)])
    (us, them), ratio = len(rows) / times.min(0), np.median(times[:, 1] / times[:, 0])
    share = f', {read * us / speed:.0%} of a copy' if len(rows) == 1 else ''
    print(f'  batch {len(rows)}: {us:.1f} tokens/s, transformers {them:.1f}: '
          f'{ratio:.2f} times{share}', flush=True)


def _same(found, expected) -> int:
  return sum(a == b for a, b in zip(found, expected))


def main(folders: list[str]):
  torch.set_num_threads(os.cpu_count() or 1)
  speed = bandwidth()
  print(f'a copy in memory: {speed / 1e9:.1f} GB/s')
  for folder in folders:
    compare(folder, speed)


if __name__ == '__main__':
  main(sys.argv[1:] or sys.exit(__doc__))
