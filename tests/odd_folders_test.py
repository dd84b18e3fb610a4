"""Model folders as people really have them, see odd_folders.py."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from btx_jax.convert import export, finite, generation, hugging_face, safetensors
from btx_jax.convert.generation import Generation
from btx_jax.errors import UsageError
from tests import odd_folders

POINTER = b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 538090408\n'


def assert_same(found, expected):
  """Both folders have the same parameters, bit for bit."""
  assert found.shapes == expected.shapes
  for path in found.shapes:
    values = found.read(path)
    assert values.dtype == found.dtypes[path] == np.float32
    np.testing.assert_array_equal(values, expected.read(path), path)


def write(folder, source, dtype='float32', **options):
  given = {'max_length': 64, 'balance_loss': 0.01, 'bos_id': 1, 'eos_id': 2, 'tokenizer_files': {},
           'card': ''} | options
  export.export(str(folder), source.model, source, dtype, **given)
  return hugging_face.Folder(str(folder))


# The same model, stored otherwise


@pytest.mark.parametrize('name', odd_folders.SAME)
def test_an_odd_folder_is_the_same_model_and_survives_an_export(name, tmp_path):
  odd = odd_folders.SAME[name]
  found = hugging_face.Folder(odd_folders.make(tmp_path / 'odd', odd))
  expected = hugging_face.Folder(odd_folders.plain(tmp_path / 'plain', odd.plain))
  assert found.model == dataclasses.replace(odd.plain, **odd.model)
  assert_same(found, expected)
  again = write(tmp_path / 'again', found)
  assert again.model == found.model
  assert_same(again, expected)


def test_a_rotary_type_of_null_is_the_default(tmp_path):
  """transformers refuses such a folder, so nothing contradicts this."""
  for i, key in enumerate(('type', 'rope_type')):
    odd = odd_folders.Odd(config={'rope_scaling': {key: None}})
    assert hugging_face.Folder(
        odd_folders.make(tmp_path / str(i), odd)).model == odd_folders.MODEL


def test_linear_scaling_is_exported_for_transformers_4_and_5(tmp_path):
  odd = odd_folders.SAME['linear']
  write(tmp_path / 'out', hugging_face.Folder(odd_folders.make(tmp_path / 'odd', odd)))
  found = json.loads((tmp_path / 'out' / 'config.json').read_text())
  linear = {'rope_type': 'linear', 'factor': 4.0}
  assert found['rope_scaling'] == linear
  assert found['rope_parameters'] == linear | {'rope_theta': 10_000.0}


@pytest.mark.parametrize('name', odd_folders.MADE_UP)
def test_what_transformers_would_make_up_is_refused(name, tmp_path):
  odd, message = odd_folders.MADE_UP[name]
  with pytest.raises(UsageError) as error:
    hugging_face.Folder(odd_folders.make(tmp_path / 'odd', odd))
  assert message in str(error.value)


def test_a_parameter_that_is_stored_twice_is_refused(tmp_path):
  name = 'layers.0.mlp.up_proj.weight'
  odd = odd_folders.Odd(tensors=lambda tensors: tensors | {name: -tensors[f'model.{name}']})
  with pytest.raises(UsageError, match=f'{name} and model.{name} are the same parameter'):
    hugging_face.Folder(odd_folders.make(tmp_path / 'odd', odd))


@pytest.mark.parametrize('file', ['config.json', 'model.safetensors'])
def test_git_lfs_pointers_are_refused_by_name(file, tmp_path):
  odd_folders.plain(tmp_path / 'plain')
  (tmp_path / 'plain' / file).write_bytes(POINTER)
  with pytest.raises(UsageError, match=rf'plain/{file} is a Git LFS pointer.* run git lfs pull'):
    hugging_face.Folder(str(tmp_path / 'plain'))


# Numbers that are not finite

UP = 'model.layers.1.mlp.up_proj.weight'


def broken(folder, value, dtype, at=-1):
  """A folder with one number that is not finite."""
  def change(tensors):
    tensors = {each: x.astype(dtype) for each, x in tensors.items()}
    tensors[UP].flat[at] = value
    return tensors

  return hugging_face.Folder(odd_folders.make(folder, odd_folders.Odd(tensors=change)))


@pytest.mark.parametrize('value', [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_numbers_that_are_not_finite_are_found_when_they_are_read(value, dtype, tmp_path):
  found = broken(tmp_path / 'odd', value, dtype)
  message = rf'odd: {UP} has numbers that are not finite'
  with pytest.raises(UsageError, match=message):
    found.read('layers/ffn/up')
  with pytest.raises(UsageError, match=message):
    found.read('layers/ffn/up', (slice(1, 2), slice(15, 16), slice(19, 20)))
  found.read('layers/ffn/up', (slice(0, 1),))
  found.read('layers/ffn/gate')


def test_a_float64_beyond_float32_is_found(tmp_path):
  with pytest.raises(UsageError, match='has numbers that are not finite'):
    broken(tmp_path / 'odd', 1e300, np.float64).read('layers/ffn/up')


@pytest.mark.parametrize('dtype', [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)])
def test_the_largest_and_smallest_numbers_are_finite(dtype, tmp_path):
  for i, sign in enumerate((1, -1)):
    limits = ml_dtypes.finfo(dtype)
    for j, value in enumerate((limits.max, limits.tiny, limits.smallest_subnormal, 0)):
      broken(tmp_path / f'{i}{j}', sign * value, dtype).read('layers/ffn/up')


@pytest.mark.parametrize('at', [0, 157, -1])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_numbers_that_are_not_finite_are_found_when_they_are_copied(
    dtype, at, tmp_path, monkeypatch):
  """In whichever block of the tensor they are; also one that is cut by the block."""
  monkeypatch.setattr(finite, '_BLOCK', 30)
  monkeypatch.setattr(safetensors, '_COPIED', 200)
  found = broken(tmp_path / 'odd', np.nan, export.DTYPES[dtype], at)
  monkeypatch.setattr(hugging_face.Folder, 'read', None)  # everything is copied
  with pytest.raises(UsageError, match=rf'odd/model\.safetensors: {UP} has numbers that are not'):
    write(tmp_path / 'out', found, dtype)
  assert not (tmp_path / 'out').exists()


# Generating


@pytest.mark.parametrize('files, expected', [
    ({}, Generation({}, ())),
    ({'config.json': {'eos_token_id': 2}}, Generation({}, (2,))),
    ({'config.json': {'eos_token_id': None}, generation.FILE: {'eos_token_id': [3, 4, 3]}},
     Generation({'eos_token_id': [3, 4, 3]}, (3, 4))),
    ({'config.json': {'eos_token_id': [2, 9]}, generation.FILE: {'eos_token_id': 9}},
     Generation({'eos_token_id': 9}, (9, 2))),
    ({'config.json': {'eos_token_id': '2'}}, Generation({}, ())),
    ({'config.json': {'eos_token_id': [True, -1, 5]}}, Generation({}, (5,))),
])
def test_stop_tokens_of_a_folder(files, expected, tmp_path):
  for name, content in files.items():
    (tmp_path / name).write_text(json.dumps(content))
  assert generation.read(str(tmp_path)) == expected


def test_a_chat_model_still_stops_after_an_export(tmp_path):
  folder = hugging_face.Folder(odd_folders.plain(tmp_path / 'chat'))
  settings = {'bos_token_id': 1, 'eos_token_id': [7, 2], 'pad_token_id': 7, 'temperature': 0.6,
              'do_sample': True, 'transformers_version': '4.40', '_from_model_config': True}
  (tmp_path / 'chat' / generation.FILE).write_text(json.dumps(settings))
  write(tmp_path / 'out', folder, eos_id=5, descends_from=generation.read(folder.path))
  assert json.loads((tmp_path / 'out' / generation.FILE).read_text()) == {
      'bos_token_id': 1, 'eos_token_id': [7, 2, 5], 'pad_token_id': 7, 'temperature': 0.6,
      'do_sample': True}
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())['eos_token_id'] == [7, 2, 5]


def test_a_mixture_stops_where_any_of_its_models_does():
  found = [Generation({'temperature': 0.6}, (2,)), Generation({}, (7, 2)), Generation({}, (9,))]
  assert generation.combine(found) == Generation({'temperature': 0.6}, (2, 7, 9))
  assert generation.combine([]) == generation.UNKNOWN
