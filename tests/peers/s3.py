"""As much of S3 as a client needs to move objects: put, get, head, list, copy, and uploads in parts."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from peers.server import Exchange, Request, Script

_XML = {"Content-Type": "application/xml"}


@dataclass
class Store:
    """The script of an S3 server that remembers, for `Peer`. Signatures and checksums are not looked at.

    Attributes:
        objects: By path, ``/bucket/key``.
        seen: What was asked, each as ``"METHOD /target"``, in the order of arrival.
        instead: By a regular expression for such a line: the script to play instead, which finds the request unread.
    """

    objects: dict[str, bytes] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    instead: dict[str, Script] = field(default_factory=dict)
    _parts: dict[int, bytes] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, exchange: Exchange) -> None:
        line = exchange.peek_line()
        with self._lock:
            self.seen.append(line)
        for pattern, script in self.instead.items():
            if re.search(pattern, line):
                script(exchange)
                return
        request = exchange.read_request(body=False)
        if "expect" in request.headers:
            exchange.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.body = exchange.read_body(request.headers)
        with self._lock:
            status, headers, body = self._answer(request)
        if "content-length" not in {name.lower() for name in headers}:
            headers = {**headers, "Content-Length": str(len(body))}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        exchange.send(f"HTTP/1.1 {status}\r\n{head}\r\n".encode(), body)

    def _answer(self, request: Request) -> tuple[str, dict[str, str], bytes]:
        url = urlsplit(request.target)
        query = parse_qs(url.query, keep_blank_values=True)
        if "uploads" in query:
            return "200 OK", _XML, b"<R><UploadId>u1</UploadId></R>"
        if "uploadId" in query:
            return self._upload(request, url.path, query)
        if request.method == "PUT":
            source = request.headers.get("x-amz-copy-source")
            self.objects[url.path] = self.objects[f"/{source.lstrip('/')}"] if source else request.body
            return "200 OK", {"ETag": '"e"', **_XML}, b"<R><ETag>e</ETag></R>" if source else b""
        if "list-type" in query:
            keys = "".join(f"<Contents><Key>{path.split('/', 2)[2]}</Key></Contents>" for path in sorted(self.objects))
            return "200 OK", _XML, f"<ListBucketResult>{keys}</ListBucketResult>".encode()
        if url.path not in self.objects:
            return "404 Not Found", {}, b""
        return self._get(request, self.objects[url.path])

    def _upload(self, request: Request, path: str, query: dict[str, list[str]]) -> tuple[str, dict[str, str], bytes]:
        if request.method == "PUT":
            self._parts[int(query["partNumber"][0])] = request.body
            return "200 OK", {"ETag": '"p"'}, b""
        parts = [self._parts.pop(number) for number in sorted(self._parts)]
        if request.method == "DELETE":
            return "204 No Content", {}, b""
        self.objects[path] = b"".join(parts)
        return "200 OK", _XML, b"<R/>"

    @staticmethod
    def _get(request: Request, data: bytes) -> tuple[str, dict[str, str], bytes]:
        tag = {"ETag": '"e"'}
        if request.method == "HEAD":
            return "200 OK", {"Content-Length": str(len(data)), **tag}, b""
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", "")):
            first, last = int(match[1]), int(match[2] or len(data) - 1)
            part = data[first : last + 1]
            return (
                "206 Partial Content",
                {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}", **tag},
                part,
            )
        return "200 OK", tag, data
