"""The panel of overlays against masks that are known."""

from types import SimpleNamespace

import numpy as np
import torch
from tiny_training import make_dataset, make_processor

from modeling_restr.data.canonical import decode_mask
from modeling_restr.training.overlays import TILE_SIZE, choose_sentences, draw_overlays
from modeling_restr.visualization import get_color


def test_sentences_are_about_different_objects_first():
    (row,) = make_dataset(1, num_expressions=lambda index: 7)
    assert choose_sentences(row) == ["the red square", "the green square", "the blue square"]
    row["references"] = row["references"][:1]
    assert choose_sentences(row) == ["the red square", "red thing", "a box that is red"]


def test_each_mask_is_drawn_in_its_colour_on_its_image():
    processor, rows = make_processor(), make_dataset(2, num_expressions=lambda index: 2, size=(32, 32))

    class Oracle(torch.nn.Linear):
        """Answers with the true masks of one image after another."""

        def forward(self, pixel_values, **inputs):
            row = next(self.rows)
            masks = [decode_mask(reference["mask"]) for reference in row["references"]]
            return SimpleNamespace(logits=torch.from_numpy(np.stack(masks)).float() * 20 - 10)

    model = Oracle(1, 1)
    model.rows = iter(rows)
    panel = np.asarray(draw_overlays(model, processor, rows)).astype(int)
    assert panel.shape[1] == 2 * TILE_SIZE
    for index, row in enumerate(rows):
        for number, reference in enumerate(row["references"]):
            y, x = np.argwhere(decode_mask(reference["mask"])).mean(0)
            center = panel[int((y + 0.5) * TILE_SIZE / 32), int((x + 0.5) * TILE_SIZE / 32) + index * TILE_SIZE]
            photo = np.asarray(row["image"])[int(y), int(x)]
            np.testing.assert_allclose(center, (photo + np.array(get_color(number))) / 2, atol=3)
