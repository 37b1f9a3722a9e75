"""What a call costs, from the provider's token counts or from a dated table. Money is integer micro-dollars."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Decimal
from importlib import resources
from pathlib import Path
from typing import Any

from cacheserver.errors import ConfigError
from cacheserver.model import ImageRequest, JsonValue

_MICRO = Decimal(1_000_000)
_AUTO = "auto"
_REFERENCE_PIXELS = 1024 * 1024
_MAX_TOKENS = 1_000_000_000
_TOKENS_AROUND_A_PROMPT = 32
_BYTES_PER_TOKEN = 4
_TOKENS_OF_A_PARTIAL = 100
"""Output tokens of a partial picture, by OpenAI's guide to image generation."""

_TEXT_TOKENS_OF_AN_INPUT = 64
"""Text tokens that the provider counts for an input image besides its image tokens: 16 to 45 were measured."""

_MOST_INPUT_IMAGE_TOKENS = 8_273
"""Of an input image of a model of which nobody knows it: as many as any listed one counts."""

_SNAPSHOT_DATE = re.compile(r"-\d{4}-\d{2}-\d{2}$")
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


@dataclass(frozen=True, slots=True)
class ModelPrice:
    """What one model charges, in USD: per million tokens by kind, and per image by quality, then size.

    `most_usd_per_image` is the dearer of an image's price, which is a rounded one, and of its output tokens.
    `most_input_image_tokens` is what an input image of an edit has at most.
    """

    usd_per_million_tokens: Mapping[str, Decimal]
    usd_per_image: Mapping[str, Mapping[str, Decimal]]
    most_usd_per_image: Mapping[str, Mapping[str, Decimal]]
    most_input_image_tokens: int = 0

    def most_microusd_beside(self, n: int, *, inputs: int = 0, partial_images: int = 0) -> Decimal:
        """The most that input images and partial pictures add to the price of a call for `n` pictures."""
        tokens = {
            "text_input": inputs * _TEXT_TOKENS_OF_AN_INPUT,
            # The provider takes a call for several pictures as so many calls.
            "image_input": inputs * self.most_input_image_tokens * n,
            "image_output": partial_images * _TOKENS_OF_A_PARTIAL,
        }
        return sum((self.usd_per_million_tokens.get(kind, Decimal(0)) * tokens[kind] for kind in tokens), Decimal(0))


@dataclass(frozen=True, slots=True)
class PriceTable:
    """The prices of all models we know, as of a day (ISO 8601). Of a model it does not list nobody knows the price."""

    as_of: str
    models: Mapping[str, ModelPrice]

    @staticmethod
    def load(path: Path | None = None) -> PriceTable:
        """The table in the TOML file at `path`; None is the one that comes with the service.

        Raises:
            ConfigError: the file cannot be read or is not a price table.
        """
        try:
            text = (path or resources.files(__package__) / "prices.toml").read_text(encoding="utf-8")
            document = tomllib.loads(text, parse_float=Decimal)
            models = {name: _model_price(table) for name, table in document["models"].items()}
            return PriceTable(str(document["as_of"]), models)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as exc:
            raise ConfigError(f"price table {path}: {exc!r}. Compare it with the one that comes with us.") from exc

    def naming(self, models: Mapping[str, str]) -> PriceTable:
        """This table with our own names of models in it, each at the price of what the provider calls it.

        Where the provider's side has no price, as Azure's deployments, our name keeps its own.
        """
        ours = {name: self._price(theirs) or self._price(name) for name, theirs in models.items()}
        return replace(self, models={**self.models, **{name: price for name, price in ours.items() if price}})

    def cost_microusd(  # noqa: PLR0913, PLR0917 - what a bill depends on
        self,
        model: str,
        size: str,
        quality: str,
        usage: Mapping[str, JsonValue] | None,
        n: int,
        factor: Decimal = Decimal(1),
        *,
        inputs: int = 0,
        partial_images: int = 0,
    ) -> int | None:
        """What a call that made `n` pictures cost; `usage` is the provider's own count, as its answer has it.

        Token counts win over the table. What they do not tell of so many `inputs`, which are input images, and
        `partial_images` counts as much as it may have cost. `factor` is what the list price is multiplied by. Exact
        until it is rounded half-even, once for the call. None where neither usage nor table tells.
        """
        price = self._price(model)
        if price is None:
            return None
        if usage is not None and price.usd_per_million_tokens and token_count(usage, "output_tokens"):
            untold = 0 if token_count(usage, "input_tokens") else inputs
            microusd = _token_cost(price.usd_per_million_tokens, usage, is_edit=inputs > 0)
            return _round((microusd + price.most_microusd_beside(n, inputs=untold)) * factor)
        usd = price.usd_per_image.get(quality, {}).get(size)
        if usd is None:
            return None
        beside = price.most_microusd_beside(n, inputs=inputs, partial_images=partial_images)
        return _round((usd * _MICRO * n + beside) * factor)

    def estimate_microusd(
        self, request: ImageRequest, n: int, factor: Decimal = Decimal(1), *, partial_images: int = 0
    ) -> int:
        """The most that a call for `n` pictures of `request` can cost; 0 where no price is known.

        The dearest price where quality or size is left to the provider or not listed, more for a larger
        picture; a prompt has at most as many tokens as bytes, and an input image as many as the model counts for any.
        `factor` is what the list price is multiplied by; `partial_images` come before a single picture.
        """
        price = self._price(request.model)
        if price is None:
            return 0
        text_tokens = len(request.prompt.encode()) + _TOKENS_AROUND_A_PROMPT
        microusd = self._dearest_usd(price, request) * n * _MICRO
        microusd += price.usd_per_million_tokens.get("text_input", Decimal(0)) * text_tokens
        microusd += price.most_microusd_beside(n, inputs=len(request.inputs), partial_images=partial_images)
        return int((microusd * factor).to_integral_value(ROUND_CEILING))

    def has_images_of(self, model: str) -> bool:
        """Whether the table says what a picture of `model` costs, so that an estimate is an upper bound."""
        price = self._price(model)
        return price is not None and bool(price.most_usd_per_image)

    def tokens(self, request: ImageRequest, n: int, *, partial_images: int = 0) -> int:
        """About how many tokens a provider counts for `n` pictures of `request`; 0 where no price is known."""
        price = self._price(request.model)
        if price is None or not (per_token := price.usd_per_million_tokens.get("image_output", Decimal(0))):
            return 0
        text_tokens = len(request.prompt.encode()) // _BYTES_PER_TOKEN + 1
        image_tokens = len(request.inputs) * price.most_input_image_tokens * n + partial_images * _TOKENS_OF_A_PARTIAL
        return text_tokens + image_tokens + int(self._dearest_usd(price, request) * n * _MICRO / per_token)

    def _price(self, model: str) -> ModelPrice | None:
        return self.models.get(model) or self.models.get(_SNAPSHOT_DATE.sub("", model))

    def _dearest_usd(self, price: ModelPrice, request: ImageRequest) -> Decimal:
        by_quality = price.most_usd_per_image
        by_size = [by_quality[request.quality]] if request.quality in by_quality else list(by_quality.values())
        by_size = by_size or self._all_by_size()
        if all(request.size in sizes for sizes in by_size):
            return max((sizes[request.size] for sizes in by_size), default=Decimal(0))
        dearest = max((usd for sizes in by_size for usd in sizes.values()), default=Decimal(0))
        return dearest * max(Decimal(1), _pixels(request.size) / _REFERENCE_PIXELS)

    def _all_by_size(self) -> list[Mapping[str, Decimal]]:
        return [sizes for price in self.models.values() for sizes in price.most_usd_per_image.values()]


def split(total: int, n: int) -> list[int]:
    """`total` in `n` whole shares that differ by at most one and add up to it exactly."""
    share, rest = divmod(total, n)
    return [share + 1] * rest + [share] * (n - rest)


def token_count(usage: Mapping[str, JsonValue], *path: str) -> int:
    """The count at `path` in a provider's usage object; 0 where there is none that can be believed."""
    value: JsonValue | Mapping[str, JsonValue] = usage
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int):
        return 0
    return value if 0 <= value <= _MAX_TOKENS else 0


def _token_cost(usd: Mapping[str, Decimal], usage: Mapping[str, JsonValue], *, is_edit: bool) -> Decimal:
    """Micro-dollars: USD per million tokens is micro-dollars per token.

    An edit's input tokens that nobody says the kinds of count as the dearer kind.
    """
    image_in = token_count(usage, "input_tokens_details", "image_tokens")
    text_in = max(token_count(usage, "input_tokens") - image_in, 0)
    text_out = token_count(usage, "output_tokens_details", "text_tokens")
    image_out = max(token_count(usage, "output_tokens") - text_out, 0)
    image_usd = usd.get("image_output", Decimal(0))
    text_in_usd, image_in_usd = usd.get("text_input", Decimal(0)), usd.get("image_input", Decimal(0))
    if is_edit and not image_in:
        text_in_usd = max(text_in_usd, image_in_usd)
    return (
        text_in * text_in_usd
        + image_in * image_in_usd
        + image_out * image_usd
        + text_out * usd.get("text_output", image_usd)
    )


def _model_price(table: Mapping[str, Any]) -> ModelPrice:
    per_million = {kind: _amount(usd) for kind, usd in table.get("usd_per_million_tokens", {}).items()}
    per_image = _by_quality(table, "usd_per_image")
    most = {quality: dict(sizes) for quality, sizes in per_image.items()}
    for quality, counts in _by_quality(table, "output_tokens_per_image").items():
        sizes = most.setdefault(quality, {})
        for size, count in counts.items():
            sizes[size] = max(sizes.get(size, Decimal(0)), count * per_million["image_output"] / _MICRO)
    most_input_tokens = table.get("most_input_image_tokens", _MOST_INPUT_IMAGE_TOKENS)
    return ModelPrice(per_million, per_image, most, int(_amount(most_input_tokens)))


def _by_quality(table: Mapping[str, Any], name: str) -> dict[str, dict[str, Decimal]]:
    return {
        quality: {size: _amount(value) for size, value in sizes.items()}
        for quality, sizes in table.get(name, {}).items()
    }


def _amount(value: object) -> Decimal:
    amount = Decimal(str(value))
    if not (amount.is_finite() and amount >= 0):
        raise ValueError(f"{value} is neither a price nor a count")
    return amount


def _pixels(size: str) -> Decimal:
    match = _SIZE.fullmatch(size)
    return Decimal(int(match[1]) * int(match[2])) if match else Decimal(0)


def _round(microusd: Decimal) -> int:
    return int(microusd.to_integral_value(ROUND_HALF_EVEN))
