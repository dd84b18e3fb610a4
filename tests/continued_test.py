"""Runs that start from a step of another one, and runs and edits that take its optimizer state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from btx_jax import base
from btx_jax.commands import status
from btx_jax.data import mixture
from btx_jax.errors import UsageError
from btx_jax.run import Optimizer
from btx_jax.study import compatibility, continued, manifest, plan, sources, state
from btx_jax.study.study import Study
from btx_jax.training import metrics, optim
from btx_jax.training.program import SingleRun
from btx_jax.training.slices import Saved
from tests import studies
from tests.data_test import flat
from tests.edit_test import Unmeasured
from tests.helpers import assert_trees_equal, final_params
from tests.pretrained_test import MODEL, write_model

ALL = {'prose': 2, 'code': 1, 'math': 1}
EDITS = {
    'wider': base.extend('btx', 'third', allow='shared', state=True),
    'other': base.replace('btx', (('seed', 'third'),), allow='shared', state=True),
    'fewer': base.drop('btx', 'seed', state=True),
    'fitted': base.extend('btx', 'third', allow='shared', state=True, routers=base.from_text(
        'mean', labels=(('seed', 'prose'), ('second', 'code'), ('third', 'math')))),
}


def going_on(name, steps, step=0, domains=None, **fields):
  """A run that takes the state of another."""
  init = base.checkpoint(name, step=step, state=True)
  return base.run(init, domains or ALL, steps, **fields)


def get_config(folder):
  """A mixture with noisy routers, and its last three steps once more."""
  config = studies.get_config(folder)
  config.mesh.update(fsdp=1, expert=1, tensor=1)
  config.optimizer.update(warmup=0.0, schedule='wsd', decay=0.4)
  config.evaluation.every = 0
  config.checkpoint_every = 100
  config.tokenizer.path = str(folder / 'seed')
  pretrained = base.run(base.hugging_face(str(folder / 'seed')))
  config.runs = {
      'seed': pretrained, 'second': pretrained, 'third': pretrained,
      'btx': base.run(base.mix('seed', 'second'), ALL, 5, model={'router': 'sample_top_1'}),
      # The rate is constant until then, so it does not warm up again; it decays in the same steps.
      'again': going_on('btx', 3, step=2, optimizer={'warmup': 0.5, 'decay': 0.6}),
  }
  return config


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  found = tmp_path_factory.mktemp('text')
  studies.write_text(found)
  write_model(found / 'seed', model=dataclasses.replace(MODEL, num_layers=2))
  return found


@pytest.fixture(scope='module')
def study(folder, tmp_path_factory):
  pipeline = Unmeasured(get_config(folder), str(tmp_path_factory.mktemp('continued')))
  pipeline.train()
  return pipeline


def stored(study, name, step):
  """What is saved beside the parameters after a step, by path."""
  run = study.runs[name]
  return Saved(sources.checkpoints(study, run), step, sources.identity(study, run), 'train')


def whole(source, path, dims):
  return source.read(path, (slice(None),) * dims)


def test_a_run_in_pieces_is_the_run_in_one_bit_for_bit(study):
  assert_trees_equal(final_params(study, 'again'), final_params(study, 'btx'))
  one, pieces = stored(study, 'btx', 5), stored(study, 'again', 3)
  for path, dims in (('opt_state/1/0/nu/layers/ffn/experts/up', 4), ('opt_state/1/2/count', 0),
                     ('step', 0)):
    np.testing.assert_array_equal(whole(pieces, path, dims), whole(one, path, dims))
  whole_run, again = ([line['lr'] for line in metrics.read(study.folder(name)) if 'lr' in line]
                      for name in ('btx', 'again'))
  assert whole_run == pytest.approx([0.01] * 4 + [0.0055]) and again == whole_run[2:]
  # The step is saved because another run starts there, and says so.
  assert sources.kept(study, study.runs['btx']) == [2, 5]
  spec = manifest.read(study.folder('again'))['spec']
  assert (spec['step'], spec['state']) == (2, True)


def test_another_step_is_another_run(study, folder):
  config = get_config(folder)
  config.runs.again.init.step = 5
  with pytest.raises(UsageError, match=r'another config:\n  again started from step 2 of btx and '
                     r'starts from its end now\n(.|\n)*leave .again. as it was, and add a run from '
                     r'base.checkpoint\(.again., step=3, state=True\)'):
    Unmeasured(config, study.workdir).train()
  del config.runs['again']
  config.runs.new = base.run(base.checkpoint('btx', step=4), ALL, 1)
  with pytest.raises(UsageError, match=r"runs.new starts from step 4 of 'btx', which has done 5 "
                     r'steps and keeps 2, 5. Name one of these, or 0 for the end.'):
    Unmeasured(config, study.workdir).train()
  # A run of 0 steps is the model at that step.
  config.runs.new = base.run(base.checkpoint('btx', step=2))
  found = Study(config, study.workdir)
  np.testing.assert_array_equal(
      whole(sources.final(found, found.runs['new']), 'embed', 2),
      whole(Saved(sources.checkpoints(study, study.runs['btx']), 2,
                  sources.identity(study, study.runs['btx'])), 'embed', 2))


@pytest.mark.parametrize('name', EDITS)
def test_an_edit_keeps_the_moments_of_what_it_keeps(study, folder, name, monkeypatch):
  config = get_config(folder)
  config.runs = {each: config.runs[each] for each in ('seed', 'second', 'third', 'btx')}
  config.runs[name] = base.run(EDITS[name], ALL, 5, optimizer={'schedule': 'cosine'})
  edited = Unmeasured(config, study.workdir)
  run, before = edited.runs[name], stored(study, 'btx', 5)
  monkeypatch.setattr(state.params, 'initial', lambda *_: {})  # parameters: edit_test.py
  made = state.initial(edited, run, study.mesh, None, SingleRun(run, study.mesh, 3))
  adam, _, schedule = made.opt_state[1]
  assert (int(made.step), int(adam.count), int(schedule.count)) == (5, 5, 0)
  # The number of each expert in the mixture; None if it is new.
  numbers = {'wider': (0, 1, None), 'other': (None, 1), 'fewer': (1,), 'fitted': (0, 1, None)}[name]
  for moment, found in (('mu', adam.mu), ('nu', adam.nu)):
    path = f'opt_state/1/0/{moment}/'
    np.testing.assert_array_equal(found['embed'], whole(before, f'{path}embed', 2))
    up = whole(before, f'{path}layers/ffn/experts/up', 4)
    router = whole(before, f'{path}layers/ffn/router', 3)
    assert np.abs(up).min((0, 2, 3)).max() > 0 and router.any()
    for e, number in enumerate(numbers):
      ffn = found['layers']['ffn']
      np.testing.assert_array_equal(
          ffn['experts']['up'][:, e], up[:, 0] * 0 if number is None else up[:, number])
      anew = number is None or name == 'fitted'
      np.testing.assert_array_equal(
          ffn['router'][..., e], router[..., 0] * 0 if anew else router[..., number])


@pytest.mark.parametrize('source, step, run, rates', [
    # Before the decay of the source, the two are one schedule.
    ({'schedule': 'constant', 'warmup': 2}, 0, {'schedule': 'constant'}, [1.0] * 4),
    ({'schedule': 'constant', 'warmup': 8}, 5, {'schedule': 'constant'}, [0.625, 0.75, 0.875, 1.0]),
    ({'schedule': 'constant'}, 0, {'schedule': 'wsd', 'decay': 0.5}, [1.0, 1.0, 1.0, 0.55]),
    ({'schedule': 'wsd', 'decay': 0.5}, 5, {'schedule': 'constant'}, [1.0] * 4),
    # In its decay, and from or to a cosine, the schedule is a new one.
    ({'schedule': 'wsd', 'decay': 0.5}, 6, {'schedule': 'constant'}, [0.0, 0.5, 1.0, 1.0]),
    ({'schedule': 'cosine'}, 0, {'schedule': 'constant'}, [0.0, 0.5, 1.0, 1.0]),
    ({'schedule': 'constant'}, 0, {'schedule': 'cosine'}, [0.0, 0.5, 1.0, 0.55]),
])
def test_the_rates_of_a_run_that_goes_on(folder, source, step, run, rates):
  config = studies.get_config(folder)
  config.optimizer.peak_lr = 1.0
  config.runs = {
      'a': base.run(base.random(), ALL, 10, optimizer=source),
      'b': going_on('a', 4, step=step, optimizer={'warmup': 2, **run})}
  made = plan.make_plan(config, 300)['b']
  found = optim.schedule_of(made)
  assert [float(found(made.schedule_start + i)) for i in range(4)] == pytest.approx(rates)


def tokens_of(order, count):
  """The first token of each row, by domain."""
  rows = [order[i] for i in range(count)]
  return {d: [int(row['tokens'][0]) for row in rows if row['domain'] == d] for d in range(3)}


def test_every_domain_is_read_on_where_it_stopped(folder):
  config = get_config(folder)
  config.runs.btx.domains = {'prose': 2.0, 'code': 1.0}
  config.runs.update({
      'wider': base.run(EDITS['wider'], ALL, 4), 'last': going_on('wider', 3, domains=ALL)})
  del config.runs['again']
  runs = plan.make_plan(config, 272)
  domains = {'code': flat(90, 16), 'math': flat(90, 16, 5000), 'prose': flat(90, 16, 9000)}
  read = [tokens_of(mixture.order_of(runs[name], domains), runs[name].steps * 16)
          for name in ('btx', 'wider', 'last')]
  for d, domain in enumerate(domains):
    # As if it had been read alone.
    found = [token for each in read for token in each[d]]
    alone = mixture.training_order(domains, {domain: 1.0}, 15, runs['btx'].rng_seed)
    assert found == [int(alone[i]['tokens'][0]) for i in range(len(found))]
  assert [len(each[1]) for each in read] == [0, 16, 12]


def test_what_starts_anew_is_said(folder):
  config = get_config(folder)
  config.runs.update({'a': base.run(base.checkpoint('btx', step=2), ALL, 1),
                      'b': base.run(base.checkpoint('btx', step=2), ALL, 1),
                      'c': going_on('again', 1, optimizer={'schedule': 'cosine'})})
  assert continued.remarks(list(plan.make_plan(config, 272).values())) == [
      "again continues after step 2 of btx, with its moments, Adam's count and the place in the "
      'data; the learning rate stays constant until it falls over the last 2 steps',
      "c continues after step 3 of again, with its moments, Adam's count and the place in the "
      'data; warmup and schedule start over',
      'a, b: only the parameters come from btx, step 2; moments, order of data, warmup and '
      'schedule start over']


def test_a_step_and_the_end_are_different_parameters(folder):
  """So nothing is taken for equal, and no text counts twice."""
  config = studies.get_config(folder)
  early = base.checkpoint('seed', step=2)
  config.runs.update({
      'expert/code': base.run(early, {'code': 1}, 5, train={'freeze': base.FREEZE_ALL_BUT_EXPERTS}),
      'expert/math': base.run(base.checkpoint('seed'), {'math': 1}, 5,
                              train={'freeze': base.FREEZE_ALL_BUT_EXPERTS}),
      'btx': base.run(base.mix('expert/code', 'expert/math', rules={'embed': 'tokens'}),
                      {'code': 1}, 1)})
  config.seeds = (0, 1)
  run = plan.make_plan(config, 300)['seed-1/btx']
  seeds = [source.sources[0] for source in run.sources]
  assert [seed.label for seed in seeds] == ['seed-1/seed, step 2', 'seed-1/seed']
  assert [seed.steps for seed in seeds] == [2, 6]
  assert not compatibility.unchanged(run.sources)
  # Since step 2: 5 steps, and 4 + 5.
  assert np.divide(*run.recipe.weights('embed')) == pytest.approx(5 / 9)


def test_a_run_that_failed_gives_way_to_those_that_start_from_its_kept_steps(folder, tmp_path):
  config = get_config(folder)
  study = Study(config, str(tmp_path))
  path = tmp_path / 'btx' / 'checkpoints' / '2'
  path.mkdir(parents=True)
  for found, jobs in ((manifest.STOPPED, [['btx'], ['again']]), (manifest.FAILED, [['again']])):
    manifest.write(study.folder('btx'), manifest.begin('btx', {}) | {'state': found})
    assert [[name for name in stage if name in ('btx', 'again')]
            for stage in status.stages(study)][-len(jobs):] == jobs
  path.rmdir()
  assert sources.superseded(study) == []


def test_the_updates_of_a_weight_that_is_new_under_a_large_count():
  for b2, most in ((Optimizer().b2, 1.17), (0.999, 7.28)):
    adam = optax.scale_by_adam(b1=0.9, b2=b2, eps=0.0)
    at = adam.init(jnp.zeros(2))._replace(count=jnp.array(10_000))
    update = jax.jit(adam.update)
    found = []
    for _ in range(20):
      updates, at = update(jnp.array([1e-3, -5.0]), at)
      found.append(updates)
    n = 1 + np.arange(20)[:, None]
    expected = (1 - 0.9**n) / np.sqrt(1 - b2**n) * [1, -1]
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert abs(expected[0, 0] - 0.1 / np.sqrt(1 - b2)) < 1e-9
    # No gradients give more than this.
    bound = 0.1 / np.sqrt((1 - b2) * (1 - 0.81 / b2))
    assert np.abs(expected).max() < bound < most
