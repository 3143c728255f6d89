"""A small Hub on loopback for the real client, and a file host; both fail on request.

Among published packages there are mirrors that only download (olah) and a client whose server comes separately
(hf-local-hub), but no server that takes uploads and can be made to fail; hence this one. It speaks what
``huggingface_hub`` asks: repositories, revisions, trees, tags, commits with preupload and LFS, downloads with ranges.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = 'hf_loopback'


@dataclass
class Fault:
    """What goes wrong with requests whose ``METHOD path`` matches."""

    match: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut_at: int | None = None  # bytes sent before the connection is cut
    body: bytes | None = None  # sent instead of the file
    times: int = 1


@dataclass
class Repository:
    """Commits, oldest first, each a tree ``{path: content}``; and what names point at."""

    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def commit(self, tree: dict[str, bytes]) -> str:
        parts = [f'{path}{hashlib.sha256(content).hexdigest()}' for path, content in sorted(tree.items())]
        oid = hashlib.sha1(f'{len(self.commits)}{parts}'.encode()).hexdigest()
        self.commits.append((oid, tree))
        return oid

    def resolve(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        revision = self.tags.get(revision, revision)
        if revision == 'main':
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class HubServer(ThreadingHTTPServer):
    """State of the Hub and of the file host."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.drive: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.lock = threading.Lock()

    def handle_error(self, *args: Any) -> None:
        pass  # A client that hangs up is part of the tests.

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.server_port}'

    def add(self, name: str, tree: dict[str, bytes], tag: str | None = 'v1') -> Repository:
        """Make a repository as if somebody had published it."""
        repository = self.repositories.setdefault(name, Repository())
        oid = repository.commit(tree)
        if tag:
            repository.tags[tag] = oid
        return repository

    def fault(self, line: str) -> Fault | None:
        with self.lock:
            self.log.append(line)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, line):
                    fault.times -= 1
                    return fault
        return None

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.log)


def is_lfs(path: str, content: bytes) -> bool:
    return path.endswith(('.safetensors', '.pth', '.bin')) or len(content) > 10 << 20


def etag(path: str, content: bytes) -> str:
    if is_lfs(path, content):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    server: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        self.data = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        path = unquote(parts.path)
        self.active = self.server.fault(f'{self.command} {self.path} {self.headers.get("Range", "")}'.rstrip())
        if self.active and self.active.status:
            self._send(self.active.status, b'{"error": "on request"}', self.active.headers)
            return
        for pattern, handle in _ROUTES:
            found = re.fullmatch(pattern, f'{self.command} {path}')
            if found:
                handle(self, *found.groups())
                return
        self._send(404, f'no route {self.command} {path}'.encode())

    def _send(self, status: int, body: bytes = b'', headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {'Content-Type': 'application/json'})

    def _stream(self, content: bytes, headers: dict[str, str]) -> None:
        """Send a file or a range of it, cut or replaced on request."""
        fault, start, status = self.active, 0, 200
        if fault and fault.body is not None:
            content = fault.body
        wanted = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range') or '')
        if wanted:
            start, status = int(wanted[1]), 206
            headers = {**headers, 'Content-Range': f'bytes {start}-{len(content) - 1}/{len(content)}'}
        body = content[start:]
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command == 'HEAD':
            return
        if fault and fault.cut_at is not None:
            self.wfile.write(body[: fault.cut_at])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.wfile.write(body)

    def _repository(self, name: str, write: bool = False) -> Repository | None:
        authorized = self.headers.get('Authorization') == f'Bearer {TOKEN}'
        repository = self.server.repositories.get(name)
        if write and not authorized:
            self._send(403, b'{"error": "Forbidden"}')
            return None
        if repository is None or (repository.private and not authorized):
            if authorized:
                self._send(404, b'{}', {'X-Error-Code': 'RepoNotFound', 'X-Error-Message': 'Repository not found'})
            else:
                self._send(401, b'{}', {'X-Error-Message': 'Invalid username or password.'})
            return None
        return repository

    def _tree(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self._repository(name)
        if repository is None:
            return None
        commit = repository.resolve(revision)
        if commit is None:
            self._send(404, b'{}', {'X-Error-Code': 'RevisionNotFound', 'X-Error-Message': 'Invalid rev id'})
        return commit

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self._tree(name, revision)
        if commit is None:
            return
        oid, tree = commit
        if path not in tree:
            headers = {'X-Error-Code': 'EntryNotFound', 'X-Error-Message': 'Entry not found', 'X-Repo-Commit': oid}
            self._send(404, b'{}', headers)
            return
        content = tree[path]
        headers = {'X-Repo-Commit': oid, 'ETag': f'"{etag(path, content)}"'}
        if not is_lfs(path, content):
            self._stream(content, headers)
            return
        digest = etag(path, content)
        self.server.objects[digest] = content
        headers |= {'X-Linked-Etag': f'"{digest}"', 'X-Linked-Size': str(len(content))}
        # Another host name, as the real Hub's store of large files has.
        self._send(302, b'', {**headers, 'Location': f'http://localhost:{self.server.server_port}/lfs/{digest}'})

    def lfs(self, digest: str) -> None:
        self._stream(self.server.objects[digest], {'ETag': f'"{digest}"'})

    def models(self) -> None:
        author = self.query.get('author', [''])[0]
        self._json([{'id': name} for name in self.server.repositories if name.startswith(f'{author}/')])

    def refs(self, name: str) -> None:
        repository = self._repository(name)
        if repository is not None:
            tags = [{'name': t, 'ref': f'refs/tags/{t}', 'targetCommit': oid} for t, oid in repository.tags.items()]
            main = {'name': 'main', 'ref': 'refs/heads/main', 'targetCommit': repository.commits[-1][0]}
            self._json({'branches': [main], 'tags': tags, 'converts': []})

    def tree(self, name: str, revision: str) -> None:
        commit = self._tree(name, revision)
        if commit is None:
            return
        entries = []
        for path, content in commit[1].items():
            git = hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()
            entry: dict[str, Any] = {'type': 'file', 'path': path, 'size': len(content), 'oid': git}
            if is_lfs(path, content):
                entry['lfs'] = {'oid': etag(path, content), 'size': len(content), 'pointerSize': 134}
            entries.append(entry)
        self._json(entries)

    def create(self) -> None:
        if self.headers.get('Authorization') != f'Bearer {TOKEN}':
            self._send(401, b'{}', {'X-Error-Message': 'Invalid username or password.'})
            return
        asked = json.loads(self.data)
        name = f'{asked["organization"]}/{asked["name"]}'
        if name in self.server.repositories:
            self._json({'url': f'{self.server.url}/{name}', 'error': 'You already created this model repo'}, 409)
            return
        self.server.add(name, {'.gitattributes': b'*.safetensors filter=lfs\n'}, tag=None)
        self._json({'url': f'{self.server.url}/{name}', 'name': name})

    def validate(self) -> None:
        import yaml

        content = json.loads(self.data)['content']
        front = re.match(r'---\n(.*?)\n---\n', content, re.DOTALL)
        metadata = yaml.safe_load(front[1]) if front else {}
        missing = [key for key in ('license', 'library_name', 'pipeline_tag') if key not in metadata]
        errors = [{'message': f'missing {key}'} for key in missing]
        self._json({'errors': errors, 'warnings': []}, 400 if missing else 200)

    def preupload(self, name: str, revision: str) -> None:
        repository = self._repository(name, write=True)
        if repository is None:
            return
        head = repository.commits[-1][1]
        files = []
        for asked in json.loads(self.data)['files']:
            path = asked['path']
            mode = 'lfs' if is_lfs(path, b'') or asked['size'] > 10 << 20 else 'regular'
            oid = etag(path, head[path]) if path in head else None
            files.append({'path': path, 'uploadMode': mode, 'shouldIgnore': False, 'oid': oid})
        self._json({'files': files})

    def batch(self, name: str) -> None:
        if self._repository(name, write=True) is None:
            return
        objects = []
        for asked in json.loads(self.data)['objects']:
            answer = {'oid': asked['oid'], 'size': asked['size']}
            if asked['oid'] not in self.server.objects:
                answer['actions'] = {
                    'upload': {'href': f'{self.server.url}/upload/{asked["oid"]}'},
                    'verify': {'href': f'{self.server.url}/verify/{asked["oid"]}'},
                }
            objects.append(answer)
        self._json({'transfer': 'basic', 'objects': objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.data).hexdigest() != oid:
            self._send(422, b'{"error": "wrong content"}')
            return
        self.server.objects[oid] = self.data
        self._send(200)

    def verify(self, oid: str) -> None:
        self._send(200 if oid in self.server.objects else 404)

    def commit(self, name: str, revision: str) -> None:
        repository = self._repository(name, write=True)
        if repository is None:
            return
        tree = dict(repository.commits[-1][1])
        for line in self.data.decode().splitlines():
            item = json.loads(line)
            value = item['value']
            if item['key'] == 'file':
                tree[value['path']] = base64.b64decode(value['content'])
            elif item['key'] == 'lfsFile':
                tree[value['path']] = self.server.objects[value['oid']]
        oid = repository.commit(tree)
        self._json({'commitUrl': f'{self.server.url}/{name}/commit/{oid}', 'commitOid': oid})

    def tag(self, name: str, revision: str) -> None:
        repository = self._repository(name, write=True)
        if repository is None:
            return
        tag = json.loads(self.data)['tag']
        if tag in repository.tags:
            self._send(409, b'{"error": "Tag reference exists already"}')
            return
        repository.tags[tag] = repository.commits[-1][0]
        self._json({})

    def file_host(self) -> None:
        content = self.server.drive.get(self.query['id'][0])
        if content is None:
            self._send(404, b'<html>no such file</html>', {'Content-Type': 'text/html'})
            return
        headers = {'Content-Type': 'application/octet-stream', 'ETag': f'"{hashlib.md5(content).hexdigest()}"'}
        self._stream(content, {**headers, 'Content-Disposition': 'attachment; filename="weights.pth"'})


_NAME = r'([\w.-]+/[\w.-]+)'
_ROUTES = [
    (rf'(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)', _Handler.resolve),
    (r'(?:GET|HEAD) /lfs/(\w+)', _Handler.lfs),
    (r'GET /api/models', _Handler.models),
    (rf'GET /api/models/{_NAME}/refs', _Handler.refs),
    (rf'GET /api/models/{_NAME}/tree/([^/]+)', _Handler.tree),
    (r'POST /api/repos/create', _Handler.create),
    (r'POST /api/validate-yaml', _Handler.validate),
    (rf'POST /api/models/{_NAME}/preupload/(.+)', _Handler.preupload),
    (rf'POST /{_NAME}\.git/info/lfs/objects/batch', _Handler.batch),
    (r'PUT /upload/(\w+)', _Handler.upload),
    (r'POST /verify/(\w+)', _Handler.verify),
    (rf'POST /api/models/{_NAME}/commit/(.+)', _Handler.commit),
    (rf'POST /api/models/{_NAME}/tag/(.+)', _Handler.tag),
    (r'GET /uc', _Handler.file_host),
]


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """Run the servers until the block ends."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
