"""ReSTR's processor: turns images and referring expressions into the model's inputs, and its logits into masks."""

from .requirements_restr import TRANSFORMERS  # noqa: F401  (first: checks the version of transformers)


# isort: split
import copy
import os
import string
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin

from .configuration_restr import MODEL_TAGS
from .image_processing_restr import ReSTRImageProcessorKwargs
from .image_reading_restr import list_images


# Maximum number of words of one kind that a warning names, and of characters per word.
_MAX_NAMED_WORDS, _MAX_NAMED_CHARACTERS = 20, 50


class ReSTRProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: ReSTRImageProcessorKwargs  # type: ignore[misc]
    # Every expression fills all word slots of the tokenizer, because the model's answer depends on their number.
    # Some tokenizer configurations leave the attention mask out.
    _defaults = {  # type: ignore[misc]
        "text_kwargs": {"padding": "max_length", "truncation": True, "return_attention_mask": True}
    }


class ReSTRProcessor(ProcessorMixin):
    r"""
    Combine a [`ReSTRImageProcessor`] with a tokenizer of [`~tokenization_restr.build_tokenizer`].

    Example:

    ```python
    >>> inputs = processor(images=photo, text=["the dog on the left", "the red ball"], return_tensors="pt")
    >>> outputs = model(**inputs)
    >>> sizes = inputs["original_sizes"][inputs["image_indices"]]
    >>> masks = processor.post_process_referring_segmentation(outputs, sizes)
    ```
    """

    valid_processor_kwargs = ReSTRProcessorKwargs  # type: ignore[assignment]

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | list[list[str]] | None = None,
        segmentation_maps: Any | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            images: One image or a list of B, as [`ReSTRImageProcessor`] takes them, or None for sentences alone.
            text: Referring expressions: one or a list about one image, a list of B sentences about B images, a list
                of B lists of sentences, or None for images alone.
            segmentation_maps: One binary mask per sentence, N in their order, each of its image's size.

        Returns:
            For images, `pixel_values` (B, 3, height, width) and `original_sizes` (B, 2) as (height, width). For text,
            `input_ids` and `attention_mask` (N, words). For both, or for text in lists, `image_indices` (N,), the
            image that each sentence is about. For segmentation maps, `labels` (N, height, width) of 0 and 1. Ids are
            valid and every sentence has at least one word: the model relies on that, because it never reads a value.

        Raises:
            UnreadableImageError: (a ValueError) An image cannot be read. The message gives its path or its place in
                the list.
            ValueError: Images, sentences and segmentation maps do not match, or a sentence has no words.
        """
        if images is None and text is None:
            raise ValueError("Expected images, text or both, got neither.")
        if segmentation_maps is not None and (images is None or text is None):
            raise ValueError("Expected images and text with segmentation_maps, which belong to both.")
        merged_kwargs = self._merge_kwargs(
            ReSTRProcessorKwargs,  # type: ignore[arg-type]
            tokenizer_init_kwargs=self.tokenizer.init_kwargs,
            **kwargs,
        )
        return_tensors = merged_kwargs["text_kwargs"].pop("return_tensors", None)
        merged_kwargs["images_kwargs"].pop("return_tensors", None)

        data: dict[str, Any] = {}
        image_indices = None
        image_list: Any = None if images is None else list_images(images)
        if text is not None:
            sentences, image_indices = _match_sentences(text, None if images is None else len(image_list))
            data.update(self._encode_sentences(sentences, merged_kwargs["text_kwargs"]))
        if images is not None:
            images_kwargs = merged_kwargs["images_kwargs"]
            data.update(self.image_processor(image_list, segmentation_maps, image_indices, **images_kwargs))
        if image_indices is not None:
            data["image_indices"] = image_indices
        return BatchFeature(data, tensor_type=return_tensors)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list:
        """
        Save as in transformers, but from a copy without the padding settings of the last call. The files do not depend
        on earlier use, and saving does not change the processor.
        """
        processor = copy.copy(self)
        processor.tokenizer = copy.deepcopy(self.tokenizer)
        processor.tokenizer.backend_tokenizer.no_padding()
        processor.tokenizer.backend_tokenizer.no_truncation()
        return super(ReSTRProcessor, processor).save_pretrained(save_directory, push_to_hub, **kwargs)

    def push_to_hub(self, repo_id: str, *, tags: list[str] | None = None, **kwargs: Any) -> Any:
        """Push as in transformers, with the tags that models get automatically."""
        return super().push_to_hub(repo_id, tags=[*MODEL_TAGS, *(tags or ())], **kwargs)

    def post_process_referring_segmentation(
        self,
        outputs: Any,
        target_sizes: Iterable[tuple[int, int]] | torch.Tensor,
        threshold: float = 0.5,
        return_probabilities: bool = True,
        size: Any | None = None,
    ) -> list[dict[str, torch.Tensor | float]]:
        """See [`ReSTRImageProcessor.post_process_referring_segmentation`]."""
        return self.image_processor.post_process_referring_segmentation(
            outputs, target_sizes, threshold, return_probabilities, size
        )

    def find_lost_words(self, sentences: Sequence[str]) -> list[dict[str, list[str]]]:
        """
        Find the words of each sentence that the model cannot read.

        Returns:
            One dict per sentence with its distinct `unknown_words`, which the model reads as `<unk>`, and
            `cut_words`, for which it has no slot left, spelled as in the sentence.
        """
        sentences = [sentences] if isinstance(sentences, str) else sentences
        composed = [unicodedata.normalize("NFC", sentence) for sentence in sentences]
        # The same settings as in a call: the tokenizer stores them, and other threads use it.
        encodings = self.tokenizer(composed, padding="max_length", truncation=True).encodings
        return [self._find_lost_words(*pair) for pair in zip(composed, encodings, strict=True)]

    def describe_lost_words(self, lost_words: Iterable[dict[str, list[str]]]) -> str | None:
        """Format a warning about the words that [`find_lost_words`] found in all sentences; None if it found none."""
        lost_words = list(lost_words)
        unknown, cut = (
            _name_words(word for lost in lost_words for word in lost[key]) for key in ("unknown_words", "cut_words")
        )
        parts = []
        if unknown:
            parts.append(
                f"The model does not know {unknown} and reads each as {self.tokenizer.unk_token}: use others."
            )
        if cut:
            slots = self.tokenizer.model_max_length
            parts.append(f"The model reads the first {slots} words of a sentence, which cuts off {cut}: use fewer.")
        return " ".join(parts) or None

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "image_indices"]

    def _encode_sentences(self, sentences: list[str], text_kwargs: dict[str, Any]) -> dict[str, list[list[int]]]:
        encoding = self.tokenizer(sentences, **text_kwargs)
        for number, (sentence, ids) in enumerate(zip(sentences, encoding["input_ids"], strict=True)):
            if all(token_id == self.tokenizer.pad_token_id for token_id in ids):
                raise ValueError(f"Expected sentences with at least one word, got {sentence!r} as sentence {number}.")
        return dict(encoding)

    def _find_lost_words(self, sentence: str, encoding: Any) -> dict[str, list[str]]:
        def list_words(part: Any, token_id: int | None = None) -> list[str]:
            tokens = zip(part.ids, part.offsets, part.attention_mask, strict=True)
            spans = [span for number, span, is_word in tokens if is_word and token_id in (None, number)]
            return [_strip_punctuation(sentence[start:end]) for start, end in spans]

        cut = [word for part in encoding.overflowing for word in list_words(part)]
        unknown = list_words(encoding, self.tokenizer.unk_token_id)
        return {"unknown_words": list(dict.fromkeys(unknown)), "cut_words": list(dict.fromkeys(cut))}


def _strip_punctuation(piece: str) -> str:
    return piece.strip(string.punctuation + string.whitespace) or piece.strip()


def _name_words(words: Iterable[str]) -> str:
    """List the first distinct words and the number of the others."""
    distinct = list(dict.fromkeys(words))
    others = f" and {len(distinct) - _MAX_NAMED_WORDS} more" if len(distinct) > _MAX_NAMED_WORDS else ""
    return ", ".join(repr(word[:_MAX_NAMED_CHARACTERS]) for word in distinct[:_MAX_NAMED_WORDS]) + others


def _match_sentences(text: Any, num_images: int | None) -> tuple[list[str], list[int] | None]:
    """Flatten sentences and find the image of each, or None for plain sentences without images."""
    rows = [text] if isinstance(text, str) else text
    if not isinstance(rows, (list, tuple)) or not rows:
        raise ValueError(f"Expected text as a sentence, a list of sentences or a list of lists of them, got {text!r}.")
    num_lists = sum(isinstance(row, (list, tuple)) for row in rows)
    if num_lists not in (0, len(rows)) or not all(rows[:num_lists]):
        raise ValueError(f"Expected only sentences, or only non-empty lists of sentences, got {text!r}.")
    if num_images is not None and num_images != len(rows) and (num_lists or num_images != 1):
        raise ValueError(
            "Expected one image with any number of sentences, as many sentences as images, or one list of sentences"
            f" per image, got {num_images} images and {len(rows)}"
            f" {'lists of sentences' if num_lists else 'sentences'}."
        )
    image_indices = [0] * len(rows) if num_images == 1 else list(range(len(rows)))
    if num_lists:
        image_indices = [index for index, row in enumerate(rows) for _ in row]
        rows = [sentence for row in rows for sentence in row]
    _check_sentences(rows)
    return list(rows), image_indices if num_lists or num_images is not None else None


def _check_sentences(sentences: Iterable[Any]) -> None:
    for sentence in sentences:
        if not isinstance(sentence, str):
            raise ValueError(f"Expected sentences as strings, got {sentence!r} of type {type(sentence).__name__}.")
        if any("\ud800" <= character <= "\udfff" for character in sentence):
            raise ValueError(f"Expected sentences in Unicode, got one half of a surrogate pair in {sentence!r}.")


__all__ = ["ReSTRProcessor", "ReSTRProcessorKwargs"]
