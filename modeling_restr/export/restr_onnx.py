"""
Referring image segmentation with an exported ReSTR: photographs and sentences in, a mask per sentence out.

This file is next to the graphs that it runs. It needs only NumPy, Pillow, onnxruntime and tokenizers:

    import sys

    sys.path.append("restr-onnx")  # the exported folder
    from restr_onnx import ReSTROnnxPipeline

    pipe = ReSTROnnxPipeline("restr-onnx")
    pipe("photo.jpg", text="the dog on the left")

Images and masks are read and prepared exactly as in `image_reading_restr.py` and `image_processing_restr.py`, which
explain why. Inputs and results are the same as in `pipeline_restr.py`.
"""

import base64
import hashlib
import json
import logging
import os
import string
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import numpy as np
import onnxruntime
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from tokenizers import Encoding, Tokenizer


logger = logging.getLogger(__name__)

_UNKNOWN = "<unk>"
# Maximum number of words of one kind that a warning names, and of characters per word.
_MAX_NAMED_WORDS, _MAX_NAMED_CHARACTERS = 20, 50
_CHANNELS = (1, 3, 4)
# How far a float image may overshoot its range, as resampling filters do.
_OVERSHOOT = 1e-3
# Lists and datasets of at least this length show their progress by default.
_PROGRESS_FROM = 20
# Sentences that are decoded at a time. At 480 x 480 pixels each takes about 0.13 GB.
_SENTENCES_AT_A_TIME = 32


class UnreadableImageError(ValueError):
    """An image is missing, damaged, too large or of an unknown kind, or not an image at all. The message names it."""


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image as [`ReSTROnnxPipeline.encode_image`] returns it. A call takes it in place of the image."""

    vision_embeds: np.ndarray  # float32 (h, w, vision_hidden_size), the features of the patches
    size: tuple[int, int]  # (height, width) of the image in pixels
    input_size: tuple[int, int]  # (height, width) of the model's input in pixels
    encoder: str  # hash of the image encoder


class ReSTROnnxPipeline:
    """
    [`ReSTRPipeline`] with the two graphs of an exported folder, without PyTorch and Transformers.

    Example:

    ```python
    >>> pipe = ReSTROnnxPipeline("restr-onnx")
    >>> pipe("photo.jpg", text="the dog on the left")
    [{'label': 'the dog on the left', 'score': 0.93, 'mask': <PIL.Image.Image image mode=L size=640x480>,
      'unknown_words': [], 'truncated': False}]
    >>> results = pipe([{"image": "photo.jpg", "text": ["the dog", "the ball"]}, ...], batch_size=8)
    >>> encoded = pipe.encode_image("photo.jpg")  # once
    >>> pipe(encoded, text="the ball"), pipe(encoded, text="the cat")  # as often as you like
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
            folder: Folder that `restr export` wrote, by default the one of this file.
            precision: "float32", or "int8" for graphs with 8-bit weights if the folder has them.
            providers: Providers of ONNX Runtime, such as `["CUDAExecutionProvider", "CPUExecutionProvider"]`.
            session_options: Options of ONNX Runtime, such as the number of threads.

        Raises:
            ValueError: The folder lacks a file, or the precision is another one.
        """
        folder = Path(__file__).parent if folder is None else Path(folder)
        suffixes = {"float32": "", "int8": "_int8"}
        if precision not in suffixes:
            raise ValueError(f"Expected a precision among {', '.join(suffixes)}, got {precision!r}.")
        graphs = [folder / f"{name}{suffixes[precision]}.onnx" for name in ("image_encoder", "sentence_query")]
        settings, tokenizer = folder / "restr_onnx.json", folder / "tokenizer.json"
        missing = [path.name for path in (*graphs, settings, tokenizer) if not path.is_file()]
        if missing:
            raise ValueError(f"Expected a folder that restr export wrote, got {folder}, which lacks {missing}.")
        self._encoder_path = graphs[0]
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
            image: An image (PIL image, NumPy array, path, URL, data URI, base64, bytes, open file or [`EncodedImage`])
                with its `text`; or `{"image": ..., "text": ...}`; or a list, generator or dataset (anything with a
                length and an index) of these dicts, or of images that all get the same `text`.
            text: A sentence, or a list of sentences about one image.
            threshold: Probability above which a pixel is in the mask.
            batch_size: Number of images that the image encoder sees at a time.
            num_workers: Number of threads that read images.
            show_progress: Whether to show a progress bar over the images (needs tqdm). By default it is shown for
                lists and datasets of 20 or more.

        Returns:
            For one image a list with a dict per sentence: `label`, the sentence; `score`, the mean probability inside
            the mask, 0.0 if it is empty; `mask`, a PIL image of mode "L" with the image's own size (as a viewer shows
            it), 255 inside and 0 outside; `unknown_words`, which the model reads as `<unk>`; `truncated`, whether the
            sentence has more words than the model reads. For a list of images a list of these lists, for a generator
            or dataset an iterator over them. One warning per call names all words that were not read.

        Raises:
            UnreadableImageError: (a ValueError) An image cannot be read. The message names its path, or its place in
                the list.
            ValueError: Images or sentences are of another kind, a sentence has no words, or an image was encoded by
                another model or at another size.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"Expected a threshold from 0 to 1, got {threshold}.")
        if batch_size < 1:
            raise ValueError(f"Expected batch_size >= 1, got {batch_size}.")
        is_list, is_dataset = isinstance(image, (list, tuple)), _is_dataset(image)
        if is_list and isinstance(text, (list, tuple)):
            raise ValueError(
                f"Expected one image with a list of sentences, got {len(image)} images and {len(text)} sentences."  # type: ignore[arg-type]
                ' To ask about several images pass [{"image": ..., "text": ...}, ...].'
            )
        if not (is_list or is_dataset or (isinstance(image, Iterator) and not _is_image_file(image))):
            (result,) = self._answer_all([(None, image)], text, threshold, 1, 0)
            return result
        total = len(image) if is_list or is_dataset else None
        inputs = (image[index] for index in range(len(image))) if is_dataset else image
        results = self._answer_all(enumerate(inputs), text, threshold, batch_size, num_workers)
        results = _show_progress(results, total, show_progress)
        return list(results) if is_list else results

    def encode_image(self, image: Any) -> EncodedImage:
        """
        Encode an image, to ask about it in several calls. The result may be pickled and used in other processes.

        Args:
            image: An image in any form that a call takes.

        Raises:
            UnreadableImageError: (a ValueError) The image cannot be read.
        """
        prepared = self._prepare_image(image)
        (vision_embeds,) = self._encode([prepared])
        return EncodedImage(vision_embeds, prepared.size, self.image_size, self._encoder_hash)

    @cached_property
    def _encoder_hash(self) -> str:
        digest = hashlib.sha256()
        weights = Path(f"{self._encoder_path}.data")  # if they are above 2 GB
        for path in (self._encoder_path, weights):
            if path.is_file():
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _answer_all(
        self, inputs: Iterable[tuple[int | None, Any]], text: Any, threshold: float, batch_size: int, num_workers: int
    ) -> Iterator[list[dict[str, Any]]]:
        """Yield the results of each of the numbered images."""
        inputs = iter(inputs)
        lost_words: list[dict[str, list[str]]] = []
        try:
            with ThreadPoolExecutor(max(num_workers, 1)) as pool:
                while batch := list(islice(inputs, batch_size)):
                    prepared, sentences = zip(*pool.map(partial(self._prepare_item, text), batch))
                    lost_words += [lost for texts in sentences for lost in texts.lost_words if any(lost.values())]
                    yield from self._answer(prepared, sentences, threshold)
        finally:
            if warning := self._describe_lost_words(lost_words):
                logger.warning(warning)

    def _prepare_item(self, text: Any, numbered: tuple[int | None, Any]) -> tuple[Any, "_Sentences"]:
        number, item = numbered
        with _numbering(number):
            image, texts = _split_input(item, text)
            sentences = self._encode_sentences([texts] if isinstance(texts, str) else list(texts))
            return self._prepare_image(image), sentences

    def _answer(
        self, images: Sequence["EncodedImage | _PreparedImage"], sentences: Sequence["_Sentences"], threshold: float
    ) -> Iterator[list[dict[str, Any]]]:
        vision_embeds = self._encode(images)  # (B, h, w, hidden)
        image_indices = np.repeat(np.arange(len(images)), [len(texts.texts) for texts in sentences])  # (N,)
        input_ids = np.concatenate([texts.input_ids for texts in sentences])  # (N, slots)
        parts = []
        for start in range(0, len(input_ids), _SENTENCES_AT_A_TIME):
            chunk = slice(start, start + _SENTENCES_AT_A_TIME)
            indices, chunk_indices = np.unique(image_indices[chunk], return_inverse=True)
            inputs = {"input_ids": input_ids[chunk], "image_indices": chunk_indices.astype(np.int64)}
            parts.append(self.sentence_query.run(["logits"], {"vision_embeds": vision_embeds[indices], **inputs})[0])
        logits = iter(np.concatenate(parts))  # (N, height, width), of the canvas or, without pixel decoder, the grid
        for image, texts in zip(images, sentences):
            masks = [self._make_mask(next(logits), image.size, threshold) for _ in texts.texts]
            yield [
                {
                    "label": text,
                    **mask,
                    "unknown_words": lost["unknown_words"],
                    "truncated": bool(lost["cut_words"]),
                }
                for text, mask, lost in zip(texts.texts, masks, texts.lost_words)
            ]

    def _make_mask(self, logits: np.ndarray, image_size: tuple[int, int], threshold: float) -> dict[str, Any]:
        if not np.isfinite(logits).all():
            raise ValueError(
                "Expected finite logits, got some that are infinite or not a number. Export the model again."
            )
        logits = _undo_letterbox(logits, self.image_size, image_size)
        with np.errstate(divide="ignore"):
            mask = logits > float(np.log(threshold) - np.log1p(-threshold))
        with np.errstate(over="ignore"):
            probabilities = 1 / (1 + np.exp(-logits[mask]))
        score = float(probabilities.mean(dtype=np.float64)) if mask.any() else 0.0
        return {"score": score, "mask": Image.fromarray(mask.astype(np.uint8) * 255)}

    def _encode_sentences(self, sentences: list[str]) -> "_Sentences":
        _check_sentences(sentences)
        composed = [unicodedata.normalize("NFC", sentence) for sentence in sentences]
        encodings = self.tokenizer.encode_batch(composed, add_special_tokens=False)
        for number, (sentence, encoding) in enumerate(zip(sentences, encodings)):
            if not any(encoding.attention_mask):
                raise ValueError(f"Expected sentences with at least one word, got {sentence!r} as sentence {number}.")
        input_ids = np.array([encoding.ids for encoding in encodings], dtype=np.int64)
        lost_words = [self._find_lost_words(*pair) for pair in zip(composed, encodings)]
        return _Sentences(sentences, input_ids, lost_words)

    def _find_lost_words(self, sentence: str, encoding: Encoding) -> dict[str, list[str]]:
        def list_words(part: Encoding, token: str | None = None) -> list[str]:
            tokens = zip(part.tokens, part.offsets, part.attention_mask)
            spans = [span for name, span, is_word in tokens if is_word and token in (None, name)]
            return [_strip_punctuation(sentence[start:end]) for start, end in spans]

        cut = [word for part in encoding.overflowing for word in list_words(part)]
        unknown = list_words(encoding, _UNKNOWN)
        return {"unknown_words": list(dict.fromkeys(unknown)), "cut_words": list(dict.fromkeys(cut))}

    def _describe_lost_words(self, lost_words: list[dict[str, list[str]]]) -> str:
        unknown, cut = (
            _name_words(word for lost in lost_words for word in lost[key]) for key in ("unknown_words", "cut_words")
        )
        parts = []
        if unknown:
            parts.append(f"The model does not know {unknown} and reads each as {_UNKNOWN}: use others.")
        if cut:
            truncation: Any = self.tokenizer.truncation
            slots = truncation["max_length"]
            parts.append(f"The model reads the first {slots} words of a sentence, which cuts off {cut}: use fewer.")
        return " ".join(parts)

    def _encode(self, images: Sequence["EncodedImage | _PreparedImage"]) -> np.ndarray:
        """Encode the images that are not yet encoded, in one batch. Returns (B, h, w, hidden)."""
        pixel_values = [image.pixel_values for image in images if isinstance(image, _PreparedImage)]
        new: Iterator[np.ndarray] = iter(())
        if pixel_values:
            new = iter(self.image_encoder.run(["vision_embeds"], {"pixel_values": np.stack(pixel_values)})[0])
        return np.stack([next(new) if isinstance(image, _PreparedImage) else image.vision_embeds for image in images])

    def _prepare_image(self, image: Any) -> "EncodedImage | _PreparedImage":
        if _is_encoded(image):
            self._check_encoded_image(image)
            return image
        image = _read_image(image)
        image_size = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[1:]
        top, left, height, width = _get_letterbox(image_size, self.image_size)
        pixels = _to_rgb(_resize(image, height, width, self.settings["resample"]))  # (3, height, width), uint8
        canvas = np.zeros((3, *self.image_size), dtype=np.float32)
        if self.settings["pad_after_normalization"]:
            canvas[:, top : top + height, left : left + width] = self._normalize(pixels)
            return _PreparedImage(canvas, image_size)
        canvas[:, top : top + height, left : left + width] = pixels
        return _PreparedImage(self._normalize(canvas), image_size)

    def _check_encoded_image(self, image: Any) -> None:
        if image.encoder != self._encoder_hash:
            raise ValueError(
                "Expected an image that this pipeline's image encoder encoded, got one of another encoder. Encode it"
                " again with this pipeline's `encode_image`."
            )
        if image.input_size != self.image_size:
            raise ValueError(
                f"Expected an image encoded at (height, width) {self.image_size}, got one at {image.input_size}."
                " Encode it again with this pipeline's `encode_image`."
            )

    def _normalize(self, pixels: np.ndarray) -> np.ndarray:
        mean, std = (np.array(self.settings[name], np.float32)[:, None, None] for name in ("image_mean", "image_std"))
        pixels = (pixels.astype(np.float64) * self.settings["rescale_factor"]).astype(np.float32)
        return (pixels - mean) / std


@contextmanager
def _numbering(number: int | None) -> Iterator[None]:
    """Add the number of the item to errors."""
    try:
        yield
    except ValueError as error:
        if number is None:
            raise
        kind = UnreadableImageError if isinstance(error, UnreadableImageError) else ValueError
        raise kind(f"Item {number}: {error}") from error


class _PreparedImage(NamedTuple):
    """An image as the image encoder takes it."""

    pixel_values: np.ndarray  # float32 (3, height, width) of the model's input
    size: tuple[int, int]  # (height, width) of the image in pixels


class _Sentences(NamedTuple):
    """Sentences about an image."""

    texts: list[str]
    input_ids: np.ndarray  # int64 (sentences, slots), the ids of the words, padded on the left
    lost_words: list[dict[str, list[str]]]  # "unknown_words" and "cut_words" per sentence


def _is_encoded(value: Any) -> bool:
    """By name, because another copy of this file, or another pipeline, may have encoded the image."""
    return type(value).__name__ == EncodedImage.__name__


def _is_dataset(value: Any) -> bool:
    others = (str, list, tuple, Mapping, np.ndarray, Image.Image)
    is_other = isinstance(value, others) or _is_image_file(value)
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not is_other


def _is_image_file(value: Any) -> bool:
    """Whether a value is the content of an image file, or an open file."""
    return isinstance(value, (bytes, bytearray, memoryview)) or callable(getattr(value, "read", None))


def _split_input(item: Any, text: Any) -> tuple[Any, Any]:
    """The image and the text of an item."""
    if isinstance(item, Mapping):
        if text is not None or not {"image", "text"} <= set(item):
            raise ValueError(
                'Expected dicts as {"image": ..., "text": ...} and no other text, got the keys'
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
    from tqdm import tqdm  # huggingface_hub, which tokenizers needs, brings it

    return iter(tqdm(results, total=total, unit="image"))


def _check_sentences(sentences: list[Any]) -> None:
    if not sentences:
        raise ValueError("Expected a sentence or more, as strings, got none.")
    for sentence in sentences:
        if not isinstance(sentence, str):
            raise ValueError(
                f"Expected a sentence or more, as strings, got {sentence!r} of type {type(sentence).__name__}."
            )
        if any("\ud800" <= character <= "\udfff" for character in sentence):
            raise ValueError(f"Expected sentences in Unicode, got one half of a surrogate pair in {sentence!r}.")


def _strip_punctuation(piece: str) -> str:
    return piece.strip(string.punctuation + string.whitespace) or piece.strip()


def _name_words(words: Iterable[str]) -> str:
    """The first distinct words, and the number of others."""
    distinct = list(dict.fromkeys(words))
    others = f" and {len(distinct) - _MAX_NAMED_WORDS} more" if len(distinct) > _MAX_NAMED_WORDS else ""
    return ", ".join(repr(word[:_MAX_NAMED_CHARACTERS]) for word in distinct[:_MAX_NAMED_WORDS]) + others


def _read_image(source: Any) -> Image.Image | np.ndarray:
    """An image as a viewer shows it: a PIL image of mode "L" or "RGB", or uint8 (1 or 3 channels, height, width)."""
    try:
        image = _open_image(source)
        if isinstance(image, Image.Image):
            image = _decode(image)
        if isinstance(image, Image.Image):
            return image
        array = _to_channels_first(image)
        if array.size == 0:
            raise ValueError(f"expected at least one pixel, got (channels, height, width) {array.shape}.")
        return _to_rgb(_to_uint8(array))
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        reason = str(error)
        if isinstance(error, UnidentifiedImageError):
            reason = "it is not an image of a known format, such as JPEG or PNG"
        raise UnreadableImageError(
            f"{_name_image(source)} cannot be read: {reason or type(error).__name__}"
        ) from error


def _name_image(source: Any) -> str:
    name = getattr(source, "filename", None) or getattr(source, "name", None)  # of a PIL image or an open file
    name = source if isinstance(source, (str, os.PathLike)) else name
    return repr(os.fspath(name)[:100]) if isinstance(name, (str, os.PathLike)) and name else "The image"


def _open_image(source: Any) -> Image.Image | np.ndarray:
    if isinstance(source, (str, os.PathLike)):
        source = _open_text(os.fspath(source))
    elif _is_image_file(source):
        source = Image.open(BytesIO(_read_bytes(source)))
    if not isinstance(source, (Image.Image, np.ndarray)):
        raise ValueError(
            "expected an image as a PIL image, a NumPy array, a path, a URL, a data URI, bytes, an open file or an"
            f" EncodedImage, got {type(source).__name__}."
        )
    if getattr(source, "format", None) == "EPS" and getattr(source, "tile", None):
        raise ValueError("EPS files are programs, which Pillow runs with Ghostscript. Convert it to PNG first.")
    return source


def _open_text(source: str | bytes) -> Image.Image:
    if isinstance(source, bytes) or os.path.isfile(source):
        return Image.open(source)
    if source.startswith(("http://", "https://")):
        with urlopen(source, timeout=60) as response:
            return Image.open(BytesIO(response.read()))
    try:
        return Image.open(BytesIO(_decode_text(source)))
    except (ValueError, UnidentifiedImageError) as error:
        raise ValueError("there is no such file, and it is not a URL, a base64 image or a data URI.") from error


def _decode_text(text: str) -> bytes:
    if text[:5].lower() != "data:":
        return base64.b64decode(text)
    with urlopen(text) as content:  # decodes a data URI without opening a connection
        return content.read()


def _read_bytes(source: Any) -> bytes:
    if not callable(getattr(source, "read", None)):
        return bytes(source)
    if getattr(source, "seekable", lambda: False)():
        source.seek(0)
    content = source.read()
    if not isinstance(content, (bytes, bytearray, memoryview)):
        raise ValueError(f'expected a file opened in binary mode ("rb"), got one that reads {type(content).__name__}.')
    return bytes(content)


def _decode(image: Image.Image) -> Image.Image | np.ndarray:
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if min(image.size) < 1:
        raise ValueError(f"expected at least one pixel, got (width, height) {image.size}.")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        array = np.asarray(image)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int) and image.mode != "F":
            array = np.where(array == transparent, 65535, array).astype(np.uint16)
        return array
    if image.has_transparency_data:
        return np.asarray(image.convert("RGBA"))
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def _to_channels_first(image: np.ndarray) -> np.ndarray:
    image = image[..., None] if image.ndim == 2 else image
    ends = [end for end in (-1, 0) if image.ndim == 3 and image.shape[end] in _CHANNELS]
    if not ends:
        raise ValueError(
            "expected (height, width), (height, width, channels) or (channels, height, width) with 1, 3 or 4 channels,"
            f" got {image.shape}."
        )
    return np.moveaxis(image, ends[0], 0)


def _to_uint8(array: np.ndarray) -> np.ndarray:
    """Scale an image of any number type to 0..255."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind not in "iuf":
        raise ValueError(f"expected an array of numbers, got one of {array.dtype}.")
    low, high = float(array.min()), float(array.max())
    ranges = [65535] if array.dtype == np.uint16 else [255, 65535]
    if array.dtype.kind == "f":
        ranges = [1, 255]
    full = next((full for full in ranges if -_OVERSHOOT * full <= low and high <= full * (1 + _OVERSHOOT)), None)
    if full is None:  # also for NaN
        raise ValueError(
            "expected values in 0..1 or 0..255 for floats, in 0..255 or 0..65535 for integers; got"
            f" {array.dtype} from {low} to {high}."
        )
    return np.clip(np.round(array * (255.0 / full)), 0, 255).astype(np.uint8)


def _to_rgb(array: np.ndarray) -> np.ndarray:
    if array.shape[0] == 4:
        alpha = array[3:].astype(np.float32) / 255
        array = np.round(alpha * array[:3] + (1 - alpha) * 255).astype(np.uint8)
    return np.repeat(array, 3, axis=0) if array.shape[0] == 1 else array


def _get_letterbox(image_size: tuple[int, int], canvas_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of an image on the canvas, as large as fits. Sizes are (height, width)."""
    scale = min(canvas / image for canvas, image in zip(canvas_size, image_size))
    height, width = (min(max(round(image * scale), 1), canvas) for canvas, image in zip(canvas_size, image_size))
    return (canvas_size[0] - height) // 2, (canvas_size[1] - width) // 2, height, width


def _resize(image: Image.Image | np.ndarray, height: int, width: int, resample: int) -> np.ndarray:
    """Resize to (channels, height, width)."""
    if isinstance(image, Image.Image):
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling(resample))
        array = np.asarray(image)
        return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    if image.shape[-2:] == (height, width):
        return image
    channels = [Image.fromarray(channel).resize((width, height), Image.Resampling(resample)) for channel in image]
    return np.stack([np.asarray(channel) for channel in channels])


def _undo_letterbox(logits: np.ndarray, canvas_size: tuple[int, int], image_size: tuple[int, int]) -> np.ndarray:
    """Cut the image out of a logit map (height, width) of the canvas, and resize it to the image's size."""
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


__all__ = ["EncodedImage", "ReSTROnnxPipeline", "UnreadableImageError"]
