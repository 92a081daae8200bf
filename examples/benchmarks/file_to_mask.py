"""The stages from a photo's file to the files of its masks, each next to its floor, with random weights."""

from collections.abc import Callable
from functools import partial
from io import BytesIO
from types import SimpleNamespace
from typing import Any, NamedTuple
from zlib import compress

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from modeling_restr import ReSTRImageProcessor, ReSTRProcessor, build_tokenizer
from modeling_restr.data.segmentation import encode_mask
from modeling_restr.image_processing_restr import get_letterbox
from modeling_restr.image_reading_restr import read_image
from modeling_restr.tokenization_restr import vocabulary_from_expressions

from .measuring import Row, create_batch, create_model, describe_dtype, time_alternately


PHOTO_SIZES = {"0.3 MP": (480, 640), "12 MP": (3000, 4000)}  # (height, width), by megapixels
NUMBERS_OF_SENTENCES = (1, 20)
SENTENCE = "the small brown dog that sits on the left of the red car"
MATRIX_SIDE, COPIED_FLOATS = 2048, 2**24


class Stage(NamedTuple):
    """A stage, and the least that it needs: the same work without the rest, operations, or bytes."""

    run: Callable[[], object]
    bare: Callable[[], object] | None = None
    flops: int = 0
    num_bytes: int = 0


@torch.inference_mode()
def measure_file_to_mask(config: Any, device: torch.device, dtype: torch.dtype, runs: int) -> list[Row]:
    """
    Time every stage for a small and a large photo, about which 1 and 20 sentences ask.

    Floors: Pillow alone for decoding and resizing, the tokenizers library alone for the sentences, the operations of
    the model at the measured rate of a matrix product, the bytes of the masks at the measured rate of a copy for
    post-processing and RLE, and zlib alone for PNG.
    """
    processor = ReSTRProcessor(
        ReSTRImageProcessor(size=config.vision_config.image_size),
        build_tokenizer(vocabulary_from_expressions([SENTENCE])),
    )
    model = f"model, {describe_dtype(dtype)}"
    sections = {model: list_model_stages(config, processor, device, dtype)}
    for name, size in PHOTO_SIZES.items():
        sections[f"photo of {name}"] = list_photo_stages(processor, size)
        sections[f"masks of {name}"] = list_mask_stages(processor, size, device)
    variants = list_rates(device, dtype)
    for section, stages in sections.items():
        for name, stage in stages.items():
            variants[f"{section}: {name}"] = stage.run
            if stage.bare is not None:
                variants[f"{section}: {name}, bare"] = stage.bare
    seconds = time_alternately(variants, device, runs)
    per_flop = seconds["product"] / (2 * MATRIX_SIDE**3)
    per_byte = seconds["copy"] / (2 * 4 * COPIED_FLOATS)
    rows = []
    for section, stages in sections.items():
        for name, stage in stages.items():
            computed = stage.flops * per_flop + stage.num_bytes * per_byte
            floor = seconds.get(f"{section}: {name}, bare", computed)
            rows.append(Row(section, name, seconds[f"{section}: {name}"], floor=floor))
    return rows + summarize(rows, model)


def summarize(rows: list[Row], model: str) -> list[Row]:
    """Compare what a call of the pipeline does besides running the model with the time of the model."""
    found = {(row.section, row.name): row.value for row in rows}
    summary = []
    for name in PHOTO_SIZES:
        for number in NUMBERS_OF_SENTENCES:
            of_model = sum(found[model, stage] for stage in ("encode", f"fuse {number}", f"decode {number}"))
            others = found[f"photo of {name}", "read and decode"] + found[f"photo of {name}", "resize and normalize"]
            others += found[model, f"tokenize {number}"] + found[f"masks of {name}", f"post-process {number}"]
            what, share = f"{name}, sentences: {number}", 100 * others / of_model
            summary.append(Row("pipeline without the model", what, share, "% of the model"))
    return summary


def list_rates(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What the floors are derived from: a product of matrices, and a copy in memory."""
    left, right = torch.randn(2, MATRIX_SIDE, MATRIX_SIDE, device=device, dtype=dtype)
    source, target = torch.randn(2, COPIED_FLOATS, device=device)
    return {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}


def list_photo_stages(processor: ReSTRProcessor, size: tuple[int, int]) -> dict[str, Stage]:
    coarse = np.random.default_rng(0).integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(coarse).resize(size[::-1]).save(buffer, "JPEG", quality=90)
    content, photo = buffer.getvalue(), Image.open(BytesIO(buffer.getvalue())).convert("RGB")
    image_processor: Any = processor.image_processor
    canvas_size = (image_processor.size["height"], image_processor.size["width"])
    _, _, height, width = get_letterbox(size, canvas_size)

    def open_draft() -> None:
        image = Image.open(BytesIO(content))
        image.draft(None, (width, height))
        image.load()

    return {
        "read and decode": Stage(lambda: read_image(content), lambda: Image.open(BytesIO(content)).load()),
        "read and decode, JPEG draft": Stage(lambda: read_image(content, draft_size=canvas_size), open_draft),
        "resize and normalize": Stage(
            lambda: image_processor(photo, return_tensors="pt"),
            lambda: photo.resize((width, height), Image.Resampling.BILINEAR),
        ),
    }


def list_model_stages(
    config: Any, processor: ReSTRProcessor, device: torch.device, dtype: torch.dtype
) -> dict[str, Stage]:
    model = create_model(config, device, dtype)
    shadow = create_model(config, torch.device("meta"))  # computes nothing, to count operations
    shadow.set_attn_implementation("eager")  # the counter does not know the others on every device
    pixel_values = create_batch(config, device, 1, 1, dtype)["pixel_values"]
    encode = partial(model.get_image_features, pixel_values)
    stages = {"encode": Stage(encode, flops=count_flops(partial(shadow.get_image_features, pixel_values.to("meta"))))}
    for number in NUMBERS_OF_SENTENCES:
        sentences = [f"{SENTENCE} {index}" for index in range(number)]
        tokenizer: Any = processor.tokenizer
        stages[f"tokenize {number}"] = Stage(
            partial(tokenize, processor, sentences), partial(tokenizer.backend_tokenizer.encode_batch, sentences)
        )
        batch = create_batch(config, device, 1, number, dtype)
        fuse, decode = split_answer(model, batch)
        fuse_shadow, decode_shadow = split_answer(shadow, {name: value.to("meta") for name, value in batch.items()})
        stages[f"fuse {number}"] = Stage(fuse, flops=count_flops(fuse_shadow))
        stages[f"decode {number}"] = Stage(decode, flops=count_flops(decode_shadow))
    return stages


def tokenize(processor: Any, sentences: list[str]) -> None:
    processor(text=[sentences], return_tensors="pt")
    processor.find_lost_words(sentences)


def split_answer(model: Any, batch: dict[str, torch.Tensor]) -> tuple[Callable[[], object], Callable[[], object]]:
    """The two stages of an answer about an encoded image: language encoder and fusion, and the pixel decoder."""
    inputs = {**batch, "vision_embeds": model.get_image_features(batch["pixel_values"])}
    del inputs["pixel_values"]
    fused = model.model(**inputs)
    to_decode = (fused.projected_vision_embeds, fused.patch_embeds, fused.patch_logits, fused.image_indices)
    return partial(model.model, **inputs), partial(model.pixel_decoder, *to_decode)


def count_flops(function: Callable[[], object]) -> int:
    """Count the operations of the matrix products, two per multiply-accumulate."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def list_mask_stages(processor: ReSTRProcessor, size: tuple[int, int], device: torch.device) -> dict[str, Stage]:
    image_processor: Any = processor.image_processor
    canvas_size = (image_processor.size["height"], image_processor.size["width"])
    coarse = torch.randn(max(NUMBERS_OF_SENTENCES), 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 4 - 3
    logits = F.interpolate(coarse, canvas_size, mode="bicubic")[:, 0].to(device)  # masks of a fifth of the photo
    stages = {}
    for number in NUMBERS_OF_SENTENCES:
        outputs, sizes = SimpleNamespace(logits=logits[:number]), [size] * number
        post_process = partial(
            image_processor.post_process_referring_segmentation, outputs, sizes, return_probabilities=False
        )
        num_bytes = number * size[0] * size[1]
        stages[f"post-process {number}"] = Stage(post_process, num_bytes=num_bytes + outputs.logits.nbytes)
        masks = [result["mask"].cpu().numpy() for result in post_process()]
        stages[f"RLE {number}"] = Stage(partial(map_all, encode_mask, masks), num_bytes=num_bytes)
        images = [Image.fromarray(mask.astype(np.uint8) * 255) for mask in masks]
        stages[f"PNG {number}"] = Stage(
            partial(map_all, lambda image: image.save(BytesIO(), "PNG"), images), partial(map_all, compress, masks)
        )
    return stages


def map_all(function: Callable[[Any], object], values: list[Any]) -> None:
    for value in values:
        function(value)
