"""The authors' file host as gdown meets it, on loopback: a proxy that answers for the host itself, over TLS.

The client asks for the real address, https and all; the proxy's certificate authority is one that the test trusts.
"""

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import trustme

HOSTS = ('drive.google.com', 'drive.usercontent.google.com')
SCAN_PAGE = (
    '<!DOCTYPE html><html><body><p>This file is too large to be scanned.</p>\n'
    '<form id="download-form" action="https://drive.usercontent.google.com/download" method="get">'
    '<input type="hidden" name="id" value="{id}"><input type="hidden" name="confirm" value="t"></form>\n</body></html>'
)
QUOTA_PAGE = (
    '<!DOCTYPE html><html><title>Quota exceeded</title><body>\n'
    '<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.</p>\n</body></html>'
)


class _Host(BaseHTTPRequestHandler):
    """Answers as the file host, inside the tunnel."""

    protocol_version = 'HTTP/1.1'

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        proxy: Any = self.server
        host, query = self.headers['Host'], parse_qs(urlsplit(self.path).query)
        proxy.log.append(f'{host}{self.path}')
        file = proxy.files.get(query['id'][0])
        if proxy.quota or file is None:
            self._send(QUOTA_PAGE.encode(), {'Content-Type': 'text/html; charset=utf-8'})
        elif host == HOSTS[0]:
            self._send(SCAN_PAGE.format(id=query['id'][0]).encode(), {'Content-Type': 'text/html; charset=utf-8'})
        else:
            headers = {'Content-Type': 'application/octet-stream', 'ETag': '"1"'}
            self._send(file, {**headers, 'Content-Disposition': 'attachment; filename="weights.pth"'})

    def _send(self, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for key, value in {**headers, 'Content-Length': str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


class _Tunnel(BaseHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass

    def do_CONNECT(self) -> None:
        proxy: Any = self.server
        self.send_response(200)
        self.end_headers()
        _Host(proxy.context.wrap_socket(self.connection, server_side=True), self.client_address, proxy)
        self.close_connection = True


class DriveProxy(ThreadingHTTPServer):
    """State: files by id, whether the quota is used up, what was asked."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(('127.0.0.1', 0), _Tunnel)
        authority = trustme.CA()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*HOSTS).configure_cert(self.context)
        self.certificate = folder / 'authority.pem'
        authority.cert_pem.write_to_path(str(self.certificate))
        self.files: dict[str, bytes] = {}
        self.quota = False
        self.log: list[str] = []

    def handle_error(self, *args: Any) -> None:
        pass  # A client that hangs up is no news.


@contextmanager
def running_drive(folder: Path, monkeypatch: Any) -> Iterator[DriveProxy]:
    """Run the proxy until the block ends, with this process's requests going through it."""
    proxy = DriveProxy(folder)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True)
    thread.start()
    for name in ('NO_PROXY', 'no_proxy', 'KW_HUB_FILE_HOST'):
        monkeypatch.delenv(name, raising=False)
    for name in ('HTTPS_PROXY', 'https_proxy'):
        monkeypatch.setenv(name, f'http://127.0.0.1:{proxy.server_port}')
    monkeypatch.setenv('REQUESTS_CA_BUNDLE', str(proxy.certificate))
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
