import base64
import copy
import dataclasses
import io
import pickle

import datasets
import numpy as np
import pytest
import torch
from pictures import encode, make_exif
from PIL import Image
from tiny_models import make_model, randomize
from torch.utils.data import Dataset
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from modeling_restr import (
    ReSTRImageProcessor,
    ReSTRProcessor,
    UnreadableImageError,
    build_tokenizer,
    pipeline_restr,
)
from modeling_restr.modeling_restr import ReSTRDropPath
from modeling_restr.pipeline_restr import EncodedImage, ReSTRPipeline
from modeling_restr.tokenization_restr import vocabulary_from_expressions


SENTENCES = ["the dog on the left", "a red ball", "the man", "left dog"]


@pytest.fixture(scope="module")
def pipe():
    vocabulary = vocabulary_from_expressions(SENTENCES)
    processor = ReSTRProcessor(ReSTRImageProcessor(size=64), build_tokenizer(vocabulary))
    return ReSTRPipeline(model=randomize(make_model(len(vocabulary)), seed=1), processor=processor, device="cpu")


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(0)
    coarse = [generator.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in range(3)]
    return [Image.fromarray(array).resize(size) for array, size in zip(coarse, [(90, 50), (31, 77), (64, 64)])]


@pytest.fixture
def seen(pipe):
    """Record the shapes of the pixel values of every call of the vision encoder."""
    shapes = []
    vision_model = pipe.model.model.vision_model
    hook = vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple((args[0] if args else kwargs["pixel_values"]).shape)),
        with_kwargs=True,
    )
    yield shapes
    hook.remove()


def by_hand(pipe, image, sentence):
    """Mask and score from processor and model, without the pipeline."""
    inputs = pipe.processor(images=image, text=sentence, return_tensors="pt")
    with torch.no_grad():
        outputs = pipe.model(**inputs)
    (result,) = pipe.processor.post_process_referring_segmentation(outputs, [(image.height, image.width)])
    return result["mask"].numpy(), result["score"]


def agree(result, expected, share=0.999):
    """Whether two results are equal except for pixels that float32 noise may change."""
    masks = [np.asarray(r["mask"]) for r in (result, expected)]
    same_mask = masks[0].shape == masks[1].shape and (masks[0] == masks[1]).mean() >= share
    return result["label"] == expected["label"] and same_mask and abs(result["score"] - expected["score"]) < 1e-4


def test_one_sentence_is_what_processor_and_model_give(pipe, images):
    shares = []
    for image in images:
        results = pipe(image, text="the dog on the left")
        assert isinstance(results, list) and len(results) == 1
        (result,) = results
        mask, score = by_hand(pipe, image, "the dog on the left")
        assert set(result) == {"label", "score", "mask", "unknown_words", "truncated"}
        assert result["label"] == "the dog on the left"
        assert result["unknown_words"] == [] and result["truncated"] is False
        assert isinstance(result["score"], float) and result["score"] == pytest.approx(score, abs=1e-6)
        assert result["mask"].mode == "L" and result["mask"].size == image.size
        np.testing.assert_array_equal(np.asarray(result["mask"]), mask * np.uint8(255))
        shares.append(mask.mean())
    assert 0.02 < shares[0] < 0.98 and 0.02 < shares[2] < 0.98  # masks of this model are neither empty nor full


def test_a_model_in_training_mode_gives_the_same_answers(pipe, images):
    model = copy.deepcopy(pipe.model).train()
    for module in model.modules():
        if isinstance(module, ReSTRDropPath):
            module.rate = 0.9
    trained = ReSTRPipeline(model=model, processor=pipe.processor, device="cpu")
    assert trained(images[0], text=SENTENCES) == pipe(images[0], text=SENTENCES)


def test_many_sentences_encode_the_image_once(pipe, images, seen, caplog):
    results = pipe(images[0], text=SENTENCES)
    assert seen == [(1, 3, 64, 64)] and warnings_of(caplog) == []
    assert all(agree(*pair) for pair in zip(pipe({"image": images[0], "text": SENTENCES}), results))
    assert [result["label"] for result in results] == SENTENCES
    singles = [pipe(images[0], text=sentence)[0] for sentence in SENTENCES]
    assert all(agree(*pair) for pair in zip(results, singles))
    assert not agree(results[0] | {"label": ""}, results[1] | {"label": ""})


def test_any_number_of_sentences_is_decoded_a_few_at_a_time(pipe, images, seen, monkeypatch):
    expected = pipe(images[0], text=SENTENCES)
    decoded = []
    hook = pipe.model.pixel_decoder.register_forward_pre_hook(
        lambda module, args: decoded.append(len(args[2]))  # the patch logits
    )
    monkeypatch.setattr(pipeline_restr, "_SENTENCES_AT_A_TIME", 3)
    results = pipe(images[0], text=SENTENCES)
    hook.remove()
    assert decoded == [3, 1] and len(seen) == 2
    for result, wanted in zip(results, expected, strict=True):
        assert result["label"] == wanted["label"]
        assert result["score"] == pytest.approx(wanted["score"], abs=1e-5)
        assert (np.asarray(result["mask"]) != np.asarray(wanted["mask"])).mean() < 0.002


def test_batches_keep_images_and_their_sentences_together(pipe, images, seen):
    texts = [SENTENCES[0], SENTENCES[:3], SENTENCES[1:3]] * 2
    items = [{"image": image, "text": text} for image, text in zip(images * 2, texts)]
    singles = [pipe(**item) for item in items]
    seen.clear()
    for batch_size, calls in ((1, [1] * 6), (4, [4, 2]), (6, [6]), (10, [6])):
        results = pipe(items, batch_size=batch_size)
        assert [shape[0] for shape in seen] == calls
        assert [len(result) for result in results] == [1, 3, 2] * 2
        for result, single in zip(results, singles):
            assert all(agree(*pair) for pair in zip(result, single))
        seen.clear()


def test_an_encoded_image_is_asked_about_as_often_as_one_likes(pipe, images, seen):
    encoded = pipe.encode_image(images[0])
    assert isinstance(encoded, EncodedImage) and seen == [(1, 3, 64, 64)]
    assert (encoded.size, encoded.input_size) == ((50, 90), (64, 64))
    features = pipe.model.get_image_features(pipe.processor(images=images[0], return_tensors="pt")["pixel_values"])
    np.testing.assert_array_equal(encoded.vision_embeds, features.pooler_output[0].detach().numpy())
    expected = pipe(images[0], text=SENTENCES)
    seen.clear()
    copied = pickle.loads(pickle.dumps(encoded))
    item, other = {"image": encoded, "text": SENTENCES}, {"image": copied, "text": SENTENCES}
    calls = [pipe(encoded, text=SENTENCES), pipe(item), *pipe(iter([item])), *pipe([item, other], num_workers=1)]
    calls.append([result for sentence in SENTENCES for result in pipe(copied, text=sentence)])
    assert seen == []
    for results in calls:
        assert all(agree(*pair) for pair in zip(results, expected, strict=True))


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_encoded_and_other_images_share_batches(pipe, images, seen, batch_size):
    texts = [SENTENCES[0], SENTENCES[:3], SENTENCES[1:3]]
    expected = [pipe(image, text=text) for image, text in zip(images, texts)]
    mixed = [images[0], pipe.encode_image(images[1]), images[2]]
    seen.clear()
    results = pipe([{"image": image, "text": text} for image, text in zip(mixed, texts)], batch_size=batch_size)
    assert sum(shape[0] for shape in seen) == 2
    for result, other in zip(results, expected, strict=True):
        assert all(agree(*pair) for pair in zip(result, other, strict=True))


def test_images_that_another_model_encoded_are_refused(pipe, images):
    encoded = pipe.encode_image(images[0])
    expected = pipe(images[0], text="the man")
    same = ReSTRPipeline(model=copy.deepcopy(pipe.model), processor=pipe.processor, device="cpu")
    assert agree(same(encoded, text="the man")[0], expected[0], share=1)
    torch.nn.init.ones_(same.model.pixel_decoder.head.weight)  # not of the image encoder
    same(encoded, text="the man")
    with torch.no_grad():
        same.model.model.vision_model.layer_norm.bias.add_(0.1)
    for image, error in ((encoded, "^Expected"), ([images[0], encoded], "^Item 1: Expected")):
        with pytest.raises(ValueError, match=f"{error} an image that this pipeline's .*, or of this one with other"):
            same(image, text="the man")
    moved = dataclasses.replace(encoded, input_size=(96, 96))
    with pytest.raises(ValueError, match=r"\(height, width\) \(64, 64\), got one at \(96, 96\)"):
        pipe(moved, text="the man")


def test_kinds_of_images(pipe, images, tmp_path):
    image = images[0]
    path = tmp_path / "photo.png"
    image.save(path)
    array = np.asarray(image)
    expected = pipe(image, text="the man")
    content = path.read_bytes()
    just_written = io.BytesIO()
    just_written.write(content)
    data_uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    kinds = [str(path), path, array, array / 255, torch.tensor(array).permute(2, 0, 1)]
    kinds += [content, bytearray(content), memoryview(content), io.BytesIO(content), just_written, data_uri]
    with path.open("rb") as file:
        assert agree(pipe(file, text="the man")[0], expected[0], share=1)
        assert agree(pipe({"image": file, "text": "the man"})[0], expected[0], share=1)
    for kind in kinds:
        assert agree(pipe(kind, text="the man")[0], expected[0], share=1)
    for results in (pipe(kinds, text="the man"), pipe(tuple(kinds), text="the man", batch_size=3)):
        assert all(agree(result[0], expected[0]) for result in results)


def test_masks_have_the_size_that_a_viewer_shows(pipe, images, tmp_path):
    images[0].transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=make_exif(6))
    (turned,) = pipe(str(tmp_path / "turned.png"), text="the man")
    assert turned["mask"].size == images[0].size
    assert agree(turned, pipe(images[0], text="the man")[0], share=1)


def test_images_that_cannot_be_read_are_named(pipe, images, tmp_path):
    path = tmp_path / "cut.png"
    images[0].save(path)
    content = path.read_bytes()[:-200]
    path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=r"^'.*cut\.png' cannot be read: "):
        pipe(path, text="the man")
    with pytest.raises(UnreadableImageError, match=r"^The image cannot be read: "):
        pipe(content, text="the man")
    for several in ([images[0], path], Rows([images[0], path])):
        with pytest.raises(UnreadableImageError, match=r"^Item 1: '.*cut\.png' cannot be read: "):
            list(pipe(several, **({} if isinstance(several, Rows) else {"text": "the man"})))
    with pytest.raises(UnreadableImageError, match=r"^Item 1: The image cannot be read: "):
        list(pipe(iter([{"image": image, "text": "the man"} for image in (images[0], content)])))
    with pytest.raises(UnreadableImageError, match="Item 1: The image cannot be read: "):
        pipe([images[0], content], text="the man", num_workers=1)
    with pytest.raises(ValueError, match="Item 2: Expected sentences with at least one word"):
        pipe([{"image": images[0], "text": text} for text in ("dog", "dog", " ")])


def test_datasets_that_cannot_decode_an_image_name_its_row(pipe, images):
    whole = encode(images[0])
    contents = [{"bytes": content, "path": None} for content in (whole, whole[:-200])]
    rows = datasets.Dataset.from_dict({"image": contents, "text": ["the man"] * 2}).cast_column(
        "image", datasets.Image()
    )
    with pytest.raises(UnreadableImageError, match="Item 1 cannot be read: "):
        list(pipe(rows))


def test_lists_that_hold_themselves_are_refused(pipe, images):
    endless: list = [images[0]]
    endless.append(endless)
    with pytest.raises(ValueError, match="Item 1: Expected images in lists"):
        pipe(endless, text="the man")


LOST = ["xyzzy dog", "the man", "dog " * 20 + "zzz", "Xyzzy"]


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_lost_words_are_in_the_results_and_in_one_warning(pipe, images, caplog):
    results = pipe(images[0], text=LOST)
    assert [result["unknown_words"] for result in results] == [["xyzzy"], [], [], ["Xyzzy"]]
    assert [result["truncated"] for result in results] == [False, False, True, False]
    (warning,) = warnings_of(caplog)
    assert all(f"'{word}'" in warning for word in ("xyzzy", "Xyzzy", "zzz"))


@pytest.mark.parametrize("kind", [list, iter])
def test_one_warning_for_all_images_of_a_call(pipe, images, caplog, kind):
    items = [{"image": image, "text": text} for image, text in zip(images * 2, LOST)]
    results = list(pipe(kind(items), batch_size=2))
    assert [result[0]["unknown_words"] for result in results] == [["xyzzy"], [], [], ["Xyzzy"]]
    (warning,) = warnings_of(caplog)
    assert all(f"'{word}'" in warning for word in ("xyzzy", "Xyzzy", "zzz"))


def test_generators_are_read_one_item_at_a_time(pipe, images):
    read = []

    def items():
        for image in images:
            read.append(image)
            yield {"image": image, "text": SENTENCES[:2]}

    results = pipe(items())
    next(results)
    assert len(read) < 3
    assert len(list(results)) == 2
    assert [len(result) for result in pipe(iter(list(items())), batch_size=2)] == [2, 2, 2]


class Rows(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "text": SENTENCES[index], "row": index}


def test_datasets(pipe, images):
    expected = [pipe(image, text=sentence)[0] for image, sentence in zip(images, SENTENCES)]
    assert all(agree(r[0], e) for r, e in zip(pipe(Rows(images), batch_size=2), expected))
    results = list(pipe(KeyDataset(Rows(images), "image"), text=SENTENCES[:2]))
    assert [[r["label"] for r in result] for result in results] == [SENTENCES[:2]] * 3
    assert agree(results[0][0], expected[0])


def test_datasets_of_the_library_datasets(pipe, images):
    rows = datasets.Dataset.from_list([{"image": image, "text": SENTENCES[0]} for image in images])
    rows = rows.cast_column("image", datasets.Image())
    expected = [pipe(image, text=SENTENCES[0])[0] for image in images]
    assert all(agree(result[0], e) for result, e in zip(pipe(rows), expected, strict=True))
    assert all(agree(result[0], e) for result, e in zip(pipe(rows["image"], text=SENTENCES[0]), expected, strict=True))


def test_an_empty_list_has_no_results(pipe):
    assert pipe([]) == []


def test_threshold(pipe, images):
    (everything,), (nothing,) = (pipe(images[0], text="the man", threshold=t) for t in (0, 1))
    assert np.asarray(everything["mask"]).min() == 255
    assert np.asarray(nothing["mask"]).max() == 0 and nothing["score"] == 0.0


def test_progress_shows_for_long_lists(pipe, images, capsys):
    item = {"image": images[0], "text": "the man"}
    for count, option, shown in ((2, None, False), (20, None, True), (20, False, False), (2, True, True)):
        results = pipe([item] * count, batch_size=10, **({} if option is None else {"show_progress": option}))
        assert len(results) == count
        assert (f"{count}/{count}" in capsys.readouterr().err) is shown


def test_bfloat16_and_no_gradients(pipe, images):
    low = ReSTRPipeline(model=copy.deepcopy(pipe.model).bfloat16(), processor=pipe.processor, device="cpu")
    dtypes = []
    low.model.register_forward_hook(
        lambda module, args, outputs: dtypes.append((outputs.logits.dtype, torch.is_inference_mode_enabled()))
    )
    results = low(images[0], text=SENTENCES)
    assert dtypes == [(torch.bfloat16, True)]
    expected = pipe(images[0], text=SENTENCES)
    assert np.mean([np.mean(np.asarray(r["mask"]) == np.asarray(e["mask"])) for r, e in zip(results, expected)]) > 0.9


def test_parameters_of_the_constructor_are_defaults_of_calls(pipe, images):
    strict = ReSTRPipeline(
        model=pipe.model, processor=pipe.processor, device="cpu", threshold=1, local_files_only=True
    )
    assert strict(images[0], text="the man")[0]["score"] == 0.0
    assert strict(images[0], text="the man", threshold=0.5)[0]["score"] > 0.5


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda pipe, image: pipe(image), "Expected a sentence or a list of them as text, got None"),
        (lambda pipe, image: pipe(image, text=3), "as text, got 3"),
        (lambda pipe, image: pipe(image, text=""), "at least one word, got ''"),
        (lambda pipe, image: pipe(image, text=["the man", "  "]), "at least one word, got '  '"),
        (lambda pipe, image: pipe(image, text=[]), "non-empty lists of sentences"),
        (lambda pipe, image: pipe(image, text=[["the man"]]), "of type list"),
        (lambda pipe, image: pipe(None, text="the man"), "got NoneType"),
        (lambda pipe, image: pipe("no_such_photo.jpg", text="the man"), "no_such_photo.jpg"),
        (lambda pipe, image: pipe([image, image], text=["the man", "a red ball"]), "2 images and 2 sentences"),
        (lambda pipe, image: pipe({"image": image}), r"got the keys \['image'\]"),
        (lambda pipe, image: pipe([{"image": image, "text": "a man"}], text="the man"), "no other text"),
        (lambda pipe, image: pipe({"image": [image, image], "text": "a man"}), "2 images and 1 lists"),
        (lambda pipe, image: pipe(image, text="the man", treshold=0.3), "show_progress, got treshold"),
        (lambda pipe, image: pipe(image, text="the man", threshold=50), "from 0 to 1, got 50"),
    ],
)
def test_bad_input_is_explained(pipe, images, call, message):
    with pytest.raises(ValueError, match=message):
        call(pipe, images[0])


def test_words_without_a_vector_are_explained(pipe, images):
    tokenizer = build_tokenizer(vocabulary_from_expressions([*SENTENCES, "zebra"]))
    processor = ReSTRProcessor(pipe.processor.image_processor, tokenizer)
    with pytest.raises(ValueError, match=r"ids below \d+, .*resize_token_embeddings"):
        ReSTRPipeline(model=pipe.model, processor=processor, device="cpu")(images[0], text="a zebra")


def test_iterator_is_read_once_with_several_workers(pipe, images):
    rows = [{"image": images[0], "text": f"dog {number}"} for number in range(4)]
    results = list(pipe((row for row in rows), num_workers=2))
    assert [result[0]["label"] for result in results] == [row["text"] for row in rows]


def test_a_saved_pipeline_loads_as_a_pipeline(pipe, images, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert {"model.safetensors", "pipeline_restr.py", "processor_config.json"} <= {p.name for p in tmp_path.iterdir()}
    again = pipeline("referring-image-segmentation", model=str(tmp_path), device="cpu")
    assert isinstance(again, ReSTRPipeline)
    assert again(images[0], text=SENTENCES) == pipe(images[0], text=SENTENCES)
