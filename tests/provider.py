"""Stand-ins for a provider: one over real HTTP, shaped like OpenAI's images API, and one inside the process."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import itertools
import json
import math
import random
import re
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from PIL import Image

from cacheserver.errors import UpstreamError
from cacheserver.generation.prices import split
from cacheserver.model import Delivery, GeneratedImage, ImageRequest, PartialImage, RateLimits

API_KEY = "sk-test-provider-key"
GPT_IMAGE_MODELS = ("gpt-image-2", "gpt-image-2-2026-04-21")
OPEN_MODELS = ("qwen-image",)
"""Models of a self-hosted server: any further parameter is taken."""

_PARAMETERS = frozenset(
    {"prompt", "model", "n", "user", "safety_identifier", "size", "quality", "background", "moderation"}
    | {"output_format", "output_compression", "stream", "partial_images"}
)
_CHOICES: Mapping[str, frozenset[str]] = {
    "quality": frozenset({"low", "medium", "high", "auto"}),
    "background": frozenset({"transparent", "opaque", "auto"}),
    "output_format": frozenset({"png", "jpeg", "webp"}),
    "moderation": frozenset({"low", "auto"}),
}
_MAKING = re.compile(r"(?:/v1|/openai/deployments/(?P<deployment>[^/]+))/images/(?P<kind>generations|edits)")
_PARTIAL_TOKENS = 100
_INPUT_IMAGE_TOKENS = 1_024


def small_image(number: int, image_format: str = "png", size: tuple[int, int] = (64, 48)) -> bytes:
    """A real picture, another one for every number."""
    digest = hashlib.sha256(str(number).encode()).digest()
    picture = Image.new("RGB", size, tuple(digest[:3]))
    # Never over the whole width: that could make a blank, which is not believed.
    picture.paste(tuple(digest[3:6]), (0, 0, 1 + digest[6] % (size[0] - 1), 1 + digest[7] % size[1]))
    file = io.BytesIO()
    picture.save(file, format=image_format)
    return file.getvalue()


def large_png(number: int, min_size_bytes: int) -> bytes:
    """A valid PNG of at least so many bytes and little more, another one for every number."""
    side = math.ceil(math.sqrt(min_size_bytes / 3))
    noise = random.Random(number).randbytes(side * side * 3)  # noqa: S311 - pixels, not secrets
    picture = Image.frombytes("RGB", (side, side), noise)
    file = io.BytesIO()
    picture.save(file, format="PNG", compress_level=0)
    return file.getvalue()


@dataclass(frozen=True)
class HttpRequest:
    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.target).query)

    def json(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(self.body)
        return parsed

    def form(self) -> list[FormPart]:
        """The parts of a multipart form, in order."""
        _, _, boundary = self.headers["content-type"].partition("boundary=")
        [first, *parts, last] = self.body.split(b"--" + boundary.strip('"').encode())
        assert (first, last) == (b"", b"--\r\n")
        return [FormPart.read(part) for part in parts]


@dataclass(frozen=True)
class FormPart:
    name: str
    file_name: str | None
    content_type: str
    data: bytes

    @staticmethod
    def read(part: bytes) -> FormPart:
        head, _, data = part.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode("ascii").strip().split("\r\n"))
        said = dict(re.findall(r'(\w+)="([^"]*)"', headers["Content-Disposition"]))
        return FormPart(said["name"], said.get("filename"), headers.get("Content-Type", ""), data.removesuffix(b"\r\n"))


@dataclass
class Reply:
    """An HTTP answer, and what goes wrong while it is sent."""

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # bytes of the body, then the connection is reset
    hang_after: int | None = None  # bytes of the body, then silence


def error_reply(
    status: int,
    code: str | None = None,
    *,
    kind: str = "invalid_request_error",
    message: str = "Something is wrong.",
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
    **more: Any,
) -> Reply:
    error = {"message": message, "type": kind, "param": param, "code": code, **more}
    return Reply(status, json.dumps({"error": error}).encode(), headers=dict(headers or {}))


def events(*documents: Mapping[str, Any]) -> bytes:
    """A stream of these events, each named by its type."""
    return b"".join(f"event: {each['type']}\ndata: {json.dumps(each)}\n\n".encode() for each in documents)


class OpenAIStandIn:
    """A local HTTP server shaped like OpenAI's images API. As strict as the real one with GPT image models.

    `calls` counts generations and edits asked for, `images` pictures made, `requests` keeps what was received.
    Pictures have the size asked for, 64x48 where none is and whatever their bytes need with `min_image_bytes`.
    `by_url` answers with URLs on this server; `image_url` with that URL, whatever it is.
    """

    def __init__(self, *, api_key: str = API_KEY, models: Sequence[str] = (*GPT_IMAGE_MODELS, *OPEN_MODELS)) -> None:
        self.api_key = api_key
        self.models = tuple(models)
        self.calls = 0
        self.images = 0
        self.connections = 0
        self.requests: list[HttpRequest] = []
        self.made: dict[str, set[bytes]] = {}  # by prompt, the pictures made for it
        self.headers: dict[str, str] = {}  # sent with every answer, as x-ratelimit-*
        self.by_url = False
        self.image_url: str | None = None
        self.min_image_bytes = 0
        self.image_bytes_of: dict[str, int] = {}  # by prompt, in place of min_image_bytes
        self.native_format: str | None = None  # what is made whatever output_format says
        self.streams = True  # False: `stream` is taken and ignored
        self._next: deque[Callable[[HttpRequest], Reply | None]] = deque()
        self._edit: deque[Callable[[dict[str, Any]], None]] = deque()
        self._files: dict[str, Reply] = {}
        self._open = asyncio.Event()
        self._open.set()
        self._arrival = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks)
        await self._server.wait_closed()

    @property
    def root_url(self) -> str:
        """What Azure calls the endpoint."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        return f"{self.root_url}/v1"

    def hold(self) -> None:
        """Generations wait from now on, until `release`."""
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    async def arrived(self, calls: int) -> None:
        """Return when so many generations have been asked for in all."""
        async with self._arrival:
            await self._arrival.wait_for(lambda: self.calls >= calls)

    def image_bytes(self, *, min_size_bytes: int) -> bytes:
        """A valid PNG of at least so many bytes; `min_image_bytes` makes the answers so large."""
        return large_png(self.images, min_size_bytes)

    def fail_next(self, status: int, code: str | None = None, *, times: int = 1, **error: Any) -> None:
        """Answer the next generations with an error; keywords as in `error_reply`."""
        self.answer_next(error_reply(status, code, **error), times=times)

    def answer_next(self, reply: Reply, *, times: int = 1) -> None:
        """Answer the next generations with exactly this."""
        self._next.extend([lambda _: reply] * times)

    def hang_next(self) -> None:
        """Take the next generation and never answer."""
        self._next.append(lambda _: None)

    def edit_next(self, edit: Callable[[dict[str, Any]], None]) -> None:
        """Answer the next generation as ever, but for what `edit` does to the JSON."""
        self._edit.append(edit)

    def file(self, name: str, reply: Reply) -> str:
        """A URL on this server that answers with `reply`."""
        self._files[f"/files/{name}"] = reply
        return f"{self.root_url}/files/{name}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        # Ending quietly on both: the client hung up, or the stand-in is being closed.
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            while (request := await _read_request(reader)) is not None:
                await self._send(writer, await self._reply(request))
        writer.transport.abort()

    async def _send(self, writer: asyncio.StreamWriter, reply: Reply | None) -> None:
        if reply is None:
            await asyncio.Event().wait()
        assert reply is not None
        headers = {
            "content-type": reply.content_type,
            "content-length": str(len(reply.body)),
            "x-request-id": f"req_{self.calls}",
            **self.headers,
            **reply.headers,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if value)
        writer.write(f"HTTP/1.1 {reply.status} Something\r\n{head}\r\n".encode())
        for limit in (reply.cut_after, reply.hang_after):
            if limit is not None:
                writer.write(reply.body[:limit])
                await writer.drain()
                if limit == reply.hang_after:
                    await asyncio.Event().wait()
                connection = writer.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                raise ConnectionResetError
        writer.write(reply.body)
        await writer.drain()

    async def _reply(self, request: HttpRequest) -> Reply | None:
        self.requests.append(request)
        making = _MAKING.fullmatch(request.path)
        if request.method == "POST" and making:
            return await self._making(request, making["deployment"], is_edit=making["kind"] == "edits")
        if request.method == "GET" and request.path in {"/v1/models", "/openai/models"}:
            listed = [{"id": model, "object": "model"} for model in self.models]
            return self._unauthorized(request) or Reply(body=json.dumps({"object": "list", "data": listed}).encode())
        if request.method == "GET" and request.path in self._files:
            return self._files[request.path]
        return error_reply(404, message="Invalid URL")

    async def _making(self, request: HttpRequest, deployment: str | None, *, is_edit: bool) -> Reply | None:
        self.calls += 1
        async with self._arrival:
            self._arrival.notify_all()
        await self._open.wait()
        if self._next:
            return self._next.popleft()(request)
        body = _fields(request.form()) if is_edit else request.json()
        if deployment is not None:
            if "model" in body:
                return error_reply(400, "unknown_parameter", param="model")
            body["model"] = deployment
        inputs = sum(part.file_name is not None for part in request.form()) if is_edit else 0
        refusal = self._unauthorized(request) or _violation(body, self.models)
        if refusal is None and is_edit and not inputs:
            refusal = error_reply(400, "missing_required_parameter", param="image")
        return refusal or self._made(body, inputs)

    def _unauthorized(self, request: HttpRequest) -> Reply | None:
        azure = request.path.startswith("/openai/")
        sent = request.headers.get("api-key" if azure else "authorization", "")
        if sent == (self.api_key if azure else f"Bearer {self.api_key}"):
            return None
        return error_reply(401, "invalid_api_key", message=f"Incorrect API key provided: {sent}")

    def _made(self, body: dict[str, Any], inputs: int) -> Reply:
        n = body.get("n") or 1
        partials = (body.get("partial_images") or 0) if body.get("stream") and self.streams else 0
        image_format = body.get("output_format") or "png"
        size, quality = body.get("size") or "auto", body.get("quality") or "auto"
        size = "1024x1024" if size == "auto" else size
        quality = "medium" if quality == "auto" else quality
        text_in, image_in = math.ceil(len(body["prompt"]) / 4), inputs * _INPUT_IMAGE_TOKENS
        tokens_in, tokens_out = text_in + image_in, n * _output_tokens(size, quality) + partials * _PARTIAL_TOKENS
        answer: dict[str, Any] = {
            "created": 1_800_000_000,
            "background": "transparent" if body.get("background") == "transparent" else "opaque",
            "output_format": image_format,
            "quality": quality,
            "size": size,
            "data": [self._item(image_format, body["prompt"], body.get("size") or "auto") for _ in range(n)],
            "usage": {
                "total_tokens": tokens_in + tokens_out,
                "input_tokens": tokens_in,
                "output_tokens": tokens_out,
                "input_tokens_details": {"text_tokens": text_in, "image_tokens": image_in},
                "output_tokens_details": {"image_tokens": tokens_out, "text_tokens": 0},
            },
        }
        if self._edit:
            self._edit.popleft()(answer)
        if not (body.get("stream") and self.streams):
            return Reply(body=json.dumps(answer).encode())
        return _streamed(answer, "image_edit" if inputs else "image_generation", partials)

    def _item(self, image_format: str, prompt: str, size: str) -> dict[str, Any]:
        self.images += 1
        width, height = (64, 48) if size == "auto" else (int(side) for side in size.split("x"))
        image_format = self.native_format or image_format
        min_image_bytes = self.image_bytes_of.get(prompt, self.min_image_bytes)
        data = (
            large_png(self.images, min_image_bytes)
            if min_image_bytes
            else small_image(self.images, image_format, (width, height))
        )
        self.made.setdefault(prompt, set()).add(data)
        if self.image_url is not None:
            return {"url": self.image_url}
        if self.by_url:
            return {"url": self.file(f"{self.images}.{image_format}", Reply(body=data, content_type="image/any"))}
        return {"b64_json": base64.b64encode(data).decode()}


def _fields(form: Sequence[FormPart]) -> dict[str, Any]:
    """What a form says beside its files, as JSON would have it."""
    texts = {part.name: part.data.decode() for part in form if part.file_name is None}
    numbers = {name: int(texts[name]) for name in ("n", "output_compression", "partial_images") if name in texts}
    return texts | numbers | ({"stream": texts["stream"] == "true"} if "stream" in texts else {})


def _streamed(answer: Mapping[str, Any], kind: str, partials: int) -> Reply:
    """An answer of one picture as a stream: `partials` coarse pictures, then the picture itself."""
    facts = {name: answer[name] for name in ("size", "quality", "background", "output_format")}
    facts["created_at"] = answer["created"]
    coarse = [
        {"type": f"{kind}.partial_image", "partial_image_index": index, "b64_json": partial_b64(index), **facts}
        for index in range(partials)
    ]
    [picture] = answer["data"]
    completed = {"type": f"{kind}.completed", **facts, **picture, "usage": answer["usage"]}
    return Reply(body=events(*coarse, completed), content_type="text/event-stream; charset=utf-8")


def partial_b64(index: int) -> str:
    """The partial picture of this index, as every stream has it."""
    return base64.b64encode(small_image(10_000 + index)).decode()


def _violation(body: Mapping[str, Any], models: Sequence[str]) -> Reply | None:
    """What the real API refuses; of a self-hosted server's models any further parameter is taken."""
    model, prompt, n = body.get("model"), body.get("prompt"), body.get("n") or 1
    if model not in models:
        return error_reply(404, "model_not_found", param="model", message=f"The model {model} does not exist")
    unknown = sorted(body.keys() - _PARAMETERS) if model not in OPEN_MODELS else []
    if unknown:
        return error_reply(400, "unknown_parameter", param=unknown[0], message=f"Unknown parameter: '{unknown[0]}'.")
    wrong = {
        "prompt": not (isinstance(prompt, str) and 1 <= len(prompt) <= 32_000),
        "n": not (isinstance(n, int) and 1 <= n <= 10),
        "size": not re.fullmatch(r"auto|\d{2,4}x\d{2,4}", body.get("size") or "auto"),
        "output_compression": "output_compression" in body and body.get("output_format", "png") == "png",
        **{name: body.get(name) is not None and body[name] not in choices for name, choices in _CHOICES.items()},
    }
    param = next((name for name, is_wrong in wrong.items() if is_wrong), None)
    return error_reply(400, "invalid_value", param=param, message=f"Invalid value: {body}.") if param else None


def _output_tokens(size: str, quality: str) -> int:
    """What gpt-image-2 counts for one picture."""
    width, height = (int(side) for side in size.split("x"))
    factor = {"low": 16, "medium": 48, "high": 96}[quality]
    short = round(factor * min(width, height) / max(width, height))
    return math.ceil(factor * short * (2_000_000 + width * height) / 4_000_000)


async def _read_request(reader: asyncio.StreamReader) -> HttpRequest | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").strip().split("\r\n")
    method, target, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return HttpRequest(method, target, headers, body)


class FakeUpstream:
    """An Upstream inside the process: a distinct real PNG per picture, at a price."""

    def __init__(
        self, name: str = "fake", models: Sequence[str] = ("gpt-image-2",), *, cost_microusd: int = 53_000
    ) -> None:
        self._name = name
        self.models = tuple(models)
        self.cost_microusd = cost_microusd
        self.calls = 0
        self.images = 0
        self.checks = 0
        self.closed = False
        self.told: RateLimits | None = None
        self.is_priced = True  # False: nobody says what a call costs
        self.asked: list[tuple[ImageRequest, tuple[int, ...]]] = []
        self.price_factors: list[Decimal] = []
        self.partials: list[bytes] = []  # what each call gives of its picture beforehand, as far as it is asked to
        self.partials_asked: list[int] = []
        self.on_partials: list[Callable[[PartialImage], None] | None] = []  # by call: whom a partial picture is given
        self.during: Callable[[], Awaitable[None]] | None = None  # runs inside each call, once it is released
        self._errors: deque[UpstreamError] = deque()
        self._numbers = itertools.count()
        self._open = asyncio.Event()
        self._open.set()
        self._arrival = asyncio.Condition()

    @property
    def name(self) -> str:
        return self._name

    def hold(self) -> None:
        """Calls wait from now on, until `release`."""
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    async def arrived(self, calls: int) -> None:
        """Return when so many calls have begun in all."""
        async with self._arrival:
            await self._arrival.wait_for(lambda: self.calls >= calls)

    def fail_next(self, error: UpstreamError) -> None:
        self._errors.append(error)

    async def generate(
        self,
        request: ImageRequest,
        variants: Sequence[int],
        *,
        price_factor: Decimal = Decimal(1),
        most_microusd: int = 0,
        partial_images: int = 0,
        on_partial: Callable[[PartialImage], None] | None = None,
    ) -> Delivery:
        self.price_factors.append(price_factor)
        self.partials_asked.append(partial_images)
        self.on_partials.append(on_partial)
        self.calls += 1
        self.asked.append((request, tuple(variants)))
        async with self._arrival:
            self._arrival.notify_all()
        await self._open.wait()
        if on_partial is not None:
            for index, data in enumerate(self.partials[:partial_images]):
                on_partial(PartialImage(data, index))
        if self.during is not None:
            await self.during()
        if self._errors:
            raise self._errors.popleft()
        images = tuple(self._image(request) for _ in variants)
        if self.is_priced:
            return Delivery(images, told=self.told)
        shares = split(most_microusd, len(images))
        unpriced = [replace(image, paid_microusd=share) for image, share in zip(images, shares, strict=True)]
        return Delivery(tuple(unpriced), told=self.told, priced=False)

    async def check(self) -> None:
        self.checks += 1
        if self._errors:
            raise self._errors.popleft()

    async def aclose(self) -> None:
        self.closed = True

    def _image(self, request: ImageRequest) -> GeneratedImage:
        self.images += 1
        number = next(self._numbers)
        data = small_image(number, request.output_format)
        return GeneratedImage(
            data=data,
            content_type=f"image/{request.output_format}",
            width=64,
            height=48,
            sha256=hashlib.sha256(data).hexdigest(),
            model=request.model,
            size="1024x1024" if request.size == "auto" else request.size,
            quality="medium" if request.quality == "auto" else request.quality,
            background="opaque" if request.background == "auto" else request.background,
            seed=request.seed,
            upstream=self._name,
            upstream_request_id=f"{self._name}-{number}",
            generation_s=12.5,
            paid_microusd=self.cost_microusd,
        )
