"""Our CLIP against open_clip's, another implementation of the same models, on the same random weights."""

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from model.irra import at_eot
from model.pretrained import load_clip
from tests.recipe import off, pixels

TOLERANCE = 1e-5
TEXT = dict(context_length=77, vocab_size=49408, width=64, heads=1, layers=2)
VISION = {  # what open_clip is told, and the patch size, which ours takes as the stride too
    "ViT": (dict(layers=3, width=128, head_width=64, patch_size=32, image_size=224), 32),
    "ResNet": (dict(layers=(1, 2, 1, 1), width=16, head_width=64, patch_size=None, image_size=224), 16),
}
IDS = torch.zeros(3, 77, dtype=torch.long)  # captions of three lengths, the last one full
for row, length in enumerate((1, 11, 75)):
    IDS[row, : length + 2] = torch.tensor([49406, *range(5 + row, 5 + row + length), 49407])


@pytest.fixture(scope="module", params=VISION)
def theirs(request):
    """An open_clip model whose every parameter and running statistic is off its starting value."""
    vision, stride = VISION[request.param]
    torch.manual_seed(0)
    model = open_clip.model.CLIP(48, dict(vision), dict(TEXT), quick_gelu=True)
    with torch.no_grad():
        for name, value in model.state_dict().items():  # the same memory as the model's
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif name.endswith(("bias", "running_mean")):
                value.normal_(std=0.1)
            elif value.ndim == 1 and name.endswith("weight"):
                value.uniform_(0.5, 1.5)
    return model.eval(), stride


@pytest.fixture(scope="module", params=["state dict", "state dict in half", "safetensors"])
def both(request, theirs, tmp_path_factory):
    """Their model, and ours loaded from a file of its weights."""
    model, stride = theirs
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    assert "logit_scale" in weights  # it must be passed over
    path = tmp_path_factory.mktemp("open_clip") / (
        "clip" + (".safetensors" if "safe" in request.param else ".pt")
    )
    if "half" in request.param:
        weights = {k: value.half() if value.is_floating_point() else value for k, value in weights.items()}
        model.load_state_dict(weights)
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    ours = load_clip(str(path), (224, 224), stride).eval()
    path.unlink()
    return ours, model


@torch.no_grad()
def test_image_features_equal_open_clips(both):
    ours, theirs = both
    images = pixels(7, (3, 3, 224, 224))
    features = ours.encode_image(images)
    features = features[:, 0] if features.ndim == 3 else features
    assert off(features, theirs.encode_image(images)) < TOLERANCE


@torch.no_grad()
def test_text_features_equal_open_clips(both):
    ours, theirs = both
    assert off(at_eot(ours.encode_text(IDS), IDS), theirs.encode_text(IDS)) < TOLERANCE


def test_the_loaded_weights_are_in_fp32_without_the_logit_scale(both):
    ours, theirs = both
    own = ours.state_dict()
    assert {value.dtype for value in own.values() if value.is_floating_point()} == {torch.float32}
    assert set(own) == set(theirs.state_dict()) - {"logit_scale"}


@torch.no_grad()
@pytest.mark.parametrize("theirs", ["ViT"], indirect=True)
def test_without_quick_gelu_the_features_differ(theirs):
    """The comparison would notice: the plain GELU of open_clip's own models is another function."""
    model, _ = theirs
    plain = open_clip.model.CLIP(48, dict(VISION["ViT"][0]), dict(TEXT), quick_gelu=False).eval()
    plain.load_state_dict(model.state_dict())
    assert off(plain.encode_text(IDS), model.encode_text(IDS)) > 100 * TOLERANCE
