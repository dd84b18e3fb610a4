"""Experts that train only their feed-forward layers, beside whole experts.

A seed that learned all four domains of the demo's text is branched twice into an expert for each:
`ffn/...` train their feed-forward layers only, `whole/...` train everything. `mixed` and `btx` are
the mixtures of the two kinds, without finetuning. The table compares what an expert loses on its
own domain when everything else is frozen, and saves in FLOPs, with what mixing loses: nothing in
`mixed` is averaged, because its experts left all that they share as it was in the seed; all that
`btx` shares is an average. The routers of both are random.

  python -m btx_jax.main --config=configs/modular.py
"""

from btx_jax import base
from btx_jax.configs import demo


def get_config():
  config = demo.get_config()

  def experts(kind: str, **fields):
    return {f'{kind}/{domain}': base.run(
        base.checkpoint('seed'), {domain: 1}, steps=300, optimizer={'peak_lr': 1e-3}, **fields)
            for domain in demo.BLEND}

  ffn = experts('ffn', train={'freeze': base.FREEZE_ALL_BUT_EXPERTS})
  whole = experts('whole')
  config.runs = {
      'seed': base.run(base.random(), demo.BLEND, steps=1500, optimizer={'peak_lr': 3e-3}),
      **ffn, 'mixed': base.run(base.mix(*ffn)),
      **whole, 'btx': base.run(base.mix(*whole)),
  }
  return config
