"""
The sources of data that `restr prepare` reads. A plan says what a source is, which splits it has, and how to read them.

    plan = plan_refer("refer/data", "coco/train2014", dataset="refcoco")
    print(prepare_plan(plan, "data/refcoco", num_proc=4))
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import load_dataset_builder
from tqdm.auto import tqdm

from .canonical import AnnotatedImage
from .coco import read_coco
from .combination import combine
from .dataset_card import ORIGINS, OTHER, PreparedSplit, Source
from .grefcoco import read_grefcoco
from .hub_copies import read_hub_copy
from .preparation import prepare, read_source
from .published_counts import PUBLISHED_COUNTS, format_counts
from .records import Problems
from .refer import check_split_by, read_refer
from .referit import read_referit
from .sentence_files import read_sentences


@dataclass(frozen=True)
class Plan:
    """
    The data for [`prepare_plan`], and how to read it.

    source: Description of the data.
    splits: The names of all splits.
    read: Function that reads a split and adds everything that it leaves out to the problems.
    other_names: {other name of a split: its name}.
    notes: Paragraphs for the card on how the data was made.
    cache_dir: A folder that is removed when the data is prepared.
    """

    source: Source
    splits: Sequence[str]
    read: Callable[[str, Problems], Sequence[AnnotatedImage]]
    other_names: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    cache_dir: Path | None = None


def prepare_plan(plan: Plan, output_dir: str | Path, splits: Sequence[str] | None = None, **options: Any) -> str:
    """
    Read the splits of a plan (by default all), and write them with [`prepare`], which gets the `options`.

    Returns:
        `str`: A report: counts next to the published ones, and everything that was left out.
    """
    problems = Problems()
    names = [plan.other_names.get(split, split) for split in splits or plan.splits]
    annotations = {split: plan.read(split, problems) for split in tqdm(names, desc="Annotations", unit="split")}
    prepared = prepare(plan.source, annotations, output_dir, notes=plan.notes, **options)
    if plan.cache_dir:
        shutil.rmtree(plan.cache_dir, ignore_errors=True)
    return "\n".join([*plan.notes, f"{plan.source.title} in {output_dir}", *_report(plan.source, prepared, problems)])


def _report(source: Source, prepared: Mapping[str, PreparedSplit], problems: Problems) -> list[str]:
    counts = {name: split.counts for name, split in prepared.items()}
    lines = [format_counts(counts, {name: source.published_counts(name) for name in prepared})]
    left_out = [f"  {name}  {problem}" for name, split in prepared.items() for problem in split.left_out]
    if left_out:
        lines += ["", f"Images left out, because they cannot be used: {len(left_out):,}", *left_out]
    for split in prepared.values():
        problems.extend(split.problems)
    if problems:
        lines += ["", "Dropped or doubtful in total:", problems.summary()]
    return lines


def _select(splits: Mapping[str, Sequence[AnnotatedImage]], split: str) -> Sequence[AnnotatedImage]:
    if split not in splits:
        raise ValueError(f"Expected --splits among {', '.join(splits)}, got {split}.")
    return splits[split]


def _published_splits(dataset: str, split_by: str, prefix: str = "") -> dict[str, tuple[str, str, str]]:
    """{split: key of its published counts} for all splits that have any."""
    splits = PUBLISHED_COUNTS.get((dataset, split_by), {})
    return {prefix + split: (dataset, split_by, split) for split in splits}


# The published splits of copies on the Hub, by the name of the repository.
_HUB_COPIES = {
    "refcoco": _published_splits("refcoco", "unc"),
    "refcocoplus": _published_splits("refcoco+", "unc"),
    "refcocog": _published_splits("refcocog", "umd"),
    "refcoco-benchmark": {
        **_published_splits("refcoco", "unc", "refcoco_unc_"),
        **_published_splits("refcoco", "google", "refcoco_google_"),
        **_published_splits("refcoco+", "unc", "refcoco_plus_unc_"),
        **_published_splits("refcocog", "umd", "refcocog_umd_"),
        **_published_splits("refcocog", "google", "refcocog_google_"),
    },
    "RefCOCO": {
        "test": ("refcoco", "google", "test"),  # its val mixes the val splits of unc and google
        "testA": ("refcoco", "unc", "testA"),
        "testB": ("refcoco", "unc", "testB"),
    },
    "RefCOCOplus": _published_splits("refcoco+", "unc"),
    "RefCOCOg": {"test": ("refcocog", "umd", "test")},
}


def plan_refer(
    annotation_dir: str | Path, image_dir: str | Path, *, dataset: str = "refcoco", split_by: str | None = None
) -> Plan:
    """RefCOCO, RefCOCO+, RefCOCOg or RefCLEF, see [`read_refer`]. By default, `split_by` is the dataset's usual one."""
    split_by = check_split_by(dataset, split_by)
    published = _published_splits(dataset, split_by)
    refclef_splits = ["train", "val", "testA", "testB", "testC"] if split_by == "unc" else ["train", "val", "test"]
    source = Source(
        name=dataset.replace("+", "plus"),
        title=f"{ORIGINS[dataset].title} ({split_by})",
        description=f"Read from REFER's refs({split_by}).p and instances.json; the texts are their `sent`.",
        origins=(dataset,),
        options={"split_by": split_by},
        published=published,
    )
    return Plan(
        source,
        list(published) or refclef_splits,
        lambda split, _: read_refer(annotation_dir, image_dir, dataset, split_by, split),
    )


def plan_grefcoco(annotation_dir: str | Path, image_dir: str | Path) -> Plan:
    """gRefCOCO, see [`read_grefcoco`]."""
    description = (
        "Read from grefs(unc).json and instances.json. An expression refers to one object, to several (their masks "
        "are united) or to nothing in the image (the mask is empty)."
    )
    source = Source(name="grefcoco", title="gRefCOCO (unc)", description=description, origins=("grefcoco",))
    splits = ["train", "val", "testA", "testB"]
    return Plan(source, splits, lambda split, _: read_grefcoco(annotation_dir, image_dir, "unc", split))


def plan_referit(annotation_dir: str | Path, mask_dir: str | Path, image_dir: str | Path) -> Plan:
    """ReferIt, see [`read_referit`]."""
    description = "Read from referit_query_SPLIT.json and one MATLAB mask per object."
    source = Source(name="referit", title="ReferIt", description=description, origins=("referit",))
    splits = ["train", "val", "test"]
    return Plan(source, splits, lambda split, _: read_referit(annotation_dir, mask_dir, image_dir, split))


def plan_hub(path_or_id: str, image_dir: str | Path | None = None, *, data_revision: str | None = None) -> Plan:
    """A copy of RefCOCO, RefCOCO+ or RefCOCOg on the Hub, or a local folder of one, see [`read_hub_copy`]."""
    title = Path(path_or_id).resolve().name if Path(path_or_id).is_dir() else path_or_id
    copy = title.rpartition("/")[2]
    available = list(load_dataset_builder(path_or_id, revision=data_revision).config.data_files)
    usual_names = {"validation": "val"}
    if "testB" in available and "testA" not in available:
        usual_names["test"] = "testA"
    published = _HUB_COPIES.get(copy, {})
    source = Source(
        name="".join(character if character.isalnum() else "_" for character in copy),
        title=title,
        description=f"Read from the copy {title}" + (f" at {data_revision}." if data_revision else "."),
        origins=tuple(dict.fromkeys(dataset for dataset, _, _ in published.values())) or (OTHER,),
        options={"copy": title, "revision": data_revision},
        published=published,
    )
    return Plan(
        source,
        [usual_names.get(split, split) for split in available],
        lambda split, _: read_hub_copy(path_or_id, split, image_dir, data_revision),
        other_names=usual_names,
    )


def plan_coco(
    instances_file: str | Path,
    image_dir: str | Path,
    *,
    name: str = "coco",
    val_share: float = 0.1,
    expressions_per_instance: int = 3,
    seed: int = 0,
    crowds_as_instances: bool = False,
    captions: bool = False,
) -> Plan:
    """A COCO instances file, see [`read_coco`]. `name` is a short name for the data."""
    options: dict[str, Any] = {
        "expressions_per_instance": expressions_per_instance,
        "seed": seed,
        "val_share": val_share,
    }
    switches = {"crowds_as_instances": crowds_as_instances, "captions": captions}
    options |= {switch: True for switch, is_on in switches.items() if is_on}
    file_name = Path(instances_file).name
    description = f"The expressions are the captions of the annotations in {file_name}."
    if not captions:
        description = (
            f"The expressions were generated from the category, place, order and size of the objects in {file_name}, "
            f"at most {expressions_per_instance} per object, each true of one object only (seed {seed})."
        )
    source = Source(name=name, title=f"Expressions for {name}", description=description, options=options)
    return Plan(
        source,
        ["train", "val"] if val_share else ["train"],
        lambda split, problems: read_coco(instances_file, image_dir, split=split, problems=problems, **options),
    )


def plan_sentences(
    sentences_file: str | Path,
    image_dir: str | Path | None = None,
    *,
    mask_dir: str | Path | None = None,
    name: str = "own",
    val_share: float = 0.1,
    boxes_as_masks: bool = False,
) -> Plan:
    """A CSV or JSONL file of your own sentences, see [`read_sentences`]. `name` is a short name for the data."""
    left_out = Problems()
    options: Any = {"val_share": val_share, "boxes_as_masks": boxes_as_masks}
    splits = read_sentences(sentences_file, image_dir, mask_dir=mask_dir, problems=left_out, **options)
    description = f"Read from {Path(sentences_file).name}." + (" The masks are boxes." if boxes_as_masks else "")
    source = Source(name=name, title=f"Sentences of {name}", description=description, options=options)

    def read(split: str, problems: Problems) -> Sequence[AnnotatedImage]:
        problems.update(left_out)
        return _select(splits, split)

    return Plan(source, list(splits), read)


def plan_combine(folders: Sequence[str | Path], output_dir: str | Path, names: Sequence[str] | None = None) -> Plan:
    """
    Several prepared folders in one, see [`combine`]. By default, `names` come from their sources. `datasets` unpacks
    the folders in `output_dir`.

    Raises:
        ValueError: As [`combine`], or there is not one distinct name per folder.
    """
    names = names or [read_source(folder).name for folder in folders]
    if len(names) != len(folders) or len(set(names)) < len(names):
        raise ValueError(f"Expected --names with a different name for each folder, got {' '.join(names)}.")
    cache_dir = Path(output_dir, ".cache")
    combination = combine(dict(zip(names, folders)), cache_dir)
    return Plan(
        combination.source,
        list(combination.splits),
        lambda split, _: _select(combination.splits, split),
        notes=combination.notes,
        cache_dir=cache_dir,
    )


__all__ = [
    "Plan",
    "plan_coco",
    "plan_combine",
    "plan_grefcoco",
    "plan_hub",
    "plan_refer",
    "plan_referit",
    "plan_sentences",
    "prepare_plan",
]
