"""ReSTR's pipeline: photographs and sentences in, one mask per sentence out."""

from .requirements_restr import TRANSFORMERS  # noqa: F401  (first: checks the version of transformers)


# isort: split
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from transformers.pipelines import Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator
from transformers.utils import logging

from .configuration_restr import MODEL_TAGS
from .image_reading_restr import UnreadableImageError, is_image_file
from .vision_encoder_restr import as_pair


logger = logging.get_logger(__name__)

# The task when the package is imported. In a repository with code, the config's `custom_pipelines` has
# "image-segmentation" instead, because `pipeline` asks to trust the code of every task that is listed there.
TASK = "referring-image-segmentation"
_PARAMETERS = ("text", "threshold", "show_progress")
# Length from which lists and datasets show their progress by default.
_PROGRESS_FROM = 20
# Sentences that are decoded at a time. Each takes 0.13 GB at 480 x 480 pixels in float32.
_SENTENCES_AT_A_TIME = 32
# Weights per parameter that tell one image encoder from another. Training changes nearly every weight.
_HASHED_WEIGHTS = 4


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image as [`ReSTRPipeline.encode_image`] returns it. A call takes it in place of the image."""

    vision_embeds: np.ndarray  # float32 (h, w, vision_hidden_size), the features of the patches
    size: tuple[int, int]  # (height, width) of the image in pixels
    input_size: tuple[int, int]  # (height, width) of the model's input in pixels
    encoder: str  # hash of the image encoder


class ReSTRPipeline(Pipeline):
    """
    Referring image segmentation: find in an image what each sentence refers to.

    Example:

    ```python
    >>> from transformers import pipeline
    >>> import modeling_restr

    >>> pipe = pipeline("referring-image-segmentation", model="path/or/id")
    >>> pipe("photo.jpg", text="the dog on the left")
    [{'label': 'the dog on the left', 'score': 0.93, 'mask': <PIL.Image.Image image mode=L size=640x480>,
      'unknown_words': [], 'truncated': False}]
    >>> results = pipe([{"image": "photo.jpg", "text": ["the dog", "the ball"]}, ...], batch_size=8)
    >>> encoded = pipe.encode_image("photo.jpg")  # once
    >>> pipe(encoded, text="the ball"), pipe(encoded, text="the cat")  # as often as you like
    ```

    A call encodes an image once, however many sentences are about it. `batch_size` counts images. The model is set to
    evaluation mode. A bundle or repository with code works without the package:
    `pipeline("image-segmentation", model="path/or/id", trust_remote_code=True)`.

    Raises:
        ValueError: There is no `processor`.
    """

    _load_processor = True  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_video_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError(
                "Expected the model's processor, got none: pass `processor=`, such as "
                "`AutoProcessor.from_pretrained(folder_or_id)`. An image processor and a tokenizer make one: "
                "`ReSTRProcessor(image_processor, tokenizer)`."
            )
        self.model.eval()  # a model that comes from training would drop parts of its image encoder at random

    def __call__(  # type: ignore[override]
        self, image: Any, text: str | list[str] | None = None, **kwargs: Any
    ) -> Any:
        """
        Args:
            image: An image (PIL image, NumPy array, tensor, path, URL, data URI, bytes, open file or
                [`EncodedImage`]) with `text`, a dict `{"image": ..., "text": ...}`, or a list, generator or dataset
                of such dicts or of images that all get the same `text`.
            text: A sentence, or a list of sentences about one image.
            threshold (`float`, defaults to 0.5): Probability above which a pixel belongs to the mask.
            batch_size (`int`, defaults to 1): Number of images that the model encodes at a time.
            num_workers (`int`, defaults to 0): Number of processes that read images.
            show_progress (`bool`, *optional*): Whether to show a progress bar over the images, by default for lists
                and datasets of 20 or more.

        Returns:
            For one image a list with one dict per sentence: `label`, the sentence; `score`, the mean probability
            inside the mask, 0.0 if it is empty; `mask`, a PIL image of mode "L" and of the image's own size (as in a
            viewer), 255 inside and 0 outside; `unknown_words`, which the model reads as `<unk>`; `truncated`, whether
            the sentence has more words than the model reads. For a list of images a list of such lists, for a
            generator or dataset an iterator over them. One warning per call names all words that were not read.

        Raises:
            UnreadableImageError: (a ValueError) An image cannot be read. The message gives its path or its place in
                the list.
            ValueError: Images or sentences have another form, sentences have no words, parameters are unknown, or an
                image was encoded by another model or at another size.
        """
        if text is not None:
            kwargs["text"] = text
        if isinstance(image, (list, tuple)):
            if isinstance(text, (list, tuple)):
                raise ValueError(
                    f"Expected one image with a list of sentences, got {len(image)} images and {len(text)} sentences."
                    ' To ask about several images pass [{"image": ..., "text": ...}, ...].'
                )
            return super().__call__(list(image), **kwargs) if image else []
        if isinstance(image, Iterator) and not is_image_file(image):
            return super().__call__((item for item in image), **kwargs)
        if _is_dataset(image):
            # transformers expects a PyTorch dataset, and a dataset of the `datasets` library is not one.
            rows = image if isinstance(image, Dataset) else Subset(image, range(len(image)))
            return super().__call__(rows, **kwargs)
        return super().__call__([image], **kwargs)[0]

    def encode_image(self, image: Any) -> EncodedImage:
        """
        Encode an image, to ask about it in several calls. The result may be pickled and used in other processes.

        Args:
            image: An image in any other form that a call takes.

        Raises:
            UnreadableImageError: (a ValueError) The image cannot be read.
        """
        processor: Any = self.processor
        inputs = processor(images=[image], return_tensors="pt")
        with self.device_placement(), torch.inference_mode():
            features = self._encode_images([inputs["pixel_values"].to(self.device)])
        return EncodedImage(
            vision_embeds=features[0].float().numpy(force=True),
            size=tuple(inputs["original_sizes"][0].tolist()),
            input_size=tuple(inputs["pixel_values"].shape[2:]),
            encoder=_hash_encoder(self.model),
        )

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save model, processor and code, so that the folder loads with and without this package."""
        processor: Any = self.processor  # transformers' own method leaves it out
        self.model.save_pretrained(save_directory, **kwargs)
        processor.save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, *, tags: list[str] | None = None, **kwargs: Any) -> Any:
        """Push as in transformers, with the tags that models get automatically."""
        return super().push_to_hub(repo_id, tags=[*MODEL_TAGS, *(tags or ())], **kwargs)

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        kwargs.pop("local_files_only", None)  # `transformers.pipeline` passes it on
        unknown = sorted(set(kwargs) - set(_PARAMETERS))
        if unknown:
            raise ValueError(f"Expected parameters among {', '.join(_PARAMETERS)}, got {', '.join(unknown)}.")
        stages = (("text",), (), ("threshold", "show_progress"))
        preprocess, forward, postprocess = (
            {name: kwargs[name] for name in names if name in kwargs} for names in stages
        )
        return preprocess, forward, postprocess

    def preprocess(  # type: ignore[override]
        self, input_: Any, text: str | list[str] | None = None, encoder: str | None = None
    ) -> dict[str, Any]:
        """Prepare one image and its sentences. `encoder` is the hash that encoded images must have: by default the model's."""
        processor: Any = self.processor
        image, text = _split_input(input_, text)
        sentences = [text] if isinstance(text, str) else text
        if _is_encoded(image):
            self._check_encoded_image(image, encoder)
            inputs = processor(text=[sentences], return_tensors="pt")
            inputs["original_sizes"] = torch.tensor([image.size])
        else:
            inputs = processor(images=[image], text=[sentences], return_tensors="pt")
            image = inputs.pop("pixel_values")  # (1, 3, height, width)
        self._check_word_ids(inputs["input_ids"])
        lost_words = processor.find_lost_words(sentences)
        return {**inputs, "images": [image], "text": list(sentences), "lost_words": lost_words}

    def _check_encoded_image(self, image: Any, encoder: str | None) -> None:
        if image.encoder != (encoder or _hash_encoder(self.model)):
            raise ValueError(
                "Expected an image that this pipeline's image encoder encoded, got one of another encoder, or of this"
                " one with other weights. Encode it again with this pipeline's `encode_image`."
            )
        if image.input_size != self._get_input_size():
            raise ValueError(
                f"Expected an image encoded at (height, width) {self._get_input_size()}, got one at"
                f" {image.input_size}. Encode it again with this pipeline's `encode_image`."
            )

    def _get_input_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the model's input."""
        config: Any = self.model.config
        return as_pair(config.vision_config.image_size)

    def _check_word_ids(self, input_ids: torch.Tensor) -> None:
        config: Any = self.model.config
        num_vectors, largest_id = config.text_config.vocab_size, int(input_ids.max())
        if largest_id >= num_vectors:
            raise ValueError(
                f"Expected word ids below {num_vectors}, for which the model has vectors, got {largest_id} from the"
                " tokenizer. Call `model.resize_token_embeddings` for new words."
            )

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict,
        forward_params: dict,
        postprocess_params: dict,
    ) -> Iterator[list[dict[str, Any]]]:
        """Yield the results of each image. transformers' own batches would need one sentence per image."""
        if num_workers:  # worker processes cannot read the weights of a model on a GPU
            preprocess_params = {**preprocess_params, "encoder": _hash_encoder(self.model)}
        total = len(inputs) if isinstance(inputs, Sized) else None
        show_progress = postprocess_params.pop("show_progress", None)
        if show_progress is None:
            show_progress = total is not None and total >= _PROGRESS_FROM
        if total is None and num_workers > 1:
            logger.warning("Workers cannot share an iterator: num_workers is set to 1.")
            num_workers = 1
        dataset = self._prepare_items(inputs, total, preprocess_params)
        loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=_collate)
        lost_words: list[dict] = []
        try:
            with logging.tqdm(total=total, unit="image", disable=not show_progress) as progress:
                for batch in loader:
                    lost_words += [lost for lost in batch["lost_words"] if any(lost.values())]
                    for result in self.postprocess(self.forward(batch, **forward_params), **postprocess_params):
                        progress.update()
                        yield result
        finally:
            processor: Any = self.processor
            if warning := processor.describe_lost_words(lost_words):
                logger.warning(warning)

    def _prepare_items(self, items: Any, total: int | None, params: dict) -> PipelineIterator | PipelineDataset:
        if total is None:
            return PipelineIterator(enumerate(items), self._preprocess_numbered, params)
        if total == 1:
            return PipelineDataset(items, self.preprocess, params)
        return PipelineDataset(_Numbered(items), self._preprocess_numbered, params)

    def _preprocess_numbered(self, numbered: tuple[int, Any], **kwargs: Any) -> dict[str, Any]:
        number, item = numbered
        try:
            return self.preprocess(item, **kwargs)
        except ValueError as error:
            kind = UnreadableImageError if isinstance(error, UnreadableImageError) else ValueError
            raise kind(f"Item {number}: {error}") from error

    def get_inference_context(self) -> Any:
        return torch.inference_mode

    def _forward(self, input_tensors: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        model: Any = self.model
        names = ("input_ids", "attention_mask", "image_indices")
        chunks = zip(*(input_tensors[name].split(_SENTENCES_AT_A_TIME) for name in names))
        features = self._encode_images(input_tensors["images"])  # once, for all chunks
        logits = [model(vision_embeds=features, **dict(zip(names, chunk))).logits for chunk in chunks]
        kept = ("image_indices", "original_sizes", "text", "lost_words")
        return {"logits": torch.cat(logits), **{name: input_tensors[name] for name in kept}}

    def _encode_images(self, images: Sequence[torch.Tensor | EncodedImage]) -> torch.Tensor:
        """Encode the images (1, 3, height, width) that are not yet encoded, in one batch. Returns (B, h, w, hidden)."""
        model: Any = self.model
        pixel_values = [image for image in images if isinstance(image, torch.Tensor)]
        new: Iterator[torch.Tensor] = iter(())
        if pixel_values:
            new = iter(model.get_image_features(torch.cat(pixel_values).to(model.dtype)).pooler_output)
        features = [
            next(new) if isinstance(image, torch.Tensor) else torch.from_numpy(image.vision_embeds) for image in images
        ]
        return torch.stack([feature.to(self.device, model.dtype) for feature in features])

    def postprocess(  # type: ignore[override]
        self, model_outputs: dict[str, Any], threshold: float = 0.5
    ) -> Iterator[list[dict[str, Any]]]:
        """Yield the results of each image of a batch, with one image's masks in memory at a time."""
        image_indices = model_outputs["image_indices"]
        for index, size in enumerate(model_outputs["original_sizes"].tolist()):
            numbers = (image_indices == index).nonzero()[:, 0].tolist()
            yield [self._make_result(model_outputs, number, size, threshold) for number in numbers]

    def _make_result(
        self, model_outputs: dict, number: int, size: tuple[int, int], threshold: float
    ) -> dict[str, Any]:
        processor: Any = self.processor
        logits = model_outputs["logits"][number : number + 1].to(self.device)  # where resizing is fast
        (result,) = processor.post_process_referring_segmentation(
            SimpleNamespace(logits=logits), [size], threshold, return_probabilities=False, size=self._get_input_size()
        )
        mask = Image.fromarray(result["mask"].to(torch.uint8).mul_(255).cpu().numpy())
        lost = model_outputs["lost_words"][number]
        return {
            "label": model_outputs["text"][number],
            "score": result["score"],
            "mask": mask,
            "unknown_words": lost["unknown_words"],
            "truncated": bool(lost["cut_words"]),
        }


def _hash_encoder(model: Any) -> str:
    """Hash the first weights of each parameter of the image encoder. Parameters that are offloaded are left out."""
    weights = [weight for name, weight in model.named_parameters() if "vision_model." in name and not weight.is_meta]
    first = [weight.detach().flatten()[:_HASHED_WEIGHTS].to(model.device) for weight in weights]
    sample = torch.cat(first).float() if first else torch.empty(0)
    return hashlib.sha256(sample.numpy(force=True).tobytes()).hexdigest()


def _is_encoded(value: Any) -> bool:
    """By name, because the class may be this package's, a repository's or the exported model's."""
    return type(value).__name__ == EncodedImage.__name__


def _is_dataset(value: Any) -> bool:
    """Whether a value has numbered items and is not an image."""
    others = (str, os.PathLike, Mapping, Image.Image, torch.Tensor)
    if isinstance(value, others) or is_image_file(value) or hasattr(value, "__array__"):
        return False
    return isinstance(value, Dataset) or (isinstance(value, Sized) and hasattr(value, "__getitem__"))


def _split_input(input_: Any, text: Any) -> tuple[Any, Any]:
    """Return the image and the text of one item of the input."""
    if isinstance(input_, Mapping):
        if text is not None or not {"image", "text"} <= set(input_):
            raise ValueError(
                'Expected dicts as {"image": ..., "text": ...} and no other text, got the keys'
                f" {sorted(map(str, input_))} and text={text!r}."
            )
        input_, text = input_["image"], input_["text"]
    if not isinstance(text, (str, list, tuple)):
        raise ValueError(f"Expected a sentence or a list of them as text, got {text!r}.")
    return input_, text


class _Numbered(Dataset):
    """The items of a list or dataset with their numbers."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        try:
            return number, self.items[number]
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # from a dataset that decodes images
            raise UnreadableImageError(f"Item {number} cannot be read: {error}") from error


def _collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Join items of one image each, with `image_indices` that refer to the images of the batch."""
    batch: dict[str, Any] = {}
    for name in items[0]:
        values = [item[name] for item in items]
        is_tensor = isinstance(values[0], torch.Tensor)
        batch[name] = torch.cat(values) if is_tensor else [part for value in values for part in value]
    counts = torch.tensor([len(item["text"]) for item in items])
    batch["image_indices"] = torch.arange(len(items)).repeat_interleave(counts)
    return batch


__all__ = ["TASK", "EncodedImage", "ReSTRPipeline"]
