"""Pixel counts against NumPy, and the panel against known masks."""

from types import SimpleNamespace

import numpy as np
import torch
from tiny_training import make_dataset, make_processor

from modeling_restr.data.canonical import decode_mask
from modeling_restr.training.validation import (
    PADDING,
    choose_sentences,
    compute_metrics,
    count_pixels,
    draw_panel,
    show_panel,
)
from modeling_restr.visualization import TILE_SIZE, get_color


def test_pixels_are_counted_with_one_row_per_image():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 8, 9, generator=generator)
    labels = (torch.rand(6, 8, 9, generator=generator) < 0.4).long()
    labels[4] = 0
    counts = count_pixels(logits, labels, torch.tensor([0, 1, 1, 1, 2, 2]))
    assert counts.shape == (3, 3, 2) and (counts == PADDING).sum() == 2 * (3 * 3 - 6)
    expected = []
    for place, logit, label in zip([(0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)], logits.numpy(), labels.numpy()):
        predicted, target = logit > 0, label > 0
        expected.append([(predicted & target).sum(), (predicted | target).sum()])
        assert counts[place].tolist() == expected[-1]
    metrics = compute_metrics(counts)
    intersections, unions = np.sum(expected, axis=0)
    assert metrics["overall_iou"] == intersections / unions and metrics["num_expressions"] == 6


def test_sentences_are_about_different_objects_first():
    (row,) = make_dataset(1, num_expressions=lambda index: 7)
    assert choose_sentences(row) == ["the red square", "the green square", "the blue square"]
    row["references"] = row["references"][:1]
    assert choose_sentences(row) == ["the red square", "red thing", "a box that is red"]


class Oracle(torch.nn.Linear):
    """Answers with the true masks of one image after another."""

    def __init__(self, rows):
        super().__init__(1, 1)
        self.rows = iter(rows)

    def forward(self, pixel_values, **inputs):
        masks = [decode_mask(reference["mask"]) for reference in next(self.rows)["references"]]
        return SimpleNamespace(logits=torch.from_numpy(np.stack(masks)).float() * 20 - 10)


def test_each_mask_is_drawn_in_its_colour_on_its_image():
    rows = list(make_dataset(2, num_expressions=lambda index: 2, size=(32, 32)))
    empty = rows[0] | {"references": []}  # has no sentence, and gets no tile
    panel = np.asarray(draw_panel(Oracle(rows), make_processor(), [empty, *rows])).astype(int)
    assert panel.shape[1] == 2 * TILE_SIZE
    for index, row in enumerate(rows):
        for number, reference in enumerate(row["references"]):
            y, x = np.argwhere(decode_mask(reference["mask"])).mean(0)
            center = panel[int((y + 0.5) * TILE_SIZE / 32), int((x + 0.5) * TILE_SIZE / 32) + index * TILE_SIZE]
            photo = np.asarray(row["image"])[int(y), int(x)]
            np.testing.assert_allclose(center, (photo + np.array(get_color(number))) / 2, atol=3)


def test_without_sentences_there_is_no_panel(tmp_path):
    (row,) = make_dataset(1)
    show_panel(Oracle([]), make_processor(), [row | {"references": []}], tmp_path, 3)
    assert not list(tmp_path.iterdir())
