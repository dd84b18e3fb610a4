"""JSON in any layout gives its records, one broken record spoils no other, and prose stays text."""

import gzip
import json
import random

import pytest

from btx_jax.data import corpora, formats, json_files, records, streams
from btx_jax.data.records import Document

TEXTS = ['the first\nof them', '日本語 "[{', '\\ ] } , " \\', 'x' * 300, 'the last']
OBJECTS = [{'id': i, 'meta': {'n': [i, {'k': '}]'}]}, 'text': text} for i, text in enumerate(TEXTS)]
LAYOUTS = {
    'compact': lambda objects: json.dumps(objects, separators=(',', ':')),
    'indented': lambda objects: json.dumps(objects, indent=2, ensure_ascii=False),
    'a line each': lambda objects: '[\n' + ',\n'.join(map(json.dumps, objects)) + '\n]\n',
    'objects': lambda objects: '\n'.join(json.dumps(each, indent=1) for each in objects),
    'two arrays': lambda objects: json.dumps(objects[:2]) + '\n' + json.dumps(objects[2:]),
    'lines': lambda objects: '\n\n'.join(map(json.dumps, objects)),
}


def read(path, **fields):
  return list(formats.read(str(path), **fields))


@pytest.mark.parametrize('chunk', [1, 3, 64, 1 << 20])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_layout_gives_the_same_records(tmp_path, monkeypatch, layout, chunk):
  monkeypatch.setattr(streams, 'CHUNK', chunk)
  content = LAYOUTS[layout](OBJECTS)
  for name in ('x.json', 'x.jsonl', 'x.txt', 'x.json.gz'):
    raw = ('\ufeff' * (chunk > 1) + content).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith('gz') else raw)
    found = read(tmp_path / name, id_field='id')
    assert [doc.text for doc in found] == TEXTS
    assert [doc.id for doc in found] == ['0', '1', '2', '3', '4']
    lines = content.split('\n')
    for number, doc in enumerate(found):
      line = int(doc.place.rsplit(':', 1)[1])
      assert f'"id":{number}' in ''.join(lines[line - 1:line + 1]).replace(' ', '')


@pytest.mark.parametrize('layout', ['compact', 'indented', 'a line each', 'lines'])
@pytest.mark.parametrize('broken', [0, 2, 4])
@pytest.mark.parametrize('harm', [
    lambda text: text.replace('"text": "', '"text": '),  # a quote is missing
    lambda text: text.replace('"text":', '"text"'),
    lambda text: text.replace('good', 'caf\udce9'),  # not UTF-8
    lambda text: text.replace('"text"', '"body"'),
])
def test_a_broken_record_spoils_no_other(tmp_path, layout, broken, harm):
  objects = [{'text': f'good {i}'} for i in range(5)]
  content = LAYOUTS[layout](objects).replace('":"', '": "')
  mark = content.index(f'"text": "good {broken}"')
  content = content[:mark] + harm(content[mark:mark + 16]) + content[mark + 16:]
  (tmp_path / 'x.json').write_bytes(content.encode('utf-8', 'surrogateescape'))
  found = read(tmp_path / 'x.json')
  good = [record.text for record in found if isinstance(record, Document)]
  left = [f'good {i}' for i in range(5) if i != broken]
  if layout == 'compact' and 'good"' not in content and content.count('"') % 2:
    assert good == left[:broken]  # on one line, nothing shows where a missing quote was
  else:
    assert good == left
  assert len(good) < len(found)


def test_a_record_without_its_bracket_spoils_no_other(tmp_path):
  lines = [json.dumps({'text': f'good {i}'}) + ',' for i in range(6)]
  lines[2] = lines[2][:-2]
  (tmp_path / 'x.json').write_text('\n'.join(['[', *lines[:-1], lines[-1][:-1], ']']))
  found = read(tmp_path / 'x.json')
  assert [doc.text for doc in found if isinstance(doc, Document)] == [
      f'good {i}' for i in (0, 1, 3, 4, 5)]
  assert [str(doc) for doc in found if not isinstance(doc, Document)] == [
      f'{tmp_path}/x.json:4: is not JSON: a bracket or quote is missing']


def test_what_is_too_long_or_cut_off_in_an_array_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(records, 'MAX_BYTES', 1000)
  monkeypatch.setattr(streams, 'CHUNK', 64)
  texts = ['one', 'x' * 2000, 'two', 'three']
  content = json.dumps([{'text': text} for text in texts], indent=1).encode()
  (tmp_path / 'x.json').write_bytes(content)
  found = read(tmp_path / 'x.json')
  assert [doc.text for doc in found if isinstance(doc, Document)] == ['one', 'two', 'three']
  assert str(found[1]) == f'{tmp_path}/x.json:5: is too long: more than 0.001 MB'
  rng = random.Random(0)
  texts = [rng.randbytes(30).hex() for _ in range(50)]
  raw = gzip.compress(json.dumps([{'text': text} for text in texts]).encode())
  (tmp_path / 'x.json.gz').write_bytes(raw[:len(raw) // 2])
  *found, last = read(tmp_path / 'x.json.gz')
  assert len(found) > 15 and [doc.text for doc in found] == texts[:len(found)]
  assert last.reason == records.CUT_OFF


@pytest.mark.parametrize('content', [
    '[1999] In that year', '{{ template }}\n', '[x for x in y]\n[z]', '{\n  int x;\n}\n', '[]',
    '[[wiki link]] and more', '{"a": 1}\nis how an object looks\nin JSON, says the text.\n',
    '[{"a": 1}, {"b": 2}].forEach(x => x)\n', "{'a': 1}\n{'a': 2}\n", '{}\nmore\n', '[1, 2]\n[3]\n',
    '[{% for x in y %}]', '{"a": 1} and so on'])
@pytest.mark.parametrize('name', ['x.txt', 'x.py', 'x.md'])
def test_text_that_begins_like_json_stays_text(tmp_path, content, name):
  (tmp_path / name).write_text(content)
  assert [record.text for record in read(tmp_path / name)] == [content]


@pytest.mark.parametrize('content, reason', [
    ('prose', records.NOT_JSON), ('["a", "b"]', records.NO_TEXT), ('"a"', records.NO_TEXT),
    ('{"text": "a", "b": ', records.NOT_JSON), ('[{"text": "a"', records.NOT_JSON),
    ("{'text': 'a'}", records.NOT_JSON), ('{"train": [{"text": "a"}]}', records.NO_TEXT)])
def test_json_by_name_is_never_text(tmp_path, content, reason):
  (tmp_path / 'x.json').write_text(content)
  assert {record.reason for record in read(tmp_path / 'x.json')} == {reason}


def test_long_records_decide_by_their_beginning(tmp_path, monkeypatch):
  monkeypatch.setattr(json_files, '_PEEK', 100)
  for text in ('x' * 500, 'x' * 5):
    for layout in LAYOUTS:
      content = LAYOUTS[layout]([{'text': text}, {'text': 'two'}, {'text': 'three'}])
      (tmp_path / 'x.txt').write_text(content)
      assert [doc.text for doc in read(tmp_path / 'x.txt')] == [text, 'two', 'three']


def test_settings_in_a_folder_are_left_out_and_records_are_not(tmp_path):
  (tmp_path / 'package.json').write_text('{"name": "x",\n "version": 1}')
  (tmp_path / 'code.py').write_text('x = 1')
  (tmp_path / 'one.json').write_text('{\n"text": "one document"\n}')
  tally = corpora.Tally()
  domain = corpora.Domain('some', paths=(str(tmp_path),))
  assert [doc.text for doc in corpora.documents(domain, 0, tally)] == ['x = 1', 'one document']
  assert tally.first == [
      f"{tmp_path}/package.json: is a single JSON object without field 'text'; its fields: 'name', "
      "'version'"]
  assert corpora.left_out({'files': tally.read_as()}) == ['left out: package.json: no field']
