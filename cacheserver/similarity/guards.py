"""In which slots two prompts differ: numbers, colours, negations, relations, quoted text and their like.

Prompts that differ in one such word look alike to every measure of similarity and ask for two pictures. What word
lists can tell is told here, without a model, before anyone is asked whether both ask for one picture. That nothing
differs licenses nothing: nouns, materials, brands and artists have no list to be looked up in.

In doubt a guard says that prompts differ, which costs a hit at most. It knows English and Chinese. Prompts in other
languages, as far as it notices, agree only word for word. It never stems, and takes two words for one only where
nobody could draw the difference ("beside" and "next to").
"""
# ruff: noqa: RUF001 - the words and marks of other scripts are the point

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum, auto
from functools import lru_cache
from typing import NamedTuple

from cacheserver.identity.characters import fold_characters
from cacheserver.identity.verbatim import UnclearQuotesError, split

_MAX_CHARS = 2_000
"""Of a prompt that is looked into. What people type is shorter, and the worst of this length takes some 15 ms."""

_UNCLEAR = "unclear"
"""What a slot holds if nobody can tell: it agrees with nothing."""


def differences(a: str, b: str) -> tuple[str, ...]:
    """The names of the slots in which two prompts differ, sorted; empty if they agree in all. Symmetric; never raises.

    - "numbers", "codes": counts in digits and in words; article and model numbers, measures.
    - "colours", "poses": of every shade; who stands, sits, lies, runs.
    - "bound numbers", "bound colours": together with the noun they belong to, as in red car, blue truck.
    - "negations": with what is negated.
    - "relations", "bound relations": left, behind, into; in order of appearance, and with what they relate to.
    - "placements": what both prompts name, one in it and the other on it.
    - "quoted": text to be drawn, tags and web addresses, in every character.
    - "parameters", "weights", "emoji": `--ar 3:2` and all that follows; `(x:1.2)`, `[x]`, `x::2`.
    - "other languages": the words of a prompt that is neither English nor Chinese.
    - "length": a prompt of more than 2,000 characters is not looked into.
    """
    if a == b:
        return ()
    if max(len(a), len(b)) > _MAX_CHARS:
        return ("length",)
    one, other = _slots(a), _slots(b)
    differing = {slot for slot in one.said if one.said[slot] != other.said[slot] or one.said[slot] == _UNCLEAR}
    if any(one.placements[noun] != other.placements[noun] for noun in one.placements.keys() & other.placements):
        differing.add("placements")
    return tuple(sorted(differing))


class _Slots(NamedTuple):
    """A prompt as the guards see it."""

    said: Mapping[str, object]
    """By slot, in order of appearance where the order tells pictures apart."""

    placements: Mapping[str, frozenset[str]]
    """By noun, whether something is in it, on it, or both. Only nouns of both prompts compare: what is said once and
    in other words the next time is no sign of another picture, and "in" and "on" are said all the time."""


class _Kind(Enum):
    NUMBER = auto()
    CODE = auto()
    COLOUR = auto()
    SHADE = auto()  # of the colour that follows; else a word as others
    NEGATION = auto()
    RELATION = auto()
    POSE = auto()
    FUNCTION = auto()  # a word without a picture of its own
    WORD = auto()
    STOP = auto()


class _Token(NamedTuple):
    kind: _Kind
    value: str
    is_han: bool = False


_STOP = _Token(_Kind.STOP, "")


def _words(text: str) -> list[str]:
    return text.split()


# English.

_UNITS = _words("one two three four five six seven eight nine")
_TEENS = _words("ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen")
_TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 1_000, "million": 1_000_000, "billion": 1_000_000_000}
_SMALL = {word: value for value, word in enumerate([*_UNITS, *_TEENS], 1)} | {"a": 1}
_ROUND = {word: 10 * place for place, word in enumerate(_TENS, 2)}
_CARDINALS = _SMALL | _ROUND | _SCALES | {"zero": 0, "pair": 2, "couple": 2, "duo": 2, "both": 2, "trio": 3}
_ORDINALS = _words(
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth twentieth"
)
_OTHER_NUMBERS = _words(
    "once twice thrice single double triple triplet triplets quadruple quintuple twin twins half halves quarter "
    "quarters thirds twenties thirties forties fifties sixties seventies eighties nineties teens dozens hundreds "
    "thousands millions billions pairs couples trios quartet quintet sextet many "
    "several few fewer numerous multiple countless plenty lots all every each either solo lone alone another extra "
    "most more score nought nil ii iii iv vi vii viii ix xi xii xiii xiv xv xvi xvii xviii xix xx"
)
_TENS_AND_UNITS = re.compile(rf"\b({'|'.join(_TENS)})[ -]({'|'.join(_UNITS)})\b")
_SCALED = re.compile(rf"\b(\d{{1,6}}|{'|'.join(_SMALL | _ROUND)})[ -]({'|'.join(_SCALES)})\b")

_COLOURS = _words(
    "red orange yellow green blue purple violet indigo pink brown black white grey cyan magenta teal turquoise aqua "
    "aquamarine navy maroon burgundy crimson scarlet vermilion vermillion carmine ruby cherry rose fuchsia cerise "
    "salmon coral peach apricot tangerine amber ochre sienna umber rust copper bronze gold golden silver silvery "
    "platinum brass mustard lemon lime olive khaki emerald jade mint sage chartreuse azure cobalt cerulean sapphire "
    "ultramarine periwinkle lavender lilac mauve plum amethyst orchid eggplant aubergine beige tan cream ivory ecru "
    "taupe fawn tawny wheat sandy puce flaxen celadon chocolate coffee mocha caramel cinnamon chestnut mahogany "
    "auburn hazel ebony onyx charcoal slate ash "
    "pewter gunmetal pearl alabaster blonde brunette ginger redhead redheaded raven strawberry reddish orangish "
    "yellowish greenish bluish purplish pinkish brownish blackish whitish greyish rosy colorful colorless multicolor "
    "multicolored bicolor tricolor rainbow monochrome monochromatic sepia iridescent pastel neon transparent "
    "translucent colored reds greens blues whites blacks yellows browns purples pinks oranges greys golds blackened "
    "whitened wine denim metallic holographic chrome bw"
)
_SAME_COLOURS = {"gray": "grey", "grays": "greys", "grayish": "greyish", "blond": "blonde"}
_SHADES = _words(
    "dark light bright pale deep vivid hot baby sky royal pure off dusty soft electric midnight ocean sea steel blood "
    "burnt warm cool muted faded dull forest"
)

_NOT = _words(
    "not cannot isnt arent wasnt werent dont doesnt didnt cant couldnt wont wouldnt shouldnt hasnt havent hadnt aint"
)
_NEGATIONS = _words(
    "no without never nothing none nobody nowhere neither nor non absent absence missing lacking lacks lack lacked "
    "devoid empty free excluding exclude excludes excluded except minus avoid avoiding avoids remove removed removing "
    "hardly barely scarcely rarely seldom refuse refuses stop stops anti less instead rather unless omit omitted "
    "omitting fails failed sans"
)
_WITHOUT = re.compile(r"(?!bless$)[a-z]{3,}less|un(?!der|i|til|to|cle|real)[a-z]{3,}")
"""Homeless, undressed, unlit. What else it finds is seldom said in one prompt and left out of another."""

_RELATIONS = _words(
    "left right above below under over behind between among amid amongst amidst into out up down toward away from "
    "across through throughout along around round against beside near far off onto upon top bottom front back middle "
    "opposite facing past via within beyond before after ahead forward backward upward downward inward outward "
    "sideways upstairs downstairs underwater overhead indoors outdoors indoor outdoor inside outside foreground edge "
    "corner underside apart aside astride aboard ashore leftmost rightmost leftward rightward topmost lower upper "
    "inner outer rear side north south east west northern southern eastern western clockwise counterclockwise "
    "vertical horizontal vertically horizontally diagonal diagonally parallel perpendicular surrounding surrounded"
)
_SAME_RELATIONS = {
    "underneath": "under",
    "beneath": "under",
    "towards": "toward",
    "forwards": "forward",
    "backwards": "backward",
    "upwards": "upward",
    "downwards": "downward",
    "nearby": "near",
    "alongside": "beside",
    "adjacent": "beside",
    "atop": "top",
    "center": "middle",
    "centre": "middle",
    "centered": "middle",
    "centred": "middle",
}

_POSES = {
    form: forms.split()[0]
    for forms in (
        "stand stands standing stood",
        "sit sits sitting sat seated",
        "lie lies lying lay lays laying laid",
        "kneel kneels kneeling knelt",
        "crouch crouches crouching crouched",
        "squat squats squatting",
        "lean leans leaning leaned",
        "walk walks walking walked",
        "run runs running ran",
        "jump jumps jumping jumped",
        "leap leaps leaping leapt",
        "fly flies flying flew",
        "swim swims swimming swam",
        "ride rides riding rode",
        "climb climbs climbing climbed",
        "sleep sleeps sleeping slept asleep",
        "dance dances dancing danced",
        "crawl crawls crawling crawled",
        "hang hangs hanging hung",
        "float floats floating floated",
        "fall falls falling fell fallen",
        "bend bends bending bent",
        "perch perches perching perched",
        "recline reclines reclining",
        "open opens opened opening",
        "close closes closed closing shut",
        "smile smiles smiling smiled",
        "cry cries crying cried",
    )
    for form in forms.split()
}

_FUNCTION_WORDS = _words(
    "a an the and or but so yet of to at by for in on with as is are was were be been being has have had do does did "
    "it its he she they them their his her him i my me we our us you your this that these those there here which who "
    "whom whose what when where while if than then just very really quite some any other others too can could will "
    "would shall should may might must about like s"
)

_MEASURES = frozenset(
    _words(
        "k d p x mm cm m km ml cl l g kg mg gb mb tb kb hz khz mhz ghz fps mp px dpi v w kw kwh mah inch inches ft "
        "feet foot oz lb lbs percent megapixel megapixels liter litre liters litres watt watts volt volts pcs"
    )
)
_MODEL_SUFFIXES = frozenset(_words("pro max plus mini ultra lite air se xl xs fe ii iii iv gen edition"))

_PHRASES = {
    "next to": _Token(_Kind.RELATION, "beside"),
    "adjacent to": _Token(_Kind.RELATION, "beside"),
    "close to": _Token(_Kind.RELATION, "near"),
    "in front of": _Token(_Kind.RELATION, "in front of"),
    "on top of": _Token(_Kind.RELATION, "top"),
    "out of": _Token(_Kind.RELATION, "out of"),
    "in the background": _Token(_Kind.RELATION, "background"),
    "upside down": _Token(_Kind.RELATION, "upside down"),
    "high angle": _Token(_Kind.RELATION, "high angle"),
    "low angle": _Token(_Kind.RELATION, "low angle"),
    "half a dozen": _Token(_Kind.NUMBER, "6"),
    "a lot": _Token(_Kind.NUMBER, "lots"),
    "no one": _Token(_Kind.NEGATION, "nobody"),
    "w/o": _Token(_Kind.NEGATION, "without"),
}

_JOINER = "\x1f"
"""Joins the words of a phrase. No prompt holds one once its white space is folded."""

_JOINED = re.compile(r"[ /-]")
_PHRASE = re.compile(rf"\b(?:{'|'.join(phrase.replace(' ', '[ -]') for phrase in _PHRASES)})\b")

_ENGLISH: Mapping[str, _Token] = {
    **{word: _Token(_Kind.SHADE, word) for word in _SHADES},
    **{word: _Token(_Kind.POSE, value) for word, value in _POSES.items()},
    **{word: _Token(_Kind.RELATION, word) for word in _RELATIONS},
    **{word: _Token(_Kind.RELATION, value) for word, value in _SAME_RELATIONS.items()},
    **{word: _Token(_Kind.COLOUR, word) for word in _COLOURS},
    **{word: _Token(_Kind.COLOUR, value) for word, value in _SAME_COLOURS.items()},
    **{word: _Token(_Kind.NUMBER, str(value)) for word, value in _CARDINALS.items()},
    **{word: _Token(_Kind.NUMBER, f"{place}th") for place, word in enumerate(_ORDINALS, 1)},
    **{word: _Token(_Kind.NUMBER, word) for word in _OTHER_NUMBERS},
    **{word: _Token(_Kind.NEGATION, "not") for word in _NOT},
    **{word: _Token(_Kind.NEGATION, word) for word in _NEGATIONS},
    **{word: _Token(_Kind.FUNCTION, word) for word in _FUNCTION_WORDS},
    **{_JOINED.sub(_JOINER, phrase): token for phrase, token in _PHRASES.items()},
}

# Chinese.

_TO_SIMPLIFIED = str.maketrans(
    "紅黃綠藍銀無沒裏裡後邊間內側對進從圍頂遠離繞過兩萬億幾數隻個條頭張棟輛臺顆盞許雙騎飛著東倆壹貳贰參叁肆伍陸陆柒捌玖拾週與為滿們",
    "红黄绿蓝银无没里里后边间内侧对进从围顶远离绕过两万亿几数只个条头张栋辆台颗盏许双骑飞着东俩一二二三三四五六六七八九十周与为满们",
)

_HAN_DIGITS = {digit: value for value, digit in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_HAN_SCALES = {"十": 10, "百": 100, "千": 1_000}
_HAN_LOOSE = re.compile("[一二三四五六七八九]{2}|.*[百千][一二三四五六七八九]")  # 二三: two or three; 两百五: 250
_HAN_NUMBER_OR_COLOUR = re.compile(
    r"(?P<number>第?[零〇一二两三四五六七八九十百千万亿]+)"
    r"|[深浅淡亮暗鲜嫩浓纯米天草军墨湖酒玫雪乌藏宝碧桃橘]?[红橙黄绿青蓝紫黑白灰粉棕褐金银赤朱绯靛赭]+色?"
    r"|(?:彩|肤|米|杏|咖啡|卡其|驼|茶|奶油|香槟|玫瑰|巧克力|象牙|小麦|古铜|五颜六|单|双|多|无|橘|栗|酱|琥珀|翡翠|铜|豆沙|裸|奶|木)色"
)

_HAN_NUMBERS = {
    "2": "俩",
    "3": "仨",
    "许多": "许多 很多 好多 众多 大量 不少 多个 多只 多条 多名 多位 多辆 多张 多种",
    "": "几 一些 有些 双 对 群 半 数十 数百 数千 数万 无数 若干 每 全部 所有 单个 单只 独自 整 十几 几十 几百 几千",
}
_HAN_NEGATIONS = {
    "没": "没有 没",
    "无": "毫无 无",
    "": "不 非 未 勿 莫 否 别 除了 除去 除 缺少 缺乏 缺 去掉 去除 移除 删除 禁止 避免 从不 从未 拒绝 停止",
}
_HAN_RELATIONS = {
    "旁": "旁边 边上 身旁 身边 一旁 旁侧 旁",
    "里": "里面 里边 里头 里",
    "内": "内部 之内 内",
    "外": "外面 外边 之外 外",
    "上": "上面 上边 上头 之上 上",
    "下": "下面 下边 之下 下",
    "底": "底下 底部 底",
    "前": "前面 前边 之前 前",
    "后": "后面 后边 背后 之后 后",
    "左": "左边 左侧 左面 左方 左",
    "右": "右边 右侧 右面 右方 右",
    "中间": "中间 之间 中央 正中 中心",
    "周围": "周围 四周 周边",
    "": "附近 靠近 远离 对面 面对 背对 朝向 顶部 顶 侧面 侧 角落 边缘 边 中 当中 上方 下方 前方 后方 面前 身前 身后 "
    "眼前 向 朝 往 从 进 出 入 沿 穿过 越过 经过 跨过 绕 围 隔 远 近 高 低 反 倒 正面 背面 反面 仰 俯 "
    "室内 室外 户外 水下 空中 东 西 南 北",
}
_HAN_POSES = "站 坐 躺 蹲 趴 跪 跑 走 跳 飞 骑 睡 游 爬 靠 倚 卧 立 悬 挂 弯 抬 举 笑 哭 睁 闭 张开 打开 关"
_HAN_FUNCTION_WORDS = (
    "在 和 与 及 跟 或 到 把 被 给 让 用 为 是 有 也 都 就 又 还 而 且 但 以 于 并 等 这 那 其 他 她 它 我 你 们 将 由 "
    "以及 还有"
)
_HAN_PLAIN_WORDS = (
    "一起 一样 一直 一般 一定 一切 一边 一体 统一 三明治 三文鱼 万圣节 百合 百货 "
    "青年 青少年 青春 青蛙 金属 银行 面粉 明白 粉丝 "
    "非常 非洲 未来 不同 不断 不过 不锈钢 特别 别墅 分别 区别 性别 别致 别人 级别 无人机 无论 "
    "上衣 上海 上午 下午 中午 晚上 早上 马上 中国 中年 中世纪 外套 外国 向日葵 方向 进行 出租车 出租 出现 后视镜 前台 "
    "入口 出口 进口 公里 从事 高清 高质量 超高清 高级 东西 西装 西服 西瓜 南瓜 北京 对话 绝对 "
    "飞机 飞盘 飞镖 走廊 跑车 跑道 站台 车站 网站 卧室 立体 独立 游戏 旅游 游客 骑士 关于 关系"
)
"""Words that hold a sign of one of the lists and mean nothing of it."""


def _han_tokens_of(kind: _Kind, words: Mapping[str, str]) -> dict[str, _Token]:
    """By word, what it counts as; under the key "" each word counts as itself."""
    return {
        word: _Token(kind, value or word, is_han=True) for value, listed in words.items() for word in listed.split()
    }


_HAN_WORDS: Mapping[str, _Token] = {
    **_han_tokens_of(_Kind.NUMBER, _HAN_NUMBERS),
    **_han_tokens_of(_Kind.NEGATION, _HAN_NEGATIONS),
    **_han_tokens_of(_Kind.RELATION, _HAN_RELATIONS),
    **_han_tokens_of(_Kind.POSE, {"": _HAN_POSES}),
    **_han_tokens_of(_Kind.FUNCTION, {"": _HAN_FUNCTION_WORDS}),
    **_han_tokens_of(_Kind.WORD, {"": _HAN_PLAIN_WORDS}),
}
_HAN_LENGTHS: Mapping[str, Sequence[int]] = {
    first: sorted({len(word) for word in _HAN_WORDS if word[0] == first}, reverse=True)
    for first in {word[0] for word in _HAN_WORDS}
}
"""How long the words are that begin with a character, the longest first."""

_HAN_IGNORED = frozenset("的着了正")
_HAN_CLASSIFIERS = frozenset("个只条头匹位名张把座栋幢辆艘架台部件顶朵棵株根支枝颗幅间家本盏尊")
"""What counts things one by one, so that nothing of it is drawn."""

# A prompt in slots.

_PARAMETERS = re.compile(
    r"(?<!\S)(?:--+(?=[A-Za-z])|[—–](?=(?:ar|aspect|v|niji|style|stylize|s|chaos|c|no|seed|q|iw|weird|w|tile)\b))"
)
_DRAWN = re.compile(
    r"\b(?:writ(?:es|ing)|that reads?|letters?|named|nicknamed|called|signed|hashtag)\b"
    r"|印着|印有|印上|刻着|刻有|标着|标有|标注|写上|书写|上书|绣着|绣有|题字|标语|口号|名为|名叫|叫做|字母|汉字|大字|个字",
    re.IGNORECASE,
)
"""Words after which text to be drawn follows, besides those that `split` knows."""

_EMOJI = re.compile(
    "[\u00a9\u00ae\u203c\u2049\u20e3\u2122\u2139\u2190-\u21ff\u2300-\u23ff\u2460-\u27bf\u2900-\u297f\u2b00-\u2bff"
    "\u3030\u303d\u3297\u3299\ufe0f\u200d\U0001f000-\U0001faff\U000e0020-\U000e007f]+"
)
_WEIGHT_MARK = re.compile(r"([()\[\]{}]|: ?: ?-?[\d.]*)")

_HAN = "\u3005\u3007\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_IS_HAN = re.compile(f"[{_HAN}]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_PIECE = re.compile(
    rf"(?P<ratio>\d+[:/x×*]\d+(?![a-z0-9]))"
    rf"|(?P<latin>[a-z0-9{_JOINER}][a-z0-9{_JOINER}'._+-]*)"
    rf"|(?P<han>[{_HAN}]+)"
    r"|(?P<sign>[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u218b\u2460-\u24ff\u2776-\u2793\u3220-\u3289\d]+)"
    r"|(?P<stop>[^\w\s&])"
)
_PART = re.compile(rf"[a-z{_JOINER}']+|\.")
_DIGIT = re.compile(r"[0-9]")
_PLAIN_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_ORDINAL = re.compile(r"([0-9]+)(?:st|nd|rd|th)")
_HYPHEN_AT_LETTER = re.compile(r"(?<=[a-z])-|-(?=[a-z])")

_WORD = re.compile(r"[^\W\d_]+")
_ACCENTED = re.compile(rf"[^\W\d_a-z{_HAN}]")
_OTHER_SCRIPT = re.compile(rf"[^\W\d_a-z\u00aa-\u024f\u1e00-\u1eff{_HAN}]")
_OTHER_LANGUAGES = frozenset(
    _words(
        "und oder ein eine einen einem einer mit ohne nicht kein keine zwei drei vier roter rote rotes blauer blaue "
        "avec dans une pas deux trois quatre bleu bleue vert verte blanche jaune sur "
        "una sobre tres cuatro rojo roja azul verde negro negra blanco blanca amarillo "
        "uma sem dois duas vermelho preto branco amarelo senza tre quattro rosso rossa nero nera bianco bianca "
        "een zonder het twee drie rood blauw och utan"
    )
)
"""Words that prompts in some larger languages hardly do without. One of them in English costs hits, no more."""

_CONTENT = frozenset({_Kind.WORD, _Kind.SHADE, _Kind.CODE})
_ADJECTIVES = frozenset({_Kind.NUMBER, _Kind.COLOUR})
_ALL_BUT_STOPS = frozenset(_Kind) - {_Kind.STOP}
_REACH = 8
"""How many tokens away a noun is looked for: that keeps the time linear."""
_LONGEST_RUN, _LONGEST_HAN_RUN = 2, 4


@lru_cache(maxsize=64)
def _slots(prompt: str) -> _Slots:
    start = _PARAMETERS.search(prompt)
    body, parameters = (prompt[: start.start()], prompt[start.start() :]) if start else (prompt, "")
    text = " ".join(fold_characters(body).casefold().split()).replace("colour", "color").translate(_TO_SIMPLIFIED)
    tokens = _tokens(text)
    said: dict[str, object] = {
        "bound colours": _bound(tokens, _Kind.COLOUR),
        "bound numbers": _bound(tokens, _Kind.NUMBER),
        "bound relations": [_related(tokens, at) for at in _places(tokens, _Kind.RELATION)],
        "codes": Counter(_values(tokens, _Kind.CODE)),
        "colours": Counter(_values(tokens, _Kind.COLOUR)),
        "emoji": _EMOJI.findall(body),
        "negations": Counter(_negated(tokens, at) for at in _places(tokens, _Kind.NEGATION)),
        "numbers": Counter(_values(tokens, _Kind.NUMBER)),
        "other languages": _other_languages(text),
        "parameters": parameters.split(),
        "poses": Counter(_values(tokens, _Kind.POSE)),
        "quoted": _quoted(body),
        "relations": _values(tokens, _Kind.RELATION),
        "weights": _weights(text),
    }
    return _Slots(said, _placements(tokens))


def _values(tokens: Sequence[_Token], kind: _Kind) -> list[str]:
    return [token.value for token in tokens if token.kind is kind]


def _places(tokens: Sequence[_Token], kind: _Kind) -> list[int]:
    return [at for at, token in enumerate(tokens) if token.kind is kind]


def _bound(tokens: Sequence[_Token], kind: _Kind) -> object:
    """By noun, the numbers or colours that belong to it, in order: he in a red shirt and she in a blue one."""
    bound: dict[object, list[str]] = {}
    for at in _places(tokens, kind):
        bound.setdefault(_noun(tokens, at), []).append(tokens[at].value)
    return bound


def _noun(tokens: Sequence[_Token], at: int) -> object:
    """What a number or colour belongs to.

    Mostly that follows at once: two red cars. Where it does not ("the car is red", "a man in blue", "red and blue
    flags") nobody parses the sentence, and what stands on either side is taken.
    """
    if noun := _following(tokens, at, over=_ADJECTIVES):
        return noun
    sides = _preceding(tokens, at), _following(tokens, at, over=_ALL_BUT_STOPS)
    return sides if any(sides) else _following(tokens, at, over=frozenset(_Kind))


def _related(tokens: Sequence[_Token], at: int) -> object:
    """A relation with what it relates to, which Chinese says before it."""
    token = tokens[at]
    return token.value, _preceding(tokens, at) if token.is_han else _following(tokens, at, over=_ALL_BUT_STOPS)


def _negated(tokens: Sequence[_Token], at: int) -> object:
    return tokens[at].value, _following(tokens, at, over=_ADJECTIVES | {_Kind.FUNCTION})


def _placements(tokens: Sequence[_Token]) -> Mapping[str, frozenset[str]]:
    placements: dict[str, frozenset[str]] = {}
    for at in _places(tokens, _Kind.FUNCTION):
        if tokens[at].value in {"in", "on"} and (place := _following(tokens, at, over=_ALL_BUT_STOPS)):
            noun = place.split()[-1]
            placements[noun] = placements.get(noun, frozenset()) | {tokens[at].value}
    return placements


def _following(tokens: Sequence[_Token], at: int, *, over: frozenset[_Kind] = frozenset()) -> str:
    """The words right after a place, once what is `over` is passed; of Chinese the characters."""
    run: list[str] = []
    for token in tokens[at + 1 : at + 1 + _REACH]:
        if token.kind in _CONTENT:
            run.append(token.value)
            if len(run) >= (_LONGEST_HAN_RUN if token.is_han else _LONGEST_RUN):
                break
        elif run or token.kind not in over:
            break
    return " ".join(run)


def _preceding(tokens: Sequence[_Token], at: int) -> str:
    """The last words before a place in the same part of the sentence."""
    run: list[str] = []
    for token in reversed(tokens[max(at - _REACH, 0) : at]):
        if token.kind in _CONTENT:
            run.append(token.value)
            if len(run) >= (2 if token.is_han else 1):
                break
        elif run or token.kind is _Kind.STOP:
            break
    return " ".join(run)


def _quoted(body: str) -> object:
    try:
        quoted = [part.text.strip() for part in split(body) if part.verbatim]
    except UnclearQuotesError:
        return _UNCLEAR
    announced = _DRAWN.search(body)
    return [*quoted, body[announced.end() :].strip()] if announced else quoted


def _weights(text: str) -> object:
    """The marks, and what stands inside brackets or before a `::`."""
    weights, depth = [], 0
    pieces = _WEIGHT_MARK.split(text)
    for piece, mark in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
        if depth or mark.startswith(":"):
            weights.append(piece.strip(" ,"))
        weights.append(mark.replace(" ", ""))
        depth = max(depth + (mark in {"(", "[", "{"}) - (mark in {")", "]", "}"}), 0)
    return [weight for weight in weights if weight]


def _other_languages(text: str) -> object:
    words = _WORD.findall(text)
    if _OTHER_SCRIPT.search(text) or not _OTHER_LANGUAGES.isdisjoint(words):
        return words
    return Counter(word for word in words if _ACCENTED.search(word))


def _tokens(text: str) -> Sequence[_Token]:
    text = _PHRASE.sub(lambda phrase: _JOINED.sub(_JOINER, phrase[0]), _THOUSANDS.sub("", text))
    text = _TENS_AND_UNITS.sub(lambda words: str(_ROUND[words[1]] + _SMALL[words[2]]), text)
    text = _SCALED.sub(lambda words: str(_small(words[1]) * _SCALES[words[2]]), text)
    tokens = [_STOP]
    for token in _single_tokens(text):
        joined = _joined(tokens[-1], token)
        if joined is None:
            tokens.append(token)
        else:
            tokens[-1] = joined
    return tokens


def _small(number: str) -> int:
    return int(number) if number.isdigit() else (_SMALL | _ROUND)[number]


def _joined(last: _Token, token: _Token) -> _Token | None:
    """Both as one, if they are: dark blue, 8 k, 60 pro, 两只."""
    if token.kind is _Kind.COLOUR and last.kind is _Kind.SHADE:
        return token._replace(value=f"{last.value} {token.value}")
    if last.kind not in {_Kind.NUMBER, _Kind.CODE}:
        return None
    if token.is_han:
        return last if last.kind is _Kind.NUMBER and token.value in _HAN_CLASSIFIERS else None
    if last.value.isdigit() and token.value in _MEASURES:
        return _Token(_Kind.CODE, last.value + token.value)
    return _Token(_Kind.CODE, f"{last.value} {token.value}") if token.value in _MODEL_SUFFIXES else None


def _single_tokens(text: str) -> Iterator[_Token]:
    for piece in _PIECE.finditer(text):
        if piece.lastgroup == "latin":
            yield from _latin_tokens(piece[0])
        elif piece.lastgroup == "han":
            yield from _han_tokens(piece[0])
        else:
            yield _STOP if piece.lastgroup == "stop" else _Token(_Kind.NUMBER, piece[0])


def _latin_tokens(piece: str) -> Iterator[_Token]:
    """The words of a piece without digits; else one number or code."""
    if not _DIGIT.search(piece):
        for part in _PART.findall(piece):
            yield _STOP if part == "." else _english(part)
        return
    code = piece.rstrip("'._+-")
    if _PLAIN_NUMBER.fullmatch(code):
        yield _Token(_Kind.NUMBER, code)
    elif ordinal := _ORDINAL.fullmatch(code):
        yield _Token(_Kind.NUMBER, f"{ordinal[1]}th")
    else:
        yield _Token(_Kind.CODE, _HYPHEN_AT_LETTER.sub("", code))
    if piece.endswith("."):
        yield _STOP


def _english(word: str) -> _Token:
    if word.endswith("n't"):
        return _Token(_Kind.NEGATION, "not")
    word = word.partition("'")[0] or word
    if (known := _ENGLISH.get(word)) is not None:
        return known
    return _Token(_Kind.NEGATION if _WITHOUT.fullmatch(word) else _Kind.WORD, word)


def _han_tokens(piece: str) -> Iterator[_Token]:
    at = 0
    while at < len(piece):
        word, token = _han_word(piece, at)
        at += len(word)
        if word not in _HAN_IGNORED:
            yield token


def _han_word(piece: str, at: int) -> tuple[str, _Token]:
    """What begins here: the longest word of the lists, a number, a colour, or a character as others."""
    for length in _HAN_LENGTHS.get(piece[at], ()):
        word = piece[at : at + length]
        if (token := _HAN_WORDS.get(word)) is not None:
            return word, token
    if found := _HAN_NUMBER_OR_COLOUR.match(piece, at):
        word = found[0]
        if found["number"]:
            return word, _Token(_Kind.NUMBER, _han_number(word), is_han=True)
        return word, _Token(_Kind.COLOUR, word.removesuffix("色"), is_han=True)
    return piece[at], _Token(_Kind.WORD, piece[at], is_han=True)


def _han_number(word: str) -> str:
    """In digits where it is below 10,000 and written out, or given digit by digit; else as it is."""
    if _HAN_LOOSE.fullmatch(word):
        return word
    if all(sign in _HAN_DIGITS for sign in word):
        return "".join(str(_HAN_DIGITS[sign]) for sign in word)
    total, digit = 0, None
    for sign in word:
        if sign in _HAN_DIGITS and not digit:
            digit = _HAN_DIGITS[sign]
        elif sign in _HAN_SCALES:
            total += (1 if digit is None else digit) * _HAN_SCALES[sign]
            digit = None
        else:
            return word
    return str(total + (digit or 0))
