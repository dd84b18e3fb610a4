"""Tokenizers as people have them: text comes back or that is said, and documents are framed."""

import json
import random
import unicodedata

import numpy as np
import pytest

from btx_jax.data import corpora, framing, mixture, tokenizer, tokens
from btx_jax.errors import UsageError
from btx_jax.library import tokenizer_files
from btx_jax.study import compatibility
from tests import make_tokenizers as make
from tests.make_tokenizers import MARK, byte_level, load, space_marks, template

EDGES = [' lead', '  two', f'{MARK}', f' {MARK}', f'a {MARK}b{MARK}{MARK}', f'\ue000{MARK}', '\n x',
         ' ', '', '<s>', 'a<|im_start|>b', '\x00']


# Text comes back


@pytest.mark.parametrize('kind', make.LOSSLESS)
def test_any_text_comes_back(tmp_path, kind):
  found = load(tmp_path, make.LOSSLESS[kind]())
  rng = random.Random(0)
  texts = EDGES + [make.random_text(rng) for _ in range(300)]
  ids = found.encode(texts)
  assert [found.decode(each) for each in ids] == texts
  assert [found.spell(each) for each in ids] == [text.encode() for text in texts]
  assert ids[:20] == [found.encode([text])[0] for text in texts[:20]]


@pytest.mark.parametrize('scheme', ['first', 'always', 'prepend'])
def test_the_ids_are_sentencepieces(tmp_path, scheme):
  """However transformers saved the same tokenizer."""
  ours = load(tmp_path / 'sp', make.sentencepiece_model())
  theirs = load(tmp_path / scheme, space_marks(scheme))
  rng = random.Random(1)
  texts = EDGES + [make.random_text(rng) for _ in range(300)]
  assert theirs.encode(texts) == ours.encode(texts)
  assert ours.encode([' the'])[0] != ours.encode(['the'])[0]


@pytest.mark.parametrize('kind', ['Metaspace first', 'Prepend and Replace', 'byte-level'])
def test_no_decoder_is_needed(tmp_path, kind):
  found = load(tmp_path, {**make.LOSSLESS[kind](), 'decoder': None})
  assert [found.decode(ids) for ids in found.encode(EDGES)] == EDGES


def test_a_metaspace_of_older_versions_puts_a_space_always(tmp_path):
  older = {'type': 'Metaspace', 'replacement': MARK, 'str_rep': MARK, 'add_prefix_space': True,
           'split': False}
  found = load(tmp_path / 'older', {**space_marks('never'), 'pre_tokenizer': older})
  assert found.encode(EDGES) == load(tmp_path / 'newer', space_marks('always')).encode(EDGES)


# Text that is changed


def prepared(tmp_path, found, texts, held_out=0.3, max_skipped=0.1):
  path = tmp_path / 'text.jsonl'
  path.write_text('\n'.join(json.dumps({'text': text}) for text in texts))
  folder = str(tmp_path / 'tokens')
  meta = tokens.prepare(folder, corpora.Domain('some', paths=(str(path),)), found, held_out,
                        max_skipped)
  return meta, *(tokens.load(folder, split) for split in tokens.SPLITS)


def documents_of(part, found):
  return [found.decode(part.ids[a:b].tolist()) for a, b in zip(part.starts, part.starts[1:])]


NFC, NFKC = {'type': 'NFC'}, {'type': 'NFKC'}
PLAIN = [f'the house {i}' for i in range(40)]


@pytest.mark.parametrize('form, odd', [
    (NFC, 'e\u0301 the'), (NFKC, '\ufb01 the'), (NFC, '\uf900 the'),  # as many bytes as U+8C48
    ({'type': 'Sequence', 'normalizers': [NFC]}, 'a\u030a the')])
@pytest.mark.parametrize('at', [0, len(PLAIN)])
def test_a_normalised_document_is_trained_on_and_counted_and_never_held_out(
    tmp_path, form, odd, at):
  found = load(tmp_path / 'model', byte_level(normalizer=form), bos='<s>')
  texts = [*PLAIN[:at], *(f'{odd} {i}' for i in range(20)), *PLAIN[at:]]
  meta, train, held_out = prepared(tmp_path, found, texts)
  normal = [unicodedata.normalize(form.get('type', 'NFC').replace('Sequence', 'NFC'), text)
            for text in texts]
  changes = meta['changes']
  assert set(documents_of(held_out, found)) <= set(PLAIN)
  assert set(documents_of(train, found)) | set(documents_of(held_out, found)) <= set(normal)
  assert changes['normalised'] == sum(text not in PLAIN for text in documents_of(train, found)) > 0
  assert changes['left_out'] == 20 - changes['normalised'] > 0
  assert repr(odd[0])[1:-1] in changes['examples']['normalised']
  held = ''.join(documents_of(held_out, found))
  assert held_out.bytes[-1] == len(held.encode())


def test_two_forms_of_a_document_are_on_one_side(tmp_path):
  found = load(tmp_path / 'model', byte_level(normalizer=NFC))
  texts = [f'caf{accent} {i}' for i in range(40) for accent in ('\u00e9', 'e\u0301')]
  _, train, held_out = prepared(tmp_path, found, texts)
  assert held_out.num_documents > 3
  assert not set(documents_of(train, found)) & set(documents_of(held_out, found))


def test_text_that_is_normalised_throughout_cannot_be_held_out(tmp_path):
  found = load(tmp_path / 'model', byte_level(normalizer=NFC))
  with pytest.raises(UsageError, match='The tokenizer changes every document of '):
    prepared(tmp_path, found, [f'e\u0301 {i}' for i in range(9)])


@pytest.mark.parametrize('at', [0, 15, 30])
def test_a_document_whose_text_is_lost_is_left_out(tmp_path, at):
  """Wherever it is, it neither stops the domain nor is it trained on."""
  found = load(tmp_path / 'model', make.letters())
  texts = [f'words {chr(97 + i % 26)} {chr(97 + i // 26)}' for i in range(30)]
  meta, *parts = prepared(tmp_path, found, [*texts[:at], 'some \U0001F389', *texts[at:]])
  assert sorted(text for part in parts for text in documents_of(part, found)) == sorted(texts)
  assert meta['changes']['lost'] == 1
  assert meta['changes']['examples'] == {'lost': "'\U0001F389' to ''"}


def test_a_tokenizer_that_loses_much_text_is_refused(tmp_path):
  found = load(tmp_path / 'model', make.letters())
  texts = [f'number {i}' for i in range(10)]
  with pytest.raises(UsageError, match=r"domains\.some: it changes '0' to ''. .* 10 of the 10 "):
    prepared(tmp_path, found, texts)
  with pytest.raises(UsageError, match='100 of the 100 documents read so far'):
    prepared(tmp_path, found, texts * 50)  # not after all of a large corpus


@pytest.mark.parametrize('make_one, changed', [
    (lambda: byte_level(normalizer={'type': 'Lowercase'}), "'A' into 'a'"),
    (lambda: byte_level(normalizer={'type': 'Sequence', 'normalizers': [
        {'type': 'NFD'}, {'type': 'StripAccents'}]}), "'é' into 'e'"),
    (lambda: byte_level(normalizer={
        'type': 'BertNormalizer', 'clean_text': False, 'handle_chinese_chars': False,
        'strip_accents': None, 'lowercase': True}), "'A' into 'a'"),
    (lambda: make.sentencepiece_model(normalization_rule_name='nfkc_cf'), "'A' into 'a'")])
def test_a_tokenizer_that_changes_letters_is_refused(tmp_path, make_one, changed):
  with pytest.raises(UsageError, match=f'turns {changed}'):
    load(tmp_path, make_one())


# Added tokens, and files beside


@pytest.mark.parametrize('special', [True, False])
def test_a_token_beyond_the_embedding_is_text(tmp_path, special):
  """A padding token is often added to the tokenizer only. The ids stay below the model's size."""
  plain = byte_level()
  size = len(plain['model']['vocab']) + len(plain['added_tokens'])
  found = load(tmp_path, make.with_token(plain, '[PAD]', special), config={'vocab_size': size},
               tokenizer_config={'eos_token': '</s>', 'pad_token': '[PAD]'})
  ids = found.encode(['a [PAD] b'])[0]
  assert found.vocab_size == size and max(ids) < size and found.decode(ids) == 'a [PAD] b'
  assert compatibility.vocabulary_of(str(tmp_path), unless=found) is None
  assert not compatibility.contradiction(found.vocabulary(), found.vocabulary(), size)
  assert 'config.json' not in tokenizer_files(found)  # it is the model's, which export writes


def test_an_added_token_of_the_embedding_stays(tmp_path):
  found = load(tmp_path, make.with_token(byte_level(), '<tool>', False),
               config={'vocab_size': 1000}, special_tokens_map={'eos_token': '</s>'})
  ids = found.encode(['a<tool> b'])[0]
  assert found.vocabulary()['<tool>'] in ids and found.decode(ids) == 'a<tool> b'
  always = load(tmp_path / 'always', make.with_token(space_marks('always'), '<tool>', False))
  texts = ['a<tool>b', 'a<tool> b', ' <tool>  b', '<tool>']
  assert [always.decode(ids) for ids in always.encode(texts)] == texts


def test_an_end_of_turn_beyond_the_embedding_is_not_the_end_of_a_document(tmp_path):
  plain = byte_level()
  size = plain['added_tokens'][0]['id'] + 2  # as far as </s>
  found = load(tmp_path, plain, config={'vocab_size': size, 'eos_token_id': size - 1},
               tokenizer_config={'eos_token': '<|im_end|>'})
  assert (found.framing.end.name, found.eos_id) == ('</s>', size - 1)


def test_a_file_of_tiktoken_beside_a_tokenizer_json_is_passed_over(tmp_path):
  expected = load(tmp_path, byte_level())
  (tmp_path / 'tokenizer.model').write_bytes(b'IQ== 0\nIg== 1\n')
  assert tokenizer.load(str(tmp_path)).hash == expected.hash
  (tmp_path / 'tokenizer.json').unlink()
  with pytest.raises(UsageError, match='is a tiktoken file'):
    tokenizer.load(str(tmp_path))


END = byte_level()['added_tokens'][1]['id']


@pytest.mark.parametrize('beside', [
    {'special_tokens_map': {'eos_token': '</s>', 'bos_token': '<s>'}},
    {'special_tokens_map': {'eos_token': {'content': '</s>', 'lstrip': False},
                            'bos_token': {'content': '<s>'}}},
    {'tokenizer_config': {'eos_token': None}, 'config': {'eos_token_id': END,
                                                        'bos_token_id': END - 1}},
    {'config': {'eos_token_id': [END, 3], 'bos_token_id': END - 1}},
    {'tokenizer_config': {'eos_token': '</s>', 'bos_token': '<s>'},
     'special_tokens_map': {'eos_token': '<s>'}, 'config': {'eos_token_id': 3}}])
def test_special_tokens_are_named_in_any_of_its_files(tmp_path, beside):
  found = load(tmp_path, byte_level(), **beside)
  assert (found.bos_id, found.eos_id) == (END - 1, END)
  assert found.framing == (None, (END, '</s>'), 'text')


# Framing

CHAT = {'bos_token': '<|im_start|>', 'eos_token': '<|im_end|>'}
BASE = {'bos_token': '<s>', 'eos_token': '</s>'}


@pytest.mark.parametrize('post_processor, config, begin, end', [
    (None, BASE, None, '</s>'),  # GPT-2's kind: named, and never put before a text
    (None, CHAT, None, '<|endoftext|>'),  # SmolLM2-Instruct
    (template(['<s>']), BASE, '<s>', '</s>'),  # Llama 2 and 3
    (template(['<s>'], ['</s>']), BASE, '<s>', '</s>'),
    (template(), BASE | {'add_bos_token': True}, None, '</s>'),  # as in transformers 5
    (template(['<s>']), BASE | {'add_bos_token': False}, '<s>', '</s>'),
    ({'type': 'Sequence', 'processors': [
        {'type': 'ByteLevel', 'trim_offsets': True, 'add_prefix_space': False, 'use_regex': True},
        template(['<s>'])]}, BASE, '<s>', '</s>'),  # Llama 3
    ({'type': 'ByteLevel', 'trim_offsets': False, 'add_prefix_space': False, 'use_regex': True},
     {'eos_token': '<|im_end|>', 'add_bos_token': False}, None, '<|endoftext|>'),  # Qwen's chat
    (None, BASE | {'add_bos_token': True}, '<s>', '</s>'),
    (None, {'eos_token': '</s>', 'add_bos_token': True}, None, '</s>'),
    ({'type': 'RobertaProcessing', 'sep': ['</s>', 2], 'cls': ['<s>', 0], 'trim_offsets': True,
      'add_prefix_space': False}, BASE, '<s>', '</s>'),
    (template([], ['<|endoftext|>']), CHAT, None, '<|endoftext|>')])  # Qwen3-Embedding
def test_marks_of_a_tokenizer_json(tmp_path, post_processor, config, begin, end):
  found = load(tmp_path, {**byte_level(), 'post_processor': post_processor},
               tokenizer_config=config)
  assert [mark and mark.name for mark in found.framing[:2]] == [begin, end]
  assert found.framing.end.id == found.vocabulary()[end]


@pytest.mark.parametrize('options, beside, begin, end', [
    ({}, {}, '<s>', '</s>'),
    ({}, {'tokenizer_config': {'add_bos_token': False}}, None, '</s>'),
    ({'bos_id': -1}, {}, None, '</s>'),
    ({}, {'tokenizer_config': {'eos_token': '<|im_end|>'}}, '<s>', '</s>'),  # of the added tokens
    ({'control_symbols': '<|im_end|>,<|endoftext|>'},
     {'tokenizer_config': {'eos_token': '<|im_end|>'}}, '<s>', '<|endoftext|>')])
def test_marks_of_a_sentencepiece_model(tmp_path, options, beside, begin, end):
  found = load(tmp_path, make.sentencepiece_model(**options), **beside or {'config': {}})
  assert [mark and mark.name for mark in found.framing[:2]] == [begin, end]


def test_the_marks_are_those_of_the_config(tmp_path):
  make.write(tmp_path, byte_level(), tokenizer_config=BASE)
  hashes = set()
  for options, marks in (({}, [None, '</s>']), ({'bos': '<s>'}, ['<s>', '</s>']),
                         ({'bos': '<|endoftext|>', 'eos': 'none'}, ['<|endoftext|>', None]),
                         ({'special': 'encode'}, [None, '</s>'])):
    found = tokenizer.load(str(tmp_path), framing.Options(**options))
    assert [mark and mark.name for mark in found.framing[:2]] == marks
    hashes.add(found.hash)
  assert len(hashes) == 4
  with pytest.raises(UsageError, match="bos = '<s' is not a token"):
    tokenizer.load(str(tmp_path), framing.Options(bos='<s'))


@pytest.mark.parametrize('bos, eos', [('<s>', '</s>'), ('none', '</s>'), ('<s>', 'none'),
                                      ('none', 'none')])
def test_every_text_token_is_scored_that_something_in_its_document_precedes(tmp_path, bos, eos):
  """And bits per byte are divided by the bytes of just these."""
  found = load(tmp_path / 'model', byte_level(), bos, eos)
  texts = [f'the the house {i}' for i in range(40)]
  _, train, held_out = prepared(tmp_path, found, texts)
  begins, ends = int(bos != 'none'), int(eos != 'none')
  assert (train.begins, train.ends) == (begins, ends)
  texts = documents_of(held_out, found)
  ids = found.encode(texts)
  assert [len(each) + begins + ends for each in ids] == np.diff(held_out.starts).tolist()
  expected = [each if begins else each[1:] for each in ids]
  for length in (3, 16, 999):
    scored = [row['targets'][row['loss_mask']]
              for row in mixture.evaluation_batches(held_out, length, 4)]
    assert np.concatenate(scored).tolist() == [i for each in expected for i in each]
  sizes = [len(text) - (0 if begins else len('the')) for text in texts]
  assert np.diff(held_out.bytes).tolist() == sizes


# Special tokens in text


CHATS = ['<|im_start|>user\nhi<|im_end|>', 'a <|im_end|> b', '<s>hi</s>', '</s>', '<s> x</s> y']


@pytest.mark.parametrize('kind', [name for name in make.LOSSLESS if 'sentencepiece' not in name])
def test_special_tokens_in_text_are_text_unless_they_are_to_be_encoded(tmp_path, kind):
  make.write(tmp_path, make.LOSSLESS[kind](), tokenizer_config=BASE)
  as_text, encoded = (tokenizer.load(str(tmp_path), framing.Options(special=special))
                      for special in ('text', 'encode'))
  specials = {i for name, i in as_text.vocabulary().items() if name in make.SPECIAL}
  for found in (as_text, encoded):
    assert [found.decode(ids) for ids in found.encode(CHATS)] == CHATS
  assert not specials & {i for ids in as_text.encode(CHATS) for i in ids}
  for text, ids in zip(CHATS, encoded.encode(CHATS)):
    names = [name for i in ids for name, j in as_text.vocabulary().items()
             if i == j and i in specials]
    assert names == [name for name in ('<|im_start|>', '<s>', '<|im_end|>', '</s>')
                     if name in text]


def test_a_text_with_marks_of_its_own_does_not_get_them_twice(tmp_path):
  found = load(tmp_path / 'model', {**byte_level(), 'post_processor': template(['<s>'])},
               special='encode', tokenizer_config=BASE)
  texts = [f'{begin}{i} the{end}' for i in range(30) for begin in ('', '<s>')
           for end in ('', '</s>')]
  _, *parts = prepared(tmp_path, found, texts)
  for part in parts:
    for a, b in zip(part.starts, part.starts[1:]):
      names = found.pieces(part.ids[a:b].tolist())
      assert (names.count('<s>'), names.count('</s>')) == (1, 1)
      assert (names[0], names[-1]) == ('<s>', '</s>')
    text = [''.join(found.pieces(part.ids[a + 1:b - 1].tolist()))
            for a, b in zip(part.starts, part.starts[1:])]
    assert np.diff(part.bytes).tolist() == [len(each) for each in text]


def test_of_a_folder_with_both_the_tokenizer_json_encodes_special_tokens(tmp_path):
  make.write(tmp_path, make.sentencepiece_model(), tokenizer_config=BASE)
  with pytest.raises(UsageError, match="special = 'encode' needs a "):
    tokenizer.load(str(tmp_path), framing.Options(special='encode'))
  make.write(tmp_path, space_marks('first'))
  found = tokenizer.load(str(tmp_path), framing.Options(special='encode'))
  assert found.vocabulary()['<|im_start|>'] in found.encode(CHATS)[0]
  assert '<|im_start|>' not in tokenizer.load(str(tmp_path)).vocabulary()
