"""A stand-in for the Hugging Face hub on loopback: repositories are made, filled and read through `huggingface_hub`."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_standin"
LARGE = (".safetensors", ".pt2")


class Hub(ThreadingHTTPServer):
    """The server; ``repos`` is (type, name) → files of each commit, oldest first, ``made`` how each was asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.made, self.messages, self.large, self.asked = {}, {}, [], {}, []

    def put(self, kind, name, files):
        """A repository that others have filled."""
        self.repos[kind, name] = [files]


def sha(files):
    """Commit of what a repository holds."""
    listing = [(name, hashlib.sha256(content).hexdigest()) for name, content in sorted(files.items())]
    return hashlib.sha1(json.dumps(listing).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, told):
        self.answer(status, {"error": told}, X_Error_Code=code, X_Error_Message=told)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def commits(self, kind, name):
        found = self.server.repos.get((kind, name))
        if found is None:
            self.refuse(401, "RepoNotFound", "Repository not found")
        return found

    def files(self, commits, revision):
        """Those of a revision; main is the newest."""
        known = {sha(files): files for files in commits} | {"main": commits[-1]}
        if revision not in known:
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        return known.get(revision)

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        self.server.asked.append(path)
        if match := re.fullmatch(r"/api/(model|dataset)s/([\w.-]+/[\w.-]+)(?:/(revision|tree)/([\w.-]+))?", path):
            kind, name, what, revision = match.groups()
            if (commits := self.commits(kind, name)) and (files := self.files(commits, revision or "main")) is not None:
                self.answer(200, self.tree(files) if what == "tree" else {"id": name, "sha": sha(files)})
        elif match := re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", path):
            self.resolve("dataset" if match[1] else "model", *match.groups()[1:])
        else:
            self.refuse(404, "NotFound", path)

    do_HEAD = do_GET

    def tree(self, files):
        entries = []
        for name, content in files.items():
            oid = hashlib.sha1(content).hexdigest()
            entry = {"type": "file", "path": name, "size": len(content), "oid": oid}
            if name.endswith(LARGE):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 100}
            entries.append(entry)
        return entries

    def resolve(self, kind, name, revision, file):
        if (commits := self.commits(kind, name)) is None or (files := self.files(commits, revision)) is None:
            return
        if file not in files:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        content = files[file]
        digest = (hashlib.sha256 if file.endswith(LARGE) else hashlib.sha1)(content).hexdigest()
        self.answer(200, content, ETag=f'"{digest}"', X_Repo_Commit=sha(files), Content_Type="application/octet-stream")

    def do_PUT(self):
        content = self.body()
        if hashlib.sha256(content).hexdigest() != self.path.rpartition("/")[2]:
            self.refuse(400, "Digest", "not what was announced")
            return
        self.server.large[self.path.rpartition("/")[2]] = content
        self.answer(200)

    def do_POST(self):
        path, body = unquote(self.path.partition("?")[0]), self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse(401, "Unauthorized", "Invalid username or password.")
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif match := re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.url}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/(model|dataset)s/([\w.-]+/[\w.-]+)/(preupload|commit)/main", path):
            if (commits := self.commits(match[1], match[2])) is not None:
                (self.preupload if match[3] == "preupload" else self.commit)(commits, body)
        else:
            self.refuse(404, "NotFound", path)

    def create(self, asked):
        key = asked.get("type", "model"), f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "others":
            self.refuse(403, "Forbidden", "You don't have the rights to create a model under this namespace")
            return
        there = key in self.server.repos
        self.server.repos.setdefault(key, [{}])
        self.server.made.setdefault(key, asked)
        prefix = "datasets/" if key[0] == "dataset" else ""
        self.answer(409 if there else 200, {"url": f"{self.server.url}/{prefix}{key[1]}"})

    def preupload(self, commits, body):
        files = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for each in json.loads(body)["files"]
        ]
        self.answer(200, {"files": files})

    def commit(self, commits, body):
        files = dict(commits[-1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        commits.append(files)
        oid = sha(files)
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/x/y/commit/{oid}"})


@contextmanager
def hub_server():
    """A hub without repositories, while the block runs."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
