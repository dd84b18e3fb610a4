"""Every way of routing, balancing, mixing and freezing, side by side on the demo's experts.

Each variant is the demo's mixture with one change, finetuned for 120 steps. `dense` and `upcycled`
spend the FLOPs of everything that leads to `btx`. `merge/...` are Branch-Train-Merge: ensembles of
the unmixed experts, without any finetuning. Expect all but `router_only` to be better than the
seed, two experts per token to be better than one, and `blend` to be the worst way of mixing.
docs/variants.md has the table. About an hour on two CPU cores.

  python -m btx_jax.main --config=configs/variants.py
"""

from btx_jax import base
from btx_jax.configs import demo

STEPS = 120


def get_config():
  config = demo.get_config()
  experts = tuple(f'expert/{domain}' for domain in demo.SPECIALISTS)
  sources = ('seed', *experts)

  def variant(init=None, **fields):
    return base.run(init=init or base.mix(*sources), domains=demo.BLEND, steps=STEPS,
                    **{'optimizer': {'peak_lr': 2e-3}, **fields})

  rival = dict(domains=demo.BLEND, match_flops_of=(*experts, 'btx'), optimizer={'peak_lr': 2e-3})
  config.runs = {name: run for name, run in config.runs.items() if name != 'btx'} | {
      'btx': variant(),
      'dense': base.run(init=base.checkpoint('seed'), **rival),
      'upcycled': base.run(init=base.mix(*['seed'] * 4), **rival),
      # Routers
      'softmax_top_2': variant(model={'router': 'softmax_top_k'}),
      'softmax_top_1': variant(model={'router': 'softmax_top_k', 'top_k': 1}),
      'top_3': variant(model={'top_k': 3}),
      'switch': variant(model={'router': 'switch'}),
      'soft': variant(model={'router': 'soft'}),
      'sample_top_1': variant(model={'router': 'sample_top_1'}, train={'balance_loss': 0.0}),
      'hash': variant(model={'router': 'hash'}),
      # Balance
      'unbalanced': variant(train={'balance_loss': 0.0}),
      'z_loss': variant(train={'router_z': 1e-3}),
      'biased': variant(train={'balance_loss': 0.0, 'balance_bias': 1e-3}),
      # Freezing
      'experts_frozen': variant(train={'freeze': base.FREEZE_EXPERTS}),
      'router_only': variant(train={'freeze': base.FREEZE_ALL_BUT_ROUTER}),
      'router_first': variant(init=base.checkpoint('router_only')),
      # Mixing
      'without_seed': variant(init=base.mix(*experts)),
      'seed_unaveraged': variant(init=base.mix(*sources, averaged=experts)),
      'split': variant(init=base.mix(*sources, arrangement='split', chunks=2), model={'top_k': 4}),
      'plain_split': variant(init=base.mix(*sources, arrangement='plain_split', chunks=2),
                             model={'top_k': 4}),
      'blend': variant(init=base.mix(*sources, arrangement='blend')),
      # Unmixed
      'merge/tfidf_1': base.run(base.ensemble(*sources, selector=base.tfidf(top=1))),
      'merge/tfidf_2': base.run(base.ensemble(*sources, selector=base.tfidf(top=2))),
      'merge/tfidf_all': base.run(base.ensemble(*sources, selector=base.tfidf(top=0))),
      'merge/posterior': base.run(base.ensemble(*sources, selector=base.posterior())),
  }
  return config
