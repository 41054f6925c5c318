"""A local web server for one test."""

import contextlib
import http.server
import threading


@contextlib.contextmanager
def serving(handler):
    """Yield the address of a server that answers with `handler` (http.server) until the block ends."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
