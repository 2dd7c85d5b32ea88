"""The tiling rule against the model's own code: after `fit`, what vLLM counts is what the model gives."""

import math
import random

import pytest
import torch
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image

from pipeline.engine.tiling import MAX_TILES, Tiling

R4B = Tiling([[384 * h, 384 * w] for h in range(1, 7) for w in range(1, 7)], 384, 14)
SIZES = [
    (640, 480),
    (1280, 960),
    (1920, 1080),
    (1600, 1200),
    (791, 1153),
    (1, 1),
    (5000, 10),
    (4000, 3000),
    (2304, 2304),
]


def random_sizes(count: int) -> list[tuple[int, int]]:
    rng = random.Random(0)
    return [(rng.randint(1, 5000), rng.randint(1, 5000)) for _ in range(count)]


def shrinks(tiling: Tiling, width: int, height: int) -> bool:
    """The condition as transformers' pack_image_features computes it, on a tensor of the real shape."""
    grid_height, grid_width = select_best_resolution((height, width), [list(p) for p in tiling.pinpoints])
    shape = (1, grid_height // tiling.tile * tiling.patches, grid_width // tiling.tile * tiling.patches)
    _, rows, columns = unpad_image(torch.empty(shape), (height, width)).shape
    return math.sqrt(rows * columns / (MAX_TILES * tiling.patches**2)) > 1.1


@pytest.mark.parametrize(("width", "height"), [*SIZES, *random_sizes(300)])
def test_is_shrunk_agrees_with_transformers(width: int, height: int) -> None:
    assert R4B.best_grid(width, height) == select_best_resolution((height, width), [list(p) for p in R4B.pinpoints])
    assert R4B.is_shrunk(width, height) == shrinks(R4B, width, height)


@pytest.mark.parametrize(("width", "height"), [*SIZES, *random_sizes(300)])
def test_fit_leaves_nothing_to_shrink_and_small_images_alone(width: int, height: int) -> None:
    fitted = R4B.fit(width, height)
    assert not shrinks(R4B, *fitted)
    assert fitted == (width, height) or shrinks(R4B, width, height)
    assert fitted[0] <= width
    assert fitted[1] <= height
    if min(fitted) > 20:
        assert fitted[0] / fitted[1] == pytest.approx(width / height, rel=0.1)
