"""The loader of training data next to what the model takes, and evaluation next to one sentence at a time."""

from collections.abc import Callable
from functools import partial
from io import BytesIO
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from modeling_restr import ReSTRImageProcessor, ReSTRProcessor, build_tokenizer
from modeling_restr.data.canonical import FEATURES
from modeling_restr.data.segmentation import encode_mask
from modeling_restr.evaluation.counts import evaluate_dataset
from modeling_restr.tokenization_restr import vocabulary_from_expressions
from modeling_restr.training.batches import ReferringCollator, ReferringDataset, create_loader, split_ids
from modeling_restr.training.recipe import create_optimizer

from .measuring import Row, create_model, describe_dtype, time_alternately


SENTENCE = "the small brown dog on the left of the red car"
PHOTO_SIZE = (480, 640)  # (height, width)
SENTENCES_PER_OBJECT = (3, 4)  # RefCOCO has about 7 sentences per image
NUM_SENTENCES = sum(SENTENCES_PER_OBJECT)
IMAGES_PER_BATCH, SENTENCES_PER_IMAGE = 2, 4
LOADED_IMAGES = 64


def measure_training_data(config: Any, device: torch.device, dtype: torch.dtype, runs: int) -> list[Row]:
    """Measure the images per second of the loader with 1 and 2 workers, and of training steps with its batches."""
    processor = create_processor(config)
    dataset = ReferringDataset(make_dataset(LOADED_IMAGES), SENTENCES_PER_IMAGE, num_items=LOADED_IMAGES)
    loaders = {
        f"loader, workers: {number}": create_loader(
            dataset, IMAGES_PER_BATCH, ReferringCollator(processor), num_workers=number
        )
        for number in (1, 2)
    }
    model = create_model(config, device).train()
    optimizer = create_optimizer(model)
    batch, _ = split_ids(next(iter(create_loader(dataset, IMAGES_PER_BATCH, ReferringCollator(processor)))))
    batch = {name: value.to(device) for name, value in batch.items()}

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            outputs = model(**batch)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    variants: dict[str, Callable[[], object]] = {name: partial(list, loader) for name, loader in loaders.items()}
    seconds = time_alternately({**variants, "training step": step}, device, runs)
    taken = IMAGES_PER_BATCH / seconds["training step"]
    section = f"training data, {SENTENCES_PER_IMAGE} sentences per image, {describe_dtype(dtype)}"
    rows = [Row(section, "training step", taken, "images/s")]
    for name in loaders:
        rate = LOADED_IMAGES / seconds[name]
        rows.append(Row(section, name, rate, "images/s", ratio=rate / taken, ratio_to="the training step"))
    return rows


@torch.inference_mode()
def measure_evaluation(config: Any, device: torch.device, dtype: torch.dtype, runs: int) -> list[Row]:
    """Time the evaluation of an image with 7 sentences per sentence, next to the model alone and to single sentences."""
    model, processor = create_model(config, device, dtype), create_processor(config)
    together = make_dataset(1)
    singly = split_rows(together)
    (row,) = together
    texts = [expression["text"] for reference in row["references"] for expression in reference["expressions"]]
    inputs = processor(images=row["image"], text=texts, return_tensors="pt").to(device, dtype)
    del inputs["original_sizes"]
    variants = {
        "the model alone": lambda: model(**inputs),
        "sentences of an image together": lambda: list(evaluate_dataset(model, processor, together)),
        "one sentence at a time": lambda: list(evaluate_dataset(model, processor, singly)),
    }
    seconds = time_alternately(variants, device, runs)
    alone, joint, single = (value / NUM_SENTENCES for value in seconds.values())
    section, unit = f"evaluation, {NUM_SENTENCES} sentences per image, {describe_dtype(dtype)}", "s"
    _, name_of_joint, name_of_single = variants
    return [
        Row(section, f"{name_of_joint}, per sentence", joint, unit, floor=alone),
        Row(section, f"{name_of_single}, per sentence", single, unit, ratio=single / joint, ratio_to=name_of_joint),
    ]


def create_processor(config: Any) -> ReSTRProcessor:
    tokenizer = build_tokenizer(vocabulary_from_expressions([SENTENCE]))
    return ReSTRProcessor(ReSTRImageProcessor(size=config.vision_config.image_size), tokenizer)


def make_dataset(num_images: int) -> datasets.Dataset:
    """Photos of smooth noise, each with one object per entry of `SENTENCES_PER_OBJECT`."""
    rng = np.random.default_rng(0)
    mask = np.zeros(PHOTO_SIZE, dtype=bool)
    mask[100:300, 150:400] = True
    rows = []
    for image_id in range(num_images):
        coarse = rng.integers(0, 256, (PHOTO_SIZE[0] // 8, PHOTO_SIZE[1] // 8, 3), dtype=np.uint8)
        buffer = BytesIO()
        Image.fromarray(coarse).resize(PHOTO_SIZE[::-1]).save(buffer, "JPEG", quality=90)
        references = [
            {
                "ref_id": image_id * len(SENTENCES_PER_OBJECT) + number,
                "ann_id": number,
                "category": "dog",
                "bbox": [150, 100, 250, 200],
                "mask": encode_mask(mask),
                "expressions": [{"sent_id": index, "text": SENTENCE} for index in range(count)],
            }
            for number, count in enumerate(SENTENCES_PER_OBJECT)
        ]
        image = {"bytes": buffer.getvalue(), "path": None}
        rows.append({"image": image, "image_id": image_id, "file_name": f"{image_id}.jpg", "references": references})
    return datasets.Dataset.from_list(rows, features=FEATURES)


def split_rows(dataset: datasets.Dataset) -> datasets.Dataset:
    """One row per sentence instead of one per image."""
    rows = [
        {**row, "references": [{**reference, "expressions": [expression]}]}
        for row in dataset.cast_column("image", datasets.Image(decode=False))
        for reference in row["references"]
        for expression in reference["expressions"]
    ]
    return datasets.Dataset.from_list(rows, features=FEATURES)
