"""
Prepare referring expressions for training and evaluation: from any form in which the RefCOCO family exists to Parquet
with the images embedded, one row an image, with a card, as `datasets.load_dataset` and the Hub take it.

    python examples/prepare_refcoco.py refer --dataset refcoco --split_by unc --annotation_dir refer/data \\
        --image_dir coco/train2014 --output_dir data/refcoco --num_proc 4
    python examples/prepare_refcoco.py grefcoco --annotation_dir grefcoco --image_dir coco --output_dir data/grefcoco
    python examples/prepare_refcoco.py referit --annotation_dir referit --mask_dir referit/mask \\
        --image_dir referit/images --output_dir data/referit
    python examples/prepare_refcoco.py hub jxu124/refcocoplus --image_dir coco --output_dir data/refcocoplus
    python examples/prepare_refcoco.py coco --instances_file instances.json --image_dir photos --output_dir data/own
    python examples/prepare_refcoco.py sentences --sentences_file own.csv --image_dir photos --output_dir data/mine
    python examples/prepare_refcoco.py combine data/refcoco data/refcocoplus --output_dir data/both

Interrupted, the same command goes on where it was. At the end stands a table beside the published counts.
"""

import argparse
import shutil
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

from modeling_restr.arguments import ArgumentParser, add_options
from modeling_restr.data.canonical import AnnotatedImage
from modeling_restr.data.dataset_card import ORIGINS, OTHER, PreparedSplit, Source
from modeling_restr.data.preparation import IMAGES_PER_SHARD, prepare, push_to_hub, read_source
from modeling_restr.data.published_counts import PUBLISHED_COUNTS, format_counts
from modeling_restr.data.records import Problems


class Task(NamedTuple):
    """
    What to read: the source, its splits, and the function that reads one of them. What that passes over, it adds to
    the problems it is given.
    """

    source: Source
    splits: list[str]
    read: Callable[[str, Problems], list[AnnotatedImage]]


def published_splits(dataset: str, split_by: str, prefix: str = "") -> dict[str, tuple[str, str, str]]:
    """{split: where its published counts are}, of all splits that have any."""
    splits = PUBLISHED_COUNTS.get((dataset, split_by), {})
    return {prefix + split: (dataset, split_by, split) for split in splits}


# Copies on the Hub, by the name of the repository: which of their splits are published ones.
HUB_COPIES = {
    "jxu124/refcoco": published_splits("refcoco", "unc"),
    "jxu124/refcocoplus": published_splits("refcoco+", "unc"),
    "jxu124/refcocog": published_splits("refcocog", "umd"),
    "jxu124/refcoco-benchmark": {
        **published_splits("refcoco", "unc", "refcoco_unc_"),
        **published_splits("refcoco", "google", "refcoco_google_"),
        **published_splits("refcoco+", "unc", "refcoco_plus_unc_"),
        **published_splits("refcocog", "umd", "refcocog_umd_"),
        **published_splits("refcocog", "google", "refcocog_google_"),
    },
    "lmms-lab/RefCOCO": {
        "test": ("refcoco", "google", "test"),  # its val mixes those of unc and google
        "testA": ("refcoco", "unc", "testA"),
        "testB": ("refcoco", "unc", "testB"),
    },
    "lmms-lab/RefCOCOplus": published_splits("refcoco+", "unc"),
    "lmms-lab/RefCOCOg": {"test": ("refcocog", "umd", "test")},
}


def plan_refer(args: argparse.Namespace) -> Task:
    from modeling_restr.data.refer import DATASETS, read_refer

    if args.dataset not in DATASETS:
        raise ValueError(f"Expected --dataset to be one of {', '.join(DATASETS)}, got {args.dataset!r}.")
    split_by = args.split_by or DATASETS[args.dataset][0]
    published = published_splits(args.dataset, split_by)
    of_refclef = ["train", "val", "testA", "testB", "testC"] if split_by == "unc" else ["train", "val", "test"]
    source = Source(
        name=args.dataset.replace("+", "plus"),
        title=f"{ORIGINS[args.dataset].title} ({split_by})",
        description=f"Read from REFER's refs({split_by}).p and instances.json; the texts are their `sent`.",
        origins=(args.dataset,),
        options={"split_by": split_by},
        published=published,
    )
    return Task(
        source,
        list(published) or of_refclef,
        lambda split, _: read_refer(args.annotation_dir, args.image_dir, args.dataset, split_by, split),
    )


def plan_grefcoco(args: argparse.Namespace) -> Task:
    from modeling_restr.data.grefcoco import read_grefcoco

    description = (
        "Read from grefs(unc).json and instances.json. An expression refers to one object, to several (their masks "
        "are united) or to nothing in the image (the mask is empty)."
    )
    return Task(
        Source(name="grefcoco", title="gRefCOCO (unc)", description=description, origins=("grefcoco",)),
        ["train", "val", "testA", "testB"],
        lambda split, _: read_grefcoco(args.annotation_dir, args.image_dir, "unc", split),
    )


def plan_referit(args: argparse.Namespace) -> Task:
    from modeling_restr.data.referit import read_referit

    description = "Read from referit_query_SPLIT.json and one MATLAB mask an object."
    return Task(
        Source(name="referit", title="ReferIt", description=description, origins=("referit",)),
        ["train", "val", "test"],
        lambda split, _: read_referit(args.annotation_dir, args.mask_dir, args.image_dir, split),
    )


def plan_hub(args: argparse.Namespace) -> Task:
    from datasets import load_dataset_builder

    from modeling_restr.data.hub_copies import read_hub_copy

    is_local = Path(args.path_or_id).is_dir()
    title = Path(args.path_or_id).resolve().name if is_local else args.path_or_id
    data_files = load_dataset_builder(args.path_or_id, revision=args.data_revision).config.data_files
    available = list(data_files)
    names = {"validation": "val"}
    if "testB" in available and "testA" not in available:
        names["test"] = "testA"
    args.splits = [names.get(split, split) for split in args.splits or ()]
    by_name = {copy.rpartition("/")[2]: splits for copy, splits in HUB_COPIES.items()}
    published = by_name.get(title.rpartition("/")[2], {})
    source = Source(
        name="".join(character if character.isalnum() else "_" for character in title.rpartition("/")[2]),
        title=title,
        description=f"Read from the copy {title}" + (f" at {args.data_revision}." if args.data_revision else "."),
        origins=tuple(dict.fromkeys(dataset for dataset, _, _ in published.values())) or (OTHER,),
        options={"copy": title, "revision": args.data_revision},
        published=published,
    )
    return Task(
        source,
        [names.get(split, split) for split in available],
        lambda split, _: read_hub_copy(args.path_or_id, split, args.image_dir, args.data_revision),
    )


def plan_coco(args: argparse.Namespace) -> Task:
    from modeling_restr.data.coco import read_coco

    options = {
        "expressions_per_instance": args.expressions_per_instance,
        "seed": args.seed,
        "val_share": args.val_share,
        **{name: True for name in ("crowds_as_instances", "captions") if getattr(args, name)},
    }
    description = (
        f"The expressions were generated from the category, place, order and size of the objects in "
        f"{args.instances_file.name}, at most {args.expressions_per_instance} an object, each true of one object "
        f"only (seed {args.seed})."
    )
    if args.captions:
        description = f"The expressions are the captions of the annotations in {args.instances_file.name}."
    source = Source(name=args.name, title=f"Expressions for {args.name}", description=description, options=options)
    return Task(
        source,
        ["train", "val"] if args.val_share else ["train"],
        lambda split, problems: read_coco(
            args.instances_file, args.image_dir, split=split, problems=problems, **options
        ),
    )


def plan_sentences(args: argparse.Namespace) -> Task:
    from modeling_restr.data.sentence_files import read_sentences

    left_out = Problems()
    options = {"val_share": args.val_share, "boxes_as_masks": args.boxes_as_masks}
    splits = read_sentences(args.sentences_file, args.image_dir, mask_dir=args.mask_dir, problems=left_out, **options)

    def read(split: str, problems: Problems) -> list[AnnotatedImage]:
        if split not in splits:
            raise ValueError(f"Expected --splits among {', '.join(splits)}, got {split}.")
        problems.update(left_out)
        return splits[split]

    note = " The masks are boxes." if args.boxes_as_masks else ""
    source = Source(
        name=args.name,
        title=f"Sentences of {args.name}",
        description=f"Read from {args.sentences_file.name}.{note}",
        options=options,
    )
    return Task(source, list(splits), read)


def prepare_task(task: Task, args: argparse.Namespace) -> tuple[dict[str, PreparedSplit], Problems]:
    splits, problems = {}, Problems()
    for split in args.splits or task.splits:
        print(f"Reading the annotations of {split}", flush=True)
        splits[split] = task.read(split, problems)
    prepared = prepare(
        task.source,
        splits,
        args.output_dir,
        images_per_shard=args.images_per_shard,
        num_proc=args.num_proc,
        skip_bad=args.skip_bad,
    )
    return prepared, problems


def prepare_combination(args: argparse.Namespace) -> tuple[dict[str, PreparedSplit], Problems]:
    from modeling_restr.data.combination import combine

    names = args.names or [read_source(folder).name for folder in args.folders]
    if len(names) != len(args.folders) or len(set(names)) < len(names):
        raise ValueError(f"Expected --names with a different name for each of the folders, got {' '.join(names)}.")
    cache_dir = args.output_dir / ".cache"
    combination = combine(dict(zip(names, args.folders)), cache_dir)
    print("\n".join(combination.notes), flush=True)
    prepared = prepare(
        combination.source,
        combination.splits,
        args.output_dir,
        images_per_shard=args.images_per_shard,
        num_proc=args.num_proc,
        skip_bad=args.skip_bad,
        notes=combination.notes,
    )
    shutil.rmtree(cache_dir, ignore_errors=True)
    return prepared, Problems()


def report(output_dir: Path, prepared: dict[str, PreparedSplit], problems: Problems) -> None:
    """The table, every image that was left out by name, and a summary of all that was."""
    source = read_source(output_dir)
    counts = {name: split.counts for name, split in prepared.items()}
    print(f"\n{source.title} in {output_dir}")
    print(format_counts(counts, {name: source.published_counts(name) for name in prepared}))
    left_out = [(name, problem) for name, split in prepared.items() for problem in split.left_out]
    if left_out:
        print(f"\nImages left out, since they cannot be used: {len(left_out):,}")
        print("\n".join(f"  {name}  {problem}" for name, problem in left_out))
    for split in prepared.values():
        problems.extend(split.problems)
    if problems:
        print(f"\nDropped or doubtful, in all:\n{problems.summary()}")


def parse_args() -> argparse.Namespace:
    common = ArgumentParser(add_help=False)
    add_options(common, output_dir={"required": True})
    common.add_argument(
        "--images_per_shard", type=int, default=IMAGES_PER_SHARD, help="rows of a Parquet file (default: %(default)s)"
    )
    common.add_argument(
        "--num_proc", type=int, default=1, help="processes that decode and write (default: %(default)s)"
    )
    common.add_argument(
        "--skip_bad",
        action="store_true",
        help="leave out images that are missing, damaged, of another size than their annotations say, or with an "
        "object without a mask, and list them (default: stop)",
    )
    common.add_argument(
        "--push_to_hub", metavar="REPO_ID", help="upload the folder to this dataset repository at the end"
    )
    common.add_argument("--private", action="store_true", help="make that repository private if it is made")
    reading = ArgumentParser(add_help=False, parents=[common])
    reading.add_argument("--splits", nargs="+", help="such as val testA (default: all)")

    parser = ArgumentParser(description="Prepare referring expressions: Parquet, one row an image.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, plan, add_arguments, text in (
        ("refer", plan_refer, add_refer_arguments, "RefCOCO, RefCOCO+, RefCOCOg, RefCLEF in REFER's layout"),
        ("grefcoco", plan_grefcoco, add_folder_arguments, "gRefCOCO"),
        ("referit", plan_referit, add_referit_arguments, "ReferIt with MATLAB masks"),
        ("hub", plan_hub, add_hub_arguments, "a copy of RefCOCO, RefCOCO+ or RefCOCOg on the Hub"),
        ("coco", plan_coco, add_coco_arguments, "any COCO instances file; expressions are generated, or its captions"),
        (
            "sentences",
            plan_sentences,
            add_sentences_arguments,
            "own photos, sentences and masks in a CSV or JSONL file",
        ),
    ):
        command = commands.add_parser(name, parents=[reading], help=text, description=text)
        add_arguments(command)
        command.set_defaults(prepare=lambda args, plan=plan: prepare_task(plan(args), args))
    text = "prepared folders into one, without training on images that are evaluated on"
    command = commands.add_parser("combine", parents=[common], help=text, description=text)
    command.add_argument("folders", type=Path, nargs="+", help="output folders of this script")
    command.add_argument("--names", nargs="+", help="one for each folder; evaluation splits become NAME_SPLIT")
    command.set_defaults(prepare=prepare_combination)
    return parser.parse_args()


def add_folder_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--annotation_dir", type=Path, required=True, help="the folder of the annotations")
    command.add_argument("--image_dir", type=Path, required=True, help="the folder of the images, or one above it")


def add_refer_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dataset", default="refcoco", help="refcoco, refcoco+, refcocog or refclef (default: %(default)s)"
    )
    command.add_argument("--split_by", help="unc, umd, google or berkeley (default: the dataset's usual one)")
    add_folder_arguments(command)


def add_referit_arguments(command: argparse.ArgumentParser) -> None:
    add_folder_arguments(command)
    command.add_argument("--mask_dir", type=Path, required=True, help="the folder of IMAGE_OBJECT.mat")


def add_hub_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("path_or_id", help="such as jxu124/refcoco, or a local folder of such a copy")
    command.add_argument("--image_dir", type=Path, help="COCO's train2014 images, for copies without images")
    add_options(command, "data_revision")


def add_coco_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--instances_file", type=Path, required=True, help="the JSON file with images and annotations"
    )
    command.add_argument("--image_dir", type=Path, required=True, help="the folder of the images")
    add_own_arguments(command, name="coco")
    command.add_argument(
        "--expressions_per_instance",
        type=int,
        default=3,
        help="at most so many for each object (default: %(default)s)",
    )
    command.add_argument(
        "--seed", type=int, default=0, help="another one gives other expressions (default: %(default)s)"
    )
    command.add_argument(
        "--crowds_as_instances",
        action="store_true",
        help="read annotations marked as crowds (iscrowd 1), as CVAT's brush makes them, as one object each",
    )
    command.add_argument(
        "--captions", action="store_true", help="the caption of each annotation instead of generated expressions"
    )


def add_sentences_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--sentences_file",
        type=Path,
        required=True,
        help=".csv or .jsonl with image, sentence and one of mask, polygon, rle and box; see docs/your_own_photos.md",
    )
    command.add_argument("--image_dir", type=Path, help="the folder of the photos (default: that of the file)")
    command.add_argument("--mask_dir", type=Path, help="the folder of the masks (default: that of the file)")
    command.add_argument("--boxes_as_masks", action="store_true", help="take a box's rectangle as the mask")
    add_own_arguments(command, name="own")


def add_own_arguments(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument("--name", default=name, help="a short name of letters, digits and _ (default: %(default)s)")
    command.add_argument(
        "--val_share",
        type=float,
        default=0.1,
        help="share of the images in the split val; 0 for none (default: %(default)s)",
    )


def main() -> None:
    args = parse_args()
    try:
        prepared, problems = args.prepare(args)
        report(args.output_dir, prepared, problems)
        if args.push_to_hub:
            print(f"Uploaded: {push_to_hub(args.output_dir, args.push_to_hub, private=args.private or None)}")
    except (ValueError, OSError, RecursionError, BrokenProcessPool) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
