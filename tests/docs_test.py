"""The generated pages in docs/ are up to date, and what they describe is set in one place."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
import yaml

from btx_jax import base, recipe, run
from btx_jax.model import config as model_config
from btx_jax.model import dispatch, routers
from btx_jax.study import compatibility
from docs import generate


@pytest.mark.parametrize('name', generate.PAGES)
def test_pages_are_what_the_source_says(name):
  with open(os.path.join(generate.ROOT, 'docs', name), encoding='utf-8') as file:
    assert file.read() == generate.PAGES[name](), 'run: python docs/generate.py'


def test_every_field_is_on_the_page_with_its_default():
  page = generate.config_page()
  for name, value in base.get_config().to_dict().items():
    fields = value if isinstance(value, dict) else {}
    for field, default in fields.items():
      shown = re.search(rf'^\| `{name}\.{field}` \| `(.+?)` \|', page, re.MULTILINE)
      assert shown and eval(shown[1]) == default
    assert fields or f'| `{name}` |' in page
  for function in (base.domain, base.run, base.random, base.checkpoint, base.mix, base.ensemble):
    assert f'## base.{function.__name__}()' in page


@pytest.mark.parametrize('gone, message', [
    ('      # Rows per step, over all devices, workers and microbatches.\n',
     r'base\.py, line \d+: a field without a comment'),
    ("    eps: Adam's epsilon.\n", r'btx_jax\.run, Optimizer: no text for eps'),
    ('    steps: optimizer steps.\n', r'run\(\): no text for steps'),
])
def test_a_field_or_argument_without_its_text_is_an_error(monkeypatch, gone, message):
  read = generate._read
  monkeypatch.setattr(generate, '_read', lambda path: read(path).replace(gone, ''))
  with pytest.raises(ValueError, match=message):
    generate.config_page()


def test_a_note_on_a_message_that_is_gone_is_an_error(monkeypatch):
  monkeypatch.setitem(generate.NOTES, 'Text', {'no such text': 'A note.'})
  with pytest.raises(ValueError, match="no message has 'no such text'"):
    generate.errors_page()


@pytest.mark.parametrize('section, cls, unset', [
    ('model', model_config.Config, {'num_experts', 'router_bias'}),
    ('optimizer', run.Optimizer, set()), ('train', run.Objective, set())])
def test_a_section_has_the_fields_and_defaults_of_its_dataclass(section, cls, unset):
  fields = {field.name: field.default for field in dataclasses.fields(cls)}
  found = base.get_config().to_dict()[section]
  assert fields.keys() - found.keys() == unset
  for name in fields.keys() & found.keys():
    assert fields[name] in (found[name], dataclasses.MISSING)


@pytest.mark.parametrize('field, choices', [
    ('model.router', model_config.ROUTERS), ('model.dtype', model_config.DTYPES),
    ('model.remat', model_config.REMATS), ('model.attention', model_config.ATTENTIONS),
    ('model.dispatch', model_config.DISPATCHES), ('train.loss', run.LOSSES),
    ('train.balance_scope', run.BALANCE_SCOPES),
    ('arrangement', recipe.ARRANGEMENTS), ('allow', compatibility.COSTS)])
def test_every_choice_of_a_field_is_described(field, choices):
  row, *_ = re.findall(rf'^\| `{re.escape(field)}` \|.*', generate.config_page(), re.MULTILINE)
  assert {choice for choice in choices if f"'{choice}'" not in row} == set()


def test_every_choice_of_a_router_and_a_dispatch_is_computed():
  assert set(routers.ROUTERS) == set(model_config.ROUTERS)
  assert {'auto', *dispatch.FORMS} == set(model_config.DISPATCHES)


def test_a_config_is_made_without_jax():
  code = 'import sys; from btx_jax import base; base.get_config(); assert "jax" not in sys.modules'
  subprocess.run([sys.executable, '-c', code], cwd=generate.ROOT, check=True)


def test_the_citation_has_the_version_of_the_package():
  def read(name):
    with open(os.path.join(generate.ROOT, name), encoding='utf-8') as file:
      return file.read()
  citation = yaml.safe_load(read('CITATION.cff'))
  assert {'cff-version', 'message', 'title', 'authors'} <= citation.keys()
  assert f'\nversion = "{citation["version"]}"\n' in read('pyproject.toml')
