"""The command: python -m btx_jax.main --config=configs/demo.py [COMMAND] [--workdir=DIR].

Without a command: does every run of the config that is missing, in order (or the one that
--run names, as a job of its own), then prints the comparison and writes the report. The same
command again continues where the last one stopped.

  status   how all runs are getting on (--watch: again and again; --json: for machines)
  report   writes the report anew, from what there is so far
  jobs     what is still to be done, for scripts: the runs of a line can be jobs at the same time
  data     what the text of each domain is like
  compare  how the experts that --run mixes differ from their seed and from each other
  export   writes the model of --run into the folder --to, as Hugging Face has it
  preflight  compiles every run for --topology, which need not be here: memory, traffic, time

Fields of the config are set by --config.optimizer.peak_lr=1e-3 and the like. As one of several
processes, on as many hosts: --distributed, or --coordinator with its companions
(docs/processes.md).
"""

import os
import sys

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from btx_jax import errors, files
from btx_jax.devices import distributed, rollcall
from btx_jax.errors import UsageError, nearest

CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'The config: a file, like mine.py, or a recipe, like demo or demo:full.',
    lock_config=True)
WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Where checkpoints, tokens and the report go; runs/CONFIG_NAME if not set.')
RUN = flags.DEFINE_string('run', None, 'Only this run, as a job of its own.')
PROFILE = flags.DEFINE_integer(
    'profile', 0, 'Trace so many steps of each run, for xprof and Perfetto.', lower_bound=0)
WATCH = flags.DEFINE_bool('watch', False, 'status: look again every two seconds, until Ctrl-C.')
JSON = flags.DEFINE_bool('json', False, 'status, preflight: as JSON.')
TOPOLOGY = flags.DEFINE_string(
    'topology', None, 'preflight: what to compile for, v5p:4x4x4, v5e:16x16*2, h100:8 or cpu:8.')
TO = flags.DEFINE_string('to', None, 'export: the folder to write.')
DTYPE = flags.DEFINE_string('dtype', 'bfloat16', 'export: bfloat16 or float32, of the weights.')
DISTRIBUTED = flags.DEFINE_bool(
    'distributed', False, 'One of several processes, which jax finds itself: on TPU VMs, GKE, '
    'Slurm. See docs/processes.md.')
COORDINATOR = flags.DEFINE_string(
    'coordinator', None, 'Of several processes started by hand: HOST:PORT of process 0.')
NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many processes there are.')
PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0.')
COORDINATOR_TIMEOUT = flags.DEFINE_float(
    'coordinator_timeout', distributed.TIMEOUT,
    'Seconds to wait at the start until all processes are there.', lower_bound=1)
DEBUG = flags.DEFINE_bool('debug', False, 'Show the traceback of an error.')


def train(name: str, workdir: str):
  """Does what is missing, then tells what came out."""
  distributed.initialize(
      rollcall.place(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value),
      DISTRIBUTED.value,
      {'config': CONFIG.value.to_dict(), '--run': RUN.value, '--profile': PROFILE.value,
       '--workdir': os.path.realpath(workdir)}, COORDINATOR_TIMEOUT.value)
  # Imported here and below, so that usage errors and looking on take no time.
  import jax

  from btx_jax.commands import report, table
  from btx_jax.pipeline import Pipeline
  from btx_jax.terminal import say, show

  pipeline = Pipeline(CONFIG.value, workdir, PROFILE.value)
  say(f'{name} in {workdir}: {len(pipeline.runs)} runs, on {jax.device_count()} '
      f'{jax.devices()[0].platform} device(s)'
      + (f' of {jax.process_count()} processes' if jax.process_count() > 1 else ''))
  trained = pipeline.train(RUN.value)
  if RUN.value:
    say(f'{RUN.value} is complete{"" if trained else " already"}: '
        f'{pipeline.folder(RUN.value)}')
    return
  if not trained:
    say('Every run is complete already.')

  def print_results():
    rows = table.rows(pipeline)
    show(table.as_table(rows))
    for check in table.checks(pipeline, rows):
      say(f'{"met    " if check["met"] else "NOT MET"}  {check["name"]}')
    say(f'Report: {report.write_report(pipeline, name)}. Your own text: copy configs/demo.py to '
        'configs/mine.py, point domains at your files, and run --config=configs/mine.py')

  distributed.first(print_results)


def status(name: str, workdir: str):
  """Shows how the runs are getting on."""
  del name
  from btx_jax.commands.status import print_status
  from btx_jax.study.study import Study
  print_status(Study(CONFIG.value, workdir), JSON.value, WATCH.value)


def jobs(name: str, workdir: str):
  """Prints the runs to do, those of a line after those of the lines above."""
  del name
  from btx_jax.commands.status import stages
  from btx_jax.study.study import Study
  for names in stages(Study(CONFIG.value, workdir)):
    print(*names)


def report(name: str, workdir: str):
  """Writes the report."""
  from btx_jax.commands.report import write_report
  from btx_jax.study.study import Study
  from btx_jax.terminal import say
  say(f'Report: {write_report(Study(CONFIG.value, workdir), name)}')


def data(name: str, workdir: str):
  """Prepares the text where that is still to be done, and describes it."""
  del name
  from btx_jax.commands.data import print_description
  from btx_jax.study.study import Study
  print_description(Study(CONFIG.value, workdir))


def compare(name: str, workdir: str):
  """Compares the models that a mixture is made from."""
  del name
  if not RUN.value:
    raise UsageError('compare needs --run=NAME, the mixture whose experts are compared.')
  from btx_jax.commands.compare import print_comparison
  from btx_jax.study.study import Study
  print_comparison(Study(CONFIG.value, workdir), RUN.value)


def export(name: str, workdir: str):
  """Writes the model of a run as a Hugging Face folder."""
  del name
  if not RUN.value or not TO.value:
    raise UsageError('export needs --run=NAME, the run whose model is written, and --to=FOLDER.')
  from btx_jax.commands.export import export_run
  from btx_jax.study.study import Study
  export_run(Study(CONFIG.value, workdir), RUN.value, TO.value, DTYPE.value)


def preflight(name: str, workdir: str):
  """Compiles what would run, for devices that are not here; fails where it does not fit."""
  del name
  if not TOPOLOGY.value:
    raise UsageError('preflight needs --topology=KIND:SIZE, like v5p:4x4x4, h100:8 or cpu:8.')
  os.environ['JAX_PLATFORMS'] = 'cpu'  # whatever is here: it is not what this is about
  os.environ['JAX_ENABLE_COMPILATION_CACHE'] = '0'  # nothing here can run what is for elsewhere
  from btx_jax.preflight import topology
  from btx_jax.preflight.report import print_report
  from btx_jax.study.study import Study
  study = Study(CONFIG.value, workdir, at_hand=False)
  if not print_report(study, topology.get(TOPOLOGY.value), JSON.value, RUN.value):
    sys.exit(1)


COMMANDS = {'train': train, 'status': status, 'jobs': jobs, 'report': report, 'data': data,
            'compare': compare, 'export': export, 'preflight': preflight}


def run(argv: list[str]):
  """Does what the flags ask for; raises UsageError or RunError."""
  if len(argv) > 2:
    raise UsageError(f'One command at a time, not {" ".join(argv[1:])!r}.')
  command = argv[1] if len(argv) > 1 else 'train'
  if command in errors.RENAMED:  # of its keys only the old command is one word
    raise UsageError(f'The command {command} is now {errors.RENAMED[command]}.')
  if command not in COMMANDS:
    raise UsageError(f'Unknown command {command!r}; {nearest(command, COMMANDS)}')
  if not flags.FLAGS['config'].present:
    raise UsageError('--config is missing; try --config=demo')
  config_file = config_flags.get_config_filename(flags.FLAGS['config']).split(':')[0]
  if not os.path.isfile(config_file):
    folder = _recipe_folder()
    if os.path.dirname(config_file) != folder:
      raise UsageError(f'--config={config_file}: there is no such file (looked from '
                       f'{os.getcwd()}).')
    names = [name[:-3] for name in os.listdir(folder) if name.endswith('.py') and name[0] != '_']
    name = os.path.basename(config_file)[:-3]
    raise UsageError(f'--config={name} is not a recipe; {nearest(name, names)} A config of your '
                     'own is named by its file, like mine.py.')
  if not isinstance(CONFIG.value, ConfigDict):
    raise UsageError(f'{config_file}: get_config() must return what base.get_config() of '
                     f'btx_jax/base.py makes, not {type(CONFIG.value).__name__}.')
  if command != 'train' and (DISTRIBUTED.value or COORDINATOR.value):
    raise UsageError(f'{command} is for one process: leave --distributed, --coordinator, '
                     '--num_processes and --process_id away.')
  name = os.path.splitext(os.path.basename(config_file))[0]
  workdir = WORKDIR.value or os.path.join('runs', name)
  for flag, path in (('--workdir', workdir), ('--to', TO.value or '')):
    files.check_path(flag, path)
  COMMANDS[command](name, workdir)


def recipe_path(config: str) -> str:
  """The file of a recipe that --config names without a path, demo:full; else what it is given."""
  name, colon, argument = config.partition(':')
  if os.path.sep in name or name.endswith('.py') or not name or os.path.exists(name):
    return config
  return os.path.join(_recipe_folder(), f'{name}.py') + colon + argument


def _recipe_folder() -> str:
  from btx_jax import configs
  return os.path.dirname(configs.__file__)


def _with_recipe_path(argv: list[str]) -> list[str]:
  """The arguments with a recipe's name in --config=NAME, or --config NAME, made a path."""
  result = list(argv)
  for i, argument in enumerate(argv):
    flag, equals, value = argument.partition('=')
    if flag in ('--config', '-config'):
      if equals:
        result[i] = f'{flag}={recipe_path(value)}'
      elif i + 1 < len(argv):
        result[i + 1] = recipe_path(argv[i + 1])
  return result


def _parse(argv: list[str]) -> list[str]:
  flags.FLAGS.set_gnu_getopt(True)  # flags may come after the command
  argv = _with_recipe_path(argv)
  try:
    return flags.FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    ours = [flag.name for flag in (CONFIG, WORKDIR, RUN, PROFILE, WATCH, JSON, TOPOLOGY, TO, DTYPE,
                                       DEBUG)]
    sys.exit(errors.report_error(UsageError(
        f'There is no flag --{error.flagname}; {nearest(error.flagname, ours)}')))
  except Exception as error:  # a config file is code: it may raise anything
    sys.exit(errors.report_error(errors.from_config(error, argv), debug='--debug' in argv))


def _run(argv: list[str]):
  logging.set_verbosity(logging.ERROR)  # orbax and jax tell much that is not for here
  try:
    run(argv)
  except (Exception, KeyboardInterrupt) as error:
    sys.exit(distributed.leave(errors.report_error(error, DEBUG.value)))


def main(argv: list[str]):
  """The whole command, as the shell calls it; ends the process."""
  app.run(_run, argv=argv, flags_parser=_parse)


def cli():
  """The command `btx`."""
  main(sys.argv)


if __name__ == '__main__':
  cli()
