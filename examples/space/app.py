"""
Demo of ReSTR in a browser and over an API: masks for sentences about a photo.

This folder is a Space for the Hugging Face Hub (README.md says how to create it). In a clone of the repository:

    pip install -e ".[space]" && python examples/space/app.py

The environment variable MODEL_ID selects another model by folder or Hub id.
"""

import base64
import hashlib
import html
import importlib.util
import io
import json
import os
import re
import unicodedata
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
import torch
import torch.nn.functional as F
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder
from huggingface_hub import RepoCard
from PIL import Image, ImageFilter
from transformers import pipeline


HERE = Path(__file__).resolve().parent
SHIPPED_CHECKPOINT = HERE.parent / "restr_mini"  # in a clone; otherwise the first of `models` in README.md
PHOTOS = HERE / "photos" if (HERE / "photos").is_dir() else HERE.parent / "photos"
EXAMPLES = PHOTOS / "examples.json"  # also of `restr export --web`

# One colour per sentence, as in `modeling_restr.visualization`, which a Space may lack.
COLORS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#f0e442", "#0072b2")
MAX_SENTENCES = len(COLORS)
MAX_CHARACTERS = 200  # per sentence; the model reads about the first 20 words
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow reads more formats, some by running programs
MAX_MEGAPIXELS = 50
MAX_FILE_SIZE = "20mb"
MAX_SIDE = 2048  # pixels; longer photos are resized to bound the memory of each user
PREVIEW_SIDE, THUMBNAIL_SIDE, OUTLINE_WIDTH = 960, 400, 2  # pixels on the page
CACHED_PHOTOS = 64  # encoded images in memory, 2.8 MB each at 480x480 pixels
MAX_SESSIONS = 200  # with answers in memory, at most 20 MB each
MAX_WAITING = 64  # requests in the queue
MAX_THREADS = 8  # for everything but the model; each one keeps memory of its own
SESSION_SECONDS = 3600  # until a session's answer and files are deleted
MAX_LISTED_WORDS = 300
DEFAULT_THRESHOLD = 0.5
# In a layout of one column, the masks are below the visible part of the page.
SCROLL_TO_OVERLAY = """
() => { if (innerWidth < 768) document.querySelector("#overlay").scrollIntoView({behavior: "smooth"}) }
"""
SOURCES: Any = ["upload", "webcam", "clipboard"]
FONTS = ["system-ui", "sans-serif"]  # the system's own, so that no font is loaded

HEADER = """
<header class="title">
<h1>Say what you mean, get its mask</h1>
<p><b>ReSTR</b> finds what a sentence refers to in a photo, with transformers and no convolutions
(<a href="https://arxiv.org/abs/2203.16768">Kim et al., CVPR 2022</a>). It encodes the photo once for any number of
sentences.</p>
</header>
"""
THRESHOLD_NOTE = "Probability above which a pixel is in the mask. Moving it does not run the model again."
API_DESCRIPTION = (
    "Masks for sentences about a photo, one sentence per line. Returns the label, score, share of the photo and words "
    "with the class seed's attention of each sentence, and the masks as PNG files, 255 inside and 0 outside."
)

LIMITS = (
    f"At most {MAX_SENTENCES} sentences of {MAX_CHARACTERS} characters, and photos of up to {MAX_MEGAPIXELS} megapixels "
    f"and {MAX_FILE_SIZE.upper()}. A photo with a side of more than {MAX_SIDE} pixels is resized first, and its masks "
    "have the new size."
)
SEED_NOTE = (
    "<b>What the class seed attended to:</b> the stronger a word's colour, the more attention it got. Percentages are "
    "shares of the seed's attention, averaged over all heads and layers of the seed encoder. The rest went to empty word "
    "slots and to the seed itself. The model's vocabulary lacks <u>dashed</u> words, and it reads them as "
    "<i>unknown</i>. It does not read <s>struck</s> words, because the sentence is too long."
)


def refuse(message: str) -> gr.Error:
    """An error for users, on the page or from the API."""
    return gr.Error(message, print_exception=False)


def read_sentences(text: Any) -> list[str]:
    """Split a text into sentences, one per line. Blank lines are ignored."""
    lines = unicodedata.normalize("NFC", text).splitlines() if isinstance(text, str) else []
    sentences = [" ".join(line.split()) for line in lines if line.strip()]
    if not sentences:
        raise refuse("There is no sentence yet: write what to look for, one sentence per line.")
    if len(sentences) > MAX_SENTENCES:
        raise refuse(f"At most {MAX_SENTENCES} sentences at a time, please. You wrote {len(sentences)}.")
    for number, sentence in enumerate(sentences, start=1):
        if len(sentence) > MAX_CHARACTERS:
            raise refuse(f"Sentence {number} has {len(sentence)} characters. The limit is {MAX_CHARACTERS}.")
        if not re.search(r"\w", sentence):
            raise refuse(f"Sentence {number} has no words: say what to look for.")
    return sentences


def check_threshold(threshold: Any) -> float:
    if not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise refuse("The threshold is a probability: a number from 0 to 1.")
    return float(threshold)


def get_path(photo: dict[str, Any] | None) -> str:
    """Read the path in gr.Image's data. The errors of Gradio's own code would not help users."""
    if not photo or not photo["path"]:
        raise refuse("There is no photo yet: upload one, take one, paste one, or choose an example.")
    return photo["path"]


def check_input(read: Callable[[Any], Any], value: Any) -> dict[str, Any]:
    """Gradio's validation of an input: whether `read` accepts its value."""
    try:
        read(value)
    except gr.Error as error:
        return gr.validate(False, error.message)
    return gr.validate(True, "")


def read_photo(path: str | os.PathLike, image_processor: Any) -> np.ndarray:
    """
    Read a photo as the model sees it before resizing: upright, 8-bit RGB, transparency on white. The result is an array
    of uint8 (height, width, 3) with no side longer than `MAX_SIDE`. The size is checked before the pixels are decoded.
    """
    too_large = refuse(f"This image has more than {MAX_MEGAPIXELS} megapixels: make it smaller first.")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_MEGAPIXELS * 1_000_000:
                raise too_large
            image.thumbnail((MAX_SIDE, MAX_SIDE))
            pixels = image_processor.process_image(image, do_convert_rgb=True, do_rescale=True)
    except gr.Error:  # is a ValueError as well
        raise
    except Image.DecompressionBombError:
        raise too_large from None
    except (OSError, ValueError, SyntaxError):  # Pillow's errors for damaged files and other content
        raise refuse("This file cannot be read as an image: try a JPEG, PNG or WebP file.") from None
    return np.ascontiguousarray(np.moveaxis(pixels, 0, -1))


class Word(NamedTuple):
    """A word, and the class seed's attention to it from 0 to 1, or None if the model does not read the word."""

    text: str
    is_known: bool
    attention: float | None


@dataclass
class Answer:
    """The model's outputs for N sentences about a photo. They give masks at any threshold."""

    photo: np.ndarray  # (height, width, 3)
    sentences: list[str]
    words: list[list[Word]]
    logits: torch.Tensor  # (N, H, W) at the size of the model's input
    patch_logits: torch.Tensor  # (N, h, w)


class Segmentation(NamedTuple):
    """A sentence's mask (bool, height x width) and its score, the mean probability inside."""

    mask: np.ndarray
    score: float


def average_seed_attention(
    attentions: Sequence[torch.Tensor], num_layers: int, attention_mask: torch.Tensor
) -> torch.Tensor:
    """
    Average the attention of the class seed to each of T word slots over all heads and layers of the seed encoder:
    (N, T), 0 for padding. The seed encoder's layers come last in the model's attentions. In each, the seed is the last
    token, after the words. This also holds for the single encoder of the variant "vanilla".
    """
    num_slots = attention_mask.shape[1]
    weights = torch.stack(tuple(attentions[-num_layers:]))[..., -1, -num_slots - 1 : -1]  # (layers, N, heads, T)
    return weights.mean(dim=(0, 2)) * attention_mask


class Segmenter:
    """A pipeline with its model, and a cache with the encoded images of recent photos."""

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.model, self.processor = pipe.model, pipe.processor
        size = self.processor.image_processor.size
        self.input_size = (size["height"], size["width"])
        self._encoded_images = gr.Cache(max_size=CACHED_PHOTOS)

    @classmethod
    def from_pretrained(cls, model_id: str) -> "Segmenter":
        """Load a model with the package if it is installed, otherwise with the code in the model's repository."""
        is_installed = importlib.util.find_spec("modeling_restr") is not None
        if is_installed:
            importlib.import_module("modeling_restr")  # registers its task
        task: Any = "referring-image-segmentation" if is_installed else "image-segmentation"
        # Eager attention returns its weights. The vision encoder takes most of the time, and its weights are not needed.
        attention = {"": "eager", "text_config": "eager", "vision_config": "sdpa"}
        options: dict[str, Any] = {"model_kwargs": {"attn_implementation": attention}}
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        return cls(pipeline(task, model=model_id, trust_remote_code=not is_installed, device=device, **options))

    def encode(self, photo: np.ndarray) -> Any:
        """Encode the photo as the pipeline's `encode_image`, with a cache that all users share."""
        key = f"{photo.shape}{hashlib.sha256(photo.data).hexdigest()}"
        kept = self._encoded_images.get(key)
        if kept is None:
            kept = {"encoded": self.pipe.encode_image(Image.fromarray(photo))}
            self._encoded_images.set(key, **kept)
        return kept["encoded"]

    @torch.inference_mode()
    def ask(self, photo: np.ndarray, sentences: list[str]) -> Answer:
        """Run the model. The vision encoder runs only for a new photo."""
        vision_embeds = torch.from_numpy(self.encode(photo).vision_embeds)[None]  # (1, h, w, hidden)
        inputs = self.processor(text=sentences, return_offsets_mapping=True, return_tensors="pt")
        offsets = inputs.pop("offset_mapping").tolist()
        inputs = inputs.to(self.model.device)
        outputs = self.model(**inputs, vision_embeds=vision_embeds.to(self.model.device), output_attentions=True)
        attention = average_seed_attention(
            outputs.attentions, self.model.config.num_fusion_layers, inputs["attention_mask"]
        )
        rows = zip(sentences, offsets, inputs["input_ids"].tolist(), attention.tolist(), strict=True)
        words = [self._list_words(*row) for row in rows]
        return Answer(photo, sentences, words, outputs.logits.float().cpu(), outputs.patch_logits.float().cpu())

    def _list_words(
        self, sentence: str, offsets: list[list[int]], input_ids: list[int], attention: list[float]
    ) -> list[Word]:
        tokenizer = self.processor.tokenizer
        words, end = [], 0
        for (start, stop), token_id, weight in zip(offsets, input_ids, attention, strict=True):
            if token_id != tokenizer.pad_token_id:
                words.append(Word(sentence[start:stop].strip(), token_id != tokenizer.unk_token_id, weight))
                end = stop
        return words + [Word(text, True, None) for text in sentence[end:].split() if re.search(r"\w", text)]

    def segment(self, answer: Answer, threshold: float) -> list[Segmentation]:
        """Compute masks of the photo's own size, without running the model."""
        results = self._resize_to(answer.logits, answer.photo.shape[:2], threshold, return_probabilities=False)
        return [Segmentation(result["mask"].numpy(), result["score"]) for result in results]

    def get_patch_maps(self, answer: Answer, size: tuple[int, int]) -> list[np.ndarray]:
        """Probabilities of the patches on the photo, at `size` (height, width), with sharp edges between patches."""
        logits = F.interpolate(answer.patch_logits[:, None], self.input_size, mode="nearest")[:, 0]
        # `size` has the aspect ratio of the photo, so that the letterbox is removed correctly.
        return [result["probabilities"].numpy() for result in self._resize_to(logits, size, 0.5)]

    def _resize_to(
        self, logits: torch.Tensor, size: tuple[int, int], threshold: float, return_probabilities: bool = True
    ) -> list[dict[str, Any]]:
        return self.processor.post_process_referring_segmentation(
            SimpleNamespace(logits=logits), [size] * len(logits), threshold, return_probabilities
        )

    def list_vocabulary(self) -> list[str]:
        return sorted(word for word in self.processor.tokenizer.get_vocab() if re.fullmatch(r"\w+", word))


def shrink(pixels: np.ndarray, side: int) -> np.ndarray:
    """Resize pixels or a mask so that no side is longer than `side`."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    return np.asarray(image)


def draw_overlay(answer: Answer, segmentations: list[Segmentation]) -> tuple[np.ndarray, list[tuple[np.ndarray, str]]]:
    """Draw the photo and one translucent layer with an outline per sentence, for gr.AnnotatedImage."""
    photo = Image.fromarray(answer.photo)
    scale = PREVIEW_SIDE / max(photo.size)
    size = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
    layers = []
    for segmentation, label in zip(segmentations, make_labels(answer.sentences)):
        mask = Image.fromarray(segmentation.mask).convert("L").resize(size, Image.Resampling.BILINEAR)
        mask = mask.point(lambda value: 255 * (value > 127))
        grown = mask.filter(ImageFilter.MaxFilter(2 * OUTLINE_WIDTH + 1))
        layers.append((np.where(np.asarray(mask) > 0, 0.6, np.asarray(grown) > 0), label))
    return np.asarray(photo.resize(size)), layers


def make_labels(sentences: list[str]) -> list[str]:
    """Number the sentences, so that equal sentences differ."""
    return [f"{number}  {sentence}" for number, sentence in enumerate(sentences, start=1)]


def draw_cutout(photo: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draw the photo inside the mask, and a pale grey version outside."""
    grey = np.asarray(Image.fromarray(photo).convert("L"))[..., None]
    return np.where(mask[..., None], photo, 190 + grey // 5).astype(np.uint8)


def draw_patch_map(photo: np.ndarray, probabilities: np.ndarray, color: str) -> np.ndarray:
    """Draw probabilities (height, width) as shades of a colour on the grey photo."""
    grey = np.asarray(Image.fromarray(photo).convert("L"))[..., None] * 0.4 + 120
    rgb = np.array([int(color[start : start + 2], 16) for start in (1, 3, 5)])
    opacity = 0.9 * probabilities[..., None]
    return (grey * (1 - opacity) + rgb * opacity).astype(np.uint8)


def to_data_url(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def make_cards(segmenter: Segmenter, answer: Answer, segmentations: list[Segmentation]) -> str:
    """Make HTML with the words, mask and patch map of each sentence."""
    photo = shrink(answer.photo, THUMBNAIL_SIDE)
    patch_maps = segmenter.get_patch_maps(answer, photo.shape[:2])
    grid = " x ".join(map(str, answer.patch_logits.shape[1:]))
    cards = []
    for index, (words, (mask, score), patch_map) in enumerate(zip(answer.words, segmentations, patch_maps)):
        share = mask.mean()
        result = f"score {score:.2f} · {share:.1%} of the photo" if share else "no pixel is above the threshold"
        mask = np.asarray(Image.fromarray(mask).resize(photo.shape[1::-1], Image.Resampling.NEAREST))
        cutout = to_data_url(draw_cutout(photo, mask))
        patches = to_data_url(draw_patch_map(photo, patch_map, COLORS[index]))
        cards.append(
            f'<article class="card" style="--color: {COLORS[index]}">'
            f'<header><span class="number">{index + 1}</span><span class="result">{result}</span></header>'
            f'<p class="words">{make_words(words)}</p>'
            f'<div class="maps"><figure><img src="{cutout}" alt="mask"><figcaption>mask</figcaption></figure>'
            f'<figure><img src="{patches}" alt="patch map"><figcaption>patch map, {grid}</figcaption></figure>'
            "</div></article>"
        )
    return f'<div class="cards">{"".join(cards)}</div><p class="note">{SEED_NOTE}</p>'


def make_words(words: list[Word]) -> str:
    """Make HTML with the words shaded by attention. The most attended word has the full colour."""
    most = max((word.attention or 0.0 for word in words), default=0.0) or 1.0
    parts = []
    for word in words:
        text = html.escape(word.text)
        if word.attention is None:
            parts.append(f"<s>{text}</s>")
            continue
        tag = "span" if word.is_known else "u"
        shade = f"--shade: {90 * word.attention / most:.0f}%"
        parts.append(f'<{tag} class="word" style="{shade}">{text}<small>{word.attention:.0%}</small></{tag}>')
    return " ".join(parts)


def name_masks(sentences: list[str]) -> list[str]:
    """Make one file name per sentence."""
    words = [re.sub(r"\W+", "-", sentence.lower()).strip("-")[:40] for sentence in sentences]
    return [f"{number}_{text}.png" for number, text in enumerate(words, start=1)]


def encode_mask(mask: np.ndarray) -> bytes:
    """Encode a mask as PNG, 255 inside and 0 outside."""
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(buffer, format="PNG")
    return buffer.getvalue()


def pack_masks(answer: Answer, segmentations: list[Segmentation]) -> bytes:
    """Make a ZIP file with one PNG per sentence."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, segmentation in zip(name_masks(answer.sentences), segmentations):
            archive.writestr(zipfile.ZipInfo(name), encode_mask(segmentation.mask))
    return buffer.getvalue()


def make_records(answer: Answer, segmentations: list[Segmentation]) -> list[dict[str, Any]]:
    """Make the API's results for each sentence, apart from the mask."""
    return [
        {
            "label": sentence,
            "score": round(segmentation.score, 4),
            "share": round(float(segmentation.mask.mean()), 4),
            "words": [{"word": word.text, "known": word.is_known, "attention": word.attention} for word in words],
            "unknown_words": list_unknown(words),
            "truncated": bool(list_cut(words)),
        }
        for sentence, words, segmentation in zip(answer.sentences, answer.words, segmentations)
    ]


def describe_model(segmenter: Segmenter, model_id: str) -> str:
    """Make Markdown about the model and the limits of the demo."""
    name = Path(model_id).name if Path(model_id).exists() else f"[{model_id}](https://huggingface.co/{model_id})"
    size = segmenter.model.num_parameters() / 1e6
    height, width = segmenter.input_size
    return f"Model: **{name}**, {size:.1f} M parameters, {width}x{height} pixels. {LIMITS}"


def list_unknown(words: list[Word]) -> list[str]:
    """The distinct words that the model reads as unknown."""
    return list(dict.fromkeys(word.text for word in words if not word.is_known))


def list_cut(words: list[Word]) -> list[str]:
    """The distinct words that the model does not read because the sentence is too long."""
    return list(dict.fromkeys(word.text for word in words if word.attention is None))


def ask(segmenter: Segmenter, path: str, text: str) -> Answer:
    """Check the input, run the model, and warn about words that it could not read."""
    answer = segmenter.ask(read_photo(path, segmenter.processor.image_processor), read_sentences(text))
    words = [word for words in answer.words for word in words]
    for names, problem in (
        (list_unknown(words), "The model does not know {}. Use other words."),
        (list_cut(words), "The sentence is too long, and {} was not read. Use fewer words."),
    ):
        if names:
            gr.Warning(problem.format(html.escape(", ".join(map(repr, names)))))
    return answer


class View(NamedTuple):
    """The page's content for an answer at a threshold."""

    overlay: Any = None  # (photo, [(mask, label), ...]) for gr.AnnotatedImage
    colors: dict[str, str] | None = None
    cards: str = ""
    archive: str | None = None  # path of a ZIP file

    def update(self) -> tuple[Any, Any, Any]:
        overlay = gr.AnnotatedImage(self.overlay, color_map=self.colors)
        return overlay, self.cards, gr.DownloadButton(value=self.archive, interactive=True)


def make_view(segmenter: Segmenter, answer: Answer, threshold: float) -> View:
    segmentations = segmenter.segment(answer, threshold)
    return View(
        overlay=draw_overlay(answer, segmentations),
        colors=dict(zip(make_labels(answer.sentences), COLORS)),
        cards=make_cards(segmenter, answer, segmentations),
        archive=save_bytes_to_cache(pack_masks(answer, segmentations), "masks.zip", get_upload_folder()),
    )


def run_in(thread: ThreadPoolExecutor, function: Callable[..., Any]) -> Callable[..., Any]:
    """
    Let a function of an event run in `thread`. PyTorch and malloc keep memory for each thread that computes, and Gradio
    runs events in 40.
    """

    @wraps(function)
    def run(*args: Any) -> Any:
        return thread.submit(copy_context().run, function, *args).result()

    return run


def add_endpoint(
    segmenter: Segmenter, inputs: list[gr.components.Component], thread: ThreadPoolExecutor, **model_run: Any
) -> None:
    """Add `/segment` to the API. It takes the page's inputs, so that files are checked in the same way."""

    def segment(photo: dict | None, sentences: str, threshold: float) -> tuple[list[dict[str, Any]], list[str]]:
        answer = ask(segmenter, get_path(photo), sentences)
        segmentations = segmenter.segment(answer, check_threshold(threshold))
        names, folder = name_masks(answer.sentences), get_upload_folder()
        masks = [encode_mask(segmentation.mask) for segmentation in segmentations]
        files = [save_bytes_to_cache(mask, name, folder) for mask, name in zip(masks, names)]
        return make_records(answer, segmentations), files

    with gr.Column(visible=False):
        outputs = [gr.JSON(label="results"), gr.File(label="masks", file_count="multiple")]
        call = run_in(thread, segment)
        gr.Button().click(call, inputs, outputs, api_name="segment", api_description=API_DESCRIPTION, **model_run)


def list_examples() -> list[list[str]]:
    """[path, sentences] of the example photos, if there are any."""
    entries = json.loads(EXAMPLES.read_text(encoding="utf-8")) if EXAMPLES.is_file() else []
    return [[str(PHOTOS / entry["photo"]), "\n".join(entry["texts"])] for entry in entries]


def add_vocabulary(segmenter: Segmenter) -> None:
    """List a vocabulary that is small enough to read."""
    words = segmenter.list_vocabulary()
    if len(words) <= MAX_LISTED_WORDS:
        with gr.Accordion(f"The {len(words)} words that this model knows", open=False):
            gr.Markdown(" · ".join(words))


def build_demo(segmenter: Segmenter, model_id: str) -> gr.Blocks:
    """Build the page, which initially shows the first example with its masks, and the API."""
    samples = list_examples()
    first_answer = ask(segmenter, *samples[0]) if samples else None
    first_photo, first_text = samples[0] if samples else (None, None)
    first = make_view(segmenter, first_answer, DEFAULT_THRESHOLD) if first_answer else View()

    with gr.Blocks(title="ReSTR", delete_cache=(SESSION_SECONDS, SESSION_SECONDS)) as demo:
        gr.HTML(HEADER)
        answer = gr.State(time_to_live=SESSION_SECONDS)
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                photo = gr.Image(first_photo, type="filepath", label="Photo", height=300, sources=SOURCES, buttons=[])
                sentences = gr.Textbox(
                    first_text, label="What do you mean? One sentence per line", lines=3, max_lines=9
                )
                button = gr.Button("Segment", variant="primary")
                inputs = [photo, sentences]
                examples = (
                    gr.Examples(samples, inputs, visible_columns=[0], api_visibility="private") if samples else None
                )
                add_vocabulary(segmenter)
            with gr.Column(scale=5, min_width=320):
                overlay = gr.AnnotatedImage(first.overlay, color_map=first.colors, label="Masks", elem_id="overlay")
                threshold = gr.Slider(0.01, 0.99, DEFAULT_THRESHOLD, step=0.01, label="Threshold", info=THRESHOLD_NOTE)
                download = gr.DownloadButton("Download the masks", first.archive, interactive=bool(samples), size="md")
        cards = gr.HTML(first.cards)
        gr.Markdown(describe_model(segmenter, model_id), elem_classes="footnote")

        page = Page(photo, sentences, threshold, answer, overlay, cards, download)
        add_events(segmenter, page, button, examples)
        # As the state's initial value, this answer would replace a user's own answer when that expires.
        demo.load(lambda: first_answer, None, answer, api_visibility="private")
    return demo.queue(max_size=MAX_WAITING)


class Page(NamedTuple):
    """The components that events read and update."""

    photo: gr.Image
    sentences: gr.Textbox
    threshold: gr.Slider
    answer: gr.State
    overlay: gr.AnnotatedImage
    cards: gr.HTML
    download: gr.DownloadButton


def add_events(segmenter: Segmenter, page: Page, button: gr.Button, examples: Any) -> None:
    """Connect the page and the API: asking, choosing an example, moving the slider."""

    def ask_and_show(photo: dict | None, sentences: str, threshold: float) -> tuple[Any, ...]:
        answer = ask(segmenter, get_path(photo), sentences)
        return answer, *make_view(segmenter, answer, check_threshold(threshold)).update()

    def check(photo: dict | None, sentences: str, threshold: float) -> list[dict]:
        """Report missing input next to its field, before the request enters the model's queue."""
        return [check_input(get_path, photo), check_input(read_sentences, sentences), gr.validate(True, "")]

    def show(answer: Answer | None, threshold: float) -> tuple[Any, ...]:
        if answer is None:
            raise refuse("There is no answer yet, or it has expired: press Segment.")
        return make_view(segmenter, answer, threshold).update()

    # All events that run the model share one queue. Two runs at a time would each take twice as long.
    model_thread, slider_thread = ThreadPoolExecutor(max_workers=1), ThreadPoolExecutor(max_workers=1)
    model_run: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "preprocess": False}
    inputs = [page.photo, page.sentences, page.threshold]
    outputs = [page.overlay, page.cards, page.download]
    asking: dict[str, Any] = {"inputs": inputs, "outputs": [page.answer, *outputs], "show_progress_on": page.overlay}
    asking |= {"validator": check, "api_visibility": "private", **model_run}
    run_model = run_in(model_thread, ask_and_show)
    answers = [gr.on([button.click, page.sentences.submit], run_model, **asking)]
    if examples is not None:
        answers.append(examples.load_input_event.success(run_model, **asking))
    for answered in answers:
        answered.success(None, js=SCROLL_TO_OVERLAY)
    moving: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    page.threshold.change(run_in(slider_thread, show), [page.answer, page.threshold], outputs, **moving)
    add_endpoint(segmenter, inputs, model_thread, **model_run)


def get_default_model() -> str:
    if SHIPPED_CHECKPOINT.is_dir():
        return str(SHIPPED_CHECKPOINT)
    return RepoCard.load(HERE / "README.md").data.models[0]


def launch(demo: gr.Blocks, **options: Any) -> tuple[Any, str, str]:
    """Serve the demo with its style and limits. It loads nothing from other hosts."""
    return demo.launch(
        theme=gr.themes.Default(primary_hue="sky", neutral_hue="slate", font=FONTS, font_mono=["monospace"]),
        css_paths=HERE / "style.css",
        max_file_size=MAX_FILE_SIZE,
        max_threads=MAX_THREADS,
        state_session_capacity=MAX_SESSIONS,
        footer_links=["api", "gradio"],
        run_history=False,
        **options,
    )


def main() -> None:
    model_id = os.environ.get("MODEL_ID") or get_default_model()
    launch(build_demo(Segmenter.from_pretrained(model_id), model_id))


if __name__ == "__main__":
    main()
