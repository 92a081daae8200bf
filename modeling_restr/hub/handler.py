"""
Serve a ReSTR model: the custom handler that a Hugging Face Inference Endpoint looks for in a model's repository.

Of this project it needs nothing but the other files of the repository, which it loads with `trust_remote_code`.
"""

import base64
import logging
import os
import re
import threading
import warnings
from collections.abc import Mapping
from io import BytesIO
from typing import Any

from PIL import Image
from transformers import pipeline
from transformers.pipelines import PIPELINE_REGISTRY


logger = logging.getLogger(__name__)

_TASK = "referring-image-segmentation"
# Pillow knows many more, some of which run other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_URL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_DATA_URI = re.compile(r"data:[^,]{0,100};base64,", re.IGNORECASE)
# The Hub's name for what the pipeline calls threshold is mask_threshold.
_THRESHOLDS = ("threshold", "mask_threshold")


class RequestError(ValueError):
    """A request is bad. The message says what about it, and is written for whoever sent it."""


class EndpointHandler:
    """
    Answers requests, in any number of threads, as `huggingface_hub.InferenceClient.image_segmentation` reads it.

    Example:

    ```python
    >>> handler = EndpointHandler("path/to/model")
    >>> handler({"inputs": base64_of_the_photo, "text": ["the dog", "the ball"], "parameters": {"threshold": 0.4}})
    [{'label': 'the dog', 'score': 0.93, 'mask': 'iVBORw0KGgo...'}, {'label': 'the ball', 'score': 0.87, 'mask': ...}]
    ```

    What a request may hold is bounded by environment variables, which are read once:

    - `RESTR_MAX_IMAGE_BYTES` (20,000,000): size of an image as sent, before base64;
    - `RESTR_MAX_IMAGE_PIXELS` (40,000,000): its width times its height. The bound also becomes Pillow's own, in the
      whole process: the server that calls the handler may decode images before it does;
    - `RESTR_MAX_SENTENCES` (32): sentences about it;
    - `RESTR_MAX_SENTENCE_LENGTH` (500): characters of a sentence.
    """

    def __init__(self, path: str = "", revision: str | None = None, device: Any = None) -> None:
        """
        Args:
            path (`str`): The model's folder, or its id on the Hub.
            revision (`str`, *optional*): Branch, tag or commit of that model on the Hub.
            device (`torch.device` or `str`, *optional*): Where the model runs; by default on an accelerator if there
                is one.

        Raises:
            `ValueError`: An environment variable is no positive integer.
        """
        self.max_bytes = _read_bound("RESTR_MAX_IMAGE_BYTES", 20_000_000)
        self.max_pixels = _read_bound("RESTR_MAX_IMAGE_PIXELS", 40_000_000)
        self.max_sentences = _read_bound("RESTR_MAX_SENTENCES", 32)
        self.max_sentence_length = _read_bound("RESTR_MAX_SENTENCE_LENGTH", 500)
        # Pillow warns of images that have more pixels, and refuses those that have more than twice as many.
        Image.MAX_IMAGE_PIXELS = (self.max_pixels + 1) // 2
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        # Where the package is imported, it loads models with and without code by its own task.
        task: Any = _TASK if _TASK in PIPELINE_REGISTRY.get_supported_tasks() else "image-segmentation"
        pipe: Any = pipeline(task, model=path, revision=revision, device=device, trust_remote_code=True)
        self.pipe, self._tokenizer = pipe, pipe.processor.tokenizer
        # Pipelines are not made for threads (a tokenizer's padding is set as it is used), and the pixels and masks of
        # one request are enough to have in memory.
        self._lock = threading.Lock()

    def __call__(self, data: Mapping[str, Any]) -> list[dict[str, Any]]:
        """
        Args:
            data (`Mapping[str, Any]`): The request:

                - `inputs`: the image: its file's content as base64 (also in a data URI), bytes or an open file, or a PIL
                  image. Never a path or a URL;
                - `text`: a list of sentences about it, or a string with one sentence a line;
                - `parameters`: `threshold`, from 0 to 1, the probability above which a pixel belongs to a mask (0.5
                  by default; `mask_threshold` is the same). `text` may also stand here.

        Returns:
            `list[dict]`: For each sentence `label`, the sentence; `score`, the mean probability inside the mask, 0.0
            if that is empty; `mask`, a PNG of the image's own size in base64, 255 inside and 0 outside; `unknown_words`,
            those that the model does not know; `truncated`, whether the sentence has more words than it reads. The log
            gets one warning that names the words.

        Raises:
            `RequestError`: (a `ValueError`) The request is bad; the message says what about it.
            `RuntimeError`: Anything else failed; the reason is only logged.
        """
        try:
            image, sentences, options = self._read_request(data)
            with self._lock:
                _decode(image)
                self._check_words(sentences)
                results = self.pipe(image, text=sentences, **options)
                return [{**result, "mask": _to_base64_png(result["mask"])} for result in results]
        except RequestError:
            raise
        except Exception as error:
            # The pipeline's error for images, of which the class may be the package's or the repository's own.
            if type(error).__name__ == "UnreadableImageError":
                raise RequestError(str(error)) from error
            logger.exception("The model failed on a request.")
            raise RuntimeError("The model failed on this request; the server's log says why.") from error

    def _read_request(self, data: Mapping[str, Any]) -> tuple[Image.Image, list[str], dict[str, float]]:
        _check_names(data, ("inputs", "text", "parameters"), "the request")
        if data.get("inputs") is None:
            raise RequestError("Expected an image as 'inputs', got none.")
        parameters = {} if data.get("parameters") is None else data["parameters"]
        _check_names(parameters, ("text", *_THRESHOLDS), "'parameters'")
        texts = [part["text"] for part in (data, parameters) if part.get("text") is not None]
        if len(texts) != 1:
            raise RequestError(f"Expected 'text' beside 'inputs' or among 'parameters', got it {len(texts)} times.")
        sentences = self._read_sentences(texts[0])
        options = _read_options(parameters)
        return self._open_image(data["inputs"]), sentences, options

    def _read_sentences(self, text: Any) -> list[str]:
        sentences = [line for line in text.splitlines() if line.strip()] if isinstance(text, str) else text
        if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
            raise RequestError("Expected 'text' as a list of sentences, or as a string with one sentence a line.")
        if not 1 <= len(sentences) <= self.max_sentences:
            raise RequestError(f"Expected 1 to {self.max_sentences} sentences, got {len(sentences)}.")
        if any("\ud800" <= character <= "\udfff" for sentence in sentences for character in sentence):
            raise RequestError("Expected sentences in Unicode, got one half of a surrogate pair.")
        longest = max(map(len, sentences))
        if longest > self.max_sentence_length:
            raise RequestError(f"Expected sentences of at most {self.max_sentence_length} characters, got {longest}.")
        return sentences

    def _check_words(self, sentences: list[str]) -> None:
        for sentence in sentences:
            if not self._tokenizer.tokenize(sentence):
                raise RequestError(f"Expected sentences with at least one word, got {sentence!r}.")

    def _open_image(self, inputs: Any) -> Image.Image:
        """Returns the image with its pixels not decoded yet, unless a PIL image came decoded."""
        if isinstance(inputs, str):
            inputs = self._decode_base64(inputs)
        elif callable(getattr(inputs, "read", None)):
            inputs = self._read_file(inputs)
        if isinstance(inputs, (bytes, bytearray, memoryview)):
            self._check_num_bytes(len(inputs))
            inputs = self._open_file(bytes(inputs))
        if not isinstance(inputs, Image.Image):
            raise RequestError(f"Expected an image as base64 in 'inputs', got {type(inputs).__name__}.")
        width, height = inputs.size
        if not 1 <= width * height <= self.max_pixels:
            raise RequestError(f"Expected an image of 1 to {self.max_pixels} pixels, got {width} x {height}.")
        return inputs

    def _open_file(self, content: bytes) -> Image.Image:
        """Reads an image's header."""
        try:
            image = Image.open(BytesIO(content), formats=_FORMATS)
            # Of the images in an MPO file, which many cameras write as .jpg, the first is the photo.
            is_animated = getattr(image, "is_animated", False) and image.format != "MPO"
        except Image.DecompressionBombError:
            raise RequestError(f"Expected an image of 1 to {self.max_pixels} pixels, got a larger one.") from None
        except Exception:  # noqa: BLE001  (whatever a damaged or a hostile file makes a reader raise)
            raise RequestError(f"Expected an image in 'inputs' ({', '.join(_FORMATS)}), got something else.") from None
        if is_animated:
            raise RequestError("Expected a single image in 'inputs', got a file with several frames or pages.")
        return image

    def _read_file(self, file: Any) -> Any:
        if getattr(file, "seekable", lambda: False)():
            file.seek(0)
        return file.read(self.max_bytes + 1)

    def _decode_base64(self, text: str) -> bytes:
        text = _DATA_URI.sub("", text, count=1) if _DATA_URI.match(text) else text
        if _URL.match(text):
            raise RequestError("Expected the image itself as base64 in 'inputs', got a URL; URLs are not opened.")
        self._check_num_bytes(len(text) // 4 * 3 - text[-2:].count("="))
        try:
            return base64.b64decode(text, validate=True)
        except ValueError:
            raise RequestError(
                "Expected the image itself in 'inputs', as standard base64 in one line; paths are not opened."
            ) from None

    def _check_num_bytes(self, num_bytes: int) -> None:
        if num_bytes > self.max_bytes:
            raise RequestError(f"Expected an image of at most {self.max_bytes} bytes, got {num_bytes}.")


def _read_bound(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not (value.isdecimal() and int(value) > 0):
        raise ValueError(f"Expected a positive integer in the environment variable {name}, got {value!r}.")
    return int(value)


def _check_names(values: Any, names: tuple[str, ...], where: str) -> None:
    if not isinstance(values, Mapping):
        raise RequestError(f"Expected {where} as an object with {', '.join(names)}, got {type(values).__name__}.")
    unknown = ", ".join(sorted(str(name)[:50] for name in set(values) - set(names))[:5])
    if unknown:
        raise RequestError(f"Expected nothing but {', '.join(names)} in {where}, got {unknown}.")


def _read_options(parameters: Mapping[str, Any]) -> dict[str, float]:
    given = [parameters[name] for name in _THRESHOLDS if parameters.get(name) is not None]
    if not given:
        return {}
    try:
        # A query's numbers may come as strings.
        (threshold,) = (float(value) for value in given if not isinstance(value, bool))
    except (TypeError, ValueError, OverflowError):
        threshold = -1.0
    if not 0 <= threshold <= 1:
        raise RequestError("Expected one threshold from 0 to 1, as threshold or as mask_threshold.")
    return {"threshold": threshold}


def _decode(image: Image.Image) -> None:
    try:
        image.load()
        image.getexif()
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001
        raise RequestError(f"Expected a whole image in 'inputs', got a damaged one: {error}") from None


def _to_base64_png(mask: Image.Image) -> str:
    buffer = BytesIO()
    mask.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
