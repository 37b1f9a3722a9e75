"""Which prompts are one picture and which are not. The second list is the one that matters."""
# ruff: noqa: RUF001 - characters that look alike are the point

import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheserver.identity import PROFILES, compile_catalog_patterns, normalize, normalize_prompt, verbatim
from cacheserver.identity.characters import fold_characters, is_plain
from cacheserver.identity.homographs import HOMOGRAPHS
from cacheserver.identity.verbatim import STRAIGHT_QUOTES, UnclearQuotesError, split

SAME = [
    ("A cat.", "a cat"),
    ("A Cat On A Sofa", "a Cat on A sofa"),
    ("  a  cat\n\ton a sofa ", "a cat on a sofa"),
    ("a cat!", "a cat"),
    ("a cat...", "a cat…"),
    ("a cat . ", "a cat"),
    ("Two dogs. A cat.", "two dogs. a cat"),
    ("A 3D render, 8K", "a 3d render, 8k"),
    ("ｃａｔ　ｏｎ　ｓｏｆａ", "cat on sofa"),
    ("ﬁeld of ﬂowers", "field of flowers"),
    ("cafe\u0301 terrace", "caf\u00e9 terrace"),
    ("a\u00a0cat", "a cat"),
    ("a c\u200bat\ufeff", "a cat"),
    ("soft\u00adware", "software"),
    ("\u200fقطة\u200f", "قطة"),
    ("a\u200dcat", "acat"),
    ("don’t move", "don't move"),
    ("the dogs’ bowl", "the dogs' bowl"),
    ("a T‑shirt", "a T-shirt"),
    ("a sign “Hello”", 'a sign "Hello"'),
    ("a sign ‘Hello’", "a sign 'Hello'"),
    ("Schild „Hallo“", 'schild "Hallo"'),
    ('A sign "Hello" In The rain', 'a sign "Hello" in the rain'),
    ('a 5" Pipe', 'a 5" pipe'),
    ("一只猫，在窗台上。", "一只猫,在窗台上"),
    ("一只猫！", "一只猫"),
    ("高清　山水", "高清 山水"),
    ("一台 Macbook", "一台 macbook"),
    ("海报“新年”。", '海报"新年"'),
    ("８Ｋ 山水", "8k 山水"),
    ("ｶﾞﾗｽ", "ガラス"),
    ("Ein Roter Apfel", "ein roter apfel"),
    ("Красная Площадь", "красная площадь"),
    ("एक बिल्ली।", "एक बिल्ली"),
    ("10 µm", "10 μm"),
    ("(Red Hair:1.2)", "(red hair:1.2)"),
    ("A red car --ar 16:9", "a Red car --ar 16:9"),
    ("a misty Forest, no text.", "a misty forest, no text"),
    ('a sign that says "Hi" in Red.', 'a sign that says "Hi" in red'),
    ("two crossed Swords.", "two crossed swords"),
]

DIFFERENT = [
    # Text to be drawn: its case, its spaces, its punctuation.
    ("a window with SALE", "a window with sale"),
    ('a sign "Hello"', 'a sign "hello"'),
    ('a sign "Hello."', 'a sign "Hello"'),
    ('a sign "HELLO  WORLD"', 'a sign "HELLO WORLD"'),
    ('a sign "½"', 'a sign "1/2"'),
    ('a sign "ＡＢＣ"', 'a sign "ABC"'),
    ("a sign 'Hello'", "a sign 'hello'"),
    ("a sign “Hello”", "a sign “hello”"),
    ("Schild „Hallo“", "Schild „hallo“"),
    ("Schild ‚Hallo‘", "Schild ‚hallo‘"),
    ("affiche « Bonjour »", "affiche « bonjour »"),
    ("Schild »Hallo«", "Schild »hallo«"),
    ("skylt »Hej»", "skylt »hej»"),
    ("affiche ‹Bonjour›", "affiche ‹bonjour›"),
    ("skylt ”Hej”", "skylt ”hej”"),
    ("海报「Sale」", "海报「sale」"),
    ("海报『Sale』", "海报『sale』"),
    ("电影《Up》", "电影《up》"),
    ("海报【Sale】", "海报【sale】"),
    ("看板〝Sale〟", "看板〝sale〟"),
    ("海报＂Sale＂", "海报＂sale＂"),
    ('写着"Sale"的海报', '写着"sale"的海报'),
    ("a screen with `Hello`", "a screen with `hello`"),
    ('a 5" pipe labelled "Hot"', 'a 5" pipe labelled "hot"'),
    ("the dogs' bowl with 'Rex' on it", "the dogs' bowl with 'rex' on it"),
    ("a mug 'World's Best Dad'", "a mug 'world's best dad'"),
    ("a mug 'The Dogs' Big Day'", "a mug 'The Dogs' big day'"),
    ('a board "Size 5" Big 7" Day"', 'a board "Size 5" big 7" Day"'),
    ('a sign "Open All Night', 'a sign "open all night'),
    ('Open All Night" on a sign', 'open all night" on a sign'),
    ("sign ``Hello''", "sign ``hello''"),
    ('sign """Hello"""', 'sign """hello"""'),
    ("'Hello There' and the dogs' Bed'", "'Hello There' and the dogs' bed'"),
    ("a sign that says Welcome", "a sign that says welcome"),
    ("a sign reading Welcome!", "a sign reading Welcome"),
    ("T恤上写着Hello", "T恤上写着hello"),
    ("a sign that says Welcome --ar 16:9", "a sign that says welcome --ar 16:9"),
    ("a sign that says Welcome Home <lora:Ink:1> Here", "a sign that says Welcome Home <lora:Ink:1> here"),
    ('"Hi" on a mug, text: Best Dad', '"Hi" on a mug, text: best dad'),
    ("a poster, BANG!", "a poster, BANG"),
    # Names.
    ("Polish pottery", "polish pottery"),
    ("a man in Turkey", "a man in turkey"),
    ("an Apple on a desk", "an apple on a desk"),
    ("China on a shelf", "china on a shelf"),
    ("a March parade", "a march parade"),
    ("Mercury in a glass", "mercury in a glass"),
    ("a Jaguar in the jungle", "a jaguar in the jungle"),
    ("Apple's logo", "apple's logo"),
    # Signs.
    ("x² on a board", "x2 on a board"),
    ("H₂O", "H2O"),
    ("½ moon", "1/2 moon"),
    ("① first", "1 first"),
    ("brand™", "brandtm"),
    ("25 ℃", "25 °c"),
    ("𝓗ello", "hello"),
    ("Ⅷ", "viii"),
    ("Maße", "Masse"),
    ("ﷺ", "صلى الله عليه وسلم"),
    # Case that is not spelling.
    ("the letter A", "the letter a"),
    ("A on a blackboard", "a on a blackboard"),
    ("vitamin C", "vitamin c"),
    ("an A4 sheet", "an a4 sheet"),
    ("50MB", "50mb"),
    ("A STAR", "a STAR"),
    ("brick_Wall_01", "brick_wall_01"),
    ("<lora:Ink:0.8> cat", "<lora:ink:0.8> cat"),
    ("https://a.b/Cat.png", "https://a.b/cat.png"),
    ("a cat --p AbC", "a cat --p abc"),
    # Numbers, order, signs of meaning.
    ("3 cats", "5 cats"),
    ("画2只猫", "画3只猫"),
    ("5!", "5"),
    ("a cat?", "a cat"),
    ("(cat:1.2)", "(cat:1.3)"),
    ("a cat --ar 16:9", "a cat --ar 9:16"),
    ("-5 degrees", "5 degrees"),
    ("1,000 stars", "1.000 stars"),
    ("foggy, sunny", "sunny, foggy"),
    ("a red car left of a blue truck", "a blue truck left of a red car"),
    ("a cat without a hat", "a cat with a hat"),
    ("!!!", "..."),
    # Emoji and joiners.
    ("👨‍👩‍👧", "👨👩👧"),
    ("👋🏽", "👋🏿"),
    ("❤️", "❤"),
    ("🇨🇳", "🇵🇱"),
    ("🏴󠁧󠁢󠁥󠁮󠁧󠁿", "🏴󠁧󠁢󠁳󠁣󠁴󠁿"),
    ("می‌خواهم", "میخواهم"),
    ("क्‍ष", "क्ष"),
    ("\u202eabc", "abc"),
    ("ㅏ", "ᅡ"),
    ("繁體", "繁体"),
]

CHARACTERS = (
    "aAbBIcC1 29.!?,\"'“”‘’„«»-_<>:/`´′″《》「」【】\u200b\u200d\u0301\u0308İßΣςσ猫ｶﾞＡ！。…②½™\u00ad\n\t\x01K3DצﬁÉĳ"
)
PHRASES = ["--a", "http://", "says", "text ", "no text ", "A a", "SALE ", "Polish ", "<lora:Ab>", "AB-123 "]
AWKWARD = st.lists(st.sampled_from([*CHARACTERS, *PHRASES]), max_size=40).map("".join)


CATALOG = (r"[a-z]{2,4}-\d{3,6}(-[a-z]+)?", r"(?:sku|item|货号) ?\d+", r"\d+")

DROPPED = [
    ("Studio photo of AB-1234 on white", "studio photo of CD-99999 on white"),
    ("studio photo of ab-1234-red on white", "Studio photo of on white"),
    ("white shoe, sku 48213, marble", "white shoe, SKU 7, marble"),
    ("sku48213 white shoe", "white shoe"),
    ("货号12345红色运动鞋", "货号 999红色运动鞋"),
    ("white shoe, 48213, studio light", "white shoe, 48214, studio light"),
    ("白色的鞋，48213", "白色的鞋，1"),
    ("48213. White shoe", "48214. white shoe"),
]

NOT_DROPPED = [
    ("3 cats", "4 cats"),
    ("cats, 3 of them", "cats, 4 of them"),
    ("a 50ml bottle", "a 60ml bottle"),
    ("a 50 ml bottle", "a 60 ml bottle"),
    ("画2只猫", "画3只猫"),
    ("an iphone 15", "an iphone 16"),
    ("(3) cats", "(4) cats"),
    ("50 % off", "60 % off"),
    ("a shirt, $50, red", "a shirt, $60, red"),
    ("a 16:9 frame", "a 16:10 frame"),
    ("v1.5, in red", "v2.5, in red"),
    ("a cat (fur:1.2)", "a cat (fur:1.3)"),
    ("a cat --seed 5", "a cat --seed 6"),
    ('a mug "AB-1234"', 'a mug "AB-1235"'),
    ('a mug, 3 "Hello"', 'a mug, 4 "Hello"'),
    ("1️⃣ place", "2️⃣ place"),
    ("AB-1234", "AB-1235"),
    ("48213", "48214"),
    ("XAB-1234X shoe", "XAB-1235X shoe"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_these_are_one_picture(one: str, other: str) -> None:
    assert normalize_prompt(one, "standard") == normalize_prompt(other, "standard")


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
@pytest.mark.parametrize("profile", ["standard", "catalog"])
def test_these_are_two_pictures(one: str, other: str, profile: str) -> None:
    assert normalize_prompt(one, profile, CATALOG[:2]) != normalize_prompt(other, profile, CATALOG[:2])


@pytest.mark.parametrize(("one", "other"), DROPPED)
def test_a_catalog_makes_one_picture_of_many_article_numbers(one: str, other: str) -> None:
    assert normalize_prompt(one, "catalog", CATALOG) == normalize_prompt(other, "catalog", CATALOG)
    assert normalize_prompt(one, "standard") != normalize_prompt(other, "standard")


@pytest.mark.parametrize(("one", "other"), NOT_DROPPED)
@pytest.mark.parametrize("patterns", [CATALOG, (r"\d+",), (r"\w*\d\w*",), (r"[\d.]+",), (r"\d",)], ids=str)
def test_a_catalog_never_drops_a_count_a_measure_or_a_quotation(one: str, other: str, patterns: tuple[str]) -> None:
    assert normalize_prompt(one, "catalog", patterns) != normalize_prompt(other, "catalog", patterns)


def test_a_catalog_without_patterns_drops_nothing() -> None:
    prompt = "Studio photo of AB-1234, 48213, on white."
    assert normalize_prompt(prompt, "catalog") == normalize_prompt(prompt, "standard")


def test_a_long_prompt_keeps_its_article_numbers() -> None:
    prompt = "photo of AB-1234, " + "very " * 400 + "detailed"
    assert "AB-1234" in normalize_prompt(prompt, "catalog", CATALOG)


@given(prompt=AWKWARD)
def test_nothing_is_lost_or_added_by_splitting(prompt: str) -> None:
    try:
        parts = split(prompt)
    except UnclearQuotesError:
        return
    straight = str.maketrans(STRAIGHT_QUOTES)
    assert "".join(part.text for part in parts).translate(straight) == prompt.translate(straight)


def test_a_prompt_that_does_not_settle_stays_as_written() -> None:
    prompt = "A Shoe " + "{x" * 20 + "}" * 20
    assert normalize_prompt("A Shoe {x{x}}", "catalog", (r"\{x\}",)) == "a shoe"
    assert normalize_prompt(prompt, "catalog", (r"\{x\}",)) == prompt


@pytest.mark.parametrize("pattern", ["(", "a*", r"\d*", "", "x" * 257, "(?P<a>x)(?P<a>y)"])
def test_a_pattern_that_cannot_be_used_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="catalog pattern"):
        compile_catalog_patterns((pattern,))


def test_too_many_patterns_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 32"):
        compile_catalog_patterns(("x",) * 33)


def test_exact_is_composed_and_nothing_else() -> None:
    assert normalize_prompt("  A Cafe\u0301. ", "exact") == "  A Caf\u00e9. "


def test_an_unknown_profile_is_an_error() -> None:
    with pytest.raises(KeyError):
        normalize_prompt("a cat", "loose")


@pytest.mark.parametrize("word", sorted(HOMOGRAPHS))
def test_a_homograph_keeps_its_case_anywhere(word: str) -> None:
    name = word.capitalize()
    assert normalize_prompt(f"{name} beside a {name}'s", "standard") == f"{name} beside a {name}'s"
    assert normalize_prompt(f"a {word}", "standard") == f"a {word}"


QUOTES = ["''", '""', "“”", "‘’", "„“", "„”", "‚‘", "””", "’’", "«»", "»«", "»»", "‹›", "›‹", "〝〟", "＂＂", "``"]
QUOTES += ["「」", "『』", "《》", "〈〉", "【】", "〖〗", "｢｣", "﹁﹂", "﹃﹄", "❝❞", "❛❜"]
SURROUNDINGS = [
    "a sign {} in Red",
    "{}",
    "A Cat, {}.",
    "({}) on a wall",
    "海报上{}的字",
    "it's the dogs' {}, isn't it",
    '6" {}',
]


@pytest.mark.parametrize("marks", QUOTES)
@pytest.mark.parametrize("surrounding", SURROUNDINGS)
def test_quoted_text_stays_as_written_in_all_marks(marks: str, surrounding: str) -> None:
    text = "Hello  Big World. It's ½ Off!"
    prompt = surrounding.format(marks[0] + text + marks[1])
    assert text in normalize_prompt(prompt, "standard")


@pytest.mark.parametrize(
    "prompt",
    [
        "a" * 32_000,
        "A" * 32_000,
        "aB " * 10_000,
        '"a" ' * 8_000,
        "'" * 32_000,
        "“" * 32_000,
        "「" * 32_000,
        "<a" * 16_000,
        " " * 31_999 + "a",
        "a" + "!" * 31_999,
        "\u200d" * 31_999 + "a",
        "１２" * 16_000,
        "«»" * 16_000,
        "--" * 16_000,
        "https://" * 4_000,
        "no text " * 4_000,
        "a_" * 16_000,
        "e\u0301" * 16_000,
        ". A " * 8_000,
        "\u0301" * 32_000,
        "1.2," * 8_000,
    ],
    ids=lambda prompt: ascii(prompt[:12]),
)
def test_the_longest_prompt_takes_no_time_to_speak_of(prompt: str) -> None:
    begin = time.process_time()
    normalize_prompt(prompt, "catalog", (r"[a-z]+-\d+", r"\d+x"))
    assert time.process_time() - begin < 5.0  # quadratic time would be tens of seconds


@pytest.mark.no_cover
@given(prompt=AWKWARD | st.text(), profile=st.sampled_from(sorted(PROFILES)))
def test_normalizing_twice_changes_nothing(prompt: str, profile: str) -> None:
    once = normalize_prompt(prompt, profile, CATALOG)
    assert normalize_prompt(once, profile, CATALOG) == once


@given(prompt=AWKWARD | st.text(), profile=st.sampled_from(sorted(PROFILES)))
def test_normalized_prompts_are_composed_and_never_empty(prompt: str, profile: str) -> None:
    normalized = normalize_prompt(prompt, profile, CATALOG)
    assert unicodedata.is_normalized("NFC", normalized)
    assert bool(normalized) == bool(prompt)


@given(prompt=AWKWARD | st.text())
def test_canonically_equivalent_prompts_are_one_under_every_profile(prompt: str) -> None:
    decomposed = unicodedata.normalize("NFD", prompt)
    for profile in PROFILES:
        assert normalize_prompt(prompt, profile, CATALOG) == normalize_prompt(decomposed, profile, CATALOG)


@given(words=st.lists(st.sampled_from(["cat", "dog", "red", "3", "blue", "猫", "a"]), min_size=2, max_size=8))
def test_words_keep_their_number_and_order(words: list[str]) -> None:
    assert normalize_prompt(" ".join(words), "standard").split() == words


ANNOUNCING = (
    *("says", "saying", "spells", "spelled", "spelling", "spelt", "slogan", "reads", "sign reading", "card reading"),
    *("shirt reading", "board reading", "label reading", "banner reading", "poster reading", "screen reading"),
    *("written", "word", "words", "text", "titled", "caption", "captions", "captioned", "lettering", "labeled"),
    *("labelled", "inscribed", "inscription", "headline", "engraved"),
)


@pytest.mark.parametrize("announcing", ANNOUNCING)
def test_what_announces_text_is_found_in_whatever_case(announcing: str) -> None:
    for written in (announcing, announcing.upper(), announcing.title()):
        assert split(f"the cat {written} Meow Meow")[-1] == (" Meow Meow", True)


PIECES = st.sampled_from(
    [*"aAbB19 \t\x1c.,!_-<>\"'`:/", "A cat", ". A ", "  ", "<b>", "http://", "HTTPS://x", " --ar", *ANNOUNCING]
)
"""Of ASCII, what any of the searches could find."""


@given(st.lists(PIECES, max_size=12).map("".join))
def test_what_plain_text_is_not_searched_for_is_not_in_it(text: str) -> None:
    assert normalize._plain_pass(text) == normalize._one_pass(text, ()) or not is_plain(text)
    if verbatim._NOTABLE.search(text):
        assert any(part in text for part in verbatim._ASCII_NOTABLE)
    if verbatim._DRAWN.search(text):
        assert any(part in text.lower() for part in verbatim._ASCII_DRAWN)
    spaced = normalize._SPACES.sub(" ", fold_characters(text))
    cased = normalize._WORD.sub(lambda word: normalize._fold_case(word[0]), spaced)
    assert normalize._fold(text) == normalize._ARTICLE.sub("a ", cased)
