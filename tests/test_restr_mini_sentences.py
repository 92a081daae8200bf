import colorsys
import re
from dataclasses import replace

import numpy as np
import pytest
from photographs import COLORS, write_photographs
from scenes import Photographs, PhotoScene, PhotoScenes
from sentences import (
    COLORS as COLOR_NAMES,
    GARMENTS,
    KIND_WEIGHTS,
    NO_NAMES,
    SYNONYMS,
    NoiseWords,
    express,
    find_facts,
    name_colors,
)


BLUE, RED, BROWN, BLACK = (30, 60, 220), (220, 20, 30), (120, 70, 30), (10, 10, 10)


def make_scene(*boxes: tuple[str, tuple[int, int, int, int], tuple[int, int, int]], size=(100, 150)) -> PhotoScene:
    """Boxes (category, (left, top, right, bottom), colour) on green; later ones lie on top."""
    image = np.full((*size, 3), (20, 120, 40), np.uint8)
    masks = np.zeros((len(boxes), *size), bool)
    for index, (_, (left, top, right, bottom), color) in enumerate(boxes):
        masks[:, top:bottom, left:right] = False
        masks[index, top:bottom, left:right] = True
        image[top:bottom, left:right] = color
    categories = [category for category, _, _ in boxes]
    known = frozenset({"person", "dog", "car", "cup", "handbag", "bicycle", "motorcycle", *categories})
    return PhotoScene(image, masks, categories, [True] * len(boxes), set(), known, False)


def facts_of(scene: PhotoScene, kind: str) -> set[tuple[str, str, int]]:
    return {(fact.color or fact.name, fact.noun, fact.target) for fact in find_facts(scene) if fact.kind == kind}


def texts_of(scene: PhotoScene, kinds: str = " ".join(KIND_WEIGHTS)) -> set[str]:
    """The sentences about a scene in 200 attempts."""
    drawn = [express(scene, np.random.default_rng(seed), 6) for seed in range(200)]
    return {expression.text for expressions in drawn for expression in expressions if expression.kind in kinds}


def test_colors_are_named_as_people_do():
    named = {"red": "#e01020", "blue": "#2040d0", "green": "#209030", "yellow": "#f0e020", "orange": "#ff9010"}
    named |= {"brown": "#704018", "black": "#101010", "white": "#f8f8f8", "gray": "#808080", "pink": "#ffa0c8"}
    named |= {"purple": "#6020b0"}
    pixels = np.array([[int(code[i : i + 2], 16) for i in (1, 3, 5)] for code in named.values()], np.uint8)
    assert [COLOR_NAMES[number] for number in name_colors(pixels)] == list(named)


def test_hues_are_those_of_colorsys():
    """Every saturated, bright colour has the name of its hue's range, or none."""
    ranges = {"red": (342, 374), "orange": (18, 42), "yellow": (44, 68), "green": (75, 165), "blue": (190, 252)}
    ranges |= {"purple": (262, 300), "pink": (305, 342)}
    for hue in range(360):
        pixel = np.array([[round(255 * part) for part in colorsys.hsv_to_rgb(hue / 360, 0.9, 0.9)]], np.uint8)
        number = int(name_colors(pixel)[0])
        if number >= 0:
            low, high = ranges[COLOR_NAMES[number]]
            assert low - 1 <= hue <= high + 1 or low - 1 <= hue + 360 <= high + 1


def test_a_colour_is_named_only_where_no_other_instance_has_it():
    two = make_scene(("car", (5, 40, 45, 80), RED), ("car", (90, 40, 130, 80), BLUE))
    assert facts_of(two, "color") == {("red", "car", 0), ("blue", "car", 1)}
    same = make_scene(("car", (5, 40, 45, 80), RED), ("car", (90, 40, 130, 80), RED))
    assert not facts_of(same, "color")
    speckled = make_scene(("car", (5, 40, 45, 80), RED), ("car", (90, 40, 130, 80), BLUE))
    speckled.image[40:80, 90:100] = RED  # a quarter of the blue one
    assert facts_of(speckled, "color") == {("blue", "car", 1)}


def test_a_persons_colour_is_that_of_its_clothes():
    scene = make_scene(("person", (20, 10, 50, 90), BLACK), ("person", (90, 10, 120, 90), BLACK))
    scene.image[26:54, 20:50] = RED
    assert facts_of(scene, "color") == {("red", "person", 0), ("black", "person", 1)}
    texts = texts_of(scene, "color")
    of_clothes = re.compile(r"(in|wearing) (red|black|dark)|(red|black|dark) (clothes|" + "|".join(GARMENTS) + ")")
    assert texts and all(of_clothes.search(text) for text in texts)  # never of the person itself
    assert any(re.fullmatch("(the )?red shirt", text) for text in texts)
    assert any(re.search("in red", text) for text in texts)
    worn = replace(scene, is_clothing=True)  # a "red shirt" would be that shirt
    assert texts_of(worn, "color") and not any(word in text for text in texts_of(worn) for word in GARMENTS)


def test_clothing_is_unknown_where_the_head_is_hidden():
    scene = make_scene(("person", (20, 0, 50, 90), BLACK), ("person", (90, 10, 120, 90), RED))
    assert not facts_of(scene, "color")
    assert facts_of(make_scene(("person", (90, 10, 120, 90), RED)), "color")


def test_place_tells_apart_instances_that_share_a_colour():
    scene = make_scene(
        ("car", (5, 40, 30, 80), RED), ("car", (110, 40, 140, 80), RED), ("car", (60, 35, 90, 85), BLUE)
    )
    colored = {(fact.kind, fact.name, fact.target) for fact in find_facts(scene) if fact.color == "red"}
    assert {("place", "leftmost", 0), ("place", "rightmost", 1)} <= colored
    assert not [fact for fact in colored if fact[0] == "color"]
    assert {("color", "only", 2)} == {
        (fact.kind, fact.name, fact.target)
        for fact in find_facts(scene)
        if fact.color == "blue" and fact.name == "only"
    }
    texts = texts_of(scene)
    assert "blue car" in texts
    assert all(
        any(re.search(f"red (car|auto|vehicle).*{side}|{side}.*red", text) for text in texts)
        for side in ("left", "right")
    )


def test_the_nearest_is_bigger_and_lower():
    near, far, high = (100, 20, 145, 95), (10, 20, 30, 60), (10, 2, 70, 70)
    scene = make_scene(("person", far, BLUE), ("person", near, BLACK))
    assert {("nearest", "person", 1), ("farthest", "person", 0)} <= facts_of(scene, "place")
    big_but_high = make_scene(("person", (100, 60, 120, 98), BLUE), ("person", high, BLACK))
    assert not {name for name, _, _ in facts_of(big_but_high, "place")} & {"nearest", "farthest"}


def test_no_name_is_needed_where_all_instances_are_of_one_category():
    boxes = [("dog", (5, 40, 45, 80), BROWN), ("dog", (90, 40, 130, 80), BLACK)]
    scene = make_scene(*boxes)
    everything = scene.known.union(SYNONYMS, {"truck", "bus", "bird", "elephant", "giraffe", "zebra", "bear", "apple"})
    scene = replace(scene, known=everything | {"banana", "orange", "dog"})
    nameless = re.compile(r"(the |that |a )?((left|right|brown|black|dark) one|left|right|one on the (left|right))")
    assert {"left", "right", "brown"} <= {
        match[2].split()[0] for text in texts_of(scene) if (match := nameless.fullmatch(text))
    }
    two = make_scene(*boxes, ("cup", (60, 10, 70, 20), RED))
    for other in (replace(scene, unclear_categories={"cup"}), replace(two, known=scene.known)):
        assert not any(nameless.fullmatch(text) for text in texts_of(other))


def test_noise_words_are_added_and_no_word_is_removed():
    words = ["there", "left", "dog", "red", "'s", "standing", "zebra", "oven"]
    noise, rng = NoiseWords(words, ["dog", "zebra", "oven"]), np.random.default_rng(0)
    assert noise.words == ["there", "standing"]
    inserted = [noise.insert("left guy in red", rng).split() for _ in range(200)]
    assert all(
        [word for word in words if word not in noise.words] == ["left", "guy", "in", "red"] for words in inserted
    )
    assert {len(words) for words in inserted} == {5, 6}
    assert sum(words.count("there") for words in inserted) > sum(words.count("standing") for words in inserted) > 0


def test_relations_hold_for_one_instance_only():
    scene = make_scene(
        ("cup", (5, 40, 25, 60), RED), ("cup", (110, 40, 130, 60), BLUE), ("dog", (50, 30, 90, 70), BROWN)
    )
    assert {("left of", "cup", 0), ("right of", "cup", 1)} <= facts_of(scene, "relation")
    both = make_scene(
        ("cup", (5, 40, 25, 60), RED), ("cup", (28, 40, 48, 60), BLUE), ("dog", (80, 30, 120, 70), BROWN)
    )
    assert not {fact for fact in facts_of(both, "relation") if fact[0] == "left of" and fact[1] == "cup"}
    with_bag = make_scene(
        ("person", (10, 5, 50, 95), BLUE), ("person", (100, 5, 140, 95), BLACK), ("handbag", (36, 50, 54, 70), RED)
    )
    assert ("carrying", "person", 0) in facts_of(with_bag, "relation")
    assert ("next to", "person", 0) in facts_of(with_bag, "relation")


def test_who_rides_has_a_name():
    riding = make_scene(("bicycle", (55, 40, 85, 90), BLACK), ("person", (58, 10, 82, 80), BLUE))
    assert {"cyclist", "biker"} <= {text.removeprefix("the ") for text in texts_of(riding, "relation")}
    beside = make_scene(("person", (10, 10, 30, 90), BLUE), ("bicycle", (100, 40, 140, 90), BLACK))
    assert not any(re.search("cyclist|biker|riding", text) for text in texts_of(beside, "relation"))


def test_the_only_person_is_described_by_clothes_hair_and_bag():
    boxes = [("person", (20, 5, 60, 95), BROWN), ("dress", (22, 40, 58, 80), RED)]
    boxes += [("hair", (25, 5, 55, 20), BLACK), ("bag", (60, 50, 75, 70), BLUE), ("skin", (30, 20, 50, 38), BROWN)]
    scene = replace(make_scene(*boxes), is_clothing=True)
    texts = texts_of(scene, "relation")
    for said in ("(in|wearing|with) (the )?red dress", "with (the )?(black|dark) hair", "(with|carrying) (the )?bag"):
        assert any(re.search(f"(man|person) {said}", text) for text in texts), said
    assert not any(re.search("(in|wearing) (the )?(blue |black |dark )?(bag|hair)|skin", text) for text in texts)
    targets = {fact.target for fact in find_facts(scene) if fact.kind == "relation"}
    assert targets == {0}
    two = replace(make_scene(*boxes, ("person", (100, 5, 140, 95), BLACK)), is_clothing=True)
    assert not facts_of(two, "relation")  # the other one's clothes are not annotated
    assert not facts_of(replace(scene, is_clear=[False, True, True, True, True]), "relation")


def test_general_names_need_everything_annotated():
    scene = make_scene(("dog", (5, 40, 35, 70), BROWN), ("cat", (90, 40, 120, 70), BLACK))
    assert not any(fact.noun == "animal" for fact in find_facts(scene))
    animals = {"bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"}
    scene = replace(scene, known=scene.known | animals)
    assert ("left of all", "animal", 0) in facts_of(scene, "place")
    scene.unclear_categories.add("horse")
    assert not any(fact.noun == "animal" for fact in find_facts(scene))


def test_nothing_is_said_about_unclear_instances():
    scene = make_scene(("car", (5, 40, 45, 80), RED), ("dog", (90, 40, 130, 80), BLUE))
    assert {fact.target for fact in find_facts(replace(scene, is_clear=[False, True]))} == {1}
    assert not [fact for fact in find_facts(replace(scene, unclear_categories={"dog"})) if fact.noun == "dog"]


def test_ambiguous_synonyms_are_not_used():
    scene = make_scene(("bicycle", (5, 40, 45, 80), RED), ("motorcycle", (90, 40, 130, 80), BLUE))
    texts = texts_of(scene)
    assert "motorbike" in texts and not any(re.search(r"\bbike\b", text) for text in texts)
    assert "bike" in texts_of(make_scene(("bicycle", (5, 40, 45, 80), RED)))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos") / "data"
    write_photographs(folder, colored=True)
    photographs = Photographs.load([folder], "train", progress=False)
    return PhotoScenes(photographs, 150, 128, seed=0, paste=0.6)


def test_sentences_are_true_of_their_target_alone(scenes):
    """Checked by plain rules on the masks."""
    checked = dict.fromkeys(KIND_WEIGHTS, 0)
    for index in range(len(scenes)):
        scene = scenes[index]
        expressions = express(scene, np.random.default_rng(index), 5)
        assert len({expression.text for expression in expressions}) == len(expressions) <= 5
        for expression in expressions:
            category = scene.categories[expression.target]
            names = {category, *SYNONYMS.get(category, ()), "animal", *NO_NAMES, *GARMENTS}
            assert any(name in expression.text for name in names)
            checked[expression.kind] += _check(scene, expression)
    assert checked["category"] > 20 and checked["place"] > 20 and checked["order"] + checked["size"] > 5


def _check(scene: PhotoScene, expression) -> bool:
    text, target = expression.text, expression.target
    general = "animal" in text
    colors = [name_colors(np.median(scene.image[mask], axis=0)[None].astype(np.uint8))[0] for mask in scene.masks]
    colored = re.search("|".join(COLOR_NAMES), text)
    assert not colored or colored[0] == COLOR_NAMES[colors[target]]
    group = [
        index
        for index, name in enumerate(scene.categories)
        if (name == scene.categories[target] or (general and name in ("dog", "elephant")))
        and (not colored or colors[index] == colors[target])
    ]
    centers = np.array([[place.mean() for place in mask.nonzero()[::-1]] for mask in scene.masks])[group]
    areas = scene.masks[group].sum((1, 2))
    own = group.index(target)
    if expression.kind in ("category", "color"):
        assert len(group) == 1
    elif expression.kind == "size":
        assert own == (areas.argmax() if re.search("big|large", text) else areas.argmin())
    elif expression.kind == "place" and len(group) > 1 and re.search("leftmost|left most|far left", text):
        assert own == centers[:, 0].argmin()
    elif expression.kind == "place" and len(group) > 1 and re.search("rightmost|right most|far right", text):
        assert own == centers[:, 0].argmax()
    elif expression.kind == "order" and (match := re.search(r"(second|2nd).*from (?:the )?(left|right)", text)):
        assert own == centers[:, 0].argsort()[1 if match[2] == "left" else -2]
    else:
        return False
    return True


def test_a_mirrored_scene_swaps_left_and_right(scenes):
    swapped = {"left": "right", "right": "left"}
    compared = 0
    for index in range(60):
        scene = scenes[index]
        mirrored = replace(scene, image=scene.image[:, ::-1], masks=scene.masks[:, :, ::-1])
        facts, others = (
            {(f.kind, f.name, f.target, f.rank, f.anchor, f.color) for f in find_facts(s)} for s in (scene, mirrored)
        )
        turned = {
            (kind, re.sub("left|right", lambda match: swapped[match[0]], name), *rest) for kind, name, *rest in facts
        }
        assert turned == others
        compared += len(facts)
    assert compared > 200


def test_colors_of_the_test_photographs_are_found(scenes):
    found = {
        (fact.noun, fact.color) for index in range(100) for fact in find_facts(scenes[index]) if fact.kind == "color"
    }
    assert found <= {("person", "blue"), ("dog", "brown"), ("elephant", "gray")} and len(found) == len(COLORS) - 1
