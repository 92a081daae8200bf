"""
Referring image segmentation with an exported ReSTR: photographs and sentences in, a mask for each sentence out.

This file stands beside the graphs that it runs and needs NumPy, Pillow, onnxruntime and tokenizers, nothing else:

    import sys

    sys.path.append("restr-onnx")  # the exported folder
    from restr_onnx import ReSTROnnxPipeline

    pipe = ReSTROnnxPipeline("restr-onnx")
    pipe("photo.jpg", text="the dog on the left")

It prepares images and masks exactly as `image_processing_restr.py` does, which says why, and takes and returns what
`pipeline_restr.py` does.
"""

import base64
import json
import os
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer


_CHANNELS = (1, 3, 4)
# How far a float image may overshoot its range, as resampling filters do, before it counts as another range.
_OVERSHOOT = 1e-3
# Lists and datasets of at least this length show their progress unless told otherwise.
_PROGRESS_FROM = 20
# Sentences that are decoded at a time: at 480 x 480 pixels in float32 each takes 0.13 GB on the way.
_SENTENCES_AT_A_TIME = 32


class EncodedImage(NamedTuple):
    """What [`ReSTROnnxPipeline.encode_images`] keeps of an image."""

    vision_embeds: np.ndarray  # float32 (h, w, vision_hidden_size): the features of the patches
    size: tuple[int, int]  # (height, width) of the image in pixels


class ReSTROnnxPipeline:
    """
    [`ReSTRPipeline`] over the two graphs of an exported folder, without PyTorch and Transformers.

    Example:

    ```python
    >>> pipe = ReSTROnnxPipeline("restr-onnx")
    >>> pipe("photo.jpg", text="the dog on the left")
    [{'label': 'the dog on the left', 'score': 0.93, 'mask': <PIL.Image.Image image mode=L size=640x480>}]
    >>> results = pipe([{"image": "photo.jpg", "text": ["the dog", "the ball"]}, ...], batch_size=8)
    >>> (photo,) = pipe.encode_images(["photo.jpg"])  # once
    >>> pipe(photo, text="the ball"), pipe(photo, text="the cat")  # as often as you like
    ```
    """

    def __init__(
        self,
        folder: str | os.PathLike | None = None,
        precision: str = "float32",
        providers: Sequence[str] = ("CPUExecutionProvider",),
        session_options: onnxruntime.SessionOptions | None = None,
    ) -> None:
        """
        Args:
            folder: what `examples/export_onnx.py` wrote; by default the one that this file is in.
            precision: "float32", or "int8" for graphs with 8-bit weights where the folder has them.
            providers: of ONNX Runtime, such as `["CUDAExecutionProvider", "CPUExecutionProvider"]`.
            session_options: of ONNX Runtime, such as the number of threads.

        Raises:
            ValueError: if the folder lacks a file, or for another precision.
        """
        folder = Path(__file__).parent if folder is None else Path(folder)
        suffixes = {"float32": "", "int8": "_int8"}
        if precision not in suffixes:
            raise ValueError(f"Expected a precision among {', '.join(suffixes)}, got {precision!r}.")
        graphs = [folder / f"{name}{suffixes[precision]}.onnx" for name in ("image_encoder", "sentence_query")]
        settings, tokenizer = folder / "restr_onnx.json", folder / "tokenizer.json"
        missing = [path.name for path in (*graphs, settings, tokenizer) if not path.is_file()]
        if missing:
            raise ValueError(f"Expected {folder} as examples/export_onnx.py writes it, but it lacks {missing}.")
        self.image_encoder, self.sentence_query = (
            onnxruntime.InferenceSession(graph, session_options, providers=list(providers)) for graph in graphs
        )
        self.settings = json.loads(settings.read_text(encoding="utf-8"))
        self.image_size = (self.settings["size"]["height"], self.settings["size"]["width"])
        self.tokenizer = Tokenizer.from_file(os.fspath(tokenizer))
        self.tokenizer.encode_special_tokens = True  # "<pad>" in a sentence is text

    def __call__(
        self,
        image: Any,
        text: str | Sequence[str] | None = None,
        *,
        threshold: float = 0.5,
        batch_size: int = 1,
        num_workers: int = 0,
        show_progress: bool | None = None,
    ) -> Any:
        """
        Args:
            image: an image (PIL image, NumPy array, path, URL, base64 string or [`EncodedImage`]) with its `text`; or
                `{"image": ..., "text": ...}`; or a list, generator or dataset (anything that has a length and is
                indexed by number) of such dicts, or of images that all get the same `text`.
            text: a sentence, or a list of them about one image.
            threshold: probability above which a pixel belongs to the mask.
            batch_size: number of images that the image encoder sees at a time.
            num_workers: number of threads that read images.
            show_progress: whether to show a progress bar over the images (needs tqdm); by default for lists and
                datasets of 20 or more.

        Returns:
            For one image a list with a dict for each sentence: `label`, the sentence; `score`, the mean probability
            inside the mask, 0.0 if it is empty; `mask`, a PIL image of mode "L" and of the image's own size (as a
            viewer shows it), 255 inside and 0 outside. For a list a list of such lists, for a generator or dataset
            an iterator over them.

        Raises:
            ValueError: for anything else as images or sentences, and for sentences without words.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"Expected a threshold from 0 to 1, got {threshold}.")
        if batch_size < 1:
            raise ValueError(f"Expected batch_size >= 1, got {batch_size}.")
        is_list, is_dataset = _is_list(image), _is_dataset(image)
        if is_list and _is_list(text):
            raise ValueError(
                f"Expected one image with a list of sentences, got {len(image)} images and {len(text)} sentences."  # type: ignore[arg-type]
                ' To ask about several images pass [{"image": ..., "text": ...}, ...].'
            )
        if not (is_list or is_dataset or isinstance(image, Iterator)):
            return next(self._answer_all([image], text, threshold, 1, 0))
        total = len(image) if is_list or is_dataset else None
        inputs = (image[index] for index in range(len(image))) if is_dataset else image
        results = self._answer_all(inputs, text, threshold, batch_size, num_workers)
        results = _show_progress(results, total, show_progress)
        return list(results) if is_list else results

    def encode_images(self, images: Iterable[Any]) -> list[EncodedImage]:
        """Encode images, in one batch, to ask about each as often as you like: pass them in the images' place."""
        return self._encode([self._prepare_image(image) for image in images])

    def _answer_all(
        self, inputs: Iterable[Any], text: Any, threshold: float, batch_size: int, num_workers: int
    ) -> Iterator[list[dict[str, Any]]]:
        """Yields the results of each image."""
        inputs = iter(inputs)
        with ThreadPoolExecutor(max(num_workers, 1)) as pool:
            while batch := list(islice(inputs, batch_size)):
                pairs = [_split_input(item, text) for item in batch]
                sentences = [[texts] if isinstance(texts, str) else list(texts) for _, texts in pairs]
                words = [self._encode_sentences(texts) for texts in sentences]
                images = self._encode(list(pool.map(self._prepare_image, [image for image, _ in pairs])))
                yield from self._answer(images, sentences, words, threshold)

    def _answer(
        self, images: list[EncodedImage], sentences: list[list[str]], words: list[np.ndarray], threshold: float
    ) -> Iterator[list[dict[str, Any]]]:
        vision_embeds = np.stack([image.vision_embeds for image in images])  # (B, h, w, hidden)
        image_indices = np.repeat(np.arange(len(images)), [len(texts) for texts in sentences])  # (N,)
        input_ids = np.concatenate(words)  # (N, slots)
        parts = []
        for start in range(0, len(input_ids), _SENTENCES_AT_A_TIME):
            chunk = slice(start, start + _SENTENCES_AT_A_TIME)
            indices, chunk_indices = np.unique(image_indices[chunk], return_inverse=True)
            inputs = {"input_ids": input_ids[chunk], "image_indices": chunk_indices.astype(np.int64)}
            parts.append(self.sentence_query.run(["logits"], {"vision_embeds": vision_embeds[indices], **inputs})[0])
        logits = iter(np.concatenate(parts))  # (N, height, width), of the canvas or, without pixel decoder, the grid
        for image, texts in zip(images, sentences):
            yield [self._make_result(text, next(logits), image.size, threshold) for text in texts]

    def _make_result(
        self, text: str, logits: np.ndarray, image_size: tuple[int, int], threshold: float
    ) -> dict[str, Any]:
        if not np.isfinite(logits).all():
            raise ValueError("Expected finite logits, got some that are infinite or not a number: is the graph whole?")
        logits = _undo_letterbox(logits, self.image_size, image_size)
        with np.errstate(divide="ignore"):
            mask = logits > float(np.log(threshold) - np.log1p(-threshold))
        with np.errstate(over="ignore"):
            probabilities = 1 / (1 + np.exp(-logits[mask]))
        score = float(probabilities.mean(dtype=np.float64)) if mask.any() else 0.0
        return {"label": text, "score": score, "mask": Image.fromarray(mask.astype(np.uint8) * 255)}

    def _encode_sentences(self, sentences: list[str]) -> np.ndarray:
        """The words' ids, int64 of shape (sentences, slots), padded on the left."""
        strangers = [sentence for sentence in sentences if not isinstance(sentence, str)]
        if strangers or not sentences:
            got = f"{strangers[0]!r} of type {type(strangers[0]).__name__}" if strangers else "none"
            raise ValueError(f"Expected a sentence or more, as strings, got {got}.")
        encodings = self.tokenizer.encode_batch(sentences, add_special_tokens=False)
        for number, (sentence, encoding) in enumerate(zip(sentences, encodings)):
            if not any(encoding.attention_mask):
                raise ValueError(f"Expected sentences with at least one word, got {sentence!r} as sentence {number}.")
        return np.array([encoding.ids for encoding in encodings], dtype=np.int64)

    def _encode(self, prepared: list[EncodedImage | tuple[np.ndarray, tuple[int, int]]]) -> list[EncodedImage]:
        """Encodes, in one batch, those that are not yet encoded."""
        pending = [item for item in prepared if not isinstance(item, EncodedImage)]
        vision_embeds: Iterator[np.ndarray] = iter(())
        if pending:
            pixel_values = np.stack([pixels for pixels, _ in pending])  # (B, 3, height, width)
            vision_embeds = iter(self.image_encoder.run(["vision_embeds"], {"pixel_values": pixel_values})[0])
        return [
            item if isinstance(item, EncodedImage) else EncodedImage(next(vision_embeds), item[1]) for item in prepared
        ]

    def _prepare_image(self, image: Any) -> EncodedImage | tuple[np.ndarray, tuple[int, int]]:
        """Pixel values, float32 (3, height, width) of the canvas, and (height, width) of the image."""
        if isinstance(image, EncodedImage):
            return image
        pixels = _read_image(image)  # (3, height, width), uint8
        image_size = (pixels.shape[1], pixels.shape[2])
        top, left, height, width = _get_letterbox(image_size, self.image_size)
        pixels = _resize(pixels, height, width, self.settings["resample"])
        canvas = np.zeros((3, *self.image_size), dtype=np.float32)
        if self.settings["pad_after_normalization"]:
            canvas[:, top : top + height, left : left + width] = self._normalize(pixels)
            return canvas, image_size
        canvas[:, top : top + height, left : left + width] = pixels
        return self._normalize(canvas), image_size

    def _normalize(self, pixels: np.ndarray) -> np.ndarray:
        mean, std = (np.array(self.settings[name], np.float32)[:, None, None] for name in ("image_mean", "image_std"))
        pixels = (pixels.astype(np.float64) * self.settings["rescale_factor"]).astype(np.float32)
        return (pixels - mean) / std


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not isinstance(value, EncodedImage)


def _is_dataset(value: Any) -> bool:
    others = (str, bytes, list, tuple, Mapping, np.ndarray, Image.Image)
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, others)


def _split_input(item: Any, text: Any) -> tuple[Any, Any]:
    """Returns the image and the text of one item of the input."""
    if isinstance(item, Mapping):
        if text is not None or not {"image", "text"} <= set(item):
            raise ValueError(
                'Expected dicts as {"image": ..., "text": ...} and no text beside them, got the keys'
                f" {sorted(map(str, item))} and text={text!r}."
            )
        item, text = item["image"], item["text"]
    if not isinstance(text, (str, list, tuple)):
        raise ValueError(f"Expected a sentence or a list of them as text, got {text!r}.")
    return item, text


def _show_progress(results: Iterator[Any], total: int | None, show_progress: bool | None) -> Iterator[Any]:
    if show_progress is None:
        show_progress = total is not None and total >= _PROGRESS_FROM
    if not show_progress:
        return results
    from tqdm import tqdm  # it comes with tokenizers, by way of huggingface_hub

    return iter(tqdm(results, total=total, unit="image"))


def _read_image(image: Any) -> np.ndarray:
    """An image as a viewer shows it, in 8-bit RGB of shape (3, height, width), transparency composited onto white."""
    if isinstance(image, (str, os.PathLike)):
        image = _open_image(os.fspath(image))
    if isinstance(image, Image.Image):
        array = _pil_to_array(image)
    elif isinstance(image, np.ndarray):
        array = _to_channels_first(image)
    else:
        raise ValueError(
            "Expected an image as a PIL image, a NumPy array, a path, a URL or an EncodedImage, got"
            f" {type(image).__name__}."
        )
    if array.size == 0:
        raise ValueError(f"Expected an image of at least one pixel, got (channels, height, width) {array.shape}.")
    return _to_rgb(_to_uint8(array))


def _open_image(source: str) -> Image.Image:
    if os.path.isfile(source):
        return Image.open(source)
    if source.startswith(("http://", "https://")):
        with urllib.request.urlopen(source, timeout=60) as response:
            return Image.open(BytesIO(response.read()))
    try:
        encoded = source.partition(",")[2] if source.startswith("data:image/") else source
        return Image.open(BytesIO(base64.b64decode(encoded, validate=True)))
    except (ValueError, OSError) as error:
        raise ValueError(f"Expected the path of a file, a URL or an image in base64, got {source[:100]!r}.") from error


def _pil_to_array(image: Image.Image) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def _to_channels_first(image: np.ndarray) -> np.ndarray:
    image = image[..., None] if image.ndim == 2 else image
    ends = [end for end in (-1, 0) if image.ndim == 3 and image.shape[end] in _CHANNELS]
    if not ends:
        raise ValueError(
            "Expected an image of shape (height, width), (height, width, channels) or (channels, height, width) with"
            f" 1, 3 or 4 channels, got {image.shape}."
        )
    return np.moveaxis(image, ends[0], 0)


def _to_uint8(array: np.ndarray) -> np.ndarray:
    """Scales an image of any number type to 0..255."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    low, high = float(array.min()), float(array.max())
    ranges = [65535] if array.dtype == np.uint16 else [255, 65535]
    if array.dtype.kind == "f":
        ranges = [1, 255]
    full = next((full for full in ranges if -_OVERSHOOT * full <= low and high <= full * (1 + _OVERSHOOT)), None)
    if full is None:  # NaN ends here, too
        raise ValueError(
            "Expected the values of an image in 0..1 or 0..255 for floats, in 0..255 or 0..65535 for integers; got"
            f" {array.dtype} from {low} to {high}."
        )
    return np.clip(np.round(array * (255.0 / full)), 0, 255).astype(np.uint8)


def _to_rgb(array: np.ndarray) -> np.ndarray:
    if array.shape[0] == 4:
        alpha = array[3:].astype(np.float32) / 255
        array = np.round(alpha * array[:3] + (1 - alpha) * 255).astype(np.uint8)
    return np.repeat(array, 3, axis=0) if array.shape[0] == 1 else array


def _get_letterbox(image_size: tuple[int, int], canvas_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width), in pixels of the canvas, of an image (height, width) on it: as large as fits."""
    scale = min(canvas / image for canvas, image in zip(canvas_size, image_size))
    height, width = (min(max(round(image * scale), 1), canvas) for canvas, image in zip(canvas_size, image_size))
    return (canvas_size[0] - height) // 2, (canvas_size[1] - width) // 2, height, width


def _resize(image: np.ndarray, height: int, width: int, resample: int) -> np.ndarray:
    if image.shape[-2:] == (height, width):
        return image
    channels = [Image.fromarray(channel).resize((width, height), Image.Resampling(resample)) for channel in image]
    return np.stack([np.asarray(channel) for channel in channels])


def _undo_letterbox(logits: np.ndarray, canvas_size: tuple[int, int], image_size: tuple[int, int]) -> np.ndarray:
    """Cuts the image out of one logit map (height, width) of the canvas and resizes it to the image's size."""
    logits = _interpolate(logits, canvas_size)
    top, left, height, width = _get_letterbox(image_size, canvas_size)
    return _interpolate(logits[top : top + height, left : left + width], image_size)


def _interpolate(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, half-pixel centres, no antialiasing: PyTorch's `interpolate` with `align_corners=False`."""
    for axis, length in enumerate(size):
        old_length = array.shape[axis]
        if old_length == length:
            continue
        positions = np.maximum((np.arange(length) + 0.5) * (old_length / length) - 0.5, 0)
        lower = np.floor(positions).astype(np.int64)
        upper = np.minimum(lower + 1, old_length - 1)
        weights = (positions - lower).astype(np.float32)
        weights = np.expand_dims(weights, 1 - axis)  # along `axis`
        array = array.take(lower, axis) * (1 - weights) + array.take(upper, axis) * weights
    return array


__all__ = ["EncodedImage", "ReSTROnnxPipeline"]
