"""The whole method on real text, on a laptop CPU, in a few minutes.

A seed that learned mostly prose is branched into three experts (code, math, knowledge). These and
the seed itself are mixed into four experts per layer, and finetuned on all four domains. Expect
each expert to be far better than the seed on its own domain and worse elsewhere, and the mixture to
be as good as each specialist on its domain and nearly as good as the seed on prose. `routed` keeps
the same four models whole, and chooses one of them for each token.

  python -m btx_jax.main --config=configs/demo.py

:full adds the rivals that spend the same compute differently: `dense`, the seed trained further,
and `upcycled`, four copies of the seed's feed-forward layers instead of four experts. It also
measures both mixtures without each of their experts in turn, which takes about a minute.

  python -m btx_jax.main --config=configs/demo.py:full
"""

from btx_jax import base

SPECIALISTS = ('code', 'math', 'knowledge')
BLEND = {'code': 1, 'math': 1, 'knowledge': 1, 'prose': 1}


def get_config(form: str = ''):
  if form not in ('', 'full'):
    raise ValueError(f"configs/demo.py has no form {form!r}; it has ':full' and the plain one.")
  config = base.get_config()
  config.domains = {
      'code': base.domain(source='stdlib'),
      'math': base.domain(source='arithmetic'),
      'knowledge': base.domain(source='factbook'),
      'prose': base.domain(source='sotu'),
  }
  config.tokenizer.vocab_size = 4096
  config.tokenizer.sample_chars = 500_000
  config.data.seq_len = 256
  config.model.update(dim=128, ffn_dim=352, num_layers=4, num_heads=4, num_kv_heads=4,
                      tied_head=True, remat='full')
  config.train.batch_size = 8
  config.evaluation.update(
      tokens=32_768, batch_size=16, tasks=('arithmetic_choice', 'factbook_choice', 'code_choice'))
  config.checkpoint_every = 100
  config.checks.expert_gain = 0.2

  experts = tuple(f'expert/{domain}' for domain in SPECIALISTS)
  config.runs = {
      'seed': base.run(
          init=base.random(), domains={**BLEND, 'prose': 7}, steps=500,
          optimizer={'peak_lr': 3e-3}),
      **{f'expert/{domain}': base.run(
          init=base.checkpoint('seed'), domains={domain: 1}, steps=130,
          optimizer={'peak_lr': 2e-3}) for domain in SPECIALISTS},
      'btx': base.run(
          init=base.mix('seed', *experts), domains=BLEND, steps=400,
          optimizer={'peak_lr': 2e-3}),
      'routed': base.run(
          init=base.ensemble('seed', *experts, layers=1,
                             selector=base.from_text('ridge', labels=(('seed', 'prose'),)))),
  }
  if form == 'full':
    config.evaluation.mask_experts = True
    rival = dict(domains=BLEND, match_flops_of=(*experts, 'btx'), optimizer={'peak_lr': 2e-3})
    config.runs['dense'] = base.run(init=base.checkpoint('seed'), **rival)
    config.runs['upcycled'] = base.run(init=base.mix(*['seed'] * 4), **rival)
  return config
