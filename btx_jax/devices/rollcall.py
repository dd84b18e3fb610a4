"""The processes of one job meet before jax starts, to find out whether it can start at all.

jax's own way of meeting ends in an abort that names nobody when a process is missing, when two
have the same id, or when nobody answers. Here each process tells process 0 who it is and what
it is about to do, over the address that jax's coordinator uses afterwards, and all hear the
same verdict, in words. Plain TCP: a line of JSON each way.
"""

from collections.abc import Mapping
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
_MOST = 1 << 24  # bytes of a line; whoever sends more is none of ours
_LATE = 3.0  # seconds
_DOCS = 'See docs/processes.md.'


class Place(NamedTuple):
  """Where a process of a job stands.

  Attributes:
    coordinator: HOST:PORT of process 0.
    count: processes of the job.
    index: of this one, from 0.
  """
  coordinator: str
  count: int
  index: int


def place(coordinator: str | None, count: int | None, index: int | None) -> Place | None:
  """What three flags say; None if none is given.

  Raises:
    UsageError: only some are given, or a value cannot be.
  """
  given = {'--coordinator': coordinator, '--num_processes': count, '--process_id': index}
  missing = [flag for flag, value in given.items() if value is None]
  if len(missing) == len(given):
    return None
  if missing:
    raise UsageError(
        f'{" and ".join(missing)} {"is" if len(missing) == 1 else "are"} missing: '
        '--coordinator=HOST:PORT, --num_processes=N and --process_id=I belong together. '
        'For one process leave all of them away.')
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise UsageError(f'--coordinator={coordinator} must be HOST:PORT, the host of process 0 and '
                     'a port that is free there, as in node7:6421.')
  if count < 1:
    raise UsageError(f'--num_processes={count} must be at least 1.')
  if not 0 <= index < count:
    raise UsageError(f'--process_id={index} must be from 0 to {count - 1}, as --num_processes='
                     f'{count}.')
  return Place(coordinator, count, index)


def attend(at: Place, facts: Mapping[str, Any], timeout: float):
  """Returns when all processes of a job are there and agree.

  Args:
    at: the place of this process.
    facts: nested dicts, plain data; they must be the same everywhere.
    timeout: seconds to wait for a coordinator that answers, and for all to be there.

  Raises:
    UsageError: the same on all processes that are there: some are missing, two have the same
      id, or the facts differ. Or the coordinator does not answer.
  """
  me = {'greeting': _GREETING, 'process_id': at.index, 'num_processes': at.count,
        'who': f'{socket.gethostname()}, pid {os.getpid()}', 'facts': dict(facts)}
  until = time.monotonic() + timeout
  server = None
  if at.index == 0:
    try:
      server = _listen(int(at.coordinator.rpartition(':')[2]))
    except OSError as error:
      if error.errno != errno.EADDRINUSE:
        raise UsageError(f'--coordinator={at.coordinator}: process 0 cannot listen there '
                         f'({error.strerror}).') from error
      # Another process 0? It will say so. Whatever else it is, it will not answer for long.
      until = min(until, time.monotonic() + 10)
  verdict = _hold(server, me, until, timeout) if server else _report(at, me, until, timeout)
  if verdict:
    raise UsageError(verdict)


def disagreement(facts_of: Mapping[int, Any]) -> str | None:
  """A sentence with everything that processes (by index) do not have in common; None if nothing.
  """
  first = min(facts_of)
  others: dict[str, dict[str, list[int]]] = {}  # path, value -> who has it
  of_first: dict[str, str] = {}
  for index in sorted(facts_of):
    for path, one, other in errors.nested_differences(facts_of[first], facts_of[index]):
      of_first[path] = json.dumps(one)
      others.setdefault(path, {}).setdefault(json.dumps(other), []).append(index)
  if not others:
    return None
  lines = [f'  {path}: {_named([first])} has {of_first[path]}, ' + ', '.join(
      f'{_named(indices)} {"has" if len(indices) == 1 else "have"} {value}'
      for value, indices in values.items()) for path, values in others.items()]
  return ('The processes do not agree, so none has started:\n' + '\n'.join(lines) +
          '\nStart all of them from the same files, with the same command but for --process_id. '
          + _DOCS)


def _named(indices: list[int]) -> str:
  if len(indices) == 1:
    return f'process {indices[0]}'
  shown = indices if len(indices) < 10 else [*indices[:8], '...', indices[-1]]
  return f'processes {", ".join(map(str, shown))}'


def _listen(port: int) -> socket.socket:
  if socket.has_dualstack_ipv6():
    return socket.create_server(('', port), family=socket.AF_INET6, dualstack_ipv6=True)
  return socket.create_server(('', port))


def _hold(server: socket.socket, me: dict, until: float, timeout: float) -> str | None:
  """Process 0: collects the others, tells them the verdict and returns it; None is good."""
  present, buffers = {0: (me, None)}, {}
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
        verdict = (f'{_named(missing).capitalize()} of {me["num_processes"]} did not come within '
                   f'{timeout:.0f} s (process 0 is on {me["who"]}). Was it started, with the '
                   'same --coordinator, and can it reach that port? More time: '
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
        trouble = _take_in(key.fileobj, selector, buffers, present, me)
        if trouble and not verdict:
          verdict = trouble
          until = min(until, time.monotonic() + _LATE)  # who is about to come hears it too
    verdict = verdict or disagreement(
        {index: hello['facts'] for index, (hello, _) in present.items()})
    _dismiss(buffers, verdict)
  return verdict


def _take_in(connection, selector, buffers, present, me) -> str | None:
  """Reads from a connection; fills `present`. Returns what makes the job impossible, or None."""
  try:
    data = connection.recv(1 << 16)
  except BlockingIOError:
    return None
  except OSError:
    data = b''
  buffers[connection] += data
  hello = _parsed(buffers[connection])
  known = next((i for i, (_, c) in present.items() if c is connection), None)
  if not data or (hello is None and (b'\n' in buffers[connection]
                                     or len(buffers[connection]) > _MOST)):
    # It has gone again, or is none of ours. Whoever starts it again is welcome.
    selector.unregister(connection)
    connection.close()
    del buffers[connection]
    present.pop(known, None)
  elif hello and known is None:
    index, count = hello['process_id'], hello['num_processes']
    if count != me['num_processes']:
      return (f'--num_processes={me["num_processes"]} of process 0 ({me["who"]}), but '
              f'--num_processes={count} of process {index} ({hello["who"]}). {_DOCS}')
    if index in present:
      return (f'--process_id={index} was given twice: to {present[index][0]["who"]}, and to '
              f'{hello["who"]}. Each process needs an id of its own, from 0 to {count - 1}. '
              f'{_DOCS}')
    present[index] = hello, connection
  return None


def _dismiss(connections, verdict: str | None):
  """Tells all the verdict, and waits a moment for them to hang up, so that the port is free."""
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


def _report(at: Place, me: dict, until: float, timeout: float) -> str | None:
  """The others: tell process 0, and return its verdict."""
  host, _, port = at.coordinator.rpartition(':')
  reason = 'nobody tried'
  while True:
    try:
      with socket.create_connection((host.strip('[]'), int(port)), timeout=5) as connection:
        # From here on process 0 counts, from when it was started.
        connection.settimeout(10 if at.index == 0 else timeout + 10)
        connection.sendall(json.dumps(me).encode() + b'\n')
        answer = _line(connection)
      found = _parsed(answer)
      if found and 'verdict' in found:
        return found['verdict']
      reason = 'it hung up' if not answer else 'what answers there is not a btx_jax that starts'
    except OSError as error:
      reason = error.strerror or str(error) or type(error).__name__
    left = until - time.monotonic()
    if left <= 0:
      break
    time.sleep(min(0.2, left))
  if at.index == 0:
    return (f'--coordinator={at.coordinator}: the port is taken on this machine ({me["who"]}), '
            'by another job or by another process with --process_id=0. Stop that, or choose '
            f'another port for all. {_DOCS}')
  return (f'--coordinator={at.coordinator} did not answer process {at.index} ({me["who"]}) '
          f'within {timeout:.0f} s: {reason}. Is that the host of process 0, was process 0 '
          f'started, and does a firewall let the port through? {_DOCS}')


def _line(connection) -> bytes:
  data = b''
  while not data.endswith(b'\n') and len(data) <= _MOST:
    more = connection.recv(1 << 16)
    if not more:
      break
    data += more
  return data


def _parsed(data: bytes) -> dict | None:
  """The message of a whole line of ours, else None."""
  if not data.endswith(b'\n'):
    return None
  with contextlib.suppress(ValueError):
    found = json.loads(data)
    if isinstance(found, dict) and found.get('greeting') == _GREETING:
      return found
  return None
