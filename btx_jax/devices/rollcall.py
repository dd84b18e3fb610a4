"""The processes of a job meet before jax starts, to find out whether the job can start at all.

When a process is missing, when two have the same id, or when no coordinator answers, jax itself
aborts without naming the process. Here each process first tells process 0 which process it is and
what it is about to run, at the address that jax's coordinator uses afterwards. All receive the same
verdict, in words. The protocol is plain TCP: one line of JSON each way.
"""

from collections.abc import Iterable, Mapping
import contextlib
import errno
import json
import os
import selectors
import socket
import time
from typing import Any, NamedTuple

from btx_jax import errors
from btx_jax.errors import UsageError

_GREETING = 'btx_jax 1'
_MAX_LINE = 1 << 24  # bytes of a line; a peer that sends more is not a process of ours
_LATE = 3.0  # seconds to wait, after a fatal mistake, for processes that should hear of it
_DOCS = 'See docs/processes.md.'


class Place(NamedTuple):
  """The place of a process in its job.

  Attributes:
    coordinator: HOST:PORT of process 0.
    count: number of processes in the job.
    index: of this process, from 0.
  """
  coordinator: str
  count: int
  index: int


class _Greeted(NamedTuple):
  """A process that process 0 knows: its first line, and its connection (None for itself)."""
  hello: dict
  connection: socket.socket | None


def place_from_flags(coordinator: str | None, count: int | None, index: int | None) -> Place | None:
  """The place that three flags describe; None if none of them is set.

  Raises:
    UsageError: only some of them are set, or a value is invalid.
  """
  given = {'--coordinator': coordinator, '--num_processes': count, '--process_id': index}
  missing = [flag for flag, value in given.items() if value is None]
  if len(missing) == len(given):
    return None
  if coordinator is None or count is None or index is None:
    raise UsageError(
        f'{" and ".join(missing)} {"is" if len(missing) == 1 else "are"} missing: '
        '--coordinator=HOST:PORT, --num_processes=N and --process_id=I belong together. '
        'For a single process, omit all three.')
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise UsageError(f'--coordinator={coordinator} must be HOST:PORT, the host of process 0 and '
                     'a free port there, as in node7:6421.')
  if count < 1:
    raise UsageError(f'--num_processes={count} must be at least 1.')
  if not 0 <= index < count:
    raise UsageError(f'--process_id={index} must be from 0 to {count - 1}, as --num_processes='
                     f'{count}.')
  return Place(coordinator, count, index)


def meet_processes(place: Place, facts: Mapping[str, Any], timeout: float):
  """Returns once all processes of the job are connected and have equal facts.

  Args:
    place: of this process.
    facts: nested dicts of plain data that must be equal on all processes.
    timeout: seconds to wait for the coordinator to answer, and for all processes to connect.

  Raises:
    UsageError: the same on all connected processes: some are missing, two have the same id, or
      the facts differ. Or the coordinator does not answer.
  """
  me = {'greeting': _GREETING, 'process_id': place.index, 'num_processes': place.count,
        'who': f'{socket.gethostname()}, pid {os.getpid()}', 'facts': dict(facts)}
  until = time.monotonic() + timeout
  server = None
  if place.index == 0:
    try:
      server = _listen(int(place.coordinator.rpartition(':')[2]))
    except OSError as error:
      if error.errno != errno.EADDRINUSE:
        raise UsageError(f'--coordinator={place.coordinator}: process 0 cannot listen there '
                         f'({error.strerror}).') from error
      # Another process 0 would answer at once; anything else there never sends a verdict.
      until = min(until, time.monotonic() + 10)
  verdict = (_collect_processes(server, me, until, timeout) if server
             else _ask_process_0(place, me, until, timeout))
  if verdict:
    raise UsageError(verdict)


def disagreement(facts_of: Mapping[int, Any]) -> str | None:
  """A message with every entry that differs between processes (by index); None if none does."""
  first = min(facts_of)
  others: dict[str, dict[str, list[int]]] = {}  # path -> value -> the processes that have it
  of_first: dict[str, str] = {}
  for index in sorted(facts_of):
    for path, one, other in errors.nested_differences(facts_of[first], facts_of[index]):
      of_first[path] = json.dumps(one)
      others.setdefault(path, {}).setdefault(json.dumps(other), []).append(index)
  if not others:
    return None
  lines = [f'  {path}: {_names([first])} has {of_first[path]}, ' + ', '.join(
      f'{_names(indices)} {"has" if len(indices) == 1 else "have"} {value}'
      for value, indices in values.items()) for path, values in others.items()]
  return ('The processes do not agree, so none has started:\n' + '\n'.join(lines) +
          '\nStart all of them from the same files, with the same command except for '
          '--process_id. ' + _DOCS)


def _names(indices: list[int]) -> str:
  """'process 2', or 'processes 1, 3'."""
  if len(indices) == 1:
    return f'process {indices[0]}'
  shown = indices if len(indices) < 10 else [*indices[:8], '...', indices[-1]]
  return f'processes {", ".join(map(str, shown))}'


def _listen(port: int) -> socket.socket:
  if socket.has_dualstack_ipv6():
    return socket.create_server(('', port), family=socket.AF_INET6, dualstack_ipv6=True)
  return socket.create_server(('', port))


def _collect_processes(server: socket.socket, me: dict, until: float, timeout: float) -> str | None:
  """On process 0: waits for the others, sends them the verdict and returns it.

  Returns:
    why the job cannot start; None if it can.
  """
  present, buffers = {0: _Greeted(me, None)}, {}
  verdict = None
  with server, selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
    server.setblocking(False)
    selector.register(server, selectors.EVENT_READ)
    while len(present) < me['num_processes']:
      left = until - time.monotonic()
      if left <= 0 and verdict:
        break
      if left <= 0:
        missing = [i for i in range(me['num_processes']) if i not in present]
        started = 'it was' if len(missing) == 1 else 'they were'
        verdict = (f'{_names(missing).capitalize()} of {me["num_processes"]} did not connect '
                   f'within {timeout:.0f} s (process 0 is on {me["who"]}). Check that {started} '
                   'started with the same --coordinator and can reach that port, or raise '
                   f'--coordinator_timeout. {_DOCS}')
        break
      for key, _ in selector.select(min(left, 1)):
        if key.fileobj is server:
          with contextlib.suppress(OSError):
            connection = stack.enter_context(server.accept()[0])
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ)
            buffers[connection] = b''
          continue
        mistake = _read_hello(key.fileobj, selector, buffers, present, me)
        if mistake and not verdict:
          verdict = mistake
          until = min(until, time.monotonic() + _LATE)
    verdict = verdict or disagreement(
        {index: process.hello['facts'] for index, process in present.items()})
    _send_verdict(buffers, verdict)
  return verdict


def _read_hello(connection, selector, buffers: dict[socket.socket, bytes],
                present: dict[int, _Greeted], me: dict) -> str | None:
  """Reads from a connection; adds a process to `present` once its first line is complete.

  Returns:
    why the job cannot start, if this line shows it; None otherwise.
  """
  try:
    data = connection.recv(1 << 16)
  except BlockingIOError:
    return None
  except OSError:
    data = b''
  buffers[connection] += data
  hello = _parse_message(buffers[connection])
  known = next((i for i, process in present.items() if process.connection is connection), None)
  if not data or (hello is None and (b'\n' in buffers[connection]
                                     or len(buffers[connection]) > _MAX_LINE)):
    # It hung up, or it is not a process of ours. A process may be started again and reconnect.
    selector.unregister(connection)
    connection.close()
    del buffers[connection]
    if known is not None:
      del present[known]
  elif hello and known is None:
    index, count = hello['process_id'], hello['num_processes']
    if count != me['num_processes']:
      return (f'--num_processes={me["num_processes"]} on process 0 ({me["who"]}), but '
              f'--num_processes={count} on process {index} ({hello["who"]}). {_DOCS}')
    if index in present:
      return (f'--process_id={index} was given twice: to {present[index].hello["who"]}, and to '
              f'{hello["who"]}. Each process needs its own id, from 0 to {count - 1}. {_DOCS}')
    present[index] = _Greeted(hello, connection)
  return None


def _send_verdict(connections: Iterable[socket.socket], verdict: str | None):
  """Sends all processes the verdict, and waits briefly for them to hang up, to free the port."""
  line = json.dumps({'greeting': _GREETING, 'verdict': verdict}).encode() + b'\n'
  for connection in connections:
    with contextlib.suppress(OSError):
      connection.settimeout(5)
      connection.sendall(line)
      connection.shutdown(socket.SHUT_WR)
  for connection in connections:
    with contextlib.suppress(OSError):
      while connection.recv(1 << 16):
        pass


def _ask_process_0(place: Place, me: dict, until: float, timeout: float) -> str | None:
  """On the other processes: connects to process 0, introduces this one, returns the verdict."""
  host, _, port = place.coordinator.rpartition(':')
  reason = 'no attempt was made'
  while True:
    try:
      with socket.create_connection((host.strip('[]'), int(port)), timeout=5) as connection:
        # From here on the timeout of process 0 counts, from when that was started.
        connection.settimeout(10 if place.index == 0 else timeout + 10)
        connection.sendall(json.dumps(me).encode() + b'\n')
        answer = _read_line(connection)
      found = _parse_message(answer)
      if found and 'verdict' in found:
        return found['verdict']
      reason = ('it hung up' if not answer
                else 'the program that answers there is not btx_jax starting a job')
    except OSError as error:
      reason = error.strerror or str(error) or type(error).__name__
    left = until - time.monotonic()
    if left <= 0:
      break
    time.sleep(min(0.2, left))
  if place.index == 0:
    return (f'--coordinator={place.coordinator}: the port is taken on this machine '
            f'({me["who"]}), by another job or by another process with --process_id=0. Stop that '
            f'one, or choose another port for all processes. {_DOCS}')
  return (f'--coordinator={place.coordinator} did not answer process {place.index} '
          f'({me["who"]}) within {timeout:.0f} s: {reason}. Check that this is the host of '
          'process 0, that process 0 was started, and that no firewall blocks the port. '
          f'{_DOCS}')


def _read_line(connection: socket.socket) -> bytes:
  data = b''
  while not data.endswith(b'\n') and len(data) <= _MAX_LINE:
    more = connection.recv(1 << 16)
    if not more:
      break
    data += more
  return data


def _parse_message(data: bytes) -> dict | None:
  """The message in a complete line from btx_jax; None for anything else."""
  if not data.endswith(b'\n'):
    return None
  with contextlib.suppress(ValueError):
    found = json.loads(data)
    if isinstance(found, dict) and found.get('greeting') == _GREETING:
      return found
  return None
