"""Word lists of the problems, by domain."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_SHE = _words(
    "alice mia emma nina clara ruth olga zoe ivy lena sara tara wanda yuki hana "
    "maria anna grace julia laura"
)
_HE = _words(
    "tom bob omar leo marc finn hugo ian jack karl luis noah paul ravi sam "
    "theo viktor yusuf ben dan"
)
NAMES = tuple((name, "she") for name in _SHE) + tuple((name, "he") for name in _HE)

# math
OBJECTS = _words(
    "apples pears plums lemons oranges cherries figs nuts eggs cookies cakes muffins candles "
    "coins stamps marbles buttons pencils books cards shells stones feathers tickets balloons "
    "flowers roses tulips seeds beads ribbons toys kites dolls puzzles badges stickers bottles "
    "jars spoons"
)
KINDS = _words("red blue green yellow small large old new shiny wooden round ripe")
CONTAINERS = _words("box basket bag drawer crate bucket tin chest sack shelf")
PLACES = _words("market school farm shop garden party fair beach library station harbor museum")
GAIN_VERBS = _words("finds buys gets collects wins makes receives picks gathers earns")
LOSS_VERBS = _words("loses sells eats breaks drops spends donates hides burns returns")

# code
VARIABLES = _words(
    "x y z count index total score size width height depth offset length limit left right "
    "node item key value temp result sum_a sum_b low high step rate level rank"
)
METHODS = {
    "+": _words("add increase raise extend advance"),
    "-": _words("subtract decrease lower trim rewind"),
    "*": _words("multiply scale repeat"),
    "/": _words("divide split shrink"),
}

# science
VEHICLES = _words("car train rocket bicycle truck boat sled drone cart bus")
MACHINES = _words("lamp motor heater fan pump laser radio fridge oven drill")
MOLECULES = (
    ("water", {"hydrogen": 2, "oxygen": 1}),
    ("methane", {"carbon": 1, "hydrogen": 4}),
    ("ammonia", {"nitrogen": 1, "hydrogen": 3}),
    ("ethane", {"carbon": 2, "hydrogen": 6}),
    ("propane", {"carbon": 3, "hydrogen": 8}),
    ("ethanol", {"carbon": 2, "hydrogen": 6, "oxygen": 1}),
    ("peroxide", {"hydrogen": 2, "oxygen": 2}),
    ("hydrazine", {"nitrogen": 2, "hydrogen": 4}),
)
ORGANISMS = _words("bacteria cells yeast algae amoebas spores viruses microbes")
SAMPLES = _words("dish flask tube beaker vial tank pond kettle")
