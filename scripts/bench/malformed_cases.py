"""HTTP requests that are wrong in some way, as bytes: what no client library would send, and what one could.

Each kind is a list; `requests` goes through all of them, once each, and then again with some bytes of each changed.
"""

from __future__ import annotations

import base64
import itertools
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from random import Random

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
MODELS = "/v1/models"

_BOUNDARY = "b0undary"
_MOST_CHANGES = 4
_CRLF = b"\r\n"


@dataclass(frozen=True, slots=True)
class Malformed:
    """One request.

    Attributes:
        kind: what is wrong with it.
        data: all that is sent, on a connection of its own.
        is_cut: the client sends no more, though more was announced; it need not get an answer.
        is_framed: it is HTTP as far as a parser can tell, so that its answer is ours and not the parser's.
    """

    kind: str
    data: bytes = field(repr=False)
    is_cut: bool = False
    is_framed: bool = True


@dataclass(frozen=True, slots=True)
class Target:
    """What requests are made for: a token that is accepted, and the key of a picture that is there."""

    token: str = field(repr=False)
    key: str


def requests(target: Target, seed: int) -> Iterator[Malformed]:
    """Requests without end: each case as it is, then changed at random."""
    rng = Random(seed)  # noqa: S311 - which bytes to change
    cases = all_cases(target)
    yield from cases
    for case in itertools.cycle(cases):
        yield _changed(case, rng)


def all_cases(target: Target) -> list[Malformed]:
    """Every case, once."""
    made = _Made(target)
    lists = (_framing, _headers, _methods_and_paths, _types, _json, _parameters, _terms, _forms, _delivery, _cut)
    return [case for cases in lists for case in cases(made)]


def _changed(case: Malformed, rng: Random) -> Malformed:
    data = bytearray(case.data)
    for _ in range(rng.randint(1, _MOST_CHANGES)):
        at = rng.randrange(len(data))
        match rng.randrange(3):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                data[at:at] = rng.randbytes(rng.randint(1, 8))
            case _:
                del data[at : at + rng.randint(1, 8)]
                data = data or bytearray(b"\0")
    # What it is now nobody knows: perhaps it announces more than it has.
    return Malformed(f"{case.kind}, changed", bytes(data), is_cut=True, is_framed=False)


class _Made:
    """Makes requests for one target."""

    def __init__(self, target: Target) -> None:
        self.key = target.key
        self._token = target.token

    def request(  # noqa: PLR0913 - the parts of a request
        self,
        kind: str,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str | bytes] | None = None,
        *,
        is_cut: bool = False,
        is_framed: bool = True,
    ) -> Malformed:
        """A whole request; `headers` come after the usual ones and in place of those of the same name."""
        told: dict[str, str | bytes] = {
            "host": "localhost",
            "connection": "close",
            "authorization": f"Bearer {self._token}",
        }
        if body is not None:
            told["content-length"] = str(len(body))
        told |= headers or {}
        lines = [f"{method} {path} HTTP/1.1".encode("utf-8", "surrogatepass")]
        lines += [name.encode() + b": " + (value.encode() if isinstance(value, str) else value)
                  for name, value in told.items()]  # fmt: skip
        head = _CRLF.join(lines) + _CRLF * 2
        return Malformed(kind, head + (body or b""), is_cut=is_cut, is_framed=is_framed)

    def json(self, kind: str, body: bytes | str, path: str = GENERATIONS, **more: str) -> Malformed:
        """A POST of a body that says it is JSON."""
        data = body if isinstance(body, bytes) else body.encode("utf-8", "surrogatepass")
        return self.request(kind, "POST", path, data, {"content-type": "application/json", **more})

    def parameters(self, kind: str, path: str = GENERATIONS, **values: object) -> Malformed:
        """A POST of these parameters beside a prompt."""
        return self.json(kind, json.dumps({"prompt": "a red fox", **values}), path)

    def terms(self, header: str, value: str | bytes) -> Malformed:
        """A generation with one header of this value, answered from the cache if it is answered at all."""
        headers = {"content-type": "application/json", "cache-control": "only-if-cached", header: value}
        return self.request(f"header {header}", "POST", GENERATIONS, b'{"prompt":"a red fox"}', headers)

    def form(self, kind: str, *parts: bytes, content_type: str | None = None, end: bytes | None = None) -> Malformed:
        """A POST of a form of these parts."""
        mark = f"--{_BOUNDARY}".encode()
        body = b"".join(mark + _CRLF + part + _CRLF for part in parts) + (mark + b"--\r\n" if end is None else end)
        told = f"multipart/form-data; boundary={_BOUNDARY}" if content_type is None else content_type
        return self.request(kind, "POST", EDITS, body, {"content-type": told})

    def image(self, kind: str, query: str = "", **headers: str) -> Malformed:
        """A GET of the picture."""
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.request(kind, "GET", f"/images/{self.key}{query}", headers=told)


# ── what is no HTTP ─────────────────────────────────────────────────────────────────────────────────────────────


def _framing(made: _Made) -> Iterator[Malformed]:
    body = b'{"prompt":"a red fox"}'
    post = f"POST {GENERATIONS} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n".encode()
    get = b"GET /v1/models HTTP/1.1\r\n"
    raw = {
        "noise": bytes(range(256)) * 4,
        "nothing but line breaks": _CRLF * 500,
        "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        "an HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(64),
        "HTTP/0.9": b"GET /v1/models\r\n\r\n",
        "HTTP/9.9": b"GET /v1/models HTTP/9.9\r\nhost: localhost\r\n\r\n",
        "no path": b"GET HTTP/1.1\r\n\r\n",
        "a method in lower case": b"get /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n",
        "bare line feeds": b"GET /v1/models HTTP/1.1\nhost: localhost\n\n",
        "no host": get + _CRLF,
        "two hosts": get + b"host: localhost\r\nhost: example.org\r\n\r\n",
        "a space before the colon": get + b"host : localhost\r\n\r\n",
        "a folded header": get + b"host: localhost\r\nx-a: b\r\n c\r\n\r\n",
        "a NUL in a header": get + b"host: localhost\r\nx-a: b\0c\r\n\r\n",
        "a header without a name": get + b"host: localhost\r\n: b\r\n\r\n",
        "two lengths": post + b"content-length: 22\r\ncontent-length: 5\r\n\r\n" + body,
        "a negative length": post + b"content-length: -1\r\n\r\n" + body,
        "a length of words": post + b"content-length: many\r\n\r\n" + body,
        "a length beyond 64 bits": post + b"content-length: " + b"9" * 30 + b"\r\n\r\n" + body,
        "a length of 5,000 digits": post + b"content-length: " + b"9" * 5_000 + b"\r\n\r\n" + body,
        "a length with a sign": post + b"content-length: +22\r\n\r\n" + body,
        "a length and chunks": post + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n16\r\n" + body,
        "an unknown coding": post + b"transfer-encoding: sponge\r\n\r\n" + body,
        "a chunk of no size": post + b"transfer-encoding: chunked\r\n\r\nzz\r\n" + body + b"\r\n0\r\n\r\n",
        "a chunk beyond 64 bits": post + b"transfer-encoding: chunked\r\n\r\n" + b"f" * 20 + b"\r\n" + body,
        "a chunk longer than its size": post + b"transfer-encoding: chunked\r\n\r\n5\r\n" + body + b"\r\n0\r\n\r\n",
        "a chunk with 64 KB of extensions": post + b"transfer-encoding: chunked\r\n\r\n16;" + b"x" * 65_536 + b"\r\n",
        "a path of 100 KB": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        "a header of 100 KB": get + b"host: localhost\r\nx-a: " + b"b" * 100_000 + b"\r\n\r\n",
        "5,000 headers": get + b"host: localhost\r\n" + b"x-a: b\r\n" * 5_000 + _CRLF,
        "an answer": b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
    }
    for kind, data in raw.items():
        yield Malformed(kind, data, is_cut=True, is_framed=False)
    smuggled = f"{GENERATIONS} HTTP/1.1\r\nx-a: b"
    yield made.request("a line break in the path", "GET", smuggled, is_cut=True, is_framed=False)


def _headers(made: _Made) -> Iterator[Malformed]:
    values = {
        "authorization": (b"", b"Bearer", b"Bearer ", b"Basic eDp5", b"Bearer " + b"x" * 8_000, b"Bearer \xff\xfe",
                          b"bearer\twrong", b"Bearer a, Bearer b"),
        "host": (b"", b"example.org", b"[::1", b"localhost:99999999", b"\xff", b"a" * 5_000),
        "origin": (b"null", b"https://example.org", b"://", b"http://[", b"\xff"),
        "x-request-id": (b"", b"a" * 8_000, b"\xff\xfe", b"a\tb", b"{}", b"%0d%0aset-cookie:x=1"),
        "traceparent": (b"", b"00-0-0-0", b"ff-" + b"f" * 32 + b"-" + b"f" * 16 + b"-01", b"\xff" * 55, b"-" * 5_000),
        "x-stainless-read-timeout": (b"nan", b"inf", b"-1", b"0", b"1e999", b"0x10", b"\xd9\xa3", b"9" * 5_000),
        "accept": (b"", b"text/plain;q=2", b"*/*;" * 2_000),
        "accept-encoding": (b"gzip, br, zstd, identity;q=0",),
        "expect": (b"100-continue", b"the-unexpected"),
        "upgrade": (b"websocket", b"h2c"),
    }  # fmt: skip
    for name, each in values.items():
        for value in each:
            yield made.request(f"header {name}", "GET", MODELS, headers={name: value}, is_framed=False)


def _methods_and_paths(made: _Made) -> Iterator[Malformed]:
    for method in ("DELETE", "PUT", "PATCH", "OPTIONS", "TRACE", "GET", "HEAD"):
        yield made.request(f"{method} of generations", method, GENERATIONS)
    for method in ("POST", "DELETE", "PUT"):
        yield made.request(f"{method} of an image", method, f"/images/{made.key}", b"")
    for path in (
        "*", "//", "/v1", "/v1/", "/v1/images", f"{GENERATIONS}/", "/v1/../metrics", "/v1/%2e%2e/metrics", "/%00", "/%",
        "/%zz", "/%ff%fe", "/\\..\\..", "/v1/models/%2e%2e%2f%2e%2e",
        "/v1/models/" + "m" * 8_000, "/v1/models/%0d%0ax:y",
        "/v1/models/\u00e9", "/v1/models/%ed%a0%80", "/v1/models/", "http://example.org/v1/models",
        "/v1/models?" + "a=b&" * 2_000,
        "/images/", "/images/..", "/images/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/images/%00", "/images/" + "k" * 8_000,
        "/images/v1.", "/images/v9.default.x.0", "/images/v1.default.%ff.0", "/images/%0d%0aset-cookie:%20a=b",
        f"/images/{made.key}/", f"/images/{made.key}.png", f"/images/{made.key.upper()}", f"/images/{made.key}%20",
        "/v1/images/variations", "/favicon.ico", "/#", "/?",
    ):  # fmt: skip
        yield made.request("a path of nothing", "GET", path, is_framed=False)
    yield made.request("a retired path", "POST", "/v1/images/variations", b"{}")


# ── what is HTTP, and no JSON or form ───────────────────────────────────────────────────────────────────────────


def _types(made: _Made) -> Iterator[Malformed]:
    body = b'{"prompt":"a red fox"}'
    for path in (GENERATIONS, EDITS):
        yield made.request("no content type", "POST", path, body)
        for told in (
            "", "text/plain", "application/jsonx", "application", "/", ";;;", "application/json, text/plain",
            "image/png",
            "application/x-www-form-urlencoded", "multipart/form-data", "multipart/form-data; boundary=",
            'multipart/form-data; boundary="', "multipart/form-data; boundary=" + "b" * 300,
            "multipart/mixed; boundary=b",
            "multipart/form-data; boundary=\u00e9", "application/json; charset=utf-16", "a" * 8_000,
        ):  # fmt: skip
            yield made.request("content type", "POST", path, body, {"content-type": told})
        yield made.request("no body", "POST", path, b"", {"content-type": "application/json"})
        coded = {"content-type": "application/json", "content-encoding": "gzip"}
        yield made.request("a coded body", "POST", path, zlib.compress(bytes(1_000)), coded)


def _json(made: _Made) -> Iterator[Malformed]:
    fox = '"prompt":"a red fox"'
    many = ",".join(f'"x{n}":{n}' for n in range(10_000))
    for path in (GENERATIONS, EDITS):
        for kind, body in {
            "no JSON": "prompt=a red fox",
            "half of a JSON": '{"prompt":"a red',
            "JSON and more": f"{{{fox}}}}}",
            "two JSONs": f"{{{fox}}}{{{fox}}}",
            "an array": f"[{{{fox}}}]",
            "a string": '"a red fox"',
            "null": "null",
            "spaces": " " * 1_000,
            "a byte order mark": f"\ufeff{{{fox}}}",
            "a comment": f"{{{fox}}} // x",
            "single quotes": "{'prompt':'a red fox'}",
            "100,000 brackets": "[" * 100_000,
            "100,000 braces": '{"a":' * 100_000,
            "extra of 100,000 levels": f'{{{fox},"x":{"[" * 100_000}{"]" * 100_000}}}',
            "extra of 900 levels": f'{{{fox},"x":{"[" * 900}{"]" * 900}}}',
            "NaN": f'{{{fox},"seed":NaN}}',
            "infinity": f'{{{fox},"x":-Infinity}}',
            "1e999": f'{{{fox},"x":1e999}}',
            "a number of 5,000 digits": f'{{{fox},"n":{"9" * 5_000}}}',
            "a name twice": f'{{{fox},"n":1,"n":2}}',
            "a name twice deep in extra": f'{{{fox},"x":{{"a":1,"a":2}}}}',
            "a lone surrogate": '{"prompt":"a red \\ud800 fox"}',
            "a lone surrogate as a name": f'{{{fox},"\\udfff":1}}',
            "NUL": '{"prompt":"a\\u0000b"}',
            "a raw NUL": '{"prompt":"a\0b"}',
            "a name of 10 KB": f'{{{fox},"{"x" * 10_000}":1}}',
            "a name without characters": f'{{{fox},"":1}}',
            "10,000 names": f"{{{fox},{many}}}",
            "half a million numbers": f'{{{fox},"x":[{"0," * 400_000}0]}}',
        }.items():
            yield made.json(kind, body, path)
        yield made.json("invalid UTF-8", b'{"prompt":"\xff\xfe\xc3\x28"}', path)
        yield made.json("UTF-16", f"{{{fox}}}".encode("utf-16"), path)
        yield made.json("a surrogate in UTF-8", '{"prompt":"\ud800"}', path)
        yield made.json("2 MB", f'{{"prompt":"{"x" * 2_000_000}"}}', path)


def _parameters(made: _Made) -> Iterator[Malformed]:
    odd: tuple[object, ...] = (
        True,
        1.5,
        -1,
        2**63,
        2**200,
        "1",
        "",
        [],
        {},
        [None],
        {"a": 1},
        "x" * 5_000,
        "\u0661",
        1e300,
    )
    for name in (
        "prompt", "model", "n", "size", "quality", "background", "output_format", "output_compression", "moderation",
        "seed", "response_format", "stream", "partial_images", "user", "safety_identifier",
    ):  # fmt: skip
        for value in odd:
            # Without a price: no picture of a value that happens to be right.
            yield made.parameters(f"parameter {name}", **{"prompt": "", "n": 0, name: value})
    for name, values in {
        "n": (0, 11, -1, 10**18, 1.0, "2", True),
        "size": (
            "0x0",
            "17x99999",
            "1024",
            "-64x64",
            "1024X1024",
            "\uff11\uff10x64",
            "99999999999999x1",
            "1x1",
            "64x64x64",
        ),
        "output_format": ("gif", "svg", "PNG", "png\n", "../png"),
        "background": ("red", "transparent "),
        "output_compression": (101, -1, 1e3),
        "partial_images": (4, -1),
        "model": ("no model", "../../etc", "m" * 200, "\u043c", "nobody-serves-this"),
        "prompt": ("", " \u200b\n", "x" * 32_001, "\u0000", "\u115f", None),
        "image": ("data:image/png;base64,AAAA",),
        "extra": ({"n": 1}, {"prompt": "another"}),
        "steps": (2**60 + 1, {"a": {"b": [1e308, -0.0]}, "n": None, "\u202e": 1}, "\x7f"),
    }.items():
        # What is handed on to the provider may be right: no picture of it.
        unmade = {"n": 0} if name in {"extra", "steps"} else {}
        for value in values:
            yield made.parameters(f"{name} out of its range", **unmade, **{name: value})
    yield made.parameters("transparent jpeg", background="transparent", output_format="jpeg")
    yield made.parameters("70 KB of extra", x="x" * 70_000)


def _terms(made: _Made) -> Iterator[Malformed]:
    for header, values in {
        "cache-control": (b"max-age=-1", b"max-age=" + b"9" * 5_000, b"max-age=abc", b"=,=;", b"\xff", b"," * 5_000,
                          b'no-cache="', b"only-if-cached, no-store, no-cache, max-age=0"),
        "x-cacheserver-namespace": (b"nowhere", b"../default", b"\xff", b"a" * 8_000, b" "),
        "x-cacheserver-priority": (b"urgent", b"99", b"\xff", b""),
        "x-cacheserver-tags": (b",", b"a b", b"\xff", b"t," * 1_000, b"t" * 65),
        "x-cacheserver-use": (b"no such use", b"\xff", b"u" * 8_000),
        "x-cacheserver-allow-degraded": (b"yes", b"1", b""),
        "x-cacheserver-match-level": (b"semantic", b"canonical", b"exactly", b"0"),
        "x-cacheserver-variant-policy": (b"last", b"next,first", b""),
        "x-cacheserver-candidates": (b"0", b"-1", b"99", b"1.5", b"\xd9\xa3", b"9" * 5_000),
        "x-cacheserver-ttl": (b"0", b"-1", b"nan", b"1e9", b"9" * 5_000, b"\xb2"),
        "idempotency-key": (b"k" * 8_000, b"\xff\xfe", b"a\tb"),
    }.items():  # fmt: skip
        for value in values:
            yield made.terms(header, value)


def _part(name: str, content: bytes, more: str = "") -> bytes:
    return f'content-disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content


def _png(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels, all of them black."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compress(bytes(min((width + 1) * height, 1_000_000)))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _forms(made: _Made) -> Iterator[Malformed]:
    prompt, image = _part("prompt", b"a red fox"), _part("image", _png(64, 64), '; filename="a.png"')
    nested = b'--in\r\ncontent-disposition: form-data; name="prompt"\r\n\r\nx\r\n--in--'
    mixed = (
        b'content-disposition: form-data; name="image"\r\ncontent-type: multipart/mixed; boundary=in\r\n\r\n' + nested
    )
    yield made.form("a form without parts")
    yield made.form("a form of another boundary", prompt, image, content_type="multipart/form-data; boundary=other")
    yield made.form("a form without an end", prompt, image, end=b"")
    yield made.form("half an end", prompt, image, end=b"--b0un")
    yield made.form("text after the end", prompt, _part("image", b"x"), end=f"--{_BOUNDARY}--\r\nmore".encode())
    yield made.form("a nested form", prompt, mixed)
    yield made.form("a part without a name", prompt, b"content-disposition: form-data\r\n\r\nx")
    yield made.form("a part without headers", prompt, b"\r\nx")
    yield made.form("a part of no form", prompt, b'content-disposition: attachment; name="image"\r\n\r\nx')
    yield made.form("a part's header of 1 MB", prompt, b"x-a: " + b"b" * 1_000_000 + b"\r\n" + image)
    yield made.form("a part with 10,000 headers", prompt, b"x-a: b\r\n" * 10_000 + image)
    yield made.form("a name of bytes", prompt, b'content-disposition: form-data; name="\xff\xfe"\r\n\r\nx')
    yield made.form("a file name that is a path", prompt, _part("image", b"x", '; filename="../../etc/passwd"'))
    yield made.form("5,000 parts", prompt, *[_part(f"x{n}", b"1") for n in range(5_000)])
    yield made.form("17 images", prompt, *[image] * 17)
    yield made.form("no image", prompt)
    yield made.form("no prompt", image)
    yield made.form("two prompts", prompt, prompt, image)
    yield made.form("a prompt of bytes", _part("prompt", b"\xff\xfe"), image)
    yield made.form("a prompt of 200 KB", _part("prompt", b"x" * 200_000), image)
    for kind, content in {
        "an empty image": b"",
        "no image at all": b"GIF89a" + bytes(100),
        "half an image": _png(64, 64)[:40],
        "an image of 60,000 by 60,000": _png(60_000, 60_000),
        "an image without pixels": _png(0, 0),
        "a page": b"<html><script>alert(1)</script></html>",
        "an SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>',
        "5 MB of noise": Random(5).randbytes(5_000_000),  # noqa: S311 - noise
    }.items():
        yield made.form(f"an edit of {kind}", prompt, _part("image", content, '; filename="a.png"'))
        yield made.form(f"a mask of {kind}", prompt, image, _part("mask", content, '; filename="m.png"'))
    yield made.form("a mask of another size", prompt, image, _part("mask", _png(32, 32)))
    yield made.form("two masks", prompt, image, *[_part("mask", _png(64, 64))] * 2)
    for name, value in (("n", "0"), ("n", "1.0"), ("n", "\u0661"), ("n", " 1"), ("stream", "yes"), ("seed", "9" * 40)):
        yield made.form(f"{name} in a form", prompt, image, _part(name, value.encode()))
    encoded = base64.b64encode(_png(64, 64)).decode()
    for kind, images in {
        "no images": [],
        "images that are none": "a.png",
        "17 images": [{"image_url": f"data:image/png;base64,{encoded}"}] * 17,
        "an image by URL": [{"image_url": "http://169.254.169.254/latest/meta-data"}],
        "an image by file": [{"image_url": "file:///etc/passwd"}],
        "an image by id": [{"file_id": "file-1"}],
        "an image of another base": [{"image_url": "data:image/png;base64,*"}],
        "an image without a comma": [{"image_url": "data:image/png;base64"}],
        "an image of a number": [1],
        "an image of 60,000 by 60,000": [
            {"image_url": f"data:image/png;base64,{base64.b64encode(_png(60_000, 60_000)).decode()}"}
        ],
    }.items():
        yield made.parameters(f"{kind} in JSON", EDITS, images=images)


# ── images by URL ───────────────────────────────────────────────────────────────────────────────────────────────


def _delivery(made: _Made) -> Iterator[Malformed]:
    for query in (
        "?w=0", "?w=-1", "?w=99999999999999999999", "?w=1.5", "?w=%D9%A3", "?w=abc", "?w=1&w=2", "?h=8193", "?h=",
        "?w=%00",
        "?format=exe", "?format=../png", "?format=", "?q=101", "?q=-1", "?q=1e1", "?strip=2", "?strip=true",
        "?v=" + "f" * 5_000,
        "?expires=abc&signature=x", "?expires=99999999999999999999&signature=%ff", "?expires=-1&signature=",
        "?signature=x",
        "?download=..%2f..%2fx%0d%0aset-cookie:a=b", "?download=" + "x" * 5_000, "?download=%ff%fe%00", "?download=",
        "?download=%e2%80%aegnp.exe", "?%ff=%ff", "?&&&===",
        "?" + "a" * 8_000, "?w=8192&h=8192&format=png&q=100&strip=1",
    ):  # fmt: skip
        yield made.image("a query of an image", query)
        yield made.request("a query of a key that is none", "GET", f"/images/x{query}")
    for value in (
        "bytes=", "bytes=-", "bytes=-0", "bytes=5-1", "bytes=abc", "bits=0-1", "bytes=0-0,-1",
        "bytes=18446744073709551616-",
        "bytes=" + "9" * 5_000 + "-", "bytes=0-," * 1_000, "bytes=" + ",".join(["0-"] * 5_000), "bytes=0-0," * 5_000,
        "bytes=--1", "bytes=0-\u00e9", "bytes =0-1", "bytes=0 - 1", "items=0-1",
    ):  # fmt: skip
        yield made.image("a range", range=value)
        yield made.image("a range if it is the same", range=value, if_range='"x"')
    for header in ("if_none_match", "if_match", "if_modified_since", "if_unmodified_since", "if_range"):
        for value in ("", "*", '"', 'W/"', "," * 5_000, '"x",' * 2_000, "\u00e9", "Thu, 99 Foo 9999 99:99:99 GMT",
                      "Mon, 01 Jan 0000 00:00:00 GMT", "9" * 40, "Fri, 31 Dec 9999 23:59:60 GMT"):  # fmt: skip
            yield made.image(f"header {header.replace('_', '-')}", **{header: value})


# ── what ends too early ─────────────────────────────────────────────────────────────────────────────────────────


def _cut(made: _Made) -> Iterator[Malformed]:
    whole = (
        made.parameters("a generation"),
        made.form("a form", _part("prompt", b"a red fox"), _part("image", _png(64, 64))),
        made.image("an image"),
    )
    for case in whole:
        for eighths in range(1, 8):
            yield Malformed(f"{case.kind}, cut", case.data[: len(case.data) * eighths // 8], is_cut=True)
    for path in (GENERATIONS, EDITS):
        for length in (10**9, 10**18, 500):
            told = {"content-type": "application/json", "content-length": str(length)}
            yield made.request("a body that does not come", "POST", path, b"{", told, is_cut=True)
    chunked = {"content-type": "application/json", "transfer-encoding": "chunked"}
    yield made.request("chunks without an end", "POST", GENERATIONS, headers=chunked, is_cut=True)
    yield made.request("100 to continue, and nothing", "POST", EDITS, headers={"expect": "100-continue"}, is_cut=True)
