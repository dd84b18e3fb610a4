"""The paper's run (sections 4.1 and appendix A): Llama 2 7B, experts for math, code and Wikipedia.

Three copies of the seed are trained on 201, 210 and 42 billion tokens, mixed with the seed, and
finetuned on 80 billion with two experts per token. Rows have 4096 tokens, steps 4M tokens. AdamW
has weight decay 0.1, 100 steps of warmup to 1e-4 and a cosine to a tenth of that. Domains are the
groups of the paper's table 7; point them at your own text, with about as many tokens or fewer.
Where that table's shares do not add up to 100, they are used as they are, as weights.

  python -m btx_jax.main --config=configs/llama2_7b.py preflight --topology=v5p:4x4x4
  python -m btx_jax.main --config=configs/llama2_7b.py:/models/Llama-2-7b-hf --run=expert/math

Compiled for v5p:4x4x4 (v5p-128). With --config.model.remat=full also compiled for v5e:16x16, and
for h100:8 (adding --config.train.microbatches=128).
docs/preflight.md has the figures.
"""

from collections.abc import Mapping

from btx_jax import base

TEXT = '/data'  # a directory for each domain below it
STEP = 4096 * 1024  # tokens
MATH = {'algebraic_stack': 13.57, 'open_web_math': 54.27, 'arxiv': 27.14, 'github': 2.99,
        'common_crawl': 5.01}
CODE = {'code': 82.18, 'code_text': 9.90, 'natural_language': 6.93}
WIKIPEDIA = {'wikipedia': 90.91, 'common_crawl': 9.09}
PRETRAINING = {'natural_language': 50, 'common_crawl': 50}  # stands in for Llama 2's


def share(of: float, domains: Mapping[str, float]) -> dict[str, float]:
  """Weights that add up to `of`."""
  return {name: of * weight / sum(domains.values()) for name, weight in domains.items()}


def blend(*shares: dict[str, float]) -> dict[str, float]:
  """The sum of the weights of each domain."""
  return {name: sum(s.get(name, 0) for s in shares) for name in {k: 0 for s in shares for k in s}}


def get_config(folder: str = '/models/Llama-2-7b-hf'):
  config = base.get_config()
  config.tokenizer.path = folder
  config.data.seq_len = 4096
  config.domains = {name: base.domain(f'{TEXT}/{name}')
                    for name in (MATH | CODE | WIKIPEDIA)}
  # As in the folder, which preflight does not need.
  config.model.update(vocab_size=32_000, dim=4096, ffn_dim=11_008, num_layers=32, num_heads=32,
                      num_kv_heads=32, norm_eps=1e-5)
  # What preflight found best on v5p:4x4x4: four rows per chip at a time, and the state sharded over
  # all chips, so that projections need not be recomputed.
  config.model.update(dtype='bfloat16', remat='projections')
  config.mesh.update(data=1, fsdp=-1)
  config.optimizer.update(peak_lr=1e-4, warmup=0.0, final_lr=0.1, weight_decay=0.1)
  config.train.update(batch_size=1024, microbatches=4)
  config.checkpoint_every = 500
  steps = {'math': 48_000, 'code': 50_000, 'wikipedia': 10_000}
  text = {'math': MATH, 'code': CODE, 'wikipedia': WIKIPEDIA}
  experts = tuple(f'expert/{name}' for name in steps)
  warmup = lambda steps: {'warmup': 100 / steps}
  finetune = round(80e9 / STEP)
  config.runs = {
      'seed': base.run(base.hugging_face(folder)),
      **{f'expert/{name}': base.run(base.checkpoint('seed'), text[name], steps=n,
                                    optimizer=warmup(n)) for name, n in steps.items()},
      'btx': base.run(
          base.mix('seed', *experts),
          blend(share(30.16, MATH), share(40.31, CODE), share(10.30, WIKIPEDIA),
                share(19.23, PRETRAINING)),
          steps=finetune, optimizer=warmup(finetune)),
  }
  return config
