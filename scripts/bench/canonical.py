"""What the canonical form of a prompt costs: CPU microseconds of one thread, a prompt.

Prompts are made here, the same ones every time: captions with style and quality words, product prompts and requests of
up to 400 characters, English and Chinese; some of 2,000 bytes, the longest that are rewritten; some of 32,000
characters, the longest that callers may send; and 10,000 that are meant to be slow: long runs of whatever a pattern of the profile
looks for, and mixtures of them. Of these the slowest counts, by the least of three readings.

Against: up to 400 characters 200 us at the median; of longer ones 2 ms at the 95th percentile; 20 ms for the slowest.
"""

# ruff: noqa: E501, RUF001, SIM905 - runs as a table would fill two pages; full-width signs are what is measured

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Annotated

import typer

from cacheserver.identity import canonical_lists
from cacheserver.identity.canonical import CANONICAL_VERSION, canonical
from scripts.bench.figures import percentile, print_table, print_verdict, write_json

SHORT, LONGEST = 400, 32_000
"""Characters: of most prompts, of the longest that may be sent."""

_MOST_BYTES = 2_000
"""Of a prompt that is rewritten; only those in ASCII have as many characters."""

REWRITTEN = {"English": 2_000, "Chinese": 666}
"""Characters of the longest prompts that are rewritten: those of Chinese take three bytes each."""

MOST_MEDIAN_US = 200.0
MOST_P95_US = 2_000.0
MOST_US = 20_000.0
_READINGS = 3
_SHOWN = 60
_CANDIDATES = 50
"""Slowest prompts of one reading of which more readings are taken: one reading may be somebody else's work."""

Clock = Callable[[], int]

# ── prompts that people write ───────────────────────────────────────────────────────────────────────────────────────

_ENGLISH = {
    "ask": ("", "", "", "please draw ", "can you generate an image of ", "A picture of ", "I want you to create "),
    "count": ("a", "the", "two", "three", "twenty-one", "5", "lots of"),
    "look": ("red", "grey", "little", "black-haired", "old", "golden", "wooden", "good-looking", "striped"),
    "thing": ("fox", "kid", "motorbike", "lighthouse", "knight in armour", "lady", "robot", "bowl of fruit", "sofa"),
    "link": ("next to", "behind", "on top of", "that is looking at", "in", "riding", "with", "and", "without"),
    "style": (
        *("oil painting", "digital art", "cinematic lighting", "octane render", "soft shadows", "35 mm lens", "bokeh"),
        *("trending on artstation", "in the style of studio ghibli", "by greg rutkowski", "white background", "8 k"),
        *("highly detailed", "best quality", "masterpiece", "product photo", "on a white background", "f/1.8"),
    ),
    "tail": ("", "", "", "", ".", " --ar 16:9", ' with the words "Open Late"', " 🦊", " (fur:1.2)", ", thanks"),
}
_CHINESE = {
    "ask": ("", "", "", "请画", "帮我生成", "请绘制一张", "图片：", "能不能画"),
    "count": ("一只", "两个", "十二只", "3辆", "一群", "二十一个", "第一位"),
    "look": ("红色的", "穿着雨衣的", "小", "古老的", "金色", "木制的", "正在奔跑的", "漂亮的"),
    "thing": ("狐狸", "孩子", "摩托车", "灯塔", "武士", "女士", "机器人", "水果", "狗狗", "電視機"),
    "link": ("在桌子上面和", "旁边有", "看着", "，", "骑着", "和", "背着", "后面是", "里面有"),
    "style": (
        *(
            "油画",
            "国画风格",
            "电影质感",
            "虚幻引擎渲染",
            "柔和光线",
            "浅景深",
            "赛博朋克风格",
            "高清",
            "8k",
            "细节丰富",
        ),
        *("宫崎骏风格作品", "白色背景", "产品照", "商品主图", "真实", "超高清"),
    ),
    "tail": ("", "", "", "", "。", "，写着“新年快乐”", " --ar 16:9", "🦊", "，谢谢"),
}
_LANGUAGES = {"English": (_ENGLISH, " ", ", ", 1.0), "Chinese": (_CHINESE, "", "，", 0.35)}
"""The words, what stands between words and between segments, and in how many characters as much is said."""


def prompts(language: str, max_chars: int, random: Random) -> Iterator[str]:
    """Prompts as people write them, without end: of any length up to `max_chars`, half of them up to a quarter of it."""
    words, space, comma, brevity = _LANGUAGES[language]
    while True:
        prompt = random.choice(words["ask"]) + _scene(words, space, random)
        aim = int(max_chars * brevity * random.random() ** 2)
        while len(prompt) < aim:
            more = _scene(words, space, random) if random.random() < 0.2 else random.choice(words["style"])  # noqa: PLR2004 - one in five
            prompt += comma + more
        prompt += random.choice(words["tail"])
        if len(prompt) <= max_chars:
            yield prompt


def filled(language: str, chars: int, random: Random) -> Iterator[str]:
    """Prompts as people write them of exactly `chars` characters, without end."""
    words, space, comma, _ = _LANGUAGES[language]
    while True:
        prompt = ""
        while len(prompt) < chars:
            prompt += _scene(words, space, random) + comma + random.choice(words["style"]) + comma
        yield prompt[:chars]


def _scene(words: dict[str, tuple[str, ...]], space: str, random: Random) -> str:
    kinds = ("count", "look", "thing", "link", "count", "thing")
    return space.join(random.choice(words[kind]) for kind in kinds)


# ── prompts that are meant to be slow ───────────────────────────────────────────────────────────────────────────────

_RUNS = (
    "a|A|aB |a |A |the |is |that |who is |there are |1|1 |1,|1.|1-|1:|1k |3 5 mm |-1 |１|one |"
    "twenty |twenty-|twenty one |-|--| --|a-|-a|a-b|-ing|a-eating |a-looking |'|a'|''|`|a:|:|::|"
    '"|"a" |“|”|“a” |„|«|‹|「|」|「a」|「「「「「「「「「」」」」」」」」」|《|【|(|)|((|[]|{|<a|<a>|https://|'
    "http://a |--ar 1 |_|a_|~|#|&|& |!|\u2026|\u2013|\n|\t| |,|, |。|、|🦊|❤️|👩\u200d|\u200d|\u0301|"
    "e\u0301|ﬁ|İ|ß|\xad|\x00|½|US |NASA |A STAR |Will |Red Bull |Polish |sign SALE |says |text |"
    "no text |写着|please |can you |draw |draw me |image of |a picture of |i want |thanks, |image, |"
    "eating a |painting a |in a |a, in b, |on a white background, |on white |background |no a, |"
    "left, |a, red light, |blue light, b, |product photo of |product photo, |photo |8k, |8k |猫|猫 |"
    "猫1|猫 1|猫 k|一|一二|十|百|千|两|一只|两三|第|一张|张|半|１只|的|着|正|正在|的士|着火|请|请画|画|画一|帮我|生成|图片|的图片|图:|一张图,|背景|"
    '油画|油画，|高清|真实|写实|产品图|8k|红色背景，|左，|謝謝|谢谢|。谢谢|发發|繁體|の|ガ|한|ｶﾞ|\u05d0|\u05d0"|ไ|\ud7b0|\U0001f1e8|'
    "\u2026|\u2011|\uff07"
).split("|")


def adversarial(random: Random) -> Iterator[str]:
    """Prompts that are meant to be slow, without end: each run once alone, then runs and list words mixed."""
    words = _list_words()
    for run in _RUNS:
        yield _cut(run * _MOST_BYTES)
        yield (run * LONGEST)[:LONGEST]
    for word in words[::4]:
        yield _cut(f"{word} " * _MOST_BYTES)
    pieces = [*_RUNS, *words]
    while True:
        some = [random.choice(pieces if random.random() < 0.5 else _RUNS) for _ in range(random.randint(2, 6))]  # noqa: PLR2004 - half of them
        mixed = _mixed(some, LONGEST, random)
        yield mixed if random.random() < 0.02 else _cut(mixed)  # noqa: PLR2004 - few


def _cut(text: str) -> str:
    """As much of it as is still rewritten."""
    return text.encode("utf-8", "surrogatepass")[:_MOST_BYTES].decode("utf-8", "ignore")


def _mixed(pieces: Sequence[str], chars: int, random: Random) -> str:
    way = random.randrange(4)
    glue = random.choice(("", " ", ", "))
    if way == 0:  # all of them over and over
        return ((glue.join(pieces) + glue) * chars)[:chars]
    if way == 1:  # a long run of each
        return "".join((piece * chars)[: chars // len(pieces)] for piece in pieces)
    if way == 2:  # noqa: PLR2004 - one, a long run, another one
        return pieces[0] + (pieces[1] * chars)[: chars - len(pieces[0]) - len(pieces[-1])] + pieces[-1]
    text = ""
    while len(text) < chars:
        text += random.choice(pieces) + glue
    return text[:chars]


def _list_words() -> list[str]:
    """What the lists have, as it is found in prompts."""
    kinds = frozenset({"head", "with", "quality", "frame"})
    written = [canonical_lists.rewritings(name) for name in ("spelling", "synonyms", "synonyms.zh", "frames")]
    single = [canonical_lists.vocabulary(name, kinds) for name in ("style", "quality", "style.zh", "names", "capitals")]
    return [way for lines in (*written, *single) for line in lines for way in line.written]


# ── measuring ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Row:
    """What prompts of one kind cost, in CPU microseconds; `slowest` begins the prompt that took longest."""

    prompts: str
    number: int
    p50_us: float
    p95_us: float
    most_us: float
    slowest: str
    is_short: bool = False
    is_long: bool = False

    def shortfalls(self) -> Iterator[str]:
        """What costs too much, one sentence each."""
        limits = [("the slowest", self.most_us, MOST_US)]
        limits += [("the median", self.p50_us, MOST_MEDIAN_US)] if self.is_short else []
        limits += [("the 95th percentile", self.p95_us, MOST_P95_US)] if self.is_long else []
        for what, found, most in limits:
            if found > most:
                yield f"{self.prompts}: {what} is {found:,.0f} us, not {most:,.0f}"


def measure(number: int, seed: int = 1) -> list[Row]:
    """The figures of `number` adversarial prompts and a fifth as many of each other kind."""
    random = Random(seed)  # noqa: S311 - the same every time
    some = max(1, number // 5)
    rows = []
    for language in _LANGUAGES:
        made = islice(prompts(language, SHORT, random), some)
        rows.append(row(f"{language}, up to {SHORT} characters", made, is_short=True))
        for chars in (REWRITTEN[language], LONGEST):
            made = islice(filled(language, chars, random), max(1, some // 10))
            rows.append(row(f"{language}, {chars:,} characters", made, is_long=True))
    rows.append(row("meant to be slow", islice(adversarial(random), number)))
    return rows


def row(
    name: str,
    made: Iterator[str],
    *,
    is_short: bool = False,
    is_long: bool = False,
    clock_ns: Clock = time.process_time_ns,
) -> Row:
    """The figures of the prompts that `made` makes."""
    texts = list(made)
    for text in texts[:_CANDIDATES]:
        canonical(text)
    taken = {number: _taken_us(text, clock_ns) for number, text in enumerate(texts)}
    for number in sorted(taken, key=taken.__getitem__)[-_CANDIDATES:]:
        again = (_taken_us(texts[number], clock_ns) for _ in range(_READINGS - 1))
        taken[number] = min(taken[number], *again)
    slowest = max(taken, key=taken.__getitem__)
    p50, p95 = (percentile(taken.values(), percent) for percent in (50, 95))
    return Row(
        name, len(texts), p50, p95, taken[slowest], ascii(texts[slowest][:_SHOWN])[1:-1][:_SHOWN], is_short, is_long
    )


def _taken_us(text: str, clock_ns: Clock) -> float:
    begin_ns = clock_ns()
    canonical(text)
    return (clock_ns() - begin_ns) / 1_000


def main(
    *,
    number: Annotated[int, typer.Option(help="Prompts that are meant to be slow.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Other prompts of the same kinds.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there, too.")] = None,
) -> None:
    """Measure what canonical forms cost; exit code 1 if a figure falls short."""
    rows = measure(number, seed)
    print_table(
        f"CPU microseconds of one canonical form, {CANONICAL_VERSION}",
        ("prompts", "number", "p50", "p95", "most", "the slowest begins"),
        [
            (
                each.prompts,
                f"{each.number:,}",
                *(f"{us:,.0f}" for us in (each.p50_us, each.p95_us, each.most_us)),
                each.slowest,
            )
            for each in rows
        ],
    )
    shortfalls = [line for each in rows for line in each.shortfalls()]
    print_verdict(shortfalls)
    write_json(json_file, "canonical", {"version": CANONICAL_VERSION, "rows": [asdict(each) for each in rows]})
    sys.exit(bool(shortfalls))


if __name__ == "__main__":
    typer.run(main)
