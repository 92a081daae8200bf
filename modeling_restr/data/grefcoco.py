"""
gRefCOCO (Liu et al., "GRES: Generalized Referring Expression Segmentation", CVPR 2023): expressions that refer to
one object, to several, or to nothing in the image. REFER's layout, with `grefs(unc).json` instead of a pickle.
"""

from pathlib import Path
from typing import Any

from .canonical import NO_TARGET, AnnotatedImage, AnnotatedReference
from .records import ID_OR_IDS, read_json
from .refer import (
    REF_FIELDS,
    Instances,
    check_refs,
    expressions_of,
    find_annotation_dir,
    find_file,
    group_by_image,
    parts_of,
    select_split,
)
from .segmentation import SeveralObjects


FOLDERS = ("grefcoco", "gRefCOCO")
FIELDS = {**REF_FIELDS, "ann_id": ID_OR_IDS, "category_id": ID_OR_IDS}


def read_grefcoco(
    annotation_dir: str | Path, image_dir: str | Path, split_by: str = "unc", split: str = "val"
) -> list[AnnotatedImage]:
    """
    Read the annotations of gRefCOCO. Images and references are in the order of the file, the text is `sent`.

    The mask of a reference is the union of its objects. A reference without objects has an empty mask, the `ann_id` -1
    and the category "". A reference to several has the `ann_id` of the first, all their different categories, joined
    by ", ", and the `bbox` of the mask.

    Args:
        annotation_dir: The folder of `grefs(SPLITBY).json` and `instances.json`, or the one above it if it is named
            grefcoco or gRefCOCO.
        image_dir: The folder of COCO's images, see [`read_refer`].
        split_by: "unc", the only choice.
        split: One of the file's splits: "train", "val", "testA" or "testB".

    Returns:
        Images without pixels, for [`build_dataset`].

    Raises:
        ValueError: A file or the split does not exist (the message lists those that do), or the files are not as
            expected.
    """
    folder = find_annotation_dir(annotation_dir, FOLDERS)
    path = find_file(folder, "grefs({}).json", split_by)
    refs = select_split(check_refs(read_json(path), path, FIELDS), split, path)
    return group_by_image(refs, Instances.read(folder / "instances.json"), image_dir, _build_reference)


def _build_reference(ref: dict[str, Any], instances: Instances) -> AnnotatedReference:
    ann_ids = _targets(ref, "ann_id")
    if ref.get("no_target", not ann_ids) == bool(ann_ids):
        raise ValueError(f"ref_id {ref['ref_id']}: no_target is {ref['no_target']}, but ann_id {ref['ann_id']}.")
    annotations = [instances.annotation_of(ref, ann_id) for ann_id in ann_ids]
    objects = tuple(parts_of(annotation) for annotation in annotations)
    names = [instances.category_of(ref, category_id) for category_id in _targets(ref, "category_id")]
    return AnnotatedReference(
        ref_id=ref["ref_id"],
        ann_id=ann_ids[0] if ann_ids else NO_TARGET,
        category=", ".join(dict.fromkeys(names)),
        segmentation=SeveralObjects(objects) if len(objects) > 1 else next(iter(objects), []),
        expressions=expressions_of(ref),
        bbox=annotations[0].get("bbox") if len(annotations) == 1 else None,
    )


def _targets(ref: dict[str, Any], field: str) -> list[int]:
    """The ids in a field, which is a list or one number. -1 stands for none."""
    ids = ref[field] if isinstance(ref[field], list) else [ref[field]]
    if NO_TARGET in ids and len(set(ids)) > 1:
        raise ValueError(f"ref_id {ref['ref_id']}: {field} has both objects and no target: {ids}.")
    return [number for number in ids if number != NO_TARGET]
