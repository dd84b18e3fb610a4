"""The command line: `btx ...`, which is the same as `python -m btx_jax ...`.

  btx --config=configs/demo.py [COMMAND] [--workdir=DIR]

Without a command, or with `train`, it trains and measures every run of the config that is not
complete, in order, then prints the comparison and writes the report. With --run=NAME it trains only
that run, as a job of its own. The same command again continues where the last one stopped. The
other commands:

  status     shows the progress of every run (--watch: every two seconds; --json: as JSON)
  jobs       lists the runs that are not complete, for scripts: those on one line can be trained
             at the same time, once those on the lines above are complete; what then needs no
             training is left to the command without --run
  report     writes the report with the results so far (--baseline: the model that others are
             compared with; --latex: prints the table for LaTeX instead)
  ledger     shows what each model cost with all that it descends from: tokens, FLOPs, device time,
             bytes between machines (--machines; --json: as JSON)
  wall_time  computes how long each form of training takes on --machines joined by --links, from
             the step times of the runs so far
  data       describes the text of each domain
  compare    compares the experts that --run mixes with their seed and with each other
  evaluate   scores --run, or a pretrained --model, which needs no --config: on the text --on, or
             on --tasks (built-in tasks, or those of lm-evaluation-harness)
  generate   continues each --prompt, line of the file --prompts, or line of standard input,
             with --run or --model (--temperature, --stop, --n, --experts and more); with --chat
             it answers them as turns of a user, or holds a conversation
  export     writes the model of --run to the folder --to, in the format of Hugging Face
  rows       writes what is kept of each finished run without its parameters to the folder
             config.rows (docs/rows.md)
  rename     gives a run another name: rename OLD NEW; it stays the same run
  preflight  compiles every run for the devices --topology, which need not exist here: does it
             fit, how long will it take, how much is sent

--config.optimizer.peak_lr=1e-3 and the like set fields of the config. To run one job as several
processes, start each with --distributed, or with --coordinator, --num_processes and --process_id
(docs/processes.md).
"""

from collections.abc import Mapping
import contextlib
import os
import sys
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from btx_jax import arguments as flag
from btx_jax import errors
from btx_jax.devices import compiled, distributed, large_pages, rollcall
from btx_jax.errors import UsageError, nearest
from btx_jax.files import naming, places, writing

# jax and the modules that need it are imported inside functions, so that mistakes on the command
# line, `status` and `jobs` answer at once.


def train_runs(name: str, workdir: str):
  """Trains and measures the runs that are not complete; then prints and reports the results."""
  if flag.PROFILE.value and places.is_in_bucket(workdir):
    raise UsageError(f'--profile={flag.PROFILE.value} writes to a disk, and {workdir} is in a '
                     'bucket; omit it, or use another --workdir.')
  _join_processes({'config': flag.CONFIG.value.to_dict(), '--run': flag.RUN.value,
                   '--profile': flag.PROFILE.value, '--workdir': places.absolute(workdir)})
  import jax

  from btx_jax.commands import (
    answers_table,
    claims,
    decomposition,
    measured,
    regression,
    report,
    seeds,
    table,
  )
  from btx_jax.pipeline import Pipeline
  from btx_jax.terminal import say, show

  compiled.keep()
  pipeline = Pipeline(flag.CONFIG.value, workdir, flag.PROFILE.value)
  say(f'{name} in {workdir}: {len(pipeline.runs)} runs, on {jax.device_count()} '
      f'{jax.devices()[0].platform} device(s)'
      + (f' of {jax.process_count()} processes' if jax.process_count() > 1 else ''))
  trained = pipeline.train(flag.RUN.value)
  if flag.RUN.value:
    say(f'{flag.RUN.value} is complete{"" if trained else " already"}: '
        f'{pipeline.folder(flag.RUN.value)}')
    return
  if not trained:
    say('Every run is complete already.')

  def print_results():
    results = seeds.results(pipeline)
    show(table.as_table(results.rows, results.note))
    show(measured.as_table(results.rows))
    if answers_table.names(results.rows):
      show(answers_table.as_table(results.rows))
    regression.show(pipeline)
    decomposition.show(pipeline)
    show(claims.as_text(results.checks))
    say(f'Report: {report.write_report(pipeline, name)}')
    if name == 'demo':
      say('To use your own text, write a config like configs/demo.py with domains of your files: '
          'docs/your_data.md')

  distributed.on_process_0(print_results)


def show_status(name: str, workdir: str):
  """Shows the progress of every run."""
  del name
  if flag.CHECK.value:
    os.environ['JAX_PLATFORMS'] = 'cpu'  # reading checkpoints takes no accelerator from a run
  from btx_jax.commands.status import print_status
  from btx_jax.study.study import Study
  print_status(Study(flag.CONFIG.value, workdir), flag.JSON.value, flag.WATCH.value,
               flag.CHECK.value)


def _join_processes(facts: Mapping[str, Any]):
  """Joins the processes of the job, if there are several; they must agree on `facts`."""
  distributed.initialize(
      rollcall.place_from_flags(
          flag.COORDINATOR.value, flag.NUM_PROCESSES.value, flag.PROCESS_ID.value),
      flag.DISTRIBUTED.value, facts, flag.COORDINATOR_TIMEOUT.value)


def list_jobs(name: str, workdir: str):
  """Prints the runs that are not complete, a line for each stage."""
  del name
  from btx_jax.commands.status import stages
  from btx_jax.study.study import Study
  for names in stages(Study(flag.CONFIG.value, workdir)):
    print(*names)


def write_report(name: str, workdir: str):
  """Writes the report with the results so far; with --latex prints its table instead."""
  from btx_jax.commands import report
  from btx_jax.study.study import Study
  from btx_jax.terminal import say
  study = Study(flag.CONFIG.value, workdir)
  if flag.LATEX.value:
    print(report.latex_table(study), end='')
  else:
    say(f'Report: {report.write_report(study, name, flag.BASELINE.value)}')


def show_ledger(name: str, workdir: str):
  """Shows what each model cost."""
  del name
  from btx_jax.commands.ledger import print_ledger
  from btx_jax.scoring.ledger import MACHINES
  from btx_jax.study.study import Study
  print_ledger(Study(flag.CONFIG.value, workdir), flag.MACHINES.value or MACHINES, flag.JSON.value)


def describe_data(name: str, workdir: str):
  """Describes the text of each domain; tokenizes it first if that has not been done."""
  del name
  from btx_jax.commands.data import print_description
  from btx_jax.study.study import Study
  print_description(Study(flag.CONFIG.value, workdir))


def compare_experts(name: str, workdir: str):
  """Compares the experts that a mixture is made from."""
  del name
  if not flag.RUN.value:
    raise UsageError('compare needs --run=NAME, the mixture whose experts are compared.')
  from btx_jax.commands.compare import print_comparison
  from btx_jax.study.study import Study
  print_comparison(Study(flag.CONFIG.value, workdir), flag.RUN.value)


def evaluate_model(name: str, workdir: str):
  """Scores a run or a pretrained model, on text or on tasks."""
  del name
  config, tasks = flag.CONFIG.value, tuple(flag.TASKS.value)
  if config and not flag.ON.value and not tasks:
    from btx_jax.scoring import builtin
    tasks = builtin.others(config.evaluation.tasks)
  if bool(flag.ON.value) == bool(tasks) or bool(flag.RUN.value) == bool(flag.MODEL.value):
    raise UsageError('evaluate needs --on=FILES or --tasks=NAMES, and a model: --config=CONFIG '
                     'with --run=NAME, or --model=FOLDER.')
  if tasks:
    _join_processes({'--tasks': tasks, '--run': flag.RUN.value, '--model': flag.MODEL.value})
    from btx_jax.commands import evaluate_tasks
    evaluate_tasks.print_scores(*_model(workdir), evaluate_tasks.Asked(
        tasks, naming.local_path('--include_path', flag.INCLUDE_PATH.value), flag.SHOTS.value,
        flag.LIMIT.value, flag.DOWNLOAD.value, flag.RUN_CODE.value, flag.LENGTH.value),
        flag.JSON.value)
    return
  from btx_jax.commands import evaluate
  asked = evaluate.Asked(
      [naming.path('--on', path) for path in dict.fromkeys(flag.ON.value)],
      flag.TEXT_FIELD.value, flag.SEPARATOR.value, flag.LENGTH.value, flag.STRIDE.value,
      flag.FORMAT.value)
  evaluate.print_scores(*_model(workdir), asked, flag.JSON.value)


def generate_text(name: str, workdir: str):
  """Continues prompts with a run or a pretrained model."""
  del name
  if bool(flag.RUN.value) == bool(flag.MODEL.value):
    raise UsageError('generate needs a model: --config=CONFIG with --run=NAME, or '
                     '--model=FOLDER.')
  from btx_jax.commands import prompts
  from btx_jax.generation.settings import Sampling
  found = prompts.collect(flag.PROMPT.value, naming.path('--prompts', flag.PROMPTS.value),
                          flag.CHAT.value, flag.SYSTEM.value)
  if flag.CHAT.value and not found and flag.N.value > 1:
    raise UsageError(f'--n={flag.N.value}: a conversation continues from one answer; omit --n, '
                     'or give a --prompt.')
  asked = {
      'prompts': found, 'chat': flag.CHAT.value, 'system': flag.SYSTEM.value,
      'chat_template': flag.CHAT_TEMPLATE.value, 'dtype': flag.DTYPE.value,
      'max_new_tokens': flag.MAX_NEW_TOKENS.value,
      'sampling': Sampling(flag.TEMPERATURE.value, flag.TOP_K.value, flag.TOP_P.value,
                           flag.MIN_P.value, flag.REPETITION_PENALTY.value),
      'stop': flag.STOP.value, 'seed': flag.SEED.value, 'n': flag.N.value,
      'step': flag.STEP.value, 'colours': flag.EXPERTS.value}
  from btx_jax.commands import generate
  generate.print_texts(*_model(workdir), generate.Asked(**asked), flag.JSON.value)


def _model(workdir: str):
  """The study, the run and the folder that name a model for `evaluate` and `generate`."""
  from btx_jax.study.study import Study
  compiled.keep()
  study = None
  if flag.CONFIG.value:
    if flag.CHAT_TEMPLATE.value:
      flag.CONFIG.value.tokenizer.chat_template = flag.CHAT_TEMPLATE.value
    study = Study(flag.CONFIG.value, workdir)
  return study, flag.RUN.value or '', naming.path('--model', flag.MODEL.value or '')


def export_model(name: str, workdir: str):
  """Writes the model of a run as a Hugging Face folder."""
  del name
  if not flag.RUN.value or not flag.TO.value:
    raise UsageError('export needs --run=NAME, the run whose model is written, and --to=FOLDER.')
  from btx_jax.commands.export import export_run
  from btx_jax.commands.export_ensemble import export_ensemble
  from btx_jax.convert.export import CARD
  from btx_jax.study.study import Study
  study = Study(flag.CONFIG.value, workdir)
  export = export_ensemble if study.run(flag.RUN.value).selector else export_run
  with writing.filling(naming.path('--to', flag.TO.value), CARD) as folder:
    export(study, flag.RUN.value, folder, flag.DTYPE.value or 'bfloat16')


def write_finished_rows(name: str, workdir: str):
  """Writes the rows of all finished runs."""
  del name
  from btx_jax.commands.rows import write_rows
  from btx_jax.study.study import Study
  write_rows(Study(flag.CONFIG.value, workdir))


def rename_run(name: str, workdir: str, *names: str):
  """Gives a run another name."""
  del name
  if len(names) != 2:
    raise UsageError('rename needs two names, as in rename OLD NEW.')
  from btx_jax.study.rename import rename
  from btx_jax.study.study import Study
  from btx_jax.terminal import say
  old, new = names
  folders = rename(Study(flag.CONFIG.value, workdir), old, new)
  say(f'{old} is now called {new}, in {", ".join(folders)}, and stays the same run. Name it '
      f'{new} in the config, too')


def compile_for_topology(name: str, workdir: str):
  """Compiles the runs for other devices; exits with code 1 if one does not fit them."""
  del name
  if not flag.TOPOLOGY.value:
    raise UsageError('preflight needs --topology=KIND:SIZE, like v5p:4x4x4, h100:8 or cpu:8.')
  os.environ['JAX_PLATFORMS'] = 'cpu'  # the devices of this machine do not matter
  os.environ['JAX_ENABLE_COMPILATION_CACHE'] = '0'  # these programs cannot run on this machine
  from btx_jax.preflight import forecast, topology
  from btx_jax.preflight.report import print_report
  from btx_jax.study.study import Study
  devices = topology.get(flag.TOPOLOGY.value)
  ratios = forecast.read(flag.MEASURED.value, devices) if flag.MEASURED.value else {}
  study = Study(flag.CONFIG.value, workdir, at_hand=False)
  if not print_report(study, devices, flag.JSON.value, flag.RUN.value, ratios):
    sys.exit(1)


def print_wall_times(name: str, workdir: str):
  """Computes how long each form of training takes on several machines."""
  del name
  links = [_gigabits(each) for each in flag.LINKS.value or ['']]
  from btx_jax.commands.wall_time import print_wall_times
  from btx_jax.scoring.ledger import MACHINES
  from btx_jax.study.study import Study
  study = Study(flag.CONFIG.value, workdir, at_hand=False)
  print_wall_times(study, flag.MACHINES.value or MACHINES, links, flag.RUN.value or '',
                   flag.BASELINE.value, flag.JSON.value)


def _gigabits(text: str) -> float:
  """One of --links as a number; raises UsageError unless it is positive and finite."""
  try:
    rate = float(text)
  except ValueError:
    rate = 0.0
  if not 0 < rate < float('inf'):
    raise UsageError(f'--links={text} is not a positive number of Gbit/s; give some, like '
                     '--links=1,10,100.')
  return rate


COMMANDS = {'train': train_runs, 'status': show_status, 'jobs': list_jobs, 'report': write_report,
            'ledger': show_ledger, 'wall_time': print_wall_times, 'data': describe_data,
            'compare': compare_experts, 'evaluate': evaluate_model, 'generate': generate_text,
            'export': export_model, 'rows': write_finished_rows, 'rename': rename_run,
            'preflight': compile_for_topology}
_HELP = {'--help', '-help', '-h', '-?'}
_QUICK = _HELP | {'status', 'jobs', 'ledger', 'wall_time', 'rows', 'rename'}  # these don't compute


def run_command(argv: list[str]):
  """Runs the command that the arguments name; the flags are parsed already.

  Raises:
    UsageError: the arguments, the config or the files are invalid.
    RunError: a run failed.
  """
  command, *operands = argv[1:] or ['train']
  if operands and command != 'rename':
    raise UsageError(f'One command at a time, not {" ".join(argv[1:])!r}.')
  if command in errors.RENAMED:  # of its keys only the old command is one word
    raise UsageError(f'The command {command} is now {errors.RENAMED[command]}.')
  if command not in COMMANDS:
    raise UsageError(f'Unknown command {command!r}; {nearest(command, COMMANDS)}')
  several = command == 'train' or (command == 'evaluate' and not flag.ON.value)
  if not several and (flag.DISTRIBUTED.value or flag.COORDINATOR.value):
    raise UsageError(f'{command} runs in a single process: omit --distributed, --coordinator, '
                     '--num_processes and --process_id.')
  if (command in ('evaluate', 'generate') and flag.MODEL.value
      and not flags.FLAGS['config'].present):
    return COMMANDS[command]('', '')
  if not flags.FLAGS['config'].present:
    raise UsageError('--config is missing; try --config=demo')
  given = config_flags.get_config_filename(flags.FLAGS['config'])
  config_file = given.split(':')[0]
  if not os.path.isfile(config_file):
    if os.path.isfile(given):
      raise UsageError(f'--config={given}: a colon ends the path of a config, and begins the '
                       'argument of its get_config(); rename the file or its folder.')
    folder = _recipe_folder()
    if os.path.dirname(config_file) != folder:
      raise UsageError(f'--config={config_file}: there is no such file (looked from '
                       f'{os.getcwd()}).')
    names = [name[:-3] for name in os.listdir(folder) if name.endswith('.py') and name[0] != '_']
    name = os.path.basename(config_file)[:-3]
    raise UsageError(f'--config={name} is not a recipe; {nearest(name, names)} For a config of '
                     'your own, give its file, like mine.py.')
  if not isinstance(flag.CONFIG.value, ConfigDict):
    raise UsageError(f'{config_file}: get_config() must return what base.get_config() of '
                     f'btx_jax/base.py makes, not {type(flag.CONFIG.value).__name__}.')
  name = os.path.splitext(os.path.basename(config_file))[0]
  workdir = flag.WORKDIR.value or os.path.join('runs', name)
  naming.path('--to', flag.TO.value or '')
  COMMANDS[command](name, naming.path('--workdir', workdir), *operands)


def recipe_path(config: str) -> str:
  """The file of a recipe given by name, like demo:full; of anything else, only ~ is replaced.

  Raises:
    UsageError: it is something that is not a file or folder.
  """
  config = os.path.expanduser(config)
  name, colon, argument = config.partition(':')
  if os.path.exists(name) and not os.path.isfile(name) and not os.path.isdir(name):
    raise UsageError(f'--config={name} is a device, a named pipe or a socket; give a file of '
                     'Python, as in configs/.')  # Python would read it without end
  if (os.path.sep in name or name.endswith('.py') or not name
      or os.path.isfile(name) or os.path.isfile(config)):
    return config
  return os.path.join(_recipe_folder(), f'{name}.py') + colon + argument


def _recipe_folder() -> str:
  from btx_jax import configs
  return os.path.dirname(configs.__file__)


def _with_recipe_path(argv: list[str]) -> list[str]:
  """The arguments, with the name of a recipe in --config=NAME or --config NAME made a path."""
  result = list(argv)
  for i, argument in enumerate(argv):
    flag, equals, value = argument.partition('=')
    if flag in ('--config', '-config'):
      if equals:
        result[i] = f'{flag}={recipe_path(value)}'
      elif i + 1 < len(argv):
        result[i + 1] = recipe_path(argv[i + 1])
  return result


def platforms_with_cpu(platforms: str) -> str:
  """A value of JAX_PLATFORMS with the CPU added if it is missing: 'cuda' -> 'cuda,cpu'.

  New routers are made on the CPU. The first platform remains the default, and must still exist.
  """
  return platforms if 'cpu' in platforms.split(',') else f'{platforms},cpu'


def _flag_names() -> list[str]:
  """The flags of arguments.py."""
  return [each.name for each in vars(flag).values() if isinstance(each, flags.FlagHolder)]


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses the flags, and reads the config file; returns the other arguments."""
  if _HELP & set(argv[1:]):  # absl's own help ends with 1
    app.usage(shorthelp=True, writeto_stdout=True)
    sys.exit(0)
  flags.FLAGS.set_gnu_getopt(True)  # flags may come after the command
  try:
    argv = _with_recipe_path(argv)
  except UsageError as error:
    sys.exit(errors.report_error(error))
  try:
    with _no_bytecode():
      return flags.FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    sys.exit(errors.report_error(UsageError(
        f'There is no flag --{error.flagname}; {nearest(error.flagname, _flag_names())}')))
  except Exception as error:  # a config file is code: it may raise anything
    sys.exit(errors.report_error(errors.from_config(error, argv), debug='--debug' in argv))


@contextlib.contextmanager
def _no_bytecode():
  """Keeps Python from storing the bytecode of a config file.

  If the file changes, but neither its length nor the second of its time, Python would run the
  stored bytecode.
  """
  from btx_jax import base  # noqa: F401  which configs import, and whose bytecode may be kept
  before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
  try:
    yield
  finally:
    sys.dont_write_bytecode = before


def _run_and_report_errors(argv: list[str]):
  """Runs the command; an error ends the process with a message and an exit code."""
  # orbax and jax log much that users do not need. orbax also logs the errors that it raises.
  logging.set_verbosity(logging.FATAL)
  sys.unraisablehook = errors.report_unraisable
  try:
    run_command(argv)
  except (Exception, KeyboardInterrupt) as error:
    sys.exit(distributed.leave_job(errors.report_error(error, flag.DEBUG.value)))


def main(argv: list[str]):
  """Runs the command line `argv`, as the shell would; ends the process."""
  # Before anything imports jax, which a config file may.
  compiled.check_chosen()
  if platforms := os.environ.get('JAX_PLATFORMS'):
    os.environ['JAX_PLATFORMS'] = platforms_with_cpu(platforms)
  # --help shows the docstring and the flags of the module __main__, which need not be this one.
  sys.modules['__main__'].__doc__ = __doc__
  for name in _flag_names():
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
  app.run(_run_and_report_errors, argv=argv, flags_parser=_parse_flags)


def cli():
  """Runs the command line of this process; the entry point of `btx`."""
  if not _QUICK & set(sys.argv):
    large_pages.restart_with_them()
  main(sys.argv)


if __name__ == '__main__':
  cli()
