"""Drawn scenes of coloured shapes, with questions whose true answers are known.

The small checkpoint is trained on these scenes; the demo, the tests and the benchmarks draw from them. A seed
gives the same scene, the same pixels and the same questions on every machine with the pinned Pillow.
Not covered: anything that reads or writes files.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

GRID = 4
"""Scenes are laid out on GRID x GRID cells, read row by row."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (34, 150, 70),
    "blue": (40, 80, 210),
    "yellow": (240, 200, 30),
    "purple": (140, 60, 170),
    "orange": (245, 130, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
KINDS = ("caption", "color", "count", "count_color", "compare")
THINKING_KINDS = frozenset({"count", "count_color", "compare"})
"""Kinds that the checkpoint was trained to think about in `auto`; the others it answers directly."""

MIN_SHAPES, MAX_SHAPES = 6, 16
TRAIN_SEEDS = range(1_000_000, 1_000_000_000)
"""Scene seeds used for training. Everything below is held out."""

PHRASES: dict[str, tuple[str, ...]] = {
    "caption": ("Describe this image.", "Describe the picture.", "What does this image show?"),
    "color": ("What color is the {shape}?", "What colour is the {shape}?", "Name the color of the {shape}."),
    "count": ("How many shapes are there?", "Count the shapes.", "How many shapes does this image hold?"),
    "count_color": (
        "How many {a} shapes are there?",
        "Count the {a} shapes.",
        "How many shapes are {a}?",
    ),
    "compare": (
        "Are there more {a} shapes than {b} ones?",
        "Are there more {a} shapes than {b} shapes?",
        "Is {a} more common than {b}?",
    ),
}


@dataclass(frozen=True)
class Item:
    """One shape in one cell; `row` and `column` count from 0 at the top left."""

    row: int
    column: int
    color: str
    shape: str

    def __str__(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Shapes in reading order; the picture is `draw_scene(scene, size)`."""

    seed: int
    items: tuple[Item, ...]

    def row(self, index: int) -> list[Item]:
        return [item for item in self.items if item.row == index]

    def count(self, color: str) -> int:
        return sum(item.color == color for item in self.items)


@dataclass(frozen=True)
class Question:
    """A question about a scene, its true answer, and the thought that leads there."""

    kind: str
    text: str
    thought: str
    answer: str


def make_scene(seed: int) -> Scene:
    """The scene of this seed: MIN_SHAPES to MAX_SHAPES shapes in two or three colours."""
    rng = random.Random(f"scene:{seed}")
    palette = rng.sample(sorted(COLORS), rng.randint(2, 3))
    cells = sorted(rng.sample(range(GRID * GRID), rng.randint(MIN_SHAPES, MAX_SHAPES)))
    items = (Item(cell // GRID, cell % GRID, rng.choice(palette), rng.choice(SHAPES)) for cell in cells)
    return Scene(seed, tuple(items))


def draw_scene(scene: Scene, size: tuple[int, int] = (112, 112)) -> Image.Image:
    """Draw the scene as RGB at `size` (width, height) in pixels; position, size and shade vary with the seed."""
    rng = random.Random(f"draw:{scene.seed}")
    smooth = 2
    width, height = size[0] * smooth, size[1] * smooth
    image = Image.new("RGB", (width, height), tuple(rng.randint(228, 255) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    cell_width, cell_height = width / GRID, height / GRID
    for item in scene.items:
        radius = rng.uniform(0.30, 0.42)
        reach = 0.46 - radius
        x = (item.column + 0.5 + rng.uniform(-reach, reach)) * cell_width
        y = (item.row + 0.5 + rng.uniform(-reach, reach)) * cell_height
        shade = [min(255, max(0, value + rng.randint(-14, 14))) for value in COLORS[item.color]]
        _draw_shape(draw, item.shape, x, y, radius * cell_width, radius * cell_height, (shade[0], shade[1], shade[2]))
    return image.reduce(smooth)


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, rx: float, ry: float, fill: tuple[int, int, int]
) -> None:
    if shape == "circle":
        draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)
    elif shape == "square":
        draw.rectangle((x - 0.9 * rx, y - 0.9 * ry, x + 0.9 * rx, y + 0.9 * ry), fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - ry), (x + rx, y + ry), (x - rx, y + ry)], fill=fill)
    else:
        draw.rectangle((x - rx, y - 0.35 * ry, x + rx, y + 0.35 * ry), fill=fill)
        draw.rectangle((x - 0.35 * rx, y - ry, x + 0.35 * rx, y + ry), fill=fill)


def ask(scene: Scene, kind: str, variant: int = 0) -> Question:
    """One question of this kind; `variant` chooses wording and subject, the same every time."""
    rng = random.Random(f"ask:{scene.seed}:{kind}:{variant}")
    phrase = rng.choice(PHRASES[kind])
    if kind == "caption":
        listing = _list_rows(scene)
        return Question(kind, phrase, f"Let me look at each row. {listing}", listing)
    if kind == "color":
        name, color = _name_one_shape(scene, rng)
        return Question(kind, phrase.format(shape=name), f"The {name} is {color}.", color)
    if kind == "count":
        total = str(len(scene.items))
        return Question(kind, phrase, f"{_list_rows(scene, _number_all)} So {total}.", total)
    present = sorted({item.color for item in scene.items})
    if kind == "count_color":
        a = rng.choice(present) if rng.random() < 0.9 else rng.choice(sorted(COLORS))
        number = str(scene.count(a))
        return Question(kind, phrase.format(a=a), _count_aloud(scene, a), number)
    a, b = _pick_rivals(scene, present, rng)
    thought = f"{_count_aloud(scene, a)} {_count_aloud(scene, b)} So {a} {scene.count(a)}, {b} {scene.count(b)}."
    return Question(kind, phrase.format(a=a, b=b), thought, "Yes" if scene.count(a) > scene.count(b) else "No")


def _count_aloud(scene: Scene, color: str) -> str:
    """The steps of counting one colour; a comparison takes them twice, so that both share what is learned.

    The tally stands after every shape, counted or not: the next number depends on the last one and on one colour.
    """

    def keep_tally(item: Item, before: Sequence[Item]) -> str:
        return f"{item.color} {sum(other.color == color for other in (*before, item))}"

    return f"Count {color}: 0. {_list_rows(scene, keep_tally)} So {scene.count(color)}."


def _number_all(item: Item, before: Sequence[Item]) -> str:
    return f"{item} {len(before) + 1}"


def _list_rows(scene: Scene, name: Callable[[Item, Sequence[Item]], str] = lambda item, _: str(item)) -> str:
    """Row by row, what is there; `name` says an item, given those before it."""
    rows = []
    for index in range(GRID):
        names = [name(item, scene.items[: scene.items.index(item)]) for item in scene.row(index)]
        rows.append(f"Row {index + 1}: {', '.join(names) or 'nothing'}.")
    return " ".join(rows)


def _name_one_shape(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A shape that can be named without doubt, by where it stands, and its colour."""
    rows = [index for index in range(GRID) if scene.row(index)]
    names = {f"first shape in row {index + 1}": scene.row(index)[0].color for index in rows}
    names["first shape"] = scene.items[0].color
    name = rng.choice(sorted(names))
    return name, names[name]


def _pick_rivals(scene: Scene, present: Sequence[str], rng: random.Random) -> tuple[str, str]:
    """Two colours: as often "more" as "not more", and mostly close in number, so that looks alone do not tell."""
    colors = present if len(present) > 1 else sorted(COLORS)
    margins = {(a, b): scene.count(a) - scene.count(b) for a in colors for b in colors if a != b}
    more = rng.random() < 0.5
    pairs = [pair for pair, margin in margins.items() if (margin > 0) == more] or list(margins)
    close = [pair for pair in pairs if -1 <= margins[pair] <= 1]
    return rng.choice(close if close and rng.random() < 0.8 else pairs)
