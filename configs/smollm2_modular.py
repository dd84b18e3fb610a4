"""A pretrained model with experts that need no repair: SmolLM2-135M on the demo's text.

Three experts train only their feed-forward layers, briefly, on code, math and facts. They are mixed
without any finetuning: once with routers that are random, once with routers set from text. `export`
writes a Mixtral that transformers loads. As configs/smollm2_135m.py, it shows the path rather than
the method.

  python -m btx_jax.main --config=configs/smollm2_modular.py:/models/SmolLM2-135M
  python -m btx_jax.main --config=configs/smollm2_modular.py:/models/SmolLM2-135M \
      --run=mixed/ridge export --to=/models/mixed
"""

from btx_jax import base
from btx_jax.configs import demo, smollm2_135m


def get_config(folder: str = '/models/SmolLM2-135M'):
  config = smollm2_135m.get_config(folder)
  experts = {f'ffn/{domain}': base.run(
      base.checkpoint('seed'), {domain: 1}, steps=16, optimizer={'peak_lr': 4e-4, 'warmup': 0.2},
      train={'freeze': base.FREEZE_ALL_BUT_EXPERTS}) for domain in demo.SPECIALISTS}
  config.runs = {
      'seed': config.runs['seed'],
      **experts,
      'mixed/normal': base.run(base.mix(*experts)),
      'mixed/ridge': base.run(base.mix(*experts, routers=base.from_text('ridge', rows=16))),
  }
  return config
