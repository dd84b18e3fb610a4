"""The pages in docs/ that are made from the source are what the source says now."""

import os

import pytest

from docs import generate


@pytest.mark.parametrize('name', generate.PAGES)
def test_pages_are_what_the_source_says(name):
  with open(os.path.join(generate.ROOT, 'docs', name), encoding='utf-8') as file:
    assert file.read() == generate.PAGES[name](), 'run: python docs/generate.py'


def test_every_field_is_on_the_page():
  from btx_jax import base
  page = generate.config_page()
  for name, value in base.get_config().items():
    fields = [f'{name}.{field}' for field in value] if hasattr(value, 'keys') else []
    for field in fields or [name]:
      assert f'| `{field}` |' in page
  for function in (base.domain, base.run, base.random, base.checkpoint, base.mix):
    assert f'## base.{function.__name__}()' in page


@pytest.mark.parametrize('gone, message', [
    ("      # Adam's epsilon.\n", r'base\.py, line \d+: a field without a comment'),
    ('    steps: of the optimizer.\n', r'run\(\): no text for steps'),
])
def test_a_field_or_argument_without_its_text_is_an_error(monkeypatch, gone, message):
  read = generate._read
  monkeypatch.setattr(generate, '_read', lambda path: read(path).replace(gone, ''))
  with pytest.raises(ValueError, match=message):
    generate.config_page()
