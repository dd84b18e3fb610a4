"""Is it worth it? Every form of modular training beside every rival, at equal FLOPs.

A seed that has learned mostly prose gets three new domains: code, math and knowledge. Every row
spends the same FLOPs on it, as many as three experts of EXPERT steps, in its own way. All runs have
one schedule: a constant rate, then a linear decay over the last fifth. So runs of several lengths
can share a trunk, and only their decay is trained for each. docs/study.md has the rows and what
follows from them.

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

  :rates      each family at three learning rates and half the length. RATES has the best: of
              experts that are averaged, for the finetuned mixture; of others, on their own domains.
  :split      5, 10, 25 and 50 % of the compute in the joint finetune.
  :crossover  seeds 0.25 and 4 times as long, and experts 0.5 and 4 times as long.
  :later      a domain that arrives later, one that is withdrawn, and an expert that is upgraded.
  :routing    `btx/finetuned` with other routers, and without load balancing: the mixtures of the
              paper's figures 3 to 6, which the report draws side by side.
"""

from collections.abc import Mapping
import dataclasses

from btx_jax import base
from btx_jax.configs import demo

SEED, EXPERT = 1000, 200  # steps
NEW = ('code', 'math', 'knowledge')
OLD = 'prose'
OF_SEED = {**demo.BLEND, OLD: 7}
# Chosen by :rates, with a seed that is in no table.
RATES = {'dense': 1e-3, 'diloco': 1e-3, 'sparse': 1e-3, 'expert': 3e-3, 'averaged': 1e-3,
         'ffn': 3e-3, 'finetune': 3e-4}
CANDIDATES = ('3e-4', '1e-3', '3e-3')
# DiLoCo's outer optimizer as in its paper, and two forms of local SGD: the plain mean, at two
# intervals. All three are tried by :rates, which favours this rival.
MEETINGS = {
    'diloco': {'sync_every': 50},
    'diloco_mean': {'sync_every': 50, 'outer_rate': 1.0, 'outer_momentum': 0.0},
    'diloco_often': {'sync_every': 10, 'outer_rate': 1.0, 'outer_momentum': 0.0}}
DILOCO = MEETINGS['diloco_mean']
SPLITS = (5, 10, 25, 50)  # percent of the compute in the joint finetune
_FREEZE = {'freeze': base.FREEZE_ALL_BUT_EXPERTS}


@dataclasses.dataclass(frozen=True)
class Setting:
  """The text, the length and the learning rates of the rows.

  Attributes:
    new: the domains that get an expert, at least two.
    old: the domain of the seed's own text. '' if there is none: then the seed is no expert where
      text sets routers or a selector, and the rows `dense/new` and `dense/replay` are left out.
    expert: steps of an expert.
    rates: the learning rate of each family in RATES.
  """
  new: tuple[str, ...] = NEW
  old: str = OLD
  expert: int = EXPERT
  rates: Mapping[str, float] = dataclasses.field(default_factory=lambda: RATES)

  @property
  def blend(self) -> dict[str, int]:
    """All domains, with equal weights."""
    return dict.fromkeys((*self.new, *([self.old] if self.old else [])), 1)

  @property
  def copies(self) -> int:
    """The experts of a mixture of the seed and all experts."""
    return len(self.new) + 1


LAPTOP = Setting()
_FORMS = {'': (0, 1, 2), 'rates': (100,), 'split': (0,), 'crossover': (0,), 'later': (0,),
          'routing': (0,)}


def get_config(form: str = ''):
  if form not in _FORMS:
    raise ValueError(f"configs/study.py has no form {form!r}; it has the plain one, "
                     f"{', '.join(f':{name}' for name in _FORMS if name)}.")
  config = demo.get_config()
  config.data.held_out = 0.05
  config.evaluation.update(tasks=(), oracle=form != 'rates')
  config.optimizer.schedule = 'wsd'
  config.checkpoint_every = 500
  config.checks.expert_gain = 0.0
  config.rows = 'docs/study/rows'
  config.seeds = _FORMS[form]
  make = {'': main, 'rates': rates, 'split': split, 'crossover': crossover, 'later': later,
          'routing': routing}
  config.runs = {**seeds(), **make[form]()}
  return config


def seeds(longer: bool = False):
  """The seed model; and with `longer`, those of a quarter and of four times as many steps."""
  at = {'schedule': 'constant', 'peak_lr': 3e-3}
  runs = {'trunk/seed': base.run(base.random(), OF_SEED, steps=SEED * 4 // 5, optimizer=at),
          'seed': _decayed('trunk/seed', OF_SEED, SEED, 3e-3)}
  if longer:
    runs['seed/quarter'] = base.run(  # the trunk does not keep its step
        base.random(), OF_SEED, steps=SEED // 4, optimizer={'peak_lr': 3e-3})
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


def main(seed: str = 'seed', setting: Setting = LAPTOP):
  """The rows of the table, from a seed model."""
  steps = setting.expert
  dense = _dense(seed, steps, setting)
  whole = _experts(seed, steps, setting=setting)
  averaged = _experts(seed, steps, 'averaged', setting)
  most = _experts(seed, steps * 3 // 4, 'averaged75', setting)
  ffn = _ffn_experts(seed, setting=setting)
  most_ffn = _ffn_experts(seed, 'ffn75', 'averaged75', setting)
  by_text = lambda experts: base.mix(
      *_chosen_by_text(seed, experts, setting), routers=_ridge(seed, setting))
  return {
      **dense, **_sparse(seed, setting), **whole, **_merged(seed, whole, setting),
      **averaged, 'btx/unfinetuned': base.run(base.mix(seed, *_ends(averaged))),
      'btx/ridge': base.run(by_text(averaged)),
      **most, 'btx/finetuned': _finetuned(base.mix(seed, *_ends(most)), setting=setting),
      **ffn, 'ffn/unfinetuned': base.run(base.mix(seed, *ffn)),
      'ffn/ridge': base.run(by_text(ffn)),
      **most_ffn, 'ffn/finetuned': _finetuned(by_text(most_ffn), setting=setting),
  }


def _dense(seed: str, steps: int, setting: Setting = LAPTOP):
  """One dense model of as many FLOPs as all experts. What the others match is `dense/blend`."""
  blend, new = setting.blend, setting.new
  run = lambda domains, family='dense', **train: base.run(
      base.checkpoint(seed), domains, len(new) * steps, optimizer=_rate(family, setting),
      train=train)
  meets = {'workers': len(blend), **DILOCO}
  of_new = {
      'dense/new': run(dict.fromkeys(new, 1)),
      'dense/replay': run({**dict.fromkeys(new, 9 / len(new)), setting.old: 1})}
  return {
      'dense/blend': run(blend), **(of_new if setting.old else {}),
      'dense/diloco': run(blend, 'diloco', **meets),
      'dense/diloco_domains': run(blend, 'diloco', **meets, worker_rows='domain')}


def _sparse(seed: str, setting: Setting = LAPTOP):
  """Mixtures from the start: copies of the seed, redrawn copies, random experts."""
  copy = lambda redraw: base.run(base.checkpoint(seed, redraw=redraw))
  redrawn = {f'redrawn/{i}': copy(0.5) for i in range(setting.copies)}
  random = {f'random/{i}': copy(1.0) for i in range(setting.copies)}
  run = lambda names: base.run(
      base.mix(*names), setting.blend, match_total_flops_of='dense/blend',
      optimizer=_rate('sparse', setting))
  return {**redrawn, **random, 'sparse/copies': run([seed] * setting.copies),
          'sparse/redrawn': run(redrawn), 'sparse/random': run(random)}


def _experts(seed: str, steps: int, kind: str = 'expert', setting: Setting = LAPTOP):
  """An expert for each new domain. Trunks of the length of the longest serve all.

  Args:
    kind: 'expert' for those that are kept whole; 'averaged', and a length in percent, for those
      that are averaged.
  """
  family = kind.rstrip('0123456789')
  trunk, rate = f'trunk/{family}', setting.rates[family]
  at = {'schedule': 'constant', 'peak_lr': rate}
  trunks = {f'{trunk}/{domain}': base.run(
      base.checkpoint(seed), {domain: 1}, steps=setting.expert * 4 // 5, optimizer=at)
            for domain in setting.new}
  return trunks | {f'{kind}/{domain}': _decayed(f'{trunk}/{domain}', {domain: 1}, steps, rate)
                   for domain in setting.new}


def _ffn_experts(seed: str, kind: str = 'ffn', like: str = 'expert', setting: Setting = LAPTOP):
  """Experts that train their feed-forward layers only, for the FLOPs of the whole ones."""
  return {f'{kind}/{domain}': base.run(
      base.checkpoint(seed), {domain: 1}, match_total_flops_of=f'{like}/{domain}', train=_FREEZE,
      optimizer=_rate('ffn', setting)) for domain in setting.new}


def _finetuned(mix, reference: str = 'dense/blend', setting: Setting = LAPTOP):
  """A mixture finetuned on all domains, for what is left of the compute."""
  return base.run(mix, setting.blend, match_total_flops_of=reference,
                  optimizer=_rate('finetune', setting))


def _merged(seed: str, experts, setting: Setting = LAPTOP):
  """Branch-Train-Merge: the seed and its experts kept whole."""
  return {
      'merge/posterior': base.run(
          base.ensemble(seed, *_ends(experts), selector=base.posterior())),
      'merge/learned': base.run(base.ensemble(
          *_chosen_by_text(seed, experts, setting), reader=seed, layers=1,
          selector=_ridge(seed, setting)))}


def _chosen_by_text(seed: str, experts, setting: Setting) -> list[str]:
  """The models between which text chooses: the seed is one if it has text of its own."""
  return [*([seed] if setting.old else []), *_ends(experts)]


def _ends(experts) -> list[str]:
  return [name for name in experts if not name.startswith('trunk/')]


def _ridge(seed: str, setting: Setting = LAPTOP):
  return base.from_text('ridge', labels=((seed, setting.old),) if setting.old else ())


def _rate(family: str, setting: Setting = LAPTOP) -> dict[str, float]:
  return {'peak_lr': setting.rates[family]}


def rates(setting: Setting = LAPTOP):
  """Each family at each of CANDIDATES, for half the FLOPs of the table's rows."""
  steps, runs, branch = setting.expert // 2, {}, base.checkpoint('seed')
  blend, new = setting.blend, setting.new
  for rate in CANDIDATES:
    def run(init, domains, steps=0, at=float(rate), **fields):
      return base.run(init, domains, steps, optimizer={'peak_lr': at}, **fields)
    mixed = {f'mixed/{rate}/{domain}': run(branch, {domain: 1}, steps * 3 // 4) for domain in new}
    for domain in new:
      runs[f'expert/{rate}/{domain}'] = run(branch, {domain: 1}, steps)
      runs[f'ffn/{rate}/{domain}'] = run(
          branch, {domain: 1}, match_total_flops_of=f'expert/{rate}/{domain}', train=_FREEZE)
    match = {'match_total_flops_of': f'dense/{rate}'}
    runs |= {
        f'dense/{rate}': run(branch, blend, len(new) * steps),
        **{f'{outer}/{rate}': run(branch, blend, len(new) * steps,
                                  train={'workers': len(blend), **meets})
           for outer, meets in MEETINGS.items()},
        f'sparse/{rate}': run(base.mix(*['seed'] * setting.copies), blend, **match),
        **mixed,
        f'averaged/{rate}': run(base.mix('seed', *mixed), blend, at=setting.rates['finetune'],
                                **match),
        f'finetune/{rate}': run(base.mix('seed', *(f'mixed/1e-3/{each}' for each in new)), blend,
                                **match)}
  return runs


def split():
  """The paper's form with other shares of the compute in its joint finetune."""
  runs = {'dense/blend': _dense('seed', EXPERT)['dense/blend']}
  for percent in SPLITS:
    steps, kind = EXPERT * (100 - percent) // 100, f'averaged{100 - percent}'
    name = f'split/{percent}'
    if percent == 25:  # as in the table
      experts, name = _experts('seed', steps, kind), 'btx/finetuned'
    else:  # the trunks do not keep these steps
      experts = {f'{kind}/{domain}': base.run(
          base.checkpoint('seed'), {domain: 1}, steps, optimizer=_rate('averaged'))
                 for domain in NEW}
    runs |= {**experts, name: _finetuned(base.mix('seed', *_ends(experts)))}
  return runs


def routing():
  """The finetuned mixture of the table with other routers, and without load balancing."""
  experts = _experts('seed', EXPERT * 3 // 4, 'averaged75')
  run = lambda **fields: base.run(
      base.mix('seed', *_ends(experts)), demo.BLEND, match_total_flops_of='dense/blend',
      optimizer=_rate('finetune'), **fields)
  return {
      'dense/blend': _dense('seed', EXPERT)['dense/blend'], **experts,
      'btx/finetuned': run(),
      'routing/unbalanced': run(train={'balance_loss': 0.0}),
      'routing/switch': run(model={'router': 'switch'}),
      'routing/soft': run(model={'router': 'soft'}),
      'routing/sample_top_1': run(model={'router': 'sample_top_1'}, train={'balance_loss': 0.0}),
  }


def later():
  """What cannot be pooled: a domain comes later, one is withdrawn, an expert is upgraded."""
  *first, new = NEW
  before = {domain: 1 for domain in demo.BLEND if domain != new}
  runs = {**_experts('seed', EXPERT), **_ffn_experts('seed')}
  third = base.run(base.checkpoint('seed'), before, len(first) * EXPERT, optimizer=_rate('dense'))
  run = lambda name, domains, like: base.run(
      base.checkpoint(name), domains, match_flops_of=like, optimizer=_rate('dense'))
  arrived = (f'trunk/expert/{new}', f'expert/{new}')
  upgraded = {**_longer('trunk/expert/code', 'code', 2), 'ffn2/code': _ffn_experts(
      'seed', 'ffn2', 'expert2')['ffn2/code']}
  more = ('trunk/expert/code', 'expert/code')
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
  most = {f'{prefix}/averaged75/{domain}': train({domain: 1}, steps * 3 // 4, 'averaged')
          for domain in NEW}
  ffn = {f'{prefix}/ffn/{domain}': base.run(
      base.checkpoint(seed), {domain: 1}, match_total_flops_of=f'{prefix}/expert/{domain}',
      train=_FREEZE, optimizer=_rate('ffn')) for domain in NEW}
  return {
      f'{prefix}/dense': train(demo.BLEND, len(NEW) * steps, 'dense'), **whole,
      f'{prefix}/merge': base.run(base.ensemble(seed, *whole, layers=1, selector=_ridge(seed))),
      **most, f'{prefix}/btx': _finetuned(base.mix(seed, *most), f'{prefix}/dense'),
      **ffn, f'{prefix}/ffn': base.run(base.mix(seed, *ffn, routers=_ridge(seed)))}
