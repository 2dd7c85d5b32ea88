"""Train the small R-4B checkpoint on drawn scenes, on a CPU.

    python -m checkpoints.train_shapes --output checkpoints/r4b-shapes --steps 5500

The model is R-4B's architecture (SigLIP tower, projector with pre-norm, Qwen3, anyres tiles) at 1.6 M parameters.
It learns the wire forms of R-4B: in `auto` it decides by its first token whether to think, in `long` the prompt
has opened the thought, in `short` the prompt has closed it. Questions that need counting are asked in `short` as
often as in `long`, so that a comparison of the two is a fair one.
Seeded: the same steps on the same versions give the same weights up to floating-point order.
Not covered: evaluation (`evaluate_shapes.py`), and any model but this one.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3Config,
    SiglipVisionConfig,
)

from pipeline.scenes import (
    COLORS,
    GRID,
    KINDS,
    PHRASES,
    SHAPES,
    THINKING_KINDS,
    TRAIN_SEEDS,
    Question,
    ask,
    draw_scene,
    make_scene,
)

HERE = Path(__file__).parent
TILE, PATCH = 56, 14
MAX_TILES = 9
"""vLLM counts image tokens without the anyres_max_9 shrinking that the model does: no grid may exceed nine tiles."""
PINPOINTS = [[TILE * h, TILE * w] for h in range(1, 7) for w in range(1, 7) if h * w <= MAX_TILES]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
ASKED = (*KINDS, "count_color", "compare", "count_color")
"""The questions about each scene of a step: what is hardest to learn, two or three times."""
DIRECT_WEIGHT = 2.0
"""How much a token of a direct answer counts against one of a thought or a caption."""
THOUGHT_TAGS = ["<think>", "</think>"]


class Projector(nn.Module):
    """R-4B's projector: LayerNorm, Linear, GELU, Linear (vLLM's RVLMultiModalProjector)."""

    def __init__(self, config: LlavaOnevisionConfig) -> None:
        super().__init__()
        vision, text = config.vision_config.hidden_size, config.text_config.hidden_size
        self.pre_norm = nn.LayerNorm(vision, eps=1e-6)
        self.linear_1 = nn.Linear(vision, text)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(text, text)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.linear_2(self.act(self.linear_1(self.pre_norm(features))))
        return projected


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the scenes' own words: any text can be encoded, the scenes' text is short."""
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r"\n+|\p{N}| ?[\p{L}]+| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_corpus(), trainer)
    tokenizer.add_tokens(THOUGHT_TAGS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        chat_template=(HERE / "r4b-shapes" / "chat_template.jinja").read_text(),
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a trained checkpoint: its vocabulary came from the scenes' text as it was then."""
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _tokenizer_corpus() -> Iterator[str]:
    for seed in TRAIN_SEEDS[:400]:
        for kind in KINDS:
            question = ask(make_scene(seed), kind)
            yield f"system\nuser\n{question.text}\nassistant\n\n{question.thought}\n\n{question.answer}"
    yield from (phrase.format(a=color, b=color, shape="") for color in COLORS for k in KINDS for phrase in PHRASES[k])


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaOnevisionForConditionalGeneration:
    vision = SiglipVisionConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=TILE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,  # vLLM's CPU attention takes 32, 64, 128, not 40
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=len(tokenizer) + 1,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_9",
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=True,
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    model.model.multi_modal_projector = Projector(config)
    return model


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaNextProcessor:
    size = {"height": TILE, "width": TILE}
    image_processor = LlavaNextImageProcessor(
        size=size,
        crop_size=size,
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        image_token="<image>",
        chat_template=tokenizer.chat_template,
    )


def completion_text(question: Question, mode: str) -> str:
    """What the model says after the generation prompt of this mode: R-4B's four wire forms."""
    if mode == "short":
        return question.answer
    if mode == "long":
        return f"{question.thought}</think>\n\n{question.answer}"
    if question.kind in THINKING_KINDS:
        return f"\n{question.thought}</think>\n\n{question.answer}"
    return f"\n\n</think>\n\n{question.answer}"


def pick_mode(question: Question, rng: random.Random) -> str:
    """Counting questions are asked in `short` as often as in `long`: it is trained as honestly."""
    weights = (0.30, 0.35, 0.35) if question.kind in THINKING_KINDS else (0.5, 0.25, 0.25)
    return rng.choices(("auto", "long", "short"), weights)[0]


@dataclass
class Row:
    """One training sequence; `image` indexes the step's scenes."""

    image: int
    prompt_ids: list[int]
    completion_ids: list[int]


class Batches:
    """Draws the scenes and questions of one step."""

    def __init__(self, processor: LlavaNextProcessor, seed: int, scenes_per_step: int) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.rng, self.scenes_per_step = random.Random(seed), scenes_per_step
        self.image_id = self.tokenizer.convert_tokens_to_ids("<image>")
        self.eos_id = self.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def next(self) -> tuple[dict[str, torch.Tensor], list[Row]]:
        size = self._pick_size()
        scenes = [make_scene(self.rng.choice(TRAIN_SEEDS)) for _ in range(self.scenes_per_step)]
        pixels = self.processor.image_processor([draw_scene(scene, size) for scene in scenes], return_tensors="pt")
        num_tokens = self.processor._get_number_of_features(size[1], size[0], TILE, TILE)
        rows = []
        for index, scene in enumerate(scenes):
            for kind in ASKED:
                question = ask(scene, kind, variant=self.rng.randrange(1_000_000))
                rows.append(self._row(index, question, num_tokens))
        return dict(pixels), rows

    def _pick_size(self) -> tuple[int, int]:
        draw = self.rng.random()
        if draw < 0.70:
            return (56, 56)
        if draw < 0.90:
            return (112, 112)
        return self.rng.choice([(84, 84), (112, 84), (84, 112), (128, 96), (140, 140)])

    def _row(self, image: int, question: Question, num_image_tokens: int) -> Row:
        mode = pick_mode(question, self.rng)
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        messages = [{"role": "user", "content": content}]
        if self.rng.random() < 0.1:
            messages.insert(0, {"role": "system", "content": "You are a helpful assistant."})
        prompt = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, thinking_mode=mode
        )
        prompt_ids = []
        for token in self.tokenizer(prompt, add_special_tokens=False)["input_ids"]:
            prompt_ids += [token] * (num_image_tokens if token == self.image_id else 1)
        completion = self.tokenizer(completion_text(question, mode), add_special_tokens=False)["input_ids"]
        return Row(image, prompt_ids, [*completion, self.eos_id])


def batch_loss(
    model: LlavaOnevisionForConditionalGeneration, rows: list[Row], features: torch.Tensor, pad_id: int
) -> torch.Tensor:
    """Summed cross-entropy over the completions; `features` is [images, image tokens, hidden]."""
    length = max(len(row.prompt_ids) + len(row.completion_ids) for row in rows)
    ids = torch.full((len(rows), length), pad_id)
    labels = torch.full((len(rows), length), -100)
    for index, row in enumerate(rows):
        start, end = len(row.prompt_ids), len(row.prompt_ids) + len(row.completion_ids)
        ids[index, :end] = torch.tensor(row.prompt_ids + row.completion_ids)
        labels[index, start:end] = torch.tensor(row.completion_ids)
    embeddings = model.get_input_embeddings()(ids)
    image_mask = (ids == model.config.image_token_id).unsqueeze(-1)
    embeddings = embeddings.masked_scatter(image_mask, features[[row.image for row in rows]].to(embeddings.dtype))
    # Padding is on the right and attention is causal, so no mask is needed.
    hidden = model.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    logits = model.lm_head(hidden[:, :-1][targets != -100])
    return nn.functional.cross_entropy(logits.float(), targets[targets != -100], reduction="sum")


def split_by_length(rows: list[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """Direct answers, thoughts, and longer: passed through the model together, half of the work would be padding."""
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for row in rows:
        length = len(row.completion_ids)
        parts[0 if length <= 12 else 1 if length <= 95 else 2].append(row)
    return parts


def pretrain_vision(model: LlavaOnevisionForConditionalGeneration, processor: LlavaNextProcessor, steps: int) -> None:
    """Teach the tower and the projector what stands in each patch, before any words.

    One cell of a scene is one patch of the base tile. Reading shapes through the language model's loss alone takes
    thousands of steps; through a linear probe on the projected patches a few hundred. The probe is thrown away.
    """
    kinds = ["nothing", *(f"{color} {shape}" for color in COLORS for shape in SHAPES)]
    probe = nn.Linear(model.config.text_config.hidden_size, len(kinds))
    seen = nn.ModuleList([model.model.vision_tower, model.model.multi_modal_projector, probe])
    optimizer = torch.optim.AdamW(seen.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    rng = random.Random("vision")
    for step in range(1, steps + 1):
        scenes = [make_scene(rng.choice(TRAIN_SEEDS)) for _ in range(64)]
        size = rng.choice([(56, 56), (112, 112), (84, 84), (140, 140)])
        pixels = processor.image_processor([draw_scene(scene, size) for scene in scenes], return_tensors="pt")
        labels = torch.zeros(len(scenes), GRID * GRID, dtype=torch.long)
        for index, scene in enumerate(scenes):
            for item in scene.items:
                labels[index, item.row * GRID + item.column] = kinds.index(str(item))
        base_tiles = pixels["pixel_values"][:, 0]
        hidden = model.model.vision_tower(base_tiles, output_hidden_states=True).hidden_states[-1]
        features = model.model.multi_modal_projector(hidden)
        logits = probe(features).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, labels.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            right = (logits.argmax(-1) == labels.flatten()).float().mean().item()
            print(f"vision step {step} loss {loss.item():.4f} patches right {right:.4f}", flush=True)


@torch.no_grad()
def speak_greedily(
    model: LlavaOnevisionForConditionalGeneration,
    processor: LlavaNextProcessor,
    prompt: str,
    image: Image.Image,
    max_tokens: int,
) -> tuple[list[int], list[int]]:
    """The rendered prompt's token ids and the greedy completion's, the end-of-turn token included."""
    inputs = processor(images=[image], text=prompt, return_tensors="pt")
    pictures = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    features = torch.cat(list(model.model.get_image_features(**pictures, return_dict=True).pooler_output))
    prompt_ids = inputs["input_ids"]
    embeddings = model.get_input_embeddings()(prompt_ids)
    embeddings = embeddings.masked_scatter((prompt_ids == model.config.image_token_id).unsqueeze(-1), features)
    completion: list[int] = []
    cache = None
    while len(completion) < max_tokens and completion[-1:] != [processor.tokenizer.eos_token_id]:
        state = model.model.language_model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
        cache = state.past_key_values
        completion.append(int(model.lm_head(state.last_hidden_state[:, -1]).argmax()))
        embeddings = model.get_input_embeddings()(torch.tensor([completion[-1:]]))
    return prompt_ids[0].tolist(), completion


def train(
    output: Path,
    steps: int,
    vision_steps: int,
    seed: int,
    scenes_per_step: int,
    peak_lr: float,
    resume: Path | None,
) -> None:
    torch.manual_seed(seed)
    tokenizer = build_tokenizer() if resume is None else load_tokenizer(resume)
    model, processor = build_model(tokenizer), build_processor(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} tokens", flush=True)
    if resume is not None:
        load_weights(model, resume)
    else:
        pretrain_vision(model, processor, vision_steps)
    batches = Batches(processor, seed, scenes_per_step)
    # At the language model's rate the first, still random gradients would wipe out what the vision stage taught.
    seeing = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    speaking = [p for name, p in model.named_parameters() if "vision_tower" not in name and "projector" not in name]
    groups = [{"params": seeing, "lr": peak_lr / 40}, {"params": speaking, "lr": peak_lr}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = min(300, steps // 10)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, 1.0, warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup, eta_min=peak_lr / 100),
        ],
        [warmup],
    )
    start, running = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        pixels, rows = batches.next()
        brief, *wordy = split_by_length(rows)
        num_targets = sum(len(row.completion_ids) for part in wordy for row in part) + DIRECT_WEIGHT * len(brief)
        features = torch.stack(list(model.model.get_image_features(**pixels, return_dict=True).pooler_output))
        # A direct answer is a token or two, a thought a hundred: unweighted, answers from one look are never learned.
        loss = sum(
            (
                weight * batch_loss(model, part, features, tokenizer.pad_token_id)
                for weight, part in ((DIRECT_WEIGHT, brief), *((1.0, part) for part in wordy))
                if part
            ),
            start=torch.zeros(()),
        )
        optimizer.zero_grad(set_to_none=True)
        mean = loss / num_targets
        mean.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running += loss.item() / num_targets
        if step % 100 == 0:
            rate = step / (time.monotonic() - start)
            print(f"step {step} loss {running / 100:.4f} {rate:.2f} steps/s", flush=True)
            running = 0.0
        if step % 500 == 0 or step == steps:
            save_checkpoint(model, processor, output)


def weight_names(model: LlavaOnevisionForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The names that vLLM's RForConditionalGeneration takes (transformers would write legacy ones)."""
    names = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("lm_head."):
            continue  # tied to the embedding
        if name.startswith("model.vision_tower.") and not name.startswith("model.vision_tower.vision_model."):
            name = name.replace("model.vision_tower.", "model.vision_tower.vision_model.", 1)
        names[name] = tensor.detach().float().contiguous()
    return names


def load_weights(model: LlavaOnevisionForConditionalGeneration, folder: Path) -> None:
    """Load a checkpoint written by `save_checkpoint`; every weight must be there."""
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    own = model.state_dict()
    renamed = {}
    for name in own:
        if name.startswith("lm_head."):
            continue
        key = name
        if key not in stored:
            key = name.replace("model.vision_tower.", "model.vision_tower.vision_model.", 1)
        renamed[name] = stored[key]
    renamed["lm_head.weight"] = renamed["model.language_model.embed_tokens.weight"]
    model.load_state_dict(renamed)


def save_checkpoint(model: LlavaOnevisionForConditionalGeneration, processor: LlavaNextProcessor, output: Path) -> None:
    """Write weights, config and processor as a folder that vLLM loads without remote code."""
    output.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(output)
    save_file(weight_names(model), output / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config["architectures"] = ["RForConditionalGeneration"]
    config["dtype"] = "float32"
    (output / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generation = {"eos_token_id": model.config.text_config.eos_token_id, "do_sample": False}
    (output / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "r4b-shapes", help="folder to write")
    parser.add_argument("--steps", type=int, default=5500, help="optimizer steps (default 5500)")
    parser.add_argument("--vision-steps", type=int, default=600, help="steps of the vision stage (default 600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes-per-step", type=int, default=7, help="each gives eight questions (default 7)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default 2e-3)")
    parser.add_argument("--resume", type=Path, default=None, help="start from this checkpoint's weights")
    args = parser.parse_args()
    train(args.output, args.steps, args.vision_steps, args.seed, args.scenes_per_step, args.lr, args.resume)


if __name__ == "__main__":
    main()
