"""The parts of examples/train_drawn_scenes.py; tests/test_examples.py runs the whole of it."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from modeling_restr import ReSTRVisionConfig, ReSTRVisionModel
from modeling_restr.data.drawn_scenes import COLOR_RANGES, NOUNS, DrawnScenes


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import train_drawn_scenes


@pytest.fixture(scope="module")
def vision_model():
    config = ReSTRVisionConfig(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, image_size=64, patch_size=8
    )
    model = ReSTRVisionModel(config).eval()
    model.set_attn_implementation("eager")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    train_drawn_scenes.initialize_as_convolutions(model)
    return model


def test_heads_start_by_looking_at_one_neighbour_each(vision_model):
    with torch.inference_mode():
        attentions = vision_model(torch.rand(2, 3, 64, 64) * 2 - 1, output_attentions=True).attentions
    inner = [8 * row + column for row in range(2, 6) for column in range(2, 6)]  # of the 8 x 8 grid
    seen = set()
    for heads in attentions[:2]:  # in the third block half of the heads are free
        favourite = heads[:, :, 1:, 1:].argmax(dim=3)[:, :, inner]  # (images, heads, inner patches)
        rows, columns = favourite // 8, favourite % 8
        offsets = torch.stack([rows - torch.tensor(inner) // 8, columns - torch.tensor(inner) % 8], dim=-1)
        assert (offsets == offsets[:1, :, :1]).all()  # the same one everywhere, whatever the image shows
        seen |= {tuple(offset.tolist()) for offset in offsets[0, :, 0]}
    assert seen == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)} - {(0, 0)}


def test_free_heads_look_anywhere(vision_model):
    with torch.inference_mode():
        free = vision_model(torch.rand(1, 3, 64, 64) * 2 - 1, output_attentions=True).attentions[2][0, 2:]
    assert free.max() < 0.2


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


def test_optimizer_goes_on_where_its_state_was_saved():
    def train(model, optimizer, steps):
        for step in steps:
            inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()

    def create():
        torch.manual_seed(0)
        block, head = nn.Linear(6, 8), nn.Linear(8, 4)
        named = nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.ModuleList([block])}), "head": head})
        options = {"lr": 0.02, "adamw_lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.98)}
        return nn.Sequential(block, nn.ReLU(), head), train_drawn_scenes.MuonWithAdamW(named, **options)

    whole, optimizer = create()
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 3]
    train(whole, optimizer, range(3))
    weights = {name: value.clone() for name, value in whole.state_dict().items()}
    state = copy.deepcopy(optimizer.state_dict())

    resumed, resumed_optimizer = create()
    resumed.load_state_dict(weights)
    resumed_optimizer.load_state_dict(state)
    for group in resumed_optimizer.param_groups:
        assert group["lr"] in (0.02, 0.01)
    train(whole, optimizer, range(3, 6))
    train(resumed, resumed_optimizer, range(3, 6))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value) and not torch.equal(weights[name], value)
