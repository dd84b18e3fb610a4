"""Is it worth it? Every form of modular training beside every rival, at equal FLOPs.

A seed that has learned mostly prose gets three new domains: code, math and knowledge. Every row
spends the same FLOPs on it, as many as three experts of EXPERT steps, in its own way. All runs have
one schedule: a constant rate, then a linear decay over the last fifth. So runs of several lengths
share a trunk, and only their decay is trained for each. docs/study.md has the rows and what follows
from them.

  python -m btx_jax.main --config=configs/study.py --config.seeds=0

  dense/...   one dense model: on all domains (`blend`), on the new ones (`new`), or on these and
              10 % of the seed's text (`replay`); with four workers that meet every 50 steps
              (`diloco`, and `diloco_domains`, where each reads one domain).
  sparse/...  one mixture from the start: four copies of the seed's feed-forward layers (`copies`),
              with half of their units redrawn (`redrawn`), or random experts (`random`).
  merge/...   Branch-Train-Merge: the seed and the three experts kept whole, by posterior or with a
              learned selector.
  btx/...     the paper: experts that trained everything, averaged and mixed (`unfinetuned`); with a
              quarter of the compute in the joint finetune (`finetuned`); with routers from text
              in place of that (`ridge`).
  ffn/...     experts that trained their feed-forward layers only, so that nothing is averaged: with
              routers from text (`ridge`), and the same with a quarter of the compute in a joint
              finetune (`finetuned`).

Other forms, each of one seed:

  :rates      each family at three learning rates and half the length. RATES has the best.
  :split      5, 10, 25 and 50 % of the compute in the joint finetune.
  :crossover  seeds 0.25 and 4 times as long, and experts 0.5 and 4 times as long.
  :later      a domain that arrives later, one that is withdrawn, and an expert that is upgraded.
"""

from btx_jax import base
from btx_jax.configs import demo

SEED, EXPERT = 1000, 200  # steps
NEW = ('code', 'math', 'knowledge')
OLD = 'prose'
OF_SEED = {**demo.BLEND, OLD: 7}
REPLAY = {**{domain: 3 for domain in NEW}, OLD: 1}
# Chosen by :rates, with a seed that is in no table.
RATES = {'dense': 1e-3, 'diloco': 1e-3, 'sparse': 1e-3, 'expert': 1e-3, 'ffn': 1e-3,
         'finetune': 1e-3}
CANDIDATES = ('3e-4', '1e-3', '3e-3')
SPLITS = (5, 10, 25, 50)  # percent of the compute in the joint finetune
_FREEZE = {'freeze': base.FREEZE_ALL_BUT_EXPERTS}
_FORMS = {'': (0, 1, 2), 'rates': (100,), 'split': (0,), 'crossover': (0,), 'later': (0,)}


def get_config(form: str = ''):
  if form not in _FORMS:
    raise ValueError(f"configs/study.py has no form {form!r}; it has the plain one, "
                     f"{', '.join(f':{name}' for name in _FORMS if name)}.")
  config = demo.get_config()
  config.data.held_out = 0.05
  config.evaluation.tasks = ()
  config.optimizer.schedule = 'wsd'
  config.checkpoint_every = 500
  config.checks.expert_gain = 0.0
  config.rows = 'docs/study/rows'
  config.seeds = _FORMS[form]
  make = {'': main, 'rates': rates, 'split': split, 'crossover': crossover, 'later': later}
  config.runs = {**seeds(), **make[form]()}
  return config


def seeds(longer: bool = False):
  """The seed model; and with `longer`, those of a quarter and of four times as many steps."""
  at = {'schedule': 'constant', 'peak_lr': 3e-3}
  runs = {'trunk/seed': base.run(base.random(), OF_SEED, steps=SEED * 4 // 5, optimizer=at),
          'seed': _decayed('trunk/seed', OF_SEED, SEED, 3e-3)}
  if longer:
    runs['seed/quarter'] = _decayed('trunk/seed', OF_SEED, SEED // 4, 3e-3)
    runs['trunk/seed/4'] = base.run(base.checkpoint('trunk/seed', state=True), OF_SEED,
                                    steps=SEED * 3 * 4 // 5, optimizer=at)
    runs['seed/4'] = _decayed('trunk/seed/4', OF_SEED, SEED * 4, 3e-3, before=SEED * 4 // 5)
  return runs


def _decayed(trunk: str, domains, steps: int, rate: float, before: int = 0, **fields):
  """The run of this many steps whose first four fifths are those of the trunk.

  Args:
    before: steps of the runs that the trunk continues.
  """
  return base.run(
      base.checkpoint(trunk, step=steps * 4 // 5 - before, state=True), domains,
      steps=steps - steps * 4 // 5, optimizer={'peak_lr': rate, 'decay': 1.0}, **fields)


def main(seed: str = 'seed', length: float = 1.0):
  """The rows of the table, from a seed model, with experts `length` times as long."""
  steps = round(EXPERT * length)
  dense = _dense(seed, steps)
  whole, most = _experts(seed, steps), _experts(seed, steps * 3 // 4, 'expert75')
  ffn, most_ffn = _ffn_experts(seed), _ffn_experts(seed, 'ffn75', 'expert75')
  return {
      **dense, **_sparse(seed), **whole,
      **_merged(seed, whole), 'btx/unfinetuned': base.run(base.mix(seed, *_ends(whole))),
      'btx/ridge': base.run(base.mix(seed, *_ends(whole), routers=_ridge(seed))),
      **most, 'btx/finetuned': _finetuned(base.mix(seed, *_ends(most))),
      **ffn, 'ffn/unfinetuned': base.run(base.mix(seed, *ffn)),
      'ffn/ridge': base.run(base.mix(seed, *ffn, routers=_ridge(seed))),
      **most_ffn, 'ffn/finetuned': _finetuned(
          base.mix(seed, *most_ffn, routers=_ridge(seed))),
  }


def _dense(seed: str, steps: int):
  """One dense model of as many FLOPs as all experts. What the others match is `dense/blend`."""
  run = lambda domains, family='dense', **train: base.run(
      base.checkpoint(seed), domains, len(NEW) * steps, optimizer=_rate(family), train=train)
  meets = {'workers': 4, 'sync_every': 50}
  return {
      'dense/blend': run(demo.BLEND), 'dense/new': run(dict.fromkeys(NEW, 1)),
      'dense/replay': run(REPLAY), 'dense/diloco': run(demo.BLEND, 'diloco', **meets),
      'dense/diloco_domains': run(demo.BLEND, 'diloco', **meets, worker_rows='domain')}


def _sparse(seed: str):
  """Mixtures from the start: copies of the seed, redrawn copies, random experts."""
  copy = lambda redraw: base.run(base.checkpoint(seed, redraw=redraw))
  redrawn = {f'redrawn/{i}': copy(0.5) for i in range(4)}
  random = {f'random/{i}': copy(1.0) for i in range(4)}
  run = lambda names: base.run(base.mix(*names), demo.BLEND, match_total_flops_of='dense/blend',
                               optimizer=_rate('sparse'))
  return {**redrawn, **random, 'sparse/copies': run([seed] * 4), 'sparse/redrawn': run(redrawn),
          'sparse/random': run(random)}


def _experts(seed: str, steps: int, kind: str = 'expert'):
  """An expert for each new domain. Trunks of the length of EXPERT serve all that are shorter."""
  at = {'schedule': 'constant', **_rate('expert')}
  trunks = {f'trunk/{domain}': base.run(base.checkpoint(seed), {domain: 1},
                                        steps=EXPERT * 4 // 5, optimizer=at) for domain in NEW}
  return trunks | {f'{kind}/{domain}': _decayed(
      f'trunk/{domain}', {domain: 1}, steps, RATES['expert']) for domain in NEW}


def _ffn_experts(seed: str, kind: str = 'ffn', like: str = 'expert'):
  """Experts that train their feed-forward layers only, for the FLOPs of the whole ones."""
  return {f'{kind}/{domain}': base.run(
      base.checkpoint(seed), {domain: 1}, match_total_flops_of=f'{like}/{domain}', train=_FREEZE,
      optimizer=_rate('ffn')) for domain in NEW}


def _finetuned(mix, reference: str = 'dense/blend'):
  """A mixture finetuned on all domains, for what is left of the compute."""
  return base.run(mix, demo.BLEND, match_total_flops_of=reference, optimizer=_rate('finetune'))


def _merged(seed: str, experts):
  """Branch-Train-Merge: the seed and its experts kept whole."""
  names = (seed, *_ends(experts))
  return {
      'merge/posterior': base.run(base.ensemble(*names, selector=base.posterior())),
      'merge/learned': base.run(base.ensemble(*names, layers=1, selector=_ridge(seed)))}


def _ends(experts) -> list[str]:
  return [name for name in experts if not name.startswith('trunk/')]


def _ridge(seed: str):
  return base.from_text('ridge', labels=((seed, OLD),))


def _rate(family: str) -> dict[str, float]:
  return {'peak_lr': RATES[family]}


def rates():
  """Each family at each of CANDIDATES, for half the FLOPs of the table's rows."""
  steps, runs, branch = EXPERT // 2, {}, base.checkpoint('seed')
  mixed = {f'mixed/{domain}': base.run(branch, {domain: 1}, steps * 3 // 4,
                                       optimizer={'peak_lr': 1e-3}) for domain in NEW}
  for rate in CANDIDATES:
    def run(init, domains, steps=0, at=float(rate), **fields):
      return base.run(init, domains, steps, optimizer={'peak_lr': at}, **fields)
    runs |= {
        f'dense/{rate}': run(branch, demo.BLEND, len(NEW) * steps),
        f'diloco/{rate}': run(branch, demo.BLEND, len(NEW) * steps,
                              train={'workers': 4, 'sync_every': 50}),
        f'sparse/{rate}': run(base.mix(*['seed'] * 4), demo.BLEND,
                              match_total_flops_of=f'dense/{rate}'),
        f'finetune/{rate}': run(base.mix('seed', *mixed), demo.BLEND,
                                match_total_flops_of=f'dense/{rate}')}
    for domain in NEW:
      runs[f'expert/{rate}/{domain}'] = run(branch, {domain: 1}, steps)
      runs[f'ffn/{rate}/{domain}'] = run(
          branch, {domain: 1}, match_total_flops_of=f'expert/{rate}/{domain}', train=_FREEZE)
  return mixed | runs


def split():
  """The paper's form with other shares of the compute in its joint finetune."""
  runs = {'dense/blend': _dense('seed', EXPERT)['dense/blend']}
  for percent in SPLITS:
    experts = _experts('seed', EXPERT * (100 - percent) // 100, f'expert{100 - percent}')
    name = 'btx/finetuned' if percent == 25 else f'split/{percent}'
    runs |= {**experts, name: _finetuned(base.mix('seed', *_ends(experts)))}
  return runs


def later():
  """What cannot be pooled: a domain comes later, one is withdrawn, an expert is upgraded."""
  *first, new = NEW
  before = {domain: 1 for domain in demo.BLEND if domain != new}
  runs = {**_experts('seed', EXPERT), **_ffn_experts('seed')}
  third = base.run(base.checkpoint('seed'), before, len(first) * EXPERT, optimizer=_rate('dense'))
  run = lambda name, domains, like: base.run(
      base.checkpoint(name), domains, match_flops_of=like, optimizer=_rate('dense'))
  arrived = (f'trunk/{new}', f'expert/{new}')
  upgraded = {**_longer('trunk/code', 'code', 2), 'ffn2/code': _ffn_experts(
      'seed', 'ffn2', 'expert2')['ffn2/code']}
  more = ('trunk/code', 'expert/code')
  return runs | {
      # The fourth domain arrives; its rivals have as many FLOPs as its expert.
      'three/dense': third,
      'three/ffn': base.run(base.mix('seed', *(f'ffn/{each}' for each in first),
                                     routers=_ridge('seed'))),
      'arrived/ffn': base.run(base.extend('three/ffn', f'ffn/{new}')),
      'arrived/dense_new': run('three/dense', {new: 1}, arrived),
      'arrived/dense_replay': run('three/dense', demo.BLEND, arrived),
      # It is withdrawn again. The dense rival is `three/dense`: training without it from the start.
      'four/ffn': base.run(base.mix('seed', *(f'ffn/{each}' for each in NEW),
                                    routers=_ridge('seed'))),
      'withdrawn/ffn': base.run(base.drop('four/ffn', f'ffn/{new}')),
      # The expert for code is replaced by one that was trained twice as long.
      **upgraded,
      'upgraded/ffn': base.run(base.replace('four/ffn', (('ffn/code', 'ffn2/code'),))),
      'dense/blend': _dense('seed', EXPERT)['dense/blend'],
      'upgraded/dense_code': run('dense/blend', {'code': 1}, more),
      'upgraded/dense_replay': run('dense/blend', demo.BLEND, more),
  }


def _longer(trunk: str, domain: str, times: int):
  """An expert `times` as long: its trunk continues that of the ordinary one."""
  at = {'schedule': 'constant', **_rate('expert')}
  before = EXPERT * 4 // 5
  return {
      f'{trunk}/{times}': base.run(base.checkpoint(trunk, state=True), {domain: 1},
                                   steps=(times - 1) * before, optimizer=at),
      f'expert{times}/{domain}': _decayed(f'{trunk}/{times}', {domain: 1}, times * EXPERT,
                                          RATES['expert'], before=before)}


def crossover():
  """Four rows for seeds and experts of other lengths; those of the middle are in the table."""
  half, four = EXPERT // 2, 4 * EXPERT
  return seeds(longer=True) | {
      **_cell('seed_quarter', 'seed/quarter', EXPERT),
      **_cell('seed_4', 'seed/4', EXPERT),
      **_cell('expert_half', 'seed', half),
      **_cell('expert_4', 'seed', four)}


def _cell(prefix: str, seed: str, steps: int):
  """Dense, merged, averaged and feed-forward experts, of a seed model and experts of this length.
  """
  train = lambda domains, steps, family: base.run(
      base.checkpoint(seed), domains, steps, optimizer=_rate(family))
  whole = {f'{prefix}/expert/{domain}': train({domain: 1}, steps, 'expert') for domain in NEW}
  most = {f'{prefix}/expert75/{domain}': train({domain: 1}, steps * 3 // 4, 'expert')
          for domain in NEW}
  ffn = {f'{prefix}/ffn/{domain}': base.run(
      base.checkpoint(seed), {domain: 1}, match_total_flops_of=f'{prefix}/expert/{domain}',
      train=_FREEZE, optimizer=_rate('ffn')) for domain in NEW}
  return {
      f'{prefix}/dense': train(demo.BLEND, len(NEW) * steps, 'dense'), **whole,
      f'{prefix}/merge': base.run(base.ensemble(seed, *whole, layers=1, selector=_ridge(seed))),
      **most, f'{prefix}/btx': _finetuned(base.mix(seed, *most), f'{prefix}/dense'),
      **ffn, f'{prefix}/ffn': base.run(base.mix(seed, *ffn, routers=_ridge(seed)))}
