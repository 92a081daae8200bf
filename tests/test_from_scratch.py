import copy

import pytest
import torch
from torch import nn

from modeling_restr import ReSTRVisionConfig, ReSTRVisionModel
from modeling_restr.training.from_scratch import MuonWithAdamW, initialize_as_convolutions, whiten_patches


@pytest.fixture(scope="module")
def vision_model():
    config = ReSTRVisionConfig(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, image_size=64, patch_size=8
    )
    torch.manual_seed(0)
    model = ReSTRVisionModel(config).eval()
    model.set_attn_implementation("eager")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    initialize_as_convolutions(model)
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


def test_whitened_patches_have_the_same_variance_in_every_direction():
    """Smooth pictures, as photographs are: their brightness varies much more than their texture."""
    config = ReSTRVisionConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=64, patch_size=8
    )
    model = ReSTRVisionModel(config)
    initialize_as_convolutions(model)
    noise = torch.randn(200, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    pixel_values = noise.cumsum(2).cumsum(3) / 100
    before = _variances(model, pixel_values)
    whiten_patches(model, pixel_values, softness=1e-9)
    after = _variances(model, pixel_values)
    assert before.max() / before.min() > 1000
    assert torch.allclose(after, torch.ones(36).double(), atol=1e-2)
    assert (model.embeddings.patch_embedding.weight[36:] == 0).all()  # the channels that hold the positions


def _variances(model, pixel_values):
    """In the principal directions of the 36 channels that are not positions."""
    with torch.no_grad():
        channels = model.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2).flatten(0, 1)[:, :36]
    return torch.linalg.eigvalsh(channels.double().T.cov())


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
        return nn.Sequential(block, nn.ReLU(), head), MuonWithAdamW(named, **options)

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
