"""What a namespace lets pass: its deny-list, personal data, moderation, and how little asking again costs."""
# ruff: noqa: RUF001 - characters that look alike are the point

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from cacheserver.errors import ConfigError, PiiFoundError, PromptDeniedError, UpstreamDownError
from cacheserver.precheck import DenyList, PromptPolicy, redact
from cacheserver.precheck.deny import DenyRules

LONGEST = 32_000

Listed = Callable[..., DenyList]


@pytest.fixture
def listed(tmp_path: Path) -> Listed:
    def make(*lines: str) -> DenyList:
        path = tmp_path / "deny.txt"
        path.write_text("\n".join(lines), encoding="utf-8")
        return DenyList(path)

    return make


def change(path: Path, content: str | bytes) -> None:
    """Write the file so that it is another one, however coarse the file system's clock."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))


# ── the deny-list ───────────────────────────────────────────────────────────────────────────────────────────────

DENIED = [
    ("gun", "a GUN on a table"),
    ("gun", "gun"),
    ("Gun", "two men, one gun."),
    ("gun", "a g\u200bu\u00adn"),
    ("gun", "a g\u0336u\u0336n\u0336"),
    ("gun", "a g\u034fun"),
    ("gun", "a \x01g\x02un"),
    ("gun", "a ｇｕｎ"),
    ("gun", "a 𝐠𝐮𝐧"),
    ("gun", "my_gun_photo"),
    ("gun", "一把gun在桌上"),
    ("dead body", "a Dead \n\t body"),
    ("dead   body", "a dead\u00a0body"),
    ("café noir", "CAFE\u0301 NOIR"),
    ("straße", "EINE STRASSE"),
    ("istanbul", "İSTANBUL"),
    ("οδυσσευς", "ΟΔΥΣΣΕΥΣ"),
    ("don't", "don’t look"),
    ("c++", "learn c++ now"),
    ("#nsfw", None),  # a comment
    ("@nsfw", "tagged @nsfw"),
    ("枪", "一把手枪在桌上"),
    ("手槍", "一把手槍"),
    ("ガラス", "古いｶﾞﾗｽの瓶"),
    ("총", "총을 든 남자"),
    ("बंदूक", "एक बंदूक मेज पर"),
    ("سلاح", "رجل مع سلاح\u200f"),
    ("/g[u4]n/", "a G4N"),
    ("/kill(ing|ed)?\\b/", "KILLED by"),
    ("/große? waffe/", "Große Waffe"),
]


@pytest.mark.parametrize(("entry", "prompt"), DENIED)
def test_a_listed_entry_is_found_however_it_is_written(listed: Listed, entry: str, prompt: str | None) -> None:
    if prompt is not None:
        assert listed("another", entry, "third").rules.denies(prompt)


@pytest.mark.parametrize(
    ("entry", "prompt"),
    [
        ("gun", "a gunboat and a shogun"),
        ("gun", "gun2"),
        ("ass", "a glass, a class and an assembly"),
        ("dead body", "dead, body"),
        ("dead body", "dead bodyguard"),
        ("schön", "schon wieder"),
        ("बल", "एक बिल्ली"),
        ("ब", "एक बिल्ली"),
        ("手枪", "手，枪"),
        ("# gun", "gun"),
        ("/gun$/", "gun on a table"),
        ("/\\bgun\\b/", "gunboat"),
    ],
)
def test_what_is_not_listed_passes(listed: Listed, entry: str, prompt: str) -> None:
    assert not listed(entry).rules.denies(prompt)


def test_comments_empty_lines_and_a_byte_order_mark_list_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deny.txt"
    path.write_bytes("\ufeff# words\r\n\r\n  \r\ngun\r\n".encode())
    rules = DenyList(path).rules
    assert rules.denies("a gun")
    assert not rules.denies("# words")


def test_an_empty_list_denies_nothing(listed: Listed) -> None:
    assert not listed().rules.denies("anything")


def test_a_word_is_found_where_it_stands_alone_after_it_stood_cut(listed: Listed) -> None:
    assert listed("gun fire").rules.denies("a gun firebird, a shotgun fire, a gun fire")


@pytest.mark.parametrize("place", [0, 249, 250, 495, 499, 500, 501, 15_000, LONGEST - 20])
def test_a_pattern_is_found_wherever_in_a_long_prompt(listed: Listed, place: int) -> None:
    rules = listed("/\\bred  ?button\\b/").rules
    prompt = "x" * (place - 1) + " " * bool(place) + "red button "
    assert rules.denies(prompt + "y " * ((LONGEST - len(prompt)) // 2))


def test_a_windows_end_is_not_the_prompts_end(listed: Listed) -> None:
    rules = listed("/\\bgun\\b/", "/bad$/").rules
    assert not rules.denies("x" * 496 + " gunboat" + " y" * 500)
    assert not rules.denies("x" * 497 + "bad" + "y" * 500)


def test_a_greedy_pattern_is_found_in_a_long_prompt(listed: Listed) -> None:
    assert listed("/bad.*/").rules.denies("x" * 5_000 + "bad" + "y" * 5_000)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"fine\n/(/\n", "line 2: is no regular expression"),
        (b"fine\nfine\n/a*/\n", "line 3: the pattern matches the empty text"),
        (b"/x?/", "line 1: the pattern matches the empty text"),
        (b"/^/", "line 1: the pattern matches the empty text"),
        (b"/open", "line 1: a pattern stands between two slashes"),
        (b"//", "line 1: a pattern stands between two slashes"),
        (b"/", "line 1: a pattern stands between two slashes"),
        (b"/a{99999999999999999999}/", "line 1: is no regular expression"),
        (b"/" + b"a" * 257 + b"/", "line 1: a pattern has at most 256 characters, not 257"),
        (b"a" * 257, "line 1: a word or phrase has at most 256 characters, not 257"),
        (b"a\n\xe2\x80\x8b\n", "line 2: nothing of it can be seen"),
        (b"a\nb\n\xff\n", "line 3: is not UTF-8"),
        (b"/a/\n" * 101, "line 101: a list has at most 100 patterns"),
        (b"a\n" * (2 * 1024 * 1024 + 1), "must be at most 4,194,304 bytes"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused_by_file_and_line(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "deny.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=complaint) as caught:
        DenyList(path)
    assert str(path) in str(caught.value)


def test_a_list_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        DenyList(tmp_path / "missing.txt")
    with pytest.raises(ConfigError, match="cannot be read"):
        DenyList(tmp_path)


def test_a_changed_file_is_in_force_after_a_reload(listed: Listed, tmp_path: Path) -> None:
    deny = listed("gun")
    before = deny.rules
    assert not deny.reload()
    assert deny.rules is before
    change(tmp_path / "deny.txt", "knife")
    assert deny.reload()
    assert deny.rules.denies("a knife")
    assert not deny.rules.denies("a gun")


def test_a_file_that_takes_the_others_place_is_read(listed: Listed, tmp_path: Path) -> None:
    deny = listed("gun")
    old = (tmp_path / "deny.txt").stat()
    (tmp_path / "new.txt").write_text("axe")
    os.utime(tmp_path / "new.txt", ns=(old.st_atime_ns, old.st_mtime_ns))
    (tmp_path / "new.txt").rename(tmp_path / "deny.txt")
    assert deny.reload()
    assert deny.rules.denies("an axe")


def test_a_broken_file_leaves_the_old_list_in_force_and_warns_once(listed: Listed, tmp_path: Path) -> None:
    deny = listed("gun")
    change(tmp_path / "deny.txt", "fine\n/(secret/\n")
    with structlog.testing.capture_logs() as events:
        assert not deny.reload()
        assert not deny.reload()
    assert deny.rules.denies("a gun")
    [event] = events
    assert (event["event"], event["log_level"]) == ("deny_list_kept", "warning")
    assert "line 2" in event["error"]
    assert "secret" not in event["error"]


def test_a_file_that_is_gone_leaves_the_old_list_in_force_until_it_is_back(listed: Listed, tmp_path: Path) -> None:
    deny = listed("gun")
    (tmp_path / "deny.txt").unlink()
    with structlog.testing.capture_logs() as events:
        assert not deny.reload()
        assert not deny.reload()
    assert [event["event"] for event in events] == ["deny_list_kept"]
    assert deny.rules.denies("a gun")
    change(tmp_path / "deny.txt", "knife")
    assert deny.reload()
    assert deny.rules.denies("a knife")


LATIN = "abcdefghijklmnopqrstuvwxyz"
DISGUISES: list[Callable[[str], str]] = [
    str.upper,
    lambda letter: chr(ord(letter) + 0xFEE0),  # full width
    lambda letter: chr(0x1D41A + ord(letter) - ord("a")),  # mathematical bold
    *(lambda letter, mark=mark: letter + mark for mark in "\u200b\u2060\u00ad\ufe0f\u034f\u0336\u20e0"),
]


@given(
    word=st.text(LATIN, min_size=1, max_size=12),
    disguises=st.lists(st.sampled_from(DISGUISES), min_size=12, max_size=12),
    before=st.text(" .,!猫(", max_size=3),
    after=st.text(" .,!猫)", max_size=3),
)
def test_no_disguise_gets_a_word_past_the_list(
    word: str, disguises: list[Callable[[str], str]], before: str, after: str
) -> None:
    rules = DenyRules([word], [])
    disguised = "".join(disguise(letter) for disguise, letter in zip(disguises, word, strict=False))
    assert rules.denies(f"x {before} {disguised} {after} y")
    assert rules.denies(f"猫{disguised}猫")
    assert not rules.denies(f"a{disguised}")
    assert not rules.denies(f"{disguised}1")


@pytest.mark.no_cover
@given(prompt=st.text())
def test_any_prompt_can_be_judged(prompt: str) -> None:
    assert not DenyRules(["\U0010ffff\U0010ffff"], []).denies(prompt)


# ── personal data ───────────────────────────────────────────────────────────────────────────────────────────────

EMAILS = [
    "john.doe@example.com",
    "a@b.co",
    "first+tag@sub.example.co.uk",
    "13800138000@qq.com",
    "x@bücher.de",
    "ｆｏｏ＠ｂａｒ．ｃｏｍ",
    "o'neill_2@my-host.museum",
]
PHONES = [
    "+1 (555) 123-4567",
    "+1-555-123-4567",
    "+8613800138000",
    "+86 138 0013 8000",
    "+86 10 6234 5678",
    "+49 (0)30 123456",
    "+44 20 7946 0958",
    "+44 (0)20 7946 0958",
    "+33 6 12 34 56 78",
    "+91 98765 43210",
    "+7 495 123-45-67",
    "0049 30 123456",
    "0086 138 0013 8000",
    "13800138000",
    "138-0013-8000",
    "138 0013 8000",
    "１３８００１３８０００",
    "٠٧٧٠٠٩٠٠١٢٣",
    "010-62345678",
    "(010) 6234 5678",
    "0755-88888888",
    "400-820-8820",
    "555-123-4567",
    "(555) 123-4567",
    "555.123.4567",
    "1-800-555-1234",
    "+1\u00a0555\u2011123\u20114567",
    "020 7946 0958",
    "(0161) 496 0000",
    "07700 900123",
    "07700900123",
    "030 123456",
    "030/123456",
    "06 12 34 56 78",
    "06.12.34.56.78",
    "090-1234-5678",
    "03-1234-5678",
    "0412 345 678",
    "(11) 98765-4321",
    "8 (495) 123-45-67",
]
CARDS = [
    "4111111111111111",
    "4111 1111 1111 1111",
    "4111-1111-1111-1111",
    "4222222222222",
    "5555 5555 5555 4444",
    "2223003122003222",
    "378282246310005",
    "3782 822463 10005",
    "6011111111111117",
    "3056 930902 5904",
    "3530111333300000",
    "6200000000000005",
    "6759649826438453",
]
RESIDENT_IDS = ["11010519491231002X", "11010519491231002x", "110101199003074514", "110105 19491231 002X"]

FOUND = [
    *((text, "[email]", "e-mail address") for text in EMAILS),
    *((text, "[phone]", "phone number") for text in PHONES),
    *((text, "[card]", "payment card number") for text in CARDS),
    *((text, "[id]", "resident ID number") for text in RESIDENT_IDS),
]
AROUND = ["{}", "call {}.", "a card with {}, in red", "({})", "联系方式{}，谢谢", "{}\n\nsecond line", 'a sign "{}"']


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(("text", "marker", "kind"), FOUND, ids=[text for text, _, _ in FOUND])
def test_personal_data_is_replaced_and_nothing_else(text: str, marker: str, kind: str, around: str) -> None:
    assert redact(around.format(text)) == (around.format(marker), (kind,))


@pytest.mark.parametrize(
    "prompt",
    [
        "1024x1024",
        "1024×1536 px, 3840 x 2160",
        "1920 1080 60 fps",
        "resolution 3840 2160, 7680 4320",
        "in 1998, 2001 and 2024; 1990-2000; 2019-2020-2021",
        "12:30:45 on 2024-01-02, 01.02.2024",
        "$1,299.00 or 1.299.000,00 € or 5 000 000 people",
        "$13800138000, #13800138000, ￥13800138000",
        "RTX 4090, iPhone 15 Pro, WH-1000XM4, 747-8000, AB-13800138000, 13800138000px",
        "SKU 48213-2231, ISBN 978-3-16-148410-0, EAN 4006381333931 and 4000000000006",
        "--ar 16:9 --seed 3141592653 --s 1700000000000",
        "3.14159265358979, 0.13800138000, (cat:1.2), (dog:0.85)",
        "font specimen 0123456789, 01 02 03 04 05 06, 1 2 3 4 5 6 7 8 9 10 11 12",
        "10.0.0.1:8080, 192.168.100.200",
        "icon@2x.png, photo@3x.JPEG, @someone, a@b, user@localhost, 5 @ 3.50",
        "4111 1111 1111 1112, 2048 2048 4096 4096, 9999999999999995, 4111 1111 1111 1111x",
        "110105194912310021, 110105194913310027, 11010519490231002X, 99010519491231002X",
    ],
)
def test_numbers_and_signs_that_are_nobodys_stay(prompt: str) -> None:
    assert redact(prompt) == (prompt, ())


def test_all_kinds_are_named_in_one_order_and_neighbours_are_told_apart() -> None:
    text = "a@b.co_c@d.co, 13800138000/13900139000; 12 4111 1111 1111 1111 11010519491231002X a@b.com.13800138000"
    assert redact(text) == (
        "[email][email], [phone]/[phone]; 12 [card] [id] [email].[phone]",
        ("e-mail address", "resident ID number", "payment card number", "phone number"),
    )


def test_what_follows_a_number_of_known_length_stays() -> None:
    assert redact("+1 555 123 4567 2 cats").text == "[phone] 2 cats"
    assert redact("+86 138 0013 8000 3只猫").text == "[phone] 3只猫"


PIECES = st.lists(
    st.sampled_from([text for text, _, _ in FOUND] + ["[email]", "[phone]", "@", ".", "-", " ", "+", "(", "0", "x"])
    | st.text("0123456789+-. ()/@ax_X猫٣", max_size=12),
    max_size=8,
).map("".join)


@given(text=PIECES | st.text())
def test_redacting_twice_changes_nothing(text: str) -> None:
    once, kinds = redact(text)
    assert redact(once) == (once, ())
    assert bool(kinds) == (once != text)


@given(text=st.text().filter(lambda text: "@" not in text and "＠" not in text and not any(map(str.isdigit, text))))
def test_text_without_digits_and_at_signs_is_left_alone(text: str) -> None:
    assert redact(text) == (text, ())


def with_luhn_digit(digits: str) -> str:
    def total(number: str) -> int:
        return sum(sum(divmod(int(d) * (1 + i % 2), 10)) for i, d in enumerate(reversed(number)))

    return next(number for last in "0123456789" if total(number := digits + last) % 10 == 0)


@given(rest=st.text("0123456789", min_size=13, max_size=13), gap=st.sampled_from(["", " ", "-"]))
def test_every_visa_number_is_found_and_no_other_check_digit_is(rest: str, gap: str) -> None:
    number = with_luhn_digit(f"41{rest}")
    grouped = gap.join(number[at : at + 4] for at in range(0, 16, 4))
    assert redact(f"pay with {grouped} now").text == "pay with [card] now"
    wrong = grouped[:-1] + str((int(number[-1]) + 1) % 10)
    assert "[card]" not in redact(wrong).text


@given(
    born=st.dates(min_value=date(1900, 1, 1), max_value=date(2020, 1, 1)),
    serial=st.integers(0, 999),
)
def test_every_resident_id_is_found_and_no_other_check_digit_is(born: date, serial: int) -> None:
    digits = f"310104{born:%Y%m%d}{serial:03}"
    # The definition of ISO 7064 MOD 11-2, not the weights it comes to.
    remainder = 0
    for digit in digits:
        remainder = (remainder + int(digit)) * 2 % 11
    check = "0123456789X"[(12 - remainder) % 11]
    assert redact(f"证件{digits}{check}").text == "证件[id]"
    others = set("0123456789X") - {check}
    assert not any("[id]" in redact(digits + other).text for other in others)


def filled(unit: str) -> str:
    return (unit * LONGEST)[:LONGEST]


HARD = [
    *map(filled, ("a", "a.", "a@", "a@a.", "a.a@", "a@b.com_", "@", "a@b.co ", "a-", "_", "'")),
    *map(filled, ("1", "4", "0", "1 ", "4 ", "4444 ", "4444-", "0-", "(0", "+1 ", "+", "(", "1(", "06 12 ", "123456 ")),
    *map(filled, ("+8613800138000", "(555) 123-4567", "06 12 34 56 78 ", "a@b.com.13800138000 ", "13800138000-")),
    *map(filled, ("4111 1111 1111 1111 ", "4111 1111 1111 1112 ", "11010519491231002X ", "555 123 4567 ", "猫", "٣")),
    *map(filled, ("gun gun ", "gu", "gun fir", "枪", "手 ", "a\u0336", "\u200b", "बिल्ली", " ", "\n", "don’t ")),
    "x@" + filled("a.")[2:],
    filled(f"a@{'b' * 63}{'.c' * 9}"),
]


def ascii_of(value: str) -> str:
    return ascii(value[:24])


@pytest.mark.parametrize("prompt", HARD, ids=ascii_of)
def test_the_longest_prompt_takes_no_time_to_speak_of(listed: Listed, prompt: str) -> None:
    rules = listed("gun fire", "gun", "手枪", "枪", "/gu+n+z/", "/a.*b.*c/").rules
    begin = time.process_time()
    redact(prompt)
    rules.denies(prompt)
    assert time.process_time() - begin < 2.0  # quadratic time would be tens of seconds


# ── the policy ──────────────────────────────────────────────────────────────────────────────────────────────────

SECRET = "call 13800138000 about the zebra"


class Judge:
    """A Moderation that keeps what it was asked, and passes what it judged before."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.error: Exception | None = None

    def passed(self, prompt: str) -> bool:
        return prompt in self.asked

    async def check(self, prompt: str) -> None:
        self.asked.append(prompt)
        if self.error is not None:
            raise self.error


def test_a_policy_of_nothing_passes_prompts_as_they_are() -> None:
    policy = PromptPolicy(name="demo")
    assert policy.screened(SECRET) == SECRET
    assert policy.redacted(SECRET) == SECRET


def test_a_denied_prompt_is_refused_each_time_without_quoting_it_or_the_list(listed: Listed) -> None:
    policy = PromptPolicy(name="demo", deny=listed("zebra"))
    for _ in range(2):
        with pytest.raises(PromptDeniedError, match="deny-list of namespace demo") as caught:
            policy.screened(SECRET)
        assert "zebra" not in str(caught.value)
    assert policy.redacted(SECRET) == SECRET


def test_a_reloaded_list_forgets_what_was_judged_by_the_old_one(listed: Listed, tmp_path: Path) -> None:
    deny = listed("lion")
    policy = PromptPolicy(name="demo", deny=deny)
    assert policy.screened(SECRET) == SECRET
    with pytest.raises(PromptDeniedError):
        policy.screened("a lion")
    change(tmp_path / "deny.txt", "zebra")
    assert deny.reload()
    with pytest.raises(PromptDeniedError):
        policy.screened(SECRET)
    assert policy.screened("a lion") == "a lion"


def test_the_same_prompt_is_judged_once(listed: Listed, monkeypatch: pytest.MonkeyPatch) -> None:
    deny = listed("lion")
    judged: list[str] = []

    def denies(_: DenyRules, prompt: str) -> bool:
        judged.append(prompt)
        return False

    monkeypatch.setattr(DenyRules, "denies", denies)
    policy = PromptPolicy(name="demo", deny=deny)
    for prompt in ("a", "b", "a", "b", "a"):
        policy.screened(prompt)
    assert judged == ["a", "b"]


def test_what_is_remembered_is_bounded_in_bytes_and_number() -> None:
    policy = PromptPolicy(name="demo")
    for number in range(200):
        policy.screened(f"{number}{'猫' * (LONGEST - 10)}")
    assert policy._verdicts.currsize <= policy._verdicts.maxsize == 8 * 1024 * 1024
    for number in range(12_000):
        policy.screened(f"prompt {number}")
    assert 5_000 < len(policy._verdicts) < 11_000


def test_personal_data_is_refused_by_its_kinds_alone() -> None:
    policy = PromptPolicy(name="demo", pii="refuse")
    with pytest.raises(PiiFoundError, match="phone number") as caught:
        policy.screened(SECRET)
    assert "138" not in str(caught.value)
    assert policy.screened("a zebra, 1024x1024") == "a zebra, 1024x1024"
    assert policy.redacted(SECRET) == SECRET


def test_personal_data_is_redacted_for_makers_and_seekers_alike() -> None:
    policy = PromptPolicy(name="demo", pii="redact")
    assert policy.screened(SECRET) == policy.screened(SECRET) == "call [phone] about the zebra"
    assert policy.redacted(SECRET) == "call [phone] about the zebra"


def test_the_deny_list_sees_the_prompt_as_written(listed: Listed) -> None:
    policy = PromptPolicy(name="demo", deny=listed("13800138000"), pii="redact")
    with pytest.raises(PromptDeniedError):
        policy.screened(SECRET)


async def test_moderation_is_asked_once_of_the_redacted_prompt() -> None:
    judge = Judge()
    policy = PromptPolicy(name="demo", pii="redact", moderation=judge)
    assert policy.screened(SECRET) is None
    assert await policy.screen(SECRET) == "call [phone] about the zebra"
    assert policy.screened(SECRET) == "call [phone] about the zebra"
    assert judge.asked == ["call [phone] about the zebra"]


async def test_moderation_is_not_asked_of_what_is_refused_anyway(listed: Listed) -> None:
    judge = Judge()
    policy = PromptPolicy(name="demo", deny=listed("lion"), pii="refuse", moderation=judge)
    with pytest.raises(PromptDeniedError):
        await policy.screen("a lion")
    with pytest.raises(PiiFoundError):
        await policy.screen(SECRET)
    assert judge.asked == []


@pytest.mark.parametrize("error", [PromptDeniedError("flagged"), UpstreamDownError("down")])
async def test_what_moderation_raises_reaches_the_caller(error: Exception) -> None:
    judge = Judge()
    judge.error = error
    with pytest.raises(type(error)):
        await PromptPolicy(name="demo", moderation=judge).screen("a zebra")
