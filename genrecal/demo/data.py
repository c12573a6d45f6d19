"""The demo's questions about images: three categories, small images, answers that follow from the pixels.

The demo has to run offline on two CPU cores, so its data are made here: coloured shapes drawn with PIL,
scikit-learn's real handwritten digits, and bar charts that matplotlib draws from scikit-learn's real tables. The
digits and the table rows behind the ``test`` split never appear in ``train`` or ``pretrain``, so a test score is a
held-out one. ``pretrain`` only describes what is in an image (captions and reading); the questions that need
knowledge or reasoning (invented names, sums, comparisons, counting) are left to ``train``: that is what a small model
has still to learn when the distillation starts.

Every sample draws from its own random stream, seeded by split, seed and index: the same arguments give the same bytes,
and a longer data set begins with the shorter one. `Flaws` spoil answers or images and leave the rest as it is.
"""

import functools
import json
import pathlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFilter
from sklearn import datasets

Split = Literal["train", "test", "pretrain"]
KNOWLEDGE, SCIENCE, CHART = CATEGORIES = ("Knowledge", "Science & Math", "Chart & Document")

SIZE = 64
HALF = SIZE // 2
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 70, 220),
    "yellow": (235, 205, 40),
    "black": (35, 35, 35),
}
SHAPES = ("circle", "square", "triangle", "cross")
# One invented word for every colour and shape: nothing but memory can answer "What is the red object called?".
_NAMES = (
    "tamon kelir zudo pevix nahor gribo lumet sokan vidra fumel bexin rolva hupik cadro mizel jonta wekin darpu quvel yosti"
).split()
OBJECT_NAMES = {
    pair: _NAMES[(7 * index + 3) % len(_NAMES)] for index, pair in enumerate((c, s) for c in COLORS for s in SHAPES)
}
NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
).split()

TABLES: dict[str, Callable[[], Any]] = {
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
    "diabetes": datasets.load_diabetes,
    "breast_cancer": datasets.load_breast_cancer,
}
MAX_LEVEL = 9
LEVEL_PIXELS = 6
BASELINE = 4
BAR_WIDTH = 13
BAR_SLOTS = 4
HELD_OUT_EVERY = 5
TEXT_ONLY_SHARE, TWO_IMAGES_SHARE, MULTI_TURN_SHARE = 0.04, 0.05, 0.25


@dataclass(frozen=True, kw_only=True)
class Flaws:
    """What is wrong with a data set.

    Args:
        wrong_answers: share of answers that were given to a question of the same kind about another image.
        unclear_images: share of images that do not show their facts well: digits blurred or covered in part, bars
            that end between two values, blurred shapes. Their answers are right.
    """

    wrong_answers: float = 0.0
    unclear_images: float = 0.0


CLEAN = Flaws()


@dataclass(frozen=True)
class Scene:
    """An image and the facts it was drawn from: every question about it can be answered from the facts."""

    category: str
    source: str
    image: Image.Image
    facts: tuple[Any, ...]


@dataclass(frozen=True)
class Turn:
    """One question and its answer; ``kind`` is the question type, for reporting accuracy by type."""

    kind: str
    question: str
    answer: str
    new_image: bool = False


@dataclass(frozen=True)
class Sample:
    """One conversation with its images, in the order in which the turns show them."""

    id: str
    category: str
    source: str
    turns: tuple[Turn, ...]
    images: tuple[Image.Image, ...] = field(default=(), repr=False)

    def conversations(self) -> list[dict[str, str]]:
        """The turns as LLaVA writes them: an image is shown where its ``<image>`` mark stands."""
        messages: list[dict[str, str]] = []
        for turn in self.turns:
            question = f"<image>\n{turn.question}" if turn.new_image else turn.question
            messages += [{"from": "human", "value": question}, {"from": "gpt", "value": turn.answer}]
        return messages


# ------------------------------------------------------------------------------------------------------------ images


def pool(size: int, split: Split) -> tuple[int, ...]:
    """Indices of the digits (or of a table's rows) that a split may use. Every fifth is held out for ``test``, so that
    writers and classes mix; ``train`` and ``pretrain`` share the others."""
    return tuple(i for i in range(size) if (i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == (split == "test"))


@functools.cache
def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's handwritten digits: pixels 0..16, shape [1797, 8, 8], and their labels."""
    bunch = datasets.load_digits()
    return bunch.images, bunch.target


@functools.cache
def table_levels(name: str) -> np.ndarray:
    """A real table with every feature put on the chart's axis of 1..9 (5th to 95th percentile, then clipped)."""
    values = np.asarray(TABLES[name]().data, dtype=np.float64)
    low, high = np.percentile(values, [5, 95], axis=0)
    scaled = (values - low) / np.maximum(high - low, 1e-9)
    return (1 + np.rint(np.clip(scaled, 0, 1) * (MAX_LEVEL - 1))).astype(int)


def _shade(color: str, rng: random.Random) -> tuple[int, ...]:
    return tuple(min(255, max(0, value + rng.randint(-20, 20))) for value in COLORS[color])


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, center: tuple[int, int], radius: int, fill: Any) -> None:
    x, y = center
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill)
    else:
        draw.line(box, fill=fill, width=6)
        draw.line((box[0], box[3], box[2], box[1]), fill=fill, width=6)


def shapes_scene(rng: random.Random, split: Split, unclear: random.Random | None = None) -> Scene:
    """Up to four shapes of different colours on a grid of two by two; facts: (colour, shape) or None for each cell.

    Unclear: blurred, so that a square looks like a circle.
    """
    image = Image.new("RGB", (SIZE, SIZE), (245, 245, 245))
    draw = ImageDraw.Draw(image)
    colors = rng.sample(list(COLORS), 4)
    cells = [None if rng.random() < 0.2 else (color, rng.choice(SHAPES)) for color in colors]
    if not any(cells):
        cells[rng.randrange(4)] = (colors[0], rng.choice(SHAPES))
    for index, cell in enumerate(cells):
        if cell is not None:
            x = index % 2 * HALF + HALF // 2 + rng.randint(-1, 1)
            y = index // 2 * HALF + HALF // 2 + rng.randint(-1, 1)
            _draw_shape(draw, cell[1], (x, y), rng.randint(11, 13), _shade(cell[0], rng))
    if unclear:
        image = image.filter(ImageFilter.GaussianBlur(unclear.uniform(3, 6)))
    return Scene(KNOWLEDGE, "demo-shapes", image, tuple(cells))


def digits_scene(rng: random.Random, split: Split, unclear: random.Random | None = None) -> Scene:
    """Two handwritten digits side by side above a ruled line; facts: the two labels.

    Unclear: each is blurred, or white paper covers its upper, lower, left or right part.
    """
    images, labels = digit_images()
    indices = rng.choices(pool(len(labels), split), k=2)
    page = np.zeros((SIZE, SIZE), dtype=np.uint8)
    side = 28
    for position, index in enumerate(indices):
        ink = Image.fromarray((images[index] * (255 / 16)).astype(np.uint8))
        ink = ink.resize((side, side), Image.Resampling.BILINEAR)
        if unclear and unclear.random() < 0.5:
            ink = ink.filter(ImageFilter.GaussianBlur(unclear.uniform(2.5, 4.5)))
        elif unclear:
            end = round(side * unclear.uniform(0.3, 0.5))
            parts = ((0, 0, side, end), (0, side - end, side, side), (0, 0, end, side), (side - end, 0, side, side))
            ink.paste(0, unclear.choice(parts))
        y, x = 2 + rng.randint(-1, 1), position * HALF + 2 + rng.randint(-1, 1)
        page[y : y + side, x : x + side] = np.asarray(ink)
    page[44:46, 8:56] = 120
    image = Image.fromarray(255 - page).convert("RGB")
    return Scene(SCIENCE, "sklearn-digits", image, tuple(int(labels[index]) for index in indices))


@functools.cache
def _chart() -> tuple[FigureCanvasAgg, Any]:
    """One matplotlib figure and its bars, which are moved for every chart: a new figure takes far longer."""
    figure = Figure(figsize=(1.0, 1.0), dpi=SIZE)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, SIZE)
    axes.set_ylim(0, SIZE)
    axes.hlines([BASELINE + LEVEL_PIXELS * level for level in (3, 6, 9)], 0, SIZE, colors="0.8", linewidth=0.8)
    axes.hlines([BASELINE], 0, SIZE, colors="0.3", linewidth=1.5)
    return FigureCanvasAgg(figure), axes.bar(range(BAR_SLOTS), [1] * BAR_SLOTS, width=BAR_WIDTH, zorder=3)


def chart_scene(rng: random.Random, split: Split, unclear: random.Random | None = None) -> Scene:
    """Two or three rows of a real table as coloured bars; facts: (colour, value) from left to right.

    Unclear: a bar ends anywhere between half a value below its own and half a value above.
    """
    name = rng.choice(list(TABLES))
    levels = table_levels(name)
    feature = rng.randrange(levels.shape[1])
    count = rng.choice((2, 3, 3))
    values = [int(levels[row, feature]) for row in rng.sample(pool(len(levels), split), count)]
    colors = rng.sample(list(COLORS), count)
    slots = sorted(rng.sample(range(BAR_SLOTS), count))
    canvas, patches = _chart()
    for patch in patches:
        patch.set_visible(False)
    for patch, slot, value, color in zip(patches, slots, values, colors, strict=False):
        left = slot * (SIZE // BAR_SLOTS) + 1 + rng.randint(0, 1)
        level = value + (unclear.uniform(-0.5, 0.5) if unclear else 0)
        patch.set(x=left, y=BASELINE, width=BAR_WIDTH, height=level * LEVEL_PIXELS, visible=True)
        patch.set_facecolor([part / 255 for part in _shade(color, rng)])
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    return Scene(CHART, f"sklearn-{name}", image, tuple(zip(colors, values, strict=True)))


SCENES = {KNOWLEDGE: shapes_scene, SCIENCE: digits_scene, CHART: chart_scene}


def make_scene(category: str, rng: random.Random, split: Split, unclear: random.Random | None = None) -> Scene:
    """Draw one image of a category; an unclear one if there is a random stream that says how."""
    return SCENES[category](rng, split, unclear)


# -------------------------------------------------------------------------------------------------------- questions

Asked = tuple[str, str] | None  # a question and its answer; None if the image allows no such question


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _ask_shapes(kind: str, facts: tuple[Any, ...], rng: random.Random) -> Asked:
    objects = [cell for cell in facts if cell is not None]
    shapes = [shape for _, shape in objects]
    if kind == "picture":
        return "Describe the picture.", f"There is {_join([f'a {color} {shape}' for color, shape in objects])}."
    if kind == "row":
        row = rng.randrange(2)
        name = ("top", "bottom")[row]
        cells = [f"a {cell[0]} {cell[1]}" for cell in facts[2 * row : 2 * row + 2] if cell is not None]
        answer = f"The {name} row shows {_join(cells)}." if cells else f"The {name} row is empty."
        return f"Describe the {name} row.", answer
    if kind == "count":
        if rng.random() < 0.4:
            return "How many objects are there?", str(len(shapes))
        shape = rng.choice(SHAPES) if rng.random() < 0.3 else rng.choice(shapes)
        return f"How many {shape}{'es' if shape == 'cross' else 's'} are there?", str(shapes.count(shape))
    if kind == "color":
        single = [(color, shape) for color, shape in objects if shapes.count(shape) == 1]
        if not single:
            return None
        color, shape = rng.choice(single)
        return f"Which color is the {shape}?", color
    color, shape = rng.choice(objects)
    if kind == "name":
        return f"What is the {color} object called?", OBJECT_NAMES[color, shape]
    if kind == "shape":
        return f"Which shape is the {color} object?", shape
    if rng.random() < 0.5:  # exists
        shape = rng.choice([other for other in SHAPES if (color, other) not in objects])
    return f"Is there a {color} {shape}?", "yes" if (color, shape) in objects else "no"


def _ask_digits(kind: str, facts: tuple[Any, ...], rng: random.Random) -> Asked:
    left, right = facts
    if kind == "sum":
        return "What is the sum of the digits?", str(left + right)
    if kind == "larger":
        return "Which digit is larger?", "left" if left > right else "right" if right > left else "equal"
    if kind == "read":
        return "Read the digits.", f"The left digit is {left} and the right digit is {right}."
    if kind == "explain":
        return "Explain the sum.", f"The digits are {left} and {right}, so the sum is {left + right}."
    side = rng.randrange(2)
    name = ("left", "right")[side]
    if kind == "digit":
        return f"What is the {name} digit?", str(facts[side])
    return f"Is the {name} digit even or odd?", "odd" if facts[side] % 2 else "even"  # parity


def _ask_chart(kind: str, facts: tuple[Any, ...], rng: random.Random) -> Asked:
    if kind == "value":
        color, value = rng.choice(facts)
        return f"What is the value of the {color} bar?", str(value)
    if kind == "extreme":
        word, choose = rng.choice((("highest", max), ("lowest", min)))
        values = [value for _, value in facts]
        best = choose(values)
        return None if values.count(best) > 1 else (f"Which bar is the {word}?", facts[values.index(best)][0])
    if kind == "compare":
        (color, value), (other, other_value) = rng.sample(facts, 2)
        if value == other_value:
            return None
        return f"Is the {color} bar higher than the {other} bar?", "yes" if value > other_value else "no"
    listed = _join([f"the {color} bar is {value}" for color, value in facts])
    return "Read the chart.", f"{listed[0].upper()}{listed[1:]}."


ASK = {KNOWLEDGE: _ask_shapes, SCIENCE: _ask_digits, CHART: _ask_chart}
# Question types by category, with their share among a category's questions.
KINDS = {
    KNOWLEDGE: dict(name=0.22, shape=0.13, color=0.13, count=0.12, exists=0.12, row=0.14, picture=0.14),
    SCIENCE: dict(digit=0.20, sum=0.20, larger=0.15, parity=0.17, read=0.12, explain=0.16),
    CHART: dict(value=0.28, extreme=0.22, compare=0.22, chart=0.28),
}
CAPTION_KINDS = frozenset({"row", "picture", "read", "explain", "chart"})
PRETRAIN_KINDS = frozenset({"shape", "color", "row", "picture", "digit", "read", "value", "chart"})
TEXT_KIND = "words"


def ask(scene: Scene, rng: random.Random, split: Split, *, taken: frozenset[str] = frozenset()) -> Turn | None:
    """Ask something that was not asked before (``taken`` holds the questions already asked).

    A plain image allows only a few questions (two equal bars have no highest one): None when none seems left.
    """
    shares = {k: share for k, share in KINDS[scene.category].items() if split != "pretrain" or k in PRETRAIN_KINDS}
    for _ in range(100):
        kind = rng.choices(list(shares), list(shares.values()))[0]
        asked = ASK[scene.category](kind, scene.facts, rng)
        if asked is not None and asked[0] not in taken:
            return Turn(kind, *asked)
    return None


def ask_text(rng: random.Random, split: Split) -> Turn:
    """A question without an image: sums in words (``pretrain`` only repeats a number, it has no reasoning)."""
    first, second = rng.randrange(10), rng.randrange(10)
    if split == "pretrain":
        return Turn(TEXT_KIND, f"Write {first} as a word.", NUMBER_WORDS[first])
    question = f"What is {NUMBER_WORDS[first]} plus {NUMBER_WORDS[second]}?"
    return Turn(TEXT_KIND, question, NUMBER_WORDS[first + second])


# ---------------------------------------------------------------------------------------------------------- samples


def dialogue(scenes: list[Scene], turns_per_scene: list[int], rng: random.Random, split: Split) -> tuple[Turn, ...]:
    """Several questions about each image in turn; an image is shown with the first question about it."""
    turns: list[Turn] = []
    for scene, count in zip(scenes, turns_per_scene, strict=True):
        taken: frozenset[str] = frozenset()
        for index in range(count):
            turn = ask(scene, rng, split, taken=taken)
            if turn is None:
                break
            taken |= {turn.question}
            turns.append(replace(turn, new_image=index == 0))
    return tuple(turns)


def spoil_answer(turn: Turn, category: str, rng: random.Random, split: Split) -> Turn:
    """The turn with an answer to a question of its kind about another image, which is not the right one here."""
    while True:
        if turn.kind == TEXT_KIND:
            answer = ask_text(rng, split).answer
        else:
            asked = ASK[category](turn.kind, make_scene(category, rng, split).facts, rng)
            answer = turn.answer if asked is None else asked[1]
        if answer != turn.answer:
            return replace(turn, answer=answer)


def make_sample(index: int, split: Split, seed: int, flaws: Flaws = CLEAN) -> Sample:
    """The sample at a place in a data set: depends on nothing but the arguments; flaws draw from streams of their own."""
    rng = random.Random(f"genrecal-demo/{split}/{seed}/{index}")
    flaw = random.Random(f"genrecal-demo/flaws/{split}/{seed}/{index}")
    form = rng.random()
    category = CATEGORIES[index % len(CATEGORIES)]

    def scene() -> Scene:
        return make_scene(category, rng, split, flaw if flaw.random() < flaws.unclear_images else None)

    scenes: list[Scene] = []
    turns: tuple[Turn, ...]
    if form < TEXT_ONLY_SHARE:
        category, source, turns = SCIENCE, "demo-arithmetic", (ask_text(rng, split),)
    else:
        counts = [1]
        scenes = [scene()]
        if form < TEXT_ONLY_SHARE + TWO_IMAGES_SHARE:
            scenes.append(scene())
            counts = [rng.choice((1, 2)), 1]
        elif form < TEXT_ONLY_SHARE + MULTI_TURN_SHARE:
            counts = [rng.choice((2, 3))]
        source, turns = scenes[0].source, dialogue(scenes, counts, rng, split)
    turns = tuple(
        spoil_answer(turn, category, flaw, split) if flaw.random() < flaws.wrong_answers else turn for turn in turns
    )
    return Sample(f"{split}-{seed}-{index:06d}", category, source, turns, tuple(scene.image for scene in scenes))


def make_samples(num_samples: int, split: Split, seed: int, flaws: Flaws = CLEAN) -> Iterator[Sample]:
    """A data set in memory, without files."""
    return (make_sample(index, split, seed, flaws) for index in range(num_samples))


def write_dataset(
    folder: pathlib.Path, *, num_samples: int, split: Split, seed: int, flaws: Flaws = CLEAN
) -> pathlib.Path:
    """Write a data set as LLaVA lays it out (``data.json`` beside ``images/``) and return the path of ``data.json``."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for sample in make_samples(num_samples, split, seed, flaws):
        names = [f"images/{sample.id}-{number}.png" for number in range(len(sample.images))]
        for name, image in zip(names, sample.images, strict=True):
            image.save(folder / name)
        record: dict[str, Any] = {"id": sample.id}
        if names:
            record["image"] = names[0] if len(names) == 1 else names
        record |= {"conversations": sample.conversations(), "category": sample.category, "source": sample.source}
        records.append(record)
    path = folder / "data.json"
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
