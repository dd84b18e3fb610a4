"""The command: python -m btx_jax.main --config=configs/demo.py [--run=NAME] [--workdir=DIR].

Does every run of the config that is missing, in order, then prints and writes the comparison.
With `data` behind the flags it only describes the text, without training anything.
The same command again continues where the last one stopped. Fields of the config are set by
--config.optimizer.peak_lr=1e-3 and the like.
"""

import os
import re
import sys

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from btx_jax.errors import RunError, UsageError

CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'The config: a file, like configs/demo.py or configs/demo.py:full.',
    lock_config=True)
WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Where checkpoints, tokens and the report go; runs/CONFIG_NAME if not set.')
RUN = flags.DEFINE_string('run', None, 'Only this run, as a job of its own.')


def run(argv: list[str]):
  """Does what the flags ask for; raises UsageError or RunError."""
  if argv[1:] not in ([], ['data']):
    raise UsageError(f"Unknown command {' '.join(argv[1:])!r}; there is 'data', or only flags.")
  if not flags.FLAGS['config'].present:
    raise UsageError('--config is missing; try --config=configs/demo.py')
  config_file = config_flags.get_config_filename(flags.FLAGS['config']).split(':')[0]
  if not os.path.isfile(config_file):
    raise UsageError(f'--config={config_file}: there is no such file (looked from {os.getcwd()}).')
  if not isinstance(CONFIG.value, ConfigDict):
    raise UsageError(f'{config_file}: get_config() must return what configs/base.py makes, not '
                     f'a {type(CONFIG.value).__name__}.')
  name = os.path.splitext(os.path.basename(config_file))[0]
  workdir = WORKDIR.value or os.path.join('runs', name)
  if argv[1:] == ['data']:
    from btx_jax.data import describe
    describe.show(CONFIG.value, workdir)
    return
  # Imported here, so that usage errors come at once.
  import jax

  from btx_jax.evaluate import report
  from btx_jax.evaluate import table as table_lib
  from btx_jax.pipeline import Pipeline
  from btx_jax.terminal import say, show

  pipeline = Pipeline(CONFIG.value, workdir)
  say(f'{name} in {workdir}: {len(pipeline.runs)} runs, on {jax.device_count()} '
      f'{jax.devices()[0].platform} device(s)')
  trained = pipeline.train(RUN.value)
  if RUN.value:
    say(f'{RUN.value} is complete{"" if trained else " already"}: '
        f'{pipeline.folder(RUN.value)}')
    return
  if not trained:
    say('Every run is complete already.')
  with jax.set_mesh(pipeline.mesh):
    table = table_lib.rows(pipeline)
  checks = table_lib.checks(pipeline, table)
  show(table_lib.as_text(table))
  for check in checks:
    say(f'{"met    " if check["met"] else "NOT MET"}  {check["name"]}')
  folder = report.write(os.path.join(workdir, 'report'), name, table, checks)
  say(f'Report: {folder}. Your own text: copy configs/demo.py to configs/mine.py, point '
      'domains at your files, and run --config=configs/mine.py')


def _parse(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except Exception as error:  # a config file is code: it may raise anything
    slashed = next((arg for arg in argv if re.match(r'--config\.runs\.[^=]*/', arg)), None)
    if slashed:
      _stop(f"{slashed}: write the name of a run with a slash as in "
            "--config.runs['expert/code'].steps=100", 2)
    _stop(_explain(error), 2)


def _explain(error: BaseException) -> str:
  """The message; ml_collections quotes a traceback if a config file fails: its end will do."""
  missing = isinstance(error, AttributeError | KeyError)
  while error.args and isinstance(error.args[0], BaseException):
    error = error.args[0]
  message = ' '.join(map(str, error.args)) or repr(error)
  if missing and message.startswith("'"):
    message = f'the config has no field {message}'
  if 'Traceback (most recent call last)' not in message:
    return message.replace('\n', ' ')
  file, line = re.findall(r'File "([^"]*)", line (\d+)', message)[-1]
  return f'{os.path.relpath(file)}, line {line}: {message.strip().splitlines()[-1]}'


def _stop(error: BaseException | str, code: int):
  print(f'btx_jax: {error}', file=sys.stderr)
  sys.exit(code)


def _main(argv: list[str]):
  logging.set_verbosity(logging.ERROR)  # orbax and jax tell much that is not for here
  try:
    run(argv)
  except UsageError as error:
    _stop(error, 2)
  except RunError as error:
    _stop(error, 1)
  except KeyboardInterrupt:
    _stop('stopped; the same command again continues from the last checkpoint.', 130)


if __name__ == '__main__':
  app.run(_main, flags_parser=_parse)
