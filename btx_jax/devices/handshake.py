"""The protocol by which two processes of a job authenticate each other on a connection.

    process i                                   process 0
    greeting, nonce                      ->
                                         <-     greeting, nonce, proof
    proof, hello                         ->
                                         <-     verdict

Proof, hello and verdict are sealed: they carry an HMAC of their purpose, of both nonces and of
their content, under the job's token. So the token is not sent, a recorded message cannot be
replayed, and each side proves that it has the token before the other says anything about the job.
Nothing is encrypted.

Only `parse_greeting` and `unseal` read what a stranger sends.
"""

import asyncio
import hmac
import json
import re
import secrets
from typing import Any, NamedTuple

MOST = 1 << 24  # largest body of a message, in bytes, from a process with the token
LIMIT = 1024  # bytes that are buffered of a stranger's line
_GREETING = 'btx_jax 2 {}\n'  # with a nonce
_MAC, _SIZE = 32, 4  # bytes


class Session(NamedTuple):
  """The token and both nonces, which authenticate the messages of a connection."""
  token: bytes
  nonces: bytes


class Hello(NamedTuple):
  """How a process introduces itself.

  Attributes:
    process_id: from 0.
    num_processes: of the job.
    who: its host and pid.
    facts: nested dicts of plain data that must be equal on all processes.
  """
  process_id: int
  num_processes: int
  who: str
  facts: dict[str, Any]


def greeting() -> tuple[bytes, bytes]:
  """A first line, and its nonce."""
  nonce = secrets.token_hex(16)
  return _GREETING.format(nonce).encode(), nonce.encode()


def parse_greeting(line: bytes) -> bytes:
  """The nonce in the first line from the other side.

  Raises:
    EOFError: the connection ended.
    ValueError: another program sent it, or another version of this one.
  """
  if not line:
    raise EOFError
  found = re.fullmatch(_GREETING.format('([0-9a-f]{32})').encode(), line)
  if not found:
    raise ValueError('not a greeting')
  return found[1]


def parse_hello(body: bytes) -> Hello:
  """Reads how a process introduces itself; raises ValueError for anything else."""
  try:
    found = json.loads(body)
  except RecursionError as error:
    raise ValueError('nested too deeply') from error
  match found:
    case {'process_id': int(index), 'num_processes': int(count), 'who': str(who),
          'facts': dict(facts)} if (
              type(index) is type(count) is int and 0 <= index < count
              and len(who) < 300 and who.isprintable()):
      return Hello(index, count, who, facts)
  raise ValueError('not a hello')


def seal(session: Session, purpose: bytes, body: bytes = b'') -> bytes:
  """A message: its HMAC, size and body. Without a body it only proves knowledge of the token."""
  mac = hmac.digest(session.token, purpose + b'\n' + session.nonces + body, 'sha256')
  return mac + len(body).to_bytes(_SIZE) + body


async def unseal(reader: asyncio.StreamReader, session: Session, purpose: bytes,
                 most: int = 0) -> bytes:
  """The body of a sealed message of at most `most` bytes.

  Raises:
    ValueError: the body is larger.
    PermissionError: the sender has another token.
    OSError, EOFError: the connection ended.
  """
  head = await reader.readexactly(_MAC + _SIZE)
  size = int.from_bytes(head[_MAC:])
  if size > most:
    raise ValueError('too large')
  body = await reader.readexactly(size)
  if not hmac.compare_digest(head[:_MAC], seal(session, purpose, body)[:_MAC]):
    raise PermissionError('another token')
  return body
