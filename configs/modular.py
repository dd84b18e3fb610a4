"""Forms of modular training beside each other: what averaging costs, and what routing can do.

A seed that learned all four domains of the demo's text is branched twice into an expert for each:
`ffn/...` train their feed-forward layers only, `whole/...` train everything. Four ways to use them:

  mixed/...   the feed-forward experts as one mixture. Nothing is averaged, because the experts left
              all that they share as it was in the seed. Routers are random (`normal`) or set from
              text (`mean`, `ridge`), or finetuned with the mixture for 300 steps (`finetuned`).
  btx/...     the whole experts as one mixture, as in the paper: everything outside the feed-forward
              layers is an average.
  routed/...  the whole experts left whole. A linear map of the first layers of the seed reads the
              text so far and chooses one expert for each token; for `routed/forget`, mostly the
              last tokens of it. `posterior` is Branch-Train-Merge: it runs all experts on every
              token.
  dense/...   the rival: the seed trained on for the FLOPs of the whole experts, at three learning
              rates. The experts have only one, so the comparison favours the rival.

  python -m btx_jax.main --config=configs/modular.py

:arrival adds a mixture of three feed-forward experts, which then gets the fourth, `knowledge`. Its
rivals continue a dense model of the three domains with as many FLOPs as the fourth expert took: on
the new text alone (`arrival/dense_new`), and on all four domains (`arrival/dense_replay`).
"""

from btx_jax import base
from btx_jax.configs import demo


def get_config(form: str = ''):
  if form not in ('', 'arrival'):
    raise ValueError(
        f"configs/modular.py has no form {form!r}; it has ':arrival' and the plain one.")
  config = demo.get_config()
  config.checkpoint_every = 500
  config.checks.expert_gain = 0.0  # the seed has learned every domain
  lr = {'peak_lr': 1e-3}

  def experts(kind: str, **fields):
    return {f'{kind}/{domain}': base.run(
        base.checkpoint('seed'), {domain: 1}, steps=300, optimizer=lr, **fields)
            for domain in demo.BLEND}

  def mixtures(kind: str, names, kinds):
    return {
        **{f'{kind}/{router}': base.run(base.mix(*names, routers=base.from_text(router)))
           for router in kinds},
        f'{kind}/finetuned': base.run(base.mix(*names), demo.BLEND, steps=300, optimizer=lr),
    }

  ffn = experts('ffn', train={'freeze': base.FREEZE_ALL_BUT_EXPERTS})
  whole = experts('whole')
  config.runs = {
      'seed': base.run(base.random(), demo.BLEND, steps=1500, optimizer={'peak_lr': 3e-3}),
      **ffn, **mixtures('mixed', ffn, ('normal', 'mean', 'ridge')),
      **whole, **mixtures('btx', whole, ('normal', 'ridge')),
      **{f'routed/{layers}_layers': base.run(base.ensemble(*whole, reader='seed', layers=layers))
         for layers in (1, 2, 4)},
      'routed/forget': base.run(
          base.ensemble(*whole, reader='seed', layers=1, forget=8, hysteresis=0.5)),
      'routed/posterior': base.run(base.ensemble(*whole, selector=base.posterior())),
      **{f'dense/{rate}': base.run(base.checkpoint('seed'), demo.BLEND, match_flops_of=(*whole,),
                                   optimizer={'peak_lr': float(rate)})
         for rate in ('3e-4', '1e-3', '3e-3')},
  }
  if form == 'arrival':
    *old, new = (f'ffn/{domain}' for domain in ('code', 'math', 'prose', 'knowledge'))
    three = {domain: 1 for domain in demo.BLEND if domain != 'knowledge'}
    config.runs.update({
        'arrival/three': base.run(base.mix(*old, routers=base.from_text('ridge'))),
        'arrival/extended': base.run(base.extend('arrival/three', new)),
        'arrival/dense_three': base.run(
            base.checkpoint('seed'), three, match_flops_of=(*old,), optimizer=lr),
        'arrival/dense_new': base.run(base.checkpoint('arrival/dense_three'), {'knowledge': 1},
                                      match_flops_of=(new,), optimizer=lr),
        'arrival/dense_replay': base.run(base.checkpoint('arrival/dense_three'), demo.BLEND,
                                         match_flops_of=(new,), optimizer=lr),
    })
  return config
