"""
ReferIt (Kazemzadeh et al., EMNLP 2014) on the photos of SAIAPR TC-12, in the layout of its first use for
segmentation (Hu et al., "Segmentation from Natural Language Expressions", ECCV 2016): `referit_query_SPLIT.json`, one
MATLAB mask per object, and the images.
"""

import re
import reprlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .canonical import AnnotatedImage, AnnotatedReference, check_images
from .mat_files import MatReader
from .records import TEXT, read_json
from .refer import find_file


MASK_KEY = "segimg_t"
_NAME = re.compile(r"[0-9]{1,12}_[0-9]{1,3}")  # all ids made from it fit into 64 bits
_STRIDE = 1000  # above the number of objects per image and of expressions per object
_MAT_READER = MatReader()


def read_referit(
    annotation_dir: str | Path, mask_dir: str | Path, image_dir: str | Path, split: str = "test"
) -> list[AnnotatedImage]:
    """
    Read the annotations of ReferIt. Images and references are in the order of the file.

    The files number images and their objects only. `ref_id` and `ann_id` are `1000 * image + object` and `sent_id` is
    `1000 * ref_id + index`, so an expression has the same ids in every split's file. There are no categories:
    `category` is "". Masks are read when the rows are built.

    Args:
        annotation_dir: The folder of `referit_query_SPLIT.json`: {"IMAGE_OBJECT": [text, ...]}.
        mask_dir: The folder of `IMAGE_OBJECT.mat`; the object is where `segimg_t` is 0.
        image_dir: The folder of `IMAGE.jpg`.
        split: "train", "val", "trainval" or "test".

    Returns:
        Images without pixels, for [`build_dataset`].

    Raises:
        ValueError: The split's file does not exist (the message lists those that do) or is not as above.
        ImportError: SciPy, which reads the masks, is not installed.
    """
    try:
        import scipy.io  # noqa: F401  (in the process that reads the masks)
    except ImportError as error:
        raise ImportError(
            'ReferIt\'s masks are MATLAB files, which SciPy reads: `pip install "modeling-restr[train]"`.'
        ) from error
    path = find_file(Path(annotation_dir), "referit_query_{}.json", split)
    references: dict[int, list[AnnotatedReference]] = {}
    for name, texts in _read_queries(path).items():
        image_id, reference = _build_reference(name, texts, Path(mask_dir))
        references.setdefault(image_id, []).append(reference)
    folder = Path(image_dir)
    images = [
        AnnotatedImage(image_id, name := f"{image_id}.jpg", folder / name, tuple(found), image_dir=folder)
        for image_id, found in references.items()
    ]
    check_images(images, path)
    return images


def _read_queries(path: Path) -> dict[str, list[str]]:
    queries = read_json(path, _to_dict)
    wrong = None
    if not isinstance(queries, dict):
        wrong = f"a {type(queries).__name__}"
    for name, texts in queries.items() if wrong is None else ():
        is_texts = isinstance(texts, list) and len(texts) < _STRIDE and all(map(TEXT.matches, texts))
        if not (_NAME.fullmatch(name) and is_texts):
            wrong = f"{reprlib.repr(name)}: {reprlib.repr(texts)}"
    if wrong is not None:
        raise ValueError(f'Expected {path} to hold {{"IMAGE_OBJECT": [text, ...]}}, got {wrong}.')
    return queries


def _to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse several fields of one name. `json` silently takes the last one."""
    names = Counter(name for name, _ in pairs)
    if len(names) < len(pairs):
        raise ValueError(f"{names.most_common(1)[0][0]} is there twice")
    return dict(pairs)


def _build_reference(name: str, texts: list[str], mask_dir: Path) -> tuple[int, AnnotatedReference]:
    image_id, object_id = map(int, name.split("_"))
    ref_id = _STRIDE * image_id + object_id
    return image_id, AnnotatedReference(
        ref_id=ref_id,
        ann_id=ref_id,
        category="",
        segmentation=partial(load_mask, mask_dir / f"{name}.mat"),
        expressions=tuple((_STRIDE * ref_id + index, text) for index, text in enumerate(texts)),
    )


def load_mask(path: Path) -> np.ndarray:
    """The mask of an object, (height, width) bool; `ValueError` if the file is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"The mask {path} is missing.")
    try:
        return _MAT_READER.read_zeros(path, MASK_KEY)
    except ValueError as error:
        raise ValueError(f"The mask {path} cannot be read ({error}).") from error
