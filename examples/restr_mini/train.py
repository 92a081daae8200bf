"""
Train restr-mini: a small ReSTR for photographs, from a pretrained vision encoder and photographs with instance masks.
The sentences are generated, and new for every scene. A configuration file holds all settings; on one GPU:

    python examples/restr_mini/train.py --config examples/restr_mini/gpu.args --photos PHOTOS [MORE_PHOTOS ...] \\
        --vision_encoder ENCODER --word_vectors glove.6B.50d.txt --output_dir runs/restr-mini

PHOTOS are folders with `instances.json` (COCO's layout) and `images/`. Interrupted, the same command resumes from the
last checkpoint. Every tenth photograph, by its id, is held out: half of these are for validation during training, the
others for `evaluation.py`. Needs torch 2.9 or later, for its Muon.
"""

import itertools
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scenes import Photographs, PhotoScenes, letterbox
from sentences import NoiseWords, express, mistype, say_absent, spoken_words
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import HfArgumentParser, TrainingArguments, set_seed

from modeling_restr import (
    ReSTRConfig,
    ReSTRForImageSegmentation,
    ReSTRImageProcessor,
    ReSTRProcessor,
    ReSTRTextConfig,
    build_tokenizer,
)
from modeling_restr.data.word_vectors import load_word_vectors
from modeling_restr.hub import save_bundle
from modeling_restr.tokenization_restr import vocabulary_from_expressions
from modeling_restr.training.checkpoints import find_checkpoint
from modeling_restr.training.recipe import Recipe
from modeling_restr.training.trainer import ReferringTrainer


IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
EVALUATION_SEED = 7


@dataclass
class MiniArguments:
    """Data, sizes of the model, and what the training adds to the paper's loss."""

    photos: list[str] = field(metadata={"help": "Folders with instances.json and images/."})
    vision_encoder: str = field(metadata={"help": "Folder or Hub id of the pretrained vision encoder."})
    word_vectors: str = field(metadata={"help": "Word vectors in GloVe's text format; all their words are learned."})
    image_size: int = field(default=336, metadata={"help": "Side of the input in pixels."})
    vision_num_hidden_layers: int = field(default=8, metadata={"help": "Blocks of the vision encoder to keep."})
    drop_path_rate: float = field(default=0.1, metadata={"help": "Drop path of the vision encoder's last block."})
    hidden_size: int = field(default=384, metadata={"help": "Width of the fusion encoders."})
    intermediate_size: int = field(default=1024, metadata={"help": "Width of the fusion MLPs' hidden layers."})
    num_fusion_layers: int = field(default=3, metadata={"help": "Blocks of each fusion encoder."})
    num_fusion_attention_heads: int = field(default=6, metadata={"help": "Heads of the fusion encoders."})
    text_hidden_size: int = field(default=128, metadata={"help": "Width of the language encoder."})
    text_num_hidden_layers: int = field(default=3, metadata={"help": "Blocks of the language encoder."})
    text_num_attention_heads: int = field(default=8, metadata={"help": "Heads of the language encoder."})
    patch_loss_weight: float = field(default=0.3, metadata={"help": "Weight of the patch loss (the paper's: 0.1)."})
    dice_loss_weight: float = field(default=0.5, metadata={"help": "Weight of the soft Dice loss (the paper's: 0)."})
    expressions_per_scene: int = field(default=6, metadata={"help": "Sentences per scene, which share its encoding."})
    paste: float = field(default=0.25, metadata={"help": "Share of scenes with instances of other photographs."})
    noise: float = field(default=0.12, metadata={"help": "Share of sentences with words that say nothing."})
    typos: float = field(default=0.02, metadata={"help": "Share of sentences with a mistyped word."})
    absent: float = field(default=0.04, metadata={"help": "Share of sentences about what the scene does not show."})


@dataclass
class MiniTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with defaults for this training."""

    output_dir: str = field(default="runs/restr-mini", metadata={"help": "Checkpoints, and the model at the end."})
    max_steps: int = field(default=4000, metadata={"help": "Steps in all."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Scenes per step and device."})
    per_device_eval_batch_size: int = field(default=32)
    learning_rate: float = field(default=1e-3, metadata={"help": "Muon's, of the new blocks' matrices."})
    adamw_learning_rate: float = field(default=5e-4, metadata={"help": "AdamW's, of everything else that is new."})
    vision_learning_rate: float = field(
        default=6e-5, metadata={"help": "AdamW's, of the vision encoder's last block."}
    )
    vision_layer_decay: float = field(
        default=0.85, metadata={"help": "Factor of it from each block to the one below."}
    )
    position_learning_rate: float = field(
        default=3e-4, metadata={"help": "AdamW's, of the vision encoder's positions."}
    )
    word_learning_rate: float = field(default=3e-5, metadata={"help": "AdamW's, of the words that sentences have."})
    warmup_steps: float = field(default=150, metadata={"help": "Steps of linear warm-up of all that is new."})
    vision_warmup_steps: int = field(default=800, metadata={"help": "Steps of linear warm-up of the vision encoder."})
    weight_decay: float = field(default=0.05)
    adam_beta2: float = field(default=0.98)
    max_grad_norm: float = field(default=1.0)
    bf16: bool = field(default=True)
    eval_strategy: str = field(default="steps")
    eval_steps: float = field(default=500)
    save_steps: float = field(default=500)
    save_total_limit: int | None = field(default=2)
    logging_steps: float = field(default=50)
    train_sampling_strategy: str = field(default="sequential")  # scenes are numbered, and each is drawn once
    ddp_find_unused_parameters: bool | None = field(default=False)
    report_to: str | None = field(default="none")

    def __post_init__(self):
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # bf16 on a CPU has to be asked for
        self.remove_unused_columns = False
        super().__post_init__()


# --- Scenes and sentences ---------------------------------------------------------------------------------------------


class SceneDataset(Dataset):
    """
    Scenes with up to `count` sentences each. One about which nothing unambiguous can be said gives way to another.

    Args:
        scenes: where they come from.
        count: sentences per scene.
        names: the categories that may be named as absent; none by default.
        args: shares of the changed sentences; none are changed by default.
        noise_words: what says nothing.
    """

    def __init__(
        self,
        scenes: PhotoScenes,
        count: int,
        names: list[str] | None = None,
        args: MiniArguments | None = None,
        noise_words: NoiseWords | None = None,
    ):
        self.scenes, self.count, self.names, self.args, self.noise_words = scenes, count, names, args, noise_words

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`image` (size, size, 3) uint8, `texts`, `masks` (sentences, size, size / 8) packed, `index`."""
        for attempt in range(50):
            scene = self.scenes.draw(index, attempt)
            rng = np.random.default_rng((self.scenes.seed, index, attempt, 1))
            expressions = express(scene, rng, self.count)
            if expressions:
                break
        else:
            raise ValueError("Nothing can be said about 50 scenes in a row: are the masks those of the images?")
        texts = [expression.text for expression in expressions]
        masks = scene.masks[[expression.target for expression in expressions]]
        if self.args is not None:
            masks = masks.copy()
            for number, text in enumerate(texts):
                if rng.random() < self.args.absent and (absent := say_absent(scene, self.names or (), rng)):
                    texts[number], masks[number] = absent, False
                elif self.noise_words and self.noise_words.words and rng.random() < self.args.noise:
                    texts[number] = self.noise_words.insert(text, rng)
                elif rng.random() < self.args.typos:
                    texts[number] = mistype(text, rng)
        size = self.scenes.image_size
        return {
            "image": letterbox(scene.image, size),
            "texts": texts,
            "masks": np.packbits(letterbox(masks, size), axis=2),
            "index": index,
        }


class SceneCollator:
    """Rows of [`SceneDataset`] -> the model's inputs, images and masks still as bytes: the device unpacks them."""

    def __init__(self, processor: ReSTRProcessor):
        self.tokenizer: Any = processor.tokenizer

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        options = {"return_tensors": "pt", "padding": "max_length", "truncation": True}
        counts = torch.tensor([len(row["texts"]) for row in rows])
        return {
            **self.tokenizer([text for row in rows for text in row["texts"]], **options),
            "image_indices": torch.arange(len(rows)).repeat_interleave(counts),
            "pixel_values": torch.from_numpy(np.stack([row["image"] for row in rows])),
            "labels": torch.from_numpy(np.concatenate([row["masks"] for row in rows])),
            "image_ids": torch.tensor([row["index"] for row in rows]),
            "sent_ids": torch.arange(int(counts.sum())),
        }


def unpack(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Bytes -> normalised `pixel_values` (B, 3, size, size) and `labels` (N, size, size), on their device."""
    pixels, packed = inputs["pixel_values"], inputs["labels"]
    if pixels.dtype != torch.uint8:
        return inputs
    mean, std = (torch.tensor(values, device=pixels.device) * 255 for values in (IMAGENET_MEAN, IMAGENET_STD))
    bits = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    labels = (packed[..., None] >> bits & 1).flatten(2)[..., : pixels.shape[2]]
    return {
        **inputs,
        "pixel_values": ((pixels.float() - mean) / std).permute(0, 3, 1, 2).contiguous(),
        "labels": labels.float(),
    }


def create_datasets(
    args: MiniArguments, training_args: MiniTrainingArguments
) -> tuple[SceneDataset, SceneDataset, list[str]]:
    """The training's scenes, the validation's photographs as they are, and the categories of the former."""
    folders = [Path(folder) for folder in args.photos]
    train, validation = (Photographs.load(folders, part) for part in ("train", "validation"))
    categories = sorted({name for photograph in train for name in photograph.categories})
    steps = training_args.max_steps * training_args.gradient_accumulation_steps
    num_scenes = steps * training_args.train_batch_size * training_args.world_size
    scenes = PhotoScenes(train, num_scenes, args.image_size, training_args.seed, paste=args.paste)
    unseen = PhotoScenes(validation, len(validation), args.image_size, EVALUATION_SEED, augment=False)
    noise_words = NoiseWords(find_unrelated_words(args, spoken_words(categories)), categories)
    return (
        SceneDataset(scenes, args.expressions_per_scene, categories, args, noise_words),
        SceneDataset(unseen, 6),
        categories,
    )


# --- The model --------------------------------------------------------------------------------------------------------


def read_words(args: MiniArguments) -> list[str]:
    lines = Path(args.word_vectors).read_text(encoding="utf-8").splitlines()
    words = (line.split(" ", 1)[0] for line in lines)
    return [word for word in words if word.isalnum()]


def find_unrelated_words(args: MiniArguments, spoken: set[str], similarity: float = 0.7) -> list[str]:
    """The words whose vectors are not near to those of any word that the sentences have: they may say nothing."""
    vocabulary = vocabulary_from_expressions(sorted({*spoken, *read_words(args)}))
    vectors = F.normalize(load_word_vectors(args.word_vectors, vocabulary).matrix, dim=1)
    rows = [vocabulary[word] for word in spoken if word in vocabulary]
    nearest = torch.cat([(part @ vectors[rows].T).amax(1) for part in vectors.split(4096)])  # (words,)
    return [word for word in read_words(args) if nearest[vocabulary[word]] < similarity]


def create_processor(args: MiniArguments, spoken: set[str]) -> tuple[ReSTRProcessor, torch.Tensor]:
    """The processor, whose words are those of the word vectors and of the sentences; and the vectors (rows, 50)."""
    words = [*spoken, *read_words(args)]
    vocabulary = vocabulary_from_expressions(sorted(set(words)))
    image_processor = ReSTRImageProcessor(
        size={"height": args.image_size, "width": args.image_size}, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD
    )
    processor = ReSTRProcessor(image_processor, build_tokenizer(vocabulary, drop_unknown_punctuation=True))
    return processor, load_word_vectors(args.word_vectors, vocabulary).matrix


def create_model(args: MiniArguments, vectors: torch.Tensor) -> ReSTRForImageSegmentation:
    """A pretrained vision encoder; all else from random weights, but for the words, which start from their vectors."""
    text_config = ReSTRTextConfig(
        vocab_size=len(vectors),
        hidden_size=args.text_hidden_size,
        num_hidden_layers=args.text_num_hidden_layers,
        num_attention_heads=args.text_num_attention_heads,
        intermediate_size=4 * args.text_hidden_size,
        projection_dim=args.hidden_size,
    )
    config = ReSTRConfig(
        text_config=text_config,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_fusion_layers=args.num_fusion_layers,
        num_attention_heads=args.num_fusion_attention_heads,
        patch_loss_weight=args.patch_loss_weight,
    )
    model = ReSTRForImageSegmentation.from_vision_pretrained(
        args.vision_encoder,
        config,
        image_size=args.image_size,
        num_hidden_layers=args.vision_num_hidden_layers,
        drop_path_rate=args.drop_path_rate,
    )
    initialize_weights(model)
    embedding: Any = model.get_input_embeddings()
    isometry = nn.init.orthogonal_(torch.empty(vectors.shape[1], args.text_hidden_size))  # keeps distances and angles
    with torch.no_grad():
        embedding.weight.copy_(vectors @ isometry)
    return model.train()


def initialize_weights(model: ReSTRForImageSegmentation) -> None:
    """
    Start what is new. transformers' standard deviation of 0.02 suits widths near the paper's 768; at this width it is
    too small, and learning stalls at masks that are empty everywhere.
    """
    fusion = model.model.fusion
    for part in (fusion, model.model.text_model):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
    nn.init.normal_(fusion.seed_embedding, std=0.5)
    for projection in (fusion.visual_projection, fusion.text_projection):
        nn.init.normal_(projection.weight)  # of vectors whose length is 1: each channel gets the variance 1
    # A step of Adam moves the patch logits by about learning rate x width ** 2 x this weight: as in attention, the
    # scalar product is divided by the root of the width.
    nn.init.constant_(fusion.layer_norm.weight, model.config.hidden_size**-0.5)
    decoder: Any = model.pixel_decoder
    for layer in decoder.layers:
        nn.init.kaiming_normal_(layer.weight, a=0.01)
    nn.init.normal_(decoder.head.weight, std=decoder.head.in_features**-0.5)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for the groups that are marked so, AdamW for all others, as one optimizer."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any):
        super().__init__([{"params": group["params"]} for group in groups], {})
        muon, adamw = ([g for g in groups if g.get("muon", False) is is_muon] for is_muon in (True, False))
        muon = [{name: value for name, value in group.items() if name != "muon"} for group in muon]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw"),  # type: ignore[list-item]
            torch.optim.AdamW(adamw, fused=adamw[0]["params"][0].is_cuda, **options),
        ]
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]  # schedulers write to these

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"]):
            part.load_state_dict(state)
        self._share_groups()


def create_groups(model: nn.Module, args: MiniTrainingArguments) -> list[dict[str, Any]]:
    """Parameter groups: the new blocks' matrices with Muon; the vision encoder's blocks, slower towards the pixels."""
    num_layers = (
        max(int(found[1]) for name, _ in model.named_parameters() if (found := _VISION_LAYER.search(name))) + 1
    )
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = args.weight_decay if parameter.ndim > 1 else 0.0
        if "vision_model" in name:
            layer = (
                int(found[1])
                if (found := _VISION_LAYER.search(name))
                else -1
                if "embeddings" in name
                else num_layers - 1
            )
            rate, key = (
                args.vision_learning_rate * args.vision_layer_decay ** (num_layers - 1 - layer),
                f"vision {layer}",
            )
            if "position_embeddings" in name:
                rate, key, decay = args.position_learning_rate, "positions", 0.0
        elif "embed_tokens" in name:
            rate, key, decay = args.word_learning_rate, "words", 0.0
        elif parameter.ndim == 2 and "layers." in name and "pixel_decoder" not in name:
            rate, key = args.learning_rate, "muon"
        else:
            rate, key = args.adamw_learning_rate, "new"
        group = groups.setdefault(f"{key} {decay}", {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
        group["name"] = key
        if key == "muon":
            group["muon"] = True
    return list(groups.values())


_VISION_LAYER = re.compile(r"vision_model.*\blayers?\.(\d+)\.")


# --- Training ---------------------------------------------------------------------------------------------------------


class MiniTrainer(ReferringTrainer):
    """ReferringTrainer with two optimizers in one, a gentle start of the vision encoder, and the soft Dice loss."""

    args: MiniTrainingArguments

    def __init__(self, *args: Any, mini: MiniArguments, trained_words: torch.Tensor, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.mini = mini
        weight = self.model.get_input_embeddings().weight
        trained = trained_words.to(weight.device)[:, None]
        weight.register_hook(lambda gradient: gradient * trained)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = MuonWithAdamW(create_groups(self.model, self.args), betas=betas)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Linear warm-up, then half a cosine to 0."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer

            def factor(warmup: float, step: int) -> float:
                progress = max(step - warmup, 0) / max(num_training_steps - warmup, 1)
                return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))

            def schedule(name: str) -> Any:
                is_slow = name.startswith(("vision", "positions"))
                warmup = self.args.vision_warmup_steps if is_slow else self.args.warmup_steps
                return lambda step: factor(warmup, step)

            self.lr_scheduler = LambdaLR(optimizer, [schedule(group["name"]) for group in optimizer.param_groups])
        return self.lr_scheduler

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        inputs = unpack(inputs)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + self.mini.dice_loss_weight * soft_dice_loss(outputs.logits.float(), inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(model, unpack(self._prepare_inputs(inputs)), *args, **kwargs)


def soft_dice_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """One minus the Dice coefficient of (N, H, W) probabilities and masks: small masks count as much as large ones."""
    probabilities = logits.sigmoid()
    overlap = (probabilities * labels).sum((1, 2))
    return (1 - (2 * overlap + 1) / (probabilities.sum((1, 2)) + labels.sum((1, 2)) + 1)).mean()


def parse_args(arguments: list[str]) -> tuple[MiniArguments, MiniTrainingArguments]:
    """Options on the command line win over those of a `--config` file."""
    parser = HfArgumentParser([MiniArguments, MiniTrainingArguments])  # type: ignore[list-item]
    for flag, value in itertools.pairwise(arguments):
        if flag == "--config" and not Path(value).is_file():
            raise SystemExit(f"Expected a file of options after --config, got {value}.")
    return parser.parse_args_into_dataclasses(arguments, args_file_flag="--config")  # type: ignore[return-value]


def main(arguments: list[str] | None = None) -> None:
    args, training_args = parse_args(sys.argv[1:] if arguments is None else arguments)
    set_seed(training_args.seed)
    train, validation, categories = create_datasets(args, training_args)
    spoken = spoken_words(categories)
    processor, vectors = create_processor(args, spoken)
    model = create_model(args, vectors)
    print(f"{model.num_parameters() / 1e6:.1f} M parameters, {len(vectors):,} words")
    vocabulary = processor.tokenizer.get_vocab()
    trained_words = torch.zeros(len(vectors), dtype=torch.bool)
    trained_words[[vocabulary[word] for word in spoken if word in vocabulary]] = True
    recipe = Recipe(
        max_steps=training_args.max_steps,
        images_per_step=training_args.train_batch_size * training_args.world_size,
        expressions_per_image=args.expressions_per_scene,
        warmup_steps=training_args.warmup_steps,
        image_size=args.image_size,
        dataset=" ".join(Path(folder).name for folder in args.photos),
        seed=training_args.seed,
    )
    trainer = MiniTrainer(
        model=model,
        args=training_args,
        data_collator=SceneCollator(processor),
        train_dataset=train,
        eval_dataset=validation,
        processor=processor,
        recipe=recipe,
        mini=args,
        trained_words=trained_words,
    )
    checkpoint = find_checkpoint(training_args.output_dir)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.is_world_process_zero():
        trainer.save_state()
        folder = Path(training_args.output_dir) / "model"
        save_bundle(model, processor, folder, dtype=torch.float16)
        print(f"Wrote {folder}")


if __name__ == "__main__":
    main()
