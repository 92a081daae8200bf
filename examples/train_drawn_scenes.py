"""
Train a small ReSTR from scratch on drawn scenes, with Trainer: first the vision encoder alone, to name what each patch
shows, then the whole model. The defaults made the checkpoint in `examples/checkpoint`, on two cores:

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/train_drawn_scenes.py --output_dir runs/drawn \\
        --backgrounds path/to/photographs

Interrupted, the same command goes on from the last checkpoint. `--help` lists the choices; every option of
transformers' TrainingArguments works, too. Needs torch 2.9 or later, for its Muon.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
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
from modeling_restr.data.drawn_scenes import (
    COLOR_RANGES,
    NOUNS,
    SIZE_RANGES,
    TEXTURES,
    DrawnScenes,
    Scene,
    kind_needs_context,
    load_backgrounds,
    vocabulary_words,
)
from modeling_restr.hub import save_bundle
from modeling_restr.tokenization_restr import vocabulary_from_expressions
from modeling_restr.training.from_scratch import ScratchTrainingArguments, find_checkpoint, initialize_weights


# Scenes of other seeds than the training's; evaluation scenes stand on photographs that no other scene stands on.
EVALUATION_SEED = 1_000_003
PRETRAINING_SEED = 2_000_003

# What a patch is labelled with for the vision encoder's pretraining; class 0 of each is the background.
ATTRIBUTES = {"kind": list(NOUNS), "color": list(COLOR_RANGES), "size": list(SIZE_RANGES), "texture": list(TEXTURES)}
NUM_CLASSES = [1 + len(names) for names in ATTRIBUTES.values()]


@dataclass
class SceneArguments:
    """The model's size and the scenes; the defaults made the checkpoint that ships with the examples."""

    backgrounds: str | None = field(
        default=None, metadata={"help": "Folder of photographs; two thirds of the scenes then stand on one of them."}
    )
    image_size: int = field(default=96, metadata={"help": "Side of the input in pixels."})
    patch_size: int = field(default=8, metadata={"help": "Side of a patch in pixels."})
    hidden_size: int = field(default=192, metadata={"help": "Width of the vision and fusion encoders."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Blocks of the vision encoder."})
    num_attention_heads: int = field(default=6, metadata={"help": "Heads of the vision encoder."})
    num_fusion_layers: int = field(default=2, metadata={"help": "Blocks of each fusion encoder."})
    num_fusion_attention_heads: int = field(default=3, metadata={"help": "Heads of the fusion encoders."})
    text_hidden_size: int = field(default=64, metadata={"help": "Width of a word vector."})
    text_num_hidden_layers: int = field(default=2, metadata={"help": "Blocks of the language encoder."})
    patch_loss_weight: float = field(default=0.3, metadata={"help": "Weight of the patch loss (the paper's: 0.1)."})
    expressions_per_scene: int = field(default=4, metadata={"help": "Sentences of a scene, which share its encoding."})
    num_evaluation_scenes: int = field(default=128, metadata={"help": "Unseen scenes to evaluate on while training."})
    pretraining_steps: int = field(default=2000, metadata={"help": "Steps of the vision encoder alone, at first."})
    pretraining_batch_size: int = field(default=12, metadata={"help": "Scenes a step of these, on each device."})


class SceneDataset(Dataset):
    """Scenes as the processor takes them; with `shuffle_expressions` each mask gets the sentence of another one."""

    def __init__(self, scenes: DrawnScenes, shuffle_expressions: bool = False):
        self.scenes = scenes
        self.shuffle_expressions = shuffle_expressions

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict:
        scene = self.scenes[index]
        texts = [expression.text for expression in scene.expressions]
        if self.shuffle_expressions:
            texts = [expression.text for expression in self.scenes[(index + 1) % len(self)].expressions]
        return {"image": scene.image, "texts": texts, "masks": [scene.masks[e.target] for e in scene.expressions]}


class SceneCollator:
    """Scenes -> the model's inputs; all sentences of a scene share one image."""

    def __init__(self, processor: ReSTRProcessor):
        self.processor = processor

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        inputs = self.processor(
            images=[row["image"] for row in rows],
            text=[row["texts"] for row in rows],
            segmentation_maps=[mask for row in rows for mask in row["masks"]],
            return_tensors="pt",
        )
        inputs.pop("original_sizes")
        return dict(inputs)


class PatchDataset(Dataset):
    """Scenes as the vision encoder's pretraining takes them: the image, and the attributes of what each patch shows."""

    def __init__(self, scenes: DrawnScenes, patch_size: int):
        self.scenes = scenes
        self.patch_size = patch_size

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict:
        scene = self.scenes[index]
        return {"image": scene.image, "labels": label_patches(scene, self.scenes.image_size, self.patch_size)}


def label_patches(scene: Scene, image_size: int, patch_size: int) -> np.ndarray:
    """(patches, attributes) classes of the shape that covers most of a patch, 0 where none covers a quarter of it."""
    num_shapes, height, width = scene.masks.shape
    canvas = np.zeros((num_shapes, image_size, image_size), dtype=bool)
    top, left = (image_size - height) // 2, (image_size - width) // 2  # the processor's letterbox
    canvas[:, top : top + height, left : left + width] = scene.masks
    grid = image_size // patch_size
    coverage = canvas.reshape(num_shapes, grid, patch_size, grid, patch_size).mean((2, 4)).reshape(num_shapes, -1)
    classes = np.array(
        [[1 + names.index(getattr(shape, name)) for name, names in ATTRIBUTES.items()] for shape in scene.shapes]
    )
    return np.where(coverage.max(0)[:, None] >= 0.25, classes[coverage.argmax(0)], 0)


def collate_patches(rows: list[dict], image_processor: ReSTRImageProcessor) -> dict[str, torch.Tensor]:
    pixel_values = image_processor([row["image"] for row in rows], return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixel_values, "labels": torch.from_numpy(np.stack([row["labels"] for row in rows]))}


def create_processor(image_size: int) -> ReSTRProcessor:
    tokenizer = build_tokenizer(vocabulary_from_expressions(vocabulary_words()))
    return ReSTRProcessor(ReSTRImageProcessor(size={"height": image_size, "width": image_size}), tokenizer)


def create_model(args: SceneArguments, vocab_size: int) -> ReSTRForImageSegmentation:
    vision_config = ReSTRVisionConfig(
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        intermediate_size=4 * args.hidden_size,
        image_size=args.image_size,
        patch_size=args.patch_size,
        drop_path_rate=0.0,  # scenes never repeat: there is nothing to overfit
    )
    text_config = ReSTRTextConfig(
        vocab_size=vocab_size,
        hidden_size=args.text_hidden_size,
        num_hidden_layers=args.text_num_hidden_layers,
        num_attention_heads=4,
        intermediate_size=4 * args.text_hidden_size,
        projection_dim=args.hidden_size,
    )
    config = ReSTRConfig(
        vision_config=vision_config,
        text_config=text_config,
        num_fusion_layers=args.num_fusion_layers,
        num_attention_heads=args.num_fusion_attention_heads,
        patch_loss_weight=args.patch_loss_weight,
    )
    config._attn_implementation = "eager"  # for short sequences faster in training on a CPU than sdpa
    model = ReSTRForImageSegmentation(config)
    initialize_weights(model)
    return model


class VisionPretraining(nn.Module):
    """The vision encoder and a linear map that names the attributes of what each patch shows."""

    def __init__(self, vision_model: ReSTRVisionModel):
        super().__init__()
        self.vision_model = vision_model
        self.head = nn.Linear(vision_model.config.hidden_size, sum(NUM_CLASSES))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        patches = self.vision_model(pixel_values).last_hidden_state[:, 1:]
        logits = self.head(patches).float().split(NUM_CLASSES, dim=2)  # one (B, P, classes) an attribute
        losses = [F.cross_entropy(part.transpose(1, 2), labels[..., index]) for index, part in enumerate(logits)]
        right = [part.argmax(2) == labels[..., index] for index, part in enumerate(logits)]
        return {"loss": torch.stack(losses).sum(), "right": torch.stack(right, dim=2)}  # (B, P, attributes)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the patches of shapes of which an attribute is named rightly."""
    labels, right = np.asarray(prediction.label_ids), np.asarray(prediction.predictions)
    return {name: round(float(right[labels[..., 0] > 0, index].mean()), 4) for index, name in enumerate(ATTRIBUTES)}


class MeanIoU:
    """Mean IoU over the expressions of `scenes`, overall and for each kind of sentence."""

    def __init__(self, scenes: DrawnScenes):
        self.num_expressions = scenes.expressions_per_scene
        self.kinds = np.array([e.kind for index in range(len(scenes)) for e in scenes[index].expressions])

    def count_pixels(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """
        (scenes, expressions, 2) intersection and union, so that Trainer never gathers masks; one row a scene, since
        it counts its samples in rows of the dataset.
        """
        predicted, target = logits > 0, labels > 0
        counts = torch.stack([(predicted & target).sum((1, 2)), (predicted | target).sum((1, 2))], dim=1)
        return counts.view(-1, self.num_expressions, 2)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        intersection, union = np.asarray(prediction.predictions).reshape(-1, 2).T
        iou = intersection / union
        needs_context = np.array([kind_needs_context(kind) for kind in self.kinds])
        metrics = {"mean_iou": iou.mean(), "mean_iou_place_order_relation": iou[needs_context].mean()}
        metrics |= {f"mean_iou_{kind}": iou[self.kinds == kind].mean() for kind in sorted(set(self.kinds))}
        return {name: round(float(value), 4) for name, value in metrics.items()}


def split_backgrounds(args: SceneArguments) -> tuple[list[np.ndarray] | None, list[np.ndarray] | None]:
    """Photographs for training and, every tenth of them, for evaluation."""
    if args.backgrounds is None:
        return None, None
    photographs = load_backgrounds(args.backgrounds, args.image_size)
    if len(photographs) < 10:
        raise ValueError(f"Expected at least 10 photographs in {args.backgrounds}, found {len(photographs)}.")
    return [photo for index, photo in enumerate(photographs) if index % 10], photographs[::10]


def pretrain_vision(
    model: ReSTRForImageSegmentation,
    processor: ReSTRProcessor,
    args: SceneArguments,
    training_args: ScratchTrainingArguments,
    photographs: tuple[list[np.ndarray] | None, list[np.ndarray] | None],
) -> None:
    """Teach the vision encoder what it sees before any sentence: at a third of the whole model's cost for a scene."""
    steps = args.pretraining_steps
    pretraining_args = replace(
        training_args,
        output_dir=str(Path(training_args.output_dir) / "vision"),
        max_steps=steps,
        decay_steps=steps // 4,
        per_device_train_batch_size=args.pretraining_batch_size,
        adamw_learning_rate=1e-3,
    )
    options = {"image_size": args.image_size, "expressions_per_scene": 1}
    num_scenes = steps * pretraining_args.train_batch_size * pretraining_args.world_size
    scenes = DrawnScenes(num_scenes, PRETRAINING_SEED, backgrounds=photographs[0], **options)
    evaluation_scenes = DrawnScenes(args.num_evaluation_scenes, EVALUATION_SEED, backgrounds=photographs[1], **options)
    trainer = Trainer(
        model=VisionPretraining(model.model.vision_model),
        args=pretraining_args,
        data_collator=partial(collate_patches, image_processor=processor.image_processor),
        train_dataset=PatchDataset(scenes, args.patch_size),
        eval_dataset=PatchDataset(evaluation_scenes, args.patch_size),
        compute_metrics=accuracy,
        optimizer_cls_and_kwargs=pretraining_args.optimizer_and_options,
    )
    trainer.train(resume_from_checkpoint=find_checkpoint(pretraining_args))


def main() -> None:
    parser = HfArgumentParser([SceneArguments, ScratchTrainingArguments])  # type: ignore[list-item]
    args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    processor = create_processor(args.image_size)
    model = create_model(args, vocab_size=len(processor.tokenizer))
    print(f"{model.num_parameters() / 1e6:.1f} M parameters")

    train_photographs, evaluation_photographs = split_backgrounds(args)
    if args.pretraining_steps and find_checkpoint(training_args) is None:
        pretrain_vision(model, processor, args, training_args, (train_photographs, evaluation_photographs))
    options = {"image_size": args.image_size, "expressions_per_scene": args.expressions_per_scene}
    num_scenes = training_args.max_steps * training_args.train_batch_size * training_args.gradient_accumulation_steps
    train_scenes = DrawnScenes(
        num_scenes * training_args.world_size, training_args.seed, backgrounds=train_photographs, **options
    )
    evaluation_scenes = DrawnScenes(
        args.num_evaluation_scenes, EVALUATION_SEED, backgrounds=evaluation_photographs, **options
    )
    mean_iou = MeanIoU(evaluation_scenes)
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=SceneCollator(processor),
        train_dataset=SceneDataset(train_scenes),
        eval_dataset={
            "unseen": SceneDataset(evaluation_scenes),
            "shuffled": SceneDataset(evaluation_scenes, shuffle_expressions=True),
        },
        compute_metrics=mean_iou,
        preprocess_logits_for_metrics=mean_iou.count_pixels,
        optimizer_cls_and_kwargs=training_args.optimizer_and_options,
    )
    trainer.model_accepts_loss_kwargs = False  # every scene has as many sentences, and MeanIoU makes one row of them
    trainer.train(resume_from_checkpoint=find_checkpoint(training_args))
    trainer.save_state()
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        folder = Path(training_args.output_dir) / "model"
        save_bundle(model, processor, folder, dtype=torch.float16)
        print(f"Wrote {folder}")


if __name__ == "__main__":
    main()
