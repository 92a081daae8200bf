"""
Serve a model on this machine, over HTTP as an Inference Endpoint does:

    python examples/serve.py examples/checkpoint --port 8080

POST / takes a request as JSON, or a photo as it is with the sentences in the query; GET /health says that it is there.
For trying things out: it has neither TLS nor any idea of who is asking. docs/serving.md has requests and answers.
"""

import argparse
import json
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import modeling_restr  # noqa: F401  (so that a folder without code can be served)
from modeling_restr.hub.handler import EndpointHandler


CHECKPOINT = Path(__file__).parent / "restr-mini"


class Server(ThreadingHTTPServer):
    """A thread a connection, all of which ask one handler."""

    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: EndpointHandler) -> None:
        super().__init__(address, RequestHandler)
        self.handler = handler
        # An image in base64, and the sentences, of which a character takes at most twelve bytes in JSON.
        self.max_body = handler.max_bytes * 4 // 3 + handler.max_sentences * handler.max_sentence_length * 12 + 10_000


class RequestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds that a client may take to send the next bytes
    server: Server

    def do_GET(self) -> None:
        if self.path in ("/", "/health"):
            self._answer(HTTPStatus.OK, {"status": "ok"})
        else:
            self._answer(HTTPStatus.NOT_FOUND, _error("Expected GET /health or POST /."))

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 18 or int(length) > self.server.max_body:
            self.close_connection = True  # what it sends is not read
            message = (
                f"Expected a Content-Length of at most {self.server.max_body} bytes, got {length[:18] or 'none'}."
            )
            return self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _error(message))
        try:
            answer = self.server.handler(self._read_request(self.rfile.read(int(length))))
        except ValueError as error:
            return self._answer(HTTPStatus.BAD_REQUEST, _error(error))
        except RuntimeError as error:
            return self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, _error(error))
        self._answer(HTTPStatus.OK, answer)

    def _read_request(self, body: bytes) -> Any:
        request: Any
        if self.headers.get_content_type() != "application/json":
            request = {"inputs": body}
        else:
            try:
                request = json.loads(body)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"Expected JSON, or an image with its own Content-Type: {error}") from None
        query = dict(parse_qsl(urlsplit(self.path).query))
        # As an Inference Endpoint does it: beside the parameters of a body, a query says nothing.
        if query and isinstance(request, dict) and "parameters" not in request:
            request["parameters"] = query
        return request

    def _answer(self, status: HTTPStatus, answer: Any) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _error(reason: object) -> dict[str, str]:
    return {"error": str(reason)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a model on this machine, as an Inference Endpoint does.")
    parser.add_argument("model", nargs="?", default=str(CHECKPOINT), help="folder or Hub id (the shipped checkpoint)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (this machine alone)")
    parser.add_argument("--port", type=int, default=8080, help="port to listen at (8080; 0 for any that is free)")
    args = parser.parse_args()
    with Server((args.host, args.port), EndpointHandler(args.model)) as server:
        print(f"Serving {args.model} at http://{server.server_name}:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
