"""The course's task: an order in English becomes one line of JSON.

    two large lattes with oat milk for Anna, please
    {"name":"Anna","items":[{"count":2,"size":"large","item":"latte","with":["oat milk"]}]}

One seeded generator makes every example, in three steps:

1. draw an order: a customer name and one or more items, each with a count, a size
   (or none) and modifiers;
2. say it: each item becomes a phrase, the phrases go into a sentence frame, and some
   customers correct themselves afterwards ("no, make that two");
3. sort it into a split by what it contains. The six test grades ask six different
   questions, and each is defined by what the training set must *not* contain
   (`GRADES`).

Choices, and what the others would cost. The task is small on purpose: the JSON is compact
and its keys are common words, so an example is about 70 tokens and a 4M-parameter model
learns it on two CPU cores in about a minute; pretty-printed JSON would double that. Only
names carry capitals, as in a text message, which makes *which word is the name* learnable
while leaving *copying it* the hard part. Answers are verbatim copies or digits: a task
that needed world knowledge would measure the base model instead of the fine-tuning method.

From the same generator: a second output format (`ticket`), a chat copy (`chat_rows`) and a
memory task that has nothing to copy (`memory_rows`). Standard library only.
"""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

from qlora_lab.errors import InputError, needs, shown, texts_of, whole

Order = dict[str, Any]
Row = dict[str, str]

# --- The words -------------------------------------------------------------------------------

NAMES = tuple(
    """
    Adam Alan Alice Amy Andy Anna Barry Ben Bill Bob Brett Carl Chris Clara Dan Dana Dave Dora
    Eddie Ella Emma Eric Eva Finn Fred Gary Gina Grace Greg Hanna Henry Hugo Ian Ida Igor Irene
    Ivan Jack Jane Jean Jeff Jim Joan Joe Jonas Karl Kate Ken Kim Kurt Larry Lee Lena Leo Lily
    Linda Lisa Lou Lucy Luke Mark Martin Mary Matt Max Mia Mike Mona Nancy Nick Nina Nora Oscar
    Owen Pam Paul Pete Ray Rick Rita Rob Robin Ron Rosa Roy Sally Sam Sara Sean Simon Stan Steve
    Ted Tim Tom Vera
    """.split()
)
NEW_NAMES = tuple(
    """
    Alex Barbara Bruno Cora Diana Emil Felix Frank Gus Helen Iris Jenny John Kay Lars Laura
    Marta Miles Neil Olga Otto Peter Philip Ralph Rose Ruth Susan Tess Tina Victor Walter Zoe
    """.split()
)
ITEMS = tuple(
    """
    bagel brownie bun cake chai cider cocoa coffee cookie crepe cupcake donut flan float juice
    latte mocha muffin pancake pie pretzel roll scone shake smoothie soda sundae tart tea toast
    waffle wrap
    """.split()
)
NEW_ITEMS = tuple(
    "biscuit blondie cortado fritter macaron malt pudding sorbet strudel tonic torte trifle".split()
)
SIZES = ("small", "medium", "large")
MODIFIERS = (
    "oat milk",
    "soy milk",
    "cold milk",
    "honey",
    "mint",
    "lemon",
    "cream",
    "nuts",
    "no sugar",
    "no ice",
    "no foam",
    "extra ice",
    "extra foam",
    "extra cream",
    "brown sugar",
    "one straw",
)
NUMBERS = ("one", "two", "three", "four", "five", "six")
ROUNDABOUT = {1: "a"}

# --- The sentences ---------------------------------------------------------------------------

FRAMES = (
    "{items} for {name}",
    "{items} for {name}, please",
    "{items} for {name}, thanks",
    "{items}, for {name}",
    "hi, {items} for {name}",
    "can I get {items} for {name}?",
    "can I have {items}? it's for {name}",
    "could I get {items}? the name is {name}",
    "could I have {items}, please? I'm {name}",
    "I'd like {items}, the name is {name}",
    "I want {items}, name {name}",
    "I need {items} for {name}",
    "we'd like {items}, that's for {name}",
    "for {name}: {items}",
    "order for {name}: {items}",
    "for {name}, {items}, please",
    "{name} wants {items}",
    "{name} would like {items}",
    "{name} here, {items}, please",
    "hello, {name} here, can I get {items}?",
    "hi, I'm {name}, I'd like {items}",
    "this is {name}, could I have {items}?",
    "my name is {name}, I want {items}",
    "please make {items} for {name}",
    "{other} here, can I get {items} for {name}?",
    "I'm {other}, {items} for {name}, please",
    "{items} for {name}, not for {other}",
)
# Held-out frames in three steps of strangeness: known words in a new order, new words, and
# new words around or between the parts. `make_rows` mixes them by `phrasing_weights`.
NEW_FRAMES = (
    (
        "hello, I need {items}, name {name}",
        "please, {items}, that's for {name}",
        "hi, the name is {name}, can I have {items}?",
        "this is {name}, {items}, thanks",
        "could I get {items}? for {name}, please",
        "I'm {name}, please make {items}",
    ),
    (
        "{name} will take {items}",
        "bring {items} to {name}",
        "{items} to go, {name} is my name",
        "may we order {items} on behalf of {name}?",
        "put {items} on the bill of {name}",
        "good morning, {items}, and the name's {name}",
    ),
    (
        "{name} just called and asked for {items}",
        "if you still have some, {items}, and then call {name}",
        "is it too late for {items}? {name} is on the way",
        "give me {items} and write {name} on the bag",
        "the usual for {name}, so that is {items}, right?",
        "a friend of mine, {name}, is waiting for {items}",
        "tell {other} that {name} wants {items}",
        "{items} for table 4, {name} sits there",
    ),
)

# A correction is said after the order and is about its *last* item (or about the name).
CORRECTIONS = {
    "count": ("no, make that {count}", "sorry, {count} of them", "wait, I want {count}"),
    "size": ("no, make that {size}", "sorry, {size} please", "wait, I want {size}"),
    "add": ("oh, and with {mod}", "and add {mod}"),
}
NEW_CORRECTIONS = {
    "count": ("hm, better {count}", "on second thought {count}"),
    "size": ("hm, better {size}", "on second thought {size}"),
    "item": ("no, make that {item}", "sorry, I mean {item}"),
    "name": ("no, make that for {name}", "sorry, the name is {name}"),
    "drop": ("oh, and leave out the {mod}", "no, without {mod}"),
}

# --- How hard it is: every dial in one place -------------------------------------------------

TRAIN_ITEMS = {1: 80, 2: 20}  # share of training (and "seen") orders by number of items
TEST_ITEMS = {1: 1}  # the other grades hold one item: each asks one question only
LONG_ITEMS = (3,)  # numbers of items in "longer"; all above what training has
TRAIN_CORRECTIONS = 0.12  # share of training orders that take something back
NEW_CORRECTION_SHARE = 0.5  # share of "corrections" that training shows nothing like
PHRASING_WEIGHTS = (1, 1, 1)  # shares of the three steps of NEW_FRAMES in "phrasings"
WAYS = {"before": 80, "after": 10, "of them": 10}  # where the size and the number stand

GRADES = ("seen", "pairs", "phrasings", "copying", "longer", "corrections")
GRADE_MEANING = {
    "seen": "names, items, (name, item) pairs and sentences all known; the order is new",
    "pairs": "the name and the item are known, never met together",
    "phrasings": "the sentence is new",
    "copying": "the name and the items are new words",
    "longer": "more items than any training order has",
    "corrections": "the customer takes something back, often in a new way",
}

# --- 1. Draw an order ------------------------------------------------------------------------


def held_out(name: str, item: str) -> bool:
    """Whether a (name, item) pair is kept out of training.

    Every fourth pair is, along diagonals: each name still meets three quarters of the items
    and each item three quarters of the names. A pair of new words is never "held out": it
    belongs to the grade "copying" as a whole.

    Args:
        name: One of `NAMES` or `NEW_NAMES`.
        item: One of `ITEMS` or `NEW_ITEMS`.

    Returns:
        True for the pairs that only the grade "pairs" may use.
    """
    if name not in NAMES or item not in ITEMS:
        return False
    return (NAMES.index(name) + ITEMS.index(item)) % 4 == 0


def _known(name: str, item: str) -> bool:
    return not held_out(name, item)


def draw_order(
    rng: random.Random,
    n_items: int,
    names: Sequence[str] = NAMES,
    items: Sequence[str] = ITEMS,
    allowed: Callable[[str, str], bool] = _known,
) -> Order:
    """Draw one order: what the customer wants, before anything is said.

    Args:
        rng: Source of randomness.
        n_items: Number of different items, at least 1.
        names: Names to draw from.
        items: Items to draw from.
        allowed: Which (name, item) pairs may be drawn; those of training by default.

    Returns:
        `{"name": str, "items": [{"count": int, "size": str | None, "item": str,
        "with": [str, ...]}, ...]}`.
    """
    name = rng.choice(names)
    chosen = rng.sample([item for item in items if allowed(name, item)], n_items)
    return {"name": name, "items": [_draw_item(rng, item) for item in chosen]}


def _draw_item(rng: random.Random, item: str) -> Order:
    size = None if rng.random() < 0.15 else rng.choice(SIZES)
    n_mods = rng.choices((0, 1, 2), weights=(52, 37, 11))[0]
    count = rng.randint(1, len(NUMBERS))
    mods = rng.sample(MODIFIERS, n_mods)
    while len({_substance(mod) for mod in mods}) < n_mods:  # not "no ice and extra ice"
        mods = rng.sample(MODIFIERS, n_mods)
    mods.sort(key=lambda mod: mod.startswith("no "))  # "with no ice and honey" would be unclear
    return {"count": count, "size": size, "item": item, "with": mods}


def _substance(modifier: str) -> str:
    return modifier.split()[-1]


# --- 2. Say it -------------------------------------------------------------------------------


def say_item(rng: random.Random, item: Order) -> str:
    """Say one item as a customer would, in one of three ways.

    "two large lattes with honey", "two lattes, large, with honey" or "large lattes, two of them,
    with honey"; the first is twice as common as the others together.
    """
    count, size, noun = item["count"], item["size"], _plural(item["item"], item["count"])
    way = _weighted(rng, WAYS)
    if count == 1 and way == "of them":  # nobody says "a latte, one of them"
        way = "before"
    number = str(count) if rng.random() < 0.3 else NUMBERS[count - 1]
    if way != "of them" and rng.random() < 0.25:
        number = ROUNDABOUT.get(count, number)
    parts = {
        "before": [" ".join(filter(None, (number, size, noun)))],
        "after": [f"{number} {noun}", size],
        "of them": [" ".join(filter(None, (size, noun))), f"{number} of them"],
    }[way]
    mods = _say_modifiers(rng, item["with"])
    if way == "before":
        return " ".join(filter(None, (*parts, mods)))
    return ", ".join(filter(None, (*parts, mods)))


def _say_modifiers(rng: random.Random, mods: Sequence[str]) -> str:
    """ "with honey and no ice", or "with honey and without ice"."""
    said = []
    for mod in mods:
        without = mod.startswith("no ") and rng.random() < 0.5
        said.append(mod.replace("no ", "without ") if without else f"with {mod}")
    return " and ".join(said).replace(" and with ", " and ")


def _plural(item: str, count: int) -> str:
    return item if count == 1 else item + "s"  # the menu has no irregular plurals


def say_order(rng: random.Random, order: Order, frame: str, other: str = "") -> str:
    """Put an order into a sentence frame.

    Args:
        rng: Source of randomness (numbers as words or digits, order of the words).
        order: What `draw_order` gives.
        frame: A sentence with the fields `{name}` and `{items}`, and perhaps `{other}`.
        other: A second name, of someone whom the order is not for.

    Returns:
        The sentence, without a line break.
    """
    phrases = [say_item(rng, item) for item in order["items"]]
    listed = phrases[0]
    if len(phrases) > 1:
        listed = ", ".join(phrases[:-1]) + ", and " + phrases[-1]
    return frame.format(items=listed, name=order["name"], other=other)


def correct(rng: random.Random, order: Order, kind: str, phrase: str) -> tuple[str, Order] | None:
    """Take something back: what the customer adds, and the order that is then meant.

    Args:
        rng: Source of randomness.
        order: The order as first said; it is not changed.
        kind: "count", "size", "add", "drop", "item" or "name".
        phrase: How it is said, with the field of that kind.

    Returns:
        The words to append and the order meant at last, or None where the kind has nothing
        to act on (no size to change, no modifier to drop).
    """
    order = json.loads(json.dumps(order))
    last = order["items"][-1]
    others = {item["item"] for item in order["items"]}
    added = [mod for mod in last["with"] if not mod.startswith("no ")]
    said: dict[str, str] = {}
    if kind == "count":
        last["count"] = _other(rng, range(1, len(NUMBERS) + 1), last["count"])
        said["count"] = NUMBERS[last["count"] - 1]
    elif kind == "size" and last["size"]:
        last["size"] = said["size"] = _other(rng, SIZES, last["size"])
    elif kind == "add":
        there = {_substance(mod) for mod in last["with"]}
        more = [mod for mod in MODIFIERS if _substance(mod) not in there]
        said["mod"] = rng.choice([mod for mod in more if not mod.startswith("no ")])
        last["with"].append(said["mod"])
    elif kind == "drop" and added:  # nobody leaves out "no ice"
        said["mod"] = rng.choice(added)
        last["with"].remove(said["mod"])
    elif kind == "item":
        known = [i for i in ITEMS if i not in others and not held_out(order["name"], i)]
        last["item"] = rng.choice(known)
        said["item"] = _plural(last["item"], last["count"])
    elif kind == "name":
        known = [n for n in NAMES if n != order["name"] and not any(held_out(n, i) for i in others)]
        order["name"] = said["name"] = rng.choice(known)
    return (phrase.format(**said), order) if said else None


def _other(rng: random.Random, values: Iterable, old: Any) -> Any:
    return rng.choice([value for value in values if value != old])


def to_json(order: Order) -> str:
    """Write an order as the model has to: one line of JSON without spaces."""
    return json.dumps(order, separators=(",", ":"), ensure_ascii=False)


def is_order(answer: str) -> bool:
    """Say whether an answer is an order: JSON with a name and items that have all four fields."""
    try:
        order = json.loads(answer)
    except (ValueError, RecursionError):
        return False
    items = order.get("items") if isinstance(order, dict) else None
    return (
        isinstance(items, list)
        and len(items) > 0
        and all(isinstance(i, dict) and {"count", "size", "item", "with"} <= set(i) for i in items)
        and "name" in order
    )


# --- 3. Sort into splits ---------------------------------------------------------------------


def make_rows(
    grade: str,
    count: int,
    seed: int = 0,
    avoid: Iterable[Row] = (),
    phrasing_weights: Sequence[int] = PHRASING_WEIGHTS,
    long_items: Sequence[int] = LONG_ITEMS,
    new_corrections: float = NEW_CORRECTION_SHARE,
) -> list[Row]:
    """Make the examples of one grade, or of training ("train").

    The last three arguments set how hard the grades are whose difficulty is a choice.

    Args:
        grade: "train" or one of `GRADES`.
        count: How many rows.
        seed: Same seed, same rows, on every machine and Python version.
        avoid: Rows whose sentences and answers must not appear again.
        phrasing_weights: Share of the three steps of `NEW_FRAMES` in "phrasings".
        long_items: Numbers of items in "longer" (training has 1 or 2).
        new_corrections: Share of "corrections" made by `NEW_CORRECTIONS` (kinds and wordings
            that training never shows); the rest is as in training.

    Returns:
        Rows with the string fields "text" (the sentence), "answer" (JSON), "grade", "frame"
        and "correction" (its kind, "" where there is none).

    Raises:
        InputError: If the grade is unknown or the count is not positive.
    """
    if grade not in ("train", *GRADES):
        raise InputError(
            f"grade {shown(grade)} is unknown; choose train or one of {', '.join(GRADES)}"
        )
    whole("count", count)
    whole("seed", seed, 0)
    rng = random.Random(f"orders/{seed}/{grade}")
    taken = {row[field] for row in avoid for field in ("text", "answer")}
    rows: list[Row] = []
    while len(rows) < count:
        row = _draw_row(rng, grade, phrasing_weights, long_items, new_corrections)
        if row is None or row["text"] in taken or row["answer"] in taken:
            continue
        # Two ways to say one order may both be trained on, but no sentence comes twice.
        taken.add(row["text"])
        rows.append(row)
    return rows


def _draw_row(
    rng: random.Random,
    grade: str,
    phrasing_weights: Sequence[int],
    long_items: Sequence[int],
    new_corrections: float,
) -> Row | None:
    as_in_training = grade in ("train", "seen")
    n_items = _weighted(rng, TRAIN_ITEMS if as_in_training else TEST_ITEMS)
    if grade == "longer":
        n_items = rng.choice(long_items)

    names, items = (NEW_NAMES, NEW_ITEMS) if grade == "copying" else (NAMES, ITEMS)
    allowed = held_out if grade == "pairs" else _known
    order = draw_order(rng, n_items, names, items, allowed)
    ordered = [item["item"] for item in order["items"]]
    others = [n for n in names if n != order["name"] and all(allowed(n, i) for i in ordered)]

    frame = rng.choice(FRAMES)
    if grade == "phrasings":
        frame = rng.choice(rng.choices(NEW_FRAMES, weights=phrasing_weights)[0])
    if not others:  # too many items for a second name that was never kept apart from them
        return None
    text = say_order(rng, order, frame, rng.choice(others))

    kind = ""
    if grade == "corrections" or (as_in_training and rng.random() < TRAIN_CORRECTIONS):
        new = grade == "corrections" and rng.random() < new_corrections
        phrases = NEW_CORRECTIONS if new else CORRECTIONS
        kind = rng.choice(list(phrases))
        corrected = correct(rng, order, kind, rng.choice(phrases[kind]))
        if corrected is None:
            return None
        words_after, order = corrected
        text += (" " if text.endswith("?") else ", ") + words_after
        kind = f"new {kind}" if new else kind
    return {
        "text": text,
        "answer": to_json(order),
        "grade": grade,
        "frame": frame,
        "correction": kind,
    }


def _weighted(rng: random.Random, weights: dict[Any, int]) -> Any:
    return rng.choices(list(weights), weights=list(weights.values()))[0]


def make_splits(
    seed: int = 0, train: int = 6000, validation: int = 200, test: int = 100
) -> dict[str, list[Row]]:
    """Make all splits of the orders task; no sentence and no answer is in two of them.

    Args:
        seed: Seed of every split.
        train: Rows for training.
        validation: Rows for validation, drawn as the training rows are.
        test: Rows of each of the six grades.

    Returns:
        The splits "train", "validation" and one per grade.
    """
    splits = {"train": make_rows("train", train, seed)}
    taken = list(splits["train"])
    met = {pair for row in taken for pair in pairs(row)}
    drawn = make_rows("train", validation, seed + 1, avoid=taken)
    splits["validation"] = [row | {"grade": "validation"} for row in drawn]
    taken += splits["validation"]
    for grade in GRADES:
        # A known pair that training happens not to draw is not known: leave its rows out.
        drawn = make_rows(grade, 2 * test, seed, avoid=taken)
        known = grade not in ("pairs", "copying")
        splits[grade] = [row for row in drawn if not known or pairs(row) <= met][:test]
        taken += splits[grade]
    return splits


def pairs(row: Row) -> set[tuple[str, str]]:
    """The (name, item) pairs of a row's answer."""
    order = json.loads(row["answer"])
    return {(order["name"], item["item"]) for item in order["items"]}


# --- The other tasks -------------------------------------------------------------------------


def ticket(order: Order) -> str:
    """Write an order as a kitchen ticket, the second output format: one line.

    Args:
        order: A parsed answer.

    Returns:
        For example `2 latte/large +oat milk | 1 tea > Anna`.
    """
    lines = []
    for item in order["items"]:
        size = f"/{item['size']}" if item["size"] else ""
        mods = "".join(f" +{mod}" for mod in item["with"])
        lines.append(f"{item['count']} {item['item']}{size}{mods}")
    return f"{' | '.join(lines)} > {order['name']}"


def ticket_rows(rows: Iterable[Row]) -> list[Row]:
    """Copy rows with the kitchen ticket as the answer; the sentences stay the same.

    Raises:
        InputError: A row's answer is no order.
    """
    needs("rows", rows)
    tickets = []
    for row in rows:
        (answer,) = texts_of(row, "answer")
        if not is_order(answer):
            raise InputError(f"the answer {shown(answer)} is no order, so it has no ticket")
        tickets.append({**row, "answer": ticket(json.loads(answer))})
    return tickets


def chat_rows(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Copy rows as chat messages, the form that chat templates and `trl` read.

    Args:
        rows: Rows of any split.

    Returns:
        `{"messages": [{"role": "user", ...}, {"role": "assistant", ...}], "grade": str}`.

    Raises:
        InputError: A row lacks its text, its answer or its grade.
    """
    needs("rows", rows)
    rows = list(rows)
    for row in rows:
        texts_of(row, "text", "answer", "grade")
    return [
        {
            "messages": [
                {"role": "user", "content": row["text"]},
                {"role": "assistant", "content": row["answer"]},
            ],
            "grade": row["grade"],
        }
        for row in rows
    ]


COLOURS = tuple(
    """
    amber black blue brown copper coral cream crimson dark dusty empty faded gold gray green
    heavy hidden high hollow huge ivory jade large lemon light lilac lime long loud low maroon
    new old olive orange pale pink plain purple quiet red rough round ruby rusty sharp short
    silver small smooth soft spare square steel striped tall tan teal thick thin tiny warm
    white yellow
    """.split()
)
THINGS = tuple(
    """
    anchor apron arrow badge bag ball barrel basket bell belt boat book bottle bowl box bridge
    broom brush bucket button cable candle cart chain chair clock coat comb crate cup desk door
    drum fan flag flute fork gate glove hammer hat key kite knife ladder lamp lock map mask
    mirror nail needle paddle pen pipe plate ring rope saw shelf spoon table tent wheel
    """.split()
)
MEMORY_SIZES = (64, 4096)


def memory_rows(count: int, seed: int = 0) -> list[Row]:
    """Make the memory task: a thing has a random 4-digit code, with nothing to infer it from.

    Recall needs about 13 bits of storage a pair (log2 of 10,000), so it shows what the rank
    of an adapter limits; the orders show what it does not. A smaller task is the beginning of a
    larger one with the same seed.

    Args:
        count: Number of pairs, 64 to 4096.
        seed: Seed of the codes and of which things come first.

    Returns:
        Rows whose "text" is such as "code of the red lamp" and whose "answer" is four digits.

    Raises:
        InputError: If the count is outside 64..4096, or the seed is no whole number from 0 on.
    """
    whole("count", count, *MEMORY_SIZES)
    whole("seed", seed, 0)
    rng = random.Random(f"memory/{seed}")
    things = [f"{colour} {thing}" for colour, thing in product(COLOURS, THINGS)]
    rng.shuffle(things)
    codes = [f"{rng.randrange(10_000):04d}" for _ in things]
    return [
        {"text": f"code of the {thing}", "answer": code, "grade": "memory"}
        for thing, code in zip(things[:count], codes, strict=False)
    ]
