"""A local stand-in for the Hugging Face hub: the requests that uploads and downloads make.

The real client talks to it. Files are uploaded inline, inside the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StandIn:
    """Serves `repositories` {id: {path: content}} and records `requests` as "METHOD path", in order.

    Refuses to write without the `token`.
    """

    def __init__(self, token: str = "hf_stand_in") -> None:
        self.token = token
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(content))} | headers).items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def json(self, value: Any, status: int = 200) -> None:
                self.answer(json.dumps(value).encode(), status, Content_Type="application/json")

            def refuse(self, status: int, code: str, message: str) -> None:
                self.answer(message.encode(), status, X_Error_Code=code, X_Error_Message=message)

            def body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def do_GET(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                path = self.path.split("?")[0].strip("/")
                if not path:
                    return self.answer(b"hub")
                allowed = self.headers.get("Authorization") == f"Bearer {hub.token}"
                if path.startswith("api/models/"):
                    name, tree, _ = path.removeprefix("api/models/").partition("/tree/")
                    name = name.split("/revision/")[0]
                    if name not in hub.repositories or (name in hub.private and not allowed):
                        return self.refuse(401, "RepoNotFound", "Repository not found")
                    if tree:
                        entries = hub.repositories[name].items()
                        return self.json([{"type": "file", "path": f, "size": len(c), "oid": ""} for f, c in entries])
                    files = [{"rfilename": file} for file in hub.repositories[name]]
                    return self.json({"id": name, "sha": hub.commit(name), "siblings": files, "private": False})
                name, _, rest = path.partition("/resolve/")
                file = rest.partition("/")[2]
                content = hub.repositories.get(name, {}).get(file)
                if content is None:
                    return self.refuse(404, "EntryNotFound", "Entry not found")
                tag = hashlib.sha1(content).hexdigest()
                return self.answer(content, ETag=f'"{tag}"', X_Repo_Commit=hub.commit(name))

            do_HEAD = do_GET  # noqa: N815

            def do_POST(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                body, path = self.body(), self.path.split("?")[0].strip("/")
                if path == "api/validate-yaml":
                    return self.json({"errors": [], "warnings": []})
                if self.headers.get("Authorization") != f"Bearer {hub.token}":
                    return self.refuse(401, "", "Invalid username or password.")
                if path == "api/repos/create":
                    asked = json.loads(body)
                    name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
                    address = {"url": f"{hub.url}/{name}", "id": name}
                    if name in hub.repositories:
                        return self.json(address | {"error": "You already created this model repo"}, 409)
                    hub.repositories[name] = {}
                    if asked.get("private") or asked.get("visibility") == "private":
                        hub.private.add(name)
                    return self.json(address)
                name = path.removeprefix("api/models/").rpartition("/")[0].rpartition("/")[0]
                if path.startswith("api/models/") and "/preupload/" in path:
                    files = [file["path"] for file in json.loads(body)["files"]]
                    return self.json(
                        {"files": [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]}
                    )
                if path.startswith("api/models/") and "/commit/" in path:
                    for line in body.splitlines():
                        item = json.loads(line)
                        if item["key"] == "file":
                            value = item["value"]
                            hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
                    commit = hub.commit(name)
                    return self.json(
                        {"success": True, "commitOid": commit, "commitUrl": f"{hub.url}/{name}/commit/{commit}"}
                    )
                return self.refuse(404, "", f"the stand-in knows no {path}")

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def fetched(self) -> set[str]:
        """Paths of the requested files, within their repositories."""
        return {request.split("/resolve/")[1].split("/", 1)[1] for request in self.requests if "/resolve/" in request}

    def commit(self, name: str) -> str:
        content = repr(sorted((k, hashlib.sha1(v).hexdigest()) for k, v in self.repositories[name].items()))
        return hashlib.sha1(content.encode()).hexdigest()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
