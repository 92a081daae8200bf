"""The parts that the training scripts share: the start of a run, its data, and its end."""

import logging
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from huggingface_hub import HfApi
from tqdm import tqdm
from transformers import HfArgumentParser, set_seed

from ..configuration_restr import ReSTRConfig, ReSTRTextConfig
from ..data.canonical import FEATURES
from ..data.loading import load_prepared, name_rows
from ..data.word_vectors import load_word_vectors, set_word_vectors
from ..evaluation.counts import check_dataset, evaluate_dataset, fingerprint, fingerprint_rows
from ..evaluation.run import summarize
from ..files import write_json
from ..hub import push_to_hub, save_bundle, write_model_card
from ..hub.bundle import hash_weights
from ..image_processing_restr import ReSTRImageProcessor
from ..modeling_restr import ReSTRForImageSegmentation
from ..processing_restr import ReSTRProcessor
from ..tokenization_restr import build_tokenizer, read_vocabulary, split_expression, vocabulary_from_expressions
from ..vision_encoder_restr import load_vision_config
from .arguments import DataArguments, ModelArguments, RecipeArguments
from .augmentation import Augmentation
from .batches import ReferringDataset, ReferringStream, count_expressions
from .checkpoints import EXIT_CODE_TERMINATED, LossNotFiniteError, find_checkpoint, get_step
from .fingerprints import fingerprint_data
from .recipe import Recipe


logger = logging.getLogger(__name__)

EXPRESSIONS_PER_IMAGE_IN_EVALUATION = 8
AUGMENTATIONS = ("scale", "crop", "color", "mirror")
# Indexed by whether a script writes checkpoints with Trainer's state.
SCRIPTS = ("run_referring_segmentation_no_trainer.py", "run_referring_segmentation.py")

Data: TypeAlias = datasets.Dataset | datasets.IterableDataset


def run_script(train: Callable[..., bool], classes: Sequence[type], arguments: Sequence[str] | None = None) -> None:
    """
    Parse a script's options and train. Expected errors end it with one line.

    Args:
        train: Called with one instance of each class. Returns False if SIGTERM stopped the run.
    """
    parser = HfArgumentParser(classes)  # type: ignore[arg-type]
    try:
        is_finished = train(*parser.parse_args_into_dataclasses(arguments))
    except (LossNotFiniteError, ValueError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    if not is_finished:
        print("Stopped by SIGTERM after writing a checkpoint. The same command resumes from it.", file=sys.stderr)
        sys.exit(EXIT_CODE_TERMINATED)


@dataclass
class Run:
    """A run before its first step."""

    args: RecipeArguments
    data_args: DataArguments
    recipe: Recipe
    model: ReSTRForImageSegmentation
    processor: ReSTRProcessor
    train_data: Data
    validation_data: datasets.Dataset | None
    checkpoint: Path | None  # to resume from
    repo_id: str | None  # to push the model to

    @property
    def first_step(self) -> int:
        """Number of steps that are done already."""
        return 0 if self.checkpoint is None else get_step(self.checkpoint)

    @property
    def overlay_rows(self) -> list[dict[str, Any]]:
        """The validation images to draw after each evaluation."""
        data = self.validation_data
        return [] if data is None else list(data.take(min(self.data_args.num_overlays, len(data))))


def start_run(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: RecipeArguments,
    *,
    images_per_step: int,
    by_trainer: bool,
    **recipe_fields: Any,
) -> Run:
    """
    Load data and model, and find the checkpoint to resume from. All processes call this.

    Args:
        images_per_step: Number of images per optimizer step, over all processes and accumulated batches.
        by_trainer: Whether Trainer runs the steps. The loop without it writes other files to checkpoints.
        recipe_fields: Fields of [`Recipe`] that follow neither from the options nor from data and model.

    Raises:
        ValueError: Data, model or checkpoint cannot be used, or the repository to push to cannot be created.
    """
    is_main_process = PartialState().is_main_process
    set_seed(args.seed)
    train_data, validation_data = load_data(data_args)
    model, processor = load_model(model_args, train_data)
    if args.num_train_epochs > 0:
        args.max_steps = _count_steps(train_data, data_args, args.num_train_epochs, images_per_step)
    described = _describe_start(model, train_data, model_args, data_args)
    if isinstance(train_data, datasets.IterableDataset):
        described["stream"] = _describe_stream(data_args, args)
    recipe = args.make_recipe(images_per_step=images_per_step, **recipe_fields, **described)
    if is_main_process:
        print(
            f"{model.num_parameters() / 1e6:.1f} M parameters; differences from the paper: {recipe.deviations() or 'none'}"
        )
    repo_id = (args.hub_model_id or Path(args.output_dir).resolve().name) if args.push_to_hub else None
    if repo_id is not None and is_main_process:
        _create_repository(args, repo_id)
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if checkpoint is not None:
        _check_origin(checkpoint, by_trainer)
        recipe.check_same(checkpoint)
    return Run(args, data_args, recipe, model, processor, train_data, validation_data, checkpoint, repo_id)


def load_data(args: DataArguments) -> tuple[Data, datasets.Dataset | None]:
    """
    Load the training data, and the validation data if there is a split for it.

    Raises:
        ValueError: Data is not in the canonical form, or has expressions without words.
    """
    options: dict[str, Any] = {"revision": args.data_revision, "streaming": args.streaming}
    validation_data = None
    with PartialState().main_process_first():  # it fills the cache of `datasets`
        train_data = load_prepared(args.dataset_name, args.train_split, max_images=args.max_train_samples, **options)
        if not args.streaming:
            check_dataset(train_data)
        if args.validation_split:
            data = load_prepared(args.dataset_name, args.validation_split, max_images=args.max_eval_samples, **options)
            validation_data = _hold_in_memory(data) if args.streaming else data
            check_dataset(validation_data)
    return train_data, validation_data


def _hold_in_memory(stream: datasets.IterableDataset) -> datasets.Dataset:
    """Read all rows of a stream into memory. Images stay encoded."""
    return datasets.Dataset.from_list(list(stream.cast_column("image", datasets.Image(decode=False))), FEATURES)


def iterate_sentences(data: Data) -> Iterator[str]:
    for row in data.select_columns("references"):
        for reference in row["references"]:
            for expression in reference["expressions"]:
                yield expression["text"]


def load_model(args: ModelArguments, train_data: Data) -> tuple[ReSTRForImageSegmentation, ReSTRProcessor]:
    """Load or create the model to start from, in float32, and its processor."""
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


def create_model(args: ModelArguments, sentences: Iterable[str]) -> tuple[ReSTRForImageSegmentation, ReSTRProcessor]:
    """Create a model with a pretrained ViT and, if a file is given, pretrained word vectors. The rest is random."""
    path = args.vocabulary_file
    vocabulary = vocabulary_from_expressions(sentences) if path is None else read_vocabulary(path)
    vectors = None if args.word_vectors is None else load_word_vectors(args.word_vectors, vocabulary)
    dim = 300 if vectors is None else vectors.matrix.shape[1]
    vision_config = load_vision_config(args.vision_model_name_or_path)
    text_config = ReSTRTextConfig(
        vocab_size=max(vocabulary.values()) + 1,
        hidden_size=dim,
        num_attention_heads=max(heads for heads in range(1, 13) if dim % heads == 0),  # the paper's 12 for 300
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


def _report_unknown_words(vocabulary: Mapping[str, int], sentences: Iterable[str]) -> None:
    counts = Counter(word for sentence in sentences for word in split_expression(sentence))
    unknown = Counter({word: count for word, count in counts.items() if word not in vocabulary})
    if unknown:
        share, frequent = unknown.total() / counts.total(), ", ".join(word for word, _ in unknown.most_common(10))
        logger.warning(
            f"The model does not know {share:.1%} of the words, and reads all of them as <unk>: {frequent}, ... Add them"
            " (docs/new_words.md) or train a new model if they matter."
        )


def _count_steps(train_data: Data, args: DataArguments, epochs: float, images_per_step: int) -> int:
    """Number of steps in `epochs` epochs. An epoch has every expression once."""
    if not isinstance(train_data, datasets.Dataset):
        raise ValueError("Expected max_steps with streaming, got num_train_epochs: the length of a stream is unknown.")
    items = ReferringDataset(train_data, args.expressions_per_image).items_per_epoch
    return math.ceil(epochs * items / images_per_step)


def _describe_start(
    model: ReSTRForImageSegmentation, train_data: Data, model_args: ModelArguments, data_args: DataArguments
) -> dict[str, Any]:
    """The fields of a [`Recipe`] that follow from model and data."""
    config: Any = model.config
    probabilities = {name: getattr(data_args, f"augment_{name}") for name in AUGMENTATIONS}
    is_stream = not isinstance(train_data, datasets.Dataset)
    fingerprints = [fingerprint_data(train_data) if PartialState().is_main_process else None]
    revision = f"@{data_args.data_revision}" if data_args.data_revision else ""
    return {
        "expressions_per_image": data_args.expressions_per_image,
        "image_size": config.vision_config.image_size,
        "max_words": config.text_config.max_position_embeddings,
        "patch_loss_weight": config.patch_loss_weight,
        "drop_path_rate": getattr(config.vision_config, "drop_path_rate", 0.0),
        "augmentation": ", ".join(f"{name} {value}" for name, value in probabilities.items() if value) or "none",
        "fusion_type": config.fusion_type,
        "word_vectors": _name_word_vectors(model_args),
        "start": _shorten(model_args.model_name_or_path or model_args.vision_model_name_or_path),
        "dataset": _shorten(data_args.dataset_name) + revision,
        "split": data_args.train_split,
        "num_expressions": None if is_stream else int(count_expressions(train_data).sum()),
        "data_fingerprint": broadcast_object_list(fingerprints)[0],
    }


def _describe_stream(data_args: DataArguments, args: RecipeArguments) -> str:
    """What determines the batches of a stream, next to its seed; see [`ReferringStream`]."""
    return (
        f"processes: {PartialState().num_processes}, workers: {max(args.dataloader_num_workers, 1)},"
        f" images per batch: {args.per_device_train_batch_size}, buffer: {data_args.shuffle_buffer_size}"
    )


def _name_word_vectors(args: ModelArguments) -> str:
    if args.model_name_or_path is not None:
        return "those of the start"
    if args.word_vectors is None:
        return "random"
    name = Path(args.word_vectors).name
    glove = re.fullmatch(r"glove\..*?(\d+)d\b.*", name)
    return f"GloVe {glove[1]}-d" if glove else name


def _shorten(name: str) -> str:
    """A Hub id, or the name of a folder without its path."""
    return Path(name).resolve().name if Path(name).exists() else name


def _create_repository(args: RecipeArguments, repo_id: str) -> None:
    """Create the repository before training, so that a missing token or an invalid name is found early."""
    try:
        HfApi(token=args.hub_token).create_repo(repo_id, private=args.hub_private_repo, exist_ok=True)
    except Exception as error:
        raise ValueError(
            f"Cannot push to {repo_id} at the end: {error}. Log in (`hf auth login`), choose another --hub_model_id, or"
            " train without --push_to_hub and run `restr push OUTPUT_DIR/model` afterwards."
        ) from error


def _check_origin(checkpoint: Path, by_trainer: bool) -> None:
    if (checkpoint / "trainer_state.json").exists() != by_trainer:
        raise ValueError(
            f"Expected a checkpoint of {SCRIPTS[by_trainer]}, got {checkpoint}, which was written by"
            f" {SCRIPTS[not by_trainer]}. Resume with that script, or choose another output_dir."
        )


def create_train_dataset(run: Run, batch_size: int) -> ReferringDataset | ReferringStream:
    """
    Create the items of a whole run. A stream starts at the run's first step; a dataset with random access has all items.

    Args:
        batch_size: Number of images that a process reads at a time.
    """
    args, recipe, state = run.data_args, run.recipe, PartialState()
    augmentation = Augmentation(**{name: getattr(args, f"augment_{name}") for name in AUGMENTATIONS})
    options = (args.expressions_per_image, recipe.seed, augmentation)
    if isinstance(run.train_data, datasets.Dataset):
        return ReferringDataset(run.train_data, *options, num_items=recipe.max_steps * recipe.images_per_step)
    batches_per_step = recipe.images_per_step // (batch_size * state.num_processes)
    return ReferringStream(
        run.train_data,
        *options,
        batch_size=batch_size,
        num_batches=recipe.max_steps * batches_per_step,
        first_batch=run.first_step * batches_per_step,
        process_index=state.process_index,
        num_processes=state.num_processes,
        buffer_size=args.shuffle_buffer_size,
    )


def create_eval_dataset(data: datasets.Dataset) -> ReferringDataset:
    """Create a dataset of all expressions in their order, with several per item."""
    return ReferringDataset(data, EXPRESSIONS_PER_IMAGE_IN_EVALUATION, shuffle=False)


def finish_run(accelerator: Accelerator, model: Any, run: Run) -> None:
    """
    Save the model in OUTPUT_DIR/model, evaluate the saved model (evaluation.json), write its card and push it. All
    processes call this.

    Args:
        model: The trained model as the accelerator prepared it.
    """
    output_dir, args = Path(run.args.output_dir), run.data_args
    folder, path = output_dir / "model", output_dir / "evaluation.json"
    unwrapped = _gather_model(accelerator, model)
    if unwrapped is not None and accelerator.is_main_process:
        save_bundle(unwrapped, run.processor, folder)
    accelerator.wait_for_everyone()
    evaluations = []
    if run.validation_data is not None:
        evaluation = evaluate_folder(folder, run.validation_data, accelerator.device)
        evaluation["data"]["name"] = run.recipe.dataset
        evaluation["split"] = name_rows(args.validation_split, args.max_eval_samples, len(run.validation_data))
        if accelerator.is_main_process:
            write_json(path, evaluation, indent=1)
            evaluations.append(path)
            print(f"{evaluation['split']}: {evaluation['metrics']}")
    if accelerator.is_main_process:
        run.recipe.save(output_dir)
        _write_card(folder, run.recipe, args, evaluations)
        print(f"Wrote {folder}")
        if run.repo_id is not None:
            commit = push_to_hub(folder, run.repo_id, private=run.args.hub_private_repo, token=run.args.hub_token)
            print(f"Pushed: {commit.commit_url}")
    accelerator.wait_for_everyone()


def _gather_model(accelerator: Accelerator, model: Any) -> ReSTRForImageSegmentation | None:
    """The unwrapped model. With FSDP, which shards it, only the main process gets it; others get None."""
    unwrapped = accelerator.unwrap_model(model)
    if accelerator.distributed_type != DistributedType.FSDP:
        return unwrapped
    state_dict = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return None
    gathered = ReSTRForImageSegmentation(unwrapped.config)
    gathered.load_state_dict(state_dict)
    return gathered


def evaluate_folder(folder: str | Path, data: datasets.Dataset, device: torch.device | str = "cpu") -> dict[str, Any]:
    """
    Evaluate a saved model at the images' own size. Each process evaluates its share of the images, and all return the
    same results, which do not depend on the number of processes.

    Returns:
        Metrics, settings and every expression's pixel counts, in the format of `restr evaluate`.
    """
    model = ReSTRForImageSegmentation.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    processor = ReSTRProcessor.from_pretrained(folder)
    state = PartialState()
    rows = data.select(range(state.process_index, len(data), state.num_processes))
    progress = tqdm(rows, desc="Evaluation", unit="image", disable=not state.is_main_process)
    records = gather_object([record for records in evaluate_dataset(model, processor, progress) for record in records])
    records.sort(key=lambda record: (record["image_id"], record["ref_id"], record["sent_id"]))
    size = processor.image_processor.size
    return {
        "model": {"name": Path(folder).name, "revision": hash_weights(Path(folder))},
        "data": {"fingerprint": fingerprint(fingerprint_rows(data)), "benchmark": None, "differences": []},
        "threshold": 0.5,
        "dtype": "float32",
        "image_size": [size["height"], size["width"]],
        **summarize(records, by_length=False, num_bootstrap=None),
    }


def _write_card(folder: Path, recipe: Recipe, args: DataArguments, evaluations: Sequence[Path]) -> None:
    size = "a stream" if recipe.num_expressions is None else f"{recipe.num_expressions:,} expressions"
    write_model_card(
        folder,
        training=recipe.describe(),
        evaluations=evaluations,
        data=f"The split `{recipe.split}` of `{recipe.dataset}`, {size}. Its own card states the terms.",
        datasets=[] if Path(args.dataset_name).exists() else [args.dataset_name],
        base_model=recipe.base_model,
    )
