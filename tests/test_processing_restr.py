from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from modeling_restr.image_processing_restr import ReSTRImageProcessor
from modeling_restr.processing_restr import ReSTRProcessor
from modeling_restr.tokenization_restr import build_tokenizer, vocabulary_from_expressions


SENTENCES = ["the dog on the left", "the red ball", "a man", "left dog, not the right one", "ball"]


@pytest.fixture(scope="module")
def processor():
    tokenizer = build_tokenizer(vocabulary_from_expressions(SENTENCES))
    return ReSTRProcessor(ReSTRImageProcessor(size=64), tokenizer)


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((20, 30), (25, 10))]


def ids_of(processor, sentences):
    return processor.tokenizer(sentences, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]


# Shapes of calls: images (an index into the fixture, or a list of them), text, sentences in order, their images.
CALLS = {
    "one image, one sentence": (0, "the dog", ["the dog"], [0]),
    "one image, a list of one": (0, ["the dog"], ["the dog"], [0]),
    "one image, many sentences": (0, SENTENCES, SENTENCES, [0] * 5),
    "a list of one image, many sentences": ([0], SENTENCES, SENTENCES, [0] * 5),
    "one image, a list of a list": (0, [SENTENCES], SENTENCES, [0] * 5),
    "two images, two sentences": ([0, 1], ["a man", "ball"], ["a man", "ball"], [0, 1]),
    "two images, two lists": ([0, 1], [["a man"], ["ball", "the dog"]], ["a man", "ball", "the dog"], [0, 1, 1]),
    "tuples": ((0, 1), (("a man", "ball"), ("the dog",)), ["a man", "ball", "the dog"], [0, 0, 1]),
}


@pytest.mark.parametrize("call", CALLS)
def test_shapes_of_calls(processor, images, call):
    chosen, text, sentences, image_indices = CALLS[call]
    chosen = [images[index] for index in chosen] if isinstance(chosen, (list, tuple)) else images[chosen]
    inputs = processor(images=chosen, text=text, return_tensors="pt")
    assert set(inputs) == {"pixel_values", "original_sizes", "input_ids", "attention_mask", "image_indices"}
    expected = processor.image_processor(chosen, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert torch.equal(inputs["original_sizes"], expected["original_sizes"])
    assert torch.equal(inputs["input_ids"], ids_of(processor, sentences))
    assert torch.equal(inputs["attention_mask"], (inputs["input_ids"] != 0).long())
    assert inputs["image_indices"].tolist() == image_indices and inputs["image_indices"].dtype == torch.int64


def test_input_names_are_those_of_the_outputs(processor, images):
    inputs = processor(images=images, text=SENTENCES[:2])
    assert set(processor.model_input_names) == set(inputs) and len(processor.model_input_names) == len(inputs)


def test_images_or_text_alone(processor, images):
    assert set(processor(images=images)) == {"pixel_values", "original_sizes"}
    for text in ("the dog", ["the dog"]):
        inputs = processor(text=text, return_tensors="pt")
        assert set(inputs) == {"input_ids", "attention_mask"}
        assert inputs["input_ids"].shape == (1, 20)
    nested = processor(text=[["the dog", "ball"], ["a man"]], return_tensors="pt")
    assert nested["image_indices"].tolist() == [0, 0, 1]


def test_sentences_fill_all_word_slots(processor):
    inputs = processor(text=["dog", "dog " * 30])
    assert [len(ids) for ids in inputs["input_ids"]] == [20, 20]
    assert inputs["attention_mask"] == [[0] * 19 + [1], [1] * 20]


def test_return_types(processor, images):
    for kind, array in ((None, list), ("np", np.ndarray), ("pt", torch.Tensor)):
        inputs = processor(images=images, text=["a man", "ball"], return_tensors=kind)
        assert all(isinstance(value, array) for value in inputs.values())


def test_options_reach_the_image_processor_and_the_tokenizer(processor, images):
    inputs = processor(images=images[0], text="a man", size={"height": 32, "width": 48}, max_length=5)
    assert np.shape(inputs["pixel_values"]) == (1, 3, 32, 48)
    assert np.shape(inputs["input_ids"]) == (1, 5)
    nested = processor(images=images[0], images_kwargs={"pad_after_normalization": True}, return_tensors="np")
    assert nested["pixel_values"][0, 0, 0, 0] == 0


@pytest.mark.parametrize("nested", [False, True])
def test_labels_follow_their_images(processor, images, nested):
    masks = [
        np.random.default_rng(seed).random(size) > 0.5 for seed, size in enumerate([(20, 30), (20, 30), (25, 10)])
    ]
    text = [["a man", "ball"], ["the dog"]]
    maps = [masks[:2], masks[2:]] if nested else masks
    labels = processor(images=images, text=text, segmentation_maps=maps, return_tensors="pt")["labels"]
    assert labels.shape == (3, 64, 64)
    for label, mask, index in zip(labels, masks, [0, 0, 1], strict=True):
        single = processor(images=images[index], text="a man", segmentation_maps=mask, return_tensors="pt")["labels"]
        assert torch.equal(single[0], label)


def test_post_processing_of_one_image_with_many_sentences(processor, images):
    inputs = processor(images=images, text=[["a man", "ball"], ["the dog"]], return_tensors="pt")
    sizes = inputs["original_sizes"][inputs["image_indices"]]
    logits = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    results = processor.post_process_referring_segmentation(SimpleNamespace(logits=logits), sizes, threshold=0.4)
    assert [tuple(result["mask"].shape) for result in results] == [(20, 30), (20, 30), (25, 10)]
    alone = processor.image_processor.post_process_referring_segmentation(
        SimpleNamespace(logits=logits[2:]), [(25, 10)], threshold=0.4
    )
    assert torch.equal(results[2]["mask"], alone[0]["mask"]) and results[2]["score"] == alone[0]["score"]
    (short,) = processor.post_process_referring_segmentation(
        SimpleNamespace(logits=logits[:1]), sizes[:1], return_probabilities=False, size=64
    )
    assert set(short) == {"mask", "score"}


def test_saves_and_reloads(processor, images, tmp_path):
    processor.save_pretrained(tmp_path)
    reloaded = ReSTRProcessor.from_pretrained(tmp_path)
    assert reloaded.to_dict() == processor.to_dict()
    expected, inputs = (p(images=images, text=["a man", "ball"], return_tensors="pt") for p in (processor, reloaded))
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == processor.tokenizer.get_vocab()


def test_files_do_not_depend_on_earlier_calls(processor, tmp_path):
    files = []
    for padding in ("max_length", "longest", True):
        before = processor.tokenizer.backend_tokenizer.to_str()
        processor.save_pretrained(tmp_path)
        assert processor.tokenizer.backend_tokenizer.to_str() == before
        files.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
        processor(text=["a man", "ball"], padding=padding)
    assert files[0] == files[1] == files[2]


def test_lists_that_hold_themselves_are_refused(processor, images):
    endless: list = []
    endless.append(endless)
    for arguments in ({"images": endless}, {"text": endless}, {"segmentation_maps": endless}):
        with pytest.raises(ValueError, match="Expected"):
            processor(**{"images": images[0], "text": "a man", **arguments})


def test_attention_masks_do_not_depend_on_the_tokenizer_s_outputs(processor, images):
    tokenizer = build_tokenizer(vocabulary_from_expressions(SENTENCES))
    tokenizer.model_input_names = ["input_ids"]
    inputs = ReSTRProcessor(processor.image_processor, tokenizer)(images=images[0], text="a man")
    assert inputs["attention_mask"] == [[0] * 18 + [1] * 2]


@pytest.mark.parametrize(
    "sentence, unknown, cut",
    [
        ("the dog on the left", [], []),
        ("The Dog, left.", [","], []),
        ("  xyzzy dog Xyzzy qwrty xyzzy", ["xyzzy", "Xyzzy", "qwrty"], []),
        ("上面的狗", ["上面的狗"], []),
        ("the 🐶", ["🐶"], []),
        ("?!", ["?!"], []),
        ("cafe\u0301 İxx dog", ["café", "İ", "xx"], []),
        ("dog " * 20, [], []),
        ("dog " * 19 + "man xyzzy the ball ball", [], ["xyzzy", "the", "ball"]),
        ("xyzzy " + "dog " * 60, ["xyzzy"], ["dog"]),
    ],
)
def test_lost_words(processor, sentence, unknown, cut):
    lost = processor.find_lost_words(["ball", sentence])
    assert lost == [{"unknown_words": [], "cut_words": []}, {"unknown_words": unknown, "cut_words": cut}]
    warning = processor.describe_lost_words(lost)
    assert all(repr(word) in warning for word in unknown + cut) if unknown + cut else warning is None


def test_lost_words_do_not_depend_on_earlier_calls_and_change_no_setting(processor):
    processor(text="dog", padding="longest", truncation=False)
    (lost,) = processor.find_lost_words("dog " * 20 + "man")
    assert lost == {"unknown_words": [], "cut_words": ["man"]}
    processor(text="dog")
    before = processor.tokenizer.backend_tokenizer.to_str()  # threads share it
    processor.find_lost_words(["dog " * 30, "xyzzy"])
    assert processor.tokenizer.backend_tokenizer.to_str() == before


def test_a_warning_names_the_first_words_once(processor):
    lost = processor.find_lost_words([f"dog{number} dog{number + 1}" for number in range(29)])
    warning = processor.describe_lost_words(lost)
    assert warning.count("'dog0'") == warning.count("'dog1'") == warning.count("'dog19'") == 1
    assert len(processor.describe_lost_words(processor.find_lost_words(["x" * 100_000]))) < 200
    assert "'dog20'" not in warning and "and 10 more" in warning and "<unk>" in warning


@pytest.mark.parametrize("sentence", ["", "   ", "\n", ".", " . "])
def test_sentences_without_words_are_refused(processor, images, sentence):
    with pytest.raises(ValueError, match=r"at least one word.*as sentence 0"):
        processor(images=images[0], text=sentence)
    with pytest.raises(ValueError, match=r"at least one word.*as sentence 1"):
        processor(images=images[0], text=["a man", sentence], padding="longest")


@pytest.mark.parametrize(
    "num_images, text, message",
    [
        (2, "the dog", "2 images and 1 sentences"),
        (2, ["a", "b", "c"], "2 images and 3 sentences"),
        (2, [["a", "b"]], "2 images and 1 lists of sentences"),
        (1, [["a"], ["b"]], "1 images and 2 lists of sentences"),
        (2, [["a"], []], "non-empty lists of sentences"),
        (2, [["a"], "b"], "only non-empty lists of sentences"),
        (2, ["b", ["a"]], "only non-empty lists of sentences"),
        (1, [], r"got \[\]"),
        (1, 3, "got 3"),
        (1, [None], "got None of type NoneType"),
        (1, [b"dog"], "of type bytes"),
        (1, ["dog", "\ud800 dog"], "one half of a surrogate pair"),
        (1, [[["a"]]], "of type list"),
    ],
)
def test_images_and_text_that_do_not_match_up_are_explained(processor, images, num_images, text, message):
    with pytest.raises(ValueError, match=message):
        processor(images=images[:num_images], text=text)


def test_calls_without_what_they_need_are_explained(processor, images):
    mask = np.zeros((20, 30), dtype=bool)
    with pytest.raises(ValueError, match="got neither"):
        processor()
    with pytest.raises(ValueError, match="images and text with segmentation_maps"):
        processor(images=images[0], segmentation_maps=mask)
    with pytest.raises(ValueError, match="1 segmentation maps, 1 images and image_indices"):
        processor(images=images[0], text=["a man", "ball"], segmentation_maps=[mask])
    with pytest.raises(ValueError, match=r"its image's own size, \(height, width\) \(25, 10\), got \(20, 30\)"):
        processor(images=images[1], text="a man", segmentation_maps=[mask])
