"""What shrinking saves for large photos, and that the engine does not notice: bytes and tokens, before and after.

`before` is what would travel as pixels (3 bytes each), `file` the photo's own file, `after` what does travel, for
R-4B's tiles of 384 pixels. Tokens are those of the small checkpoint on vLLM (tiles of 56 pixels), greedily: once of the
whole photo, once of the photo as a job on that checkpoint shrinks it. Photos: any folder, such as Debian's
gnome-backgrounds.
"""

import argparse
import asyncio
from pathlib import Path

from jobs.demo import CHECKPOINT, CPU_ENGINE_ARGS
from pipeline.engine.contract import EngineRequest
from pipeline.engine.models import find_tiling
from pipeline.engine.vllm_engine import VLLMEngine
from pipeline.images import EXTENSIONS, ImageLimits, open_prepared, prepare_image
from pipeline.records import EncodedImage, Generation
from pipeline.spec import EngineSpec, SamplingSpec
from pipeline.tiling import R4B_TILING

PROMPT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe this image."}]}]


async def generate(engine: VLLMEngine, image: EncodedImage) -> Generation:
    return await engine.generate(EngineRequest(PROMPT, (image,), "auto", SamplingSpec(max_tokens=64)))


def count_tokens(image: EncodedImage) -> int:
    """Image tokens of R-4B, by its tiling."""
    return R4B_TILING.count_tokens(*R4B_TILING.fit(image.width, image.height))


async def compare(folder: Path) -> None:
    spec = EngineSpec(model=str(CHECKPOINT), num_gpus=0, max_num_seqs=8, args=CPU_ENGINE_ARGS)
    engine, tiling = await VLLMEngine.start(spec), find_tiling(spec)
    sums = [0, 0, 0]
    num_photos = num_same = 0
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS):
        data = path.read_bytes()
        whole = prepare_image(data, ImageLimits())
        travels = prepare_image(data, ImageLimits(), R4B_TILING)
        same_count = count_tokens(whole) == count_tokens(travels)
        before = await generate(engine, whole)
        after = await generate(engine, prepare_image(data, ImageLimits(), tiling))
        sizes = [whole.width * whole.height * 3, len(data), len(travels.data)]
        sums = [total + size for total, size in zip(sums, sizes, strict=True)]
        same = before.answer == after.answer and before.reasoning == after.reasoning
        num_photos, num_same = num_photos + 1, num_same + same
        picture = open_prepared(travels)
        print(
            f"{path.name:<20} {whole.width}x{whole.height} -> {picture.width}x{picture.height}: before {sizes[0]:>9}, "
            f"file {sizes[1]:>8}, after {sizes[2]:>7} bytes; "
            f"R-4B's image tokens {'equal' if same_count else 'DIFFER'}; "
            f"small checkpoint: image tokens {before.image_tokens} and {after.image_tokens}, "
            f"prompt tokens {before.prompt_tokens} and {after.prompt_tokens}, answers {'equal' if same else 'differ'}",
            flush=True,
        )
    before_mb, file_mb, after_mb = (total / num_photos / 1e6 for total in sums)
    print(
        f"{num_photos} photos: {before_mb:.1f} MB of pixels each, {file_mb:.2f} MB as files, {after_mb:.2f} MB travel; "
        f"{num_same} answers equal"
    )
    engine.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    asyncio.run(compare(parser.parse_args().folder))


if __name__ == "__main__":
    main()
