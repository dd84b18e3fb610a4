"""Llama 2 13B branched for math, code and Wikipedia; otherwise like configs/llama2_7b.py.

  python -m btx_jax.main --config=configs/llama2_13b.py preflight --topology=v5p:4x4x4

Compiled for v5p:4x4x4; docs/preflight.md has the figures.
"""

from btx_jax.configs import llama2_7b


def get_config(folder: str = '/models/Llama-2-13b-hf'):
  config = llama2_7b.get_config(folder)
  config.model.update(dim=5120, ffn_dim=13_824, num_layers=40, num_heads=40, num_kv_heads=40)
  config.train.microbatches = 8
  return config
