"""What a working directory's runs were made with and the config has otherwise now, in words.

A manifest has the spec of its run, and the specs of all that it descends from. So a difference is
traced to the run where it began, and named by the field that the user writes in the config.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import os
from typing import Any, NamedTuple

from btx_jax.data import tokens
from btx_jax.errors import UsageError, nested_differences
from btx_jax.run import HUGGING_FACE, Optimizer, Run
from btx_jax.study import manifest
from btx_jax.study.study import Study

# Fields of a spec that have the name of a section before them in a config.
_SECTIONS = {'seq_len': 'data.seq_len', 'batch_size': 'train.batch_size',
             'microbatches': 'train.microbatches', 'state': 'init.state'}
# Those of nested parts of a spec, by part.
_PREFIXES = {'model': 'model', 'optimizer': 'optimizer', 'objective': 'train',
             'routers': 'init.routers', 'selector': 'init.selector'}
_OF_INIT = ('reader', 'layers', 'forget', 'hysteresis')  # arguments of base.ensemble itself
# What follows from other fields, or is described in other words.
_NOT_FIELDS = ('name', 'sources', 'of_steps', 'step', 'weights', 'recipe', 'edit', 'content',
               'vocabulary', 'tokenizer', 'data')
_FOLLOWS = ('model.num_experts', 'model.router_bias')
_UNSET = {'init.state': False, 'init.routers': 'random'}


class Change(NamedTuple):
  """One reason why a run is another one than its directory holds.

  Attributes:
    root: the run that was made otherwise: the run itself, or one that it descends from.
    direct: whether it is the run itself, or one that it starts from.
    clause: what is otherwise, with the root as its subject: 'was trained with steps 80 and has 20
      now'.
  """
  root: str
  direct: bool
  clause: str


def of(study: Study, run: Run, found: Mapping[str, Any]) -> list[Change]:
  """How a run of the config differs from what its directory holds; none if it does not.

  Files alone decide: text that is not tokenized yet is not compared.

  Args:
    study: whose run it is.
    run: the run.
    found: its manifest.
  """
  earlier = found.get('ancestors', {})
  changes = list(dict.fromkeys(_changes(study, run, found['spec'], earlier, found.get('text', {}))))
  own = {change.clause for change in changes if change.root == run.name}
  return [change for change in changes if change.root == run.name or change.clause not in own]


def sentence(run: Run, change: Change) -> str:
  """A change with the run as the subject, which is not named."""
  if change.root == run.name:
    return change.clause
  return f'{"starts" if change.direct else "descends"} from {change.root}, which {change.clause}'


def check(study: Study, spec: Callable[[Run], dict]) -> None:
  """Raises UsageError unless every directory holds the run that the config has under its name.

  Args:
    study: the runs.
    spec: everything that decides a run's result.
  """
  changed, manifests = {}, {}
  for run in study.runs.values():
    folder, found = study.folder(run.name), manifest.read(study.folder(run.name))
    if found is None:
      if os.path.exists(os.path.join(folder, 'checkpoints')):
        raise UsageError(f'{folder} has checkpoints but no manifest.json that says what they '
                         'are; use another --workdir, or delete that folder to train it again.')
    elif any(nested_differences(found['spec'], spec(run))):
      manifests[run.name] = found
      changed[run.name] = of(study, run, found) or [
          Change(run.name, True, 'descends from a run that had other settings then')]
  if not changed:
    return
  lines = '\n'.join(f'  {line}' for line in _lines(changed))
  folders = ', '.join(study.folder(name) for name in changed)
  raise UsageError(f'{study.workdir} has runs that belong to another config:\n{lines}\nNothing was '
                   f'changed. {_way_on(study, changed, manifests)}Use another --workdir, or delete '
                   f'{folders} to train {"it" if len(changed) == 1 else "them"} again.')


def text_of(study: Study, domains: Iterable[str]) -> dict[str, str]:
  """What the text of domains was made from, in words, to be kept in a manifest."""
  metas = {domain: _meta(study, domain) for domain in domains}
  return {domain: str(meta['made_from']['text']) for domain, meta in metas.items() if meta}


def _lines(changed: Mapping[str, list[Change]]) -> Iterator[str]:
  """A line for each change, with all runs that it concerns."""
  own: dict[str, list[str]] = {}
  inherited: dict[tuple[str, str], list[tuple[str, bool]]] = {}
  for name, changes in changed.items():
    for change in changes:
      if change.root == name:
        own.setdefault(change.clause, []).append(name)
      else:
        inherited.setdefault((change.root, change.clause), []).append((name, change.direct))
  for clause, names in own.items():
    yield f'{_listed(names)} {clause if len(names) == 1 else _plural(clause)}'
  for (root, clause), runs in inherited.items():
    verb = 'start' if all(direct for _, direct in runs) else 'descend'
    yield (f'{_listed(name for name, _ in runs)} {verb}{"s" * (len(runs) == 1)} from {root}, which '
           f'{clause}')


def _way_on(study: Study, changed: Mapping[str, list[Change]], manifests: Mapping[str, dict]
            ) -> str:
  """How what is there can be used; '' if nothing was trained."""
  for name in changed:
    was, run = manifests[name]['spec'].get('name'), study.runs[name]
    if was != run.first_name:
      return (f'If a run was moved by hand, `rename {was} {run.plain_name}` lets it keep what it '
              'is. ')
  roots = {change.root for changes in changed.values() for change in changes}
  for name, found in manifests.items():
    if name in roots and found.get('steps_done'):
      plain, step = study.runs[name].plain_name, found['steps_done']
      return (f'To go on from what is there with more steps, fewer or other settings, leave '
              f'{plain!r} as it was, and add a run from base.checkpoint({plain!r}, step={step}, '
              'state=True). ')
  return ''


def _changes(study: Study, run: Run, was: Mapping[str, Any], earlier: Mapping[str, Any],
             texts: Mapping[str, str]) -> Iterator[Change]:
  """The changes of a run since it had the spec `was`; `earlier` are specs by their identity."""
  inherited = []
  recorded = was.get('sources', [])
  pairs = [each if isinstance(each, list) else [each, ''] for each in recorded]
  if [name for name, _ in pairs] == [source.first_name for source in run.sources]:
    for (_, identity), source in zip(pairs, run.sources):
      inherited += _of_source(study, source, identity, was.get('step', 0), earlier, texts)
  clause = '; '.join(_clauses(study, run, was, texts, bool(inherited)))
  if clause:
    yield Change(run.name, True, clause)
  yield from inherited


def _of_source(study: Study, source: Run, identity: str, step: int, earlier: Mapping[str, Any],
               texts: Mapping[str, str]) -> Iterator[Change]:
  """The changes of what a run starts from, since it had this identity; `step`, of its steps."""
  was = earlier.get(identity)
  if was is None and identity:
    found = _read(study, source.name)
    if found:
      spec = found['spec']
      first = {'steps': step, 'of_steps': spec.get('steps')} if step else {}
      was = spec | first if manifest.identity(spec | first) == identity else None
      if was is None and spec.get('steps'):
        yield Change(source.name, True, 'was another one then: it has been trained again since')
  if was is not None:
    for change in _changes(study, source, was, earlier, texts):
      yield change._replace(direct=change.root == source.name)


def _clauses(study: Study, run: Run, was: Mapping[str, Any], texts: Mapping[str, str],
             inherited: bool) -> Iterator[str]:
  """What a run itself has otherwise, in clauses without a subject."""
  now = run.spec()
  if was.get('name') != now['name']:
    yield f'is the run {was.get("name")!r}, which was trained under that name'
  names = [each[0] if isinstance(each, list) else each for each in was.get('sources', [])]
  if names != now['sources']:
    yield (f'started from {", ".join(names) or "none"} and starts from '
           f'{", ".join(now["sources"]) or "none"} now')
  elif was.get('step', 0) != now.get('step', 0):
    then, today = (f'step {spec["step"]}' if spec.get('step') else 'the end' for spec in (was, now))
    yield f'started from {then} of {run.sources[0].name} and starts from {today} now'
  fields = _fields(was), _fields(now)
  differing = [(field, *(_shown(each.get(field, _UNSET.get(field))) for each in fields))
               for field in dict.fromkeys([*fields[0], *fields[1]])
               if fields[0].get(field) != fields[1].get(field) and field not in _FOLLOWS]
  verb = 'trained' if was.get('steps') else 'made'
  if len(differing) == 1:
    (field, then, today), = differing
    yield f'was {verb} with {field} {then} and has {today} now'
  elif differing:
    yield f'was {verb} with ' + ', '.join(
        f'{field} {then} ({today} now)' for field, then, today in differing)
  if was.get('content') != now.get('content'):
    yield ('was read from another model than the one that is in '
           f'{run.folder} now' if run.init == HUGGING_FACE else 'was read from a pretrained model')
  elif was.get('vocabulary') != now.get('vocabulary'):
    yield 'had another vocabulary beside that of the tokenizer'
  if not inherited and names == now['sources'] and not differing:
    yield from _of_mixture(was, now)
  yield from _of_text(study, run, was, texts)


def _of_mixture(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
  """What the arguments of base.mix, extend, replace or drop have otherwise."""
  then, today = (spec.get('recipe') or {} for spec in (was, now))
  if any(then.get(key) != today.get(key) for key in ('pieces', 'scale', 'tied')):
    yield 'was mixed with other runs, arrangement or chunks in base.mix(...)'
  elif then.get('rest') != today.get('rest'):
    yield 'was mixed with other averaged or rules in base.mix(...)'
  if was.get('edit') != now.get('edit'):
    yield 'had other experts, or sums of other domains, from base.extend, replace or drop'


def _of_text(study: Study, run: Run, was: Mapping[str, Any], texts: Mapping[str, str]
             ) -> Iterator[str]:
  """Whether the text that is tokenized now is another one."""
  metas = {domain: meta for domain in run.domains if (meta := _meta(study, domain))}
  if 'tokenizer' in was and any(meta['made_from']['tokenizer'] != was['tokenizer']
                                for meta in metas.values()):
    yield f'was {"trained" if was.get("steps") else "made"} with another tokenizer'
    return
  others = []
  for domain, meta in metas.items():
    if was.get('data', {}).get(domain, meta['hash']['train']) != meta['hash']['train']:
      then, today = texts.get(domain), meta['made_from']['text']
      others.append(f'{domain} ({then}; {today} now)' if then and then != today else domain)
  if others:
    yield f'was trained on other text of {_listed(others)}'


def _fields(spec: Mapping[str, Any]) -> dict[str, Any]:
  """The values of a spec by the fields that the user writes in a config."""
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
  if spec.get('recipe'):
    result['mix.router_std'] = spec['recipe']['router_std']
  return result


def _optimizer(fields: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of an optimizer, with those that a spec leaves out; see Optimizer.spec."""
  defaults = {field.name: field.default for field in dataclasses.fields(Optimizer)}
  result = defaults | fields
  if 'schedule' not in fields and result['final_lr'] == 1:
    result |= {'schedule': 'constant', 'final_lr': defaults['final_lr']}
  return result


def _shown(value: Any) -> str:
  if isinstance(value, float):
    return f'{value:g}'
  return value if isinstance(value, str) and value.isprintable() and value else repr(value)


def _listed(names: Iterable[str]) -> str:
  *most, last = names
  return f'{", ".join(most)} and {last}' if most else last


def _plural(clause: str) -> str:
  """A clause with a plural subject."""
  words = {'was': 'were', 'has': 'have', 'is': 'are', 'starts': 'start'}
  return ' '.join(words.get(word, word) for word in clause.split(' '))


def _meta(study: Study, domain: str) -> dict | None:
  """What the tokens of a domain were made from; None if there are none."""
  try:
    return tokens.read_meta(os.path.join(study.data_folder, domain))
  except UsageError:
    return None


def _read(study: Study, name: str) -> dict | None:
  try:
    return manifest.read(study.folder(name))
  except UsageError:
    return None
