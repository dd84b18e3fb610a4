"""The processes of a job meet before jax starts, to find out whether the job can start at all.

When a process is missing, when two have the same id, or when no coordinator answers, jax aborts
every process from C++; its log has the numbers of missing processes at most. Python cannot catch
that: jax's key-value store answers only after all have connected. So each process first introduces
itself to process 0 (handshake.py), at the address that jax's coordinator uses afterwards. All
receive the same verdict, in words.

A stranger's connection takes at most 256 kB of process 0, and lasts at most 10 s. At most 64 of
them are open besides as many as the job has processes: when more connect, the oldest one is closed.
A process of the job that loses its connection this way connects again.
"""

import asyncio
from collections.abc import Mapping
import contextlib
import dataclasses
import errno
import ipaddress
import json
import os
import socket
import sys
import time
from typing import Any

from btx_jax.devices import handshake, rollcall
from btx_jax.devices.handshake import Hello
from btx_jax.errors import UsageError

_STRANGERS = 64  # connections without the token, besides the number of processes
_PATIENCE = 10.0  # seconds for an introduction, and of retries against a wrong process 0 or token
_LATE = 3.0  # seconds to wait, after a fatal mistake, for processes that should learn of it
_FAREWELL = 5.0  # seconds in which all must have received the verdict and hung up


@dataclasses.dataclass
class _Roll:
  """The state of the meeting on process 0.

  Attributes:
    me: process 0 itself.
    token: the job's token.
    changed: set whenever something below has changed.
    present: processes by index.
    strangers: tasks of connections that have not shown the token yet, the oldest first.
    members: connections that have shown it.
    refused: number of connections with a valid greeting that did not show the token.
    mistake: why the job cannot start; empty if nothing is known to be wrong.
  """
  me: Hello
  token: bytes
  changed: asyncio.Event
  present: dict[int, Hello]
  strangers: dict[asyncio.Task, None] = dataclasses.field(default_factory=dict)
  members: dict[asyncio.StreamWriter, handshake.Session] = dataclasses.field(default_factory=dict)
  refused: int = 0
  mistake: str = ''


def meet_processes(place: rollcall.Place, token: bytes, facts: Mapping[str, Any],
                   timeout: float) -> str | None:
  """Returns once all processes of the job are connected and have equal facts.

  Args:
    place: of this process.
    token: the secret that all of them share, from rollcall.secret.
    facts: nested dicts of plain data that must be equal on all processes.
    timeout: seconds to wait for the coordinator to answer, and for all processes to connect.

  Returns:
    the address on which process 0 listened; None on others, or if it listened on all addresses.

  Raises:
    UsageError: the same on all connected processes: some are missing, two have the same id, or
      the facts differ. Or the coordinator does not answer.
  """
  me = Hello(place.index, place.count, f'{socket.gethostname()}, pid {os.getpid()}', dict(facts))
  until, server, bound = time.monotonic() + timeout, None, None
  if place.index == 0:
    try:
      server, bound = _listen(place.bind or place.coordinator)
    except OSError as error:
      # If the port is taken, another process 0 answers at once; anything else there never does.
      if error.errno != errno.EADDRINUSE:
        raise UsageError(f'--coordinator={place.coordinator}: process 0 cannot listen there '
                         f'({error.strerror or error}).') from error
  verdict = asyncio.run(_host(server, token, me, until, timeout) if server else
                        _ask(place.coordinator, token, me, until, timeout))
  if verdict:
    raise UsageError(verdict)
  return bound


def _listen(address: str) -> tuple[socket.socket, str | None]:
  """Listens on HOST:PORT, or on all addresses if HOST is not an address of this machine.

  Returns:
    the socket; and its address, or None if it listens on all.
  """
  host, port = rollcall.split_address(address)
  loopback = rollcall.is_loopback(host)
  with contextlib.suppress(socket.gaierror):
    for family, _, _, _, found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
      # Many machines map their own name to 127.0.1.1, where no other machine reaches them.
      if ipaddress.ip_address(found[0]).is_loopback != loopback:
        continue
      try:
        numeric = f'[{found[0]}]' if family == socket.AF_INET6 else found[0]
        return socket.create_server(found, family=family), f'{numeric}:{port}'
      except OSError as error:
        if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
          raise
  if loopback:  # perhaps without a token: only for this machine
    raise OSError(errno.EADDRNOTAVAIL, f'{host} is not an address of this machine')
  print(f'btx_jax: {host} is not an address that this machine has itself (NAT, or a name that '
        '/etc/hosts maps to loopback): process 0 listens on all of its addresses. '
        f'{rollcall.BIND}=ADDRESS:{port} sets one.', file=sys.stderr, flush=True)
  if socket.has_dualstack_ipv6():
    return socket.create_server(('', port), family=socket.AF_INET6, dualstack_ipv6=True), None
  return socket.create_server(('', port)), None


async def _host(listening: socket.socket, token: bytes, me: Hello, until: float, timeout: float
                ) -> str:
  """On process 0: waits for the others, sends them the verdict and returns it; '' is success."""
  roll = _Roll(me, token, asyncio.Event(), {0: me})
  accepting = asyncio.create_task(_accept(roll, listening))
  try:
    verdict = await _decide(roll, until, timeout)
    for writer, session in roll.members.items():
      writer.write(handshake.seal(session, b'verdict', verdict.encode()[:handshake.MOST]))
    until = time.monotonic() + _FAREWELL
    while roll.members and time.monotonic() < until:  # they hang up, which frees the port
      await _wait(roll.changed, until)
    return verdict
  finally:
    accepting.cancel()  # asyncio.run cancels `_attend`
    listening.close()


async def _accept(roll: _Roll, listening: socket.socket):
  """On process 0: accepts all connections, and closes the oldest of strangers if there are many."""
  # asyncio's own server accepts many at once, and does not recover if file descriptors run out.
  listening.listen(1024)
  listening.setblocking(False)
  connections: dict[asyncio.Task, socket.socket] = {}

  def close(task: asyncio.Task):  # even if it was cancelled before it began
    connections.pop(task).close()
    roll.strangers.pop(task, None)

  while True:
    try:
      connection, _ = await asyncio.get_running_loop().sock_accept(listening)
    except OSError as error:
      if error.errno in (errno.EMFILE, errno.ENFILE) and roll.strangers:
        next(iter(roll.strangers)).cancel()
      await asyncio.sleep(0.01)
      continue
    task = asyncio.create_task(_attend(roll, connection))
    connections[task], roll.strangers[task] = connection, None
    task.add_done_callback(close)
    if len(roll.strangers) > roll.me.num_processes + _STRANGERS:
      next(iter(roll.strangers)).cancel()
      await asyncio.sleep(0)


async def _decide(roll: _Roll, until: float, timeout: float) -> str:
  """Waits until all are present, or cannot be; returns why the job cannot start, or ''."""
  count = roll.me.num_processes
  while len(roll.present) < count and time.monotonic() < until:
    await _wait(roll.changed, until)
    if roll.mistake:
      until = min(until, time.monotonic() + _LATE)
  if roll.mistake:
    return roll.mistake
  missing = [index for index in range(count) if index not in roll.present]
  if not missing:
    return rollcall.disagreement({i: hello.facts for i, hello in roll.present.items()}) or ''
  refused = (f' Of those that connected, {roll.refused} had another {rollcall.TOKEN}.'
             if roll.refused else '')
  return (f'{rollcall.processes(missing).capitalize()} of {count} did not connect within '
          f'{timeout:.0f} s (process 0 is on {roll.me.who}).{refused} Check that '
          f'{"it was" if len(missing) == 1 else "they were"} started with the same --coordinator '
          f'and can reach that port, or raise --coordinator_timeout. {rollcall.DOCS}')


async def _wait(changed: asyncio.Event, until: float):
  """Waits for the next change, at most until the time `until`."""
  with contextlib.suppress(TimeoutError):
    async with asyncio.timeout(max(0.0, until - time.monotonic())):
      await changed.wait()
  changed.clear()


async def _attend(roll: _Roll, connection: socket.socket):
  """On process 0: serves one connection until it hangs up."""
  task, hello = asyncio.current_task(), None
  assert task
  reader, writer = await asyncio.open_connection(sock=connection, limit=handshake.LIMIT)
  try:
    async with asyncio.timeout(_PATIENCE):
      theirs = handshake.parse_greeting(await reader.readline())
      line, ours = handshake.greeting()
      session = handshake.Session(roll.token, theirs + ours)
      writer.write(line + handshake.seal(session, b'process 0'))
      roll.refused += 1
      await handshake.unseal(reader, session, b'process')
      roll.refused -= 1
      roll.strangers.pop(task, None)
      roll.members[writer] = session
      body = await handshake.unseal(reader, session, b'hello', handshake.MOST)
      hello = handshake.parse_hello(body)
    _take_down(roll, hello)
    roll.changed.set()
    await reader.read(1)
  except (OSError, EOFError, ValueError):
    pass  # no process of ours, or one that may connect again
  finally:
    roll.strangers.pop(task, None)
    roll.members.pop(writer, None)
    if hello and roll.present.get(hello.process_id) is hello:  # it may be started again
      del roll.present[hello.process_id]
    writer.transport.abort()
    roll.changed.set()


def _take_down(roll: _Roll, hello: Hello):
  """Adds a process to those present, or sets `mistake` if it cannot be part of the job."""
  index, count, me = hello.process_id, hello.num_processes, roll.me
  if count != me.num_processes:
    mistake = (f'--num_processes={me.num_processes} on process 0 ({me.who}), but '
               f'--num_processes={count} on process {index} ({hello.who}). {rollcall.DOCS}')
  elif index in roll.present:
    mistake = (f'--process_id={index} was given twice: to {roll.present[index].who}, and to '
               f'{hello.who}. Each process needs its own id, from 0 to {count - 1}. '
               f'{rollcall.DOCS}')
  else:
    roll.present[index] = hello
    return
  roll.mistake = roll.mistake or mistake


async def _ask(coordinator: str, token: bytes, me: Hello, until: float, timeout: float) -> str:
  """On the other processes: introduces this one to process 0, and returns the verdict."""
  reason, other_token = 'no attempt was made', False
  if me.process_id == 0:
    until = min(until, time.monotonic() + _PATIENCE)
  while True:
    try:
      return await _introduce(coordinator, token, me, timeout)
    except PermissionError:  # perhaps an earlier job that is just ending
      other_token, until = True, min(until, time.monotonic() + _PATIENCE)
    except EOFError:
      reason = 'it hung up'
    except ValueError:
      reason = 'the program that answers there is not btx_jax starting a job'
    except OSError as error:
      reason = str(error) or type(error).__name__
    left = until - time.monotonic()
    if left <= 0:
      break
    await asyncio.sleep(min(0.2, left))
  if me.process_id == 0:
    return (f'--coordinator={coordinator}: the port is taken on this machine ({me.who}), by '
            'another job or by another process with --process_id=0. Stop that one, or choose '
            f'another port for all processes. {rollcall.DOCS}')
  if other_token:
    return (f'--coordinator={coordinator}: the process that answers there has another '
            f'{rollcall.TOKEN} than process {me.process_id} ({me.who}), or none. Set the same one '
            f'on all processes; if that is another job, choose another port. {rollcall.DOCS}')
  return (f'--coordinator={coordinator} did not answer process {me.process_id} ({me.who}) within '
          f'{timeout:.0f} s: {reason}. Check that this is the host of process 0, that process 0 '
          f'was started, and that no firewall blocks the port. {rollcall.DOCS}')


async def _introduce(coordinator: str, token: bytes, me: Hello, timeout: float) -> str:
  """One attempt of _ask; raises OSError, EOFError or ValueError as unseal does."""
  async with asyncio.timeout(_PATIENCE):
    reader, writer = await asyncio.open_connection(
        *rollcall.split_address(coordinator), limit=handshake.LIMIT, happy_eyeballs_delay=0.25)
  try:
    line, ours = handshake.greeting()
    writer.write(line)
    async with asyncio.timeout(_PATIENCE):
      theirs = handshake.parse_greeting(await reader.readline())
      session = handshake.Session(token, ours + theirs)
      await handshake.unseal(reader, session, b'process 0')
      hello = json.dumps(me._asdict()).encode()
      for purpose, body in ((b'process', b''), (b'hello', hello)):
        writer.write(handshake.seal(session, purpose, body))
      await writer.drain()
    # From here on the timeout of process 0 counts, from when that was started.
    async with asyncio.timeout(_PATIENCE + (timeout if me.process_id else 0)):
      body = await handshake.unseal(reader, session, b'verdict', handshake.MOST)
    return body.decode(errors='replace')
  finally:
    writer.transport.abort()
    await asyncio.sleep(0)
