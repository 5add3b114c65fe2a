"""An agent on Anthropic's own SDK, stopped in the middle of each of its tools: an HTTP call, a query, a program.

The loop is the one of every such agent: ask the model, run the tool it wants, tell it what came of it. It says nothing
of cancellation. What makes it stoppable is where its parts come from: ``cancellable(Anthropic(...))``, and the
`Session`, `connect` and `run` of tokenscope.

The model is a small server of this file, so that the program needs no key and no network. It asks for whatever tool is
named in the question.
"""

from __future__ import annotations

import json
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from tokenscope import ThreadScope
from tokenscope.integrations.anthropic import cancellable
from tokenscope.integrations.requests import Session
from tokenscope.integrations.sqlite3 import connect
from tokenscope.process import run

from anthropic import Anthropic  # isort: skip - after ours, which names what to install if it is missing

FOR_EVER = "WITH RECURSIVE n(x) AS (SELECT begun() UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n"
PROGRAM = "import sys, time, urllib.request as web; web.urlopen(sys.argv[1]); time.sleep(60)"


class Agent:
    """Asks, runs a tool, asks again, until the model wants no tool any more."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._client = cancellable(Anthropic(base_url=world.url, api_key="none"))
        self._session = Session()
        self._tools = {"fetch": self.fetch, "query": self.query, "program": self.program, "clock": self.clock}

    def close(self) -> None:
        self._client.close()
        self._session.close()

    def answer(self, question: str) -> str:
        messages: list[Any] = [{"role": "user", "content": question}]
        tools: list[Any] = [{"name": name, "input_schema": {"type": "object"}} for name in self._tools]
        while True:
            said = self._client.messages.create(model="any", max_tokens=99, messages=messages, tools=tools)
            wanted = [block for block in said.content if block.type == "tool_use"]
            if not wanted:
                return "".join(block.text for block in said.content if block.type == "text")
            messages.append({"role": "assistant", "content": said.content})
            results = [
                {"type": "tool_result", "tool_use_id": block.id, "content": self._tools[block.name]()}
                for block in wanted
            ]
            messages.append({"role": "user", "content": results})

    def clock(self) -> str:
        return "noon"

    def fetch(self) -> str:
        return self._session.get(f"{self._world.url}/silence").text

    def query(self) -> str:
        connection = connect(":memory:")
        try:
            connection.create_function("begun", 0, self._world.begun.set)
            return str(connection.execute(FOR_EVER).fetchone())
        finally:
            connection.close()

    def program(self) -> str:
        return run([sys.executable, "-c", PROGRAM, f"{self._world.url}/begun"], capture_output=True, text=True).stdout


class World(ThreadingHTTPServer):
    """The model, and what the tools talk to."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.begun = threading.Event()  # the tool is in the middle of its work
        self.left = threading.Event()  # the client of /silence has gone

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: World

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.server.begun.set()
        if self.path == "/silence":
            self.rfile.read(1)  # until the client has gone
            self.server.left.set()
            return
        self._send(b"", "text/plain")

    def do_POST(self) -> None:
        order = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        last = order["messages"][-1]["content"]
        block = (
            {"type": "tool_use", "id": "call_1", "name": last, "input": {}}
            if isinstance(last, str)
            else {"type": "text", "text": f"The tool says {last[0]['content']}."}
        )
        message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "any", "content": [block]}
        usage = {"input_tokens": 1, "output_tokens": 1}
        self._send(json.dumps({**message, "stop_reason": "end_turn", "usage": usage}).encode(), "application/json")

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def stop_in_the_middle(world: World, agent: Agent, tool: str) -> None:
    world.begun.clear()
    with ThreadScope(name="agent") as scope:
        scope.spawn(partial(agent.answer, tool))
        world.begun.wait()
        scope.cancel("the user pressed Stop")
    print(f"{tool}: {scope.report.outcome}, {scope.report.reason}")


def main() -> None:
    with World() as world:
        agent = Agent(world)
        print("clock:", agent.answer("clock"))
        for tool in ("fetch", "query", "program"):
            stop_in_the_middle(world, agent, tool)
        agent.close()
        print("the server saw its client go:", world.left.wait(5))


if __name__ == "__main__":
    main()

# Expected output:
# clock: The tool says noon.
# fetch: cancelled, manual: the user pressed Stop
# query: cancelled, manual: the user pressed Stop
# program: cancelled, manual: the user pressed Stop
# the server saw its client go: True
