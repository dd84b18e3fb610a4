"""Experts added to a mixture, replaced and dropped, with what each leaves as it was."""

import contextlib
import os

import jax
import numpy as np
import pytest

from btx_jax import base, library
from btx_jax.commands.export import export_run
from btx_jax.convert.hugging_face import Folder
from btx_jax.errors import UsageError
from btx_jax.pipeline import Pipeline
from btx_jax.scoring import scores
from btx_jax.study import compatibility, edits, plan, routers, sources
from btx_jax.study.study import Study
from tests import studies
from tests.helpers import assert_trees_equal, initial_params, use_mesh
from tests.pretrained_test import MODEL, write_model

WORDS = {**studies.WORDS, 'law': ['whereas it', 'the party', 'shall be', 'hereby so', 'of law']}
RIDGE = base.from_text('ridge', rows=20, labels=(('seed', 'prose'),))


def get_config(folder):
  config = studies.modular_config(folder)
  config.domains.law = base.domain(str(folder / 'law.jsonl'))
  config.stacked = ('code', 'math', 'law', 'math2')  # one program compiles sooner than four
  config.tokenizer.path = str(folder / 'seed')
  config.runs.seed = base.run(base.hugging_face(str(folder / 'seed')))
  config.runs.update({
      **{name: studies.modular_expert(name.rstrip('2'), steps=5) for name in config.stacked},
      'three': base.run(base.mix('seed', 'code', 'math', routers=RIDGE)),
      'four': base.run(base.mix('seed', 'code', 'math', 'law', routers=RIDGE)),
      'extended': base.run(base.extend('three', 'law')),
      'dropped': base.run(base.drop('extended', 'code')),
      'again': base.run(base.extend('dropped', 'code')),
      'replaced': base.run(base.replace('extended', (('math', 'math2'),))),
      'random': base.run(base.mix('seed', 'code', 'math')),
  })
  return config


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  found = tmp_path_factory.mktemp('text')
  studies.write_text(found, all_words=WORDS)
  write_model(found / 'seed')
  return found


@pytest.fixture(scope='module')
def study(folder, tmp_path_factory):
  pipeline = Unmeasured(get_config(folder), str(tmp_path_factory.mktemp('edit')))
  pipeline.train()
  return pipeline


class Unmeasured(Pipeline):
  """A pipeline without evaluation, on one device: it has less to compile."""

  def __init__(self, config, workdir: str):
    super().__init__(config, workdir)
    with use_mesh((1, 1, 1, 1)) as self.mesh:
      pass

  def _measure(self, run):
    pass


def split(study, name: str):
  """What a run starts from: its shared weights, its experts by name, and its routers."""
  params = initial_params(study, name)
  ffn = params['layers'].pop('ffn')
  experts = {expert: jax.tree.map(lambda x, at=i: x[:, at], ffn['experts'])
             for i, expert in enumerate(study.runs[name].expert_names)}
  columns = dict(zip(experts, np.moveaxis(np.asarray(ffn['router']), -1, 0)))
  return params, experts, columns


def assert_close(found, expected, rtol: float):
  """Routers by expert, within a share of the largest number."""
  assert found.keys() == expected.keys()
  for name, columns in expected.items():
    assert np.abs(found[name] - columns).max() <= rtol * np.abs(columns).max(), name


def test_three_extended_by_a_fourth_are_a_mixture_of_four(study):
  four, extended = split(study, 'four'), split(study, 'extended')
  assert list(extended[1]) == ['seed', 'code', 'math', 'law']
  assert_trees_equal(extended[:2], four[:2])
  assert_close(extended[2], four[2], 1e-5)
  tokens = np.arange(60).reshape(4, 15)
  logits = [library.logits(study.runs[name].model, initial_params(study, name), tokens)
            for name in ('four', 'extended')]
  assert np.abs(logits[0] - logits[1]).max() < 1e-4


def test_only_text_of_the_new_domain_was_read(study):
  assert study.runs['extended'].edit.stored == ('prose', 'code', 'math')
  assert study.runs['dropped'].edit.stored == ('prose', 'math', 'law')  # edits chain
  assert study.runs['replaced'].edit.stored == ('prose', 'code', 'law')
  before = routers.sums(study, study.runs['three'])
  for domain, found in before.items():
    kept = routers.sums(study, study.runs['extended'])[domain]
    assert (kept.outer == found.outer).all() and kept.tokens == found.tokens


def test_what_is_dropped_and_added_again_has_its_routers_back(study):
  dropped, again, before = (split(study, name) for name in ('dropped', 'again', 'extended'))
  assert list(dropped[1]) == ['seed', 'math', 'law']
  assert list(again[1]) == ['seed', 'math', 'law', 'code']
  assert_close(again[2], {name: before[2][name] for name in again[2]}, 1e-6)
  assert_trees_equal(again[:2], before[:2])


def test_replacing_and_dropping_leave_the_others_bytes(study):
  shared, experts, _ = split(study, 'extended')
  assert_trees_equal(split(study, 'dropped')[:2], (
      shared, {name: experts[name] for name in ('seed', 'math', 'law')}))
  shared_after, replaced, _ = split(study, 'replaced')
  assert list(replaced) == ['seed', 'code', 'math2', 'law']
  assert_trees_equal(shared_after, shared)
  assert_trees_equal({name: replaced[name] for name in ('seed', 'code', 'law')},
                     {name: experts[name] for name in ('seed', 'code', 'law')})
  new = sources.final(study, study.runs['math2']).read('layers/ffn/up', (slice(None),) * 3)
  np.testing.assert_array_equal(replaced['math2']['up'], new)


def test_random_routers_of_old_experts_stay(study, folder):
  config = get_config(folder)
  config.runs.update({'more': base.run(base.extend('random', 'law'), {'law': 1}, steps=1)})
  study = Unmeasured(config, study.workdir)
  before, after = split(study, 'random')[2], split(study, 'more')[2]
  for name, columns in before.items():
    np.testing.assert_array_equal(after[name], columns)
  assert 0.01 < after['law'].std() < 0.03  # mix.router_std
  assert [model.name for model in scores.models_of(study, study.runs['more'])] == [
      'more unfinetuned', 'more']  # and no average, which it does not rest on


@contextlib.contextmanager
def hidden(study, *domains):
  """Without the training text of these domains."""
  paths = [os.path.join(study.data_folder, domain, 'train.bin') for domain in domains]
  for path in paths:
    os.rename(path, f'{path}.hidden')
  yield
  for path in paths:
    os.rename(f'{path}.hidden', path)


def test_old_text_need_not_be_at_hand(study, folder):
  config = get_config(folder)
  config.runs.late = base.run(base.extend('three', 'law'))
  config.runs.other = base.run(base.replace('three', (('code', 'law'),)))
  config.runs.fewer = base.run(base.drop('four', 'code'))
  with hidden(study, 'prose', 'code', 'math'):
    late = Unmeasured(config, study.workdir)
    assert late.train('late')
  found, four = (routers.figures(late, late.runs[name]) for name in ('late', 'four'))
  assert list(found['rows']) == ['law']
  # The temperature is that of the mixture before.
  assert found['temperature'] == routers.figures(study, study.runs['three'])['temperature']
  expected = routers.of(study, study.runs['four']) * four['temperature'] / found['temperature']
  np.testing.assert_allclose(routers.of(late, late.runs['late']), expected, rtol=0,
                             atol=1e-5 * np.abs(expected).max())
  with hidden(study, *WORDS):
    late = Unmeasured(config, study.workdir)
    assert late.train('fewer')
    with pytest.raises(UsageError, match="of 'law', which has 0 to train on"):
      late.train('other')


def test_an_edit_of_a_folder_copies_its_bytes(study, folder, tmp_path):
  for name in ('extended', 'law'):
    export_run(study, name, str(tmp_path / name), 'bfloat16')
  config = get_config(folder)
  config.tokenizer.path = str(tmp_path / 'extended')
  config.stacked = ()
  config.runs = {
      'mixtral': base.run(base.hugging_face(str(tmp_path / 'extended'))),
      'law': base.run(base.hugging_face(str(tmp_path / 'law'))),
      'edited': base.run(base.replace('mixtral', (('expert 1', 'law'),), allow=('shared',))),
      'fewer': base.run(base.drop('edited', 'expert 0'))}
  edited = Study(config, study.workdir)
  export_run(edited, 'fewer', str(tmp_path / 'fewer'), 'bfloat16')
  assert not compatibility.remarks(edited.runs['fewer'])[1:]
  assert 'not trained beside' in compatibility.remarks(edited.runs['edited'])[1]
  before, after = Folder(str(tmp_path / 'extended')), Folder(str(tmp_path / 'fewer'))
  for path, shape in before.shapes.items():
    everything = (slice(None),) * len(shape)
    old, new = before.read(path, everything), after.read(path, everything)
    if path == 'layers/ffn/router':
      old, new = old[..., 2:], new[..., 1:]
    elif '/experts/' in path:
      old, new = old[:, 2:], new[:, 1:]
    assert old.tobytes() == new.tobytes(), path
  assert after.read('layers/ffn/experts/up')[:, 0].tobytes() == Folder(
      str(tmp_path / 'law')).read('layers/ffn/up').tobytes()
  # Experts are copied from file to file.
  index = (slice(0, 1), slice(0, 1), slice(0, MODEL.dim), slice(0, MODEL.ffn_dim))
  assert sources.final(edited, edited.runs['fewer']).extent('layers/ffn/experts/up', index)
  # With text and labels all domains are read.
  labels = (('expert 0', 'prose'), ('expert 1', 'code'), ('expert 2', 'math'),
            ('expert 3', 'law'), ('law', 'law'))
  config.runs.edited.init = base.extend(
      'mixtral', 'law', allow=('shared',), routers=base.from_text('mean', labels=labels))
  run = plan.make_plan(config, 270)['edited']
  assert run.routers.labels == ('prose', 'code', 'math', 'law', 'law') and not run.edit.stored


def planned(folder, **runs):
  """The plan with these runs too."""
  config = get_config(folder)
  config.runs.update(runs)
  return plan.make_plan(config, 270)


def test_sums_are_kept_while_nothing_but_routers_has_changed(folder):
  def stored(freeze, **model):
    return planned(
        folder, tuned=base.run(base.checkpoint('three'), {'code': 1}, steps=1,
                               train={'freeze': freeze}),
        more=base.run(base.drop('tuned', 'code'), model=model))['more'].edit.stored
  assert stored(base.FREEZE_ALL_BUT_ROUTER) == ('prose', 'math')
  assert stored(base.FREEZE_EXPERTS) == stored(()) == ()
  assert stored(base.FREEZE_ALL_BUT_ROUTER, norm_eps=1e-3) == ()


def test_experts_belong_beside_the_shared_weights(folder):
  free = base.run(base.checkpoint('seed'), {'law': 1}, steps=1)
  with pytest.raises(UsageError, match=r"'free' was not trained beside the shared weights of "
                     r"'three': embed, .*and \d+ more are not known to be equal \(embed is from "
                     r'the folder \S+/seed there and from free here\)'):
    planned(folder, free=free, more=base.run(base.extend('three', 'free')))
  allowed = planned(folder, free=free, more=base.run(
      base.extend('three', 'free', allow=('shared',))))['more']
  assert 'free was not trained beside these' in compatibility.remarks(allowed)[1]
  # An expert of an expert, and a mixture that was trained around its shared weights, are all right.
  planned(folder, around=base.run(base.checkpoint('three'), {'code': 1}, steps=1,
                                  train={'freeze': base.FREEZE_ALL_BUT_EXPERTS}),
          further=studies.modular_expert('law', seed='math'),
          more=base.run(base.extend('around', 'further')))
  with pytest.raises(UsageError, match='beside the shared weights'):
    planned(folder, whole=base.run(base.checkpoint('three'), {'code': 1}, steps=1),
            more=base.run(base.extend('whole', 'law')))


def test_the_same_average_is_the_same_origin(folder):
  free = {name: base.run(base.checkpoint('seed'), {name: 1}, steps=1) for name in ('code', 'law')}
  runs = planned(folder, **{f'free/{name}': run for name, run in free.items()},
                 a=base.run(base.mix('free/code', 'free/law')),
                 b=base.run(base.mix('free/code', 'free/law', 'free/code')),
                 c=base.run(base.mix('free/code', 'seed')))
  assert edits.origin(runs['a'], 'embed') == edits.origin(runs['b'], 'embed')
  assert edits.origin(runs['a'], 'embed') != edits.origin(runs['c'], 'embed')
