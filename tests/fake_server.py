"""Web servers on this machine that answer as a test wants."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHandler(BaseHTTPRequestHandler):
    """Answers without a log; a subclass has do_GET."""

    def answer(
        self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"", *, length: int | None = None
    ) -> None:
        """length: how long the body is said to be; where it is shorter, the connection is cut behind it."""
        length = len(body) if length is None else length
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.close_connection |= len(body) < length

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serving(handler: type[FakeHandler], **attributes: Any) -> Iterator[str]:
    """The address of a server whose handlers have these attributes; nobody listens there any more behind the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), attributes))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
