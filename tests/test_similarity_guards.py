"""In which slots prompts differ. Whatever these sentences change, the picture changes with it."""
# ruff: noqa: RUF001 - the words and marks of other scripts are the point

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheserver.similarity import guards
from cacheserver.similarity.guards import differences

DIFFERENT = [
    ("numbers", "three zebras by a tree", "five zebras by a tree"),
    ("numbers", "4 boats", "3 boats"),
    ("numbers", "a cat", "two cats"),
    ("numbers", "a dozen eggs", "two dozen eggs"),
    ("numbers", "twenty-five candles", "thirty-five candles"),
    ("numbers", "two hundred birds", "two thousand birds"),
    ("numbers", "a couple of men", "a trio of men"),
    ("numbers", "several dogs", "six dogs"),
    ("numbers", "he jumps once", "he jumps twice"),
    ("numbers", "the first floor", "the third floor"),
    ("numbers", "a man in his twenties", "a man in his fifties"),
    ("numbers", "a 16:9 frame", "a 4:3 frame"),
    ("numbers", "x² on a board", "x³ on a board"),
    ("numbers", "1,000 stars", "1.000 stars"),
    ("numbers", "一匹马", "四匹马"),
    ("numbers", "几个男孩", "三个男孩"),
    ("numbers", "二十三个人", "三十二个人"),
    ("numbers", "两百五十个人", "两百零五个人"),
    ("numbers", "两百五个人", "两百零五个人"),
    ("numbers", "二三个人", "二十三个人"),
    ("numbers", "第一名", "第三名"),
    ("codes", "a battery GEB111", "a battery GEB212"),
    ("codes", "a 50ml bottle", "a 30 ml bottle"),
    ("codes", "Veho VCC-005 camera", "Veho VCC-006 camera"),
    ("codes", "a 24-70mm lens", "a 16-35mm lens"),
    ("codes", "戴森V12", "戴森V15"),
    ("codes", "华为Mate 60", "华为Mate 60 Pro"),
    ("codes", "an 8 inch frame", "an 8-foot frame"),
    ("colours", "a pink truck", "a red truck"),
    ("colours", "a dark blue door", "a light blue door"),
    ("colours", "a blonde woman", "a brunette woman"),
    ("colours", "red-haired girl", "black-haired girl"),
    ("colours", "粉红色的鞋", "粉橙色的鞋"),
    ("colours", "黑色的狗", "咖啡色的狗"),
    ("colours", "浅蓝的门", "深蓝的门"),
    ("negations", "a girl with a kite", "a girl without a kite"),
    ("negations", "a smiling man", "a not smiling man"),
    ("negations", "a street", "a street, no people"),
    ("negations", "a man who doesn't smile", "a man who does smile"),
    ("negations", "a dog w/o collar", "a dog w/ collar"),
    ("negations", "a cloudless sky", "a cloudy sky"),
    ("negations", "an unlit candle", "a lit candle"),
    ("negations", "a street empty of cars", "a street of cars"),
    ("negations", "nobody in a room", "somebody in a room"),
    ("negations", "a man without a hat with a scarf", "a man with a hat without a scarf"),
    ("negations", "一只猫戴着帽子", "一只猫没戴帽子"),
    ("negations", "桌子上有苹果", "桌子上没有苹果"),
    ("negations", "一条街道", "一条街道，无人"),
    ("negations", "微笑的人", "不微笑的人"),
    ("relations", "a car left of a tree", "a car right of a tree"),
    ("relations", "a horse under a bar", "a horse over a bar"),
    ("relations", "a boat inside a pier", "a boat next to a pier"),
    ("relations", "he looks up at it", "he looks down at it"),
    ("relations", "she speaks into a phone", "she speaks out of a phone"),
    ("relations", "a cat behind a box", "a cat in front of a box"),
    ("relations", "a high angle shot", "a low angle shot"),
    ("relations", "桌子上面有猫", "桌子下面有猫"),
    ("relations", "楼的后面", "楼的前面"),
    ("relations", "左边是猫", "右边是猫"),
    ("bound relations", "a red car left of a blue truck", "a blue truck left of a red car"),
    ("bound relations", "a cat beside a dog", "a dog beside a cat"),
    ("placements", "a cat in a box", "a cat on a box"),
    ("poses", "a woman sitting at a bar", "a woman standing at a bar"),
    ("poses", "猫坐在沙发旁", "猫站在沙发旁"),
    ("bound colours", "a red car and a blue truck", "a blue car and a red truck"),
    ("bound colours", "the car is red and the truck is blue", "the car is blue and the truck is red"),
    ("bound colours", "a car in red, a truck in blue", "a car in blue, a truck in red"),
    ("bound colours", "a man in a red shirt, a woman in a blue shirt", "a man in a blue shirt, a woman in a red shirt"),
    ("bound colours", "red, white dress and blue, black hat", "blue, white dress and red, black hat"),
    ("bound colours", "a white goat and two black goats", "a black goat and two white goats"),
    ("bound colours", "白色的猫和黑色的狗", "黑色的猫和白色的狗"),
    ("bound numbers", "two men and a woman", "a man and two women"),
    ("bound numbers", "three customers and two clerks", "two customers and three clerks"),
    ("bound numbers", "two toned shoes and jeans", "shoes and two toned jeans"),
    ("bound numbers", "两只猫和三只狗", "三只猫和两只狗"),
    ("quoted", 'a sign "SALE"', 'a sign "Sale"'),
    ("quoted", 'a sign "A B"', 'a sign "A  B"'),
    ("quoted", "a sign that says Open", "a sign that says Closed"),
    ("quoted", "a wall, the letters ABC", "a wall, the letters abc"),
    ("quoted", "海报「新年」", "海报「春节」"),
    ("quoted", "牌子上刻着平安", "牌子上刻着发财"),
    ("quoted", 'a 6" pipe "', 'a 6" pipe " '),  # nobody can say what is quoted
    ("quoted", "a cat <lora:Ink:0.8>", "a cat <lora:Ink:0.9>"),
    ("parameters", "a cat --ar 3:2", "a cat --ar 2:3"),
    ("parameters", "a cat --niji 5", "a cat --v 5"),
    ("parameters", "a cat", "a cat --no text"),
    ("parameters", "a cat —ar 3:2", "a cat"),
    ("weights", "a (cat:1.2) here", "a (cat:1.3) here"),
    ("weights", "((cat)) here", "(cat) here"),
    ("weights", "[cat] here", "cat here"),
    ("weights", "cat::2 dog", "cat dog::2"),
    ("weights", "cat::2 dog::1", "cat::1 dog::2"),
    ("emoji", "a cat 🙂", "a cat 🙃"),
    ("emoji", "👋🏽 hand", "👋🏿 hand"),
    ("other languages", "ein Hund mit Hut", "ein Hund mit Schal"),
    ("other languages", "красный дом", "синий дом"),
    ("other languages", "赤い車", "赤い家"),
    ("other languages", "grüner Apfel", "süßer Apfel"),
    ("length", "a cat" + " very" * 500, "a cat" + " very" * 501),
]

AGREEING = [
    ("两只小猫", "2只小猫"),
    ("二只小猫", "两个小猫"),
    ("十二个人", "12个人"),
    ("二〇二四年", "2024年"),
    ("兩隻紅色的貓", "两只红色的貓"),
    ("黑色的熊", "黑色熊"),
    ("男孩正在打球", "男孩在打球"),
    ("桌子旁边", "桌子边上"),
    ("屋子里面", "屋子裏"),
    ("two dogs", "2 dogs"),
    ("a pair of dogs", "a couple of dogs"),
    ("half a dozen eggs", "six eggs"),
    ("twenty five eggs", "25 eggs"),
    ("three hundred eggs", "300 eggs"),
    ("1,000 eggs", "1000 eggs"),
    ("an 8k photo", "an 8 K photo"),
    ("an 8-inch frame", "an 8 inch frame"),
    ("a 50 ml bottle", "a 50ml bottle"),
    ("a grey cat", "a gray cat"),
    ("vivid colours", "vivid colors"),
    ("a man who isn't here", "a man who is not here"),
    ("a lamp beside a bed", "a lamp next to a bed"),
    ("a cat near a tree", "a cat close to a tree"),
    ("a man seated on a bench", "a man sits on a bench"),
    ("a house, sharp focus, 8k", "a house, 8k, sharp focus"),
    ("a sign “SALE”", 'a sign "SALE"'),
    ("A Cat, On A Sofa.", "a cat on a sofa"),
    ("a cat in a hat", "a cat in a cap"),  # nouns are not the guards' business
]


@pytest.mark.parametrize(("slot", "one", "other"), DIFFERENT)
def test_the_slot_in_which_prompts_differ_is_named(slot: str, one: str, other: str) -> None:
    assert slot in differences(one, other)


@pytest.mark.parametrize(("one", "other"), AGREEING)
def test_a_way_of_writing_is_no_difference(one: str, other: str) -> None:
    assert differences(one, other) == ()


def test_the_names_are_sorted() -> None:
    assert differences("two red cats", "three blue cats --v 5") == (
        "bound colours",
        "bound numbers",
        "colours",
        "numbers",
        "parameters",
    )


COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gold", "beige"]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "ten", "twelve", "20", "100"]
HAN_COLOURS = "红橙黄绿蓝紫黑白灰粉棕金银"
HAN_NUMBERS = "一两三四五六七八九十"
NOUNS = ["car", "old truck", "paper umbrella", "cat", "wooden fishing boat"]
HAN_NOUNS = ["汽车", "卡车", "雨伞", "小猫", "摩托车"]
PLACES = ["on a hill", "by the sea", "at night, sharp focus, 8k"]


@given(
    values=st.one_of(
        *(st.lists(st.sampled_from(each), min_size=2, max_size=2, unique=True) for each in (COLOURS, NUMBERS))
    ),
    nouns=st.lists(st.sampled_from(NOUNS), min_size=2, max_size=2, unique=True),
    place=st.sampled_from(PLACES),
    frame=st.sampled_from(
        [
            "{0} {2} and {1} {3} {4}",
            "{2} in {0}, {3} in {1}, {4}",
            "the {2} is {0} while the {3} is {1} {4}",
            "{4}: {0} {2}, {1} {3}",
            "the {0} one is a {2} and the {1} one a {3} {4}",
        ]
    ),
)
def test_values_that_are_swapped_between_nouns_differ(
    values: list[str], nouns: list[str], place: str, frame: str
) -> None:
    assert differences(frame.format(*values, *nouns, place), frame.format(*reversed(values), *nouns, place))


@given(
    values=st.one_of(
        st.lists(st.sampled_from([f"{colour}色的" for colour in HAN_COLOURS]), min_size=2, max_size=2, unique=True),
        st.lists(st.sampled_from([f"{number}个" for number in HAN_NUMBERS]), min_size=2, max_size=2, unique=True),
    ),
    nouns=st.lists(st.sampled_from(HAN_NOUNS), min_size=2, max_size=2, unique=True),
    frame=st.sampled_from(["{0}{2}和{1}{3}", "{0}{2}在{1}{3}旁边", "路边有{0}{2}，{1}{3}停在树下"]),
)
def test_values_that_are_swapped_between_chinese_nouns_differ(values: list[str], nouns: list[str], frame: str) -> None:
    assert differences(frame.format(*values, *nouns), frame.format(*reversed(values), *nouns))


PIECES = [
    *(text for each in DIFFERENT for text in each[1:] if len(text) < 60),
    *" ,.:;()[]{}'\"“”「」-–—_/&#%\n\t\x1f\u200d\u0301１²½①Ⅷİßﷺ\ud800",
    *(
        "--ar ",
        "::",
        "n't",
        "two ",
        "red ",
        "dark ",
        "红",
        "一",
        "第",
        "百",
        "没",
        "的",
        "个",
        "left of ",
        "in ",
        "says ",
    ),
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text(max_size=60)


@given(one=TEXTS, other=TEXTS)
def test_differences_are_symmetric_and_never_raise(one: str, other: str) -> None:
    assert differences(one, other) == differences(other, one)


@given(text=TEXTS)
def test_equal_prompts_never_differ(text: str) -> None:
    assert differences(text, str(text)) == ()


@given(text=TEXTS)
def test_case_and_outer_space_change_only_what_is_drawn_as_written(text: str) -> None:
    assert set(differences(text, f"  {text} ")) <= {"quoted", "parameters", "emoji"}


REPEATED = (
    *("a", "A ", "red ", "red, ", "dark ", "two ", "twenty ", "5 ", "5 k ", "1,000,", "1:", "1x", "a-", "a'", "n't "),
    *(
        "no one ",
        "next to ",
        "in ",
        "on a ",
        "left ",
        "红",
        "红色",
        "深",
        "一",
        "第一",
        "一只",
        "没有",
        "上面",
        "的",
        "猫",
    ),
    *("(", "((", "[x](", "x::", ": ", "--", "--a ", "— ", "🙂", "“", "'", '"', "「", "「」", "<a", "https://", "says "),
    *("字母", "é ", "ж", "\u0301", "\u200d", "²", "½ ", "①", "ﷺ", "_", "a_b", "a+b", "10 hundred ", "百一", "五颜六"),
    *("un", "homeless ", "in red ", "red and ", "a red car and ", "half a dozen ", "5 pro ", "\n", "\x1f"),
)


def operations(prompt: str) -> int:
    """How many lines of the guards are passed for a prompt."""
    count = 0

    def tracer(frame: FrameType, event: str, argument: Any) -> Any:  # noqa: ARG001 - as sys.settrace calls it
        nonlocal count
        if frame.f_globals.get("__name__") != guards.__name__:
            return None
        count += event == "line"
        return tracer

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        guards._slots.__wrapped__(prompt)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.no_cover
@pytest.mark.parametrize("repeated", REPEATED, ids=ascii)
def test_twice_the_prompt_takes_twice_the_work(repeated: str) -> None:
    once = repeated * (500 // len(repeated))
    assert operations(once * 2) <= 2.2 * operations(once) + 100


@pytest.mark.parametrize("repeated", REPEATED, ids=ascii)
def test_the_longest_prompts_are_compared(repeated: str) -> None:
    prompt = (repeated * 32_000)[:32_000]
    assert differences(prompt, prompt[:-1]) == ("length",)
    differences(prompt[: guards._MAX_CHARS], prompt[: guards._MAX_CHARS - 1] + "z")
