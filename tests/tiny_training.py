"""A tiny model and tiny canonical data."""

import numpy as np
from datasets import Dataset
from PIL import Image

from modeling_restr import (
    ReSTRConfig,
    ReSTRForImageSegmentation,
    ReSTRImageProcessor,
    ReSTRProcessor,
    ReSTRTextConfig,
    ReSTRVisionConfig,
    build_tokenizer,
)
from modeling_restr.data.canonical import FEATURES, encode_mask
from modeling_restr.tokenization_restr import vocabulary_from_expressions


COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 230)}
SENTENCES = ("the {} square", "{} thing", "a box that is {}")
IMAGE_SIZE = 32


def make_rows(num_images, num_expressions=None, seed=0, size=(24, 32)):
    """Images of coloured squares on grey. Image i has `num_expressions(i)` sentences, by default 1 to 4."""
    rng = np.random.default_rng(seed)
    return [
        make_row(index, 1 + index % 4 if num_expressions is None else num_expressions(index), rng, size)
        for index in range(num_images)
    ]


def make_row(index, num_expressions, rng, size):
    pixels = np.full((*size, 3), 128, dtype=np.uint8)
    references = []
    for number, (name, color) in enumerate(COLORS.items()):
        mask = np.zeros(size, dtype=bool)
        top, left = rng.integers(0, size[0] - 9), 10 * number + rng.integers(0, 3)
        mask[top : top + 9, left : left + 8] = True
        pixels[mask] = color
        texts = [text.format(name) for text in SENTENCES]
        expressions = [{"sent_id": 100 * index + 10 * number + i, "text": text} for i, text in enumerate(texts)]
        kept = expressions[: len(range(number, num_expressions, len(COLORS)))]
        references.append(
            {
                "ref_id": 10 * index + number,
                "ann_id": 10 * index + number,
                "category": "square",
                "bbox": [float(left), float(top), 8.0, 9.0],
                "mask": encode_mask(mask),
                "expressions": kept,
            }
        )
    return {
        "image": Image.fromarray(pixels),
        "image_id": index,
        "file_name": f"{index:04d}.png",
        "references": [reference for reference in references if reference["expressions"]],
    }


def make_dataset(num_images, **kwargs):
    return Dataset.from_list(make_rows(num_images, **kwargs), features=FEATURES)


def write_prepared(folder, splits, num_files=1):
    """Write {split: dataset} as `restr prepare` lays out a folder: Parquet files, and a card that names them."""
    (folder / "data").mkdir(parents=True)
    files = ""
    for split, dataset in splits.items():
        files += f"  - split: {split}\n    path: data/{split}-*.parquet\n"
        for number in range(num_files):
            path = folder / "data" / f"{split}-{number:05d}-of-{num_files:05d}.parquet"
            dataset.shard(num_files, number, contiguous=True).to_parquet(path)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
    return folder


def make_processor():
    sentences = [text.format(color) for text in SENTENCES for color in COLORS]
    tokenizer = build_tokenizer(vocabulary_from_expressions(sentences), max_length=6)
    return ReSTRProcessor(ReSTRImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}), tokenizer)


def make_model(processor, drop_path_rate=0.0, seed=0):
    import torch

    torch.manual_seed(seed)
    vision_config = ReSTRVisionConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=IMAGE_SIZE,
        patch_size=8,
        drop_path_rate=drop_path_rate,
    )
    text_config = ReSTRTextConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        projection_dim=16,
        max_position_embeddings=6,
    )
    config = ReSTRConfig(
        vision_config=vision_config, text_config=text_config, num_fusion_layers=1, num_attention_heads=2
    )
    return ReSTRForImageSegmentation(config)
