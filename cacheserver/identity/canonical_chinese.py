"""What the canonical profile drops and rewrites in Chinese, character by character.

Nothing here segments words: what is dropped or rewritten is found as it is written, unless it is part of a longer word
that is on a list of those to leave alone.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from functools import lru_cache

from opencc import OpenCC

from cacheserver.identity.canonical_lists import rewritings, vocabulary

CJK = "\u3400-\u9fff\uf900-\ufaff"
"""Han characters, as the inside of a [] pattern."""

_HAS_CJK = re.compile(f"[{CJK}]")
_KANA_OR_HANGUL = re.compile("[\u3040-\u30ff\uac00-\ud7af]")
# Here and below a pattern begins with the character it is found by, and looks back from there: what begins none is then
# passed over fast.
_SPACE_BETWEEN = re.compile(rf"\s(?<=[{CJK}]\s)(?<![薪资粉]\s)\s*(?=[{CJK}]|\d+(?:[{CJK}]|k\b))")

_ONE_SPACE_BETWEEN = re.compile(rf" (?<=[{CJK}] )(?=[{CJK}])")

_to_simplified = OpenCC("t2s").convert
_PARTICLE = re.compile("著(?<![显卓原名专巨论土编遗译]著)(?![名作称者述录])")
"""著 that OpenCC leaves though it is 着: 穿著 is also a noun."""

_MAY_BE_DRAWN = re.compile(
    "寫(?![實真生作信意])|書[寫法著有道體名]|草書|楷書|隸書|行書|篆書|字(?<!書字)(?![典母])|題|印|刻|繡|標[題語誌籤]|商標"
    "|聯(?![合盟絡])|匾|招牌|看板|橫幅|布條|路牌|門牌|木牌|揮春|刺青|紋身|店名|名為|快樂|恭喜|發財|歡迎|大吉"
)
"""What tells of characters in the picture, in traditional ones: 寫著發財 draws others than 写着发财."""

# ── what is asked for is asked politely ─────────────────────────────────────────────────────────────────────────────

_ASKING = (
    "你好[,!]?|您好[,!]?|请你|请您|请帮我|请给我|请为我|请|麻烦你|麻烦您|麻烦|帮我|帮忙|给我|替我|为我|快|你能不能|能不能|能否|想请你|想请您|"
    "可以|可否|用ai|使用ai|根据描述[,:]?|根据以下描述[,:]?|我想要|我想|我要|我需要|想要|需要"
)
_NOUNS_OF_PAINTING = "画家面框廊室布像笔龙眉展册板舫作卷风质中上里的着皮屏院纸架具师符船稿轴集报"
_A_SHEET = "(?:[一1](?:[张幅](?![床弓桌椅网嘴脸])|副(?![牌扑塔纸麻眼手对])))"
_OUT = "出(?![租口家水海嫁汗拳浴血土国版行游生])"
_ASKED = re.compile(
    rf"\s*+(?:"
    rf"(?:{_ASKING})++(?:画(?![{_NOUNS_OF_PAINTING}])|生成|绘制|制作|创作|创建)(?:一下|{_OUT}|个图(?=[,:]))?{_A_SHEET}?[,:]?"
    rf"|(?:{_ASKING})++(?:做|{_OUT}|来|输出|设计|看|展示|提供|弄)?{_A_SHEET}(?:(?:图片|图像|图)[,:])?"
    rf"|(?:{_ASKING})++看(?![书电手病戏报医])(?=[^,。]*的(?:图片|图像|图)(?:[,。!?;]|$))"
    rf"|画(?:{_A_SHEET}|(?=[一两二三四五六七八九十几0-9])|个图[,:]|[:,])"
    rf"|/?生成(?![的艺器式])(?:一下)?{_A_SHEET}?[,:]?"
    rf"|(?:设计|制作|来){_A_SHEET}"
    rf"|[一1](?:张|幅)(?:图片|图像|图)[,:。]"
    rf"|(?:图片|图像|图|画面)(?:内容|描述)?[:,]"
    rf"|(?:提示词|描述|内容|文生图|ai绘画)[:,]"
    rf"|(?:画面)?内容[是为]"
    rf"|/ ?imagine(?: ?prompt)?[:,]?"
    rf")\s*+"
)
_A_PICTURE_OF = re.compile(r"\s*+[一1](?:张|幅)(?=[^,。]*的(?:图片|图像|图)(?:[,。!?;]|$))")
_AS_A_PICTURE = re.compile(r"(?:的(?:图片|图像|图)|图片|图像)(?=\s*(?:[,。!?;]|$))")
_HANGS = re.compile("[挂贴拿看摆放]|屏幕|相册|相框")
"""Where pictures are that are part of the picture."""
_THANKS = re.compile(
    r"(?<![,。!\s:])[,。!\s]++(?:谢谢[你您啦了]?|多谢|(?:非常|十分)?感谢|辛苦了|拜托[了啦]?)[。!,\s]*$"
)

# ── particles, numerals, measure words ──────────────────────────────────────────────────────────────────────────────

_PARTICLES = {"的": "", "着": "", "正在": "在"}
_TELLING = re.compile(
    "(?:(?<=[猫狗熊虎狮兔鸟鱼马牛羊猪鸡鸭鹅猴鼠龙蛇狐狸狼鹿咪犬蛙豚蝶蜂龟])|(?<=[大小]象)|(?<=[兔猴豹鸽燕狮]子))的"
    "|(?<=[人侠曼兵员主丑物魔孩子妈爸爷奶师])"
    "的(?=玩[具偶]|公仔|娃娃|抱枕|枕头|蛋糕|饼干|面包|衣服|帽子|面具|气球|风筝|杯|包|车|房|屋|床|鞋)"
    "|(?<=[做织钓骑戴喝吃咬抓追牵抱喂踢剥洗叠摘搭种养买卖修缝编捏堆煮烤炒煎写唱舔啃砍切削擦推拉打杀"
    "包雕盖扎折吹挖绑贴涂染拼蒸采扛抬举扔赶驯拍弹敲划驾披捧握背提端挑挎])"
    "(?<![好难]吃)(?<![好难]喝)(?<![面书钱背]包)(?<![木浮玉石冰]雕)的"
    rf"|(?:(?<=^[{CJK}])|(?<=[^{CJK}\d][{CJK}]))的"  # 龙的眼, 高的山: of one syllable and another one word is made
    "|(?<=画)(?<![油国漫插版壁绘水墨彩动字名古年挂图书笔幅张本]画)的"
)
"""的 that tells whose something is, and who does what: 熊猫的玩具 are no 熊猫玩具, and an angler is no 老人钓的鱼."""

_JUST_NOW = re.compile(
    "(?:正在|正(?<![大中端公改校反修纠方周纯真雍金立]正)|在(?<![存现实所内正]在))"
    "(?=看(?![台守])|吃|喝|走(?![廊道])|读|骑|拿|睡(?![袋衣莲])|钓|望|盯|眺|享|弹(?![簧珠丸])|织(?!物)|唱(?!片)|画(?=画)|抱(?!枕)|用)"
    "|正(?=准备|要|从|往|被)"
)
"""What says no more than "now" before what is done: 女孩正在看书. 正 means something in all its other words."""

_LEFT_ALONE = """
印着 刻着 绣着 题着
目的 的士 的确 打的 标的 有的放矢 的黎波里 写着 着火 着装 着色 着陆 着急 着迷 着凉 衣着 沉着 执着 睡着 附着 穿着打扮
着地 点着 烧着 着魔 着力 犬夜叉 犬牙 警犬 猎犬 牧羊犬 斗牛犬 贵宾犬 柯基犬 秋田犬 柴犬 金毛犬 犬儒 热狗 蒸汽机车
内燃机车 电力机车 电气机车 柴油机车 铁路机车 火车机车 老式机车 老机车 古董机车 机车头 机车厂 火车头 列车员 单车道
单车间 孩子气 女孩子 男孩子 男子汉 男子气 女子高 女士们 美男子 奇女子 弟子 童子 女儿国 里面包 上面包 下面包 下面条
上面粉 里面粉 旁边境 上边境 上边疆 海边上 摩托艇 摩托罗拉 摩托车 计算机械 集装箱货车 百货车 载货车厢 陈列车 系列车
并列车 花朵朵 图像识别 树木头 枯树木 房屋顶 货车厢 列车厢 草坪机 照相片 电视机器人 洗手间谍 父亲节 母亲节 摩托车手
飞机车 手机车 司机车 洗衣机车 简单车 铁路货车 正着放 比萨斜塔 比萨塔 祖母绿 祖父母 上海滩 天犬 裙边上 盘子边上
杯子边上 帽子边上 领口边上 碗边上 袖口边上 大的 小的 金的 银的 木的 玉的 铁的 红的 白的 黑的 黄的 热的 冷的 飞的 海的
河的 雪的 绿的 着的 飞机场景 办公车 快捷运 蓝的 紫的 短的 老的 圆的 方的 纸的 布的 皮的 石的 泥的 瓷的 铜的 竹的
奔跑着车 跑着车 飞着船 飞着碟 拖着车 吊着车 开着门 关着门 抱着枕 烤着鸭 烤着鸡 烤着肉 烤着鱼 炒着饭 炒着菜 煎着蛋
煮着蛋 折着纸 插着花 挂着画 滑着板 卷着发 高的 长的 龙的 鸡的 皇帝的 美人的
功夫熊猫 功夫大熊猫 方便面包 头的 凤梨蜜 凤梨包 妈咪包 二人转 二人台
"""
_OF_TWO_SYLLABLES = """
巨大 高大 庞大 宽大 硕大 强大 伟大 矮小 娇小 弱小 微小 细小 通红 鲜红 火红 深红 暗红 洁白 雪白 苍白 乳白 漆黑 乌黑 黝黑
金黄 橙黄 鹅黄 枯黄 炎热 火热 寒冷 冰冷 翠绿 碧绿 嫩绿 墨绿 深绿 湛蓝 蔚蓝 天蓝 深蓝 宝蓝 淡紫 深紫 古老 苍老 滚圆 浑圆
崇高 修长
"""
"""Adjectives behind which 的 says nothing, though it may behind their second syllable: 大的."""

_INDIVIDUAL = frozenset("个只位名条辆")
"""Measure words that say no more than that single ones are counted; a glass, a pair or a slice says more."""

_MEASURES = _INDIVIDUAL | frozenset(
    "张把架艘台座栋间棵株朵支枝根块片件顶双对副杯碗盘碟瓶罐箱盒袋包桶篮群堆排列行串束捧组套幅本册页封扇面道口所家头匹峰"
    "颗粒滴卷团份种款层岁年月日号人节段盏轮枚尊匙勺壶缸锅筐米秒分点度倍次元角名项套队班桌床滴门辆格"
)
_DIGITS = {"零": 0, "一": 1, "二": 2, "两": 2, "三": 3, "四": 4, "五": 5, "六": 6, "七": 7, "八": 8, "九": 9}
_UNITS = {"十": 10, "百": 100, "千": 1000}
_NUMERALS = frozenset(_DIGITS) | frozenset(_UNITS)
_VALUES = {numeral: str(value) for numeral, value in (_DIGITS | _UNITS).items()}
_INEXACT = frozenset("几数多半" + string.ascii_lowercase)
_INSIDE_NUMBERS = frozenset(".,:/-")
"""What stands before a number that is inexact or, behind a digit, part of a longer one."""

_IN_BARS = frozenset("吐土烟香蛋巧")
"""What 条 counts whole bars, loaves or cartons of: 一条香烟 is no cigarette."""

_MAX_NUMERALS = 7


def _becomes() -> dict[str, str]:
    found = dict(_PARTICLES)
    for line in rewritings("synonyms.zh"):
        found.update(zip(line.written, line.canonical, strict=True))
    found |= {word: word for word in _LEFT_ALONE.split()}
    return found | {f"{word}的": word for word in _OF_TWO_SYLLABLES.split()}


def _by_beginning(words: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The words by their first two characters, longest first."""
    found: dict[str, list[str]] = {}
    for word in sorted(words, key=len, reverse=True):
        found.setdefault(word[:2], []).append(word)
    return {beginning: tuple(those) for beginning, those in found.items()}


_BECOMES = _becomes()
_WORDS_BY_BEGINNING = _by_beginning(_BECOMES)
_COUNTING = _NUMERALS | {*string.digits}
_NOTABLE = _COUNTING | {word[0] for word in _BECOMES}
"""What begins no word and no number stays as it is."""


def _may_change() -> str:
    """What finds the words that become others, and measure words behind numbers."""
    rests: dict[str, list[str]] = {}
    for word, becomes in _BECOMES.items():
        if word != becomes:
            rests.setdefault(word[0], []).append(word[1:])
    words = [f"{first}(?:{'|'.join(those)})" for first, those in rests.items()]
    numeral = f"[{''.join(sorted(_NUMERALS))}\\d]"
    return "|".join([*words, *(f"{measure}(?<={numeral}{measure})" for measure in sorted(_MEASURES))])


_MAY_CHANGE = re.compile(_may_change())
"""Without any of these nothing changes, as in all that was rewritten before."""

_STYLE_LINES = vocabulary("style.zh", frozenset({"quality", "frame", "own"}))
_MAX_STYLE_CHARS = 16


_ANNOUNCING = re.compile(
    "(?:印[着著有]|刻[着著有]|绣[着著有]|題[着著有]|题[着著有]|名叫|取名|店名[是为為叫]?|门头[上是为為]?|門頭[上是为為]?"
    "|(?:招牌|牌匾|横幅|橫幅|标志|標誌|logo|Logo|LOGO)(?:[上是为為]|(?=[:\uff1a])))[:\uff1a]?"
)


def announced(text: str) -> int:
    """Where text to be drawn begins that nothing quotes, in a prompt as written; its end where there is none."""
    found = _ANNOUNCING.search(text)
    return len(text) if found is None else found.end()


def is_cjk(character: str) -> bool:
    """Whether it is a Han character."""
    return "\u3400" <= character <= "\u9fff" or "\uf900" <= character <= "\ufaff"


def without_spaces_between(text: str) -> str:
    """`text` without the single spaces that stand between Han characters."""
    return _ONE_SPACE_BETWEEN.sub("", text)


def is_chinese(text: str) -> bool:
    """Whether `text` has Han characters and is not Japanese or Korean, whose words these rules do not know."""
    return bool(_HAS_CJK.search(text)) and not _KANA_OR_HANGUL.search(text)


def rewritten(text: str, *, simplified: bool) -> str:
    """`text`, in lower case and NFKC, without what does not change the picture.

    `simplified`: traditional characters become simplified ones, which they may not where text is to be drawn.
    """
    if simplified and not _MAY_BE_DRAWN.search(text):
        text = _PARTICLE.sub("着", _to_simplified(text))
    return _scanned(_unwrapped(_SPACE_BETWEEN.sub(",", text)))


def _unwrapped(text: str) -> str:
    begin = 0
    while (asked := _ASKED.match(text, begin)) and asked.end() < len(text):
        begin = asked.end()
    if (asked := _A_PICTURE_OF.match(text, begin)) and asked.end() < len(text):
        begin = asked.end()
    if begin:
        text = text[begin:]
        if (named := _AS_A_PICTURE.search(text)) and not _HANGS.search(_clause_before(text, named.start())):
            text = text[: named.start()] + text[named.end() :]
        text = _THANKS.sub("", text)
    return text


def _clause_before(text: str, end: int) -> str:
    begin = max(text.rfind(mark, 0, end) for mark in ",。!?;")
    return text[begin + 1 : end]


def _scanned(text: str) -> str:
    text = _JUST_NOW.sub("", text)
    if not _MAY_CHANGE.search(text):
        return text
    out: list[str] = []
    position = 0
    for start, character in enumerate(text):
        if character not in _NOTABLE or start < position:
            continue
        is_word = character in _BECOMES or text[start : start + 2] in _WORDS_BY_BEGINNING
        if is_word and (word := _word(text, start)):
            told, end = _BECOMES[word], start + len(word)
            if not told and _TELLING.match(text, start):
                told = word
        elif character in _COUNTING:
            told, end = _number(text, start)
        else:
            continue
        out += (text[position:start], told)
        position = end
    out.append(text[position:])
    return "".join(out)


def _word(text: str, start: int) -> str:
    """The longest word that begins there and becomes another one or is left alone; "" if none."""
    for word in _WORDS_BY_BEGINNING.get(text[start : start + 2], ()):
        if text.startswith(word, start):
            return word
    return text[start] if text[start] in _BECOMES else ""


def _is_numeral(character: str) -> bool:
    return character in _NUMERALS or character.isdecimal()


def _number(text: str, start: int) -> tuple[str, int]:
    """What the number at `start` becomes with its measure word, and where the text goes on."""
    end = start + 1
    is_digits = text[start].isdecimal()
    while end < len(text) and (text[end].isdecimal() if is_digits else text[end] in _NUMERALS):
        end += 1
    written = text[start:end]
    after = text[end : end + 1]
    before = text[start - 1] if start else ""
    if after not in _MEASURES or before in _INEXACT:
        return written, end
    if before in _INSIDE_NUMBERS and start > 1 and text[start - 2].isdecimal():
        return written, end
    value = written if is_digits else _value(written)
    if value is None:
        return written, end
    is_alone = before != "第" and after in _INDIVIDUAL and _is_said_alone(after, text[end + 1 : end + 2])
    return value, end + 1 if is_alone else end


def _is_said_alone(measure: str, following: str) -> bool:
    """Whether a number and a thing are left without the measure word between them.

    三个头的牛 are no 三头牛, 三个月 are not 三月, 三位数 is none of 三个数, and 两个一元 are not 二十一元.
    """
    if (
        not following
        or _is_numeral(following)
        or (measure == "条" and following in _IN_BARS)
        or measure + following == "位数"
    ):
        return False
    return following == "人" or following not in _MEASURES


def _value(numerals: str) -> str | None:
    """A numeral in digits; None where it is no single number, as 两三 (two or three)."""
    if len(numerals) == 1:
        return _VALUES[numerals]
    if len(numerals) > _MAX_NUMERALS:
        return None
    total, digit, least = 0, None, 10_000
    for numeral in numerals:
        if (unit := _UNITS.get(numeral)) is not None:
            if unit >= least or (digit is None and total):
                return None
            total += unit * (1 if digit is None else digit)
            digit, least = None, unit
        elif digit is None or digit == 0:
            digit = _DIGITS[numeral]
        else:
            return None
    return str(total + (digit or 0))


# ── style ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Vocabulary:
    """Words that segments may be made of, one behind the other."""

    def __init__(self, words: Iterable[str]) -> None:
        self._words = frozenset(words)
        self._beginnings = frozenset(word[0] for word in self._words)
        self._endings = frozenset(word[-1] for word in self._words)
        self._longest = max(map(len, self._words))

    def make_up(self, segment: str) -> bool:
        """Whether a segment, not empty, is made of nothing but them."""
        if segment[0] not in self._beginnings or segment[-1] not in self._endings:
            return False
        reached = [0]  # the ends of words so far: each is a place where the next one may begin
        for end in range(1, len(segment) + 1):
            for start in reached:
                if segment[start:end] in self._words:
                    reached.append(end)
                    break
            if reached[-1] < end - self._longest:
                return False
        return reached[-1] == len(segment)


_STYLES = _Vocabulary(_scanned(word) for line in _STYLE_LINES for word in line.written)
_QUALITIES = _Vocabulary(
    ["8k", "4k", "16k", *(_scanned(line.written[0]) for line in _STYLE_LINES if line.kind == "quality")]
)
_FRAMES = tuple(
    sorted((_scanned(line.written[0]) for line in _STYLE_LINES if line.kind == "frame"), key=len, reverse=True)
)
_OWN = frozenset(_scanned(line.written[0]) for line in _STYLE_LINES if line.kind == "own")
_OWN_HEADS = ("质感", "镜头")
"""What a single thing has, too, where no listed word stands before: 磨砂质感, 看镜头."""

_DEGREES = {
    word: scale
    for scale in ("明亮 暗光 暗调 亮调 昏暗", "高饱和度 低饱和度 黑白 鲜艳 色彩鲜艳", "高对比度 低对比度")
    for word in scale.split()
}
"""Of one scale a picture has one value: two of them belong to two parts of it."""

_HEADS = (
    "风格",
    "画风",
    "质感",
    "光线",
    "光影",
    "色调",
    "渲染",
    "背景",
    "镜头",
    "视角",
    "构图",
    "画质",
    "滤镜",
    "氛围",
    "配色",
    "笔触",
)
_BEFORE_PRODUCTS = frozenset("水农副")
"""What makes another word of 产品."""

_PARTS = ("左", "右", "上", "下", "中间", "第", "一半", "一边", "另", "前景")
_TIMES = ("前", "后", "时")
_NEGATING = re.compile(
    "不(?![锈倒])|无(?![线框绳袖缝影糖]|人机|花果|尾熊)|没|勿|反[向面]|负[向面]|避免|排除|禁止|去[除掉]|而非|少用"
    "|别(?<![^ ]别)(?![^ ])"
)
_COLORED = re.compile("[红橙黄绿青蓝紫黑白灰粉棕褐金银暖冷]")
_MAX_HEADED_CHARS = 8


def is_part(segment: str) -> bool:
    """Whether a segment tells of one part of the picture."""
    return segment.startswith(_PARTS) or segment.endswith(_TIMES)


def negates(words: Iterable[str]) -> bool:
    """Whether words tell of what is not in the picture."""
    return bool(_NEGATING.search(" ".join(words)))


def is_colored(segment: str) -> bool:
    """Whether a segment names a color."""
    return bool(_COLORED.search(segment))


def scale(style: str) -> str:
    """What of a style two parts of a picture may have each their own, a name for it: light, saturation, the color."""
    return _DEGREES.get(style, style[-1] if is_colored(style) else "")


def is_any_of_one(style: str) -> bool:
    """Whether a single thing may look like that, too: 黑白, 磨砂质感."""
    return style in _OWN or (style.endswith(_OWN_HEADS) and not _STYLES.make_up(style))


def is_style(segment: str) -> bool:
    """Whether a segment says nothing but how the whole picture is made and looks."""
    return len(segment) <= _MAX_STYLE_CHARS and _is_style(segment)


def is_quality(segment: str) -> bool:
    """Whether a segment asks for nothing but more pixels or more care."""
    return len(segment) <= _MAX_STYLE_CHARS and _is_quality(segment)


# Both are remembered, for most prompts choose among the same segments.


@lru_cache(maxsize=4_096)
def _is_style(segment: str) -> bool:
    is_headed = segment.endswith(_HEADS) and len(segment) <= _MAX_HEADED_CHARS
    return is_headed or _STYLES.make_up(segment) or _QUALITIES.make_up(segment)


@lru_cache(maxsize=4_096)
def _is_quality(segment: str) -> bool:
    return _QUALITIES.make_up(segment)


def without_frame(word: str) -> tuple[str, str]:
    """A segment's last word without what a shop calls its pictures, and that; "" where there is none."""
    if word.endswith(_FRAMES):
        for frame in _FRAMES:
            if word.endswith(frame) and word[-len(frame) - 1 : -len(frame)] not in _BEFORE_PRODUCTS:
                return word[: -len(frame)], frame
    return word, ""
