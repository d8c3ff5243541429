"""An emulator of Google Cloud Storage on loopback, for tests.

    with emulator.started() as service:         # this process and those it starts find buckets there
        service.gone(30)                        # nobody answers for so many seconds

`gcp-storage-emulator` with what it lacks: conditions on generations. Of its buckets "bucket" may be used, "read-only"
may be read, "secret" nothing. There are no others.
"""

import contextlib
import functools
import http.server
import importlib.util
import json
import logging
import os
import socket
import threading
import time
import urllib.parse

MISSING = [name for name in ("gcsfs", "gcp_storage_emulator") if not importlib.util.find_spec(name)]
WHY = f'{" and ".join(MISSING)} not installed: pip install "pwcrf_jax[test-gcs]"'
BUCKETS = ("bucket", "read-only", "secret")


@contextlib.contextmanager
def started():
    """A `Service`; environment variables lead to it."""
    service = Service()
    host = f"http://127.0.0.1:{service.port}"
    values = {
        "STORAGE_EMULATOR_HOST": host,
        "TENSORSTORE_GCS_HTTP_URL": host,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks another service, by gRPC
        "NO_GCE_CHECK": "true",
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    _forget()
    try:
        yield service
    finally:
        service.stop()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        _forget()


def _forget():
    """Connections of this process to another service."""
    from etils.epath import backend

    from pwcrf_jax.runtime import buckets

    if not MISSING:
        import gcsfs

        gcsfs.GCSFileSystem.clear_instance_cache()
    buckets._system.cache_clear()
    backend.fsspec_backend._get_filesystem.cache_clear()


class Service:
    """requests: how many there were. objects, versions: {name: bytes, or generation} of "bucket".

    trouble(method, path): a code of HTTP to refuse a request with, or 0; to be set.
    """

    def __init__(self):
        from gcp_storage_emulator.handlers.buckets import create_bucket
        from gcp_storage_emulator.storage import Storage

        logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
        self._storage = Storage(use_memory_fs=True)
        for name in BUCKETS:
            create_bucket(name, self._storage)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.requests, self.rules, self.trouble = 0, True, lambda method, path: 0
        self._start()

    def _start(self):
        self._server = _Server(("127.0.0.1", self.port), functools.partial(_handler(), self._storage, self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def gone(self, seconds):
        """Stops, and comes back with all that was there after so many seconds; returns at once."""
        self.stop()
        threading.Timer(seconds, self._start).start()

    @property
    def versions(self):
        return {name: of["generation"] for name, of in list(self._storage.objects.get("bucket", {}).items())}

    @property
    def objects(self):
        return {name: self._storage.get_file("bucket", name) for name in self.versions}

    def put(self, bucket, name, content):
        from pwcrf_jax.runtime import buckets

        self.rules = False
        buckets.write(f"gs://{bucket}/{name}", content)
        self.rules = True


class _Server(http.server.HTTPServer):
    allow_reuse_address = True

    def handle_error(self, request, client_address):
        """Clients that were killed leave broken pipes."""


@functools.cache
def _handler():
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.server import RequestHandler, Router

    class Handler(RequestHandler):
        def __init__(self, storage, service, *args):
            self.service = service
            super().__init__(storage, *args)

        def _handle(self, method):
            self.service.requests += 1
            address = urllib.parse.urlsplit(self.path)
            words = [urllib.parse.unquote(word) for word in address.path.split("/")]
            query = dict(urllib.parse.parse_qsl(address.query))
            bucket = words[words.index("b") + 1] if "b" in words[:-1] else words[1]
            key = query.get("name") or (words[words.index("o") + 1] if "o" in words[:-1] else "")
            code = self._code(method, bucket, key, query)
            if code == 200:
                Router(self).handle(method)
                return
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.dumps({"error": {"code": code, "message": "said by the emulator"}}).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _code(self, method, bucket, key, query):
            if code := self.service.trouble(method, self.path):
                return code
            if self.service.rules and (bucket == "secret" or bucket == "read-only" and method != "GET"):
                return 403
            if bucket not in BUCKETS:
                return 404
            wanted = query.get("ifGenerationMatch")
            if wanted is not None and method in ("POST", "PUT", "DELETE") and "upload_id" not in query:
                try:
                    found = self.storage.get_file_obj(bucket, key)["generation"]
                except NotFound:
                    found = "0"
                if found != wanted:
                    return 412
            return 200

        do_GET = lambda self: self._handle("GET")
        do_POST = lambda self: self._handle("POST")
        do_PUT = lambda self: self._handle("PUT")
        do_PATCH = lambda self: self._handle("PATCH")
        do_DELETE = lambda self: self._handle("DELETE")

    return Handler


def main():
    """Runs until it is stopped; says what leads to it."""
    with started() as service:
        print(f"export STORAGE_EMULATOR_HOST=http://127.0.0.1:{service.port}", flush=True)
        while True:
            time.sleep(1)


if __name__ == "__main__":
    main()
