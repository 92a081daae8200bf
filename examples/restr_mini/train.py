"""
Train restr-mini: a small ReSTR for photographs, from a pretrained vision encoder and photographs with instance masks.
The sentences are generated for every scene. A configuration file holds the settings; on one GPU:

    python examples/restr_mini/train.py --config examples/restr_mini/gpu.args --photos PHOTOS [MORE_PHOTOS ...] \\
        --vision_encoder ENCODER --word_vectors glove.6B.50d.txt --output_dir runs/restr-mini

PHOTOS are folders with `instances.json` (COCO's layout) and `images/`. After an interruption, the same command resumes
from the last checkpoint. Every tenth photograph, by its id, is held out: half of these are for validation during
training, the others for `evaluation.py`. Needs torch 2.9 or later for its Muon.
"""

import itertools
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scenes import Photographs, PhotoScene, PhotoScenes
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
from modeling_restr.training.arguments import option
from modeling_restr.training.batches import ReferringCollator
from modeling_restr.training.checkpoints import find_checkpoint
from modeling_restr.training.recipe import Recipe
from modeling_restr.training.trainer import ReferringTrainer


IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
EVALUATION_SEED = 7


@dataclass
class MiniArguments:
    """Data, sizes of the model, and changes to the paper's loss and sentences."""

    photos: list[str] = field(metadata={"help": "Folders with instances.json and images/."})
    vision_encoder: str = field(metadata={"help": "Folder or Hub id of the pretrained vision encoder."})
    word_vectors: str = field(
        metadata={"help": "Word vectors in GloVe's text format; the model gets all their words."}
    )
    start_from: str | None = option(
        None, "Folder or Hub id of a trained model to train further. Its sizes and words replace those given here."
    )
    image_size: int = option(336, "Side of the input in pixels.")
    vision_num_hidden_layers: int = option(8, "Blocks of the vision encoder to keep.")
    drop_path_rate: float = option(0.1, "Drop path of the vision encoder's last block.")
    hidden_size: int = option(384, "Width of the fusion encoders.")
    intermediate_size: int = option(1024, "Width of the fusion MLPs' hidden layers.")
    num_fusion_layers: int = option(3, "Blocks of each fusion encoder.")
    num_fusion_attention_heads: int = option(6, "Heads of the fusion encoders.")
    text_hidden_size: int = option(128, "Width of the language encoder.")
    text_num_hidden_layers: int = option(3, "Blocks of the language encoder.")
    text_num_attention_heads: int = option(8, "Heads of the language encoder.")
    patch_loss_weight: float = option(0.3, "Weight of the patch loss. The paper's: 0.1.")
    dice_loss_weight: float = option(0.5, "Weight of the soft Dice loss. The paper's: 0.")
    expressions_per_scene: int = option(6, "Maximum sentences per scene, which share its encoding.")
    crop: float = option(0.75, "Share of scenes that are a part of a photograph.")
    mirror: float = option(0.5, "Share of scenes that are mirrored.")
    paste: float = option(0.25, "Share of scenes with instances of other photographs.")
    noise: float = option(0.12, "Share of sentences with words that say nothing.")
    typos: float = option(0.02, "Share of sentences with a mistyped word.")
    absent: float = option(0.04, "Share of sentences about something that the scene does not show.")


@dataclass
class MiniTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with defaults for this training."""

    output_dir: str = option("runs/restr-mini", "Folder for checkpoints and the model.")
    max_steps: int = option(4000, "Steps in total.")
    per_device_train_batch_size: int = option(64, "Scenes per step and device.")
    per_device_eval_batch_size: int = option(32, "Photographs per step and device in the validation.")
    learning_rate: float = option(1e-3, "Learning rate of Muon, for the matrices of new blocks.")
    adamw_learning_rate: float = option(5e-4, "Learning rate of AdamW, for all other new parameters.")
    vision_learning_rate: float = option(6e-5, "Learning rate of the vision encoder's last block.")
    vision_layer_decay: float = option(0.85, "Factor of that learning rate from each block to the one below.")
    position_learning_rate: float = option(3e-4, "Learning rate of the vision encoder's positions.")
    word_learning_rate: float = option(3e-5, "Learning rate of the words that occur in sentences.")
    warmup_steps: float = option(150, "Steps of linear warm-up of all new parameters.")
    vision_warmup_steps: int = option(800, "Steps of linear warm-up of the vision encoder.")
    weight_decay: float = option(0.05, "Weight decay of matrices.")
    adam_beta2: float = option(0.98, "Second beta of AdamW.")
    max_grad_norm: float = option(1.0, "Norm to which gradients are clipped.")
    bf16: bool = option(True, "Whether to train in bfloat16.")
    eval_strategy: str = option("steps", "When to validate: steps, epoch or no.")
    eval_steps: float = option(500, "Steps between validations.")
    save_steps: float = option(500, "Steps between checkpoints.")
    save_total_limit: int | None = option(2, "Checkpoints to keep.")
    logging_steps: float = option(50, "Steps between lines of the log.")
    ddp_find_unused_parameters: bool | None = option(False, "See TrainingArguments.")
    report_to: str | None = option("none", "Integrations that get the log.")

    def __post_init__(self):
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # otherwise bf16 fails on a CPU
        super().__post_init__()


class SceneDataset(Dataset):
    """
    Scenes with up to `count` sentences each. A scene about which nothing unambiguous can be said is replaced.

    Args:
        scenes: The scenes.
        count: Maximum number of sentences per scene.
        args: Shares of sentences to change. None is changed by default.
        names: Categories that may be named as absent.
        noise_words: Words that say nothing.
    """

    def __init__(
        self,
        scenes: PhotoScenes,
        count: int,
        args: MiniArguments | None = None,
        names: Sequence[str] = (),
        noise_words: NoiseWords | None = None,
    ):
        self.scenes, self.count, self.args, self.names, self.noise_words = scenes, count, args, names, noise_words

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """An item for [`ReferringCollator`]. Its ids are the scene's number and its sentences' numbers."""
        for attempt in range(50):
            scene = self.scenes.draw(index, attempt)
            rng = np.random.default_rng((self.scenes.seed, index, attempt, 1))
            expressions = express(scene, rng, self.count)
            if expressions:
                break
        else:
            raise ValueError("Nothing can be said about 50 scenes in a row: do the masks belong to the images?")
        texts = [expression.text for expression in expressions]
        masks = scene.masks[[expression.target for expression in expressions]]
        if self.args is not None:
            self._change(scene, texts, masks, self.args, rng)
        sent_ids = [self.count * index + number for number in range(len(texts))]
        image = Image.fromarray(np.ascontiguousarray(scene.image))
        return {"image": image, "texts": texts, "masks": list(masks), "image_id": index, "sent_ids": sent_ids}

    def _change(
        self, scene: PhotoScene, texts: list[str], masks: np.ndarray, args: MiniArguments, rng: np.random.Generator
    ) -> None:
        """Replace some sentences, in place, by absent things with empty masks, noisy ones and mistyped ones."""
        for number, text in enumerate(texts):
            if rng.random() < args.absent and (absent := say_absent(scene, self.names, rng)):
                texts[number], masks[number] = absent, False
            elif self.noise_words and self.noise_words.words and rng.random() < args.noise:
                texts[number] = self.noise_words.insert(text, rng)
            elif rng.random() < args.typos:
                texts[number] = mistype(text, rng)


def create_datasets(
    args: MiniArguments, training_args: MiniTrainingArguments
) -> tuple[SceneDataset, SceneDataset, list[str]]:
    """Create the scenes to train on, the unchanged validation photographs, and the categories to train on."""
    folders = [Path(folder) for folder in args.photos]
    train, validation = (Photographs.load(folders, part) for part in ("train", "validation"))
    categories = sorted({name for photograph in train for name in photograph.categories})
    steps = training_args.max_steps * training_args.gradient_accumulation_steps
    num_scenes = steps * training_args.train_batch_size * training_args.world_size
    changes: dict[str, Any] = {"crop": args.crop, "mirror": args.mirror, "paste": args.paste}
    scenes = PhotoScenes(train, num_scenes, args.image_size, training_args.seed, **changes)
    unseen = PhotoScenes(validation, len(validation), args.image_size, EVALUATION_SEED, augment=False)
    noise_words = NoiseWords(find_unrelated_words(args, spoken_words(categories)), categories)
    return (
        SceneDataset(scenes, args.expressions_per_scene, args, categories, noise_words),
        SceneDataset(unseen, 6),
        categories,
    )


def read_words(args: MiniArguments) -> list[str]:
    lines = Path(args.word_vectors).read_text(encoding="utf-8").splitlines()
    words = (line.split(" ", 1)[0] for line in lines)
    return [word for word in words if word.isalnum()]


def find_unrelated_words(args: MiniArguments, spoken: set[str], similarity: float = 0.7) -> list[str]:
    """Words with vectors far from all words of the sentences, so that they say nothing about the photograph."""
    vocabulary = vocabulary_from_expressions(sorted({*spoken, *read_words(args)}))
    vectors = F.normalize(load_word_vectors(args.word_vectors, vocabulary).matrix, dim=1)
    rows = [vocabulary[word] for word in spoken if word in vocabulary]
    nearest = torch.cat([(part @ vectors[rows].T).amax(1) for part in vectors.split(4096)])  # (words,)
    return [word for word in read_words(args) if nearest[vocabulary[word]] < similarity]


def create_processor(args: MiniArguments, spoken: set[str]) -> tuple[ReSTRProcessor, torch.Tensor]:
    """Create a processor with the words of the vectors and of the sentences, and the vectors (words, dimensions)."""
    vocabulary = vocabulary_from_expressions(sorted({*spoken, *read_words(args)}))
    size = {"height": args.image_size, "width": args.image_size}
    image_processor = ReSTRImageProcessor(size=size, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    processor = ReSTRProcessor(image_processor, build_tokenizer(vocabulary, drop_unknown_punctuation=True))
    return processor, load_word_vectors(args.word_vectors, vocabulary).matrix


def create_model(args: MiniArguments, vectors: torch.Tensor) -> ReSTRForImageSegmentation:
    """Create a model with a pretrained vision encoder and word vectors. The rest is random."""
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


def start(args: MiniArguments, spoken: set[str]) -> tuple[ReSTRProcessor, ReSTRForImageSegmentation]:
    """Create a processor and a model, or load those of a trained model."""
    if args.start_from is None:
        processor, vectors = create_processor(args, spoken)
        return processor, create_model(args, vectors)
    processor = ReSTRProcessor.from_pretrained(args.start_from)
    return processor, ReSTRForImageSegmentation.from_pretrained(args.start_from).train()


def initialize_weights(model: ReSTRForImageSegmentation) -> None:
    """
    Initialise the new parts. transformers' standard deviation of 0.02 suits widths near the paper's 768. At this width
    it is too small, and training stalls at empty masks.
    """
    fusion = model.model.fusion
    for part in (fusion, model.model.text_model):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
    nn.init.normal_(fusion.seed_embedding, std=0.5)
    for projection in (fusion.visual_projection, fusion.text_projection):
        nn.init.normal_(projection.weight)  # its inputs have length 1, so each channel gets the variance 1
    # As in attention, the scalar product is divided by the root of the width. Otherwise a step of Adam would move the
    # patch logits too far.
    nn.init.constant_(fusion.layer_norm.weight, model.config.hidden_size**-0.5)
    decoder: Any = model.pixel_decoder
    for layer in decoder.layers:
        nn.init.kaiming_normal_(layer.weight, a=0.01)
    nn.init.normal_(decoder.head.weight, std=decoder.head.in_features**-0.5)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for the groups with `muon`, AdamW for all others, as one optimizer."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any):
        super().__init__([{"params": group["params"]} for group in groups], {})
        of_adamw, of_muon = (
            [
                {name: value for name, value in group.items() if name != "muon"}
                for group in groups
                if group["muon"] is uses_muon
            ]
            for uses_muon in (False, True)
        )
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(of_muon, adjust_lr_fn="match_rms_adamw"),  # type: ignore[arg-type]
            torch.optim.AdamW(of_adamw, fused=of_adamw[0]["params"][0].is_cuda, **options),
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


_VISION_LAYER = re.compile(r"vision_model.*\blayers?\.(\d+)\.")


def create_groups(model: nn.Module, args: MiniTrainingArguments) -> list[dict[str, Any]]:
    """Create parameter groups by learning rate and weight decay. The matrices of new blocks are marked with `muon`."""
    layers = [int(found[1]) for name, _ in model.named_parameters() if (found := _VISION_LAYER.search(name))]
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group, rate = choose_group(name, parameter, max(layers), args)
            has_decay = parameter.ndim > 1 and group not in ("positions", "words")
            decay = args.weight_decay if has_decay else 0.0
            options = {"name": group, "lr": rate, "weight_decay": decay, "muon": group == "muon", "params": []}
            groups.setdefault(f"{group} {decay}", options)["params"].append(parameter)
    return list(groups.values())


def choose_group(
    name: str, parameter: nn.Parameter, last_layer: int, args: MiniTrainingArguments
) -> tuple[str, float]:
    """Choose a parameter's group and learning rate. Blocks of the vision encoder near the pixels learn more slowly."""
    if "position_embeddings" in name and "vision_model" in name:
        return "positions", args.position_learning_rate
    if "vision_model" in name:
        found = _VISION_LAYER.search(name)
        layer = int(found[1]) if found else -1 if "embeddings" in name else last_layer
        return f"vision {layer}", args.vision_learning_rate * args.vision_layer_decay ** (last_layer - layer)
    if "embed_tokens" in name:
        return "words", args.word_learning_rate
    if parameter.ndim == 2 and "layers." in name and "pixel_decoder" not in name:
        return "muon", args.learning_rate
    return "new", args.adamw_learning_rate


class MiniTrainer(ReferringTrainer):
    """ReferringTrainer with two optimizers, a longer warm-up of the vision encoder, and the soft Dice loss."""

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

            def schedule(name: str) -> Any:
                is_vision = name.startswith(("vision", "positions"))
                warmup = self.args.vision_warmup_steps if is_vision else self.args.warmup_steps
                return partial(schedule_factor, warmup=warmup, num_steps=num_training_steps)

            self.lr_scheduler = LambdaLR(optimizer, [schedule(group["name"]) for group in optimizer.param_groups])
        return self.lr_scheduler

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + self.mini.dice_loss_weight * soft_dice_loss(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def schedule_factor(step: int, warmup: float, num_steps: int) -> float:
    progress = max(step - warmup, 0) / max(num_steps - warmup, 1)
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))


def soft_dice_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """One minus the Dice coefficient of (N, H, W) probabilities and masks. Small and large masks count the same."""
    probabilities = logits.float().sigmoid()
    overlap = (probabilities * labels).sum((1, 2))
    return (1 - (2 * overlap + 1) / (probabilities.sum((1, 2)) + labels.sum((1, 2)) + 1)).mean()


def parse_args(arguments: list[str]) -> tuple[MiniArguments, MiniTrainingArguments]:
    """Parse the options. The command line overrides a `--config` file, which HfArgumentParser ignores if missing."""
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
    processor, model = start(args, spoken)
    num_words = model.config.text_config.vocab_size
    print(f"{model.num_parameters() / 1e6:.1f} M parameters, {num_words:,} words")
    vocabulary = processor.tokenizer.get_vocab()
    trained_words = torch.zeros(num_words, dtype=torch.bool)
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
        data_collator=ReferringCollator(processor, num_words),
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
