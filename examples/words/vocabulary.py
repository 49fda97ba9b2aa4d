"""The words and their splits. Nothing here is random: a split is a fact, not a seed.

``TRAIN`` is what pre-training and fine-tuning see. ``HELD_OUT`` is what is reported and ``TUNING`` is what settings
were chosen on; neither is ever seen in training. ``WITHHELD`` are words of ``TRAIN`` with one typeface that they are
never seen in.
"""

from __future__ import annotations

import hashlib

from pipeline import TYPEFACES, prompt

_TEXT = """
act add age air apple arm art ask away baby back bag ball band bank bar base bath bay beach bean bear beat bed bee
bell belt bench bend best big bike bill bird blanket blow blue board boat body bone book boot born both bottle
bottom bow bowl box boy branch brave bread break brick bridge bright bring broad brother brown brush bucket build
bulb burn bus bush butter button buy cabin cable cake call calm camel camera camp can candle captain car card care
carpet carry castle cat catch center chain chair chalk chance change cheese cherry chicken child circle city class
clay clean clear clever climb clock close cloth cloud coast coat coconut coffee coin cold collect color comb comet
common concert cook cool copper corn corner cotton country cousin cover cow crab cream creek cross crowd crown cup
curtain custom cut cycle daily dance danger dark daughter dawn day deep deer delta desert desk diamond dinner dish
doctor dog dolphin donkey door double dove dragon draw dream dress drink drive drum dry duck dust eager eagle ear
early earth east easy echo edge egg eight elbow elephant empty engine evening every exit eye fabric face factory
fair family famous farm fast father feather field fifty fig fill film final find fine finger fire first fish five
flag flame flat flight floor flour flower flute fly fog food foot forest fork fountain four fox frame free fresh
friend frog front frozen fruit full funny game garden garlic gate gentle giant gift giraffe girl give glad glass
globe glove goal goat gold good grape grass gray great green ground group guitar half hammer hand happy harbor hard
hat have hazel head health heart heavy helmet help hen herb high hill history holiday home honey hood hope horse
hospital hot hotel hour house human hundred hungry husband ice idea inch ink insect iron island ivory jacket jar
jazz jelly jewel join joke journey judge juice jump jungle just keen keep kettle key kind king kitchen kite kitten
knee knife know ladder lake lamp land language large last late laugh lawn leaf learn leather lemon lens letter level
library light like lime line lion lip list little live lizard local long loud love low luck lunch magic main make
man mango map maple marble march market mask meadow meal medal melon member memory metal middle milk mill minute
mirror mist mix model modern moment monday money monkey month moon morning mother motor mountain mouse mouth move
mud music nail name narrow nature near neck needle nest net never new night nine noble noise north nose note
notebook number nurse nut oak ocean office oil old olive one onion open orange orchard order outside oven owl oyster
page paint pair palace palm pan panda paper parade parent park parrot path peace peach pear pen pencil penny people
pepper perfect piano picnic picture pie pig pillow pilot pin pine pink pipe planet plant plate play plum pocket poem
point pond pony port potato pretty print prize problem puppet purple puzzle queen quick quiet quilt rabbit race
radio rail rain rapid raven reach ready real red reef rest rhythm ribbon rice rich ride right ring ripe rise river
road robin rock rocket roof room root rope rose round royal ruby rule run sack saddle safe sail salad salt sand
sandwich saturday school science scout sea season second secret seed seven shade shadow shape shark sheep shelf
shell ship shirt shoe shop short silent silk silver simple singer sister six sketch skin sky sled sleep slow small
smile smoke snail snow soap sock soft soil song soup south space spark spice spider spoon spring square squirrel
stable stage stair stamp star station steam steel stem step stone store storm story stove straw stream street string
strong student sugar suit summer sun sunday sunny sunset sure swan sweet swim table tail talk tall tea teacher team
temple ten tent theater thick thin thread three thumb ticket tiger time tin today toe tomato tooth top tower town
toy track trade train travel tree triangle trip trout truck true trumpet trunk tulip tunnel turkey turn turtle
twelve twenty twin two umbrella uncle under upon useful valley van vase velvet verb village vine violet violin visit
voice volcano wagon walk wall walnut warm wash watch water wave wax way week weekend welcome west whale wheat wheel
whistle white wide wild wind window wing winter wise wolf woman wonder wood wool word work world yard year yellow
yes young zebra zero zone zoo
"""
WORDS = _TEXT.split()


def _order(word: str) -> str:
    return hashlib.sha256(f"words/{word}".encode()).hexdigest()


_BY_HASH = sorted(WORDS, key=_order)
HELD_OUT, TUNING, TRAIN = _BY_HASH[:60], _BY_HASH[60:100], _BY_HASH[100:]
# word -> the typeface in which it is never seen
WITHHELD = {word: sorted(TYPEFACES)[place % len(TYPEFACES)] for place, word in enumerate(TRAIN[:60])}


def train_prompts() -> list[str]:
    """Every training word in every typeface but its withheld one."""
    return [prompt(word, face) for word in TRAIN for face in TYPEFACES if WITHHELD.get(word) != face]


def prompts_of(words: list[str]) -> list[str]:
    """Each of ``words`` in every typeface."""
    return [prompt(word, face) for word in words for face in TYPEFACES]
