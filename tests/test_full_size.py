"""R-4B's full-size shape with dummy weights, on this CPU: slow, and left out of `make test` (see `make test-slow`).

It shows that the real architecture's sizes go through `VLLMEngine`; what it says is noise.
"""

import json
import shutil
import time
from pathlib import Path

import pytest

from jobs.demo import CHECKPOINT
from pipeline.spec import EngineSpec
from tests.engines import question, running_engine, scene_image

TILE = 384


def write_full_size(folder: Path) -> None:
    """The small checkpoint's tokenizer and template with R-4B's own sizes; no weights."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(CHECKPOINT / name, folder / name)
    config = json.loads((CHECKPOINT / "config.json").read_text())
    config["image_grid_pinpoints"] = [[TILE * h, TILE * w] for h in range(1, 7) for w in range(1, 7)]
    config["vision_config"] |= {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": TILE,
        "patch_size": 14,
    }
    config["text_config"] |= {
        "vocab_size": 151_936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
    }
    config["text_config"]["layer_types"] = ["full_attention"] * 36
    (folder / "config.json").write_text(json.dumps(config))
    processor = json.loads((CHECKPOINT / "processor_config.json").read_text())
    images = processor["image_processor"]
    images["image_grid_pinpoints"] = config["image_grid_pinpoints"]
    images["size"] = images["crop_size"] = {"height": TILE, "width": TILE}
    (folder / "processor_config.json").write_text(json.dumps(processor))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_full_size_shape_answers_one_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_full_size(tmp_path)
    spec = EngineSpec(
        model=str(tmp_path),
        num_gpus=0,
        max_num_seqs=1,
        max_model_len=4096,
        args={
            "load_format": "dummy",
            "dtype": "bfloat16",
            "enforce_eager": True,
            "skip_mm_profiling": True,
            "kv_cache_memory_bytes": 1 << 30,
        },
    )
    start = time.monotonic()
    with running_engine(spec) as engine:
        loaded = time.monotonic()
        (generation,) = engine.generate(question("Describe this image.", scene_image(1, (640, 480)), max_tokens=8))
        done = time.monotonic()
    with capsys.disabled():
        print(
            f"\nfull-size R-4B shape: loaded in {loaded - start:.0f} s, {generation.prompt_tokens} prompt tokens "
            f"({generation.image_tokens} of the image), {generation.completion_tokens} tokens in {done - loaded:.0f} s"
        )
    assert generation.completion_tokens == 8
    # 729 for the base tile; two by two tiles of 27x27 patches, unpadded to 40 rows of 54, and a newline each.
    assert generation.image_tokens == 729 + 40 * 54 + 40
