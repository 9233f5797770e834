"""A Hub on the loopback address: enough of its API for downloads and `push_to_hub`, over folders on disk.

python loopback_hub.py ROOT        # serves ROOT/<user>/<repository>; prints the port
"""

import base64
import hashlib
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse


ROOT = Path(sys.argv[1])


def files(repository: str) -> dict[str, Path]:
    root = ROOT / repository
    return {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}


def revision(repository: str) -> str:
    digest = hashlib.sha1()
    for name, path in files(repository).items():
        digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status: int, content=None, headers=None, kind: str = "application/json") -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/[^/]+)?(?:/.*)?", path):
            return self.describe(match[1], match[2])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self.send_file(match[1], match[2])
        return self.reply(404, headers={"X-Error-Code": "RepoNotFound"})

    def describe(self, repository: str, what: str | None) -> None:
        if not (ROOT / repository).is_dir():
            return self.reply(404, headers={"X-Error-Code": "RepoNotFound"})
        if what == "tree":
            sizes = {name: path.stat().st_size for name, path in files(repository).items()}
            return self.reply(200, [{"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in sizes.items()])
        siblings = [{"rfilename": name} for name in files(repository)]
        flags = {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        return self.reply(
            200,
            {
                "_id": "0",
                "id": repository,
                "modelId": repository,
                "sha": revision(repository),
                "siblings": siblings,
                **flags,
            },
        )

    def send_file(self, repository: str, name: str) -> None:
        if not (ROOT / repository).is_dir():
            return self.reply(404, headers={"X-Error-Code": "RepoNotFound"})
        headers = {"X-Repo-Commit": revision(repository)}
        path = files(repository).get(name)
        if path is None:
            return self.reply(404, headers={"X-Error-Code": "EntryNotFound", **headers})
        data = path.read_bytes()
        headers |= {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        return self.reply(200, data, headers, "application/octet-stream")

    def receive(self) -> None:
        path = unquote(urlparse(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = f"http://127.0.0.1:{self.server.server_port}"
        if path == "/api/repos/create":
            request = json.loads(body)
            repository = f"{request.get('organization') or 'me'}/{request['name']}"
            (ROOT / repository).mkdir(parents=True, exist_ok=True)
            return self.reply(200, {"url": f"{url}/{repository}", "name": repository})
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", path):
            asked = json.loads(body)["files"]
            uploads = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in asked]
            return self.reply(200, {"files": uploads})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            for line in body.decode().splitlines():
                operation = json.loads(line)
                if operation["key"] == "file":
                    target = ROOT / match[1] / operation["value"]["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(operation["value"]["content"]))
            commit = revision(match[1])
            return self.reply(
                200, {"commitUrl": f"{url}/{match[1]}/commit/{commit}", "commitOid": commit, "success": True}
            )
        return self.reply(404)

    do_GET = do_HEAD = answer
    do_POST = receive


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(server.server_port, flush=True)
    server.serve_forever()
