"""A mixture that answers questions: SmolLM2-135M-Instruct and two kinds of conversations.

One expert learns to answer questions about countries, the other to solve arithmetic problems, both
in as few words as possible. They are mixed with the seed and finetuned on both. Only the answers
are trained on and scored. Such short training teaches the form of the answers more than their
content. It takes half an hour of CPU time and 16 GB; docs/chat.md has the results.

  python -m btx_jax.data.demo_chats runs/chats
  python -m btx_jax.main --config=configs/chat.py:/models/SmolLM2-135M-Instruct
"""

from btx_jax import base
from btx_jax.configs import smollm2_135m

DOMAINS = ('countries', 'arithmetic')
CHATS = 'runs/chats'  # where btx_jax.data.demo_chats wrote them


def get_config(folder: str = '/models/SmolLM2-135M-Instruct'):
  config = smollm2_135m.get_config(folder)  # its model, rows and batches
  config.domains = {
      name: base.domain(f'{CHATS}/{name}.jsonl', held_out=f'{CHATS}/{name}.test.jsonl',
                        format='chat') for name in DOMAINS}
  short = {'optimizer': {'peak_lr': 2e-4, 'warmup': 0.2}}
  config.runs = {
      'seed': base.run(base.hugging_face(folder)),
      **{f'expert/{domain}': base.run(base.checkpoint('seed'), {domain: 1}, steps=32, **short)
         for domain in DOMAINS},
      'btx': base.run(base.mix('seed', *(f'expert/{domain}' for domain in DOMAINS)),
                      dict.fromkeys(DOMAINS, 1), steps=16, **short),
  }
  return config
