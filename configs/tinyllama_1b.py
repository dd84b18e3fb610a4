"""TinyLlama 1.1B branched for math, code and Wikipedia: one GPU node or a small slice is enough.

Like configs/llama2_7b.py, with rows of 2048 tokens and a tenth of the paper's tokens for each run.

  python -m btx_jax.main --config=configs/tinyllama_1b.py preflight --topology=v5e:4x4

Compiled for v5e:4x4; docs/preflight.md has the figures.
"""

from btx_jax.configs import llama2_7b


def get_config(folder: str = '/models/TinyLlama_v1.1'):
  config = llama2_7b.get_config(folder)
  config.data.seq_len = 2048
  config.model.update(dim=2048, ffn_dim=5632, num_layers=22, num_kv_heads=4)
  config.train.update(batch_size=512, microbatches=8)
  for run in config.runs.values():
    if run.steps:
      run.steps = round(run.steps * llama2_7b.STEP / (512 * 2048) / 10)
      run.optimizer.warmup = 100 / run.steps
  return config
