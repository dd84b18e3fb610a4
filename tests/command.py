"""The command as a shell would start it, but many times a second.

Importing jax takes seconds. So one process imports everything, and forks for each command; it
starts no device itself, so that nothing but code is there before the fork.
"""

import json
import os
import signal
import subprocess
import sys
import traceback
from typing import NamedTuple

from tests.jobs import PATIENCE, ROOT


class Done(NamedTuple):
  """What came of a command."""
  code: int
  stdout: str
  stderr: str


class Commands:
  """Runs commands; a context manager. `folder` is for their output, which no one else uses."""

  def __init__(self, folder: str):
    environment = {**os.environ, 'PYTHONPATH': ROOT, 'JAX_PLATFORMS': 'cpu', 'COLUMNS': '160',
                   'JAX_NUM_CPU_DEVICES': '2', 'NPROC': '4', 'PYTHONDONTWRITEBYTECODE': ''}
    self._out, self._err = os.path.join(folder, 'stdout'), os.path.join(folder, 'stderr')
    self._process = subprocess.Popen(
        [sys.executable, '-c', 'from tests import command; command.serve()'], cwd=ROOT, text=True,
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._process.stdin.close()  # its end
    self._process.wait()
    self._process.stdout.close()

  def __call__(self, *arguments: str, cwd: str = ROOT) -> Done:
    """Like `python -m btx_jax.main ARGUMENTS`, in the folder `cwd`."""
    self._process.stdin.write(json.dumps([arguments, cwd, self._out, self._err]) + '\n')
    self._process.stdin.flush()
    code = int(self._process.stdout.readline())
    with open(self._out, encoding='utf-8') as out, open(self._err, encoding='utf-8') as err:
      return Done(code, out.read(), err.read())


def serve():
  """Forks for each line of stdin; answers with the exit code."""
  from btx_jax import main, pipeline  # noqa: F401
  from btx_jax.commands import data, report, status  # noqa: F401
  for line in sys.stdin:
    child = os.fork()
    if not child:
      _become(main, *json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(main, arguments: list[str], cwd: str, out: str, err: str):
  """In the forked process: the command. Never returns."""
  os.chdir(cwd)
  for path, number in ((out, 1), (err, 2)):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  sys.argv = ['btx_jax', *arguments]
  signal.alarm(PATIENCE)  # rather than wait forever
  # As in the foreground: a shell has those in the background ignore it, and their children too.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  code = 1
  try:
    main.main(sys.argv)
  except SystemExit as end:
    code = end.code or 0
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # nothing of the server's is left to do here
