"""An image provider to measure against: OpenAI's images API with its limits, latencies, faults and bills.

In a process of ours:

    async with Provider(ProviderConfig(keys=(KeyConfig(key="sk-1", group="org-1"),))) as provider:
        provider.fail_next("sk-1", Fault.SERVER_ERROR)
        ...  # calls to provider.base_url
        assert provider.bill_microusd == ...

In one of its own, which can be killed and tells its bill even then: `ProviderProcess`, or by hand

    python -m scripts.bench.provider --config FILE.json --port 8400 --ledger FILE.jsonl

which prints one line of JSON when it listens, and is told what to do by HTTP:

    POST /_control/fault    {"key": "sk-1", "fault": "500", "times": 3}, or "probability": 0.1; key null is any
    POST /_control/limit    {"owner": "org-1", "kind": "images", "per_minute": 20}
    POST /_control/latency  {"key": "sk-1", "latency": {"mean_s": 60}}
    GET  /_control/summary  sums over the calls; ?since= emulated seconds
    GET  /_control/ledger   the calls themselves; ?since= as well
    GET  /_control/state    what runs now, and what foreign traffic has taken

The way of a generation or edit: key -> parameters -> faults that strike at once -> limits of the key and its group
-> latency -> faults that strike in place of pictures -> the bill is written down -> the answer, all of its stream at
once. A caller that hangs up stops nothing.

All times are emulated seconds, which `compression` lets pass faster than real ones. Nothing here is a secret: the
keys are made up, and stand in the ledger as they are.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import json
import os
import re
import signal
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any, Self
from urllib.parse import parse_qs

import typer
from pydantic import BaseModel, Field, ValidationError

from cacheserver.clock import SystemClock
from cacheserver.interfaces import Clock
from scripts.bench.provider_config import Fault, KeyConfig, Kind, Latency, LimitsConfig, Price, ProviderConfig
from scripts.bench.provider_http import End, HttpServer, Reply, Request
from scripts.bench.provider_ledger import Call, Ledger, Summary, images_per_interval
from scripts.bench.provider_limits import Limits, admit, told
from scripts.bench.provider_pictures import Look, Pictures, cut, cut_base64
from scripts.bench.provider_process import ProviderProcess
from scripts.bench.provider_wire import (
    HTML_ERROR,
    ApiError,
    Asked,
    Units,
    blocked,
    fault_error,
    generation_result,
    limited,
    moderation_result,
    parse_edit,
    parse_generation,
    streamed_result,
)

__all__ = [
    "Call",
    "Fault",
    "KeyConfig",
    "Latency",
    "LimitsConfig",
    "Price",
    "Provider",
    "ProviderConfig",
    "ProviderProcess",
    "Summary",
    "images_per_interval",
]

_KINDS = r"/images/(?:generations|edits)"
_MAKING = re.compile(rf"(?:/openai)?/v1{_KINDS}|/openai/deployments/(?P<deployment>[^/]+){_KINDS}")
_EDITS = "/images/edits"
_MODELS = re.compile(r"/(?:openai/)?v1/models|/openai/models")
_CREATED_S = 1_800_000_000
_KEPT_FILES = 4_096
_FAULT_RETRY_AFTER_S = 1.0
_STDIN = 0


@dataclass(frozen=True, slots=True)
class _Strike:
    """One fault that strikes."""

    fault: Fault
    billed: bool
    retry_after_s: float


class _Faults:
    """Which fault strikes which call: those ordered for the next calls first, then by chance. Key None is any."""

    def __init__(self, keys: tuple[KeyConfig, ...], random: Random) -> None:
        self._random = random
        self._ordered: dict[str | None, deque[_Strike]] = {}
        self._rates: dict[tuple[str | None, Fault], tuple[float, _Strike]] = {}
        for key in keys:
            for fault, probability in key.fault_rates.items():
                self.set_rate(key.key, probability, _Strike(fault, fault.is_billed, _FAULT_RETRY_AFTER_S))

    def order(self, key: str | None, strike: _Strike, times: int) -> None:
        self._ordered.setdefault(key, deque()).extend([strike] * times)

    def set_rate(self, key: str | None, probability: float, strike: _Strike) -> None:
        self._rates[key, strike.fault] = (probability, strike)

    def draw(self, key: str, *, early: bool) -> _Strike | None:
        """What strikes a call of `key` now, at the point where the early or the other faults do."""
        for ordered in (self._ordered.get(key), self._ordered.get(None)):
            if ordered and ordered[0].fault.is_early == early:
                return ordered.popleft()
        for (whose, fault), (probability, strike) in self._rates.items():
            if whose in {key, None} and fault.is_early == early and self._random.random() < probability:
                return strike
        return None


@dataclass(slots=True)
class _Draft:
    """A call while it runs: what will be written down of it."""

    request_id: str
    at_s: float
    key: str = ""
    group: str = ""
    asked: Asked | None = None
    strike: _Strike | None = None
    started_s: float | None = None
    images: int = 0
    billed_microusd: int = 0
    limited: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    pictures_sha256: list[str] = field(default_factory=list)

    def ended(self, *, status: int, now_s: float, hung_up: bool) -> Call:
        asked = self.asked
        return Call(
            request_id=self.request_id,
            key=self.key,
            prompt_sha256=hashlib.sha256(asked.prompt.encode(errors="replace")).hexdigest() if asked else "",
            model=asked.model if asked else "",
            size=asked.size if asked else "",
            quality=asked.quality if asked else "",
            n=asked.n if asked else 0,
            status=status,
            fault=self.strike.fault if self.strike else "",
            limited=self.limited,
            images=self.images if status == 200 else 0,  # noqa: PLR2004 - OK
            billed_microusd=self.billed_microusd,
            at_s=self.at_s,
            started_s=self.started_s,
            ended_s=now_s,
            hung_up=hung_up,
            pictures_sha256=self.pictures_sha256,
        )


class Provider:
    """The emulator, serving on 127.0.0.1 while it is entered.

    Args:
        config: what it is like.
        port: where to listen; 0 is any free one.
        ledger_file: every call is appended to it before it is answered.
        epoch_s: the monotonic time at which emulated time is 0, for one that goes on where another ended; None: now.
        clock: real time, before compression.
    """

    def __init__(
        self,
        config: ProviderConfig,
        *,
        port: int = 0,
        ledger_file: Path | None = None,
        epoch_s: float | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.port = port
        self.arrivals = 0
        self.running = 0
        self.most_running = 0
        self.moderations = 0
        self._config = config
        self._clock = clock or SystemClock()
        self.epoch_s = self._clock.monotonic_s() if epoch_s is None else epoch_s
        self._random = Random(config.seed)  # noqa: S311 - which faults, how long
        self._keys = {each.key: each for each in config.keys}
        self._latencies = {each.key: each.latency or config.latency for each in config.keys}
        self._limits = self._all_limits()
        self._faults = _Faults(config.keys, self._random)
        self._units = Units(config.compression if config.told_in == "real" else 1.0)
        self._pictures = Pictures(min_bytes=config.min_picture_bytes)
        self._files: dict[str, tuple[bytes, str]] = {}
        self._ledger = Ledger(ledger_file)
        self._server = HttpServer(self._reply)
        self._run = os.urandom(4).hex()
        self._numbers = itertools.count(1)
        self._open = asyncio.Event()
        self._open.set()
        self._arrived = asyncio.Condition()

    def _all_limits(self) -> dict[str, Limits]:
        """By the name of the key or group. Each has a random order of its own: one's calls do not change another's."""
        config = self._config
        owners = {each.key: each.limits for each in config.keys}
        owners |= {name: config.groups.get(name, LimitsConfig()) for name in config.group_names}
        return {
            name: Limits(limits, random=Random(f"{config.seed} {name}"), now_s=self.now_s)  # noqa: S311 - foreign calls
            for name, limits in owners.items()
        }

    async def __aenter__(self) -> Self:
        self.port = await self._server.start(self.port)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._server.close()
        self._ledger.close()

    @property
    def root_url(self) -> str:
        """What Azure calls the endpoint."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        """Where OpenAI's API is."""
        return f"{self.root_url}/v1"

    @property
    def now_s(self) -> float:
        """Emulated time."""
        return (self._clock.monotonic_s() - self.epoch_s) * self._config.compression

    @property
    def bill_microusd(self) -> int:
        """What has been billed in all."""
        return sum(call.billed_microusd for call in self.calls())

    def calls(self, since_s: float = 0.0) -> list[Call]:
        """The calls that ended at `since_s` or later."""
        return self._ledger.calls(since_s)

    def summary(self, since_s: float = 0.0) -> Summary:
        """Sums over the calls that ended at `since_s` or later."""
        return Summary.of(self.calls(since_s))

    def foreign_taken(self, owner: str) -> dict[Kind, float]:
        """What foreign traffic has taken of the limits of a key or group."""
        return self._limits[owner].foreign_taken(self.now_s)

    def fail_next(
        self,
        key: str | None,
        fault: Fault | str,
        times: int = 1,
        *,
        billed: bool | None = None,
        retry_after_s: float = _FAULT_RETRY_AFTER_S,
    ) -> None:
        """Let a fault strike the next generations of a key; None: of any key.

        Args:
            key: whose.
            fault: which.
            times: how often.
            billed: whether they are billed; None as is usual for the fault.
            retry_after_s: what an answer 429 gives as Retry-After.

        Raises:
            ValueError: nobody has this key, there is no such fault, or it strikes too early to be billed.
        """
        self._check_key(key)
        self._faults.order(key, _strike(fault, billed, retry_after_s), times)

    def set_fault_rate(
        self,
        key: str | None,
        fault: Fault | str,
        probability: float,
        *,
        billed: bool | None = None,
        retry_after_s: float = _FAULT_RETRY_AFTER_S,
    ) -> None:
        """Let a fault strike each generation of a key with this probability from now on; otherwise as `fail_next`."""
        self._check_key(key)
        self._faults.set_rate(key, probability, _strike(fault, billed, retry_after_s))

    def set_limit(self, owner: str, kind: Kind, per_minute: float | None) -> None:
        """Change a limit of a key or a group from now on; None is none.

        Raises:
            ValueError: there is no such key or group.
        """
        if owner not in self._limits:
            raise ValueError(f"no key or group {owner!r}")
        self._limits[owner].change(kind, per_minute, self.now_s)

    def set_latency(self, key: str, latency: Latency) -> None:
        """Change how long generations of a key take, those that begin from now on.

        Raises:
            ValueError: nobody has this key.
        """
        self._check_key(key)
        self._latencies[key] = latency

    def hold(self) -> None:
        """Generations that have been admitted wait from now on, until `release`."""
        self._open.clear()

    def release(self) -> None:
        """Let them go on; their latency begins."""
        self._open.set()

    async def arrived(self, calls: int) -> None:
        """Return when so many generations have been asked for in all."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: self.arrivals >= calls)

    def _check_key(self, key: str | None) -> None:
        if key is not None and key not in self._keys:
            raise ValueError(f"no key {key!r}")

    async def _reply(self, request: Request) -> Reply:
        request_id = f"req_{self._run}{next(self._numbers):08d}"
        if request.path.startswith("/_control/"):
            return self._controlled(request)
        try:
            reply = await self._answer(request, request_id)
        except ApiError as error:
            reply = error.reply()
        headers = {"x-request-id": request_id, "openai-version": "2020-10-01", **reply.headers}
        return Reply(reply.status, reply.body, reply.content_type, headers, reply.end)

    async def _answer(self, request: Request, request_id: str) -> Reply:
        making = _MAKING.fullmatch(request.path)
        match request.method:
            case "POST" if making:
                return await self._generation(request, request_id, making["deployment"])
            case "POST" if request.path == "/v1/moderations":
                self._key(request)
                self.moderations += 1
                return Reply(body=moderation_result(request.body, self._config.moderation_marker, request_id))
            case "GET" if _MODELS.fullmatch(request.path):
                self._key(request)
                return self._model_list()
            case "GET" if request.path in self._files:
                return Reply(200, *self._files[request.path])
        raise ApiError(404, None, f"Invalid URL ({request.method} {request.path})")

    def _model_list(self) -> Reply:
        listed = [
            {"id": model, "object": "model", "created": _CREATED_S, "owned_by": "system"}
            for model in self._config.models
        ]
        return Reply(body=json.dumps({"object": "list", "data": listed}).encode())

    def _key(self, request: Request) -> KeyConfig:
        """Whose call it is."""
        if request.path.startswith("/openai/"):
            sent = request.headers.get("api-key", "")
        else:
            sent = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not sent:
            raise ApiError(401, None, "Missing bearer authentication in header")
        if sent not in self._keys:
            raise ApiError(401, "invalid_api_key", "Incorrect API key provided.")
        return self._keys[sent]

    async def _generation(self, request: Request, request_id: str, deployment: str | None) -> Reply:
        """One call, from its arrival until it is written down."""
        draft = _Draft(request_id, at_s=self.now_s)
        await self._note_arrival()
        try:
            reply = await self._generated(request, deployment, draft)
        except ApiError as error:
            reply = error.reply()
            draft.limited = error.code in {"rate_limit_exceeded", "slow_down"}
        took_ms = (self.now_s - draft.at_s) / self._units.compression * 1_000
        headers = {
            "openai-organization": draft.group,
            "openai-processing-ms": f"{took_ms:.0f}",
            **draft.headers,
            **reply.headers,
        }
        status = reply.status if reply.end is End.WHOLE else 0
        self._ledger.add(draft.ended(status=status, now_s=self.now_s, hung_up=request.has_hung_up()))
        return Reply(reply.status, reply.body, reply.content_type, headers, reply.end)

    async def _note_arrival(self) -> None:
        async with self._arrived:
            self.arrivals += 1
            self._arrived.notify_all()

    async def _generated(self, request: Request, deployment: str | None, draft: _Draft) -> Reply:
        key = self._key(request)
        draft.key, draft.group = key.key, key.group
        owners = (self._limits[key.key], self._limits[key.group])
        azure = request.path.startswith("/openai/")
        draft.asked = asked = self._asked(request, deployment)
        if key.models is not None and asked.model not in key.models:
            message = f"Project '{key.group}' does not have access to model '{asked.model}'"
            raise ApiError(403, "model_not_found", message)
        draft.strike = self._faults.draw(key.key, early=True)
        if draft.strike is not None:
            self._tell_limits(owners, draft, azure=azure)
            return self._struck_early(draft.strike)
        refusal = admit(owners, asked.amounts, self.now_s)
        self._tell_limits(owners, draft, azure=azure)
        if refusal is not None:
            amount = asked.amounts[refusal.kind] if refusal.kind else 1
            raise limited(refusal, key.group, amount, self._units)
        draft.started_s = self.now_s
        draft.strike = self._faults.draw(key.key, early=False)
        with self._running(owners):
            await self._work(key, asked, draft.strike)
        return await self._result(asked, draft)

    def _asked(self, request: Request, deployment: str | None) -> Asked:
        if request.path.endswith(_EDITS):
            return parse_edit(request.body, request.headers.get("content-type", ""), self._config, deployment)
        return parse_generation(request.body, self._config, deployment)

    def _tell_limits(self, owners: tuple[Limits, ...], draft: _Draft, *, azure: bool) -> None:
        if self._config.rate_limit_headers:
            draft.headers = self._units.headers(told(owners, self.now_s), azure=azure)

    def _struck_early(self, strike: _Strike) -> Reply:
        if strike.fault is Fault.RESET_BEFORE:
            return Reply(end=End.RESET)
        raise fault_error(strike.fault, self._units.retry_after(strike.retry_after_s))

    @contextmanager
    def _running(self, owners: tuple[Limits, ...]) -> Iterator[None]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        for owner in owners:
            owner.running += 1
        try:
            yield
        finally:
            self.running -= 1
            for owner in owners:
                owner.running -= 1

    async def _work(self, key: KeyConfig, asked: Asked, strike: _Strike | None) -> None:
        """Take as long as a generation; a prompt that is refused is not generated."""
        await self._open.wait()
        marker = self._config.refusal_marker
        if (strike and strike.fault is Fault.MODERATION_BLOCKED) or (marker is not None and marker in asked.prompt):
            raise blocked("input")
        latency_s = self._latencies[key.key].draw_s(asked.quality, self._random)
        await self._clock.sleep(latency_s / self._config.compression)

    async def _result(self, asked: Asked, draft: _Draft) -> Reply:
        """The pictures, or what is there in their place; and the bill."""
        strike = draft.strike
        price = self._config.models[asked.model]
        if strike is None or strike.billed:
            draft.billed_microusd = price.bill_microusd(
                prompt=asked.prompt,
                size=asked.billed_size,
                quality=asked.quality,
                n=asked.n,
                inputs=asked.inputs,
                partials=asked.partials,
            )
        match strike.fault if strike else None:
            case Fault.HANG:
                return Reply(end=End.SILENCE)
            case Fault.HTML_ERROR:
                return Reply(502, HTML_ERROR, "text/html")
            case Fault.SERVER_ERROR | Fault.MODERATION_BLOCKED_OUTPUT as fault:
                raise fault_error(fault, "")
            case fault:
                draft.images = asked.n
                data = [await self._picture(asked, fault, draft) for _ in range(asked.n)]
                created_s = _CREATED_S + int(self.now_s)
                end = End.MID_BODY if fault is Fault.RESET_MID_BODY else End.WHOLE
                if asked.streams:
                    coarse = [await self._picture(asked, None, draft) for _ in range(asked.partials)]
                    body = streamed_result(asked, price, coarse, data[0], created_s)
                    return Reply(body=body, content_type="text/event-stream", end=end)
                return Reply(body=generation_result(asked, price, data, created_s), end=end)

    async def _picture(self, asked: Asked, fault: Fault | None, draft: _Draft) -> dict[str, str]:
        """One item of the answer's data."""
        look = Look(
            "gif" if fault is Fault.WRONG_TYPE else asked.output_format,
            _half(asked.size) if fault is Fault.WRONG_SIZE else asked.size,
            asked.quality,
            blank=fault is Fault.BLANK,
        )
        picture = await self._pictures.make(look)
        if fault is Fault.TRUNCATED_IMAGE:
            picture = cut(picture)
        draft.pictures_sha256.append(hashlib.sha256(picture).hexdigest())
        if fault is Fault.URL_RESULTS:
            return {"url": self._file(picture, look.format)}
        return {
            "b64_json": cut_base64(picture) if fault is Fault.TRUNCATED_BASE64 else base64.b64encode(picture).decode()
        }

    def _file(self, picture: bytes, image_format: str) -> str:
        """A URL of the picture; the oldest files go."""
        path = f"/files/{self._run}{next(self._numbers)}.{image_format}"
        self._files[path] = (picture, f"image/{image_format}")
        if len(self._files) > _KEPT_FILES:
            del self._files[next(iter(self._files))]
        return f"{self.root_url}{path}"

    def _controlled(self, request: Request) -> Reply:
        answer: object = {}
        try:
            since_s = float(parse_qs(request.query).get("since", ["0"])[0])
            match request.method, request.path:
                case "POST", "/_control/fault":
                    _FaultOrder.model_validate_json(request.body).give(self)
                case "POST", "/_control/limit":
                    limit = _LimitOrder.model_validate_json(request.body)
                    self.set_limit(limit.owner, limit.kind, limit.per_minute)
                case "POST", "/_control/latency":
                    slow = _LatencyOrder.model_validate_json(request.body)
                    self.set_latency(slow.key, slow.latency)
                case "GET", "/_control/ledger":
                    answer = [asdict(call) for call in self.calls(since_s)]
                case "GET", "/_control/summary":
                    answer = asdict(self.summary(since_s))
                case "GET", "/_control/state":
                    answer = self._state()
                case _:
                    return Reply(404)
        except ValueError as error:  # pydantic's is one, too
            return Reply(400, json.dumps({"error": str(error)}).encode())
        return Reply(body=json.dumps(answer).encode())

    def _state(self) -> dict[str, Any]:
        return {
            "now_s": self.now_s,
            "arrivals": self.arrivals,
            "running": self.running,
            "most_running": self.most_running,
            "moderations": self.moderations,
            "foreign_taken": {name: self.foreign_taken(name) for name in self._limits},
        }


def _strike(fault: Fault | str, billed: bool | None, retry_after_s: float) -> _Strike:  # noqa: FBT001 - a value
    fault = Fault(fault)
    if billed and (fault.is_early or fault is Fault.MODERATION_BLOCKED):
        raise ValueError(f"{fault} strikes before anything is done that could be billed")
    return _Strike(fault, fault.is_billed if billed is None else billed, retry_after_s)


def _half(size: str) -> str:
    width, _, height = size.partition("x")
    return f"{max(1, int(width) // 2)}x{max(1, int(height) // 2)}"


class _FaultOrder(BaseModel, frozen=True, extra="forbid"):
    """The body of POST /_control/fault: for the next `times` calls, or each with `probability`."""

    key: str | None
    fault: Fault
    times: int = Field(default=1, ge=0)
    probability: float | None = Field(default=None, ge=0, le=1)
    billed: bool | None = None
    retry_after_s: float = Field(default=_FAULT_RETRY_AFTER_S, ge=0)

    def give(self, provider: Provider) -> None:
        how: dict[str, Any] = {"billed": self.billed, "retry_after_s": self.retry_after_s}
        if self.probability is None:
            provider.fail_next(self.key, self.fault, self.times, **how)
        else:
            provider.set_fault_rate(self.key, self.fault, self.probability, **how)


class _LatencyOrder(BaseModel, frozen=True, extra="forbid"):
    """The body of POST /_control/latency."""

    key: str
    latency: Latency


class _LimitOrder(BaseModel, frozen=True, extra="forbid"):
    """The body of POST /_control/limit."""

    owner: str
    kind: Kind
    per_minute: float | None = Field(gt=0)


async def _serve(provider: Provider, *, until_eof: bool) -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()

    def read() -> None:
        if not os.read(_STDIN, 4_096):
            loop.remove_reader(_STDIN)
            stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    if until_eof:
        loop.add_reader(_STDIN, read)
    async with provider:
        ready = {"port": provider.port, "base_url": provider.base_url, "epoch_s": provider.epoch_s}
        print(json.dumps(ready), flush=True)
        await stopped.wait()


def main(
    *,
    config: Annotated[Path, typer.Option(help="File with the configuration, JSON.")],
    port: Annotated[int, typer.Option(help="Where to listen; 0 is any free port.")] = 0,
    ledger: Annotated[Path | None, typer.Option(help="File to which each call is appended, as a line of JSON.")] = None,
    epoch_s: Annotated[float | None, typer.Option(help="Monotonic time at which emulated time is 0.")] = None,
    until_eof: Annotated[bool, typer.Option("--until-eof", help="Stop when standard input ends, too.")] = False,
) -> None:
    """Serve until SIGTERM."""
    try:
        parsed = ProviderConfig.model_validate_json(config.read_text())
    except ValidationError as error:
        raise typer.BadParameter(str(error)) from error
    provider = Provider(parsed, port=port, ledger_file=ledger, epoch_s=epoch_s)
    try:
        asyncio.run(_serve(provider, until_eof=until_eof))
    except OSError as error:
        raise SystemExit(f"cannot listen on port {port}: {error.strerror}") from error


if __name__ == "__main__":
    typer.run(main)
