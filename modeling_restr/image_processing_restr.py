"""ReSTR's image processor: letterboxed pixel values and labels, and masks back at the images' own sizes."""

from .requirements_restr import TRANSFORMERS  # noqa: F401  (first: says which version this file needs)


# isort: split
import os
from collections.abc import Iterable, Mapping
from io import BytesIO
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.utils import get_session
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    load_image,
)
from transformers.processing_utils import ImagesKwargs, Unpack


_CHANNELS = (1, 3, 4)
# How far a float image may overshoot its range, as resampling filters do, before it counts as another range.
_OVERSHOOT = 1e-3


class ReSTRImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    pad_after_normalization (`bool`, *optional*, defaults to `False`):
        Whether the canvas around the image is 0 after normalization (mid-grey, as in the original's evaluation)
        instead of black before it (as in the original's training).
    """

    pad_after_normalization: bool


def get_letterbox(image_size: tuple[int, int], canvas_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Where an image lies on its canvas: as large as fits with its aspect ratio kept, and centred.

    Args:
        image_size: (height, width) of the image in pixels.
        canvas_size: (height, width) of the canvas in pixels.

    Returns:
        (top, left, height, width) of the resized image on the canvas, in pixels of the canvas.
    """
    scale = min(canvas / image for canvas, image in zip(canvas_size, image_size, strict=True))
    height, width = (
        min(max(round(image * scale), 1), canvas) for canvas, image in zip(canvas_size, image_size, strict=True)
    )
    return (canvas_size[0] - height) // 2, (canvas_size[1] - width) // 2, height, width


class ReSTRImageProcessor(PilBackend):
    r"""
    Letterboxes images to the size of a ReSTR model, and undoes the letterbox for the model's masks.

    An image is resized with its aspect ratio kept and centred on a canvas of `size`, which is black unless
    `pad_after_normalization` is set. Before that it becomes 8-bit RGB:

    - the EXIF orientation is applied: sizes are those that a viewer shows;
    - transparency is composited onto white; grey, palette and CMYK images are converted;
    - 16-bit images are scaled by 255 / 65535, float images by 255 if they lie in 0..1 (those in 0..255 stay);
    - arrays may be (height, width), (height, width, channels) or (channels, height, width), of 1, 3 or 4 channels.
      Where both ends could be the channels, NumPy arrays are read as channels-last, tensors as channels-first.

    With `do_rescale=False` float images keep their values.
    """

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 480, "width": 480}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    pad_after_normalization = False
    valid_kwargs = ReSTRImageProcessorKwargs
    model_input_names = ["pixel_values", "original_sizes"]

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: Any | None = None,
        image_indices: Iterable[int] | None = None,
        **kwargs: Unpack[ReSTRImageProcessorKwargs],
    ) -> BatchFeature:
        """
        Args:
            images: one image or a list of B: PIL images, NumPy arrays, tensors, paths or URLs.
            segmentation_maps: N binary masks, one an expression: PIL images, arrays or tensors of two values, each
                of the size of its image. Letterboxed as the image is, by area: a pixel of the label is set where the
                mask covers more than half of it.
            image_indices: the image of each mask; by default all 0 for one image, else 0 .. N - 1.

        Returns:
            `pixel_values` (B, 3, height, width), `original_sizes` (B, 2) as (height, width), and `labels`
            (N, height, width) of 0 and 1 if there are `segmentation_maps`.

        Raises:
            ValueError: for images and masks that cannot be read as such or do not match up.
        """
        return super().preprocess(images, segmentation_maps, image_indices, **kwargs)

    def post_process_referring_segmentation(
        self, outputs: Any, target_sizes: Iterable[tuple[int, int]] | torch.Tensor, threshold: float = 0.5
    ) -> list[dict[str, torch.Tensor | float]]:
        """Undoes the letterbox: resizes the logits bilinearly in float32, and only then takes probabilities.

        Args:
            outputs: the model's outputs, with `logits` (N, height, width). Logits of a smaller grid than the model's
                input, such as a logit a patch, are resized to it first.
            target_sizes: (height, width) of each expression's image in pixels, N of them. From the processor's
                outputs: `inputs["original_sizes"][inputs["image_indices"]]`.
            threshold: probability above which a pixel belongs to the mask.

        Returns:
            A dict for each expression, on the device of the logits: `mask` (bool, height x width), `probabilities`
            (float32, height x width) and `score`, the mean probability inside the mask (0.0 if it is empty).

        Raises:
            ValueError: for logits of another shape or that are not finite, another number of sizes than of
                expressions, sizes that are not positive, a threshold outside 0..1.
        """
        logits = _check_logits(outputs.logits)
        sizes = _check_target_sizes(target_sizes, len(logits))
        if not 0 <= threshold <= 1:
            raise ValueError(f"Expected a threshold from 0 to 1, got {threshold}.")
        canvas_size = self._get_canvas_size((logits.shape[1], logits.shape[2]))
        logit_threshold = torch.tensor(threshold, dtype=torch.float64).logit().item()
        results = []
        for index, size in enumerate(sizes):  # one at a time: all of them at full size could fill the memory
            image_logits = _undo_letterbox(logits[index], canvas_size, size)
            mask = image_logits > logit_threshold
            probabilities = image_logits.sigmoid_()
            score = probabilities[mask].mean().item() if mask.any() else 0.0
            results.append({"mask": mask, "probabilities": probabilities, "score": score})
        return results

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Opens paths and URLs, recursively in lists, with their mode, transparency and EXIF orientation intact."""
        source = image_url_or_urls
        if isinstance(source, (list, tuple)):
            return [self.fetch_images(item) for item in source]
        if isinstance(source, (str, os.PathLike)):
            return _open_image(os.fspath(source))
        if isinstance(source, (np.ndarray, torch.Tensor)) and source.ndim == 2:
            return source[..., None] if isinstance(source, np.ndarray) else source[None]
        if isinstance(source, (Image.Image, np.ndarray, torch.Tensor)):
            return source
        raise ValueError(
            "Expected an image as a PIL image, a NumPy array, a tensor, a path or a URL, or a list of these,"
            f" got {type(source).__name__}."
        )

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Converts one image to an array of shape (channels, height, width), uint8 or (see the class) float32."""
        if isinstance(image, Image.Image):
            array = _pil_to_array(image)
        else:
            array = _to_channels_first(image, input_data_format)
        if array.size == 0:
            raise ValueError(f"Expected an image of at least one pixel, got (channels, height, width) {array.shape}.")
        keep_floats = array.dtype.kind == "f" and not kwargs.get("do_rescale")
        array = array.astype(np.float32) if keep_floats else _to_uint8(array)
        return _to_rgb(array) if do_convert_rgb else array

    def _standardize_kwargs(self, *args: Any, **kwargs: Any) -> dict:
        kwargs = super()._standardize_kwargs(*args, **kwargs)
        size = kwargs["size"]
        if not (size.height and size.width and size.height > 0 and size.width > 0):
            raise ValueError(f"Expected a size with a positive 'height' and 'width', got {dict(size)}.")
        return kwargs

    def _validate_preprocess_kwargs(self, *args: Any, **kwargs: Any) -> None:
        unsupported = [name for name in ("do_center_crop", "crop_size", "pad_size") if kwargs.get(name)]
        if kwargs.get("do_pad") is False or unsupported:
            raise ValueError(
                f"Images are letterboxed to `size`: {unsupported or ['do_pad=False']} is not supported. Leave it out."
            )
        super()._validate_preprocess_kwargs(*args, **kwargs)

    def _preprocess_image_like_inputs(self, images: ImageInput, *args: Any, **kwargs: Any) -> BatchFeature:
        segmentation_maps, image_indices = args
        arrays = self._prepare_image_like_inputs(images, **kwargs)
        if not arrays:
            raise ValueError("Expected at least one image, got none.")
        original_sizes = [array.shape[-2:] for array in arrays]
        data: dict[str, Any] = {
            "pixel_values": [self._preprocess_image(array, **kwargs) for array in arrays],
            "original_sizes": original_sizes,
        }
        if segmentation_maps is not None:
            maps = _list_segmentation_maps(segmentation_maps)
            indices = _resolve_image_indices(image_indices, len(maps), len(arrays))
            canvas_size = _to_tuple(kwargs["size"]) if kwargs["do_resize"] else None
            data["labels"] = [
                _letterbox_mask(_check_mask(mask, number, original_sizes[index]), canvas_size)
                for number, (mask, index) in enumerate(zip(maps, indices, strict=True))
            ]
        return BatchFeature(data, tensor_type=kwargs["return_tensors"])

    def _preprocess_image(
        self,
        image: np.ndarray,
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | Iterable[float],
        image_std: float | Iterable[float],
        pad_after_normalization: bool,
        **kwargs: Any,
    ) -> np.ndarray:
        canvas_size = _to_tuple(size)
        top, left, height, width = get_letterbox(image.shape[-2:], canvas_size)
        if do_resize:
            image = _resize(image, height, width, resample)
            if not pad_after_normalization:
                image = _place(image, canvas_size, top, left)
        image = self.rescale(image, rescale_factor) if do_rescale else image.astype(np.float32)
        if do_normalize:
            image = self.normalize(image, image_mean, image_std)
        return _place(image, canvas_size, top, left) if do_resize and pad_after_normalization else image

    def _get_canvas_size(self, grid_size: tuple[int, int]) -> tuple[int, int]:
        """The letterbox's canvas: `size` if the grid of the logits divides it evenly, else the grid itself.

        The second case is a size that was passed in the call.
        """
        size = _to_tuple(self.size)
        factors = {length / grid for length, grid in zip(size, grid_size, strict=True)}
        return size if len(factors) == 1 and factors.pop().is_integer() else grid_size


def _to_tuple(size: Mapping[str, int] | SizeDict) -> tuple[int, int]:
    return size["height"], size["width"]


def _open_image(source: str) -> Image.Image:
    # transformers' `load_image` converts what it opens to RGB, which clips 16-bit images and drops transparency: it
    # is left with base64 strings and with the error for anything else.
    if os.path.isfile(source):
        return Image.open(source)
    if source.startswith(("http://", "https://")):
        response = get_session().get(source, follow_redirects=True, timeout=60)
        response.raise_for_status()
        return Image.open(BytesIO(response.content))
    return load_image(source)


def _pil_to_array(image: Image.Image) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def _to_channels_first(image: Any, input_data_format: str | ChannelDimension | None) -> np.ndarray:
    """Returns an array of shape (channels, height, width), whichever end of the given image the channels are at."""
    is_tensor = isinstance(image, torch.Tensor)
    if is_tensor:
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    ends = [end for end in ((0, -1) if is_tensor else (-1, 0)) if image.shape[end] in _CHANNELS]
    if input_data_format is not None:
        ends = [0 if ChannelDimension(input_data_format) == ChannelDimension.FIRST else -1]
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
    ranges = [65535] if array.dtype.kind == "u" and array.dtype.itemsize == 2 else [255, 65535]
    if array.dtype.kind == "f":
        ranges = [1, 255]
    full = next((full for full in ranges if -_OVERSHOOT * full <= low and high <= full * (1 + _OVERSHOOT)), None)
    if full is None:  # NaN ends here, too
        raise ValueError(
            "Expected the values of an image in 0..1 or 0..255 for floats, in 0..255 or 0..65535 for integers, before"
            f" any normalization; got {array.dtype} from {low} to {high}."
        )
    return np.clip(np.round(array * (255.0 / full)), 0, 255).astype(np.uint8)


def _to_rgb(array: np.ndarray) -> np.ndarray:
    """Converts (1, 3 or 4 channels, height, width) to RGB, transparency composited onto white."""
    if array.shape[0] not in _CHANNELS:
        raise ValueError(f"Expected an image of 1, 3 or 4 channels, got {array.shape[0]}.")
    if array.shape[0] == 4:
        white = 255 if array.dtype == np.uint8 else 1
        alpha = array[3:].astype(np.float32) / white
        composite = alpha * array[:3] + (1 - alpha) * white
        array = np.round(composite).astype(np.uint8) if white == 255 else composite
    return np.repeat(array, 3, axis=0) if array.shape[0] == 1 else array


def _resize(image: np.ndarray, height: int, width: int, resample: PILImageResampling) -> np.ndarray:
    """Resizes (channels, height, width) channel by channel, in the image's own number type."""
    if image.shape[-2:] == (height, width):
        return image
    channels = [Image.fromarray(channel).resize((width, height), resample) for channel in image]
    return np.stack([np.asarray(channel) for channel in channels])


def _place(image: np.ndarray, canvas_size: tuple[int, int], top: int, left: int) -> np.ndarray:
    canvas = np.zeros((*image.shape[:-2], *canvas_size), dtype=image.dtype)
    canvas[..., top : top + image.shape[-2], left : left + image.shape[-1]] = image
    return canvas


def _list_segmentation_maps(segmentation_maps: Any) -> list[Any]:
    """Flattens what was passed as masks: one, a list, a list of lists or an array of shape (N, height, width)."""
    if isinstance(segmentation_maps, Image.Image):
        return [segmentation_maps]
    if isinstance(segmentation_maps, (list, tuple)):
        return [mask for item in segmentation_maps for mask in _list_segmentation_maps(item)]
    if isinstance(segmentation_maps, (np.ndarray, torch.Tensor)) and segmentation_maps.ndim in (2, 3):
        return [segmentation_maps] if segmentation_maps.ndim == 2 else list(segmentation_maps)
    shape = getattr(segmentation_maps, "shape", type(segmentation_maps).__name__)
    raise ValueError(
        f"Expected segmentation_maps as PIL images or arrays of shape (height, width), one an expression, got {shape}."
    )


def _resolve_image_indices(image_indices: Iterable[int] | None, num_maps: int, num_images: int) -> list[int]:
    if image_indices is None and (num_images == 1 or num_images == num_maps):
        return [0] * num_maps if num_images == 1 else list(range(num_maps))
    indices = [int(index) for index in image_indices] if image_indices is not None else None
    if indices is None or len(indices) != num_maps or not set(indices) <= set(range(num_images)):
        raise ValueError(
            "Expected one segmentation map an expression, and for each the index of its image in image_indices; got"
            f" {num_maps} segmentation maps, {num_images} images and image_indices {indices}."
        )
    return indices


def _check_mask(mask: Any, number: int, image_size: tuple[int, int]) -> np.ndarray:
    """Returns the mask as a bool array (height, width) after checking its size and its values."""
    if isinstance(mask, Image.Image):
        mask = ImageOps.exif_transpose(mask)
    array = mask.detach().cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
    if array.shape != tuple(image_size):
        raise ValueError(
            f"Expected segmentation map {number} at its image's own size, (height, width) {tuple(image_size)}, got"
            f" {array.shape}."
        )
    foreground = array != 0
    values = array[foreground]
    if values.size and (values != values[0]).any():
        raise ValueError(
            f"Expected segmentation map {number} to be binary (0 and one other value), got values from {array.min()}"
            f" to {array.max()}. Pass `map == id` for one object of an id map."
        )
    return foreground


def _letterbox_mask(mask: np.ndarray, canvas_size: tuple[int, int] | None) -> np.ndarray:
    """Letterboxes a bool mask by area: set where it covers more than half of a pixel. Returns int64 of 0 and 1."""
    if canvas_size is None:
        return mask.astype(np.int64)
    top, left, height, width = get_letterbox(mask.shape, canvas_size)
    if mask.shape != (height, width):
        # The integral image of a mask is bilinear inside each pixel, so interpolating it is exact, and its
        # differences are the areas covered.
        integral = F.pad(torch.from_numpy(mask).cumsum(0).cumsum(1), (1, 0, 1, 0)).double()
        corners = F.interpolate(integral[None, None], (height + 1, width + 1), mode="bilinear", align_corners=True)[
            0, 0
        ]
        area = corners.diff(dim=0).diff(dim=1).numpy() * (height * width / mask.size)
        mask = area > 0.5 + 1e-6
    return _place(mask.astype(np.int64), canvas_size, top, left)


def _check_logits(logits: torch.Tensor) -> torch.Tensor:
    if logits.ndim != 3 or 0 in logits.shape[1:]:
        raise ValueError(f"Expected logits of shape (expressions, height, width), got {tuple(logits.shape)}.")
    logits = logits.detach()
    if not logits.isfinite().all():
        raise ValueError(
            "Expected finite logits, got some that are infinite or not a number. The model may have overflowed in"
            f" {logits.dtype}: run it in another one."
        )
    return logits


def _check_target_sizes(
    target_sizes: Iterable[tuple[int, int]] | torch.Tensor, num_expressions: int
) -> list[tuple[int, int]]:
    rows = target_sizes.tolist() if isinstance(target_sizes, (torch.Tensor, np.ndarray)) else list(target_sizes)
    if len(rows) != num_expressions:
        raise ValueError(
            f"Expected one target size an expression, {num_expressions}, got {len(rows)}. The processor returns one"
            ' original size an image: pass `inputs["original_sizes"][inputs["image_indices"]]`.'
        )
    if any(len(row) != 2 or min(row) < 1 for row in rows):
        raise ValueError(f"Expected target sizes as (height, width) in pixels, got {rows}.")
    return [(int(height), int(width)) for height, width in rows]


def _undo_letterbox(logits: torch.Tensor, canvas_size: tuple[int, int], image_size: tuple[int, int]) -> torch.Tensor:
    """Cuts the image out of one logit map (height, width) of the canvas and resizes it to the image's size."""
    logits = logits[None, None].float()
    if logits.shape[-2:] != canvas_size:
        logits = F.interpolate(logits, canvas_size, mode="bilinear", align_corners=False)
    top, left, height, width = get_letterbox(image_size, canvas_size)
    logits = logits[..., top : top + height, left : left + width]
    return F.interpolate(logits, image_size, mode="bilinear", align_corners=False)[0, 0]


__all__ = ["ReSTRImageProcessor", "ReSTRImageProcessorKwargs", "get_letterbox"]
