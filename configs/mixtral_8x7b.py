"""A mixture of the sizes of Mixtral 8x7B: Mistral 7B, branched for seven kinds of text.

It is for figures that can stand beside those that others publish for Mixtral 8x7B
(docs/preflight.md): 46.7 B parameters, of which a token uses 12.9 B, in rows of 4096 tokens. Text,
optimizer and tokens per step are those of configs/llama2_7b.py. Each expert is trained on 42
billion tokens of one domain, and the mixture is finetuned on 80 billion of all. Nobody has trained
it.

  python -m btx_jax.main --config=configs/mixtral_8x7b.py preflight --topology=h100:64 --run=btx \
      --config.train.batch_size=256 --config.train.microbatches=1 --config.model.remat=full

  python -m btx_jax.main --config=configs/mixtral_8x7b.py preflight --topology=v5p:4x4x8 --run=btx

Compiled for h100:64 and v5p:4x4x8 so.
"""

from btx_jax import base
from btx_jax.configs import llama2_7b

DOMAINS = ('open_web_math', 'arxiv', 'algebraic_stack', 'code', 'github', 'wikipedia',
           'common_crawl')


def get_config(folder: str = '/models/Mistral-7B-v0.1'):
  config = llama2_7b.get_config(folder)
  config.model.update(ffn_dim=14_336, num_kv_heads=8)
  config.domains = {name: config.domains[name] for name in DOMAINS}
  expert, mixture = config.runs['expert/wikipedia'], config.runs['btx']
  experts = tuple(f'expert/{name}' for name in DOMAINS)
  config.runs = {
      'seed': config.runs['seed'],
      **{f'expert/{name}': base.run(base.checkpoint('seed'), {name: 1}, steps=expert.steps,
                                    optimizer={'warmup': expert.optimizer.warmup})
         for name in DOMAINS},
      'btx': base.run(base.mix('seed', *experts), dict.fromkeys(DOMAINS, 1), steps=mixture.steps,
                      optimizer={'warmup': mixture.optimizer.warmup}),
  }
  return config
