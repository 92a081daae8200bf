"""
Pixel counts of every expression in a dataset of the canonical form (`data/canonical.py`), at the images' own size.

    for records in evaluate_dataset(model, processor, dataset):
        ...  # one record per expression about the image
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from PIL import Image
from transformers import BatchFeature

from ..data.canonical import FEATURES, decode_mask
from ..metrics import ReferringIoU
from ..tokenization_restr import split_expression


def predict_masks(
    model: Any,
    processor: Any,
    image: Image.Image,
    texts: Sequence[str],
    expressions_per_batch: int = 16,
    threshold: float = 0.5,
) -> Iterator[dict[str, Any]]:
    """
    Find what each expression refers to. The image is encoded once.

    Args:
        model: A [`ReSTRForImageSegmentation`] on any device and in any dtype.
        processor: Its [`ReSTRProcessor`].
        image: The image.
        texts: The expressions.
        expressions_per_batch: Number of expressions that the model decodes at a time.
        threshold: Probability above which a pixel is in the mask.

    Yields:
        The results of `post_process_referring_segmentation`, one expression at a time: `mask`, bool (height, width)
        of the image, and `score`.
    """
    inputs = processor(images=image, text=list(texts), return_tensors="pt")
    yield from predict_batch(model, processor, inputs, expressions_per_batch, threshold)


@torch.inference_mode()
def predict_batch(
    model: Any, processor: Any, inputs: BatchFeature, expressions_per_batch: int = 16, threshold: float = 0.5
) -> Iterator[dict[str, Any]]:
    """[`predict_masks`] for the processor's output about one or several images and their expressions, in order."""
    if expressions_per_batch < 1:
        raise ValueError(f"Expected expressions_per_batch >= 1, got {expressions_per_batch}.")
    inputs = inputs.to(model.device, model.dtype)
    target_sizes = inputs["original_sizes"][inputs["image_indices"]].split(1)
    canvas_size = tuple(inputs["pixel_values"].shape[2:])
    features = model.get_image_features(inputs["pixel_values"])
    for start in range(0, len(target_sizes), expressions_per_batch):
        batch = slice(start, start + expressions_per_batch)
        names = ("input_ids", "attention_mask", "image_indices")
        words = {name: inputs[name][batch] for name in names}
        logits = model(vision_embeds=features, **words).logits
        for logits_of_one, size in zip(logits.split(1), target_sizes[batch]):  # (1, height, width)
            outputs = SimpleNamespace(logits=logits_of_one)
            yield from processor.post_process_referring_segmentation(
                outputs, size, threshold, return_probabilities=False, size=canvas_size
            )


def evaluate_image(
    model: Any, processor: Any, row: dict[str, Any], expressions_per_batch: int = 16, threshold: float = 0.5
) -> list[dict[str, Any]]:
    """
    Compare the model's mask for each expression about an image with the true mask.

    Args:
        row: A row of a dataset in the canonical form, with its image decoded.
        (all others): See [`predict_masks`].

    Returns:
        A dict per expression, in the row's order: `image_id`, `ref_id`, `sent_id`, `text`, `num_words` (as the
        tokenizer splits it), `intersection`, `union`, `predicted` and `target` in pixels of the image, and `score`,
        the mean probability inside the predicted mask.

    Raises:
        ValueError: A mask has another size than the image.
    """
    image = row["image"]
    texts = [expression["text"] for reference in row["references"] for expression in reference["expressions"]]
    predictions = predict_masks(model, processor, image, texts, expressions_per_batch, threshold)
    records = []
    for reference in row["references"]:
        if tuple(reference["mask"]["size"]) != (image.height, image.width):
            raise ValueError(
                f"{row['file_name']}: expected masks of the image's size (height, width)"
                f" {[image.height, image.width]}, got {reference['mask']['size']} for ref_id {reference['ref_id']}."
                " Prepare the data again."
            )
        target = decode_mask(reference["mask"])
        for expression in reference["expressions"]:
            result = next(predictions)
            records.append(
                {
                    "image_id": row["image_id"],
                    "ref_id": reference["ref_id"],
                    **expression,
                    "num_words": len(split_expression(expression["text"])),
                    **ReferringIoU.counts(result["mask"], target, areas=True),
                    "score": result["score"],
                }
            )
    return records


def evaluate_dataset(
    model: Any,
    processor: Any,
    dataset: Iterable[dict[str, Any]],
    expressions_per_batch: int = 16,
    threshold: float = 0.5,
) -> Iterator[list[dict[str, Any]]]:
    """Yield the records of [`evaluate_image`] for each row."""
    for row in dataset:
        yield evaluate_image(model, processor, row, expressions_per_batch, threshold)


def check_dataset(dataset: datasets.Dataset) -> None:
    """
    Check before a long evaluation for errors that would stop it.

    Raises:
        ValueError: The dataset is not in the canonical form, has no expressions, or has expressions without words.
    """
    references = getattr(dataset.features.get("references"), "feature", {})
    missing = [name for name in FEATURES if name not in dataset.features]
    missing += [f"references.{name}" for name in FEATURES["references"].feature if name not in references]
    if missing:
        raise ValueError(
            f"Expected a dataset with one row per image, as `restr prepare` writes it, got one that lacks {missing}"
            f" and has {list(dataset.features)}."
        )
    expressions = [
        expression
        for row in dataset.select_columns("references")["references"]
        for reference in row
        for expression in reference["expressions"]
    ]
    if not expressions:
        raise ValueError(f"Expected expressions to evaluate, got none in {len(dataset)} images.")
    wordless = [expression["sent_id"] for expression in expressions if not split_expression(expression["text"])]
    if wordless:
        raise ValueError(
            f"Expected expressions of at least one word, got {len(wordless)} of {len(expressions)} without any, with"
            f" the sent_ids {wordless[:20]}. Leave them out when you prepare the data."
        )


def fingerprint_rows(dataset: datasets.Dataset) -> list[str]:
    """A hash (hexadecimal) per row of its ids, masks and expressions, but not of the image itself."""
    digests = []
    for row in dataset.select_columns(["image_id", "references"]):
        references = [
            [reference["ref_id"], reference["mask"]["size"], reference["mask"]["counts"], reference["expressions"]]
            for reference in row["references"]
        ]
        content = json.dumps([row["image_id"], references], sort_keys=True)
        digests.append(hashlib.sha256(content.encode()).hexdigest())
    return digests


def fingerprint(digests: Iterable[str]) -> str:
    """One hash of all rows' hashes in any order: it does not depend on how the dataset is sharded."""
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


__all__ = [
    "check_dataset",
    "evaluate_dataset",
    "evaluate_image",
    "fingerprint",
    "fingerprint_rows",
    "predict_batch",
    "predict_masks",
]
