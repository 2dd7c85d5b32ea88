"""How R-4B cuts an image into tiles, and which images must be made smaller for vLLM.

R-4B shrinks the features of an image of more than nine tiles' worth (`anyres_max_9`), but vLLM 0.32 reserves tokens
for it as if it did not (RForConditionalGeneration counts as LLaVA-NeXT does, and merges as LLaVA-OneVision does). The
two then differ and the engine dies, with every request in it. So such an image is first made to fit nine tiles.
Not covered: the tiling itself, which vLLM does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MAX_TILES = 9


@dataclass(frozen=True)
class Tiling:
    """A checkpoint's grids: `pinpoints` are (height, width) in pixels, `tile` and `patch` sides in pixels."""

    pinpoints: Sequence[Sequence[int]]
    tile: int
    patch: int

    @property
    def patches(self) -> int:
        """Patches along a tile's side."""
        return self.tile // self.patch

    def best_grid(self, width: int, height: int) -> tuple[int, int]:
        """The (height, width) in pixels that keeps most of the image and, of those, wastes least."""

        def rank(grid: Sequence[int]) -> tuple[int, int]:
            scale = min(grid[1] / width, grid[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - grid[0] * grid[1]

        best = max(self.pinpoints, key=rank)
        return best[0], best[1]

    def is_shrunk(self, width: int, height: int) -> bool:
        """Whether the model would shrink this image's features, which vLLM does not expect."""
        grid_height, grid_width = self.best_grid(width, height)
        rows, columns = grid_height // self.patch_pixels, grid_width // self.patch_pixels
        if width / height > columns / rows:
            rows -= 2 * ((rows - int(round(height * columns / width, 7))) // 2)
        else:
            columns -= 2 * ((columns - int(round(width * rows / height, 7))) // 2)
        return math.sqrt(rows * columns / (MAX_TILES * self.patches**2)) > 1.1

    @property
    def patch_pixels(self) -> float:
        """Pixels for each patch; a tile of 384 holds 27 patches of 14, and a few pixels more."""
        return self.tile / self.patches

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) to give vLLM: the image's own, or the largest that nine tiles can hold."""
        if not self.is_shrunk(width, height):
            return width, height
        small = [grid for grid in self.pinpoints if grid[0] * grid[1] <= MAX_TILES * self.tile**2]
        grid_height, grid_width = Tiling(small, self.tile, self.patch).best_grid(width, height)
        scale = min(grid_width / width, grid_height / height)
        return max(1, int(width * scale)), max(1, int(height * scale))
