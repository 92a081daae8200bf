"""The parts of examples/train_drawn_scenes.py; tests/test_examples.py runs the whole of it."""

import sys
from pathlib import Path

import numpy as np

from modeling_restr.data.drawn_scenes import COLOR_RANGES, NOUNS, DrawnScenes


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import train_drawn_scenes


def test_patches_are_labelled_with_what_covers_them():
    scenes = DrawnScenes(20, seed=3, image_size=64)
    for scene in (scenes[index] for index in range(len(scenes))):
        labels = train_drawn_scenes.label_patches(scene, 64, 8)
        height, width = scene.image.shape[:2]
        top, left = (64 - height) // 2, (64 - width) // 2
        for patch, (kind, color, *_) in enumerate(labels):
            y, x = patch // 8 * 8 - top, patch % 8 * 8 - left
            shares = [mask[max(y, 0) : max(y + 8, 0), max(x, 0) : max(x + 8, 0)].sum() / 64 for mask in scene.masks]
            if max(shares) < 0.25:
                assert (kind, color) == (0, 0)
            else:
                shown = [scene.shapes[index] for index in np.flatnonzero(np.array(shares) == max(shares))]
                assert (list(NOUNS)[kind - 1], list(COLOR_RANGES)[color - 1]) in {(s.kind, s.color) for s in shown}
