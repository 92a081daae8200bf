"""
An HTTP server that answers on this machine as an Inference Endpoint does (`restr serve`). It is for trials: it has
neither TLS nor authentication. docs/serving.md shows requests and answers.
"""

import io
import json
import re
import socket
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl

from .handler import EndpointHandler, RequestError


MAX_REQUESTS = 64  # that wait for the model at the same time, each with its image


class Server(ThreadingHTTPServer):
    """One thread per connection; all threads share one handler."""

    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: EndpointHandler) -> None:
        super().__init__(address, RequestHandler)
        self.handler = handler
        self.places = threading.BoundedSemaphore(MAX_REQUESTS)
        # An image in base64, and sentences in JSON, where a character takes up to 12 bytes.
        self.max_body = handler.max_bytes * 4 // 3 + handler.max_sentences * handler.max_sentence_length * 12 + 10_000

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the traceback, unless the client has closed the connection."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class DeadlineReader(io.RawIOBase):
    """Reads from a connection until a deadline, however slowly the bytes arrive."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.deadline = 0.0  # by time.monotonic

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("The request did not arrive in time.")
        self.connection.settimeout(remaining)
        return self.connection.recv_into(buffer)


class RequestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds for the whole request to arrive, and for the client to take the answer
    server: Server
    raw_requestline: bytes

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.reader = DeadlineReader(self.connection)
        self.rfile = io.BufferedReader(self.reader)

    def handle_one_request(self) -> None:
        self.reader.deadline = time.monotonic() + self.timeout
        super().handle_one_request()

    def parse_request(self) -> bool:
        words = self.raw_requestline.split()
        self.default_request_version = "HTTP/0.9" if len(words) == 2 else "HTTP/1.1"
        if len(words) == 2:  # HTTP/0.9 has no headers to wait for
            self.rfile = io.BufferedReader(io.BytesIO())
        elif words and re.fullmatch(rb"HTTP/([2-9]|[1-9]\d+)(\.\d+)?", words[-1]):
            # The answer has the highest version that the server knows (RFC 9110, 2.5).
            self.raw_requestline = b" ".join([*words[:-1], b"HTTP/1.1"])
        return super().parse_request()

    def do_GET(self) -> None:
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # the body is not read
        if self.path.partition("?")[0] in ("/", "/health"):
            self._answer(HTTPStatus.OK, {"status": "ok"})
        else:
            self._answer(HTTPStatus.NOT_FOUND, _error("Expected GET /health or POST /."))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 18 or int(length) > self.server.max_body:
            message = (
                f"Expected a Content-Length of at most {self.server.max_body} bytes, got {length[:18] or 'none'}."
            )
            return self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self.close_connection = True  # the client has left
        elif self.server.places.acquire(blocking=False):
            try:
                status, answer = self._ask_model(body)
            finally:
                self.server.places.release()
            self._answer(status, answer)
        else:
            message = f"Expected at most {MAX_REQUESTS} requests at the same time, got more. Try again later."
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, _error(message))

    def _ask_model(self, body: bytes) -> tuple[HTTPStatus, Any]:
        try:
            return HTTPStatus.OK, self.server.handler(self._read_request(body))
        except RequestError as error:
            return HTTPStatus.BAD_REQUEST, _error(error)
        except RuntimeError as error:
            return HTTPStatus.INTERNAL_SERVER_ERROR, _error(error)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer in JSON and close the connection."""
        self.close_connection = True
        self._answer(HTTPStatus(code), _error(message or HTTPStatus(code).phrase))

    def _read_request(self, body: bytes) -> Any:
        request: Any
        if self.headers.get_content_type() != "application/json":
            request = {"inputs": body}
        else:
            try:
                request = json.loads(body)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"Expected JSON, or an image with its own Content-Type: {error}") from None
        query = dict(parse_qsl(self.path.partition("?")[2]))
        # As in an Inference Endpoint, the query is ignored if the body has parameters.
        if query and isinstance(request, dict) and "parameters" not in request:
            request["parameters"] = query
        return request

    def _answer(self, status: HTTPStatus, answer: Any) -> None:
        body = json.dumps(answer).encode()
        self.connection.settimeout(self.timeout)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _error(reason: object) -> dict[str, str]:
    return {"error": str(reason)}
