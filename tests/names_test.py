"""Any name works in every command, or is refused before anything is written: names of runs and
domains, and paths of working directories, texts and models."""

import os

import jax
import numpy as np
import pytest
from rich.console import Group
from rich.text import Text

from btx_jax import base, errors, escaping, load, terminal
from btx_jax.commands import export
from btx_jax.data import domains, folders
from btx_jax.devices import compiled
from btx_jax.errors import UsageError
from btx_jax.files import naming
from btx_jax.pipeline import Pipeline
from btx_jax.study import plan
from btx_jax.training import checkpoint, slices
from btx_jax.training.step import TrainState
from tests import studies
from tests.helpers import assert_trees_equal

# A path, and what a reader that decodes, trims or normalises it would read in its place
HARD = [('a%20b', 'a b'), (' a#c', 'a'), ('~{x}\'$(x)"\n', 'x'), ('e\u0301', '\u00e9')]
REFUSED = ['logs:', '[x]', 'a?b', 'a\\b', 'caf\udce9']
IDENTITY = '0123456789abcdef'


def state_of(value: float) -> TrainState:
  return TrainState(step=jax.numpy.int32(1), opt_state=(),
                    params={'embed': jax.numpy.full((4, 2), value)})


@pytest.mark.parametrize('name, other', HARD)
def test_a_checkpoint_is_that_of_its_path_and_of_no_other(tmp_path, name, other):
  for value, each in enumerate((other, name)):
    with checkpoint.Checkpoints(str(tmp_path / each), IDENTITY) as kept:
      kept.save(1, state_of(value), {'rows': 1})
  for value, each in enumerate((other, name)):
    folder = str(tmp_path / each)
    with checkpoint.Checkpoints(folder, IDENTITY) as kept:
      step, state, position = kept.newest(state_of(-1))
    assert (step, position) == (1, {'rows': 1})
    alone = checkpoint.load_params(folder, 1, state_of(-1).params, IDENTITY)
    saved = slices.Saved(folder, 1, IDENTITY).read('embed', (slice(0, 4), slice(0, 2)))
    for found in (state.params['embed'], alone['embed'], saved):
      np.testing.assert_array_equal(found, np.full((4, 2), value))


@pytest.mark.parametrize('name', REFUSED)
def test_a_checkpoint_is_refused_where_a_library_would_go_elsewhere(tmp_path, name):
  folder = tmp_path / name
  folder.mkdir()
  for use in (lambda path: checkpoint.Checkpoints(path, IDENTITY),
              lambda path: checkpoint.load_params(path, 1, {}, IDENTITY),
              lambda path: slices.Saved(path, 1, IDENTITY)):
    with pytest.raises(UsageError, match='cannot hold checkpoints, because'):
      use(str(folder / 'checkpoints'))
  assert not os.listdir(folder)
  link = tmp_path / 'link'  # the way out that the message names
  link.symlink_to(folder)
  with checkpoint.Checkpoints(str(link / 'checkpoints'), IDENTITY) as kept:
    kept.save(1, state_of(3), {'rows': 1})
    kept.save(2, state_of(4), {'rows': 1})
  saved = slices.Saved(str(link / 'checkpoints'), 2, IDENTITY)
  np.testing.assert_array_equal(saved.read('embed', (slice(0, 4), slice(0, 2))), 4)


def test_a_study_of_hard_names_is_trained_exported_and_read(text, tmp_path):
  there, out = tmp_path / 'a%20b #é', tmp_path / 'a%20[b]*\\'
  config, (run, domain) = studies.get_config(text), ('|a%20b|', '<b>$x_%')
  config.mesh.update(fsdp=1, expert=1, tensor=1)
  config.model.num_layers = 1
  config.evaluation.update(every=0, tokens=50)
  config.tokenizer.vocab_size = 290
  config.domains = {domain: config.domains.prose}
  config.runs = {run: base.run(base.random(), {domain: 1}, steps=2)}
  assert Pipeline(config, str(there)).train()
  again = Pipeline(config, str(there))
  assert not again.train()  # its checkpoint is found
  export.export_run(again, run, str(out), 'float32')
  assert_trees_equal(load(str(out))[1], load(str(there / run))[1])
  card = (out / 'README.md').read_text()
  assert card.count(r'| \|a%20b\| |') == 1 and card.count(r'\<b\>\$x\_%') == 2


ELSEWHERE = ['', '.', '..', '../x', 'a/../../x', '/abs', 'a//b', 'a/', './a', 'a/.', 'nul\0',
             'esc\x1b[31m', 'new\nline', 'caf\udce9', '\u202ea', '\u200ba', 'x.partial/a',
             'x' * 201]


@pytest.mark.parametrize('name', ELSEWHERE)
def test_no_name_leads_out_of_the_working_directory_or_is_invisible(name):
  with pytest.raises(UsageError, match='cannot be the name of a run'):
    plan.check_name(name)
  with pytest.raises(UsageError, match='cannot be the name of a domain'):
    domains.from_config({name: DOMAIN})


DOMAIN = {'source': 'files', 'paths': ('x',), 'text_field': 'text', 'separator': '',
          'id_field': '', 'held_out': (), 'format': 'text'}


@pytest.mark.parametrize('name', ['a%20b', '#x', '{x}', '~', '$x', '<b>', 'a|b', '日本', 'e\u0301',
                                  '..x', '.x', 'x' * 200])
def test_other_names_stay(name):
  plan.check_name(name)
  assert domains.from_config({name: DOMAIN})[0].name == name


@pytest.mark.parametrize('names', [('A', 'a'), ('\u00e9', 'e\u0301'), ('stra\u00dfe', 'STRASSE')])
def test_names_that_some_file_systems_do_not_distinguish_are_refused_together(names):
  with pytest.raises(UsageError, match='cannot both be names of a domain'):
    domains.from_config(dict.fromkeys(names, DOMAIN))
  naming.check_distinct('run', [names[0], f'{names[1]}/x'])


@pytest.mark.parametrize('name', ['[x]', 'a*b', 'a?', 'a\\b', '%20', 'caf\udce9', 'n\new', '-x'])
def test_a_file_of_text_is_found_under_any_name(tmp_path, name):
  for each in (f'{name}.txt', 'xa.txt'):
    (tmp_path / each).write_text('text')
  assert folders.find(str(tmp_path / f'{name}.txt')).files == [str(tmp_path / f'{name}.txt')]
  folder = tmp_path / name
  folder.mkdir()
  (folder / 'x.txt').write_text('text')
  assert folders.find(str(folder)).files == [str(folder / 'x.txt')]


def test_what_a_terminal_would_act_on_is_shown_as_escapes(capsys):
  shown = '\\x1b[31m\\x9b\\u202e\\udce9'
  name = '\x1b[31m\x9b\u202e\udce9'
  terminal.say(f'in {name}')
  terminal.show(terminal.Table([name], [[name]], title=name, caption=name))
  terminal.show(Group(Text(name, style='red')))
  errors.report_error(UsageError(f'of {name}'))
  printed = capsys.readouterr()
  assert printed.out.count(shown) == 6 and printed.err == f'btx_jax: of {shown}\n'
  assert not {'\x1b', '\x9b', '\u202e'} & set(printed.out + printed.err)


def test_names_in_markdown_are_text():
  assert escaping.markdown('a|b\n<i>_x_ `$\x1b') == r'a\|b \<i\>\_x\_ \`\$\\x1b'


@pytest.mark.parametrize('mode', [0o700, 0o755, 0o775, 0o777])
def test_programs_are_not_kept_where_others_may_put_theirs(tmp_path, monkeypatch, capsys, mode):
  folder = tmp_path / 'share' / 'cache'
  monkeypatch.setenv(compiled.VARIABLE, str(folder))
  compiled.check_chosen()
  assert folder.stat().st_mode & 0o777 == 0o700  # whatever the umask
  folder.chmod(mode)
  compiled.check_chosen()
  is_used = os.environ[compiled.VARIABLE] == str(folder)
  assert is_used == (mode in (0o700, 0o755))
  assert is_used != (f'others may write to {folder}' in capsys.readouterr().err)
