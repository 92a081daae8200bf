"""ReSTR's image processor: letterboxes images and masks, and resizes predicted masks to the images' own sizes."""

from .requirements_restr import TRANSFORMERS  # noqa: F401  (first: checks the version of transformers)


# isort: split
import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
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
)
from transformers.processing_utils import ImagesKwargs, Unpack

from .image_reading_restr import (
    MAX_DEPTH,
    UnreadableImageError,
    list_images,
    naming_the_image,
    open_image,
    read_image,
    to_rgb,
    to_uint8,
)


# The most pixels that Pillow's 32-bit sizes and PyTorch's 32-bit indices can count.
_MAX_PIXELS = 2**31 - 1


class ReSTRImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    pad_after_normalization (`bool`, *optional*, defaults to `False`):
        Whether the canvas around the image is 0 after normalization (mid-grey, as in the original's evaluation)
        instead of black before it (as in the original's training).
    jpeg_draft (`bool`, *optional*, defaults to `False`):
        Whether large JPEG files are decoded at a half, a quarter or an eighth of their size where that is enough for
        the canvas. This is several times faster, but pixel values differ slightly. Images that are already open, as
        PIL images or arrays, are not affected.
    """

    pad_after_normalization: bool
    jpeg_draft: bool


def get_letterbox(image_size: tuple[int, int], canvas_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Place an image on its canvas: centred, and as large as fits with the same aspect ratio.

    Args:
        image_size: (height, width) of the image in pixels.
        canvas_size: (height, width) of the canvas in pixels.

    Returns:
        (top, left, height, width) of the resized image on the canvas, in pixels of the canvas.
    """
    scale = min(canvas / image for canvas, image in zip(canvas_size, image_size, strict=True))
    height, width = (min(max(round(image * scale), 1), canvas) for canvas, image in zip(canvas_size, image_size))
    return (canvas_size[0] - height) // 2, (canvas_size[1] - width) // 2, height, width


class ReSTRImageProcessor(PilBackend):
    r"""
    Letterbox images to the size of a ReSTR model, and undo the letterbox for the model's masks.

    An image is resized with its aspect ratio kept and centred on a canvas of `size`, which is black unless
    `pad_after_normalization` is set. Before that it becomes 8-bit RGB:

    - The EXIF orientation is applied, so that sizes are as in a viewer.
    - Transparency is composited onto white. Grey, palette and CMYK images are converted.
    - 16-bit images are scaled by 255 / 65535, and float images in 0..1 by 255. Float images in 0..255 stay. The
      transparent value of a 16-bit grey PNG becomes white.
    - Arrays may be (height, width), (height, width, channels) or (channels, height, width), with 1, 3 or 4 channels.
      If either end could be the channels, NumPy arrays are read as channels-last, tensors as channels-first.

    Pillow resizes the image, by default with its bilinear filter, which antialiases. Pixel values are then
    `(value * rescale_factor - mean) / std`. With `do_rescale=False` float images keep their values.
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
    jpeg_draft = False
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
            images: One image or a list of B: PIL images, NumPy arrays, tensors, paths, URLs, data URIs, bytes of a
                file, open files. They are read one at a time.
            segmentation_maps: N binary masks, one per expression: PIL images, arrays or tensors of two values, each
                (height, width) or (height, width, 1) of its image. They are letterboxed with the image, by area: a
                pixel of the label is set where the mask covers more than half of it.
            image_indices: Index of the image of each mask. By default all 0 for one image, otherwise 0 .. N - 1.

        Returns:
            `pixel_values` (B, 3, height, width), `original_sizes` (B, 2) as (height, width), and `labels`
            (N, height, width) of 0 and 1 if there are `segmentation_maps`.

        Raises:
            UnreadableImageError: (a ValueError) An image cannot be read. The message gives its path or its place in
                the list.
            ValueError: Masks are not binary or do not match the images, or options are out of range.
        """
        return super().preprocess(images, segmentation_maps, image_indices, **kwargs)

    def post_process_referring_segmentation(
        self,
        outputs: Any,
        target_sizes: Iterable[tuple[int, int]] | torch.Tensor,
        threshold: float = 0.5,
        return_probabilities: bool = True,
        size: Any | None = None,
    ) -> list[dict[str, torch.Tensor | float]]:
        """Undo the letterbox: cut the image out of the logits, resize them, and only then take probabilities.

        The part of the logits that shows the image, (h, w), is resized to (height, width) bilinearly in float32,
        without antialiasing: pixel row y is read at row `max((y + 0.5) * h / height - 0.5, 0)`, and the last row is
        repeated below. Columns are treated in the same way. A pixel is in the mask if its logit is above
        `log(threshold / (1 - threshold))`. The score is the mean of `1 / (1 + exp(-logit))` over the mask.

        Args:
            outputs: The model's outputs, with `logits` (N, height, width). Logits on a coarser grid than the model's
                input, such as one logit per patch, are resized to it first.
            target_sizes: (height, width) in pixels of the image of each of the N expressions. From the processor's
                outputs: `inputs["original_sizes"][inputs["image_indices"]]`.
            threshold: Probability above which a pixel belongs to the mask.
            return_probabilities: Whether results have `probabilities`, which take four times a mask's memory.
            size: Size that the processor was called with, if it was not its own. Needed for a coarse-only model only:
                with a pixel decoder, the outputs show it.

        Returns:
            One dict per expression, on the device of the logits: `mask` (bool, height x width), `probabilities`
            (float32, height x width) and `score`, the mean probability inside the mask (0.0 if it is empty).

        Raises:
            ValueError: Logits have another shape or are not finite, the number of sizes is not N, sizes are not
                positive integers, or the threshold is outside 0..1.
        """
        logits = _check_logits(outputs)
        target_sizes = _check_target_sizes(target_sizes, len(logits))
        if not (isinstance(threshold, Real) and 0 <= threshold <= 1):
            raise ValueError(f"Expected a threshold from 0 to 1, got {threshold!r}.")
        canvas_size = self._get_canvas_size(outputs, size)
        logit_threshold = torch.tensor(threshold, dtype=torch.float64).logit().item()
        results = []
        for index, image_size in enumerate(target_sizes):  # one at a time: all at full size could fill the memory
            image_logits = _undo_letterbox(logits[index], canvas_size, image_size)
            mask = image_logits > logit_threshold
            inside = _select(image_logits, mask)
            results.append({"mask": mask, "score": inside.sigmoid().mean().item() if len(inside) else 0.0})
            if return_probabilities:
                results[-1]["probabilities"] = image_logits.sigmoid_()
        return results

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open images in any form, also in lists, with their mode, transparency and EXIF orientation intact."""
        source = image_url_or_urls
        if isinstance(source, (list, tuple)):
            list_images(source)  # refuses lists that contain themselves
            return [self.fetch_images(item) for item in source]
        with naming_the_image(source):
            return open_image(source)

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Convert one image to an array of shape (channels, height, width), uint8, or float32 (see the class)."""
        with naming_the_image(image):
            pixels, _ = _read_pixels(image, do_convert_rgb, input_data_format, kwargs.get("do_rescale"))
        array = _to_array(pixels)
        return to_rgb(array) if do_convert_rgb else array

    def _standardize_kwargs(self, *args: Any, **kwargs: Any) -> dict:
        kwargs = super()._standardize_kwargs(*args, **kwargs | {"size": _read_size(kwargs.get("size"))})
        _check_options(kwargs)
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
        sources = list_images(images)
        if not sources:
            raise ValueError("Expected at least one image, got none.")
        data: dict[str, Any] = {"pixel_values": [], "original_sizes": []}
        for place, source in enumerate(sources):  # one at a time: all at full size could fill the memory
            with naming_the_image(source, place if len(sources) > 1 else None):
                pixels, image_size = _read_pixels(source, **kwargs)
            data["original_sizes"].append(image_size)
            data["pixel_values"].append(self._preprocess_image(pixels, image_size, **kwargs))
        if segmentation_maps is not None:
            canvas_size = _to_tuple(kwargs["size"]) if kwargs["do_resize"] else None
            data["labels"] = _make_labels(segmentation_maps, image_indices, data["original_sizes"], canvas_size)
        return BatchFeature(data, tensor_type=kwargs["return_tensors"])

    def _preprocess_image(
        self,
        image: Image.Image | np.ndarray,
        image_size: tuple[int, int],
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | Iterable[float],
        image_std: float | Iterable[float],
        pad_after_normalization: bool,
        do_convert_rgb: bool | None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Resize an image, which a JPEG draft may have made smaller than its `image_size`, and place it on its canvas."""
        canvas_size = _to_tuple(size)
        top, left, height, width = get_letterbox(image_size, canvas_size)
        image = _resize(image, height, width, resample) if do_resize else _to_array(image)
        if do_convert_rgb:  # grey PIL images still have one channel
            image = to_rgb(image)
        if do_resize and not pad_after_normalization:
            image = _place(image, canvas_size, top, left)
        image = self.rescale(image, rescale_factor) if do_rescale else image.astype(np.float32)
        if do_normalize:
            image = self.normalize(image, image_mean, image_std)
        return _place(image, canvas_size, top, left) if do_resize and pad_after_normalization else image

    def _get_canvas_size(self, outputs: Any, size: Any | None) -> tuple[int, int]:
        """
        Size of the letterbox's canvas: `size` if given, else the logits' grid if it is finer than the patches', else
        the processor's own size if the logits' grid divides it evenly, else the logits' grid.
        """
        if size is not None:
            return _to_tuple(_read_size(size))
        grid_size = tuple(outputs.logits.shape[1:])
        patch_logits = getattr(outputs, "patch_logits", None)
        if patch_logits is not None and tuple(patch_logits.shape[1:]) != grid_size:
            return grid_size
        own_size = _to_tuple(self.size)
        factors = {length / grid for length, grid in zip(own_size, grid_size, strict=True)}
        return own_size if len(factors) == 1 and factors.pop().is_integer() else grid_size


def _to_tuple(size: Mapping[str, int] | SizeDict) -> tuple[int, int]:
    return size["height"], size["width"]


def _is_image_size(size: Any) -> bool:
    """Whether a list or tuple is (height, width) in pixels: two positive integers of any number type."""
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        return False
    if not all(isinstance(length, (Real, torch.Tensor)) and not isinstance(length, bool) for length in size):
        return False
    height, width = map(float, size)
    return height.is_integer() and width.is_integer() and min(size) >= 1 and height * width <= _MAX_PIXELS


def _read_size(size: Any) -> SizeDict:
    """Read a `size` in any form that transformers knows: a number, a pair or a dict."""
    pair: Any = (size, size) if isinstance(size, Real) else size
    if isinstance(size, (Mapping, SizeDict)):
        values = dict(size)
        pair = tuple(values.get(name) for name in ("height", "width")) if len(values) == 2 else None
    if not _is_image_size(pair):
        raise ValueError(f"Expected a size with a positive 'height' and 'width', got {size!r}.")
    return SizeDict(height=int(pair[0]), width=int(pair[1]))


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that are not numbers or booleans, or that make pixels infinite or NaN."""
    for name, lowest in (("rescale_factor", -math.inf), ("image_mean", -math.inf), ("image_std", 0)):
        value = options.get(name)
        numbers: Any = list(value) if isinstance(value, Iterable) and name != "rescale_factor" else [value]
        are_numbers = bool(numbers) and all(isinstance(n, Real) and not isinstance(n, bool) for n in numbers)
        if value is not None and not (are_numbers and all(lowest < number < math.inf for number in numbers)):
            above = " above 0" if lowest == 0 else ""
            raise ValueError(f"Expected finite numbers{above} as {name} of the image processor, got {value!r}.")
    for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "pad_after_normalization", "jpeg_draft"):
        if not isinstance(options.get(name), (bool, np.bool_, type(None))):
            raise ValueError(f"Expected True or False as {name} of the image processor, got {options[name]!r}.")
    resample = options.get("resample")
    is_integer = isinstance(resample, Integral) and not isinstance(resample, bool)
    if resample is not None and not (is_integer and resample in set(PILImageResampling)):
        raise ValueError(f"Expected resample as one of {list(map(int, PILImageResampling))}, got {resample!r}.")


def _read_pixels(
    source: Any,
    do_convert_rgb: bool | None = None,
    input_data_format: str | ChannelDimension | None = None,
    do_rescale: bool | None = None,
    do_resize: bool | None = None,
    size: SizeDict | None = None,
    jpeg_draft: bool | None = None,
    **kwargs: Any,
) -> tuple[Image.Image | np.ndarray, tuple[int, int]]:
    """
    A PIL image of mode "L" or "RGB", which is faster to resize, or an array of uint8, or float32 (see the class), and
    (height, width) of the image.
    """
    draft_size = _to_tuple(size) if jpeg_draft and do_resize and size is not None else None
    pixels, image_size = read_image(source, input_data_format, draft_size)
    if isinstance(pixels, Image.Image):
        return pixels, image_size
    pixels = pixels.astype(np.float32) if pixels.dtype.kind == "f" and not do_rescale else to_uint8(pixels)
    return to_rgb(pixels) if do_convert_rgb else pixels, image_size


def _get_size(pixels: Image.Image | np.ndarray) -> tuple[int, int]:
    return (pixels.height, pixels.width) if isinstance(pixels, Image.Image) else pixels.shape[-2:]


def _to_array(pixels: Image.Image | np.ndarray) -> np.ndarray:
    """(channels, height, width)"""
    array = np.asarray(pixels)
    if isinstance(pixels, Image.Image):
        array = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    return array


def _resize(image: Image.Image | np.ndarray, height: int, width: int, resample: PILImageResampling) -> np.ndarray:
    """Resize to (channels, height, width), channel by channel, in the image's own number type."""
    if _get_size(image) == (height, width):
        return _to_array(image)
    if isinstance(image, Image.Image):
        return _to_array(image.resize((width, height), resample))
    channels = [Image.fromarray(channel).resize((width, height), resample) for channel in image]
    return np.stack([np.asarray(channel) for channel in channels])


def _place(image: np.ndarray, canvas_size: tuple[int, int], top: int, left: int) -> np.ndarray:
    canvas = np.zeros((*image.shape[:-2], *canvas_size), dtype=image.dtype)
    canvas[..., top : top + image.shape[-2], left : left + image.shape[-1]] = image
    return canvas


def _make_labels(
    segmentation_maps: Any,
    image_indices: Iterable[int] | None,
    image_sizes: list[tuple[int, int]],
    canvas_size: tuple[int, int] | None,
) -> list[np.ndarray]:
    """Make one label (height, width) of 0 and 1 per map. A map that several sentences share is letterboxed once."""
    maps = _list_segmentation_maps(segmentation_maps, set(image_sizes))
    indices = _resolve_image_indices(image_indices, len(maps), len(image_sizes))
    labels: dict[tuple[int, int], np.ndarray] = {}
    keys = [(id(mask), index) for mask, index in zip(maps, indices, strict=True)]
    for number, (key, mask) in enumerate(zip(keys, maps)):
        if key not in labels:
            labels[key] = _letterbox_mask(_check_mask(mask, number, image_sizes[key[1]]), canvas_size)
    return [labels[key] for key in keys]


def _list_segmentation_maps(
    segmentation_maps: Any, image_sizes: set[tuple[int, int]], max_depth: int = MAX_DEPTH
) -> list[Any]:
    """Flatten masks: one, a list, a list of lists or an array (N, height, width), each with or without a last axis of
    one channel.
    """
    if isinstance(segmentation_maps, Image.Image):
        return [segmentation_maps]
    if isinstance(segmentation_maps, (list, tuple)) and max_depth:
        return [
            mask for item in segmentation_maps for mask in _list_segmentation_maps(item, image_sizes, max_depth - 1)
        ]
    shape: Any = tuple(getattr(segmentation_maps, "shape", ()))
    if isinstance(segmentation_maps, (np.ndarray, torch.Tensor)) and len(shape) in (2, 3, 4):
        # (N, height, 1) are maps of images one pixel wide.
        is_stack = len(shape) == 3 and shape[:2] not in image_sizes and 1 in {width for _, width in image_sizes}
        has_channel = shape[-1] == 1 and len(shape) > 2 and not is_stack
        maps = segmentation_maps[..., 0] if has_channel else segmentation_maps
        if maps.ndim < 4:
            return [maps] if maps.ndim == 2 else list(maps)
    raise ValueError(
        "Expected segmentation_maps as PIL images or arrays of shape (height, width), one per expression, got"
        f" {shape or type(segmentation_maps).__name__}."
    )


def _resolve_image_indices(image_indices: Iterable[int] | None, num_maps: int, num_images: int) -> list[int]:
    if image_indices is None and (num_images == 1 or num_images == num_maps):
        return [0] * num_maps if num_images == 1 else list(range(num_maps))
    indices = [int(index) for index in image_indices] if image_indices is not None else None
    if indices is None or len(indices) != num_maps or not set(indices) <= set(range(num_images)):
        raise ValueError(
            "Expected one segmentation map per expression, and for each the index of its image in image_indices; got"
            f" {num_maps} segmentation maps, {num_images} images and image_indices {indices}."
        )
    return indices


def _check_mask(mask: Any, number: int, image_size: tuple[int, int]) -> np.ndarray:
    """Convert a mask to a bool array (height, width) after checking its size and values."""
    if isinstance(mask, Image.Image):
        with naming_the_image(mask, number):
            mask = np.asarray(ImageOps.exif_transpose(mask))
    if isinstance(mask, torch.Tensor):
        mask = (mask.float() if mask.is_floating_point() else mask).numpy(force=True)  # NumPy has no bfloat16
    array = np.asarray(mask)
    if array.shape != tuple(image_size):
        raise ValueError(
            f"Expected segmentation map {number} at its image's own size, (height, width) {tuple(image_size)}, got"
            f" {array.shape}."
        )
    foreground = array != 0
    values = array[:0] if array.dtype == bool else array[foreground]
    if len(values) and (values != values[0]).any():
        raise ValueError(
            f"Expected segmentation map {number} to be binary (0 and one other value), got values from {array.min()}"
            f" to {array.max()}. Pass `map == id` for one object of an id map."
        )
    return foreground


def _letterbox_mask(mask: np.ndarray, canvas_size: tuple[int, int] | None) -> np.ndarray:
    """Letterbox a bool mask by area to int64: 1 where it covers more than half of a pixel, otherwise 0."""
    if canvas_size is None:
        return mask.astype(np.int64)
    top, left, height, width = get_letterbox(mask.shape, canvas_size)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return np.zeros(canvas_size, dtype=np.int64)
    if mask.shape != (height, width):
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # the mask is empty outside
        by_rows = _sum_intervals(box, rows[0], mask.shape[0], height)  # (height, width of the box)
        area = _sum_intervals(by_rows.T, columns[0], mask.shape[1], width).T * (height * width / mask.size)
        mask = area > 0.5 + 1e-6
    return _place(mask.astype(np.int64), canvas_size, top, left)


def _sum_intervals(array: np.ndarray, start: int, length: int, num_intervals: int) -> np.ndarray:
    """Cut an axis of `length` into equal intervals and sum over each, with fractions at the borders.

    Args:
        array: Values from `start` on along the first axis. All others are zero.

    Returns:
        Sums of shape (num_intervals, ...) in float64.
    """
    integral = np.zeros((len(array) + 1, *array.shape[1:]), dtype=np.float64 if array.dtype != bool else np.int32)
    np.cumsum(array, axis=0, out=integral[1:])
    borders = np.clip(np.arange(num_intervals + 1) * (length / num_intervals) - start, 0, len(array))
    lower = np.minimum(borders.astype(np.int64), len(array) - 1)
    return np.diff(integral[lower] + (borders - lower)[:, None] * array[lower], axis=0)


def _check_logits(outputs: Any) -> torch.Tensor:
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 3 or 0 in logits.shape[1:]:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(f"Expected logits as a tensor of shape (expressions, height, width), got {got}.")
    logits = logits.detach()
    if not logits.isfinite().all():
        raise ValueError(
            "Expected finite logits, got some that are infinite or not a number. The model may have overflowed in"
            f" {logits.dtype}: run it in another type."
        )
    return logits


def _check_target_sizes(
    target_sizes: Iterable[tuple[int, int]] | torch.Tensor, num_expressions: int
) -> list[tuple[int, int]]:
    if isinstance(target_sizes, (torch.Tensor, np.ndarray)):
        target_sizes = target_sizes.tolist()
    rows = list(target_sizes) if isinstance(target_sizes, Iterable) else []
    if len(rows) != num_expressions:
        raise ValueError(
            f"Expected one target size per expression, {num_expressions}, got {len(rows)}. The processor returns one"
            ' original size per image: pass `inputs["original_sizes"][inputs["image_indices"]]`.'
        )
    rows = [row.tolist() if isinstance(row, (torch.Tensor, np.ndarray)) else row for row in rows]
    if not all(_is_image_size(row) for row in rows):
        raise ValueError(f"Expected target sizes as (height, width) in pixels, got {rows}.")
    return [(int(height), int(width)) for height, width in rows]


def _undo_letterbox(logits: torch.Tensor, canvas_size: tuple[int, int], image_size: tuple[int, int]) -> torch.Tensor:
    """Cut the image out of a canvas of logits (height, width) and resize it to the image's size."""
    logits = logits[None, None].float()
    if logits.shape[-2:] != canvas_size:
        logits = F.interpolate(logits, canvas_size, mode="bilinear", align_corners=False)
    top, left, height, width = get_letterbox(image_size, canvas_size)
    logits = logits[..., top : top + height, left : left + width]
    return F.interpolate(logits, image_size, mode="bilinear", align_corners=False)[0, 0]


def _select(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The values inside the mask. On a CPU, NumPy is several times faster than PyTorch, which lists all indices."""
    return torch.from_numpy(values.numpy()[mask.numpy()]) if values.device.type == "cpu" else values[mask]


__all__ = ["ReSTRImageProcessor", "ReSTRImageProcessorKwargs", "UnreadableImageError", "get_letterbox"]
