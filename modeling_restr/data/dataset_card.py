"""The card of a prepared dataset: its README.md, which also tells `datasets.load_dataset` where the splits are."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import DatasetInfo
from datasets.info import DatasetInfosDict
from datasets.splits import SplitDict, SplitInfo
from huggingface_hub import DatasetCard, DatasetCardData

from .canonical import FEATURES
from .published_counts import format_counts_as_markdown, published_counts
from .shards import PreparedSplit


NUM_LEFT_OUT_SHOWN = 50
OTHER = "other"  # the origin of a user's own data

_REFER_LICENCE = (
    "REFER (https://github.com/lichengunc/refer), which distributes the annotations, is under the Apache License 2.0 "
    "and names no other licence for them."
)
_REFERIT_CITATION = (
    "Kazemzadeh, Ordonez, Matten, Berg: ReferItGame: Referring to Objects in Photographs of Natural Scenes, EMNLP 2014"
)
_REFCOCOG_CITATION = (
    "Mao, Huang, Toshev, Camburu, Yuille, Murphy: Generation and Comprehension of Unambiguous Object Descriptions, "
    "CVPR 2016"
)
_UMD_CITATION = (
    "for the UMD split: Nagaraja, Morariu, Davis: Modeling Context Between Objects for Referring Expression "
    "Understanding, ECCV 2016"
)
_IAPR_CITATION = (
    "Escalante and others: The Segmented and Annotated IAPR TC-12 Benchmark, Computer Vision and Image Understanding, "
    "2010"
)
_CONTEXT_CITATION = "Yu, Poirson, Yang, Berg, Berg: Modeling Context in Referring Expressions, ECCV 2016"


@dataclass(frozen=True)
class Origin:
    """A card's facts about the annotations of one dataset. `images` is a key of `IMAGE_TERMS`, if it has one."""

    title: str
    images: str
    licence: str
    citations: tuple[str, ...]


ORIGINS = {
    "refcoco": Origin("RefCOCO", "coco", _REFER_LICENCE, (_REFERIT_CITATION, _CONTEXT_CITATION)),
    "refcoco+": Origin("RefCOCO+", "coco", _REFER_LICENCE, (_REFERIT_CITATION, _CONTEXT_CITATION)),
    "refcocog": Origin(
        "RefCOCOg",
        "coco",
        "The Google Refexp annotations (https://github.com/mjhucla/Google_Refexp_toolbox) are released under CC BY "
        f"4.0. {_REFER_LICENCE}",
        (_REFCOCOG_CITATION, _UMD_CITATION),
    ),
    "refclef": Origin("RefCLEF", "iapr", _REFER_LICENCE, (_REFERIT_CITATION,)),
    "referit": Origin(
        "ReferIt",
        "iapr",
        "The expressions come from ReferItGame. Their terms are stated where you got the annotations from.",
        (_REFERIT_CITATION, _IAPR_CITATION),
    ),
    "grefcoco": Origin(
        "gRefCOCO",
        "coco",
        "gRefCOCO (https://github.com/henghuiding/gRefCOCO) states the terms; its README names no licence.",
        ("Liu, Ding, Jiang: GRES: Generalized Referring Expression Segmentation, CVPR 2023",),
    ),
    OTHER: Origin(
        "Other data",
        OTHER,
        "Its terms depend on the photographs and annotations that it was made from, which this card does not know.",
        (),
    ),
}

IMAGE_TERMS = {
    "coco": (
        "The photographs are COCO's. COCO does not own them: their use must abide by the Flickr Terms of Use "
        "(https://cocodataset.org/#termsofuse), and each has its own licence, which COCO's annotation files name. Some "
        "licences are non-commercial. COCO's own annotations, including the masks, are under CC BY 4.0."
    ),
    "iapr": "The photographs come from IAPR TC-12; its terms are at https://www.imageclef.org/photodata.",
}
IMAGE_CITATIONS = {"coco": "Lin and others: Microsoft COCO: Common Objects in Context, ECCV 2014"}


@dataclass(frozen=True)
class Source:
    """
    Where prepared data comes from.

    name: Short name of letters, digits and "_", which prefixes its splits when it is combined with others.
    title: Name on the card, such as "RefCOCO (unc)".
    description: Sentences that say what was read, and how.
    origins: Keys of `ORIGINS`.
    options: Other settings that determine the content, in JSON's types. A folder never mixes different ones.
    published: {split: (dataset, split_by, split)}, the arguments for [`published_counts`].
    """

    name: str
    title: str
    description: str
    origins: tuple[str, ...] = (OTHER,)
    options: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)

    def __post_init__(self):
        unknown = set(self.origins) - ORIGINS.keys()
        if unknown:
            raise ValueError(f"Expected origins among {sorted(ORIGINS)}, got {sorted(unknown)}.")

    def published_counts(self, split: str) -> dict[str, int]:
        return published_counts(*self.published[split]) if split in self.published else {}


def build_card(source: Source, splits: Mapping[str, PreparedSplit], notes: Sequence[str] = ()) -> DatasetCard:
    """Build the card of a folder with the Parquet files data/SPLIT-*.parquet."""
    return DatasetCard(f"---\n{_build_card_data(source, splits)}\n---\n\n{_build_text(source, splits, notes)}\n")


def _build_card_data(source: Source, splits: Mapping[str, PreparedSplit]) -> DatasetCardData:
    terms: dict[str, Any] = {}
    if set(source.origins) != {OTHER}:
        terms = {"license": "other", "license_name": "see-the-section-licences"}
    card_data = DatasetCardData(
        **terms,
        language="en",
        pretty_name=source.title,
        task_categories=["image-segmentation"],
        tags=["referring-expression-segmentation", "referring-image-segmentation"],
        size_categories=_size_category(sum(split.counts.images for split in splits.values())),
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": f"data/{name}-*.parquet"} for name in splits],
            }
        ],
    )
    DatasetInfosDict({"default": _build_info(splits)}).to_dataset_card_data(card_data)
    return card_data


def _build_info(splits: Mapping[str, PreparedSplit]) -> DatasetInfo:
    """
    Features and sizes. `load_dataset` identifies a folder by its name and its card alone: without the sizes it would
    take the rows of another folder, or of an earlier version, from its cache.
    """
    split_infos = SplitDict(dataset_name="default")
    for name, split in splits.items():
        split_infos.add(SplitInfo(name, num_bytes=split.num_bytes, num_examples=split.counts.images))
    return DatasetInfo(
        config_name="default",
        features=FEATURES,
        splits=split_infos,
        download_size=sum(split.file_size for split in splits.values()),
        dataset_size=sum(split.num_bytes for split in splits.values()),
    )


def _size_category(num_rows: int) -> str:
    """The Hub's name for a number of rows, up to a million."""
    for limit, name in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K")):
        if num_rows < limit:
            return name
    return "100K<n<1M"


def _build_text(source: Source, splits: Mapping[str, PreparedSplit], notes: Sequence[str]) -> str:
    sections = [
        f"# {source.title}, one row per image",
        "Referring expressions, each with its mask. " + source.description,
        "## Use",
        _USE.format(split=next(iter(splits))),
        "## Splits",
        format_counts_as_markdown(
            {name: split.counts for name, split in splits.items()},
            {name: source.published_counts(name) for name in splits},
        ),
        "## How it was prepared",
        _PREPARATION,
        *notes,
        "## What was left out",
        *_describe_left_out(splits),
        "## Licences",
        *_describe_licences(source),
    ]
    citations = list(_list_citations(source))
    if citations:
        sections += ["## Whom to cite", "\n".join(f"- {citation}" for citation in citations)]
    return "\n\n".join(sections)


_USE = """```python
from datasets import load_dataset
from modeling_restr.data import decode_mask

dataset = load_dataset("path/or/id", split="{split}")  # streaming=True reads only what it needs
row = dataset[0]
for reference in row["references"]:
    mask = decode_mask(reference["mask"])  # (height, width) bool, in the image's own size
    texts = [expression["text"] for expression in reference["expressions"]]
```

Each of the `references` has a `ref_id`, `ann_id`, `category`, `bbox` ([x, y, width, height] in pixels), `mask` (COCO's
compressed RLE, which `pycocotools` decodes) and `expressions` (`sent_id`, `text`)."""

_PREPARATION = """With `restr prepare` of `modeling_restr`. Every image was decoded completely, and its masks have the
decoded size. The image files are unchanged, except those with an EXIF orientation that the annotations ignore: they
were written again without it. The parts of an object are united in one mask. The ids come from the source."""


def _describe_left_out(splits: Mapping[str, PreparedSplit]) -> Iterator[str]:
    if not any(split.left_out for split in splits.values()):
        yield "No image."
    for name, split in splits.items():
        if split.problems:
            lines = [f"- {line}" for line in split.problems.summary().splitlines()]
            yield f"Missing or doubtful in the split {name}:"
            yield "\n".join(lines)
    for name, split in splits.items():
        if not split.left_out:
            continue
        lines = [f"- {problem}" for problem in split.left_out[:NUM_LEFT_OUT_SHOWN]]
        if len(split.left_out) > NUM_LEFT_OUT_SHOWN:
            lines.append(f"- and {len(split.left_out) - NUM_LEFT_OUT_SHOWN:,} more")
        number = f"{len(split.left_out):,} image" + ("s" if len(split.left_out) > 1 else "")
        yield f"{number} of the split {name}, with all references to them, because they could not be used:"
        yield "\n".join(lines)


def _describe_licences(source: Source) -> Iterator[str]:
    images = dict.fromkeys(ORIGINS[origin].images for origin in source.origins)
    yield from (IMAGE_TERMS[name] for name in images if name in IMAGE_TERMS)
    for licence in dict.fromkeys(ORIGINS[origin].licence for origin in source.origins):
        titles = [ORIGINS[origin].title for origin in source.origins if ORIGINS[origin].licence == licence]
        yield f"{', '.join(titles)}: {licence}"


def _list_citations(source: Source) -> Iterator[str]:
    origins = [ORIGINS[origin] for origin in source.origins]
    yield from dict.fromkeys(citation for origin in origins for citation in origin.citations)
    images = dict.fromkeys(origin.images for origin in origins)
    yield from (IMAGE_CITATIONS[name] for name in images if name in IMAGE_CITATIONS)
