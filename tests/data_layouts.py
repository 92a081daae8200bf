"""Writers of small datasets in every layout that `restr prepare` reads."""

import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import datasets
import numpy as np
from annotated_images import TWO_BOXES, coco_name, write_photo
from scipy.io import savemat


SIZE = (40, 50)  # (height, width) of all images
SPLITS = {"train": range(1, 8), "val": range(10, 13), "testA": range(20, 22), "testB": range(30, 31)}


def write_refer(
    folder: Path,
    images: Path,
    splits: Mapping[str, Iterable[int]] = SPLITS,
    first_ref_id: int = 0,
    split_by: str = "unc",
) -> list[dict]:
    """REFER's layout: in each image, two expressions about one object that has two parts. Returns the references."""
    image_ids = [image_id for ids in splits.values() for image_id in ids]
    for image_id in image_ids:
        write_photo(images / coco_name(image_id), image_id, SIZE)
    texts = ("two", "boxes")
    refs = [
        {
            "ref_id": first_ref_id + image_id,
            "ann_id": 100 + image_id,
            "image_id": image_id,
            "category_id": 18,
            "split": split,
            "sentences": [{"sent_id": 1000 + 2 * image_id + n, "sent": text} for n, text in enumerate(texts)],
        }
        for split, ids in splits.items()
        for image_id in ids
    ]
    instances = {
        "images": [{"id": n, "file_name": coco_name(n), "height": SIZE[0], "width": SIZE[1]} for n in image_ids],
        "annotations": [
            {"id": 100 + n, "image_id": n, "category_id": 18, "segmentation": TWO_BOXES, "iscrowd": 0}
            for n in image_ids
        ],
        "categories": [{"id": 18, "name": "dog"}],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"refs({split_by}).p").write_bytes(pickle.dumps(refs, protocol=2))
    (folder / "instances.json").write_text(json.dumps(instances))
    return refs


def write_grefcoco(folder: Path, images: Path) -> None:
    """One target per reference, and in the first image a reference to nothing."""
    refs = write_refer(folder, images)
    for ref in refs:
        ref.update(ann_id=[ref["ann_id"]], category_id=[18], no_target=False)
    refs.append({**refs[0], "ref_id": 900, "ann_id": [-1], "category_id": [-1], "no_target": True})
    (folder / "grefs(unc).json").write_text(json.dumps(refs))


def write_referit(folder: Path) -> None:
    """Queries in the folder, with masks and images in folders below: the sky in the upper 7 rows."""
    (folder / "mask").mkdir(parents=True)
    for image_id, split in enumerate(("train", "val", "test"), start=1):
        (folder / f"referit_query_{split}.json").write_text(json.dumps({f"{image_id}_1": ["sky", "the sky"]}))
        outside = np.ones(SIZE, dtype=np.uint8)
        outside[:7, :] = 0
        savemat(folder / "mask" / f"{image_id}_1.mat", {"segimg_t": outside})
        write_photo(folder / "images" / f"{image_id}.jpg", image_id, SIZE)


def write_hub_copy(folder: Path, images: Path) -> None:
    """One image per split, as in jxu124/refcocoplus."""
    for index, split in enumerate(("train", "validation", "test", "testB"), start=1):
        write_photo(images / coco_name(index), index, SIZE)
        row = {
            "ref_id": index,
            "ann_id": index,
            "image_id": index,
            "sentences": [{"raw": "Dog", "sent": "dog", "sent_id": index, "tokens": ["dog"]}],
            "raw_anns": json.dumps({"segmentation": TWO_BOXES, "bbox": [2, 1, 28, 19], "category_id": 18}),
            "raw_image_info": json.dumps({"height": SIZE[0], "width": SIZE[1]}),
            "image_path": f"coco/train2014/{coco_name(index)}",
        }
        datasets.Dataset.from_list([row]).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


def write_coco(path: Path, images: Path, num_images: int = 12) -> dict:
    """A dog in each image. Returns the content of the file."""
    numbers = range(1, num_images + 1)
    for number in numbers:
        write_photo(images / f"{number}.png", number, SIZE)
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "height": SIZE[0], "width": SIZE[1]} for n in numbers],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "segmentation": TWO_BOXES[1:], "iscrowd": 0} for n in numbers
        ],
        "categories": [{"id": 1, "name": "dog"}],
    }
    path.write_text(json.dumps(content))
    return content
