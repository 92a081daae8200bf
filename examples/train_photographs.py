"""
Train a small ReSTR from random weights on photographs with instance masks, with Trainer: first the vision encoder
alone, to see what a network that knows ImageNet sees and to name what each patch shows, then the whole model on
sentences that are made anew for every scene. The configurations hold all settings; on two cores:

    python examples/teacher_features.py --instances_file instances.json --image_dir images --output teacher.npz
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/train_photographs.py \\
        --config examples/restr_mini_configs/cpu_2_cores.args --instances_file instances.json --image_dir images \\
        --teacher_file teacher.npz --word_vectors glove.6B.50d.txt --output_dir runs/restr-mini

and on a GPU the same with gpu.args, without torchrun. Interrupted, the same command goes on from the last checkpoint.
Every tenth image, by its id, is held out and never seen; examples/evaluate_photographs.py evaluates on these. Needs
torch 2.9 or later.
"""

import itertools
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from teacher_features import TeacherFeatures
from torch import nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, HfArgumentParser, Trainer, set_seed

from modeling_restr import (
    ReSTRConfig,
    ReSTRForImageSegmentation,
    ReSTRImageProcessor,
    ReSTRProcessor,
    ReSTRTextConfig,
    ReSTRVisionConfig,
    ReSTRVisionModel,
    build_tokenizer,
)
from modeling_restr.data.photo_expressions import KIND_WEIGHTS, Expression, NoiseWords, express
from modeling_restr.data.photo_scenes import Photographs, PhotoScene, PhotoScenes, find_box, letterbox
from modeling_restr.data.word_vectors import WordVectors, load_word_vectors, set_word_vectors
from modeling_restr.hub import save_bundle
from modeling_restr.tokenization_restr import vocabulary_from_expressions
from modeling_restr.training.from_scratch import (
    ScratchTrainingArguments,
    find_checkpoint,
    initialize_weights,
    whiten_patches,
)


KINDS = list(KIND_WEIGHTS)
EVALUATION_SEED = 7
PRETRAINING_SEED = 2_000_003
WHITENING_SEED = 3_000_017


@dataclass
class PhotoArguments:
    """The photographs and the model's size; the defaults are those of the configuration for two cores."""

    instances_file: str = field(metadata={"help": "COCO instances file of the photographs."})
    image_dir: str = field(metadata={"help": "Folder of its images."})
    teacher_file: str = field(metadata={"help": "What examples/teacher_features.py wrote."})
    word_vectors: str = field(metadata={"help": "Word vectors in GloVe's text format; all words are learned from it."})
    image_size: int = field(default=192, metadata={"help": "Side of the input in pixels."})
    patch_size: int = field(default=16, metadata={"help": "Side of a patch in pixels."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the vision and fusion encoders."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Blocks of the vision encoder."})
    num_attention_heads: int = field(default=8, metadata={"help": "Heads of the vision encoder."})
    drop_path_rate: float = field(default=0.05, metadata={"help": "Of the vision encoder's last block."})
    num_fusion_layers: int = field(default=2, metadata={"help": "Blocks of each fusion encoder."})
    num_fusion_attention_heads: int = field(default=4, metadata={"help": "Heads of the fusion encoders."})
    text_num_hidden_layers: int = field(default=3, metadata={"help": "Blocks of the language encoder."})
    text_num_attention_heads: int = field(default=5, metadata={"help": "Its heads."})
    patch_loss_weight: float = field(default=0.3, metadata={"help": "Weight of the patch loss (the paper's: 0.1)."})
    dice_loss_weight: float = field(default=0.5, metadata={"help": "Weight of the soft Dice loss (the paper's: 0)."})
    lessons_weight: float = field(default=0.15, metadata={"help": "Of the vision encoder's lessons, beside masks."})
    expressions_per_scene: int = field(default=4, metadata={"help": "Sentences of a scene, which share its encoding."})
    noise: float = field(default=0.15, metadata={"help": "How often a sentence gets words that say nothing."})
    evaluation_expressions: int = field(default=6, metadata={"help": "Sentences of a held-out photograph."})
    paste: float = field(default=0.5, metadata={"help": "How often instances of other photographs are pasted in."})
    pretraining_steps: int = field(default=1650, metadata={"help": "Steps of the vision encoder alone, at first."})
    pretraining_batch_size: int = field(default=12, metadata={"help": "Scenes a step of these, on each device."})


# --- What the vision encoder is taught --------------------------------------------------------------------------------


class PatchDataset(Dataset):
    """
    Scenes as the vision encoder is taught them: the image (size, size, 3) uint8, and for each patch what the teacher
    sees there (NaN outside of the photograph), which categories it shows, and where the instance that it is part of
    lies.
    """

    def __init__(self, scenes: PhotoScenes, teacher: TeacherFeatures | None, categories: list[str], patch_size: int):
        self.scenes, self.teacher, self.patch_size = scenes, teacher, patch_size
        self.numbers = {name: number for number, name in enumerate(categories)}
        self.grid = scenes.image_size // patch_size
        centers = (np.arange(self.grid) + 0.5) / self.grid
        self.centers = np.stack([np.tile(centers, self.grid), np.repeat(centers, self.grid)], axis=1)  # (patches, 2)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.label(self.scenes[index])

    def label(self, scene: PhotoScene) -> dict[str, np.ndarray]:
        masks = letterbox(scene.masks, self.scenes.image_size)
        shape = (len(masks), self.grid, self.patch_size, self.grid, self.patch_size)
        coverage = masks.reshape(shape).mean((2, 4)).reshape(len(masks), self.grid**2)  # (instances, patches)
        patch_labels, known = self._name_patches(scene, coverage)
        places, is_placed = self._place_patches(scene, masks, coverage)
        row = {"image": letterbox(scene.image, self.scenes.image_size), "patch_labels": patch_labels, "known": known}
        row |= {"places": places, "is_placed": is_placed}
        return row if self.teacher is None else row | {"teacher": self._ask_teacher(scene)}

    def _name_patches(self, scene: PhotoScene, coverage: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(patches, categories) whether a category covers 0.3 of a patch, (categories,) whether that is known."""
        labels = np.zeros((self.grid**2, len(self.numbers)), np.uint8)
        known = np.zeros(len(self.numbers), np.uint8)
        for name, share in zip(scene.categories, coverage):
            if name in self.numbers:
                labels[share >= 0.3, self.numbers[name]] = 1
        for name in (scene.known | set(scene.categories)) - scene.unclear_categories:
            if name in self.numbers:
                known[self.numbers[name]] = 1
        return labels, known

    def _place_patches(
        self, scene: PhotoScene, masks: np.ndarray, coverage: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(patches, 4) the way to the centre and the size of the instance that covers most of a patch; (patches,)."""
        places = np.zeros((self.grid**2, 4), np.float32)
        if not len(masks):
            return places, np.zeros(self.grid**2, np.uint8)
        coverage = coverage * np.array([not scene.is_worn(name) for name in scene.categories])[:, None]
        instance = coverage.argmax(0)
        boxes = np.array([find_box(mask) for mask in masks], np.float32)[instance] / self.scenes.image_size
        places[:, :2] = 4 * ((boxes[:, :2] + boxes[:, 2:]) / 2 - self.centers)
        places[:, 2:] = np.log(boxes[:, 2:] - boxes[:, :2]) + 1
        return places, (coverage.max(0) >= 0.4).astype(np.uint8)

    def _ask_teacher(self, scene: PhotoScene) -> np.ndarray:
        assert self.teacher is not None
        photographs, (height, width) = self.scenes.photographs, scene.image.shape[:2]
        offset = [(self.scenes.image_size - side) // 2 for side in (width, height)]  # the letterbox
        columns, rows = (self.centers * self.scenes.image_size - offset).T
        is_inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
        seen = np.full((self.grid**2, self.teacher.num_channels), np.nan, np.float32)
        for window, where in scene.windows:
            shown = is_inside.copy()
            if where is not None:
                shown[is_inside] = where[rows[is_inside].astype(int), columns[is_inside].astype(int)]
            x, y = window.left + columns[shown] * window.step_x, window.top + rows[shown] * window.step_y
            photograph = photographs[window.photo]
            seen[shown] = self.teacher.look(photograph.image_id, photograph.image.shape[:2], x, y)
        return seen


def collate_patches(rows: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    batch["pixel_values"] = batch.pop("image").permute(0, 3, 1, 2).float() / 127.5 - 1  # the processor's mean and std
    return batch


class VisionLessons(nn.Module):
    """What the vision encoder is taught, by one linear map of its patches; the model goes without it later."""

    def __init__(self, hidden_size: int, num_channels: int, num_categories: int):
        super().__init__()
        self.sizes = [num_channels, num_categories, 4]
        self.head = nn.Linear(hidden_size, sum(self.sizes))
        nn.init.constant_(self.head.bias[num_channels : num_channels + num_categories], -5.0)  # most are not there

    def forward(
        self,
        patches: torch.Tensor,
        patch_labels: torch.Tensor,
        known: torch.Tensor,
        places: torch.Tensor,
        is_placed: torch.Tensor,
        teacher: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(3,) the losses of naming, placing and of seeing what the teacher sees."""
        seen, named, placed = self.head(patches).float().split(self.sizes, dim=2)
        losses = F.binary_cross_entropy_with_logits(named, patch_labels.float(), reduction="none")
        naming = (losses * known[:, None]).sum(2).mean()
        gaps = F.smooth_l1_loss(placed, places, reduction="none", beta=0.2).mean(2)
        placing = (gaps * is_placed).sum() / is_placed.sum().clamp(min=1)
        if teacher is None:
            return torch.stack([naming, placing, seen.sum() * 0])
        is_taught = ~teacher[..., 0].isnan()
        gaps = (seen - teacher.nan_to_num()).square().mean(2)
        return torch.stack([naming, placing, (gaps * is_taught).sum() / is_taught.sum().clamp(min=1)])


LESSON_WEIGHTS = torch.tensor([1.0, 0.5, 2.0])


class VisionPretraining(nn.Module):
    """The vision encoder and its lessons, as Trainer takes them."""

    def __init__(self, vision_model: ReSTRVisionModel, lessons: VisionLessons):
        super().__init__()
        self.vision_model, self.lessons = vision_model, lessons

    def forward(
        self,
        pixel_values: torch.Tensor,
        patch_labels: torch.Tensor,
        known: torch.Tensor,
        places: torch.Tensor,
        is_placed: torch.Tensor,
        teacher: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        patches = self.vision_model(pixel_values).last_hidden_state[:, 1:]
        losses = self.lessons(patches, patch_labels, known, places, is_placed, teacher)
        return {"loss": losses @ LESSON_WEIGHTS.to(losses)}


# --- The whole model --------------------------------------------------------------------------------------------------


class SentenceDataset(Dataset):
    """
    Scenes with up to `count` sentences about each. One about which nothing unambiguous can be said gives way to
    another. With `shuffle` the sentences are those of the next photograph; a share `noise` of them gets `noise_words`.
    """

    def __init__(
        self,
        patches: PatchDataset,
        count: int,
        shuffle: bool = False,
        noise_words: NoiseWords | None = None,
        noise: float = 0.0,
    ):
        self.patches, self.count, self.shuffle = patches, count, shuffle
        self.noise_words, self.noise = noise_words, noise

    def __len__(self) -> int:
        return len(self.patches)

    def draw(self, index: int) -> tuple[PhotoScene, list[Expression]]:
        scenes = self.patches.scenes
        for attempt in range(50):
            scene = scenes.draw(index, attempt)
            expressions = express(scene, np.random.default_rng((scenes.seed, index, attempt, 1)), self.count)
            if expressions:
                return scene, expressions
        raise ValueError("Nothing can be said about 50 scenes in a row: are the masks those of the images?")

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene, expressions = self.draw(index)
        texts = [expression.text for expression in expressions]
        if self.shuffle:
            others = [expression.text for expression in self.draw((index + 1) % len(self))[1]]
            texts = [others[number % len(others)] for number in range(len(texts))]
        if self.noise_words:
            rng = np.random.default_rng((self.patches.scenes.seed, index, 2))
            texts = [self.noise_words.insert(text, rng) if rng.random() < self.noise else text for text in texts]
        masks = letterbox(scene.masks[[e.target for e in expressions]], self.patches.scenes.image_size)
        kinds = [KINDS.index(expression.kind) for expression in expressions]
        return {"texts": texts, "masks": masks, "kinds": kinds, **self.patches.label(scene)}


class SentenceCollator:
    """Rows of [`SentenceDataset`] -> the model's inputs and the lessons'."""

    def __init__(self, processor: ReSTRProcessor):
        self.tokenizer: Any = processor.tokenizer

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts, masks, kinds = ([row.pop(name) for row in rows] for name in ("texts", "masks", "kinds"))
        options = {"return_tensors": "pt", "padding": "max_length", "truncation": True}
        batch = dict(self.tokenizer([text for group in texts for text in group], **options)) | collate_patches(rows)
        counts = torch.tensor([len(group) for group in texts])
        batch["image_indices"] = torch.arange(len(rows)).repeat_interleave(counts)
        batch["labels"] = torch.from_numpy(np.concatenate(masks)).float()
        batch["kinds"] = torch.tensor([kind for group in kinds for kind in group])
        return batch


class TaughtSegmentation(nn.Module):
    """The model, with the soft Dice loss of its masks and the vision encoder's lessons beside its own loss."""

    def __init__(self, model: ReSTRForImageSegmentation, lessons: VisionLessons, args: PhotoArguments):
        super().__init__()
        self.model, self.lessons, self.args = model, lessons, args

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_indices: torch.Tensor,
        labels: torch.Tensor,
        kinds: torch.Tensor,
        patch_labels: torch.Tensor,
        known: torch.Tensor,
        places: torch.Tensor,
        is_placed: torch.Tensor,
        teacher: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        vision_embeds = self.model.get_image_features(pixel_values).pooler_output
        outputs = self.model(
            vision_embeds=vision_embeds,
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_indices=image_indices,
            labels=labels,
        )
        logits = outputs.logits.float()[:, None]
        logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=True)[:, 0]
        loss = outputs.loss.float() + self.args.dice_loss_weight * soft_dice_loss(logits, labels)
        losses = self.lessons(vision_embeds.flatten(1, 2), patch_labels, known, places, is_placed, teacher)
        loss = loss + self.args.lessons_weight * losses @ LESSON_WEIGHTS.to(losses)
        return {"loss": loss, "counts": self._count(logits > 0, labels > 0, kinds, image_indices, len(pixel_values))}

    def _count(
        self,
        predicted: torch.Tensor,
        target: torch.Tensor,
        kinds: torch.Tensor,
        image_indices: torch.Tensor,
        num_images: int,
    ) -> torch.Tensor:
        """
        (images, sentences, 3): intersection, union and kind of each, zeros where an image has fewer than the others
        may have; one row an image, as Trainer counts.
        """
        rows = torch.stack([(predicted & target).sum((1, 2)), (predicted | target).sum((1, 2)), kinds], dim=1)
        number = max(self.args.evaluation_expressions, self.args.expressions_per_scene)
        counts = rows.new_zeros(num_images, number, 3)
        sizes = image_indices.bincount(minlength=num_images)
        first = (sizes.cumsum(0) - sizes)[image_indices]  # the number of each image's first sentence
        counts[image_indices, torch.arange(len(rows), device=rows.device) - first] = rows
        return counts


def soft_dice_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """One minus the Dice coefficient of (N, height, width) probabilities and masks, which small masks weigh as much."""
    probabilities = logits.sigmoid()
    overlap = (probabilities * labels).sum((1, 2))
    return (1 - (2 * overlap + 1) / (probabilities.sum((1, 2)) + labels.sum((1, 2)) + 1)).mean()


def summarize(prediction: EvalPrediction) -> dict[str, float]:
    """Mean IoU of all sentences and of each kind, overall IoU and precision@0.5, on letterboxed pixels."""
    counts = np.asarray(prediction.predictions).reshape(-1, 3)
    intersection, union, kind = counts[counts[:, 1] > 0].T
    iou = intersection / union
    metrics = {"mean_iou": iou.mean(), "overall_iou": intersection.sum() / union.sum()}
    metrics["precision@0.5"] = (iou >= 0.5).mean()
    metrics |= {f"mean_iou_{name}": iou[kind == n].mean() for n, name in enumerate(KINDS) if (kind == n).any()}
    return {name: round(float(value), 4) for name, value in metrics.items()}


# --- Running it -------------------------------------------------------------------------------------------------------


def read_words(args: PhotoArguments) -> list[str]:
    lines = Path(args.word_vectors).read_text(encoding="utf-8").splitlines()
    words = (line.split(" ", 1)[0] for line in lines)
    return [word for word in words if word.isalnum()]


def create_processor(args: PhotoArguments) -> tuple[ReSTRProcessor, WordVectors]:
    """The vocabulary is that of the word vectors, so that a word that no sentence had may still be understood."""
    vocabulary = vocabulary_from_expressions(read_words(args))
    image_processor = ReSTRImageProcessor(size={"height": args.image_size, "width": args.image_size})
    processor = ReSTRProcessor(image_processor, build_tokenizer(vocabulary, drop_unknown_punctuation=True))
    return processor, load_word_vectors(args.word_vectors, vocabulary)


def create_model(args: PhotoArguments, vectors: WordVectors) -> ReSTRForImageSegmentation:
    vision_config = ReSTRVisionConfig(
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        intermediate_size=4 * args.hidden_size,
        image_size=args.image_size,
        patch_size=args.patch_size,
        drop_path_rate=args.drop_path_rate,
    )
    vocab_size, dim = vectors.matrix.shape
    text_config = ReSTRTextConfig(
        vocab_size=vocab_size,
        hidden_size=dim,
        num_hidden_layers=args.text_num_hidden_layers,
        num_attention_heads=args.text_num_attention_heads,
        intermediate_size=4 * dim,
        projection_dim=args.hidden_size,
    )
    config = ReSTRConfig(
        vision_config=vision_config,
        text_config=text_config,
        num_fusion_layers=args.num_fusion_layers,
        num_attention_heads=args.num_fusion_attention_heads,
        patch_loss_weight=args.patch_loss_weight,
    )
    if not torch.accelerator.is_available():
        config._attn_implementation = "eager"  # for short sequences faster in training on a CPU than sdpa
    model = ReSTRForImageSegmentation(config)
    initialize_weights(model)
    set_word_vectors(model, vectors)
    model.get_input_embeddings().weight.requires_grad_(False)  # words that it never meets stay near those it does
    return model


def pretrain_vision(
    model: ReSTRForImageSegmentation,
    lessons: VisionLessons,
    args: PhotoArguments,
    training_args: ScratchTrainingArguments,
    patches: PatchDataset,
) -> None:
    """Teach the vision encoder before any sentence: what is slow to learn, at a third of the whole model's cost."""
    steps = args.pretraining_steps
    pretraining_args = replace(
        training_args,
        output_dir=str(Path(training_args.output_dir) / "vision"),
        max_steps=steps,
        decay_steps=round(0.4 * steps),
        per_device_train_batch_size=args.pretraining_batch_size,
        adamw_learning_rate=1e-3,
        eval_strategy="no",
        load_best_model_at_end=False,
    )
    scenes = patches.scenes
    num_scenes = steps * pretraining_args.train_batch_size * pretraining_args.world_size
    drawn = PhotoScenes(scenes.photographs, num_scenes, args.image_size, PRETRAINING_SEED, paste=args.paste)
    sample = PhotoScenes(scenes.photographs, 500, args.image_size, WHITENING_SEED, paste=0.0)
    images = [letterbox(sample[index].image, args.image_size) for index in range(len(sample))]
    whiten_patches(model.model.vision_model, collate_patches([{"image": image} for image in images])["pixel_values"])
    trainer = Trainer(
        model=VisionPretraining(model.model.vision_model, lessons),
        args=pretraining_args,
        data_collator=collate_patches,
        train_dataset=PatchDataset(drawn, patches.teacher, list(patches.numbers), args.patch_size),
        optimizer_cls_and_kwargs=pretraining_args.optimizer_and_options,
    )
    trainer.train(resume_from_checkpoint=find_checkpoint(pretraining_args))


def create_datasets(args: PhotoArguments, training_args: ScratchTrainingArguments) -> dict[str, SentenceDataset]:
    """Scenes without end of the training's photographs, and the held-out ones as they are."""
    train, held_out = (Photographs.load(args.instances_file, args.image_dir, held_out=held) for held in (False, True))
    categories = sorted({name for photograph in train for name in photograph.categories})
    steps = training_args.max_steps * training_args.gradient_accumulation_steps
    num_scenes = steps * training_args.train_batch_size * training_args.world_size
    scenes = PhotoScenes(train, num_scenes, args.image_size, training_args.seed, paste=args.paste)
    unseen = PhotoScenes(held_out, len(held_out), args.image_size, EVALUATION_SEED, augment=False)
    patches = PatchDataset(scenes, TeacherFeatures(args.teacher_file), categories, args.patch_size)
    unseen_patches = PatchDataset(unseen, None, categories, args.patch_size)
    return {
        "train": SentenceDataset(
            patches, args.expressions_per_scene, noise_words=NoiseWords(read_words(args), categories), noise=args.noise
        ),
        "unseen": SentenceDataset(unseen_patches, args.evaluation_expressions),
        "shuffled": SentenceDataset(unseen_patches, args.evaluation_expressions, shuffle=True),
    }


def parse_args(arguments: list[str]) -> tuple[PhotoArguments, ScratchTrainingArguments]:
    """Options on the command line go before those of a `--config` file, of which a missing one is not passed over."""
    parser = HfArgumentParser([PhotoArguments, ScratchTrainingArguments])  # type: ignore[list-item]
    for flag, value in itertools.pairwise(arguments):
        if flag == "--config" and not Path(value).is_file():
            raise SystemExit(f"Expected a file of options after --config, got {value}.")
    return parser.parse_args_into_dataclasses(arguments, args_file_flag="--config")  # type: ignore[return-value]


def main(arguments: list[str] | None = None) -> None:
    args, training_args = parse_args(sys.argv[1:] if arguments is None else arguments)
    set_seed(training_args.seed)
    processor, vectors = create_processor(args)
    model = create_model(args, vectors)
    print(f"{model.num_parameters() / 1e6:.1f} M parameters, {len(vectors.matrix):,} words")
    data = create_datasets(args, training_args)
    patches = data["train"].patches
    assert patches.teacher is not None
    lessons = VisionLessons(args.hidden_size, patches.teacher.num_channels, len(patches.numbers))
    if args.pretraining_steps and find_checkpoint(training_args) is None:
        pretrain_vision(model, lessons, args, training_args, patches)
    training_args.label_names = ["known"]  # Trainer gathers labels: these are as many on every process, masks are not
    trainer = Trainer(
        model=TaughtSegmentation(model, lessons, args),
        args=training_args,
        data_collator=SentenceCollator(processor),
        train_dataset=data.pop("train"),
        eval_dataset=data,
        compute_metrics=summarize,
        optimizer_cls_and_kwargs=training_args.optimizer_and_options,
    )
    trainer.train(resume_from_checkpoint=find_checkpoint(training_args))
    trainer.save_state()
    if trainer.is_world_process_zero():
        folder = Path(training_args.output_dir) / "model"
        save_bundle(model, processor, folder, dtype=torch.float16)
        print(f"Wrote {folder}")


if __name__ == "__main__":
    main()
