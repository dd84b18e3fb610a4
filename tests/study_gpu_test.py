"""configs/study_gpu.py: what its form means, and that its rows fit any number of domains."""

import jax
import pytest

from btx_jax.configs import study, study_gpu
from btx_jax.run import lineage
from btx_jax.study import plan
from btx_jax.training import layout

VOCABULARY = 49_152
TWO = 'code=/c,math=/m'


def runs_of(config):
  """The runs of the first seed, by their names in the config; no folder has to be there."""
  runs = plan.make_plan(config, VOCABULARY, at_hand=False)
  return {run.plain_name: run for run in runs.values()
          if run.series in ('', plan.series_name(config.seeds[0]))}


@pytest.mark.parametrize('form', ['/models/mine,steps=8,code=/c=1/*.txt,math=/m',
                                  'code=/c=1/*.txt,math=/m,/models/mine,steps=8'])
def test_a_form_names_the_model_the_text_and_the_steps(form):
  config = study_gpu.get_config(form)
  assert config.runs.seed.init.folder == config.tokenizer.path == '/models/mine'
  assert {name: domain.paths for name, domain in config.domains.items()} == {
      'code': ('/c=1/*.txt',), 'math': ('/m',)}
  runs = runs_of(config)
  assert [runs[name].steps for name in (
      'dense/blend', 'trunk/expert/code', 'expert/code')] == [16, 6, 2]


def test_the_plain_form_is_the_text_of_the_demo():
  config = study_gpu.get_config()
  assert config.rows != study.get_config().rows  # whose rows are of other runs of the same names
  assert config.runs.seed.init.folder == '/models/SmolLM2-135M'
  assert {domain.source for domain in config.domains.values()} == {
      'stdlib', 'arithmetic', 'factbook', 'sotu'}
  assert runs_of(config)['btx/ridge'].routers.domains == ('prose', 'code', 'math', 'knowledge')


def test_without_a_general_domain_the_seed_is_no_expert_that_text_chooses():
  runs, more = (runs_of(study_gpu.get_config(form)) for form in (TWO, f'{TWO},general=/g'))
  assert set(more) - set(runs) == {'dense/new', 'dense/replay'}
  by_text = ('merge/learned', 'btx/ridge', 'ffn/ridge', 'ffn/finetuned')
  for name in set(runs) & set(more):
    seed = ('seed',) if name in by_text else ()
    assert more[name].expert_names == (*seed, *runs[name].expert_names)
  assert runs['merge/learned'].reader is not None
  assert runs['merge/learned'].reader.name == 'seed'
  assert more['dense/replay'].weights == pytest.approx({'code': .45, 'math': .45, 'general': .1})


@pytest.mark.parametrize('domains, more', [(2, ''), (3, ''), (4, ',general=/g')])
def test_rows_of_any_number_of_domains_cost_the_same_and_fit_one_device_or_eight(domains, more):
  config = study_gpu.get_config(','.join(f'domain{i}=/{i}' for i in range(domains)) + more)
  runs = runs_of(config)
  for devices in (jax.devices()[:1], jax.devices()):
    mesh = layout.mesh(config, runs, devices, None)
    for run in runs.values():
      if run.steps:
        layout.check(run, mesh, stacked=False)
  flops = {name: sum(each.flops for each in lineage(run)) for name, run in runs.items()}
  dense = runs['dense/blend']
  for name, run in runs.items():
    if name.startswith(('dense/', 'sparse/', 'merge/', 'btx/', 'ffn/')) and (
        run.model.num_experts or not name.startswith('ffn/')):
      assert abs(flops[name] - flops['dense/blend']) <= domains * dense.flops / dense.steps, name


def test_rates_has_every_family_at_every_rate():
  config = study_gpu.get_config(f'{TWO},rates')
  runs = runs_of(config)
  for family, name in (('dense', ''), ('diloco', ''), ('sparse', ''), ('finetune', ''),
                       ('expert', '/math'), ('ffn', '/math')):
    assert [runs[f'{family}/{rate}{name}'].optimizer.peak_lr
            for rate in ('3e-4', '1e-3', '3e-3')] == [3e-4, 1e-3, 3e-3]


@pytest.mark.parametrize('form, message', [
    (',', "names 2 folders of a model: ['', '']"),
    (f'{TWO},', "names 1 folders of a model: ['']"),
    (f'/a,{TWO},/b', "names 2 folders of a model: ['/a', '/b']"),
    ('code=/c', "an expert: code. Two or more are needed, and 'general' gets none."),
    ('general=/g', 'an expert: none. Two'),
    ('code=/c,general=/g', 'an expert: code. Two'),
    ('code=/c,math=', "'math' has no path"),
    (f'{TWO},code=/d', "'code' is named twice"),
    ('=/c,math=/m', "'' cannot be the name of a domain"),
    ('../code=/c,math=/m', "'../code' cannot be the name of a domain"),
    ('a code=/c,math=/m', "'a code' cannot be the name of a domain"),
    ('a*=/c,math=/m', "'a*' cannot be the name of a domain"),
    (f'{TWO},steps=3', "'steps=3' is not a number of steps, which is a whole number from 4"),
    (f'{TWO},steps=1e3', "'steps=1e3' is not"),
    (f'{TWO},steps=', "'steps=' is not"),
])
def test_a_form_that_is_not_understood(form, message):
  with pytest.raises(ValueError, match=r'^configs/study_gpu.py:\[MODEL\]') as raised:
    study_gpu.get_config(form)
  assert message in str(raised.value)
