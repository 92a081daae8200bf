"""What the training scripts share: their options for model and data, what a run starts from and what it ends in."""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from huggingface_hub import HfApi
from tqdm import tqdm

from ..configuration_restr import ReSTRConfig, ReSTRTextConfig
from ..data.canonical import FEATURES
from ..data.loading import load_prepared, name_rows
from ..data.word_vectors import load_word_vectors, set_word_vectors
from ..hub import push_to_hub, save_bundle, write_model_card
from ..hub.bundle import hash_weights
from ..image_processing_restr import ReSTRImageProcessor
from ..metrics import ReferringIoU
from ..metrics.evaluation import check_dataset, evaluate_dataset, fingerprint, fingerprint_rows
from ..modeling_restr import ReSTRForImageSegmentation
from ..processing_restr import ReSTRProcessor
from ..tokenization_restr import build_tokenizer, read_vocabulary, split_expression, vocabulary_from_expressions
from ..vision_encoder_restr import load_vision_config
from .augmentation import Augmentation
from .batches import ReferringDataset, ReferringStream, count_expressions
from .checkpoints import check_whole, find_last_checkpoint
from .fingerprints import fingerprint_on_main_process
from .recipe import Recipe


logger = logging.getLogger(__name__)

PAPER = Recipe()
EXPRESSIONS_PER_IMAGE_IN_EVALUATION = 8
AUGMENTATIONS = ("scale", "crop", "color", "mirror")
# Without and with Trainer's state in a checkpoint.
SCRIPTS = ("run_referring_segmentation_no_trainer.py", "run_referring_segmentation.py")


def option(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class ModelArguments:
    """What to start from: a trained ReSTR, or a new one."""

    model_name_or_path: str | None = option(None, "Folder or Hub id of a ReSTR to start from, instead of a new one.")
    revision: str = option("main", "Branch, tag or commit of the model on the Hub.", aliases=["--model_revision"])
    vision_model_name_or_path: str = option(PAPER.start, "Pretrained ViT that a new model starts from. The paper's.")
    word_vectors: str | None = option(
        None, "Word vectors of a new model, a file in GloVe's text format, as the paper's. Random by default."
    )
    vocabulary_file: str | None = option(
        None, "Words of a new model, one per line. The words of the training expressions by default."
    )
    image_size: int = option(PAPER.image_size, "Side of a new model's input in pixels. The paper's.")
    max_words: int = option(PAPER.max_words, "Maximum words per expression of a new model. The paper's.")
    fusion_type: str = option("coupled", "Fusion of a new model. The paper's; its ablations: independent, vanilla.")
    patch_loss_weight: float = option(PAPER.patch_loss_weight, "Weight of the patch loss. The paper's.")


@dataclass
class DataArguments:
    """The data, and what becomes of it."""

    dataset_name: str = field(metadata={"help": "Folder or Hub id of prepared data, one row per image."})
    data_revision: str | None = option(
        None, "Branch, tag or commit of the data on the Hub; main by default.", aliases=["--dataset_revision"]
    )
    train_split: str = option("train", "Split to train on.")
    validation_split: str = option("val", "Split to evaluate on; '' for none.")
    expressions_per_image: int = option(
        1, "Maximum sentences per image in a batch, which share its encoding. 1 is the paper's batch."
    )
    streaming: bool = option(False, "Read the training data as a stream: nothing is downloaded or held as a whole.")
    shuffle_buffer_size: int = option(1000, "Items of a stream in memory to draw from.")
    max_train_samples: int | None = option(None, "Train on the first images only.")
    max_eval_samples: int | None = option(None, "Evaluate on the first images only.")
    augment_scale: float = option(0.0, "Probability of showing everything smaller. The paper augments nothing.")
    augment_crop: float = option(0.0, "Probability of a crop that keeps what is referred to.")
    augment_color: float = option(0.0, "Probability of other colours, where no sentence names one.")
    augment_mirror: float = option(0.0, "Probability of a mirror image, with left and right swapped in the words.")
    num_overlays: int = option(8, "Validation images to draw with their masks after each evaluation.")


@dataclass
class RecipeArguments:
    """How to train: the options of both scripts. Those that TrainingArguments has too mean the same there."""

    output_dir: str = option("runs/restr", "Checkpoints, overlays, and the model at the end.")
    max_steps: int = option(PAPER.max_steps, "Steps in all. The paper's.")
    num_train_epochs: float = option(0.0, "If above 0, the length of the run instead of `max_steps`.")
    per_device_train_batch_size: int = option(
        PAPER.images_per_step, "Images per device and batch; the paper's step has 8 in all, with one sentence each."
    )
    gradient_accumulation_steps: int = option(1, "Batches per device and step; gradients are the large batch's.")
    per_device_eval_batch_size: int = option(
        4, "Images per device and batch of the evaluation, with up to 8 sentences each."
    )
    learning_rate: float = option(PAPER.learning_rate, "Of fusion, decoder and language encoder. The paper's.")
    vision_learning_rate_ratio: float = option(
        PAPER.vision_learning_rate_ratio, "The vision encoder's learning rate, as a share of it. The paper's."
    )
    weight_decay: float = option(PAPER.weight_decay, "Of AdamW, on every parameter. The paper's.")
    adam_beta1: float = option(PAPER.adam_beta1, "Of AdamW. The paper's.")
    adam_beta2: float = option(PAPER.adam_beta2, "Of AdamW. The paper's.")
    warmup_steps: float = option(
        PAPER.warmup_steps, "Steps of linear warm-up, below 1 as a share of all steps. The paper's."
    )
    power: float = option(PAPER.power, "Power of the polynomial in which the learning rate falls to 0. The paper's.")
    max_grad_norm: float = option(PAPER.max_grad_norm, "Largest norm of the gradient, 0 for any. The paper's.")
    eval_steps: int = option(10_000, "Steps between evaluations.")
    save_steps: int = option(2_000, "Steps between checkpoints, the most that a kill can cost.")
    save_total_limit: int | None = option(2, "Checkpoints to keep.")
    resume_from_checkpoint: str | None = option(None, "Checkpoint to resume from; by default the last one, if any.")
    logging_steps: int = option(50, "Steps between two lines of the log.")
    dataloader_num_workers: int = option(4, "Processes that decode images, for each device.")
    seed: int = option(PAPER.seed, "Of new weights, the order of the data, and drop path.")
    push_to_hub: bool = option(False, "Upload the model's folder at the end, with its card.")
    hub_model_id: str | None = option(None, "Repository to upload to; by default the name of OUTPUT_DIR.")
    hub_private_repo: bool | None = option(None, "Whether to make it private, if it is new.")
    hub_token: str | None = option(None, "By default the one you are logged in with.")

    def make_recipe(self, **others: Any) -> Recipe:
        """The recipe of these options and, by the names of its fields, of all else that decides on the weights."""
        names = {argument.name for argument in fields(RecipeArguments)} & {field.name for field in fields(Recipe)}
        return Recipe(**{name: getattr(self, name) for name in names}, **others)


def load_data(
    args: DataArguments, main_process_first: AbstractContextManager
) -> tuple[datasets.Dataset | datasets.IterableDataset, datasets.Dataset | None]:
    """
    The data to train on, and that to evaluate on if there is any; of a stream its first images are copied into memory.

    Raises:
        ValueError: it is not in the canonical form, or has expressions without words.
    """
    place: dict[str, Any] = {"path_or_id": args.dataset_name, "revision": args.data_revision}
    place["streaming"] = args.streaming
    validation_data = None
    with main_process_first:  # it fills the cache of `datasets`
        train_data = load_prepared(split=args.train_split, max_images=args.max_train_samples, **place)
        if not args.streaming:
            check_dataset(train_data)
        if args.validation_split:
            data = load_prepared(split=args.validation_split, max_images=args.max_eval_samples, **place)
            validation_data = _hold(data)
            check_dataset(validation_data)
    return train_data, validation_data


def _hold(data: datasets.Dataset | datasets.IterableDataset) -> datasets.Dataset:
    """The same rows with random access: those of a stream in memory, their images encoded."""
    if isinstance(data, datasets.Dataset):
        return data
    return datasets.Dataset.from_list(list(data.cast_column("image", datasets.Image(decode=False))), FEATURES)


def iterate_sentences(data: datasets.Dataset | datasets.IterableDataset) -> Iterator[str]:
    for row in data.select_columns("references"):
        for reference in row["references"]:
            for expression in reference["expressions"]:
                yield expression["text"]


def create_model(args: ModelArguments, sentences: Iterable[str]) -> tuple[ReSTRForImageSegmentation, ReSTRProcessor]:
    """A ViT and word vectors that are pretrained, the rest random."""
    path = args.vocabulary_file
    vocabulary = vocabulary_from_expressions(sentences) if path is None else read_vocabulary(path)
    vectors = None if args.word_vectors is None else load_word_vectors(args.word_vectors, vocabulary)
    dim = 300 if vectors is None else vectors.matrix.shape[1]
    vision_config = load_vision_config(args.vision_model_name_or_path)
    text_config = ReSTRTextConfig(
        vocab_size=max(vocabulary.values()) + 1,
        hidden_size=dim,
        num_attention_heads=max(heads for heads in range(1, 13) if dim % heads == 0),  # 12 of 25 for 300, the paper's
        intermediate_size=4 * dim,
        projection_dim=vision_config.hidden_size,
        max_position_embeddings=args.max_words,
    )
    config = ReSTRConfig(
        vision_config=vision_config,
        text_config=text_config,
        fusion_type=args.fusion_type,
        num_attention_heads=vision_config.num_attention_heads,
    )
    model = ReSTRForImageSegmentation.from_vision_pretrained(
        args.vision_model_name_or_path, config, args.image_size, dtype=torch.float32
    )
    if vectors is not None:
        set_word_vectors(model, vectors)
    image_processor = ReSTRImageProcessor(size={"height": args.image_size, "width": args.image_size})
    return model, ReSTRProcessor(image_processor, build_tokenizer(vocabulary, args.max_words))


def load_model(
    args: ModelArguments, train_data: datasets.Dataset | datasets.IterableDataset
) -> tuple[ReSTRForImageSegmentation, ReSTRProcessor]:
    """What the run starts from, in float32."""
    if args.model_name_or_path is None:
        model, processor = create_model(args, iterate_sentences(train_data))
    else:
        options: dict[str, Any] = {"revision": args.revision}
        model = ReSTRForImageSegmentation.from_pretrained(args.model_name_or_path, dtype=torch.float32, **options)
        processor = ReSTRProcessor.from_pretrained(args.model_name_or_path, **options)
        if isinstance(train_data, datasets.Dataset):
            _report_unknown_words(processor.tokenizer.get_vocab(), iterate_sentences(train_data))
    model.config.patch_loss_weight = args.patch_loss_weight if model.config.use_pixel_decoder else 0.0
    return model, processor


def _report_unknown_words(vocabulary: Mapping[str, int], sentences: Iterable[str]) -> None:
    counts = Counter(word for sentence in sentences for word in split_expression(sentence))
    unknown = Counter({word: count for word, count in counts.items() if word not in vocabulary})
    if unknown:
        share, frequent = unknown.total() / counts.total(), ", ".join(word for word, _ in unknown.most_common(10))
        logger.warning(
            f"{share:.1%} of the words are none of the model's, which has one vector for all such words: {frequent},"
            " ... Train a new model where they matter."
        )


def count_steps(
    train_data: datasets.Dataset | datasets.IterableDataset, args: DataArguments, epochs: float, images_per_step: int
) -> int:
    """
    Steps of `epochs` epochs, each of which has every expression once.

    Raises:
        ValueError: the data is a stream.
    """
    if not isinstance(train_data, datasets.Dataset):
        raise ValueError("Expected the length of the run in steps: how long an epoch of a stream is, is not known.")
    items = ReferringDataset(train_data, args.expressions_per_image).items_per_epoch
    return math.ceil(epochs * items / images_per_step)


def describe_start(
    model: ReSTRForImageSegmentation,
    train_data: datasets.Dataset | datasets.IterableDataset,
    model_args: ModelArguments,
    data_args: DataArguments,
    is_main_process: bool = True,
) -> dict[str, Any]:
    """The fields of a [`Recipe`] that model and data decide on. All processes call it together."""
    config: Any = model.config
    probabilities = {name: getattr(data_args, f"augment_{name}") for name in AUGMENTATIONS}
    is_stream = not isinstance(train_data, datasets.Dataset)
    return {
        "expressions_per_image": data_args.expressions_per_image,
        "image_size": config.vision_config.image_size,
        "max_words": config.text_config.max_position_embeddings,
        "patch_loss_weight": config.patch_loss_weight,
        "drop_path_rate": getattr(config.vision_config, "drop_path_rate", 0.0),
        "augmentation": ", ".join(f"{name} {value}" for name, value in probabilities.items() if value) or "none",
        "fusion_type": config.fusion_type,
        "word_vectors": _name_word_vectors(model_args),
        "start": shorten(model_args.model_name_or_path or model_args.vision_model_name_or_path),
        "dataset": shorten(data_args.dataset_name)
        + (f"@{data_args.data_revision}" if data_args.data_revision else ""),
        "split": data_args.train_split,
        "num_expressions": None if is_stream else int(count_expressions(train_data).sum()),
        "data_fingerprint": fingerprint_on_main_process(train_data, is_main_process),
    }


def _name_word_vectors(args: ModelArguments) -> str:
    if args.model_name_or_path is not None:
        return "those of the start"
    if args.word_vectors is None:
        return "random"
    name = Path(args.word_vectors).name
    glove = re.fullmatch(r"glove\..*?(\d+)d\b.*", name)
    return f"GloVe {glove[1]}-d" if glove else name


def shorten(name: str) -> str:
    """A Hub id, or the name of a folder without where it lies."""
    return Path(name).resolve().name if Path(name).exists() else name


def create_train_dataset(
    data: datasets.Dataset | datasets.IterableDataset,
    args: DataArguments,
    recipe: Recipe,
    *,
    batch_size: int,
    first_step: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
) -> ReferringDataset | ReferringStream:
    """
    The stream of items of a whole run.

    Args:
        batch_size: Images that a process reads at a time; it divides its share of a step.
        first_step: Where a stream begins. A dataset with random access begins with its first item, whatever it is.
    """
    augmentation = Augmentation(**{name: getattr(args, f"augment_{name}") for name in AUGMENTATIONS})
    options = (args.expressions_per_image, recipe.seed, augmentation)
    if isinstance(data, datasets.Dataset):
        return ReferringDataset(data, *options, num_items=recipe.max_steps * recipe.images_per_step)
    batches_per_step = recipe.images_per_step // (batch_size * num_processes)
    return ReferringStream(
        data,
        *options,
        batch_size=batch_size,
        num_batches=recipe.max_steps * batches_per_step,
        first_batch=first_step * batches_per_step,
        process_index=process_index,
        num_processes=num_processes,
        buffer_size=args.shuffle_buffer_size,
    )


def create_eval_dataset(data: datasets.Dataset) -> ReferringDataset:
    """All expressions in their order, with several per item."""
    return ReferringDataset(data, EXPRESSIONS_PER_IMAGE_IN_EVALUATION, shuffle=False)


def find_checkpoint(
    output_dir: str | Path,
    recipe: Recipe,
    resume_from: str | None = None,
    *,
    by_trainer: bool,
    is_main_process: bool = True,
) -> Path | None:
    """
    The checkpoint to resume from: `resume_from`, or else the last whole one.

    Args:
        by_trainer: Whether Trainer resumes from it: it has other files than the loop without.

    Raises:
        ValueError: it is of another recipe, of other data or of another script, or it is not whole.
    """
    checkpoint = find_last_checkpoint(output_dir, remove_leftovers=is_main_process)
    if resume_from is not None:
        check_whole(resume_from)
        checkpoint = Path(resume_from)
    if checkpoint is not None:
        if (checkpoint / "trainer_state.json").exists() != by_trainer:
            raise ValueError(
                f"Expected a checkpoint of {SCRIPTS[by_trainer]}, got {checkpoint}, which was written by"
                f" {SCRIPTS[not by_trainer]}. Resume with that script, or choose another output_dir."
            )
        recipe.check_same(checkpoint)
    return checkpoint


def choose_repo_id(args: RecipeArguments, push: bool) -> str | None:
    """The repository to push to at the end, if any."""
    return (args.hub_model_id or Path(args.output_dir).resolve().name) if push else None


def prepare_push(args: RecipeArguments, repo_id: str | None) -> None:
    """
    Make the repository before the training, so that it does not fail after it for want of a token or a valid name.

    Raises:
        ValueError: there is no connection, the login may not push to it, or its name is not valid.
    """
    if repo_id is not None:
        try:
            HfApi(token=args.hub_token).create_repo(repo_id, private=args.hub_private_repo, exist_ok=True)
        except Exception as error:
            raise ValueError(
                f"Cannot push to {repo_id} at the end: {error}. Log in (`hf auth login`), choose another --hub_model_id, or"
                " train without --push_to_hub and run `restr push OUTPUT_DIR/model` afterwards."
            ) from error


def gather_model(accelerator: Accelerator, model: Any) -> ReSTRForImageSegmentation | None:
    """The trained model as one, on the main process; None on others where FSDP has spread it over all of them."""
    unwrapped = accelerator.unwrap_model(model)
    if accelerator.distributed_type != DistributedType.FSDP:
        return unwrapped
    state_dict = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return None
    whole = ReSTRForImageSegmentation(unwrapped.config)
    whole.load_state_dict(state_dict)
    return whole


def finish_run(
    accelerator: Accelerator,
    model: Any,
    processor: ReSTRProcessor,
    output_dir: str | Path,
    recipe: Recipe,
    args: DataArguments,
    validation_data: datasets.Dataset | None = None,
    repo_id: str | None = None,
    **push_options: Any,
) -> None:
    """
    Save the model in OUTPUT_DIR/model, evaluate what was saved (evaluation.json), write its card, push it.

    Args:
        model: As the accelerator prepared it; all processes call this.
        validation_data: Of the split `args.validation_split`.
        repo_id: Where to push the folder, if at all, with the options of [`~modeling_restr.hub.push_to_hub`].
    """
    folder, path = Path(output_dir) / "model", Path(output_dir) / "evaluation.json"
    whole = gather_model(accelerator, model)
    if whole is not None and accelerator.is_main_process:
        save_bundle(whole, processor, folder)
    accelerator.wait_for_everyone()
    evaluations = []
    if validation_data is not None:
        evaluation = evaluate_folder(
            folder, validation_data, accelerator.device, accelerator.process_index, accelerator.num_processes
        )
        evaluation["data"]["name"] = recipe.dataset
        evaluation["split"] = name_rows(args.validation_split, args.max_eval_samples, len(validation_data))
        if accelerator.is_main_process:
            path.write_text(json.dumps(evaluation, indent=1) + "\n", encoding="utf-8")
            evaluations.append(path)
            print(f"{evaluation['split']}: {evaluation['metrics']}")
    if accelerator.is_main_process:
        recipe.save(output_dir)
        write_card(folder, recipe, args, evaluations)
        print(f"Wrote {folder}")
        if repo_id is not None:
            print(f"Pushed: {push_to_hub(folder, repo_id, **push_options).commit_url}")
    accelerator.wait_for_everyone()


def evaluate_folder(
    folder: str | Path,
    data: datasets.Dataset,
    device: torch.device | str = "cpu",
    process_index: int = 0,
    num_processes: int = 1,
) -> dict[str, Any]:
    """
    Evaluate a saved model at the images' own size. Each process takes its share of the images; all get the same
    results, which do not depend on the number of processes.

    Returns:
        Metrics, conditions and every expression's pixel counts, as examples/evaluate_refcoco.py writes them.
    """
    model = ReSTRForImageSegmentation.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    processor = ReSTRProcessor.from_pretrained(folder)
    rows = data.select(range(process_index, len(data), num_processes))
    progress = tqdm(rows, desc="Evaluation", unit="image", disable=process_index > 0)
    records = _gather([record for records in evaluate_dataset(model, processor, progress) for record in records])
    records.sort(key=lambda record: (record["image_id"], record["ref_id"], record["sent_id"]))
    counts = [{name: record[name] for name in ("intersection", "union")} for record in records]
    size = processor.image_processor.size
    return {
        "model": {"name": Path(folder).name, "revision": hash_weights(Path(folder))},
        "data": {"fingerprint": fingerprint(fingerprint_rows(data)), "benchmark": None, "differences": []},
        "threshold": 0.5,
        "dtype": "float32",
        "image_size": [size["height"], size["width"]],
        "metrics": ReferringIoU(keep_in_memory=True).compute(predictions=counts),
        "expressions": records,
    }


def _gather(records: list[Any]) -> list[Any]:
    """The records of all processes, in every process."""
    if not torch.distributed.is_initialized():
        return records
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, records)
    return [record for part in gathered for record in part]


def write_card(folder: Path, recipe: Recipe, args: DataArguments, evaluations: Sequence[Path] = ()) -> None:
    """The card of a run: its recipe with what is not the paper's, its data, and its evaluations."""
    size = "a stream" if recipe.num_expressions is None else f"{recipe.num_expressions:,} expressions"
    write_model_card(
        folder,
        training=recipe.describe(),
        evaluations=evaluations,
        data=f"The split `{recipe.split}` of `{recipe.dataset}`, {size}. Its terms are those of its own card.",
        datasets=[] if Path(args.dataset_name).exists() else [args.dataset_name],
        base_model=recipe.base_model,
    )
