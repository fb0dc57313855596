"""A Hub that answers on this machine: repositories in memory, for the real huggingface_hub client.

    python tests/hub_double.py        # serves until interrupted; HF_ENDPOINT=http://127.0.0.1:PORT as it prints

Knows what the client asks for when it creates a repository, commits files and downloads them. A token `hf_write` may
write; any other one may not.
"""

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


COMMIT = "0" * 40


class HubDouble(ThreadingHTTPServer):
    """Serves while it is a context manager's; `repositories` maps a name to its files (`dict[str, bytes]`)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = {}
        self.private = set()  # names of those that not everyone may see
        self.branches = {COMMIT, "main"}  # of all repositories; their files are the same
        self.objects = {}  # large files by their hash, until a commit names them
        self.failing = None  # part of a path whose requests end with 503

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()


def mode(path):
    """How the Hub takes a file: weights as large files (LFS), the others within the commit."""
    return "lfs" if path.endswith((".safetensors", ".png")) else "regular"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urllib.parse.unquote(self.path.split("?")[0])
        if self.server.failing and self.server.failing in path:
            return self.answer(503, {"error": "out of order"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != "Bearer hf_write":
            return self.answer(403, {"error": "no right to write"})
        if path == "/api/repos/create":
            values = json.loads(body)
            name = f"{values.get('organization') or 'someone'}/{values['name']}"
            if name in self.server.repositories:
                return self.answer(409, {"error": "exists", "url": f"{self.server.endpoint}/{name}"})
            self.server.repositories[name] = {}
            self.server.private |= {name} if values.get("private") or values.get("visibility") == "private" else set()
            return self.answer(200, {"url": f"{self.server.endpoint}/{name}"})
        if match := re.fullmatch(r"/api/models/(.+)/branch/(.+)", path):
            if match[2] in self.server.branches or match[2].startswith("refs/"):
                return self.answer(409, {"error": "exists, or is no name of a branch"})
            self.server.branches.add(match[2])
            return self.answer(201, {})
        if match := re.fullmatch(r"/api/models/(.+)/preupload/.+", path):
            files = [
                {"path": file["path"], "uploadMode": mode(file["path"]), "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.endpoint}/objects/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/(.+?)/commit/(.+)", path):
            if match[2] not in self.server.branches:
                return self.answer(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
            files = self.server.repositories[match[1]]
            for key, value in ((line["key"], line["value"]) for line in map(json.loads, body.splitlines())):
                if key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    files[value["path"]] = self.server.objects[value["oid"]]
                elif key == "deletedFile":
                    del files[value["path"]]
            url = f"{self.server.endpoint}/{match[1]}/commit/{COMMIT}"
            return self.answer(200, {"commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None})
        self.answer(404, {"error": f"{path} is not known here"})

    def do_PUT(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name = self.path.removeprefix("/objects/")
        if hashlib.sha256(content).hexdigest() != name:
            return self.answer(400, {"error": "other content than its hash says"})
        self.server.objects[name] = content
        self.answer(200)

    def do_GET(self):
        path = urllib.parse.unquote(self.path.split("?")[0])
        repositories = self.server.repositories
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(refs/pr/\d+|[^/]+)(/.*)?", path):
            if match[2] not in self.server.branches:
                return self.answer(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
            folder = f"{(match[3] or '').strip('/')}/".lstrip("/")
            files = {name: file for name, file in repositories.get(match[1], {}).items() if name.startswith(folder)}
            entries = [
                {"type": "file", "path": name, "size": len(file), "oid": COMMIT}
                for name, file in files.items()
                if "/" not in name.removeprefix(folder) or "recursive=true" in self.path.lower()
            ]
            if folder and not entries:
                return self.answer(404, {"error": "no such folder"}, X_Error_Code="EntryNotFound")
            return self.answer(200, entries)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path):
            if match[1] not in repositories:
                return self.answer(404, {"error": "no such repository"}, X_Error_Code="RepoNotFound")
            if match[2] and match[2].removeprefix("/revision/") not in self.server.branches:
                return self.answer(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
            files = [{"rfilename": name} for name in repositories[match[1]]]
            private = match[1] in self.server.private
            return self.answer(200, {"id": match[1], "sha": COMMIT, "siblings": files, "tags": [], "private": private})
        if match := re.fullmatch(r"/(.+)/resolve/[^/]+/(.+)", path):
            if match[1] not in repositories:
                return self.answer(404, b"", X_Error_Code="RepoNotFound")
            content = repositories[match[1]].get(match[2])
            if content is None:
                return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            tag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self.answer(200, content, ETag=tag, X_Repo_Commit=COMMIT)
        self.answer(404, {"error": f"{path} is not known here"})

    do_HEAD = do_GET


if __name__ == "__main__":
    with HubDouble() as hub:
        print(hub.endpoint, flush=True)
        threading.Event().wait()
