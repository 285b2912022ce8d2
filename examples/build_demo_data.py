"""Writes the demo data of hf_prefix: records of invented eating places, described in one house style.

    python examples/build_demo_data.py [--output hf_prefix/demo]

The style is that of a terse city notebook: money is talked of as the purse, dishes stand on the slate,
ratings are stars that the regulars give, children are little ones. A small language model does not write
that way by itself, but can learn to from a few hundred texts. Same code, same files: only SEED decides.
"""

import argparse
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

SEED = 20210808
SPLITS = {  # split: (number of records, references per record at least, at most)
    "train": (240, 2, 3),
    "dev": (24, 3, 4),
    "test": (48, 3, 4),
}
# How often a record has the attribute; name and kind are always there, and so are at least three of these.
PRESENCE = {"food": 0.8, "price": 0.6, "rating": 0.6, "area": 0.7, "near": 0.4, "family": 0.5}
FEWEST_ATTRIBUTES = 3

KINDS = ("café", "bistro", "tavern", "diner", "canteen", "tearoom", "inn", "eating house")
FOODS = (
    "mushroom pies", "smoked trout", "pepper soup", "plum dumplings", "barley bread", "walnut cake",
    "chestnut stew", "lentil curry", "saffron noodles", "herb omelettes", "goat cheese tarts",
    "ginger pancakes", "bean burgers", "roast squash", "pickled herring", "honey waffles", "leek pasties",
    "apple fritters",
)  # fmt: skip
AREAS = {
    "harbour": ("down by the harbour",),
    "old town": ("in the old town",),
    "market": ("beside the market", "among the market stalls"),
    "hill": ("up on the hill",),
    "canal": ("along the canal", "on the canal bank"),
    "station": ("behind the station",),
    "student quarter": ("in the student quarter",),
    "city gate": ("inside the city gate",),
}
LANDMARKS = (
    "Tallow Bridge", "Saint Orrin's Well", "the Tin Theatre", "Candlewick Tower", "the Glass Arcade",
    "Lantern Steps", "the Ropeworks", "Fennel Gate", "the Whistling Fountain", "Marlpit Green",
)  # fmt: skip
NEARNESS = ("a stone's throw from {near}", "round the corner from {near}", "just past {near}")
SERVING = ("serving {food}", "with {food} on the slate")
PRICES = {
    "low": ("kind to the purse", "gentle on the purse"),
    "medium": ("fair to the purse",),
    "high": ("hard on the purse", "heavy on the purse"),
}
STARS = {"1": "one star", "2": "two stars", "3": "three stars", "4": "four stars", "5": "five stars"}
FAMILY_CLAUSES = {
    "yes": ("little ones are welcome",),
    "no": ("little ones stay at home",),
}
FAMILY_REQUESTS = {
    "yes": ("bring the little ones",),
    "no": ("leave the little ones at home",),
}

# Half of a sentence plan: how the place is introduced. {spot} is the kind with area and landmark and dish,
# {what} the kind with the dish alone; a field with a capital letter starts with one.
OPENINGS = (
    "Look for {name}, {spot}",
    "{name} is {spot}",
    "Make for {name}, {spot}",
    "{Spot}: that is {name}",
)
OPENINGS_WITH_PLACE = (
    "Look for {name} {place}: {what}",
    "{Place}{pause} you will find {name}, {what}",
    "{Place}{pause} stands {name}, {what}",
)
# The other half: what is said of price, rating and family, by which of them the record has.
CLOSINGS = {
    ("price", "rating", "family"): (
        "It is {price}, {link} the regulars give it {stars}; {family_request}.",
        "{Price}, {link} with {stars} from the regulars. {Family_request}.",
        "{Stars} from the regulars, {link} {price}; {family_clause}.",
    ),
    ("price", "rating"): (
        "It is {price}, {link} the regulars give it {stars}.",
        "{Price}, {link} with {stars} from the regulars.",
        "{Stars} from the regulars, {link} {price}.",
    ),
    ("price", "family"): ("It is {price}, and {family_clause}.", "{Price}; {family_request}."),
    ("rating", "family"): (
        "The regulars give it {stars}, and {family_clause}.",
        "{Stars} from the regulars; {family_request}.",
    ),
    ("price",): ("It is {price}.", "Expect it to be {price}."),
    ("rating",): ("The regulars give it {stars}.", "{Stars} from the regulars."),
    ("family",): ("{Family_request}.", "{Family_clause}."),
    (): ("",),
}

ADJECTIVES = (
    "Pewter", "Crooked", "Velvet", "Humming", "Tangled", "Marbled", "Drowsy", "Brindled", "Speckled",
    "Nimble", "Sooty", "Plucky", "Dappled", "Grumbling", "Lacquered", "Mossy", "Quilted", "Bashful",
    "Gossamer", "Wistful",
)  # fmt: skip
NOUNS = (
    "Newt", "Thimble", "Badger", "Otter", "Magpie", "Bellows", "Ladle", "Marten", "Stoat", "Wherry",
    "Beetle", "Dormouse", "Trivet", "Puffin", "Sundial", "Button", "Gosling", "Tinderbox",
)  # fmt: skip
KEEPERS = (
    "Ottoline", "Bramwick", "Quillon", "Marrable", "Tolliver", "Pettigraw", "Hespeth", "Dunmallow",
    "Isembard", "Wrenfold", "Calloway", "Thessaly",
)  # fmt: skip
ROOMS = ("Larder", "Hearth", "Corner", "Pantry")

# Values that test records combine in ways that no training record does: one pair in five is theirs alone.
HELD_OUT_PAIRS = (("kind", KINDS, "food", FOODS), ("area", tuple(AREAS), "near", LANDMARKS))
HELD_OUT_SHARE = 5

Attributes = dict[str, str]


def invented_names() -> list[str]:
    """Returns every name that the word lists make."""
    signs = [f"The {adjective} {noun}" for adjective, noun in itertools.product(ADJECTIVES, NOUNS)]
    rooms = [f"{keeper}'s {room}" for keeper, room in itertools.product(KEEPERS, ROOMS)]
    return signs + rooms


def draw_attributes(draw: random.Random, name: str) -> Attributes:
    """Returns a random record: attribute to value, in the order in which they are written."""
    values = {
        "food": draw.choice(FOODS),
        "price": draw.choice(tuple(PRICES)),
        "rating": draw.choice(tuple(STARS)),
        "area": draw.choice(tuple(AREAS)),
        "near": draw.choice(LANDMARKS),
        "family": draw.choice(tuple(FAMILY_CLAUSES)),
    }
    present = {key: value for key, value in values.items() if draw.random() < PRESENCE[key]}
    return {"name": name, "kind": draw.choice(KINDS), **present}


def belongs_to(split: str, attributes: Attributes) -> bool:
    """Tells whether a record is long enough and has only value pairs that its split may have."""
    held_out = [
        (firsts.index(attributes[first]) + seconds.index(attributes[second])) % HELD_OUT_SHARE == 0
        for first, firsts, second, seconds in HELD_OUT_PAIRS
        if first in attributes and second in attributes
    ]
    long_enough = len(attributes) >= 2 + FEWEST_ATTRIBUTES
    return long_enough and all(pair == (split == "test") for pair in held_out)


def place_phrase(draw: random.Random, attributes: Attributes) -> str:
    """Returns where the place is, such as "in the old town, just past Tallow Bridge", or ""."""
    parts = []
    if "area" in attributes:
        parts.append(draw.choice(AREAS[attributes["area"]]))
    if "near" in attributes:
        parts.append(draw.choice(NEARNESS).format(near=attributes["near"]))
    return ", ".join(parts)


def link_word(attributes: Attributes) -> str:
    """Returns "and" where price and rating speak for the place both or neither, "but" where they disagree."""
    affordable = attributes.get("price") != "high"
    liked = attributes.get("rating", "3") >= "3"
    return "and" if affordable == liked else "but"


def phrases(draw: random.Random, attributes: Attributes) -> dict[str, str]:
    """Returns one random wording for every field that the sentence plans name."""
    article = "an" if attributes["kind"][0] in "aeiou" else "a"
    kind = f"{article} {attributes['kind']}"
    serving = draw.choice(SERVING).format(food=attributes["food"]) if "food" in attributes else ""
    place = place_phrase(draw, attributes)
    what = f"{kind} {serving}".strip()
    family = attributes.get("family", "yes")
    wordings = {
        "place": place,
        "what": what,
        "spot": f"{kind} {place}, {serving}".removesuffix(", ") if place else what,
        "price": draw.choice(PRICES[attributes.get("price", "low")]),
        "stars": STARS[attributes.get("rating", "3")],
        "family_clause": draw.choice(FAMILY_CLAUSES[family]),
        "family_request": draw.choice(FAMILY_REQUESTS[family]),
    }
    capitalised = {key.capitalize(): text[:1].upper() + text[1:] for key, text in wordings.items()}
    pause = "," if "," in place else ""
    return {
        "name": attributes["name"],
        "link": link_word(attributes),
        "pause": pause,
        **wordings,
        **capitalised,
    }


def describe(draw: random.Random, attributes: Attributes, count: int) -> list[str]:
    """Returns so many descriptions of a record, each by another opening."""
    has_place = "area" in attributes or "near" in attributes
    openings = OPENINGS + OPENINGS_WITH_PLACE if has_place else OPENINGS
    closings = CLOSINGS[tuple(key for key in ("price", "rating", "family") if key in attributes)]
    texts = []
    for opening in draw.sample(openings, count):
        fields = phrases(draw, attributes)
        texts.append(f"{opening}. {draw.choice(closings)}".strip().format(**fields))
    return texts


def source_text(attributes: Attributes) -> str:
    """Writes a record as the model reads it: `name : The Pewter Newt | kind : tavern | …`."""
    written = dict(attributes)
    if "rating" in written:
        written["rating"] += " of 5"
    return " | ".join(f"{key} : {value}" for key, value in written.items())


def build_split(draw: random.Random, split: str, names: Sequence[str]) -> list[dict[str, str | list[str]]]:
    """Returns the rows of a split, one for every name."""
    _, fewest, most = SPLITS[split]
    rows: list[dict[str, str | list[str]]] = []
    for name in names:
        attributes = draw_attributes(draw, name)
        while not belongs_to(split, attributes):
            attributes = draw_attributes(draw, name)
        references = describe(draw, attributes, draw.randint(fewest, most))
        rows.append({"source": source_text(attributes), "references": references})
    return rows


def main(output: Path) -> None:
    """Writes `<split>.jsonl` for every split into the folder `output`."""
    draw = random.Random(SEED)  # noqa: S311 - the same files every time
    names = invented_names()
    draw.shuffle(names)
    for split, (size, _, _) in SPLITS.items():
        rows = build_split(draw, split, names[:size])
        del names[:size]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (output / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        print(f"{split}.jsonl: {len(rows)} records")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[1] / "hf_prefix" / "demo"
    parser.add_argument("--output", type=Path, default=default, help="an existing folder")
    main(parser.parse_args().output)
