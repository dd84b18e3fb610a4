"""The processes of a job meet, whoever else connects to their port; or all hear why they cannot."""

from concurrent.futures import ThreadPoolExecutor
import contextlib
import json
import os
import re
import socket
import threading
import time

import pytest

from btx_jax.devices import handshake, meeting, rollcall
from btx_jax.errors import UsageError
from tests.jobs import free_port

TOKEN = b'a token of this job alone'


def attend(port: int, index: int, count: int, facts=None, timeout: float = 20,
           token: bytes = TOKEN) -> str | None:
  """One process at a meeting; its verdict."""
  place = rollcall.Place(f'localhost:{port}', count, index)
  try:
    meeting.meet_processes(place, token, facts or {}, timeout)
    return None
  except UsageError as error:
    return str(error)


def meet(*processes, timeout: float = 20) -> list[str | None]:
  """Lets processes (process_id, num_processes, facts) meet in threads; the verdict of each."""
  port = free_port()
  with ThreadPoolExecutor(len(processes)) as pool:
    return list(pool.map(lambda process: attend(port, *process, timeout=timeout), processes))


def test_processes_that_agree_are_let_through():
  assert meet(*((index, 4, {'a': {'b': [1, 2.5, None]}}) for index in range(4))) == [None] * 4


def test_all_hear_what_they_do_not_agree_on():
  long = 'x' * 1_000_000  # facts may be large; what a stranger sends may not
  verdicts = meet((0, 3, {'config': {'optimizer': {'peak_lr': 0.001}, 'x.y': 1}, 'long': long}),
                  (1, 3, {'config': {'optimizer': {'peak_lr': 0.001}, 'x.y': 1}, 'long': long}),
                  (2, 3, {'config': {'optimizer': {'peak_lr': 0.002}}, 'long': long}))
  assert len(set(verdicts)) == 1
  assert 'config.optimizer.peak_lr: process 0 has 0.001, process 2 has 0.002' in verdicts[0]
  assert 'config.x.y: process 0 has 1, process 2 has null' in verdicts[0]


def test_an_id_given_twice_names_both(monkeypatch):
  monkeypatch.setattr(meeting, '_LATE', 0.5)
  for twice in (0, 1):
    verdicts = meet((0, 3, {}), (1, 3, {}), (twice, 3, {}))
    assert len(set(verdicts)) == 1
    assert f'--process_id={twice} was given twice' in verdicts[0]
    assert verdicts[0].count(f'pid {os.getpid()}') == 2


def test_different_numbers_of_processes_are_named(monkeypatch):
  monkeypatch.setattr(meeting, '_LATE', 0.2)
  verdicts = meet((0, 2, {}), (1, 4, {}))
  assert all('--num_processes=2 on process 0' in verdict and '=4 on process 1' in verdict
             for verdict in verdicts)


def test_a_missing_process_is_named_in_time():
  began = time.monotonic()
  verdicts = meet((0, 4, {}), (2, 4, {}), timeout=1)
  assert time.monotonic() - began < 10
  assert all(verdict.startswith('Processes 1, 3 of 4 did not connect within 1 s')
             for verdict in verdicts)


def test_a_coordinator_that_does_not_answer_is_an_error_in_time():
  began = time.monotonic()
  verdict = attend(free_port(), 1, 2, timeout=0.5)
  assert 'did not answer process 1' in verdict and 'Connect call failed' in verdict
  with socket.create_server(('localhost', 0)) as other:  # something else listens there

    def answer():
      with contextlib.suppress(OSError):  # until `other` is closed
        while True:
          with other.accept()[0] as connection:
            connection.recv(1000)
            connection.sendall(b'HTTP/1.1 400 Bad Request\r\n')

    threading.Thread(target=answer, daemon=True).start()
    verdict = attend(other.getsockname()[1], 1, 2, timeout=0.5)
  assert re.search('is not btx_jax starting a job|reset by peer', verdict)
  assert time.monotonic() - began < 10


# Strangers


def send(port: int, data: bytes, wait: float = 0.0) -> bytes:
  """Sends this to process 0 as soon as it listens, and returns what it answers within a time."""
  with contextlib.suppress(ConnectionError), knock(port) as connection:
    connection.settimeout(wait)
    with contextlib.suppress(TimeoutError, BlockingIOError):
      connection.sendall(data)
      return connection.recv(1 << 16)
  return b''


def knock(port: int) -> socket.socket:
  end = time.monotonic() + 10
  while True:
    try:
      return socket.create_connection(('localhost', port), timeout=5)
    except ConnectionRefusedError:
      assert time.monotonic() < end
      time.sleep(0.01)


def introduce(port: int, token: bytes, hello: bytes, replay: bytes | None = None
              ) -> tuple[bytes, bytes, bytes]:
  """What somebody sends who knows the protocol, and perhaps the token; what process 0 replies."""
  ours = b'a' * 32
  with knock(port) as connection, connection.makefile('rb') as lines:
    connection.sendall(b'btx_jax 2 ' + ours + b'\n')
    theirs = handshake.parse_greeting(lines.readline())
    proof = lines.read(36)
    session = handshake.Session(token, ours + theirs)
    sent = replay or handshake.seal(session, b'process') + handshake.seal(session, b'hello', hello)
    with contextlib.suppress(ConnectionError, TimeoutError):
      connection.sendall(sent)
      connection.settimeout(1)
      return proof, sent, lines.read(1)
  return proof, sent, b''


def hello(index=1, count=2, **changes) -> bytes:
  return json.dumps({'process_id': index, 'num_processes': count, 'who': 'x', 'facts': {}} | changes
                    ).encode()


@pytest.mark.parametrize('stranger', [
    b'GET / HTTP/1.1\r\nHost: x\r\n\r\n', b'\x16\x03\x01\x02\x00\x01\xfc' * 99, b'\n' * 5000,
    b'', b'{"greet', b'btx_jax 2 ', b'btx_jax 1\n', b'btx_jax 2 ' + b'g' * 32 + b'\n',
    b'btx_jax 2 ' + b'a' * 32 + b'\n' + b'\0' * 36,
    b'btx_jax 2 ' + b'a' * 32 + b'\n' + b'\xff' * 99,
    b'x' * 100_000_000])
def test_no_stranger_keeps_a_job_from_its_meeting_or_hears_of_it(stranger):
  port = free_port()
  with ThreadPoolExecutor(2) as pool:
    first = pool.submit(attend, port, 0, 2, {'secret': 'of the job'})
    with knock(port) as hangs:  # and says nothing more until the end
      with contextlib.suppress(OSError):
        hangs.settimeout(0.2)
        hangs.sendall(stranger)
      answer = send(port, stranger, 0.1)
      began = time.monotonic()
      assert attend(port, 1, 2, {'secret': 'of the job'}) is first.result() is None
      assert time.monotonic() - began < 8  # less than any of them may take
  assert b'secret' not in answer and b'pid' not in answer and len(answer) < 80


def test_a_thousand_connections_that_say_nothing_do_not_keep_processes_out():
  port = free_port()
  with ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as stack:
    first = pool.submit(attend, port, 0, 3)
    second = pool.submit(attend, port, 1, 3)
    began = time.monotonic()
    for _ in range(1000):
      with contextlib.suppress(ConnectionError):
        stack.enter_context(knock(port)).setblocking(False)
    assert attend(port, 2, 3) is first.result() is second.result() is None
    assert time.monotonic() - began < 10


def test_only_the_token_opens_and_no_recorded_message_does_so_again(monkeypatch):
  monkeypatch.setattr(meeting, '_PATIENCE', 1.0)
  port, other = free_port(), free_port()
  with ThreadPoolExecutor(2) as pool:
    first = pool.submit(attend, other, 0, 2)
    _, recorded, verdict = introduce(other, TOKEN, hello())  # what a real process says
    assert first.result() is None and verdict

    first = pool.submit(attend, port, 0, 2)
    proof, _, verdict = introduce(port, TOKEN, b'', recorded)
    assert verdict == b'' and TOKEN not in recorded and proof[:32] not in recorded
    assert introduce(port, b'', hello())[2] == b''  # no token
    assert introduce(port, b'a token of this job alona', hello())[2] == b''
    assert introduce(port, b'', b'', proof)[2] == b''  # what process 0 itself has just said
    assert handshake.seal(handshake.Session(b'k', b'n'), b'hello')[:32] != (
        handshake.seal(handshake.Session(b'k', b'n'), b'process'))[:32]
    # With another token: hears so, soon, and says nothing about itself.
    verdict = attend(port, 1, 2, token=b'another token altogether')
    assert 'there has another BTX_JAX_TOKEN than process 1' in verdict
    assert attend(port, 1, 2) is first.result() is None


def test_whoever_lacks_the_token_is_counted_if_a_process_is_missing(monkeypatch):
  monkeypatch.setattr(meeting, '_PATIENCE', 0.3)
  port = free_port()
  with ThreadPoolExecutor(2) as pool:
    first = pool.submit(attend, port, 0, 2, timeout=1)
    assert 'another BTX_JAX_TOKEN' in attend(port, 1, 2, timeout=1, token=b'another one')
    assert re.search(r'Of those that connected, \d had another BTX_JAX_TOKEN', first.result())


@pytest.mark.parametrize('body', [
    hello(99), hello(-1), hello(2), hello(True), hello(1.0), hello('1'), hello(1, None),
    hello(1, 0), hello(1, [2]), hello(who=3), hello(who='\x1b[2J'), hello(who='x' * 300),
    hello(facts=[]), b'[]', b'null', b'\xff', b'', b'{"a":' * 100_000, b'9' * 5000])
def test_an_introduction_of_wrong_types_or_out_of_range_is_refused(body):
  with pytest.raises(ValueError):
    handshake.parse_hello(body)


def test_who_hangs_up_may_come_again_and_who_makes_no_sense_is_dropped():
  port = free_port()
  with ThreadPoolExecutor(2) as pool:
    first = pool.submit(attend, port, 0, 3)
    for body in (hello(99, 3), b'{"a":' * 100_000, hello(1, 3)):  # even with the token
      introduce(port, TOKEN, body)
    time.sleep(0.1)
    second = pool.submit(attend, port, 1, 3)
    assert attend(port, 2, 3) is first.result() is second.result() is None


# Where process 0 listens


def addresses(monkeypatch, *found: str):
  """Name lookup finds these."""
  monkeypatch.setattr(socket, 'getaddrinfo', lambda host, port, **options: [
      (socket.AF_INET, socket.SOCK_STREAM, 6, '', (each, port)) for each in found])


@pytest.mark.parametrize('host, found, bound', [
    ('localhost', ['127.0.0.1'], '127.0.0.1'),
    ('node0', ['127.0.1.1', '10.255.255.1'], None),  # itself a loopback address; then, behind NAT
    ('node0', [], None)])
def test_process_0_listens_to_its_own_address_else_to_all_and_says_so(
    monkeypatch, capsys, host, found, bound):
  addresses(monkeypatch, *found)
  port = free_port()
  server, address = meeting._listen(f'{host}:{port}')
  with server:
    assert address == (bound and f'{bound}:{port}')
    assert (server.getsockname()[0] in ('::', '0.0.0.0')) == (bound is None)
  assert ('JAX_COORDINATOR_BIND_ADDRESS' in capsys.readouterr().err) == (bound is None)


def test_without_a_token_only_this_machine_may_take_part(monkeypatch):
  at = lambda coordinator: rollcall.Place(coordinator, 2, 0)
  for local in ('localhost:1', '127.0.0.1:1', '[::1]:1'):
    assert rollcall.secret(at(local), None) == b''
  for remote in ('node0:1', '10.0.0.1:1', '[fd00::1]:1', '0.0.0.0:1', 'localhost.example.com:1'):
    with pytest.raises(UsageError, match='BTX_JAX_TOKEN is not set'):
      rollcall.secret(at(remote), '')
  with pytest.raises(UsageError, match='BTX_JAX_TOKEN is not set'):
    rollcall.secret(rollcall.bind(at('localhost:1'), '0.0.0.0:1'), None)
  with pytest.raises(UsageError, match='BIND_ADDRESS=mine must be ADDRESS:PORT'):
    rollcall.bind(at('node0:1'), 'mine')
  with pytest.raises(UsageError, match='BTX_JAX_TOKEN has 6 characters') as error:
    rollcall.secret(at('localhost:1'), 'hidden')
  assert 'hidden' not in str(error.value)
  addresses(monkeypatch, '8.8.8.8')  # somebody else decides what localhost is
  with pytest.raises(UsageError, match='process 0 cannot listen there'):
    meeting.meet_processes(at(f'localhost:{free_port()}'), b'', {}, 1)


@pytest.mark.parametrize('place, message', [
    (('node:1', None, None), '--num_processes and --process_id are missing'),
    (('node:1', 2, None), '--process_id is missing'),
    ((None, 2, 0), '--coordinator is missing'),
    (('node', 2, 0), '--coordinator=node must be HOST:PORT'),
    (('node:0', 2, 0), '--coordinator=node:0 must be'),
    (('node:1', 0, 0), '--num_processes=0'),
    (('node:1', 2, 2), '--process_id=2 must be from 0 to 1'),
])
def test_flags_that_cannot_be(place, message):
  with pytest.raises(UsageError, match=message):
    rollcall.place_from_flags(*place)
