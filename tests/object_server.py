"""An S3 server of objects on this machine, whose answers fail as a test tells them to."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pytest

BUCKET = "bucket"
SLOW_DOWN = "503 Slow Down", b"<Error><Code>SlowDown</Code><Message>Reduce it.</Message></Error>"
FORBIDDEN = "403 Forbidden", b"<Error><Code>AccessDenied</Code><Message>No.</Message></Error>"
CUT = "cut", b""

App = Callable[..., Iterable[bytes]]


@dataclass
class ObjectServer:
    """What the server was asked for, and how its next answers fail.

    Attributes:
        address: of the server, for boto.
        faults: of the answers about contents to come, first to last; ``CUT`` ends one in the
            middle, the others are sent in its place.
        asked: the keys whose contents were asked for.
        down: every answer about an object is ``SLOW_DOWN``.
    """

    address: str = ""
    faults: list[tuple[str, bytes]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    down: bool = False

    def put(self, key: str, data: bytes) -> None:
        """Store an object, or replace it."""
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)

    @cached_property
    def client(self) -> Any:
        """Boto's, to change what is stored."""
        import boto3

        return boto3.client("s3", endpoint_url=self.address)

    def around(self, app: App) -> App:
        """A WSGI application whose answers fail as they are told to."""

        def failing(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            fault = None
            if environ["REQUEST_METHOD"] == "GET" and "HTTP_RANGE" in environ:
                self.asked.append(environ["PATH_INFO"].removeprefix(f"/{BUCKET}/"))
                fault = self.faults.pop(0) if self.faults else None
            if self.down and environ["REQUEST_METHOD"] in ("GET", "HEAD"):
                fault = SLOW_DOWN
            if fault is None:
                return app(environ, start)
            if fault == CUT:
                whole = b"".join(app(environ, start))
                return [whole[: len(whole) // 2]]
            start(fault[0], [("Content-Type", "application/xml")])
            return [fault[1]]

        return failing


@contextmanager
def object_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    """A server with an empty bucket, which the environment names to s3fs and boto.

    These try nothing again by themselves, as they otherwise would for minutes.
    """
    for package in ("s3fs", "boto3", "moto", "flask_cors"):
        pytest.importorskip(package, reason=f"{package} is missing: pip install 'patchmine[dev]'")
    import s3fs
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Silent(WSGIRequestHandler):
        def log(self, *_: Any, **__: Any) -> None:
            """Says nothing."""

    served = ObjectServer()
    app = served.around(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Silent)
    served.address = f"http://127.0.0.1:{server.server_port}"
    given = dict(AWS_ENDPOINT_URL=served.address, AWS_DEFAULT_REGION="us-east-1")
    given |= dict(AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b", AWS_MAX_ATTEMPTS="1")
    nowhere = dict(AWS_CONFIG_FILE="/dev/null", AWS_SHARED_CREDENTIALS_FILE="/dev/null")
    for name, value in (given | nowhere | dict(AWS_EC2_METADATA_DISABLED="true")).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        reset = urllib.request.Request(f"{served.address}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset).close()
        served.client.create_bucket(Bucket=BUCKET)
        yield served
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.shutdown()
        server.server_close()
