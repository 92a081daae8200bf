"""
Train a small ReSTR from scratch on drawn scenes, with Trainer. The defaults made the checkpoint in
`examples/checkpoint`:

    python examples/train_drawn_scenes.py --output_dir runs/drawn --backgrounds path/to/photographs

Interrupted, the same command goes on from the last checkpoint. `--help` lists the choices; every option of
transformers' TrainingArguments works, too.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import EvalPrediction, HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from modeling_restr import (
    ReSTRConfig,
    ReSTRForImageSegmentation,
    ReSTRImageProcessor,
    ReSTRProcessor,
    ReSTRTextConfig,
    ReSTRVisionConfig,
    build_tokenizer,
)
from modeling_restr.data.drawn_scenes import DrawnScenes, kind_needs_context, load_backgrounds, vocabulary_words
from modeling_restr.hub import save_bundle
from modeling_restr.tokenization_restr import vocabulary_from_expressions


# Scenes of another seed than the training's, on photographs that no training scene stands on.
EVALUATION_SEED = 1_000_003


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
    num_attention_heads: int = field(default=3, metadata={"help": "Heads of the vision and fusion encoders."})
    num_fusion_layers: int = field(default=2, metadata={"help": "Blocks of each fusion encoder."})
    text_hidden_size: int = field(default=64, metadata={"help": "Width of a word vector."})
    text_num_hidden_layers: int = field(default=2, metadata={"help": "Blocks of the language encoder."})
    patch_loss_weight: float = field(default=0.3, metadata={"help": "Weight of the patch loss (the paper's: 0.1)."})
    expressions_per_scene: int = field(default=8, metadata={"help": "Sentences of a scene, which share its encoding."})
    num_evaluation_scenes: int = field(default=64, metadata={"help": "Unseen scenes to evaluate on while training."})


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
        num_attention_heads=args.num_attention_heads,
        patch_loss_weight=args.patch_loss_weight,
    )
    config._attn_implementation = "eager"  # for short sequences faster in training on a CPU than sdpa
    model = ReSTRForImageSegmentation(config)
    initialize_weights(model)
    return model


def initialize_weights(model: ReSTRForImageSegmentation) -> None:
    """
    Random weights to start from, without any pretraining. transformers' standard deviation of 0.02 suits widths near
    the paper's 768 that start from a pretrained encoder; at this width it starts too small, and learning stalls at
    masks that are empty everywhere.
    """
    fusion = model.model.fusion
    for module in model.model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    vision_embeddings = model.model.vision_model.embeddings
    nn.init.normal_(
        vision_embeddings.patch_embedding.weight, std=vision_embeddings.patch_embedding.weight[0].numel() ** -0.5
    )
    nn.init.normal_(vision_embeddings.position_embeddings, std=0.5)
    text_embeddings = model.model.text_model.embeddings.embed_tokens
    with torch.no_grad():
        text_embeddings.weight.normal_()[text_embeddings.padding_idx] = 0
    nn.init.normal_(fusion.seed_embedding, std=0.5)
    for projection in (fusion.visual_projection, fusion.text_projection):
        nn.init.normal_(projection.weight)  # of vectors whose length is 1: each channel gets the variance 1
    # A step of Adam moves the patch logits by about learning rate x width ** 2 x this weight: as in attention, the
    # scalar product is divided by the root of the width.
    nn.init.constant_(fusion.layer_norm.weight, model.config.hidden_size**-0.5)
    assert model.pixel_decoder is not None
    *hidden, last = [module for module in model.pixel_decoder.modules() if isinstance(module, nn.Linear)]
    for layer in hidden:
        nn.init.kaiming_normal_(layer.weight, a=0.01)
    nn.init.normal_(last.weight, std=last.in_features**-0.5)


@dataclass
class DrawnTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with the defaults that made the checkpoint."""

    output_dir: str = field(default="runs/drawn-scenes", metadata={"help": "Checkpoints, and the model at the end."})
    max_steps: int = field(default=4300, metadata={"help": "Steps in all; the last `decay_steps` cool down."})
    decay_steps: int = field(default=1250, metadata={"help": "Steps over which the learning rate falls to 0."})
    speed_up: float = field(default=2.0, metadata={"help": "Factor of the learning rate after `speed_up_step`."})
    speed_up_step: int = field(default=1500, metadata={"help": "When the learning rate rises by `speed_up`."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Scenes a step."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Scenes a step of the evaluation."})
    learning_rate: float = field(default=4e-4)
    warmup_steps: float = field(default=200)
    weight_decay: float = field(default=0.05)
    adam_beta2: float = field(default=0.98)
    bf16: bool = field(default=True)
    eval_strategy: str = field(default="steps")
    eval_steps: float = field(default=250)
    save_steps: float = field(default=250)
    save_total_limit: int | None = field(default=2)
    logging_steps: float = field(default=25)
    # Every scene is another one and is drawn once: their order is that of their numbers, so that a run that was
    # stopped, or goes on for longer, sees the scenes it would have seen.
    train_sampling_strategy: str = field(default="sequential")
    report_to: str | None = field(default="none")

    def __post_init__(self):
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # bf16 on a CPU has to be asked for
        self.remove_unused_columns = False  # the collator takes scenes
        super().__post_init__()


class DrawnTrainer(Trainer):
    """Trainer with a learning rate that is linear between points: slow until the shapes are found, then faster."""

    args: DrawnTrainingArguments

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        if self.lr_scheduler is None:
            args = self.args
            points = {0: 0.0, args.warmup_steps: 1.0, args.speed_up_step: 1.0, args.speed_up_step + 1: args.speed_up}
            points |= {num_training_steps - args.decay_steps: args.speed_up, num_training_steps: 0.0}
            steps, factors = zip(*sorted(points.items()))
            optimizer = self.optimizer if optimizer is None else optimizer
            assert optimizer is not None  # Trainer creates it first
            self.lr_scheduler = LambdaLR(optimizer, lambda step: float(np.interp(step, steps, factors)))
        return self.lr_scheduler


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


def main() -> None:
    parser = HfArgumentParser([SceneArguments, DrawnTrainingArguments])  # type: ignore[list-item]
    args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    processor = create_processor(args.image_size)
    model = create_model(args, vocab_size=len(processor.tokenizer))
    print(f"{model.num_parameters() / 1e6:.1f} M parameters")

    train_photographs, evaluation_photographs = split_backgrounds(args)
    options = {"image_size": args.image_size, "expressions_per_scene": args.expressions_per_scene}
    num_scenes = training_args.max_steps * training_args.train_batch_size * training_args.gradient_accumulation_steps
    train_scenes = DrawnScenes(
        num_scenes * training_args.world_size, training_args.seed, backgrounds=train_photographs, **options
    )
    evaluation_scenes = DrawnScenes(
        args.num_evaluation_scenes, EVALUATION_SEED, backgrounds=evaluation_photographs, **options
    )
    mean_iou = MeanIoU(evaluation_scenes)
    trainer = DrawnTrainer(
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
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(training_args.output_dir))
    trainer.save_state()
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    folder = Path(training_args.output_dir) / "model"
    save_bundle(model, processor, folder, dtype=torch.float16)
    print(f"Wrote {folder}")


if __name__ == "__main__":
    main()
