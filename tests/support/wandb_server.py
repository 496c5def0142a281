"""A stand-in for W&B's server: it lets an online run begin, notes what it gets, and then dies or falls silent."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_SILENCE = 3600.0  # seconds that a silent server keeps an answer back


class WandbServer:
    """Serves on loopback, at `address`, until `die`."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()  # kind of request -> how often it came
        self.rows = 0  # rows of history that came
        self.silent = False
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                if stand_in.silent:
                    time.sleep(_SILENCE)
                answer = json.dumps(stand_in._answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_PUT = do_POST

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def die(self) -> None:
        """From now on connections are refused."""
        self._server.shutdown()
        self._server.server_close()

    def fall_silent(self) -> None:
        """From now on requests are taken and never answered."""
        self.silent = True

    def _answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path != "/graphql":
            self.asked[path.rpartition("/")[2]] += 1
            if path.endswith("/file_stream"):
                history = json.loads(body).get("files", {}).get("wandb-history.jsonl", {})
                self.rows += len(history.get("content", []))
            return {}
        request = json.loads(body)
        kind = re.split(r"\W+", request["query"].strip())[1]  # mutation UpsertBucket ($id: …
        self.asked[kind] += 1
        data = self._data(kind, request.get("variables") or {})
        return {"errors": [{"message": f"no {kind} here"}]} if data is None else {"data": data}

    def _data(self, kind: str, given: dict[str, Any]) -> dict[str, Any] | None:
        entity = {"id": "e", "name": "someone"}
        if kind == "Viewer":
            return {
                "viewer": {
                    "id": "v",
                    "entity": "someone",
                    "username": "someone",
                    "email": "",
                    "flags": "{}",
                    "teams": {"edges": []},
                }
            }
        if kind == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if kind == "RunResumeStatus":
            return {"model": {"id": "m", "name": given["project"], "entity": entity, "bucket": None}}
        if kind == "UpsertBucket":
            project = {"id": "p", "name": given.get("project"), "entity": entity}
            bucket = {
                "id": "b",
                "name": given.get("name"),
                "displayName": given.get("displayName"),
                "config": "{}",
                "project": project,
                "historyLineCount": 0,
            }
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if kind == "CreateRunFiles":
            places = [{"name": name, "uploadUrl": f"{self.address}/upload"} for name in given["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": places}}
        return {"project": None} if kind == "ArtifactType" else None
