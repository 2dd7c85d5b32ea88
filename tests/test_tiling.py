"""The tiling rule against transformers' own code: vLLM counts what the model gives, a shrunk image is seen alike.

Tokens are counted by LLaVA-NeXT's processor, as vLLM counts them, and features unpadded by LLaVA-OneVision's model.
"""

import json
import math
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch  # before transformers, whose import order fails without it
from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image

from pipeline.tiling import MAX_TILES, R4B_TILING, Tiling, tiling_of_config

CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "r4b-shapes" / "config.json"
CONFIG = json.loads(CHECKPOINT.read_text(encoding="utf-8"))
R4B = Tiling(tuple((384 * h, 384 * w) for h in range(1, 7) for w in range(1, 7)), 384, 14)
SMALL = tiling_of_config(CONFIG)
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


def sizes_of_all_scales(count: int) -> list[tuple[int, int]]:
    """Photos, banners, icons: half of them of any shape from 1 x 1 to 20,000 x 20,000."""
    rng = random.Random(1)
    odd = [(int(10 ** rng.uniform(0, 4.3)), int(10 ** rng.uniform(0, 4.3))) for _ in range(count // 2)]
    return [*SIZES, *random_sizes(count // 2), *odd]


def pinpoints(tiling: Tiling) -> list[list[int]]:
    return [list(grid) for grid in tiling.pinpoints]


def shrinks(tiling: Tiling, width: int, height: int) -> bool:
    """The condition as transformers' pack_image_features computes it, on a tensor of the real shape."""
    grid_height, grid_width = select_best_resolution((height, width), pinpoints(tiling))
    shape = (1, grid_height // tiling.tile * tiling.patches, grid_width // tiling.tile * tiling.patches)
    _, rows, columns = unpad_image(torch.empty(shape), (height, width)).shape
    return math.sqrt(rows * columns / (MAX_TILES * tiling.patches**2)) > 1.1


def processor_of(tiling: Tiling) -> Any:
    """LLaVA-NeXT's processor without a tokenizer, which counting does not use."""
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.image_processor = LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints(tiling))
    processor.patch_size, processor.num_additional_image_tokens = tiling.patch, 0
    return processor


def count_tokens(processor: Any, tiling: Tiling, size: tuple[int, int]) -> int:
    return int(processor._get_number_of_features(size[1], size[0], tiling.tile, tiling.tile))


def resized_by_processor(tiling: Tiling, size: tuple[int, int]) -> tuple[int, int]:
    """The (width, height) inside the grid; the image has a shape only, no memory."""
    image = np.broadcast_to(np.uint8(0), (3, size[1], size[0]))
    grid = select_best_resolution((size[1], size[0]), pinpoints(tiling))
    height, width = get_patch_output_size(image, grid, ChannelDimension.FIRST)
    return width, height


@pytest.mark.parametrize(("width", "height"), [*SIZES, *random_sizes(300)])
def test_is_shrunk_agrees_with_transformers(width: int, height: int) -> None:
    assert R4B.best_grid(width, height) == select_best_resolution((height, width), pinpoints(R4B))
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


@pytest.mark.parametrize("tiling", [R4B, SMALL], ids=["R-4B", "small checkpoint"])
def test_count_tokens_agrees_with_transformers(tiling: Tiling) -> None:
    processor = processor_of(tiling)
    for size in sizes_of_all_scales(2000):
        assert tiling.count_tokens(*size) == count_tokens(processor, tiling, size), size


@pytest.mark.parametrize("tiling", [R4B, SMALL], ids=["R-4B", "small checkpoint"])
def test_shrink_keeps_grid_and_tokens_of_fit_and_never_enlarges(tiling: Tiling) -> None:
    processor = processor_of(tiling)
    for size in sizes_of_all_scales(4000):
        fitted, shrunk = tiling.fit(*size), tiling.shrink(*size)
        assert count_tokens(processor, tiling, shrunk) == count_tokens(processor, tiling, fitted), size
        grids = [select_best_resolution((height, width), pinpoints(tiling)) for width, height in (fitted, shrunk)]
        assert grids[0] == grids[1], size
        assert shrunk[0] <= size[0], size
        assert shrunk[1] <= size[1], size
        assert tiling.fit(*shrunk) == tiling.shrink(*shrunk) == shrunk, size


@pytest.mark.parametrize("tiling", [R4B, SMALL], ids=["R-4B", "small checkpoint"])
def test_shrink_goes_down_to_what_the_processor_keeps(tiling: Tiling) -> None:
    for size in sizes_of_all_scales(2000):
        fitted, shrunk = tiling.fit(*size), tiling.shrink(*size)
        kept = resized_by_processor(tiling, fitted)
        expected = fitted if kept[0] >= fitted[0] or kept[1] >= fitted[1] else kept
        assert 0 <= expected[0] - shrunk[0] <= 1, size
        assert 0 <= expected[1] - shrunk[1] <= 1, size


@pytest.mark.parametrize(
    ("tiling", "size", "shrunk"),
    [
        (R4B, (640, 480), (640, 480)),
        (R4B, (5000, 3400), (1152, 783)),
        (R4B, (5000, 300), (2304, 139)),
        (R4B, (10_000, 10_000), (1152, 1152)),
        (SMALL, (112, 112), (112, 112)),
        (SMALL, (640, 480), (168, 126)),
        (SMALL, (5000, 100), (336, 7)),
        (SMALL, (5000, 10), (56, 1)),
    ],
)
def test_shrink_of_known_sizes(tiling: Tiling, size: tuple[int, int], shrunk: tuple[int, int]) -> None:
    assert tiling.shrink(*size) == shrunk


def test_tiling_of_config_reads_the_small_checkpoint() -> None:
    assert SMALL is not None
    assert (SMALL.tile, SMALL.patch, SMALL.patches) == (56, 14, 4)
    assert pinpoints(SMALL) == CONFIG["image_grid_pinpoints"]


@pytest.mark.parametrize("architectures", [None, [], ["Qwen3ForCausalLM"]])
def test_tiling_of_config_of_another_model_is_none(architectures: list[str] | None) -> None:
    assert tiling_of_config({**CONFIG, "architectures": architectures}) is None
    assert tiling_of_config({}) is None


@pytest.mark.parametrize("tiling", [R4B_TILING, SMALL])
def test_tiling_can_be_hashed_and_pickled(tiling: Tiling) -> None:
    assert pickle.loads(pickle.dumps(tiling)) == tiling
    assert len({tiling, pickle.loads(pickle.dumps(tiling))}) == 1


def test_r4b_tiling_is_the_published_grid() -> None:
    assert R4B_TILING == R4B
