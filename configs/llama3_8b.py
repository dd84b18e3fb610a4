"""Llama 3 8B branched for math, code and Wikipedia: the paper's settings with a newer seed.

Text, tokens per step and optimizer are those of configs/llama2_7b.py. Rows have 8192 tokens, like
those the seed was trained on.

  python -m btx_jax.main --config=configs/llama3_8b.py preflight --topology=v5p:4x4x4

Compiled for v5p:4x4x4; docs/preflight.md has the figures.
"""

from btx_jax.configs import llama2_7b


def get_config(folder: str = '/models/Meta-Llama-3-8B'):
  config = llama2_7b.get_config(folder)
  config.data.seq_len = 8192
  config.model.update(vocab_size=128_256, ffn_dim=14_336, num_kv_heads=8, rope_theta=500_000.0)
  config.train.update(batch_size=512)
  return config
