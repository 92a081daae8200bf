"""
The custom handler of a ReSTR model for Hugging Face Inference Endpoints. It needs only the other files of the model's
repository, which it loads with `trust_remote_code`.
"""

import base64
import hashlib
import logging
import os
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

from PIL import Image
from transformers import pipeline
from transformers.pipelines import PIPELINE_REGISTRY


logger = logging.getLogger(__name__)

_TASK = "referring-image-segmentation"
# Pillow reads more formats, some by running other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_URL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_DATA_URI = re.compile(r"data:[^,]{0,100};base64,", re.IGNORECASE)
# The Hub's API says mask_threshold.
_THRESHOLD_NAMES = ("threshold", "mask_threshold")


class RequestError(ValueError):
    """A bad request. The message is for the sender."""


class EndpointHandler:
    """
    Answers requests in the format of `huggingface_hub.InferenceClient.image_segmentation`. It may be called from
    several threads. The features of the latest images are kept, so that further sentences about a file that was sent
    before need neither its decoding nor its encoding.

    Example:

    ```python
    >>> handler = EndpointHandler("path/to/model")
    >>> handler({"inputs": base64_of_the_photo, "text": ["the dog", "the ball"], "parameters": {"threshold": 0.4}})
    [{'label': 'the dog', 'score': 0.93, 'mask': 'iVBORw0KGgo...'}, {'label': 'the ball', 'score': 0.87, 'mask': ...}]
    ```

    Environment variables limit requests. They are read once:

    - `RESTR_MAX_IMAGE_BYTES` (20,000,000): bytes of an image file, before base64;
    - `RESTR_MAX_IMAGE_PIXELS` (40,000,000): width times height. Pillow gets the same limit in the whole process,
      because the server that calls the handler may decode images itself;
    - `RESTR_MAX_SENTENCES` (32): sentences per request;
    - `RESTR_MAX_SENTENCE_LENGTH` (500): characters per sentence;
    - `RESTR_MAX_CACHED_IMAGES` (32): images whose features are kept, each 2.8 MB at 480 x 480 pixels.
    """

    def __init__(self, path: str = "", revision: str | None = None, device: Any = None) -> None:
        """
        Args:
            path (`str`): The model's folder or Hub id.
            revision (`str`, *optional*): Branch, tag or commit of the model on the Hub.
            device (`torch.device` or `str`, *optional*): Device of the model; by default an accelerator if there is one.

        Raises:
            `ValueError`: An environment variable is not a positive integer.
        """
        self.max_bytes = _read_bound("RESTR_MAX_IMAGE_BYTES", 20_000_000)
        self.max_pixels = _read_bound("RESTR_MAX_IMAGE_PIXELS", 40_000_000)
        self.max_sentences = _read_bound("RESTR_MAX_SENTENCES", 32)
        self.max_sentence_length = _read_bound("RESTR_MAX_SENTENCE_LENGTH", 500)
        self.max_cached_images = _read_bound("RESTR_MAX_CACHED_IMAGES", 32)
        # Pillow warns above its limit and refuses images of twice that size.
        Image.MAX_IMAGE_PIXELS = (self.max_pixels + 1) // 2
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        # If the package is imported, its own task loads models with and without code.
        task: Any = _TASK if _TASK in PIPELINE_REGISTRY.get_supported_tasks() else "image-segmentation"
        pipe: Any = pipeline(task, model=path, revision=revision, device=device, trust_remote_code=True)
        self.pipe, self._tokenizer = pipe, pipe.processor.tokenizer
        # Pipelines are not thread-safe: each call sets the tokenizer's padding. One request at a time also bounds memory.
        self._lock = threading.Lock()
        # PyTorch and malloc keep memory for each thread that runs the model.
        self._model_thread = ThreadPoolExecutor(max_workers=1)
        # By the hash of their files, the latest last.
        self._encoded_images: OrderedDict[str | None, Any] = OrderedDict()

    def __call__(self, data: Mapping[str, Any]) -> list[dict[str, Any]]:
        """
        Args:
            data (`Mapping[str, Any]`): The request:

                - `inputs`: the image as base64 of its file (also in a data URI), bytes, an open file or a PIL image.
                  Paths and URLs are refused;
                - `text`: a list of sentences about it, or a string with one sentence per line;
                - `parameters`: `threshold` or, with the same meaning, `mask_threshold`: the probability, from 0 to 1,
                  above which a pixel belongs to a mask (0.5 by default). `text` may also be here.

        Returns:
            `list[dict]`: For each sentence `label`, the sentence; `score`, the mean probability inside the mask, 0.0 if
            it is empty; `mask`, a PNG of the image's own size in base64, 255 inside and 0 outside; `unknown_words`,
            the words that the model does not know; `truncated`, whether the sentence has more words than the model
            reads.

        Raises:
            `RequestError`: (a `ValueError`) The request is bad. The message says why.
            `RuntimeError`: Anything else failed. The reason is only logged.
        """
        try:
            image, file_hash, sentences, options = self._read_request(data)
            with self._lock:
                return self._model_thread.submit(self._ask, image, file_hash, sentences, options).result()
        except RequestError:
            raise
        except Exception as error:
            # By name, because the class may be the package's or the repository's.
            if type(error).__name__ == "UnreadableImageError":
                raise RequestError(str(error)) from error
            logger.exception("The model failed on a request.")
            raise RuntimeError("The model failed on this request; the server's log says why.") from error

    def _ask(
        self, image: Image.Image, file_hash: str | None, sentences: list[str], options: dict[str, float]
    ) -> list[dict[str, Any]]:
        self._check_words(sentences)
        results = self.pipe(self._encode(image, file_hash), text=sentences, **options)
        return [{**result, "mask": _to_base64_png(result["mask"])} for result in results]

    def _encode(self, image: Image.Image, file_hash: str | None) -> Any:
        """Encode an image unless it is among the latest ones. The caller holds the lock."""
        encoded = self._encoded_images.pop(file_hash, None)
        if encoded is None:
            _decode(image)
            encoded = self.pipe.encode_image(image)
        if file_hash is not None:
            self._encoded_images[file_hash] = encoded
            if len(self._encoded_images) > self.max_cached_images:
                self._encoded_images.popitem(last=False)
        return encoded

    def _read_request(self, data: Mapping[str, Any]) -> tuple[Image.Image, str | None, list[str], dict[str, float]]:
        """The image with the hash of its file, the sentences, and the options of the pipeline."""
        _check_names(data, ("inputs", "text", "parameters"), "the request")
        if data.get("inputs") is None:
            raise RequestError("Expected an image as 'inputs', got none.")
        parameters = {} if data.get("parameters") is None else data["parameters"]
        _check_names(parameters, ("text", *_THRESHOLD_NAMES), "'parameters'")
        texts = [part["text"] for part in (data, parameters) if part.get("text") is not None]
        if len(texts) != 1:
            raise RequestError(f"Expected 'text' next to 'inputs' or in 'parameters', got it {len(texts)} times.")
        sentences, options = self._read_sentences(texts[0]), _read_options(parameters)
        return *self._open_image(data["inputs"]), sentences, options

    def _read_sentences(self, text: Any) -> list[str]:
        sentences = [line for line in text.splitlines() if line.strip()] if isinstance(text, str) else text
        if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
            raise RequestError("Expected 'text' as a list of sentences, or as a string with one sentence per line.")
        if not 1 <= len(sentences) <= self.max_sentences:
            raise RequestError(f"Expected 1 to {self.max_sentences} sentences, got {len(sentences)}.")
        if any("\ud800" <= character <= "\udfff" for sentence in sentences for character in sentence):
            raise RequestError("Expected sentences in Unicode, got half of a surrogate pair.")
        longest = max(map(len, sentences))
        if longest > self.max_sentence_length:
            raise RequestError(f"Expected sentences of at most {self.max_sentence_length} characters, got {longest}.")
        return sentences

    def _check_words(self, sentences: list[str]) -> None:
        for sentence in sentences:
            if not self._tokenizer.tokenize(sentence):
                raise RequestError(f"Expected sentences with at least one word, got {sentence!r}.")

    def _open_image(self, inputs: Any) -> tuple[Image.Image, str | None]:
        """Open the image without decoding its pixels, and hash its file, if it is one."""
        file_hash = None
        if isinstance(inputs, str):
            inputs = self._decode_base64(inputs)
        elif callable(getattr(inputs, "read", None)):
            if getattr(inputs, "seekable", lambda: False)():
                inputs.seek(0)
            inputs = inputs.read(self.max_bytes + 1)
        if isinstance(inputs, (bytes, bytearray, memoryview)):
            self._check_num_bytes(len(inputs))
            file_hash = hashlib.sha256(inputs).hexdigest()
            inputs = self._open_file(bytes(inputs))
        if not isinstance(inputs, Image.Image):
            raise RequestError(f"Expected an image as base64 in 'inputs', got {type(inputs).__name__}.")
        width, height = inputs.size
        if not 1 <= width * height <= self.max_pixels:
            raise RequestError(f"Expected an image of 1 to {self.max_pixels} pixels, got {width} x {height}.")
        return inputs, file_hash

    def _open_file(self, content: bytes) -> Image.Image:
        """Read an image's header."""
        try:
            image = Image.open(BytesIO(content), formats=_FORMATS)
            # Many cameras write MPO files, named .jpg. Their first image is the photo.
            is_animated = getattr(image, "is_animated", False) and image.format != "MPO"
        except Image.DecompressionBombError:
            raise RequestError(f"Expected an image of 1 to {self.max_pixels} pixels, got a larger one.") from None
        except Exception:  # noqa: BLE001  (damaged and hostile files make readers raise anything)
            raise RequestError(f"Expected an image in 'inputs' ({', '.join(_FORMATS)}), got something else.") from None
        if is_animated:
            raise RequestError("Expected a single image in 'inputs', got a file with several frames or pages.")
        return image

    def _decode_base64(self, text: str) -> bytes:
        text = _DATA_URI.sub("", text, count=1) if _DATA_URI.match(text) else text
        if _URL.match(text):
            raise RequestError("Expected the image itself as base64 in 'inputs', got a URL. URLs are not opened.")
        self._check_num_bytes(len(text) // 4 * 3 - text[-2:].count("="))
        try:
            return base64.b64decode(text, validate=True)
        except ValueError:
            raise RequestError(
                "Expected the image itself as standard base64 in one line in 'inputs'. Paths are not opened."
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
        raise RequestError(f"Expected only {', '.join(names)} in {where}, got {unknown}.")


def _read_options(parameters: Mapping[str, Any]) -> dict[str, float]:
    given = [parameters[name] for name in _THRESHOLD_NAMES if parameters.get(name) is not None]
    if not given:
        return {}
    try:
        # Numbers in a query are strings.
        (threshold,) = (float(value) for value in given if not isinstance(value, bool))
    except (TypeError, ValueError, OverflowError):
        threshold = -1.0
    if not 0 <= threshold <= 1:
        raise RequestError("Expected one threshold from 0 to 1, as threshold or mask_threshold.")
    return {"threshold": threshold}


def _decode(image: Image.Image) -> None:
    try:
        image.load()
        image.getexif()
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001
        raise RequestError(f"Expected a complete image in 'inputs', got a damaged one: {error}") from None


def _to_base64_png(mask: Image.Image) -> str:
    buffer = BytesIO()
    mask.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
