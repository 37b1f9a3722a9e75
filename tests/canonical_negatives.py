"""Pairs of prompts that differ in one thing that can be seen, and must never be one picture.

Bases are prompts as people write them, with their slots marked: `{color=red}`. Each pair puts another word into one of
a base's slots; `noise` is what means nothing, for one side of a pair.
"""
# ruff: noqa: E501, RUF001 - a base is one line; full-width signs are what Chinese prompts are written with

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple

PER_SLOT = 5
"""Pairs that one slot makes, at most."""

_SLOT = re.compile(r"\{(\w+)=([^{}]*)\}")


class Negative(NamedTuple):
    """Two prompts of two pictures, and what kind of word tells them apart; `modifiers` say how both are made."""

    kind: str
    one: str
    other: str
    modifiers: tuple[str, ...]
    params: str


class Language(NamedTuple):
    """The bases of one language, `prompt | modifiers`, what its slots may hold, and what means nothing in it."""

    bases: tuple[str, ...]
    slots: dict[str, tuple[str, ...]]
    wrappers: tuple[str, ...]
    quality: tuple[str, ...]
    comma: str
    stop: str


def negatives(language: Language) -> list[Negative]:
    """All pairs of a language, in the same order in every process."""
    return [pair for number, base in enumerate(language.bases) for pair in _pairs(language, base, Random(number))]  # noqa: S311 - no secret


def written(pair: Negative, language: Language) -> tuple[str, str]:
    """Both prompts of a pair with their modifiers, as they stand."""
    return _with_tail(pair.one, pair, language), _with_tail(pair.other, pair, language)


def noise(prompt: str, pair: Negative, language: Language, random: Random) -> str:
    """`prompt` in other words that mean the same: a wrapper, the modifiers in another order, quality words, a stop."""
    modifiers = [*pair.modifiers, *random.sample(language.quality, random.randint(0, 2))]
    random.shuffle(modifiers)
    if random.random() < 0.5 and prompt.isascii() and not pair.kind.startswith("text"):
        prompt = prompt[0].upper() + prompt[1:]
    prompt = random.choice(language.wrappers).format(prompt)
    text = language.comma.join([prompt, *modifiers])
    if modifiers and random.random() < 0.5:
        text += language.stop
    return f"{text} {pair.params}".rstrip()


def _pairs(language: Language, base: str, random: Random) -> Iterator[Negative]:
    prompt, _, tail = base.partition(" | ")
    prompt, _, params = prompt.partition(" --")
    modifiers = tuple(tail.split(", ")) if tail else ()
    params = f"--{params}" if params else ""
    plain = _SLOT.sub(r"\2", prompt)
    swapped = [slot[2] for slot in _SLOT.finditer(prompt) if slot[1] == "swap"]
    if swapped:
        first, second = swapped
        other = iter((second, first))
        exchanged = _SLOT.sub(lambda slot: next(other) if slot[1] == "swap" else slot[2], prompt)
        yield Negative("swap", plain, exchanged, modifiers, params)
    for slot in _SLOT.finditer(prompt):
        kind, value = slot[1], slot[2]
        others = [each for each in language.slots.get(kind, ()) if each != value]
        if kind == "sku":
            others = list(_other_codes(value, random))
        for each in random.sample(others, min(PER_SLOT, len(others))):
            rest = _SLOT.sub(r"\2", prompt[: slot.start()]), _SLOT.sub(r"\2", prompt[slot.end() :])
            yield Negative(kind, plain, each.join(rest), modifiers, params)
    if params:
        yield Negative("params", plain, f"{plain} {params.replace('1', '2')}", modifiers, "")


def _other_codes(code: str, random: Random) -> Iterator[str]:
    """Article numbers of other articles: another digit, one more, another or one more letter."""
    digits = [at for at, character in enumerate(code) if character.isdigit()]
    at = random.choice(digits)
    yield code[:at] + str((int(code[at]) + random.randint(1, 9)) % 10) + code[at + 1 :]
    yield code[: digits[-1] + 1] + str(random.randint(0, 9)) + code[digits[-1] + 1 :]
    yield code + random.choice(["B", "X", "-S", "-XL", " Pro", "/2"])
    yield random.choice("BCDFGH") + code


def _with_tail(prompt: str, pair: Negative, language: Language) -> str:
    return f"{language.comma.join([prompt, *pair.modifiers])} {pair.params}".rstrip()


def _split(lines: str) -> tuple[str, ...]:
    return tuple(line for line in lines.strip().split("\n") if line)


def _slots(lines: str) -> dict[str, tuple[str, ...]]:
    return {kind: tuple(rest.split("/")) for kind, _, rest in (line.partition(": ") for line in _split(lines))}


# ── English ─────────────────────────────────────────────────────────────────────────────────────────────────────────

ENGLISH = Language(
    bases=_split("""
a {color=red} fox {action=sleeping} {relation=under} a wooden bench in the snow
{count=two} dogs {action=running} on a beach at {time=sunset}
a {subject=woman} in a {color=yellow} raincoat holding an umbrella {relation=in front of} a bus stop
a man riding a {swap=horse} beside a {swap=cow} on a dirt road
a bowl of {fruit=apples} {relation=beside} a {color=blue} teapot on a {material=wooden} table
{count=three} children {neg=with} hats build a sandcastle by the sea
the {swap=boy} throws a ball to the {swap=girl} in a park
a {size=small} {material=stone} bridge over a river in {season=autumn}
a bathroom {neg=with} a window and a {color=white} sink
an old {subject=man} and a {subject=boy} fishing {relation=on} a pier
a {color=red} car {relation=left of} a truck at a traffic light
a {swap=cat} looks at a {swap=mouse} through a glass door
{count=five} sheep and one goat {relation=behind} a fence in {weather=fog}
a kitchen {neg=with} a stove, a {color=green} fridge and {count=four} chairs
a train {action=arriving} at a station {relation=near} a mountain village
a street in the {weather=rain} {neg=with} people and neon signs
a plate of {food=pasta} and a glass of {drink=milk} on a {color=red} tablecloth
a {subject=girl} with {color=black} hair {action=reading} in a library
a {swap=bicycle} in front of a {swap=motorcycle} parked at a kerb
{count=six} balloons {relation=above} a castle, seen from {view=below}
portrait of a {subject=knight} in {material=golden} armor, by {artist=greg rutkowski} | digital painting, sharp focus, dramatic lighting
a {size=tiny} {subject=robot} {action=reading} in a forest | concept art, volumetric lighting, octane render
{subject=wizard} casting a {color=blue} spell, in the style of {artist=alphonse mucha} | intricate, elegant, highly detailed
cyberpunk city street at {time=night}, {count=two} samurai {action=fighting} | cinematic lighting, unreal engine, artstation
a {subject=dragon} {relation=on top of} a {material=crystal} tower, art by {artist=artgerm} and {artist=wlop} | fantasy, matte painting
full body portrait of an elf queen {neg=with} a crown, {color=silver} dress | soft light, oil painting, trending on artstation
an astronaut riding a {subject=horse} on {place=mars} --ar 16:9 | photorealistic, wide angle
isometric room of a {subject=pirate}, {color=purple} carpet, {count=three} windows | 3d render, pastel colors, soft shadows
a {subject=lion} ({color=golden} mane:{weight=1.2}) in tall grass | wildlife photography, golden hour, bokeh
(({subject=vampire})) in a ballroom, (candles:{weight=0.8}) --seed 1234 | gothic, moody, film grain
steampunk {subject=owl} {emoji=🦉} with {color=brown} goggles | watercolor, ink
a {subject=mermaid} under the sea {emoji=🌊}, {count=seven} jellyfish, by {artist=hayao miyazaki} | anime, vivid colors
{weather=stormy} ocean with a {size=large} ship, painting by {artist=ivan aivazovsky} | epic, dramatic lighting
ruins of a temple in {place=egypt}, {season=winter}, no people --ar 3:1 | matte painting, atmospheric
a {subject=witch} stirring a {material=iron} cauldron, {color=green} smoke, by {artist=arthur rackham} | ink, line art
movie poster of a {subject=detective} in the {weather=rain}, {color=red} coat | noir, film grain, high contrast
close up of a {subject=wolf} with {color=amber} eyes, artwork by {artist=wlop} --v 5.1 | sharp focus, bokeh
product photo of {sku=WX-2041} wireless headphones, {color=black} | white background, studio lighting
{sku=DCB-118} battery charger product shot {neg=with} cable | white background, soft shadows
studio product photo of a {volume=500 ml} {material=glass} bottle of {drink=water} | gradient background, studio lighting
packshot of {brand=Nivea} hand cream {volume=75 ml} {relation=beside} its box | white background
{brand=Canon} EF {lens=50mm} f/1.8 lens, catalog photo, model {sku=0570C002} | white background, studio lighting
product photo of {brand=Lego} set {sku=75192}, {count=two} figures in front | white background
a pair of {brand=Adidas} running shoes size {number=42}, {color=white} sole, product image | floating, studio lighting
lifestyle photo of a {color=green} backpack {volume=30 l} on a {material=wooden} bench | soft light, shallow depth of field
ecommerce main image of {brand=Bosch} drill {sku=GSB 18V-55} {neg=with} case | pure white background
{brand=Samsung} {number=55} inch tv {sku=QE55Q60}, front view, advertising photo | dark background
product photo of {number=12} pack of {brand=Duracell} AA batteries, sku {sku=MN1500B12} | white background
{material=leather} wallet with {number=8} card slots, {color=brown}, product photography | soft light
{brand=Kikkoman} soy sauce {volume=150 ml} bottle, label facing {view=front} | packshot, white background
a neon sign "{text=Open Late}" above a {color=red} door | cinematic, night
a birthday cake that says "{text=Happy Birthday Anna}" with {count=five} candles | food photography
a {color=blue} t-shirt with the words "{text=Save The Bees}" | product photo, white background
minimal poster, "{text=Jazz Night}" in {color=gold} letters, a {instrument=trumpet} below | art deco, print
a storefront sign reading "{text=Bob's Bakery}" {relation=above} a {material=brick} wall | street photography
a mug with "{text=World's Best Dad}" on it, {color=white} mug | product photo, studio lighting
book cover, title "{text=The Last Garden}", a {subject=girl} among {color=pink} roses | illustration, watercolor
a chalkboard menu that says {open=Soup of the Day}
a road sign with text: {open=Exit 24}
logo for a coffee shop, word "{text=Brew}" and a {subject=bear} icon, {color=brown} | vector, flat design, minimalist
greeting card with {count=three} {subject=rabbit} drawings and "{text=Hello Spring}" --ar 1:1 | pastel colors, watercolor
"""),
    slots=_slots("""
color: red/blue/green/yellow/black/white/purple/orange/pink/brown/gray
count: two/three/four/five/six/seven/nine/twelve/twenty/twenty-one
number: 4/6/8/10/12/16/24/42/43/55/65
subject: man/woman/boy/girl/robot/fox/wolf/owl/bear/rabbit/lion/tiger/knight/wizard/witch/pirate/horse/dragon
action: sleeping/running/reading/eating/jumping/waiting/fighting/leaving/arriving
relation: under/behind/in front of/beside/on top of/inside/left of/right of/above/near/on
neg: with/without
size: tiny/small/large/huge/tall/wide
material: wooden/stone/glass/golden/iron/brick/paper/marble/leather/crystal
season: spring/summer/autumn/winter
weather: rain/fog/snow/stormy/sunny
time: sunset/sunrise/night/noon/dawn
view: below/above/behind/front/left
place: mars/egypt/paris/tokyo/the moon/iceland
fruit: apples/pears/oranges/lemons/cherries
food: pasta/rice/pancakes/fries/salad
drink: milk/water/wine/juice/beer
instrument: trumpet/piano/violin/guitar
artist: greg rutkowski/artgerm/wlop/alphonse mucha/claude monet/hayao miyazaki/ivan aivazovsky/norman rockwell/zdzislaw beksinski
brand: Nivea/Canon/Nikon/Adidas/Puma/Lego/Bosch/Makita/Samsung/Sony/Duracell/Kikkoman
lens: 35mm/50mm/85mm/18-55mm/70-200mm
volume: 75 ml/150 ml/250 ml/500 ml/750 ml/1 l/1.5 l/30 l/15 l
weight: 0.8/1.2/1.3/1.5/0.5
emoji: 🦉/🌊/🦊/🎈/🔥
text: open late/OPEN LATE/Open Now/Jazz Night/Hello/Two Cats/2 cats/SALE 50%
open: Soup of the day/Fresh Bread/Exit 42/exit 24/EXIT 24/Closed
"""),
    wrappers=(
        "{}",
        "please draw {}",
        "can you generate an image of {}",
        "a picture of {}",
        "create {}",
        "I want you to make an image of {}",
    ),
    quality=("8k", "4k", "highly detailed", "best quality", "high resolution", "masterpiece", "ultra detailed", "uhd"),
    comma=", ",
    stop=".",
)

# ── Chinese ─────────────────────────────────────────────────────────────────────────────────────────────────────────

CHINESE = Language(
    bases=_split("""
一只{color=红色}的狐狸在长椅{relation=下}睡觉，天上下着{weather=雪}
{count=两}只狗在沙滩上{action=奔跑}，时间是{time=黄昏}
一个穿着{color=黄色}雨衣的{person=女人}站在公交站{relation=前}
一个{person=男孩}把球扔给一个{swap=女孩}和一个{swap=老人}
桌子上有一盘{fruit=苹果}，{relation=旁}有一个{color=蓝色}的茶壶
{count=三}个小孩{neg=戴着}帽子在海边堆沙堡
一座{size=小}石桥横跨在河上，{season=秋天}的树叶
卫生间里{has=有}窗户，洗手池是{color=白色}的
老{person=男人}在码头{relation=上}钓鱼
一辆{color=红色}的汽车停在卡车的{side=左边}
一只{swap=猫}看着一只{swap=老鼠}
{count=五}只羊站在栅栏{relation=后}，远处有{weather=雾}
厨房里{has=有}一台{color=绿色}的冰箱和{count=四}把椅子
一列火车{action=停}在山村{relation=旁}的车站
{weather=雨}中的街道，{has=没有}行人，只有霓虹灯
一盘{food=面条}和一杯{drink=牛奶}放在{color=红色}桌布上
一个{color=黑色}长发的{person=女孩}在图书馆里{action=看书}
一辆{swap=自行车}在一辆{swap=摩托车}前面
{count=六}个气球飘在城堡{relation=上}
一位{person=老人}牵着{count=两}匹{color=白色}的马
草地上{has=有}{count=七}头牛，{weather=晴}天
一个{person=男人}{neg=背着}书包在雪山{relation=下}行走
{time=夜晚}的湖面上漂着{count=三}艘{material=木}船
窗台上放着{count=两}盆{color=粉色}的花
一个{person=骑士}身穿{material=金}盔甲，{artist=莫奈}的画 | 油画, 光影
一个{size=小}机器人在森林里{action=看书} | 概念设计, 体积光
赛博朋克城市的{time=夜晚}，{count=两}个武士在打斗 | 电影质感, 虚幻引擎渲染
{person=女孩}和一只{animal=龙}，{artist=宫崎骏}风格作品 | 动漫, 唯美
山顶上的{material=水晶}塔，{weather=雪}，{artist=齐白石}的画 | 国画, 水墨
一只{animal=狮子}站在草原上，({color=金色}鬃毛:{weight=1.2}) | 摄影, 浅景深
蒸汽朋克{animal=猫头鹰}{emoji=🦉}，{color=棕色}护目镜 | 水彩, 插画
海底的{animal=海龟}{emoji=🌊}，{count=七}只水母 | 二次元, 梦幻
{weather=雾}中的帆船，{count=两}只海鸥，{artist=梵高}的画 | 油画
古寺{relation=前}的{animal=狐狸}，{season=冬天}，{has=没有}人 --ar 16:9 | 写实, 自然光
一个{person=宇航员}骑着{animal=马}在{place=火星}上 --ar 3:1 | 超写实, 广角
武侠电影海报，一个{person=女人}拿着{material=铁}剑，{color=红色}披风 | 电影感, 逆光
{animal=狼}的脸，{color=黄色}的眼睛 --v 5.1 | 微距, 特写
{size=大}熊猫在{place=四川}竹林里{action=吃竹子} | 摄影, 自然光
{season=春天}的樱花树下，{count=两}个穿{color=蓝色}和服的{person=女孩} | 唯美, 柔和光线
{count=三}条金鱼在{material=玻璃}缸里，{artist=齐白石}的画 | 水墨, 极简
{brand=索尼}{sku=WH-1000}耳机，{color=黑色} | 产品照, 白色背景
{brand=博世}电钻{sku=GSB 18V-55}，{has=有}工具箱 | 电商主图, 白底
{volume=500毫升}的{material=玻璃}瓶{drink=牛奶} | 产品图, 纯色背景
{brand=美的}电饭煲{sku=MB-4025}，{color=白色}，容量{volume=4升} | 电商主图, 白色背景
{brand=佳能}{lens=50mm}镜头，型号{sku=EF-5018} | 商品图, 白底
{brand=华为}手机{sku=P60}，{color=紫色}，正面 | 商业, 白色背景
运动鞋，{number=42}码，{color=白色}鞋底，{brand=李宁} | 商品图, 柔光
{number=12}节装{brand=南孚}电池，货号{sku=LR6-12B} | 白底商品图, 高清
{material=皮}钱包，{number=8}个卡位，{color=棕色} | 产品照, 质感
酱油{volume=150毫升}，{brand=海天}，瓶子在盒子{side=左边} | 电商海报, 光影
{color=绿色}双肩包，{volume=30升}，放在{material=木}凳上 | 产品图, 自然光
{brand=乐高}积木{sku=75192}，{count=两}个小人在前 | 电商主图, 白色背景
霓虹灯招牌"{text=深夜食堂}"，{color=红色}的门 | 电影质感
生日蛋糕上写着"{text=生日快乐}"，{count=五}根蜡烛 | 摄影
{color=蓝色}T恤上印着"{text=保护海洋}" | 产品照, 白色背景
海报「{text=春节联欢}」，{animal=兔子}和{color=金色}灯笼 | 国潮, 插画
店铺门口的木牌写着“{text=今日特价}”，{animal=猫}趴在{relation=旁} | 写实
马克杯上写着"{text=早安}"，{color=白色}杯子 | 商品图, 柔光
书的封面《{text=最后的花园}》，{person=女孩}站在{color=粉色}玫瑰中 | 水彩, 插画
黑板上写着{open=今日例汤}
路牌，文字是{open=出口24}
咖啡店标志，"{text=慢时光}"，{animal=熊}图案，{color=棕色} | 矢量, 极简
"""),
    slots=_slots("""
color: 红色/蓝色/绿色/黄色/黑色/白色/紫色/橙色/粉色/棕色/灰色/金色
count: 两/三/四/五/六/七/九/十二/二十/二十一
number: 6/8/10/12/16/24/42/43
person: 男人/女人/男孩/女孩/老人/骑士/武士/厨师/医生/宇航员
animal: 猫/狗/狐狸/狼/熊/兔子/狮子/老虎/马/龙/海龟/猫头鹰
action: 奔跑/看书/吃竹子/跳跃/停/睡觉/打斗
relation: 上/下/前/后/旁/里
side: 左边/右边/前面/后面
neg: 戴着/没戴/背着/没背
has: 有/没有
size: 大/小/巨/矮
material: 木/金/铁/玻璃/水晶/石/皮/纸
season: 春天/夏天/秋天/冬天
weather: 雨/雪/雾/晴
time: 黄昏/夜晚/清晨/中午
place: 火星/四川/巴黎/东京/月球
fruit: 苹果/梨/橙子/柠檬/樱桃
food: 面条/米饭/饺子/薯条
drink: 牛奶/果汁/啤酒/茶
artist: 莫奈/梵高/齐白石/宫崎骏/徐悲鸿/毕加索
brand: 索尼/博世/美的/格力/佳能/尼康/华为/小米/李宁/安踏/南孚/海天/乐高
lens: 35mm/50mm/85mm/70-200mm
volume: 75毫升/150毫升/250毫升/500毫升/4升/5升/30升/1.5升
weight: 0.8/1.2/1.3/1.5
emoji: 🦉/🌊/🦊/🎈/🔥
text: 生日快樂/今日特价/早安/Hello/hello/两只猫/2只猫/五折
open: 今日例湯/新鲜面包/出口42/出口/休息中
"""),
    wrappers=("{}", "请画{}", "请生成{}", "帮我画一张{}的图片", "请绘制一幅{}", "图片：{}"),
    quality=("8k", "高清", "超高清", "细节丰富", "最佳质量", "高分辨率", "4k"),
    comma="，",
    stop="。",
)

LANGUAGES: dict[str, Language] = {"English": ENGLISH, "Chinese": CHINESE}


def kinds(pairs: Sequence[Negative]) -> set[str]:
    """What tells the pairs apart."""
    return {pair.kind for pair in pairs}
