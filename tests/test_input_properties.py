"""The tokenizer, the processor, the pipeline and the endpoint's handler on any images, sentences and options."""

import base64
import io
import json
import re
import string
import unicodedata
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, strategies as st
from hypothesis.extra import numpy as np_st
from pictures import encode
from PIL import Image
from properties import (
    ANY_TEXT,
    JSON_VALUES,
    KNOWN_TEXT,
    PYTHON_VALUES,
    WHOLE_TEXT,
    attempt,
    cases,
    damaged,
    damaged_bytes,
)
from tiny_models import make_model, randomize

from modeling_restr import ReSTRImageProcessor, ReSTRProcessor, build_tokenizer
from modeling_restr.hub import save_bundle
from modeling_restr.hub.handler import EndpointHandler, RequestError
from modeling_restr.image_processing_restr import get_letterbox
from modeling_restr.pipeline_restr import ReSTRPipeline
from modeling_restr.tokenization_restr import (
    SPECIAL_TOKENS,
    add_words,
    read_vocabulary,
    split_expression,
    vocabulary_from_expressions,
)


pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = vocabulary_from_expressions(["the dog on the left of a red ball , . guy's 2 σας café 日"])
WORD_IDS = {number for word, number in VOCABULARY.items() if number > 3 and re.search(r"\w", word)}
TOKENIZER_WITHOUT_PUNCTUATION = build_tokenizer(VOCABULARY, drop_unknown_punctuation=True)
NUM_SLOTS = 20
# Sentences of known and unknown words, punctuation and spaces
_PIECES = st.one_of(st.sampled_from([*VOCABULARY, "Dog", " ", "  ", "\n", ". ", "...", "É"]), KNOWN_TEXT)
SENTENCES = st.lists(_PIECES, max_size=30).map(" ".join) | KNOWN_TEXT
SENTENCES_WITH_WORDS = SENTENCES.filter(split_expression)


@pytest.fixture(scope="module")
def pipe():
    processor = ReSTRProcessor(ReSTRImageProcessor(size=64), build_tokenizer(VOCABULARY))
    model = randomize(make_model(max(VOCABULARY.values()) + 1), seed=1)
    return ReSTRPipeline(model=model, processor=processor, device="cpu")


@pytest.fixture(scope="module")
def processor(pipe):
    return pipe.processor


def _simplify(word):
    return word.strip(string.punctuation + string.whitespace).lower().casefold()


@cases(300)
@given(SENTENCES)
def test_tokens_are_the_words_and_unknown_words_are_those_outside_the_vocabulary(processor, sentence):
    pieces = split_expression(sentence)
    ids = processor.tokenizer(sentence)["input_ids"]
    assert ids == [VOCABULARY.get(piece, SPECIAL_TOKENS["<unk>"]) for piece in pieces]
    words = [piece if piece in VOCABULARY else "<unk>" for piece in pieces]
    assert processor.tokenizer.convert_ids_to_tokens(ids) == words
    (lost,) = processor.find_lost_words([sentence])
    unknown = [piece for piece in pieces[:NUM_SLOTS] if piece not in VOCABULARY]
    assert bool(unknown) == bool(lost["unknown_words"])
    assert bool(pieces[NUM_SLOTS:]) == bool(lost["cut_words"])
    for piece in unknown:  # spelled as in the sentence
        assert any(_simplify(piece) in _simplify(word) for word in lost["unknown_words"])
    assert all(word in unicodedata.normalize("NFC", sentence) for word in lost["unknown_words"])
    warning = processor.describe_lost_words([lost])
    assert (warning is None) == (not unknown and len(pieces) <= NUM_SLOTS)


@cases(100)
@given(SENTENCES_WITH_WORDS)
def test_dropped_punctuation_loses_no_word(sentence):
    ids = TOKENIZER_WITHOUT_PUNCTUATION(sentence)["input_ids"]
    words = [piece for piece in split_expression(sentence) if re.search(r"\w", piece)]
    known = [VOCABULARY[word] for word in words if word in VOCABULARY]
    assert [number for number in ids if number in WORD_IDS] == known
    num_unknown = ids.count(SPECIAL_TOKENS["<unk>"])
    assert num_unknown >= len(words) - len(known) and len(ids) <= len(split_expression(sentence))
    assert words or ids  # a sentence of punctuation alone keeps one token


@cases(150)
@given(st.lists(SENTENCES_WITH_WORDS, min_size=1, max_size=4))
def test_sentences_are_encoded_the_same_alone_and_in_a_batch(processor, sentences):
    batch = processor(text=sentences, return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(sentences), NUM_SLOTS)
    assert batch["input_ids"].min() >= 0 and batch["input_ids"].max() <= max(VOCABULARY.values())
    for number, sentence in enumerate(sentences):
        alone = processor(text=sentence, return_tensors="pt")
        assert all(torch.equal(alone[name][0], batch[name][number]) for name in ("input_ids", "attention_mask"))
        num_words = min(len(split_expression(sentence)), NUM_SLOTS)
        assert alone["attention_mask"][0].tolist() == [0] * (NUM_SLOTS - num_words) + [1] * num_words


@cases(150)
@given(
    st.dictionaries(ANY_TEXT | st.sampled_from([*SPECIAL_TOKENS]), PYTHON_VALUES, max_size=4),
    st.booleans(),
    st.integers(1, 30) | PYTHON_VALUES,
)
def test_vocabularies_make_tokenizers_or_are_refused(others, with_special_tokens, max_length):
    vocabulary = {**others, **SPECIAL_TOKENS} if with_special_tokens else others
    tokenizer = attempt(build_tokenizer, vocabulary, max_length)
    if not isinstance(tokenizer, Exception):
        assert tokenizer.get_vocab() == vocabulary
        assert len(tokenizer("a dog", padding="max_length", truncation=True)["input_ids"]) == max_length


@cases(150)
@given(st.lists(WHOLE_TEXT, max_size=6), st.data())
def test_vocabulary_files_are_read_line_by_line_or_refused(tmp_path_factory, lines, data):
    content = "\n".join([*SPECIAL_TOKENS, *lines]).encode()
    path = tmp_path_factory.getbasetemp() / "vocabulary.txt"
    path.write_bytes(data.draw(damaged_bytes(content)))
    vocabulary = attempt(read_vocabulary, path)
    if isinstance(vocabulary, Exception):
        assert str(path) in str(vocabulary)
    else:
        words = [line.strip() for line in unicodedata.normalize("NFC", path.read_text(encoding="utf-8")).split("\n")]
        assert all(words[number] == word and word not in words[number + 1 :] for word, number in vocabulary.items())
        assert set(vocabulary) == {word for word in words if word}
        assert build_tokenizer(vocabulary).get_vocab() == vocabulary


@cases(100)
@given(st.lists(st.one_of(st.sampled_from(["dog", "Kitten", "2nd"]), WHOLE_TEXT), max_size=4))
def test_added_words_are_known_and_change_no_other(words):
    tokenizer = build_tokenizer(VOCABULARY)
    added = attempt(add_words, tokenizer, words)
    vocabulary = tokenizer.get_vocab()
    assert VOCABULARY.items() <= vocabulary.items() and len(set(vocabulary.values())) == len(vocabulary)
    if isinstance(added, Exception):
        assert vocabulary == VOCABULARY
    else:
        assert vocabulary.keys() - VOCABULARY.keys() == set(added)
        assert all(split_expression(word)[0] in vocabulary for word in words)


# Images


_MODES = (
    "1",
    "L",
    "P",
    "RGB",
    "RGBA",
    "LA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
    "RGBX",
    "PA",
    "La",
    "RGBa",
)
_SIDES = st.integers(1, 40) | st.sampled_from([1, 2, 300])


@st.composite
def pil_images(draw, modes=_MODES):
    size = draw(st.tuples(_SIDES, _SIDES))
    mode = draw(st.sampled_from(modes))
    num_bytes = len(Image.new(mode, size).tobytes())
    pattern = draw(st.binary(min_size=1, max_size=30))
    content = (pattern * (num_bytes // len(pattern) + 1))[:num_bytes]
    return Image.frombytes(mode, size, content)


_ARRAYS = st.tuples(
    st.sampled_from([bool, np.uint8, np.int32, np.uint16, np.int64, np.float16, np.float32, np.float64, "S1", object]),
    st.lists(st.integers(0, 6), max_size=5).map(tuple)
    | st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3, 4])),
).flatmap(lambda kind: np_st.arrays(kind[0], kind[1], elements=None if kind[0] is not object else st.none()))


def _to_tensor(array):
    return torch.from_numpy(array) if array.dtype.kind in "biuf" and array.dtype != np.uint16 else array


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
FILES = [encode(PHOTO, format) for format in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP")]
ANY_IMAGES = st.one_of(
    pil_images(),
    _ARRAYS,
    _ARRAYS.map(_to_tensor),
    st.sampled_from(FILES).flatmap(damaged_bytes),
    st.sampled_from(FILES).flatmap(damaged_bytes).map(lambda content: base64.b64encode(content).decode()),
    st.sampled_from(FILES).map(io.BytesIO),
    PYTHON_VALUES.filter(lambda value: "http" not in repr(value)),
)


def check_inputs(inputs, num_images, num_sentences):
    assert inputs["pixel_values"].shape == (num_images, 3, 64, 64) and inputs["pixel_values"].dtype == torch.float32
    assert inputs["pixel_values"].isfinite().all() and inputs["pixel_values"].abs().max() < 10
    assert inputs["original_sizes"].shape == (num_images, 2) and inputs["original_sizes"].min() >= 1
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (num_sentences, NUM_SLOTS)
    assert inputs["image_indices"].shape == (num_sentences,)
    assert inputs["image_indices"].max() < num_images


@cases(300)
@given(ANY_IMAGES.filter(lambda image: image is not None))
def test_images_of_any_kind_are_letterboxed_or_refused(processor, image):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = attempt(processor, images=image, text="the dog", return_tensors="pt")
    if not isinstance(inputs, Exception):
        num_images = len(inputs["pixel_values"])
        check_inputs(inputs, num_images, 1)
        assert num_images == 1 or isinstance(image, (list, tuple))
        for pixel_values, size in zip(inputs["pixel_values"], inputs["original_sizes"].tolist()):
            top, left, height, width = get_letterbox(size, (64, 64))
            outside = torch.ones(64, 64, dtype=torch.bool)
            outside[top : top + height, left : left + width] = False
            assert (pixel_values[:, outside] == -1).all()  # black


@cases(150)
@given(st.lists(pil_images(("RGB", "L", "RGBA", "I;16")), min_size=1, max_size=3), st.data())
def test_a_batch_of_images_is_the_images_one_by_one(processor, images, data):
    texts = [data.draw(st.lists(SENTENCES_WITH_WORDS, min_size=1, max_size=2)) for _ in images]
    inputs = processor(images=images, text=texts, return_tensors="pt")
    check_inputs(inputs, len(images), sum(map(len, texts)))
    assert inputs["image_indices"].tolist() == [index for index, row in enumerate(texts) for _ in row]
    for index, image in enumerate(images):
        alone = processor(images=image, text=texts[index], return_tensors="pt")
        assert inputs["original_sizes"][index].tolist() == [image.height, image.width]
        assert torch.equal(alone["pixel_values"][0], inputs["pixel_values"][index])
        assert torch.equal(alone["input_ids"], inputs["input_ids"][inputs["image_indices"] == index])


_TEXTS = st.one_of(SENTENCES, st.lists(SENTENCES | st.lists(SENTENCES, max_size=2), max_size=3), PYTHON_VALUES)


@cases(200)
@given(st.integers(0, 3), _TEXTS)
def test_texts_of_any_kind_are_encoded_or_refused(processor, num_images, text):
    images = [PHOTO] * num_images if num_images else None
    inputs = attempt(processor, images=images, text=text, return_tensors="pt")
    if not isinstance(inputs, Exception) and text is not None:
        rows = [text] if isinstance(text, str) else text
        sentences = [sentence for row in rows for sentence in ([row] if isinstance(row, str) else row)]
        assert inputs["input_ids"].shape == (len(sentences), NUM_SLOTS)
        if images:
            check_inputs(inputs, num_images, len(sentences))


_OPTIONS = {
    "size": 48,
    "resample": 2,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "pad_after_normalization": True,
    "jpeg_draft": True,
    "do_convert_rgb": True,
    "input_data_format": "channels_last",
    "padding": "max_length",
    "max_length": 20,
    "truncation": True,
    "return_attention_mask": True,
    "add_special_tokens": True,
}


@cases(200)
@given(damaged(_OPTIONS, PYTHON_VALUES), st.sampled_from([PHOTO, np.asarray(PHOTO), FILES[1]]))
def test_options_of_any_kind_are_followed_or_refused(processor, options, image):
    sizes = options.get("size")
    assume(not (isinstance(sizes, (int, float)) and sizes > 1000))  # would need much memory
    inputs = attempt(processor, images=image, text="the dog", return_tensors="pt", **options)
    if not isinstance(inputs, Exception):
        assert inputs["pixel_values"].ndim == 4 and inputs["pixel_values"].isfinite().all()
        assert inputs["original_sizes"].tolist() == [[30, 50]]


@cases(150)
@given(pil_images(("RGB",)), st.data())
def test_masks_are_letterboxed_with_their_image(processor, image, data):
    size = (image.height, image.width)
    mask = data.draw(np_st.arrays(bool, size, elements=st.booleans(), fill=st.booleans()))
    labels = processor(images=image, text="dog", segmentation_maps=[mask], return_tensors="pt")["labels"][0]
    assert labels.shape == (64, 64) and set(labels.unique().tolist()) <= {0, 1}
    top, left, height, width = get_letterbox(size, (64, 64))
    inside = labels[top : top + height, left : left + width]
    assert inside.sum() == labels.sum()
    if mask.all() or not mask.any():
        assert (inside == int(mask.all())).all()
    assert mask.any() or not labels.any()


_OWN_SIZE = np_st.arrays(st.sampled_from([bool, np.uint8, np.int64, np.float32]), (30, 50), fill=st.just(0))
_MAPS = st.one_of(
    _OWN_SIZE,
    _OWN_SIZE.map(torch.from_numpy),
    _OWN_SIZE.map(lambda array: Image.fromarray(array.astype(np.uint8))),
    _ARRAYS,
    _ARRAYS.map(_to_tensor),
    pil_images(),
    PYTHON_VALUES,
)


@cases(150)
@given(st.one_of(_MAPS.filter(lambda maps: maps is not None), st.lists(_MAPS, max_size=3)))
def test_segmentation_maps_of_any_kind_become_labels_or_are_refused(processor, maps):
    inputs = attempt(processor, images=PHOTO, text=["dog", "left"], segmentation_maps=maps, return_tensors="pt")
    if not isinstance(inputs, Exception):
        assert inputs["labels"].shape == (2, 64, 64) and set(inputs["labels"].unique().tolist()) <= {0, 1}


@cases(150)
@given(np_st.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40))))
def test_masks_at_the_canvas_size_survive_labels_and_post_processing(mask):
    processor = ReSTRImageProcessor(size={"height": mask.shape[0], "width": mask.shape[1]})
    image = np.zeros((*mask.shape, 3), dtype=np.uint8)
    labels = processor(image, [mask], return_tensors="pt")["labels"]
    np.testing.assert_array_equal(labels[0], mask)
    outputs = SimpleNamespace(logits=labels * 20.0 - 10)
    (result,) = processor.post_process_referring_segmentation(outputs, [mask.shape])
    np.testing.assert_array_equal(result["mask"], mask)
    assert result["score"] == pytest.approx(torch.tensor(10.0).sigmoid().item() if mask.any() else 0.0)


_LOGITS = st.one_of(
    np_st.arrays(np.float32, st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 9))).map(torch.from_numpy),
    np_st.arrays(np.float32, (2, 8, 8), elements=st.floats(-50, 50, width=32)).map(torch.from_numpy),
    PYTHON_VALUES,
)
_TARGET_SIZES = st.one_of(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=3),
    st.just(torch.tensor([[30, 50], [7, 5]])),
    st.lists(st.lists(st.integers(-1, 50) | PYTHON_VALUES, max_size=3) | PYTHON_VALUES, max_size=3),
    PYTHON_VALUES,
)


@cases(300)
@given(_LOGITS, _TARGET_SIZES, st.floats(0, 1) | PYTHON_VALUES, st.sampled_from([None, 64]) | PYTHON_VALUES)
def test_logits_of_any_kind_become_masks_or_are_refused(processor, logits, sizes, threshold, size):
    def is_large(value):
        return isinstance(value, (list, tuple)) and any(
            is_large(item) or _is_number_above(item, 2000) for item in value
        )

    assume(not is_large([sizes, size]))  # would need much memory
    outputs = SimpleNamespace(logits=logits)
    results = attempt(processor.post_process_referring_segmentation, outputs, sizes, threshold, size=size)
    if not isinstance(results, Exception):
        assert len(results) == len(logits) == len(sizes)
        for result, target_size in zip(results, torch.as_tensor(sizes).tolist()):
            assert list(result["mask"].shape) == list(result["probabilities"].shape) == target_size
            assert result["mask"].dtype == torch.bool and 0 <= result["score"] <= 1
            assert result["score"] > 0 or not result["mask"].any()


def _is_number_above(value, limit):
    return isinstance(value, (int, float)) and abs(value) > limit


# The pipeline


def check_results(results, image_size, sentences):
    assert [result["label"] for result in results] == sentences
    for result in results:
        mask = np.asarray(result["mask"])
        assert mask.shape == image_size and mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 255}
        assert 0 <= result["score"] <= 1 and (result["score"] > 0) == mask.any()
        pieces = split_expression(result["label"])
        assert result["truncated"] == (len(pieces) > NUM_SLOTS)
        assert bool(result["unknown_words"]) == any(piece not in VOCABULARY for piece in pieces[:NUM_SLOTS])


@pytest.mark.slow
@cases(60)
@given(
    st.lists(
        st.tuples(
            pil_images(("RGB", "L", "RGBA")), st.lists(SENTENCES_WITH_WORDS, min_size=1, max_size=2), st.booleans()
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 4),
)
def test_a_pipeline_answers_the_same_alone_and_in_batches(pipe, items, batch_size):
    rows = [
        {"image": pipe.encode_image(image) if is_encoded else image, "text": texts}
        for image, texts, is_encoded in items
    ]
    for (image, texts, _), results in zip(items, pipe(rows, batch_size=batch_size), strict=True):
        check_results(results, (image.height, image.width), texts)
        for text, result in zip(texts, results):
            (alone,) = pipe(image, text=text)
            assert alone["unknown_words"] == result["unknown_words"]
            differing = np.asarray(alone["mask"]) != np.asarray(result["mask"])
            assert differing.sum() <= max(0.005 * differing.size, 1)  # a pixel may be at the threshold
            assert differing.any() or alone["score"] == pytest.approx(result["score"], abs=1e-3)


@cases(150)
@given(
    st.one_of(
        ANY_IMAGES,
        st.lists(damaged({"image": "photo", "text": "the dog"}, PYTHON_VALUES), max_size=2),
        damaged({"image": "photo", "text": ["the dog"]}, PYTHON_VALUES),
    ),
    st.none() | _TEXTS,
    st.fixed_dictionaries({}, optional={"threshold": st.floats(0, 1) | JSON_VALUES, "batch_size": JSON_VALUES}),
)
def test_a_pipeline_answers_or_refuses_any_arguments(pipe, image, text, options):
    def put_photos(value):
        if isinstance(value, dict):
            return {name: PHOTO if item == "photo" else item for name, item in value.items()}
        return [put_photos(item) for item in value] if isinstance(value, list) else value

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = attempt(pipe, put_photos(image), text=text, **options)
    if not isinstance(results, Exception):
        flat = [one for result in results for one in (result if isinstance(result, list) else [result])]
        assert all(0 <= result["score"] <= 1 and result["mask"].mode == "L" for result in flat)


# The endpoint's handler


@pytest.fixture(scope="module")
def handler(pipe, tmp_path_factory):
    folder = save_bundle(pipe.model, pipe.processor, tmp_path_factory.mktemp("model"), include_code=False)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # a handler sets it for its process
        yield EndpointHandler(str(folder))


_REQUEST = {
    "inputs": base64.b64encode(FILES[0]).decode(),
    "text": ["the dog", "the left ball"],
    "parameters": {"threshold": 0.4},
}


def _answer(handler, request):
    """The answer to a request, None if it is refused. Errors of the server itself are not caught."""
    answer = attempt(handler, request)
    assert not isinstance(answer, Exception) or isinstance(answer, RequestError)
    return None if isinstance(answer, Exception) else answer


@cases(200)
@given(st.one_of(damaged(_REQUEST), damaged(_REQUEST, PYTHON_VALUES), JSON_VALUES))
def test_a_handler_answers_or_refuses_any_request(handler, request):
    answer = _answer(handler, request)
    if answer is not None:
        json.dumps(answer)
        for result in answer:
            with Image.open(io.BytesIO(base64.b64decode(result["mask"]))) as mask:
                assert (mask.format, mask.mode) == ("PNG", "L")
            assert 0 <= result["score"] <= 1


@cases(150)
@given(st.sampled_from(FILES).flatmap(damaged_bytes), SENTENCES, st.booleans())
def test_a_handler_answers_or_refuses_any_file_and_sentence(handler, content, sentence, as_text):
    inputs = base64.b64encode(content).decode() if as_text else content
    answer = _answer(handler, {"inputs": inputs, "text": [sentence]})
    if answer is not None:
        assert [result["label"] for result in answer] == [sentence]
