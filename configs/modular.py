"""Experts that need no repair, beside the paper's: what averaging costs, and what routers can do.

A seed that learned all four domains of the demo's text is branched twice into an expert for each:
`ffn/...` train their feed-forward layers only, `whole/...` train everything. Nothing is averaged
when the first are mixed, because they left all that they share as it was in the seed; of the second
everything outside the feed-forward layers is an average. Both are mixed without any finetuning,
with routers that are random (`normal`) or set from text (`mean`, `ridge`), and with a finetune of
300 steps. `dense` trains the seed on for the FLOPs of the whole experts.

  python -m btx_jax.main --config=configs/modular.py
"""

from btx_jax import base
from btx_jax.configs import demo


def get_config():
  config = demo.get_config()
  lr = {'peak_lr': 1e-3}

  def experts(kind: str, **fields):
    return {f'{kind}/{domain}': base.run(
        base.checkpoint('seed'), {domain: 1}, steps=300, optimizer=lr, **fields)
            for domain in demo.BLEND}

  def mixtures(kind: str, names):
    routers = {router: base.from_text(router) for router in ('normal', 'mean', 'ridge')}
    return {
        **{f'{kind}/{router}': base.run(base.mix(*names, routers=how))
           for router, how in routers.items()},
        f'{kind}/finetuned': base.run(base.mix(*names), demo.BLEND, steps=300, optimizer=lr),
    }

  ffn = experts('ffn', train={'freeze': base.FREEZE_ALL_BUT_EXPERTS})
  whole = experts('whole')
  config.runs = {
      'seed': base.run(base.random(), demo.BLEND, steps=1500, optimizer={'peak_lr': 3e-3}),
      **ffn, **mixtures('mixed', ffn),
      **whole, **mixtures('btx', whole),
      'dense': base.run(base.checkpoint('seed'), demo.BLEND, match_flops_of=(*whole,),
                        optimizer=lr),
  }
  return config
