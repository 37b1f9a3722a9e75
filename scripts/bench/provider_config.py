"""What the provider emulator is told: its keys, limits, prices, latencies and faults."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import ROUND_HALF_EVEN, Decimal
from enum import StrEnum
from random import Random
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator

Kind = Literal["requests", "tokens", "images"]
"""What a limit counts."""

KINDS: tuple[Kind, ...] = ("requests", "tokens", "images")

_TOKEN_FACTOR = {"low": 16, "medium": 48, "high": 96}
_SIZE = re.compile(r"[1-9]\d{0,3}x[1-9]\d{0,3}")


class Fault(StrEnum):
    """What goes wrong with a call. The comment says when, and whether the call is billed unless told otherwise."""

    RATE_LIMITED = "rate_limited"  # at once: 429, though there is room
    SLOW_DOWN = "slow_down"  # at once: 429, traffic grew too fast
    INSUFFICIENT_QUOTA = "insufficient_quota"  # at once: 429, no money; the older code
    CREDIT_BALANCE_EXHAUSTED = "credit_balance_exhausted"  # at once: 429, no money; the newer code
    NOT_ENTITLED = "not_entitled"  # at once: 403, the organisation is not verified
    OVERLOADED = "503"  # at once
    RESET_BEFORE = "reset_before"  # at once: the connection is reset
    MODERATION_BLOCKED = "moderation_blocked"  # once admitted: 400, stage input; not billed
    SERVER_ERROR = "500"  # in place of the pictures; not billed
    HTML_ERROR = "html_error"  # in place of the pictures: 502 and a page from a front; not billed
    MODERATION_BLOCKED_OUTPUT = "moderation_blocked_output"  # in place of the pictures: 400, stage output; not billed
    HANG = "hang"  # in place of the pictures: silence until the caller hangs up; not billed
    RESET_MID_BODY = "reset_mid_body"  # the connection is reset in the middle of the answer; billed, as all below
    TRUNCATED_BASE64 = "truncated_base64"
    TRUNCATED_IMAGE = "truncated_image"
    WRONG_TYPE = "wrong_type"  # a GIF, whatever was asked
    WRONG_SIZE = "wrong_size"  # half of each side
    BLANK = "blank"  # one colour
    URL_RESULTS = "url_results"  # a URL on this server in place of each picture

    @property
    def is_early(self) -> bool:
        """Whether it strikes before the call has taken anything of a limit; such a call is never billed."""
        return self in _EARLY

    @property
    def is_billed(self) -> bool:
        """Whether the call is billed if nothing else is said."""
        return self in _BILLED


_EARLY = frozenset(
    {Fault.RATE_LIMITED, Fault.SLOW_DOWN, Fault.INSUFFICIENT_QUOTA, Fault.CREDIT_BALANCE_EXHAUSTED}
    | {Fault.NOT_ENTITLED, Fault.OVERLOADED, Fault.RESET_BEFORE}
)
_BILLED = frozenset(
    {Fault.RESET_MID_BODY, Fault.TRUNCATED_BASE64, Fault.TRUNCATED_IMAGE, Fault.WRONG_TYPE, Fault.WRONG_SIZE}
    | {Fault.BLANK, Fault.URL_RESULTS}
)


INPUT_IMAGE_TOKENS = 1_024
"""What an input image counts here, for each picture made of it: as one of 1024x1024 does."""

PARTIAL_TOKENS = 100


class _Values(BaseModel, frozen=True, extra="forbid"):
    pass


class Price(_Values):
    """What one model charges, in USD.

    With prices per image these are billed, answers carry no usage, and what has no price is not made.

    The defaults are the token prices of gpt-image-2.
    """

    text_input_usd_per_million_tokens: Decimal = Decimal(5)
    image_input_usd_per_million_tokens: Decimal = Decimal(8)
    image_output_usd_per_million_tokens: Decimal = Decimal(30)
    usd_per_image: Mapping[str, Mapping[str, Decimal]] = Field(default_factory=dict)
    """By quality, then size."""

    def bill_microusd(  # noqa: PLR0913 - what a bill depends on
        self, *, prompt: str, size: str, quality: str, n: int, inputs: int = 0, partials: int = 0
    ) -> int:
        """What one call for `n` pictures costs, rounded half-even once; with its input images and partial pictures.

        Raises:
            KeyError: priced per image, and not this quality and size.
        """
        if self.usd_per_image:
            microusd = self.usd_per_image[quality][size] * 1_000_000 * n
        else:
            # USD per million tokens is micro-dollars per token.
            text_microusd = self.text_input_usd_per_million_tokens * input_tokens(prompt)
            image_microusd = self.image_input_usd_per_million_tokens * INPUT_IMAGE_TOKENS * inputs * n
            tokens_out = output_tokens(size, quality) * n + PARTIAL_TOKENS * partials
            microusd = text_microusd + image_microusd + self.image_output_usd_per_million_tokens * tokens_out
        return int(microusd.to_integral_value(ROUND_HALF_EVEN))


def input_tokens(prompt: str) -> int:
    """How many tokens a prompt counts here."""
    return len(prompt) // 4 + 1


def output_tokens(size: str, quality: str) -> int:
    """What gpt-image-2 counts for one picture, by the formula of the provider's own price calculator."""
    width, height = sides(size)
    factor = _TOKEN_FACTOR[quality]
    long, short = max(width, height), min(width, height)
    rows = (2 * factor * short + long) // (2 * long)  # factor * short / long, rounded half up
    return -(-factor * rows * (2_000_000 + width * height) // 4_000_000)


def sides(size: str) -> tuple[int, int]:
    """Width and height of "WxH", in pixels."""
    width, _, height = size.partition("x")
    return int(width), int(height)


class Latency(_Values):
    """How long a generation takes, in seconds; `mean_s` is multiplied by the quality's factor.

    `uniform` is the mean ±50 %; `lognormal` has this mean, and `sigma` is that of the logarithm.
    """

    spread: Literal["fixed", "uniform", "lognormal"] = "fixed"
    mean_s: float = Field(default=0.0, ge=0)
    sigma: float = Field(default=0.5, ge=0)
    by_quality: Mapping[str, float] = Field(default_factory=lambda: {"low": 0.35, "medium": 1.0, "high": 2.5})

    def draw_s(self, quality: str, random: Random) -> float:
        """How long one generation of this quality takes."""
        mean_s = self.mean_s * self.by_quality.get(quality, 1.0)
        if mean_s == 0 or self.spread == "fixed":
            return mean_s
        if self.spread == "uniform":
            return random.uniform(0.5 * mean_s, 1.5 * mean_s)
        return random.lognormvariate(math.log(mean_s) - self.sigma**2 / 2, self.sigma)


class LimitsConfig(_Values):
    """Limits of a key, or of a group of keys: what is None is not limited.

    `bucket` holds a whole minute's allowance and refills continuously. `quantised` enforces the minute second by
    second: it refills at whole seconds only and holds max(2, ceil(limit / 60)). `foreign_share` is the share of each
    limit that somebody else asks for, at random moments. `concurrent` caps the generations running at a time.
    """

    requests_per_minute: float | None = Field(default=None, gt=0)
    tokens_per_minute: float | None = Field(default=None, gt=0)
    images_per_minute: float | None = Field(default=None, gt=0)
    enforced: Literal["bucket", "quantised"] = "bucket"
    foreign_share: float = Field(default=0.0, ge=0)
    concurrent: int | None = Field(default=None, gt=0)

    def per_minute(self, kind: Kind) -> float | None:
        """The limit of this kind."""
        return {
            "requests": self.requests_per_minute,
            "tokens": self.tokens_per_minute,
            "images": self.images_per_minute,
        }[kind]


class KeyConfig(_Values):
    """One API key. `group` is what the provider calls its organisation; `models` None is all of them.

    `latency` None is the provider's. `fault_rates` are probabilities, by fault.
    """

    key: str
    group: str
    limits: LimitsConfig = LimitsConfig()
    models: tuple[str, ...] | None = None
    latency: Latency | None = None
    fault_rates: Mapping[Fault, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)


def _is_size(size: str) -> str:
    if not _SIZE.fullmatch(size):
        raise ValueError("must be WxH, each at most 9999")
    return size


class ProviderConfig(_Values):
    """The whole emulator. A group without an entry in `groups` has no limits.

    `compression` is how many emulated seconds pass in a real one; all times and rates here are emulated.
    `told_in` is whose seconds and minutes the answers speak in: a caller on a real clock wants `real` (Retry-After
    and resets divided, limits multiplied by the compression), one whose clock runs as ours `emulated`.

    `auto_size` is the size of pictures of size `auto`; they are billed as 1024x1024. Pictures have at least
    `min_picture_bytes`. The moderation endpoint flags what contains `moderation_marker`; a generation is refused
    for a prompt that contains `refusal_marker`. None: nothing.
    """

    keys: tuple[KeyConfig, ...]
    groups: Mapping[str, LimitsConfig] = Field(default_factory=dict)
    models: Mapping[str, Price] = Field(
        default_factory=lambda: {"gpt-image-2": Price(), "gpt-image-2-2026-04-21": Price()}
    )
    latency: Latency = Latency()
    compression: float = Field(default=1.0, gt=0)
    told_in: Literal["real", "emulated"] = "real"
    rate_limit_headers: bool = True
    auto_size: Annotated[str, AfterValidator(_is_size)] = "64x64"
    min_picture_bytes: int = Field(default=0, ge=0)
    moderation_marker: str | None = None
    refusal_marker: str | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        keys = {each.key for each in self.keys}
        if len(keys) < len(self.keys):
            raise ValueError("two keys are the same")
        if keys & self.group_names:
            raise ValueError("a key and a group have the same name")
        return self

    @property
    def group_names(self) -> set[str]:
        """All groups, with limits or without."""
        return {*self.groups, *(each.group for each in self.keys)}
