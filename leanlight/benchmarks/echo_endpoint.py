"""An endpoint of chat that answers every request with its own text, after a wait; run as a program of its own."""

from __future__ import annotations

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_DELAY = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0


class Endpoint(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class Echo(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        time.sleep(_DELAY)
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        answer = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


if __name__ == "__main__":
    server = Endpoint(("127.0.0.1", 0), Echo)
    print(server.server_port, flush=True)
    server.serve_forever()
