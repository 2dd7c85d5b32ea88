"""How R-4B cuts an image into tiles, and how large an image can be before the model sees no more of it.

R-4B shrinks the features of an image of more than nine tiles' worth (`anyres_max_9`), but vLLM 0.32 reserves tokens
for it as if it did not (RForConditionalGeneration counts as LLaVA-NeXT does, and merges as LLaVA-OneVision does). The
two then differ and the engine dies, with every request in it. So such an image is first made to fit nine tiles
(`fit`). Pixels beyond the grid's are thrown away by the image processor, so they need not travel there (`shrink`).
The invariant: `shrink` changes neither the grid nor the number of tokens of what `fit` gives, and enlarges nothing.
Not covered: the tiling itself, which vLLM does.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_TILES = 9
ARCHITECTURE = "RForConditionalGeneration"


@dataclass(frozen=True)
class Tiling:
    """A checkpoint's grids: `pinpoints` are (height, width) in pixels, `tile` and `patch` sides in pixels."""

    pinpoints: tuple[tuple[int, int], ...]
    tile: int
    patch: int

    @property
    def patches(self) -> int:
        """Patches along a tile's side; a tile of 384 holds 27 patches of 14, and a few pixels more."""
        return self.tile // self.patch

    def best_grid(self, width: int, height: int) -> tuple[int, int]:
        """The (height, width) in pixels that keeps most of the image and, of those, wastes least."""

        def rank(grid: tuple[int, int]) -> tuple[int, int]:
            scale = min(grid[1] / width, grid[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - grid[0] * grid[1]

        return max(self.pinpoints, key=rank)

    def feature_rows(self, width: int, height: int) -> tuple[int, int]:
        """The (rows, columns) of patches in the grid that the image covers, padding left out."""
        grid_height, grid_width = self.best_grid(width, height)
        rows, columns = grid_height // self.tile * self.patches, grid_width // self.tile * self.patches
        if width / height > columns / rows:
            rows -= 2 * ((rows - int(round(height * (columns / width), 7))) // 2)
        else:
            columns -= 2 * ((columns - int(round(width * (rows / height), 7))) // 2)
        return rows, columns

    def count_tokens(self, width: int, height: int) -> int:
        """Tokens that vLLM reserves: the image in one tile, its part of the grid, and a newline for each row."""
        rows, columns = self.feature_rows(width, height)
        return self.patches**2 + rows * columns + rows

    def is_shrunk(self, width: int, height: int) -> bool:
        """Whether the model would shrink this image's features, which vLLM does not expect."""
        rows, columns = self.feature_rows(width, height)
        return math.sqrt(rows * columns / (MAX_TILES * self.patches**2)) > 1.1

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) to give vLLM: the image's own, or the largest that nine tiles can hold."""
        if not self.is_shrunk(width, height):
            return width, height
        small = tuple(grid for grid in self.pinpoints if grid[0] * grid[1] <= MAX_TILES * self.tile**2)
        grid_height, grid_width = Tiling(small, self.tile, self.patch).best_grid(width, height)
        scale = min(grid_width / width, grid_height / height)
        return max(1, int(width * scale)), max(1, int(height * scale))

    def shrink(self, width: int, height: int) -> tuple[int, int]:
        """The largest (width, height) of which the model can see all; `fit` first, then what the processor keeps."""
        fitted = self.fit(width, height)
        kept = self._resized(*fitted)
        if kept[0] >= fitted[0] or kept[1] >= fitted[1]:
            return fitted
        # whole pixels have not quite the aspect of the original, which can cost or add a row of patches
        nearby = (kept, (kept[0], kept[1] - 1), (kept[0] - 1, kept[1]))
        return next((size for size in nearby if min(size) > 0 and self._is_seen_alike(size, fitted)), fitted)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) to which transformers' image processor resizes the image inside its grid."""
        grid_height, grid_width = self.best_grid(width, height)
        if grid_width / width < grid_height / height:
            return grid_width, min(math.ceil(height * (grid_width / width)), grid_height)
        return min(math.ceil(width * (grid_height / height)), grid_width), grid_height

    def _is_seen_alike(self, one: tuple[int, int], other: tuple[int, int]) -> bool:
        same_grid = self.best_grid(*one) == self.best_grid(*other)
        return same_grid and self.feature_rows(*one) == self.feature_rows(*other)


R4B_TILING = Tiling(tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7)), 384, 14)
"""The published checkpoint's."""


def tiling_of_config(config: Mapping[str, Any]) -> Tiling | None:
    """The tiling that a checkpoint's config.json describes; None for a model that is not R-4B."""
    if ARCHITECTURE not in (config.get("architectures") or ()):
        return None
    vision = config["vision_config"]
    pinpoints = tuple((height, width) for height, width in config["image_grid_pinpoints"])
    return Tiling(pinpoints, vision["image_size"], vision["patch_size"])
