"""What may import what: rooms lie on floors, and no import goes up. `python -m tests.floors_test`
prints the floors."""

import ast
from collections.abc import Iterator
import pathlib
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
# From the bottom up. A room is a file or folder directly under btx_jax/, or configs/, which is
# installed there; rooms of one floor do not import each other. __init__ and __main__ import late,
# when they are used; they may reach any floor.
FLOORS = (
    ('escaping', 'storage'),
    ('errors', 'terminal'),
    ('files',),
    ('devices', 'recipe', 'outer'),
    ('model', 'selector'),
    ('convert', 'run', 'btx'),
    ('base',),
    ('data', 'configs'),
    ('training', 'generation'),
    ('study',),
    ('fitting',),
    ('scoring', 'library', 'preflight'),
    ('pipeline', 'commands', 'arguments'),
    ('main',),
    ('__init__', '__main__'),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imports(root: pathlib.Path = ROOT) -> Iterator[tuple[pathlib.Path, int, str, str]]:
  """(file, line, its room, the room it imports) of every import between rooms, late ones too."""
  paths = [*(root / 'btx_jax').rglob('*.py'), *(root / 'configs').rglob('*.py')]
  for path in sorted(paths):
    room = _room(path.relative_to(root))
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
      for name in _imported(node):
        parts = name.split('.')
        if parts[0] == 'btx_jax' and len(parts) > 1 and parts[1] != room:
          # A name of the library, not of a room, comes from the top.
          yield (path.relative_to(root), node.lineno, room,
                 parts[1] if parts[1] in FLOOR else '__init__')


def _room(path: pathlib.Path) -> str:
  """The room of a file; configs/ is installed as btx_jax.configs."""
  return path.parts[0 if path.parts[0] == 'configs' else 1].removesuffix('.py')


def _imported(node: ast.AST) -> list[str]:
  match node:
    case ast.Import(names=names):
      return [alias.name for alias in names]
    case ast.ImportFrom(module='btx_jax', names=names):
      return [f'btx_jax.{alias.name}' for alias in names]
    case ast.ImportFrom(module=str(module)):
      return [module]
  return []


def upward(found: Iterator[tuple[pathlib.Path, int, str, str]]) -> list[str]:
  """A line for each import that does not go to a lower floor."""
  return [f'{path}:{line}: {room} (floor {FLOOR[room]}) imports {other} (floor {FLOOR[other]})'
          for path, line, room, other in found if FLOOR[other] >= FLOOR[room]]


def test_no_import_goes_up():
  assert upward(imports()) == []


def test_every_room_has_a_floor():
  rooms = {path.name.removesuffix('.py') for path in (ROOT / 'btx_jax').iterdir()
           if path.suffix == '.py' or (path / '__init__.py').exists()}
  assert rooms | {'configs'} == set(FLOOR)


def test_every_room_is_in_the_wheel():
  settings = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))
  folders = {path.parent for path in (ROOT / 'btx_jax').rglob('*.py')}
  assert set(settings['tool']['setuptools']['packages']) == {'btx_jax.configs', *(
      '.'.join(folder.relative_to(ROOT).parts) for folder in folders)}


def test_an_import_that_goes_up_is_named(tmp_path):
  (tmp_path / 'btx_jax' / 'model').mkdir(parents=True)
  (tmp_path / 'btx_jax' / 'model' / 'llama.py').write_text(
      'def late():\n  from btx_jax.training import step\n  from btx_jax import mix\n'
      '  return step, mix\n')
  assert upward(imports(tmp_path)) == [
      'btx_jax/model/llama.py:2: model (floor 4) imports training (floor 8)',
      'btx_jax/model/llama.py:3: model (floor 4) imports __init__ (floor 14)']


if __name__ == '__main__':
  found = list(imports())
  pairs = {(room, other) for _, _, room, other in found}
  print(f'{len(FLOOR)} rooms on {len(FLOORS)} floors, {len(pairs)} imports between rooms, '
        f'{len(upward(found))} of them up')
  for floor, rooms in reversed(list(enumerate(FLOORS))):
    print(f'{floor:3}  {"  ".join(rooms)}')
