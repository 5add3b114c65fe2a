"""A Flask chat view that stops when its reader leaves: ``@app.post("/chat")``, ``@cancellable``.

Three parties on this machine: a language model that says three words and then thinks for a minute, the Flask
app that streams them on, and a reader who leaves after the third word. The app hears of it at once, although
it is blocked in reading from the model, and hangs up on the model in turn.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from tokenscope import current_token
from tokenscope.integrations.flask import TokenScope, cancellable  # first: without Flask it names what to install
from tokenscope.integrations.requests import Session

# isort: split
from flask import Flask, Response, request
from werkzeug.serving import make_server

if TYPE_CHECKING:
    from collections.abc import Iterator

told: queue.SimpleQueue[str] = queue.SimpleQueue()  # what the parties report

# --- the app: all that is needed is the extension, the decorator and the session ---------------------------

app = Flask(__name__)
TokenScope(app)  # every request gets a scope
session = Session()  # a requests.Session whose blocked calls can be cancelled


@app.post("/chat")
@cancellable  # a hang-up cancels this view, although it is a POST
def chat() -> Response:
    def words(question: object) -> Iterator[bytes]:
        try:
            with session.post(app.config["MODEL"], json=question, stream=True) as answer:
                for line in answer.iter_lines():
                    yield line + b"\n"
        finally:
            told.put(f"app: stopped, because {current_token().reason.kind}")

    return Response(words(request.get_json()), mimetype="text/event-stream")


# --- the model ---------------------------------------------------------------------------------------------


class Model(BaseHTTPRequestHandler):
    """Says three words, then thinks until its client is gone (or a minute has passed)."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for word in ("Threads", "can", "stop"):
            event = f"data: {json.dumps(word)}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
        self.connection.settimeout(60)
        with contextlib.suppress(OSError):  # a reset ends the wait as an end of file does
            self.connection.recv(1)
        self.close_connection = True
        told.put("model: my client hung up after 3 words")

    def log_message(self, *_: object) -> None:
        """Say nothing on the terminal."""


# --- the reader --------------------------------------------------------------------------------------------


def read_and_leave(address: tuple[str, int]) -> None:
    body = b'{"question": "Can threads stop?"}'
    head = f"Host: app\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(address, timeout=10) as browser:
        browser.sendall(b"POST /chat HTTP/1.1\r\n" + head.encode() + body)
        received = b""
        while b'"stop"' not in received:
            received += browser.recv(4096)
    print("reader: read three words and closed the tab")


@contextlib.contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[tuple[str, int]]:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield "127.0.0.1", server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def main() -> None:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    model = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    with serving(model) as (host, port), serving(make_server("127.0.0.1", 0, app, threaded=True)) as address:
        app.config["MODEL"] = f"http://{host}:{port}/v1/chat/completions"
        read_and_leave(address)
        print(*sorted([told.get(timeout=10), told.get(timeout=10)]), sep="\n")


if __name__ == "__main__":
    main()

# Expected output:
# reader: read three words and closed the tab
# app: stopped, because client_disconnected
# model: my client hung up after 3 words
