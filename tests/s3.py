"""A small S3 server in memory, for tests: the six requests that a store needs, path-style, signatures unchecked."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]
    requests: list[str]

    def _key(self) -> tuple[str, dict[str, list[str]]]:
        parts = urlsplit(self.path)
        self.requests.append(f"{self.command} {unquote(parts.path)}")
        return unquote(parts.path).lstrip("/"), parse_qs(parts.query, keep_blank_values=True)

    def _answer(self, status: int, body: bytes = b"", *, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("Last-Modified", formatdate(usegmt=True))
        self.send_header("ETag", '"0"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        body = (
            self._chunks()
            if self.headers.get("Transfer-Encoding") == "chunked"
            else self.rfile.read(int(self.headers.get("Content-Length", 0)))
        )
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return body
        content = b""
        while length := int(body.partition(b"\r\n")[0].partition(b";")[0], 16):
            _, _, body = body.partition(b"\r\n")
            content, body = content + body[:length], body[length + 2 :]
        return content

    def _chunks(self) -> bytes:
        body = b""
        while length := int(self.rfile.readline().strip(), 16):
            body += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_PUT(self) -> None:
        key, _ = self._key()
        self.objects[key] = self._body()
        self._answer(200)

    def do_GET(self) -> None:
        key, query = self._key()
        if "list-type" in query:
            self._answer(200, self._listing(key.rstrip("/"), query))
        elif key not in self.objects:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        elif span := self.headers.get("Range"):
            first, _, last = span.removeprefix("bytes=").partition("-")
            self._answer(206, self.objects[key][int(first) : int(last) + 1])
        else:
            self._answer(200, self.objects[key])

    def do_HEAD(self) -> None:
        key, _ = self._key()
        self._answer(200 if key in self.objects or "/" not in key else 404, length=len(self.objects.get(key, b"")))

    def do_DELETE(self) -> None:
        self.objects.pop(self._key()[0], None)
        self._answer(204)

    def do_POST(self) -> None:
        bucket, query = self._key()
        assert "delete" in query, self.path
        for node in ElementTree.fromstring(self._body()).iter():
            if node.tag.endswith("Key"):
                self.objects.pop(f"{bucket.rstrip('/')}/{node.text}", None)
        self._answer(200, b"<DeleteResult></DeleteResult>")

    def _listing(self, bucket: str, query: dict[str, list[str]]) -> bytes:
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        contents, prefixes = list[str](), dict[str, None]()
        for key in sorted(
            key.removeprefix(f"{bucket}/") for key in self.objects if key.startswith(f"{bucket}/{prefix}")
        ):
            rest = key.removeprefix(prefix)
            if delimiter and delimiter in rest:
                prefixes[prefix + rest.partition(delimiter)[0] + delimiter] = None
            else:
                size = len(self.objects[f"{bucket}/{key}"])
                time = "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                contents.append(f"<Contents><Key>{escape(key)}</Key>{time}<Size>{size}</Size></Contents>")
        common = [f"<CommonPrefixes><Prefix>{escape(each)}</Prefix></CommonPrefixes>" for each in prefixes]
        head = f"<IsTruncated>false</IsTruncated><KeyCount>{len(contents) + len(common)}</KeyCount>"
        return f"<ListBucketResult>{head}{''.join(contents + common)}</ListBucketResult>".encode()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def s3_server() -> Iterator[tuple[str, dict[str, bytes], list[str]]]:
    """Serve until left. Yields its URL, its objects by ``bucket/key``, and the requests that it has had."""
    handler = type("Handler", (_Handler,), {"objects": {}, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.objects, handler.requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
