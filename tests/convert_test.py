"""Hugging Face folders in and out; fixtures/make.py made those here, with transformers."""

import json
import os
import pathlib
import shutil
import tracemalloc

import jax
import numpy as np
import pytest

from btx_jax.convert import config_json, export, hugging_face, names, safetensors, shards
from btx_jax.devices import sharding
from btx_jax.errors import RunError, UsageError
from btx_jax.model import llama
from btx_jax.model.config import Config
from tests.helpers import Arrays, hidden_and_sums, random_params

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
KINDS = ('llama2', 'llama3', 'mixtral', 'qwen2', 'qwen3', 'mixtral_fused')


@pytest.fixture(scope='module')
def folders():
  return {kind: hugging_face.Folder(str(FIXTURES / kind)) for kind in KINDS}


def tree_of(source, dtype=np.float32):
  """All parameters of a source as nested dicts."""
  tree = {}
  for path in source.shapes:
    *above, last = path.split('/')
    place = tree
    for key in above:
      place = place.setdefault(key, {})
    place[last] = source.read(path, ()).astype(dtype)
  return tree


def write_folder(folder, model, source, dtype='float32', **options):
  given = {'max_length': 64, 'balance_loss': 0.01, 'bos_id': 1, 'eos_id': 2, 'tokenizer_files': {},
           'card': 'A card.'} | options
  export.export(str(folder), model, source, dtype, **given)
  return hugging_face.Folder(str(folder))


def assert_same(source, other):
  """Both have the same parameters, bit for bit."""
  assert source.shapes == other.shapes
  for path in source.shapes:
    assert source.dtypes[path] == other.dtypes[path] == source.read(path, ()).dtype
    np.testing.assert_array_equal(source.read(path, ()), other.read(path, ()), path)


# Models


@pytest.mark.parametrize('kind', KINDS[:-1])
def test_logits_are_those_of_transformers(folders, kind):
  expected = np.load(FIXTURES / kind / 'expected.npz')
  params, tokens = tree_of(folders[kind]), expected['tokens']
  hidden, _ = hidden_and_sums(folders[kind].model, params, {
      'tokens': tokens, 'segment_ids': np.ones_like(tokens),
      'positions': np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)})
  logits = hidden @ llama.output_head(jax.tree.map(jax.numpy.asarray, params))
  np.testing.assert_allclose(logits, expected['logits'], rtol=0, atol=2e-4)


def test_shapes_are_those_of_our_model(folders):
  for folder in folders.values():
    like = jax.eval_shape(lambda m=folder.model: llama.init(m, jax.random.key(0)))
    paths = {jax.tree_util.keystr(path, simple=True, separator='/'): leaf.shape
             for path, leaf in jax.tree.leaves_with_path(like)}
    assert folder.shapes == paths


def test_both_layouts_of_mixtral_are_the_same_model(folders):
  assert folders['mixtral'].model == folders['mixtral_fused'].model
  assert_same(folders['mixtral'], folders['mixtral_fused'])
  assert folders['mixtral'].hash != folders['mixtral_fused'].hash


@pytest.mark.parametrize('kind', KINDS)
def test_any_slice_is_that_slice_of_the_whole(folders, kind):
  rng, folder = np.random.default_rng(0), folders[kind]
  for path, shape in folder.shapes.items():
    whole = folder.read(path, ())
    for _ in range(4):
      cuts = [sorted(rng.integers(0, size + 1, 2)) for size in shape]
      index = tuple(slice(int(a), int(b)) for a, b in cuts)
      np.testing.assert_array_equal(folder.read(path, index), whole[index], path)


@pytest.mark.parametrize('kind', KINDS)
def test_a_model_survives_export_and_import(folders, kind, tmp_path):
  folder = folders[kind]
  dtype = str(folder.dtypes['embed'])
  again = write_folder(tmp_path / 'out', folder.model, folder, dtype, max_shard=4_000)
  assert again.model == folder.model
  assert_same(again, folder)
  assert len(list((tmp_path / 'out').glob('*.safetensors'))) > 2
  alone = write_folder(tmp_path / 'one', folder.model, Arrays(tree_of(folder)), dtype)
  assert_same(alone, folder)
  if kind == 'llama2':  # float32 in bfloat16
    rounded = write_folder(tmp_path / 'half', folder.model, folder, 'bfloat16')
    for path in folder.shapes:
      np.testing.assert_allclose(rounded.read(path).astype(np.float32), folder.read(path),
                                 rtol=2**-8)


def test_large_tensors_are_written_in_pieces(folders, tmp_path, monkeypatch):
  monkeypatch.setattr(export, '_PIECE', 100)
  read = []

  class Recorded(Arrays):

    def read(self, path, index):
      values = super().read(path, index)
      read.append(values.nbytes)
      return values

  folder = folders['mixtral']
  assert_same(write_folder(tmp_path / 'out', folder.model, Recorded(tree_of(folder))), folder)
  assert max(read) <= 4 * 6 * 16  # one head of one layer, or 100 bytes


def test_an_exported_config_suits_transformers_4_and_5(folders, tmp_path):
  write_folder(tmp_path / 'out', folders['llama3'].model, folders['llama3'], tokenizer_files={
      'tokenizer.json': b'{}'})
  found = json.loads((tmp_path / 'out' / 'config.json').read_text())
  original = json.loads((FIXTURES / 'llama3' / 'config.json').read_text())
  for key in ('architectures', 'head_dim', 'tie_word_embeddings', 'num_key_value_heads',
              'rope_parameters', 'max_position_embeddings', 'rms_norm_eps', 'vocab_size'):
    assert found[key] == original[key]
  old = {k: v for k, v in found.items() if k not in ('rope_parameters', 'dtype')}
  new = {k: v for k, v in found.items() if k not in ('rope_theta', 'rope_scaling', 'torch_dtype')}
  for each in (old, new):
    assert config_json.from_json(each, '') == folders['llama3'].model
  assert (tmp_path / 'out' / 'tokenizer.json').read_bytes() == b'{}'
  assert (tmp_path / 'out' / 'README.md').read_text() == 'A card.'
  write_folder(tmp_path / 'mixture', folders['mixtral'].model, folders['mixtral'],
               balance_loss=0.02)
  found = json.loads((tmp_path / 'mixture' / 'config.json').read_text())
  assert (found['output_router_logits'], found['router_aux_loss_coef']) == (False, 0.02)
  assert (found['num_local_experts'], found['num_experts_per_tok']) == (4, 2)


def test_an_interrupted_export_leaves_no_folder(folders, tmp_path):
  folder = folders['llama2']

  class Killed(Arrays):

    def read(self, path, index):
      if path == 'norm/scale':
        raise KeyboardInterrupt
      return super().read(path, index)

  with pytest.raises(KeyboardInterrupt):
    write_folder(tmp_path / 'out', folder.model, Killed(tree_of(folder)))
  assert not (tmp_path / 'out').exists()
  assert_same(write_folder(tmp_path / 'out', folder.model, folder), folder)
  assert os.listdir(tmp_path) == ['out']
  with pytest.raises(UsageError, match='already exists'):
    write_folder(tmp_path / 'out', folder.model, folder)


def test_without_a_tokenizer_the_special_tokens_are_null(folders, tmp_path):
  """Not absent: transformers would assume the ids 1 and 2 of Llama's own tokenizer."""
  folder = folders['llama2']
  again = write_folder(tmp_path / 'out', folder.model, folder, bos_id=None, eos_id=None)
  assert_same(again, folder)
  for name in ('config.json', 'generation_config.json'):
    found = json.loads((tmp_path / 'out' / name).read_text())
    assert {found[key] for key in ('bos_token_id', 'eos_token_id')} == {None}
  assert not list((tmp_path / 'out').glob('tokenizer*'))


QWEN_2, QWEN_3, MIXED = {'qkv_bias': True}, {'qk_norm': True}, {'num_experts': 4, 'top_k': 2}


@pytest.mark.parametrize('fields', [
    QWEN_2 | {'router': 'softmax_top_k'}, QWEN_3, QWEN_3 | {'top_k': 3, 'tied_head': True}])
def test_a_mixture_of_qwen_survives_export_and_import(tmp_path, fields):
  model = Config(48, 16, 20, 2, 4, 2, num_experts=4, **({'top_k': 2} | fields))
  params = random_params(model)
  again = write_folder(tmp_path / 'out', model, Arrays(params))
  assert again.model == model
  assert again.kind == config_json.kind_of(model)
  for path, leaf in jax.tree.leaves_with_path(params):
    np.testing.assert_array_equal(again.read(sharding.path_of(path)), leaf)


def test_a_mixture_with_a_real_shared_expert_is_refused(tmp_path):
  model = Config(48, 16, 20, 2, 4, 2, num_experts=4, top_k=2, qkv_bias=True)
  write_folder(tmp_path / 'out', model, Arrays(random_params(model)))
  name = 'model.layers.1.mlp.shared_expert.down_proj.weight'
  edit(tmp_path / 'out', lambda tensors: tensors.update({name: tensors[name] + 1}))
  with pytest.raises(UsageError, match=rf'{name} is not zero: .* every token takes'):
    hugging_face.Folder(str(tmp_path / 'out'))
  edit(tmp_path / 'out', lambda tensors: tensors.pop(name))
  with pytest.raises(UsageError, match=f'missing: {name}'):  # transformers would make it up
    hugging_face.Folder(str(tmp_path / 'out'))


@pytest.mark.parametrize('origin, fields, expected', [
    ('', {}, 'llama'), ('mistral', {}, 'mistral'), ('', QWEN_2, 'qwen2'), ('', QWEN_3, 'qwen3'),
    ('qwen2', MIXED, 'mixtral'), ('', QWEN_2 | MIXED, 'qwen2_moe'),
    ('mistral', QWEN_3 | MIXED, 'qwen3_moe'),
    ('', MIXED | {'router': 'softmax_top_k'}, 'qwen2_moe'),
    ('', QWEN_2 | QWEN_3, 'model.qkv_bias and model.qk_norm cannot be exported')])
def test_a_model_is_exported_as_what_it_is(tmp_path, origin, fields, expected):
  model = Config(48, 16, 20, 2, 4, 4, **fields)
  if ' ' in expected:
    with pytest.raises(UsageError, match=expected):
      config_json.kind_of(model, origin)
    return
  again = write_folder(tmp_path / 'out', model, Arrays(random_params(model)), origin=origin)
  assert again.kind == expected
  assert again.model == model


@pytest.mark.parametrize('fields, expected', [
    ({}, 2), ({'top_k': 3}, 3), ({'router': 'soft'}, 4),
    ({'router': 'softmax_top_k', 'top_k': 4}, 4), ({'router_bias': True, 'top_k': 4}, 4),
    (QWEN_2 | {'router': 'softmax_top_k'}, 2),
    (QWEN_3 | {'router': 'switch'}, "transformers' mixtures have the gates of"),
    ({'router': 'softmax_top_k'}, 2),
    ({'router': 'switch'}, "model.router = 'switch'"),
    ({'router': 'sample_top_1'}, "'sample_top_1'"), ({'router': 'hash'}, "'hash'"),
    ({'router_bias': True}, 'has a bias cannot be exported'),
])
def test_only_gates_that_transformers_has_are_exported(fields, expected):
  model = Config(48, 16, 20, 2, 4, 4, num_experts=4, **fields)
  if isinstance(expected, int):
    written = config_json.to_json(model, 'float32', 64, 0.01, 1, 2)
    assert written['num_experts_per_tok'] == expected
  else:
    with pytest.raises(UsageError, match=expected):
      config_json.kind_of(model)


# config.json

LLAMA = {'model_type': 'llama', 'vocab_size': 48, 'hidden_size': 16, 'intermediate_size': 20,
         'num_hidden_layers': 2, 'num_attention_heads': 4}


@pytest.mark.parametrize('found, expected', [
    (LLAMA, Config(48, 16, 20, 2, 4, 4, norm_eps=1e-6)),
    (LLAMA | {'rope_theta': 1e6, 'rope_scaling': None, 'rms_norm_eps': 1e-5,  # CodeLlama
              'torch_dtype': 'bfloat16'}, Config(48, 16, 20, 2, 4, 4, rope_theta=1e6)),
    (LLAMA | {'num_key_value_heads': 2, 'head_dim': 6, 'tie_word_embeddings': True,
              'rope_theta': 500000, 'max_position_embeddings': 131072,  # Llama 3.2
              'rope_scaling': {'rope_type': 'llama3', 'factor': 32.0, 'low_freq_factor': 1.0,
                               'high_freq_factor': 4.0,
                               'original_max_position_embeddings': 8192}},
     Config(48, 16, 20, 2, 4, 2, head_dim=6, tied_head=True, rope_theta=5e5, rope_factor=32.0,
            norm_eps=1e-6)),
    (LLAMA | {'model_type': 'mistral', 'sliding_window': None, 'num_key_value_heads': 2},
     Config(48, 16, 20, 2, 4, 2, norm_eps=1e-6)),
    (LLAMA | {'model_type': 'mistral', 'num_key_value_heads': 2, 'max_position_embeddings': 4096},
     Config(48, 16, 20, 2, 4, 2, norm_eps=1e-6)),
    (LLAMA | {'model_type': 'mixtral', 'num_key_value_heads': 2, 'num_local_experts': 6,
              'num_experts_per_tok': 3},
     Config(48, 16, 20, 2, 4, 2, rope_theta=1e6, num_experts=6, top_k=3)),
])
def test_configs_of_several_families(found, expected):
  assert config_json.from_json(found, 'config.json') == expected


@pytest.mark.parametrize('change, named', [
    ({'model_type': 'gemma2'}, "model_type = 'gemma2'"),
    ({'architectures': ['LlamaForSequenceClassification']}, 'LlamaForSequenceClassification'),
    ({'attention_bias': True}, 'attention_bias'),
    ({'mlp_bias': True}, 'mlp_bias'),
    ({'model_type': ['llama']}, "model_type = ['llama']"),
    ({'architectures': 3}, 'architectures = [3]'),
    ({'rope_parameters': {'full_attention': {'rope_type': 'linear', 'factor': 4}}}, 'of several'),
    ({'model_type': 'qwen2', 'num_key_value_heads': 4, 'max_window_layers': None,
      'use_sliding_window': True}, 'sliding_window = 4096'),
    ({'model_type': 'qwen3', 'num_key_value_heads': 4, 'layer_types': ['sliding_attention']},
     'sliding_window = 4096'),
    ({'hidden_act': 'gelu'}, "hidden_act = 'gelu'"),
    ({'model_type': 'mistral', 'num_key_value_heads': 4}, 'sliding_window = 4096'),
    ({'model_type': 'mixtral', 'num_key_value_heads': 2, 'sliding_window': 512},
     'sliding_window = 512'),
    ({'model_type': 'mistral', 'num_key_value_heads': 4, 'sliding_window': 512,
      'use_sliding_window': False}, 'sliding_window = 512'),  # which Mistral does not read
    ({'max_position_embeddings': None}, 'max_position_embeddings = None'),
    ({'rope_scaling': {'type': 'linear'}}, 'rope factor = None'),
    ({'rope_scaling': {'type': 'linear', 'factor': 0}}, 'model.rope_factor = 0.0 must be positive'),
    ({'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, "rope_type = 'dynamic'"),
    ({'rope_scaling': {'type': 'yarn', 'factor': 1.0, 'attention_factor': 1.2}}, "'yarn'"),
    ({'rope_scaling': 'linear4'}, "rope_type = 'linear4'"),
    ({'architectures': ['LlavaLlamaForCausalLM']}, 'LlavaLlamaForCausalLM'),
    ({'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e4}}, "rope_type = 'yarn'"),
    ({'rope_parameters': {'partial_rotary_factor': 0.5, 'rope_theta': 1e4}}, 'partial_rotary'),
    ({'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, 'rope low_freq_factor = None'),
    ({'quantization_config': {'quant_method': 'gptq'}}, 'quantization_config'),
    ({'hidden_size': None}, 'hidden_size = None'),
    ({'vocab_size': '48'}, "vocab_size = '48'"),
    ({'num_key_value_heads': 3}, 'is not a multiple of'),
])
def test_models_that_cannot_be_represented(change, named):
  with pytest.raises(UsageError) as error:
    config_json.from_json(LLAMA | change, 'config.json')
  assert named in str(error.value)


# Folders


def copy(kind, tmp_path):
  return pathlib.Path(shutil.copytree(FIXTURES / kind, tmp_path / kind))


def edit(folder, change, name='model.safetensors'):
  """Rewrites a file after `change` has edited its tensors, name -> array, in place."""
  file = safetensors.File(str(folder / name))
  tensors = {tensor: file.read(tensor) for tensor in file.tensors}
  change(tensors)
  write_tensors(folder / name, tensors)


def write_tensors(path, tensors):
  with safetensors.Writer(str(path), {k: (v.shape, v.dtype) for k, v in tensors.items()}) as out:
    for tensor, values in tensors.items():
      out.write(tensor, values)


def test_every_wrong_tensor_is_named_at_once(tmp_path):
  folder = copy('mixtral', tmp_path)

  def change(tensors):
    del tensors['lm_head.weight']
    tensors['model.layers.0.self_attn.q_proj.bias'] = np.zeros(16, np.float32)
    tensors['model.layers.1.self_attn.rotary_emb.inv_freq'] = np.zeros(2, np.float32)
    tensors['model.norm.weight'] = np.zeros(20, np.float32)

  edit(folder, change)
  with pytest.raises(UsageError) as error:
    hugging_face.Folder(str(folder))
  lines = str(error.value).splitlines()[1:]
  assert lines == ['  missing: lm_head.weight',
                   '  unknown: model.layers.0.self_attn.q_proj.bias',
                   '  wrong: model.norm.weight [20], not [16]']


def test_redundant_tensors_are_ignored(folders, tmp_path):
  folder = copy('llama3', tmp_path)

  def change(tensors):
    tensors['model.layers.1.self_attn.rotary_emb.inv_freq'] = np.zeros(2, np.float32)
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']

  edit(folder, change)
  assert_same(hugging_face.Folder(str(folder)), folders['llama3'])
  edit(folder, lambda tensors: tensors.update({
      'lm_head.weight': -tensors['model.embed_tokens.weight']}))
  with pytest.raises(UsageError, match=r'lm_head\.weight is not the embedding'):
    hugging_face.Folder(str(folder))


def test_layers_of_several_dtypes_are_read_as_float32(folders, tmp_path):
  folder = copy('mixtral', tmp_path)
  name = 'model.layers.1.input_layernorm.weight'
  edit(folder, lambda tensors: tensors.update({name: tensors[name].astype(np.float16)}))
  changed = hugging_face.Folder(str(folder))
  assert changed.read('layers/attn_norm/scale').dtype == np.float32
  np.testing.assert_allclose(changed.read('layers/attn_norm/scale'),
                             folders['mixtral'].read('layers/attn_norm/scale'), rtol=2**-10)


def test_the_hash_depends_on_the_model_and_not_on_its_place(folders, tmp_path):
  folder = copy('mixtral', tmp_path)
  assert hugging_face.Folder(str(folder)).hash == folders['mixtral'].hash
  edit(folder, lambda tensors: tensors.update({
      'model.norm.weight': 1.01 * tensors['model.norm.weight'].astype(np.float32)}))
  assert hugging_face.Folder(str(folder)).hash != folders['mixtral'].hash


def reindex(folder, **changes):
  path = folder / 'model.safetensors.index.json'
  index = json.loads(path.read_text())
  index['weight_map'].update(changes)
  path.write_text(json.dumps(index))


@pytest.mark.parametrize('harm, message', [
    (lambda f: os.remove(f / 'model-00002-of-00002.safetensors'),
     'model-00002-of-00002.safetensors does not exist'),
    (lambda f: reindex(f, more='../llama2/model-00001-of-00002.safetensors'),
     "'../llama2/model-00001-of-00002.safetensors' is not a file of this folder"),
    (lambda f: reindex(f, more='/etc/passwd'), "'/etc/passwd' is not a file of this folder"),
    (lambda f: reindex(f, more='..'), "'..' is not a file of this folder"),
    (lambda f: reindex(f, more='model-00001-of-00002.safetensors'),
     'more is not in model-00001-of-00002.safetensors'),
    (lambda f: edit(f, lambda t: t.update(more=np.zeros(2, np.float32)),
                    'model-00001-of-00002.safetensors'),
     'more of model-00001-of-00002.safetensors is not in the index'),
    (lambda f: (f / 'model.safetensors.index.json').write_text('[]'),
     'is not an index of safetensors files'),
    (lambda f: (f / 'model.safetensors.index.json').write_text('{"weight_map": {"a": 3}}'),
     'is not an index of safetensors files'),
    (lambda f: os.remove(f / 'model.safetensors.index.json'), 'it is not a Hugging Face model'),
    (lambda f: [os.remove(f / 'model.safetensors.index.json'),
                (f / 'pytorch_model.bin').write_text('')], 'stores its weights as pickle'),
    (lambda f: os.remove(f / 'config.json'), 'config.json cannot be read as JSON'),
    (lambda f: (f / 'config.json').write_text('[]'), 'it is not an object'),
])
def test_invalid_folders_are_refused(tmp_path, harm, message):
  folder = copy('llama2', tmp_path)
  harm(folder)
  with pytest.raises(UsageError) as error:
    hugging_face.Folder(str(folder))
  assert message in str(error.value)


# Files


def entry(first=0, last=8, dtype='F32', shape=(2,)):
  return {'dtype': dtype, 'shape': list(shape), 'data_offsets': [first, last]}


def raw(header, data=b'\0' * 8, length=None):
  header = header if isinstance(header, bytes) else json.dumps(header).encode()
  return (len(header) if length is None else length).to_bytes(8, 'little') + header + data


@pytest.mark.parametrize('content, problem', [
    (b'', 'it has 0 bytes'),
    (b'\1\2\3', 'it has 3 bytes'),
    (raw({'a': entry()}, length=1 << 40), 'its header should have 1,099,511,627,776 bytes'),
    (raw({'a': entry()}, length=200), 'its header should have 200 bytes'),
    (raw(b'\xff\xff'), 'its header is not UTF-8'),
    (raw(b'{"a": '), 'its header is not JSON'),
    (raw(b'[1]'), 'its header is not a JSON object'),
    (raw(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2)), 'a appears twice'),
    (raw({'a': 5}), 'a lacks a valid dtype, shape and data_offsets'),
    (raw({'a': {'dtype': 'F32', 'shape': [2]}}), 'a lacks a valid dtype, shape'),
    (raw({'a': entry(shape=(-2,))}), 'a lacks a valid dtype, shape'),
    (raw({'a': entry(shape=(True, 2))}), 'a lacks a valid dtype, shape'),
    (raw({'a': entry(first=-8, last=0)}), 'a lacks a valid dtype, shape'),
    (raw({'a': entry(dtype='Q4_1')}), "a has the unknown dtype 'Q4_1'"),
    (raw({'a': entry(dtype=[])}), 'a has the unknown dtype []'),
    (raw({'a': entry(shape=(3,))}), 'a has 8 bytes, which is not F32 x [3]'),
    (raw({'a': entry(), 'b': entry(4, 12)}, b'\0' * 12), 'b overlaps the tensor before it'),
    (raw({'a': entry(), 'b': entry(12, 20)}, b'\0' * 20), 'b has a gap before it'),
    (raw({'a': entry()}, b'\0' * 7), ': it was truncated'),
    (raw({'a': entry()}, b'\0' * 9), 'its tensors end at byte 77, but the file has 78'),
])
def test_invalid_files_are_refused(tmp_path, content, problem):
  (tmp_path / 'x.safetensors').write_bytes(content)
  with pytest.raises(UsageError, match=r'x\.safetensors is not a valid safetensors file') as error:
    safetensors.File(str(tmp_path / 'x.safetensors'))
  assert problem in str(error.value)


def test_tensors_of_other_dtypes_are_not_read(tmp_path):
  path = tmp_path / 'x.safetensors'
  path.write_bytes(raw({'a': entry(dtype='I32'), 'b': entry(8, 16)}, b'\0' * 16))
  file = safetensors.File(str(path))
  np.testing.assert_array_equal(file.read('b'), [0, 0])
  with pytest.raises(ValueError, match='a has dtype I32'):
    file.read('a')
  path.write_bytes(path.read_bytes()[:-4])
  with pytest.raises(RunError, match='has become shorter'):
    file.read('b')


@pytest.mark.parametrize('small', [0, 1 << 16])
def test_slices_of_files(tmp_path, monkeypatch, small):
  """Slices written and read, by runs and by the rows around them, equal NumPy's."""
  monkeypatch.setattr(safetensors, '_SMALL_RUN', small)
  monkeypatch.setattr(safetensors, 'PIECE', 100)
  rng, path = np.random.default_rng(0), str(tmp_path / 'x.safetensors')
  tensors = {'a': rng.normal(size=(5, 6, 7)).astype(np.float32), 'b': np.float32(3).reshape(()),
             'c': np.zeros((0, 4), np.float16), 'd': rng.normal(size=9).astype(np.float16)}
  with safetensors.Writer(path, {k: (v.shape, v.dtype) for k, v in tensors.items()}) as writer:
    for name in 'bcd':
      writer.write(name, tensors[name])
    for i in range(6):
      index = (slice(None), slice(i, i + 1))
      writer.write('a', tensors['a'][index], index)
  file = safetensors.File(path)
  for name, values in tensors.items():
    np.testing.assert_array_equal(file.read(name), values)
  for _ in range(50):
    cuts = [sorted(rng.integers(0, size + 1, 2)) for size in (5, 6, 7)]
    index = tuple(slice(int(a), int(b)) for a, b in cuts)[:rng.integers(0, 4)]
    np.testing.assert_array_equal(file.read('a', index), tensors['a'][index])
  np.testing.assert_array_equal(
      file.read('a', (slice(3, 5), slice(2, 7)), view=(6, 7, 5)),
      tensors['a'].reshape(6, 7, 5)[3:5, 2:7])


def test_a_slice_takes_the_memory_of_the_slice(tmp_path):
  path, size = str(tmp_path / 'x.safetensors'), 4000
  with safetensors.Writer(path, {'a': ((size, size), np.float32)}) as writer:  # 64 MB
    for i in range(0, size, 500):
      writer.write('a', np.full((500, size), i, np.float32), (slice(i, i + 500),))
  file = safetensors.File(path)
  for index in ((slice(1000, 1050),), (slice(None), slice(100, 150))):
    tracemalloc.start()
    values = file.read('a', index)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < values.nbytes + 1.2 * safetensors.PIECE
  np.testing.assert_array_equal(values[:, 0], np.arange(size) // 500 * 500)


def test_an_unfinished_file_is_removed(tmp_path):
  path = str(tmp_path / 'x.safetensors')
  for error, fails in ((ValueError, False), (KeyboardInterrupt, True)):
    with pytest.raises(error), safetensors.Writer(path, {'a': ((4,), np.float32)}) as writer:
      writer.write('a', np.zeros(2, np.float32), (slice(0, 2),))
      if fails:
        raise KeyboardInterrupt
  assert not os.listdir(tmp_path)


def test_a_tensor_longer_than_a_shard_has_a_file_of_its_own(tmp_path):
  tensors = {name: np.full(size, size, np.float32) for name, size in
             (('a', 2), ('b', 3), ('c', 9), ('d', 1), ('e', 1))}
  shards.write(str(tmp_path), {k: v.shape for k, v in tensors.items()}, np.dtype(np.float32),
               lambda name: [(tensors[name], (), tensors[name].shape)], max_bytes=20)
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())['weight_map']
  assert [name[6:11] for name in index.values()] == ['00001', '00001', '00002', '00003', '00003']
  found = shards.Shards(str(tmp_path))
  for name, values in tensors.items():
    np.testing.assert_array_equal(found.read(name), values)


def test_no_name_stands_for_two_tensors():
  for model in (Config(48, 16, 20, 3, 4, 2, head_dim=6),
                Config(48, 16, 20, 3, 4, 2, qkv_bias=True, qk_norm=True, num_experts=5)):
    size = names.sizes(model)
    for table in (names.rows(model, layout) for layout in (names.MIXTRAL, names.QWEN)):
      for row in table:
        assert sorted(row.theirs.replace(' ', '')) == sorted(names.tensor_dims(row))
      found = [name for row in table for name, _ in names.tensors_of(row, size)]
      assert len(found) == len(set(found))
