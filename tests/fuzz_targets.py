"""What the fuzzer feeds: kinds of input, each with valid examples and the code that reads them.

To add a kind, write a function that returns a Target, and name it in `KINDS`. `read` may return
anything, and raise UsageError or RunError; all else is a finding.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import functools
import io
import json
import os
import pathlib
import random
import tempfile
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from btx_jax.errors import RunError, UsageError
from tests import fuzz_inputs, make_tokenizers, odd_folders, studies
from tests.fuzz_inputs import Serialise

Files = Mapping[str, tuple[Any, Serialise | None]]


class Target(NamedTuple):
  """A kind of input.

  Attributes:
    examples: valid inputs, see fuzz_inputs.damaged.
    read: reads the input in a folder; the random numbers choose between ways to read it.
    forks: whether each input is read in a process of its own, since a library may abort.
    plain: whether what is fuzzed is not read from files, so they are always regular.
  """
  examples: Sequence[Files]
  read: Callable[[str, random.Random], Any]
  forks: bool = False
  plain: bool = False


_JSON = fuzz_inputs.to_json


def _in_memory(folder: str) -> dict[str, bytes]:
  return {str(path.relative_to(folder)): path.read_bytes()
          for path in pathlib.Path(folder).rglob('*') if path.is_file()}


def _of_json(files: Mapping[str, bytes]) -> Files:
  """The trees of an example's JSON files; JSON lines are lists."""
  result: dict[str, tuple[Any, Serialise | None]] = {}
  for name, raw in files.items():
    if name.endswith('.jsonl'):
      result[name] = [json.loads(line) for line in raw.splitlines()], fuzz_inputs.json_lines
    elif name.endswith('.json'):
      result[name] = json.loads(raw), _JSON
    else:
      result[name] = raw, None
  return result


# Model folders

_GENERATION = {'eos_token_id': [1, 2], 'temperature': 0.6, 'do_sample': True,
               'transformers_version': '5.0'}


def models() -> Target:
  examples = []
  with tempfile.TemporaryDirectory() as folder:
    for i, model in enumerate((odd_folders.MODEL, odd_folders.TIED, odd_folders.QWEN_2,
                               odd_folders.QWEN_3)):
      path = odd_folders.plain(pathlib.Path(folder, str(i)), model)
      found = dict(_of_json(_in_memory(path)))
      raw = found['model.safetensors'][0]
      length = 8 + int.from_bytes(raw[:8], 'little')
      header, body = json.loads(raw[8:length]), raw[length:]
      found['model.safetensors'] = header, functools.partial(fuzz_inputs.safetensors, body=body)
      found['generation_config.json'] = _GENERATION, _JSON
      examples.append(found)
      if not i:  # the same with an index
        names = [name for name in header if name != '__metadata__']
        sharded = {name: value for name, value in found.items() if name != 'model.safetensors'}
        sharded['model.safetensors.index.json'] = {'metadata': {}, 'weight_map': dict.fromkeys(
            names, 'a.safetensors')}, _JSON
        examples.append(sharded | {'a.safetensors': found['model.safetensors']})

  def read(folder: str, rng: random.Random):
    from btx_jax.convert import generation
    from btx_jax.convert.hugging_face import Folder
    found = Folder(folder)
    generation.to_json(generation.read(folder), 1, 2)
    _ = found.hash
    for path, shape in found.shapes.items():
      found.read(path, (slice(0, 1),) if shape else ())
      found.extent(path, (slice(0, 1),) * len(shape))

  return Target(examples, read)


# Tokenizers

_TEMPLATES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} "
    "[/INST]{% elif loop.index0 > 50 %}{{ raise_exception('x') }}{% else %}{{ ' ' ~ m.content ~ "
    "eos_token }}{% endif %}{% endfor %}",
    "{% set ns = namespace(a=1) %}{% for i in range(10 * 10) %}{% set ns.a = ns.a * 3 %}"
    "{% for m in messages %}{{ m.content | indent(4) | center(20) }}{% endfor %}{% endfor %}"
    "{{ '%5d' % ns.a }}{{ 'a' ~ 'b'.rjust(9) }}{{ messages | tojson(indent=2) }}")
_CHAT = [{'role': 'user', 'content': ' Hé\n'}, {'role': 'assistant', 'content': 'yes'},
         {'role': 'user', 'content': 'and?'}]


def template_text(tree: Any, rng: random.Random) -> bytes:
  """A template, in which one number, word or piece differs."""
  text = str(tree)
  if isinstance(rng, fuzz_inputs.AsIs):
    return text.encode()
  if rng.random() < 0.3:
    numbers = [i for i, c in enumerate(text) if c.isdigit()]
    if numbers:
      at = rng.choice(numbers)
      text = text[:at] + str(rng.choice((0, -1, 10**6, 10**9, 10**18, 1e308))) + text[at + 1:]
  elif rng.random() < 0.5:
    pieces = ['{% for x in range(99999) %}', '{% endfor %}', '{{ "a" * 10**9 }}', '{{ 9**9**9 }}',
              '{{ "x" | center(10**9) }}', '{{ "%1000000000d" % 1 }}', '{{ [].__class__ }}',
              '{{ "{:>1000000000}".format(1) }}', '{{ messages | tojson(indent=10**9) }}',
              '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}', '{{ "a" | indent(10**9) }}',
              '{{ range(10**9) | list }}', '{{ "a\\nb" | wordwrap(0) }}', '{{ 1 // 0 }}',
              '{% include "x" %}', '{{ self }}', '{{ lipsum(n=1000000) }}', '(' * 500, '{{',
              '{{ ["a"] | batch(10**9, "x") | list }}', '{{ "a" | replace("", "b" * 9999) }}']
    at = rng.randrange(len(text) + 1)
    text = text[:at] + rng.choice(pieces) + text[at:]
  else:
    return fuzz_inputs.damage_bytes(text.encode(), rng)
  return text.encode()


def tokenizers() -> Target:
  config = {'add_bos_token': True, 'bos_token': '<s>', 'eos_token': {'content': '<|im_end|>'},
            'chat_template': _TEMPLATES[0], 'model_max_length': 64}
  mains = [make_tokenizers.byte_level(), make_tokenizers.letters(),
           make_tokenizers.byte_level(post_processor=make_tokenizers.template(['<s>'], ['</s>'])),
           *map(make_tokenizers.space_marks, ('first', 'prepend', 'replace'))]
  beside = {'tokenizer_config.json': (config, _JSON), 'config.json': (
      {'vocab_size': 400, 'bos_token_id': 1, 'eos_token_id': [2]}, _JSON),
            'special_tokens_map.json': ({'pad_token': '</s>'}, _JSON)}
  examples = [{'tokenizer.json': (main, _JSON), **beside} for main in mains]
  examples += [{**example, 'chat_template.jinja': (_TEMPLATES[i], template_text)}
               for i, example in enumerate(examples[:3])]
  examples.append({'tokenizer.model': (make_tokenizers.sentencepiece_model(), None), **beside})

  def read(folder: str, rng: random.Random):
    from btx_jax.data import chats, framing, parser_check, tokenizer
    parser_check._run = _run_in_fork
    special = rng.choice((framing.TEXT, framing.ENCODE))
    found = tokenizer.load(folder, framing.Options(special=special))
    text = 'The <s> hé\u2581 \n\n  日本<|im_end|>'
    ids, = found.encode([text])
    found.spell(ids)
    found.decode(ids)
    found.pieces(ids)
    found.vocabulary()
    for part in chats.prompt(found.chat_template, _CHAT, found.special):
      found.spell_chat(found.encode_chat([part.text])[0])

  return Target(examples, read, forks=True)


def _run_in_fork(package: str, raw: bytes) -> str:
  """parser_check._run, many times a second: the child has imported the package already."""
  import sys

  from btx_jax.data import parser_check
  child = os.fork()
  if not child:
    code = 1
    try:
      sys.argv, sys.stdin = ['', package, str(8 << 30)], io.TextIOWrapper(io.BytesIO(raw))
      exec(parser_check._CHILD, {})
      code = 0
    finally:
      os._exit(code)
  code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  return f'ends with {code}' if code else ''


def templates() -> Target:
  """Chat templates alone, without the cost of a tokenizer."""
  def read(folder: str, rng: random.Random):
    from btx_jax.data import chats
    from btx_jax.data.chat_template import ChatTemplate
    with open(os.path.join(folder, 'template'), 'rb') as file:
      source = file.read(1 << 20).decode('utf-8', 'replace')
    chats.prompt(ChatTemplate(source, {'bos_token': '<s>', 'eos_token': '</s>'}, 'x'), _CHAT,
                 ['</s>', '<|im_end|>'])

  return Target([{'template': (text, template_text)} for text in _TEMPLATES], read, plain=True)


# Documents

_TEXTS = [{'text': 'one\n"two"', 'id': 1, 'meta': {'a': [1]}}, {'text': 'é' * 50, 'id': 2,
                                                               'meta': {'a': []}},
          {'text': '', 'id': 3, 'meta': {'a': [2]}}]
_CHATS = [{'messages': _CHAT[:2], 'id': 'a'}, {'messages': _CHAT[:2] * 2, 'id': 'b'}]
_SHAREGPT = [{'conversations': [{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}]}]
_ASKED = [{'prompt': 'a', 'completion': 'b'}, {'instruction': 'a', 'input': 'c', 'output': 'b'}]
_PAIRS = [{'prompt': 'a', 'chosen': 'b', 'rejected': 'c'},
          {'chosen': _CHAT[:2], 'rejected': [_CHAT[0], {'role': 'assistant', 'content': 'no'}]}]
_ROWS = [['text', 'id'], ['one', '1'], ['two, "quoted"', '2'], ['three\nlines', '3']]


def _packed(serialise: Serialise) -> Serialise:
  return lambda tree, rng: fuzz_inputs.compressed(serialise(tree, rng), rng)


def documents() -> Target:
  lines, table, csv = fuzz_inputs.json_lines, fuzz_inputs.parquet, fuzz_inputs.csv
  examples = [
      {'a.jsonl': (_TEXTS, lines)}, {'a.json': (_TEXTS, _JSON)}, {'a.json': (_TEXTS[0], _JSON)},
      {'a.parquet': (_TEXTS, table)}, {'a': (_TEXTS, table), 'b.jsonl': (_TEXTS, lines)},
      {'a.csv': (_ROWS, csv)}, {'a.tsv': (_ROWS, csv)},
      {'a.txt': (b'one\n\ntwo\r\n\r\nthree', None), 'sub/b.md': (b'# x\n', None)},
      {'a.jsonl.gz': (_TEXTS, _packed(lines))}, {'a.txt.zst': ('some text', _packed(_JSON))},
      {'a.csv.xz': (_ROWS, _packed(csv)), 'README.md': (b'x', None)},
      *({'a.jsonl': (found, lines)} for found in (_CHATS, _SHAREGPT, _ASKED, _PAIRS)),
      *({'a.parquet': (found, table)} for found in (_CHATS, _SHAREGPT, _PAIRS)),
      {'a.jsonl.bz2': (_PAIRS, _packed(lines))}]

  from btx_jax.data import chats, corpora, pairs
  from btx_jax.data.chat_template import NAMED, ChatTemplate
  from btx_jax.data.domains import Domain
  template = ChatTemplate(NAMED['chatml'][0], {}, 'chatml')

  def read(folder: str, rng: random.Random):
    names = os.listdir(folder)
    path = rng.choice([folder, folder, f'{folder}/*',
                       *(os.path.join(folder, name) for name in names)])
    beginning = repr(sorted(names))
    special = ['<|im_start|>', '<|im_end|>']
    reader = rng.choice([None, None, chats.reader(template, special),
                         pairs.reader(template, special)])
    domain = Domain('x', paths=(path,), text_field=rng.choice(['text'] * 12 + ['id', 'meta.a', '']),
                    id_field=rng.choice(['', '', '', 'id', 'meta']),
                    separator=rng.choice(['', '\n\n']))
    tally = corpora.Tally()
    for document in corpora.documents(domain, rng.choice([0.1, 0.9, 1.0, 1.0]), tally, reader):
      document.text.encode('utf-8')
    corpora.summary([tally])
    return beginning

  return Target(examples, read)


# Studies: manifests, metrics, scores, meta.json

def _study_config(folder: str):
  config = studies.get_config(pathlib.Path(folder))
  config.mesh.update(fsdp=1, expert=1, tensor=1)
  return config


def workdirs() -> Target:
  from tests import finished
  with tempfile.TemporaryDirectory() as folder:
    finished.write(_study_config(folder), folder)
    example = dict(_of_json(_in_memory(folder)))

  def read(folder: str, rng: random.Random):
    from btx_jax.commands import answers_table, measured, report_runs, seeds, status, table
    from btx_jax.scoring import regression
    from btx_jax.study.study import Study
    study = Study(_study_config(folder), folder)
    json.dumps(status.collect(study))
    status.as_table(status.collect(study))
    status.stages(study)
    report_runs.metas(study)
    results = seeds.results(study)
    if results.rows:
      table.as_table(results.rows, results.note)
      measured.as_table(results.rows)
      answers_table.names(results.rows)
    regression.regressions(study)
    regression.effects(study)

  return Target([example], read)


# Configs

def configs() -> Target:
  from tests import finished
  examples: list[Files] = []
  for config in (_study_config('/nowhere'), finished.two_mixtures()):
    examples.append({'config': (json.loads(json.dumps(config.to_dict())), _JSON)})

  def read(folder: str, rng: random.Random):
    from btx_jax.study.study import Study
    with open(os.path.join(folder, 'config'), 'rb') as file:
      try:
        tree = json.loads(file.read(1 << 22))
      except (ValueError, RecursionError):
        return  # a config is not read from JSON
    if not isinstance(tree, dict):
      return
    try:
      config = ConfigDict(_tuples(tree))
    except Exception:
      return  # ml_collections refuses it
    Study(config, folder)

  return Target(examples, read, plain=True)


def _tuples(tree: Any) -> Any:
  if isinstance(tree, dict):
    return {key: _tuples(value) for key, value in tree.items()}
  return tuple(map(_tuples, tree)) if isinstance(tree, list) else tree


def overrides() -> Target:
  """Flags that set fields of a recipe."""
  from btx_jax.configs import demo

  def paths(section, prefix):
    for key, value in section.items():
      name = f"{prefix}['{key}']" if '/' in key else f'{prefix}.{key}'
      yield name
      if isinstance(value, ConfigDict):
        yield from paths(value, name)

  names = [*paths(demo.get_config(), '--config')]

  def flag_text(tree: Any, rng: random.Random) -> bytes:
    del tree
    value = rng.choice([*fuzz_inputs.ODD_TEXTS, *map(str, fuzz_inputs.ODD_NUMBERS), '1e-3', '3',
                        "('a',)", '(1, 2)', '((', '{}', '[1]', 'None', "'a'", '1' * 5000,
                        '(' * 200 + ')' * 200])
    name = rng.choice(names)
    if rng.random() < 0.1:
      name = fuzz_inputs.damage_bytes(name.encode(), rng).decode('utf-8', 'replace')
    return f'{name}={value}'.encode('utf-8', 'surrogatepass')

  def read(folder: str, rng: random.Random):
    from absl import flags

    from btx_jax import arguments, main
    from btx_jax.study.study import Study
    with open(os.path.join(folder, 'flag'), 'rb') as file:
      argument = file.read(1 << 16).decode('utf-8', 'replace')
    if not argument.startswith('--config'):
      return
    flags.FLAGS.unparse_flags()
    errors = io.StringIO()
    try:
      with contextlib.redirect_stderr(errors):
        main._parse_flags(['btx', '--config=demo', argument])
    except SystemExit as end:
      if 'unexpected error' in errors.getvalue() or 'Traceback' in errors.getvalue():
        raise ValueError(errors.getvalue()) from end
      return
    config = arguments.CONFIG.value
    if isinstance(config, ConfigDict):
      Study(config, folder)

  return Target([{'flag': ('', flag_text)}], read, plain=True)


# Prompts

def prompts() -> Target:
  lines = [{'prompt': 'a'}, {'messages': _CHAT[:1]}, {'prompt': 'é\n'}]

  def read(folder: str, rng: random.Random):
    from btx_jax.commands import prompts as prompt_files
    for name in os.listdir(folder):
      for found in prompt_files.of_file(os.path.join(folder, name)):
        found.shown()
        json.dumps(found.as_data())

  return Target([{'a.jsonl': (lines, fuzz_inputs.json_lines)}, {'a.txt': (b'one\n\ntwo', None)}],
                read)


# Tasks of lm-evaluation-harness

def _yaml(tree: Any, rng: random.Random) -> bytes:
  import yaml
  return yaml.safe_dump(tree).encode() if rng.random() < 0.8 else _JSON(tree, rng)


def tasks() -> Target:
  import yaml

  from btx_jax.scoring import find_tasks
  from tests import own_tasks
  os.environ.setdefault('HF_HOME', tempfile.mkdtemp())  # what the harness caches
  with tempfile.TemporaryDirectory() as folder:
    own_tasks.write(pathlib.Path(folder))
    files = _in_memory(folder)
    # So that the first input does not take the seconds of the harness's imports.
    find_tasks.load(find_tasks.parse(own_tasks.NAMES[:1]), folder, limit=2)
  data = {name: found for name, found in _of_json(files).items() if name.endswith('.jsonl')}
  examples = []
  for name in own_tasks.NAMES:
    tree = yaml.safe_load(files[f'{name}.yaml'])
    used = tree['dataset_kwargs']['data_files']['test']
    examples.append({'task.yaml': ({**tree, 'task': 'mine'}, _yaml), used: data[used]})

  def read(folder: str, rng: random.Random):
    find_tasks.load(find_tasks.parse(['mine']), folder, limit=2)

  return Target(examples, read)


KINDS: dict[str, Callable[[], Target]] = {
    'models': models, 'tokenizers': tokenizers, 'templates': templates, 'documents': documents,
    'workdirs': workdirs, 'configs': configs, 'overrides': overrides, 'prompts': prompts,
    'tasks': tasks}
# Share of all inputs, where it is not 1: those that cost much more.
SHARES = {'tasks': 0.005, 'tokenizers': 0.2, 'workdirs': 0.2, 'overrides': 0.2}
FINE = (UsageError, RunError)
