"""How the runs in a working directory differ from those of the config, in words.

A manifest has the spec of its run, and the specs of all runs that it descends from. So a difference
is traced to the run where it began, and is named by the field that the user writes in the config.
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
from typing import Any, NamedTuple

from btx_jax.run import HUGGING_FACE, Optimizer, Run
from btx_jax.study import manifest
from btx_jax.study.study import Study

# Fields of a spec that belong to a section of the config.
_SECTIONS = {'seq_len': 'data.seq_len', 'batch_size': 'train.batch_size',
             'microbatches': 'train.microbatches', 'state': 'init.state',
             'redraw': 'init.redraw'}
# The section of the fields of each nested part of a spec.
_PREFIXES = {'model': 'model', 'optimizer': 'optimizer', 'objective': 'train',
             'outer': 'train', 'routers': 'init.routers', 'selector': 'init.selector'}
_OF_INIT = ('reader', 'layers', 'forget', 'hysteresis')  # arguments of base.ensemble itself
# Fields that follow from others, or are described in other words.
_NOT_FIELDS = ('name', 'sources', 'of_steps', 'step', 'weights', 'recipe', 'edit', 'content',
               'vocabulary', 'tokenizer', 'data')
_FOLLOWS = ('model.num_experts', 'model.router_bias')
_UNSET = {'init.state': False, 'init.redraw': 0.0, 'init.routers': 'random'}


class Change(NamedTuple):
  """One reason why a run of the config is not the run that its directory holds.

  Attributes:
    root: the run where the change began: the run itself, or one that it descends from.
    direct: whether the root is the run itself, or one that it starts from.
    verb: how the root was made, 'trained' or 'made'.
    field: the field whose value has changed; '' if the change is not about a field.
    was: the old value; without a field, a clause with the root as its subject.
    now: the new value.
  """
  root: str
  direct: bool
  verb: str
  field: str
  was: str
  now: str = ''

  @property
  def what(self) -> tuple[str, str, str]:
    """The change without its run: equal if several runs changed in the same way."""
    return self.field, self.was, self.now


def of(study: Study, run: Run, found: Mapping[str, Any]) -> list[Change]:
  """How a run of the config differs from what its directory holds; empty if it does not.

  A change in the run itself is not repeated for the runs that it descends from. Only files are
  compared: text that is not tokenized yet is ignored.

  Args:
    study: the study of the run.
    run: the run.
    found: its manifest.
  """
  earlier, texts = found.get('ancestors', {}), found.get('text', {})
  known: dict[tuple, Change] = {}
  for change in _changes(study, run, found['spec'], earlier, texts):
    key = change.root, change.what
    known[key] = change._replace(direct=change.direct or (key in known and known[key].direct))
  own = {change.what for change in known.values() if change.root == run.name}
  return [change for change in known.values() if change.root == run.name or change.what not in own]


def text_of(study: Study, domains: Iterable[str]) -> dict[str, str]:
  """A description of each domain's text, to be kept in a manifest."""
  metas = {domain: study.text_meta(domain) for domain in domains}
  return {domain: str(meta['made_from']['text']) for domain, meta in metas.items() if meta}


def _changes(study: Study, run: Run, was: Mapping[str, Any], earlier: Mapping[str, Any],
             texts: Mapping[str, str]) -> Iterator[Change]:
  """The changes of a run since it had the spec `was`; `earlier` has specs by their identity."""
  inherited = []
  if manifest.source_names(was) == [source.first_name for source in run.sources]:
    for each, source in zip(was.get('sources', []), run.sources):
      identity = each[1] if isinstance(each, list) else ''
      inherited += _of_source(study, source, identity, was.get('step', 0), earlier, texts)
  verb = 'trained' if was.get('steps') else 'made'
  now = run.spec()
  fields = list(_fields_changed(was, now))
  for change in fields:
    yield Change(run.name, True, verb, *change)
  for clause in _clauses(study, run, was, now, texts, bool(inherited or fields)):
    yield Change(run.name, True, verb, '', clause)
  yield from inherited


def _fields_changed(was: Mapping[str, Any], now: Mapping[str, Any]
                    ) -> Iterator[tuple[str, str, str]]:
  """The fields of a config that differ between two specs, with their values."""
  then, today = _fields(was), _fields(now)
  for field in dict.fromkeys([*then, *today]):
    if field not in _FOLLOWS and then.get(field) != today.get(field):
      unset = _UNSET.get(field)
      yield field, _shown(then.get(field, unset)), _shown(today.get(field, unset))


def _of_source(study: Study, source: Run, identity: str, step: int, earlier: Mapping[str, Any],
               texts: Mapping[str, str]) -> Iterator[Change]:
  """The changes of a source since it had this identity; `step` is the step that was taken."""
  was = earlier.get(identity)
  if was is None and identity:
    found = study.recorded(source.name)
    if found:
      spec = found['spec']
      first = {'steps': step, 'of_steps': spec.get('steps')} if step else {}
      was = spec | first if manifest.identity(spec | first) == identity else None
      if was is None and spec.get('steps'):
        yield Change(source.name, True, '', '',
                     'was a different run then: it has been trained again since')
  if was is not None:
    for change in _changes(study, source, was, earlier, texts):
      yield change._replace(direct=change.root == source.name)


def _clauses(study: Study, run: Run, was: Mapping[str, Any], now: Mapping[str, Any],
             texts: Mapping[str, str], explained: bool) -> Iterator[str]:
  """The changes of a run itself other than those of fields, as clauses without a subject.

  A change of the mixing is left out if other changes explain it.
  """
  if was.get('name') != now['name']:
    yield f'is the run {was.get("name")!r}, which was trained under that name'
  names = manifest.source_names(was)
  if names != now['sources']:
    yield (f'started from {", ".join(names) or "none"} and starts from '
           f'{", ".join(now["sources"]) or "none"} now')
  elif was.get('step', 0) != now.get('step', 0):
    then, today = (f'step {spec["step"]}' if spec.get('step') else 'its end' for spec in (was, now))
    yield f'started from {then} of {run.sources[0].name} and starts from {today} now'
  if was.get('content') != now.get('content'):
    yield ('was read from a different model than the one now in '
           f'{run.folder}' if run.init == HUGGING_FACE else 'was read from a pretrained model')
  elif was.get('vocabulary') != now.get('vocabulary'):
    yield 'had a different vocabulary beside that of the tokenizer'
  if not explained and names == now['sources']:
    yield from _of_mixture(was, now)
  yield from _of_text(study, run, was, texts)


def _of_mixture(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
  """Which arguments of base.mix, extend, replace or drop have changed."""
  then, today = (spec.get('recipe') or {} for spec in (was, now))
  if any(then.get(key) != today.get(key) for key in ('pieces', 'scale', 'tied')):
    yield 'was mixed with a different set of runs, arrangement or chunks in base.mix(...)'
  elif then.get('rest') != today.get('rest'):
    yield 'was mixed with different `averaged` or `rules` in base.mix(...)'
  if was.get('edit') != now.get('edit'):
    yield 'had different experts, or sums of other domains, from base.extend, replace or drop'


def _of_text(study: Study, run: Run, was: Mapping[str, Any], texts: Mapping[str, str]
             ) -> Iterator[str]:
  """Whether the tokenizer or the tokenized text has changed."""
  metas = {domain: meta for domain in run.domains if (meta := study.text_meta(domain))}
  if 'tokenizer' in was and any(meta['made_from']['tokenizer'] != was['tokenizer']
                                for meta in metas.values()):
    yield f'was {"trained" if was.get("steps") else "made"} with a different tokenizer'
    return
  others = []
  for domain, meta in metas.items():
    if was.get('data', {}).get(domain, meta['hash']['train']) != meta['hash']['train']:
      then, today = texts.get(domain), meta['made_from'].get('text')
      others.append(f'{domain} ({then}; {today} now)' if then and then != today else domain)
  if others:
    yield f'was trained on different text of {listed(others)}'


def _fields(spec: Mapping[str, Any]) -> dict[str, Any]:
  """The values of a spec, by the name of their field in a config."""
  result = {}
  for key, value in spec.items():
    if key == 'weights':
      result['domains'] = ' + '.join(f'{share:.3g} {domain}' for domain, share in value.items())
    elif key == 'optimizer':
      result |= {f'optimizer.{field}': x for field, x in _optimizer(value).items()}
    elif key in _PREFIXES and isinstance(value, Mapping):
      result |= {f'{"init" if field in _OF_INIT else _PREFIXES[key]}.{field}': x
                 for field, x in value.items()}
    elif key == 'steps':
      result[key] = spec.get('of_steps') or value
    elif key == 'init':
      result[key] = f'base.{value}'
    elif key not in _NOT_FIELDS:
      result[_SECTIONS.get(key, key)] = value
  if result.get('model.head_dim') == result.get('model.dim', 0) // (
      result.get('model.num_heads') or 1):
    result.pop('model.head_dim', None)  # follows from these two
  if spec.get('recipe'):
    result['mix.router_std'] = spec['recipe']['router_std']
  return result


def _optimizer(fields: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of an optimizer, including those that a spec omits; see Optimizer.spec."""
  defaults = dataclasses.asdict(Optimizer())
  result = {**defaults, **fields}
  if 'schedule' not in fields and result['final_lr'] == 1:
    result |= {'schedule': 'constant', 'final_lr': defaults['final_lr']}
  return result


def _shown(value: Any) -> str:
  if isinstance(value, float):
    return f'{value:g}'
  return value if isinstance(value, str) and value.isprintable() and value else repr(value)


def listed(names: Iterable[str]) -> str:
  """Joins names for a sentence: a, b and c."""
  *most, last = names
  return f'{", ".join(most)} and {last}' if most else last
