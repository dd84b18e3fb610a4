"""A whole study in miniature: text of four kinds, and a config like that of the demo."""

import json
import random

from btx_jax import base

WORDS = {
    'code': ['def f(x):', '    return x', 'for i in y:', '\tprint(i)', 'import z', 'x = [1, 2]'],
    'math': ['1 + 2 = 3', '4 * 5 = 20', '9 - 8 = 1', '7 + 7 = 14', '6 / 2 = 3', '3 * 3 = 9'],
    'prose': ['the king said', 'and so he went', 'to the old house', 'by the sea', 'at night,'],
}


def write_text(folder, documents: int = 60, all_words=WORDS):
  """One JSONL file a domain; the same text every time."""
  for domain, words in all_words.items():
    rng = random.Random(domain)
    with open(folder / f'{domain}.jsonl', 'w', encoding='utf-8') as file:
      for _ in range(documents):
        text = '\n'.join(rng.choice(words) for _ in range(rng.randint(3, 12)))
        file.write(json.dumps({'text': f'{text} {rng.randint(0, 999)}'}) + '\n')


def get_config(folder):
  """Seed, two experts and their mixture, a few steps each."""
  config = base.get_config()
  config.domains = {name: base.domain(str(folder / f'{name}.jsonl')) for name in WORDS}
  config.tokenizer.vocab_size = 330
  config.data.update(seq_len=15, held_out=0.1)
  config.model.update(dim=16, ffn_dim=24, num_layers=2, num_heads=2, num_kv_heads=2,
                      dispatch_factor=2.0)
  config.optimizer.peak_lr = 1e-2
  config.train.batch_size = 16
  config.mesh.update(fsdp=2, expert=2, tensor=2)
  config.evaluation.update(tokens=200, batch_size=8, every=4)
  config.log_every = 1
  config.checkpoint_every = 2
  config.runs = {
      'seed': base.run(base.random(), {'prose': 2, 'code': 1, 'math': 1}, steps=6),
      'expert/code': base.run(base.checkpoint('seed'), {'code': 1}, steps=5),
      'expert/math': base.run(base.checkpoint('seed'), {'math': 1}, steps=5),
      'btx': base.run(base.mix('seed', 'expert/code', 'expert/math', 'expert/code'),
                      {'prose': 2, 'code': 1, 'math': 1}, steps=6),
  }
  return config


def modular_config(folder):
  """A seed, and two experts that trained only their feed-forward layers, without a mixture."""
  config = get_config(folder)
  config.mesh.update(fsdp=1, expert=1, tensor=1)
  config.evaluation.update(every=0, tokens=400)
  config.data.seq_len = 31
  config.checkpoint_every = 100
  config.runs = {
      'seed': base.run(base.random(), {'prose': 2, 'code': 1, 'math': 1}, steps=60),
      **{name: modular_expert(name) for name in ('code', 'math')}}
  return config


def modular_expert(domain: str, seed: str = 'seed', steps: int = 60):
  """A run that trains the feed-forward layers of a seed on one domain."""
  return base.run(base.checkpoint(seed), {domain: 1}, steps=steps,
                  train={'freeze': ('^(?!.*/ffn/)',)})
