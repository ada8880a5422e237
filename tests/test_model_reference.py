"""The model against the published code's figures (tests/reference/README.md says how they were made), and
facts that follow from its definition. Tolerances are the recommended ones of that page."""

import functools
import hashlib
import math

import pytest
import torch

from model import build_model
from model.irra import IRRA
from model.pretrained import VIT_B_16, new_clip, resize_positions
from tests import recipe
from tests.recipe import CLASSES, FULL, TINY, arrays, figures, off, tiny_args, tiny_model
from utils.batch import Batch
from utils.errors import InputError

FORWARD, GRADS = figures("forward"), figures("grads")
FULLSIZE = figures("fullsize")
CASES = [pytest.param(i, id=case["loss_names"]) for i, case in enumerate(FORWARD["cases"])]
FEATURES, LOSSES = 1e-5, 5e-6  # relative to the largest magnitude; relative


def total(report):
    return sum(value for name, value in report.items() if "loss" in name)


def check_report(report, published):
    """Losses within their tolerance, accuracies equal, nothing missing and nothing more."""
    assert {*report, "total_loss"} == set(published)
    for name, value in {**report, "total_loss": total(report)}.items():
        tolerance = 0 if name.endswith("_acc") else LOSSES
        assert value.item() == pytest.approx(published[name], rel=tolerance, abs=0), name


@pytest.fixture(scope="module")
def batch():
    ids = {key: arrays("forward")[key] for key in ("pids", "caption_ids", "mlm_ids", "mlm_labels")}
    return {**ids, "images": recipe.pixels(FORWARD["image_seed"], FORWARD["image_shape"])}


@pytest.fixture(scope="module")
def few(batch):
    """Its first four samples, where no figure is compared."""
    return {key: value[:4] for key, value in batch.items()}


@functools.cache
def model_of(index):
    case = FORWARD["cases"][index]
    return tiny_model(case["loss_names"], temperature=case["temperature"], **case["args"])


# ---- the recipe of the weights ----


def check_answer(kind, name, array, answer):
    array = array.numpy() if isinstance(array, torch.Tensor) else array
    assert list(array.shape) == answer["shape"], (kind, name)
    assert array.ravel()[:4].tolist() == answer["first4"], (kind, name)
    assert float(array.astype("float64").sum()) == pytest.approx(answer["sum"], rel=1e-12), (kind, name)
    little_endian = array.astype(array.dtype.newbyteorder("<"))
    digest = hashlib.md5(little_endian.tobytes()).hexdigest()
    assert digest == answer["md5_of_bytes_little_endian"], (kind, name)


def test_the_recipe_gives_its_known_answers():
    answers = figures("weights_known_answers")
    assert set(answers) == {"fill", "pixels", "bytes8"}
    for name, answer in answers["fill"].items():
        check_answer("fill", name, recipe.fill(name, answer["shape"]), answer)
    for kind, draw in (("pixels", recipe.pixels), ("bytes8", recipe.bytes8)):
        for name, answer in answers[kind].items():
            check_answer(kind, name, draw(int(name.removeprefix("seed ")), answer["shape"]), answer)


def test_splitmix64_starts_as_published():
    assert recipe._words(0, 0, 2).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


# ---- the tiny model: forward ----


@pytest.mark.parametrize("index", CASES)
def test_every_number_reported_is_the_published_one(index, batch):
    check_report(model_of(index)(batch), FORWARD["cases"][index]["result"])


@pytest.fixture(scope="module")
def tokens(batch):
    """Image tokens, text tokens of the caption, and what the interaction encoder makes of the masked one."""
    model = model_of(0).eval()
    with torch.no_grad():
        image = model.base_model.encode_image(batch["images"])
        text = model.base_model.encode_text(batch["caption_ids"])
        cross = model.cross_former(model.base_model.encode_text(batch["mlm_ids"]), image)
    model.train()
    return {"image_tokens": image, "text_tokens": text, "cross_former": cross}


@pytest.mark.parametrize(
    ("what", "step"), [("image_tokens", 3), ("text_tokens", 8), ("cross_former", 8)], ids=lambda x: str(x)
)
def test_tokens_are_the_published_ones(what, step, tokens):
    found, published = tokens[what], arrays("forward")
    sums = torch.stack(
        [found.double().sum(dim=(1, 2)), found.double().square().sum(dim=(1, 2)).sqrt()], dim=1
    )  # (B, 2)
    for column in range(2):
        assert off(sums[:, column], published[f"{what}_checksum"][:, column]) < FEATURES
    assert off(found[:2, ::step, ::16], published[f"{what}_sample"]) < FEATURES


@torch.no_grad()
def test_features_and_classifier_logits_are_the_published_ones(batch):
    model, published = model_of(0).eval(), arrays("forward")
    image, text = model.encode_image(batch["images"]), model.encode_text(batch["caption_ids"])
    assert off(image, published["encode_image"]) < FEATURES
    assert off(text, published["encode_text"]) < FEATURES
    assert off(model.classifier(image), published["img_logits"]) < FEATURES
    assert off(model.classifier(text), published["txt_logits"]) < FEATURES
    model.train()


@torch.no_grad()
def test_scores_of_the_masked_words_are_the_published_ones(batch, tokens):
    model, published, labels = model_of(0), arrays("forward"), batch["mlm_labels"]
    masked = model.base_model.encode_text(batch["mlm_ids"])
    scores, at_label = model.predict_masked(masked, tokens["image_tokens"], Batch.of(batch).planned())
    assert at_label.tolist() == labels[labels != 0].tolist()
    assert off(scores.logsumexp(dim=1), published["mlm_logits_lse"]) < FEATURES
    assert off(scores[torch.arange(len(scores)), at_label], published["mlm_logits_at_label"]) < FEATURES
    assert scores.argmax(dim=1).tolist() == published["mlm_logits_argmax"].tolist()


# ---- the tiny model: gradients ----


def check_gradient(name, gradient, published):
    if published is None:
        assert gradient is None, name
        return
    gradient = gradient.double()
    assert list(gradient.shape) == published["shape"], name
    assert float(gradient.norm()) == pytest.approx(published["l2"], rel=2e-5), name
    assert abs(float(gradient.sum()) - published["sum"]) <= 1e-5 * published["abs_sum"], name
    values = torch.tensor(published["value"], dtype=torch.float64)
    assert len(values) == 8
    found = gradient.flatten()[published["index"]]
    assert float((found - values).abs().max()) <= 5e-5 * float(values.abs().max()), name


@pytest.mark.parametrize("index", CASES)
def test_every_gradient_is_the_published_one(index, batch):
    model, published = model_of(index), GRADS[str(index)]["params"]
    model.zero_grad(set_to_none=True)
    total(model(batch)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    assert set(gradients) == set(published)
    for name, gradient in gradients.items():
        check_gradient(name, gradient, published[name])


# ---- the full ViT-B/16 ----


@pytest.fixture(scope="module")
def fullsize(tmp_path_factory):
    """The full model's report, features and (l2, sum, size) of each gradient; the model is not kept."""
    clip = {"native_grid" if key == "grid" else key: size for key, size in FULL.items()}
    assert FULLSIZE["clip"] == clip
    path = tmp_path_factory.mktemp("fullsize") / "clip.pt"
    torch.save(recipe.clip_weights(**FULL), path)  # 600 MB
    args = tiny_args(
        FULLSIZE["loss_names"],
        pretrain_choice=path,
        img_size=FULLSIZE["img_size"],
        stride_size=FULLSIZE["stride_size"],
        cmt_depth=FULLSIZE["cmt_depth"],
        temperature=FULLSIZE["temperature"],
    )
    model = build_model(args, FULLSIZE["num_classes"])
    path.unlink()
    recipe.fill_heads(
        model, FULLSIZE["loss_names"], FULL["embed_dim"], FULLSIZE["num_classes"], FULLSIZE["cmt_depth"]
    )
    ids = {key: arrays("fullsize")[key] for key in ("pids", "caption_ids", "mlm_ids", "mlm_labels")}
    batch = {**ids, "images": recipe.pixels(FULLSIZE["image_seed"], FULLSIZE["image_shape"])}
    with torch.no_grad():
        features = model.encode_image(batch["images"]), model.encode_text(batch["caption_ids"])
    report = model(batch)
    total(report).backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        sums = float(parameter.grad.norm(dtype=torch.float64)), float(parameter.grad.sum(dtype=torch.float64))
        gradients[name] = (*sums, parameter.numel())
        parameter.grad = None
    return {name: value.detach() for name, value in report.items()}, features, gradients


def test_full_size_features_are_the_published_ones(fullsize):
    _, (image, text), _ = fullsize
    assert off(image, arrays("fullsize")["encode_image"]) < FEATURES
    assert off(text, arrays("fullsize")["encode_text"]) < FEATURES


def test_full_size_losses_are_the_published_ones(fullsize):
    check_report(fullsize[0], FULLSIZE["result"])


def test_full_size_gradients_are_the_published_ones(fullsize):
    published = FULLSIZE["grad_l2_and_sum"]
    assert set(fullsize[2]) == set(published)
    for name, (l2, summed, size) in fullsize[2].items():
        assert l2 == pytest.approx(published[name][0], rel=2e-5), name
        # the sum's tolerance is relative to Σ|g|, which is not stored; √size · l2 is its upper bound
        assert abs(summed - published[name][1]) <= 1e-5 * math.sqrt(size) * l2, name


# ---- positions, names and shapes ----


@pytest.mark.parametrize("case", figures("pos_embed"), ids=lambda case: case["key"])
def test_resized_positions_are_the_published_ones(case):
    found = resize_positions(
        recipe.fill(case["recipe_name"], case["in_shape"]), (case["height"], case["width"])
    )
    published = arrays("pos_embed")[case["key"]]
    assert found[:, ::4].shape == published.shape
    assert float((found[:, ::4] - published).abs().max()) <= 1e-6
    assert float(found.double().norm()) == pytest.approx(case["l2"], rel=1e-6)
    assert float(found.double().sum()) == pytest.approx(case["sum"], abs=1e-6 * math.sqrt(found.numel()))


def full_model_on_paper(loss_names):
    """The full model without memory for its weights: names and shapes only."""
    with torch.device("meta"):
        return IRRA(new_clip(VIT_B_16, (384, 128), 16), loss_names.split("+"), 11003)


@pytest.mark.parametrize("loss_names", ["sdm+mlm+id", "itc"])
def test_state_dict_has_the_published_keys_and_shapes(loss_names):
    model = full_model_on_paper(loss_names)
    found = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert found == figures("state_dict")[loss_names]
    counts = {
        key.split(",")[0].removeprefix("loss_names "): n for key, n in figures("state_dict_counts").items()
    }
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert [len(found), parameters] == counts[loss_names]


def test_the_recipes_shapes_are_the_published_ones():
    shapes = {f"base_model.{key}": list(shape) for key, shape in recipe.clip_shapes(**FULL).items()}
    shapes["base_model.visual.positional_embedding"] = [1 + 24 * 8, 768]  # at 384 x 128
    heads = recipe.head_shapes("sdm+mlm+id", 512, 11003, 4)
    assert {**shapes, **{key: list(shape) for key, shape in heads.items()}} == figures("state_dict")[
        "sdm+mlm+id"
    ]


# ---- which caption each loss sees ----


@torch.no_grad()
def test_with_clean_captions_only_mlm_sees_the_masked_caption(few):
    model = model_of(0)
    assert not Batch.of(few).planned().same_caption
    clean = model(few)
    masked = model({**few, "caption_ids": few["mlm_ids"]})
    unmasked_mlm = model({**few, "mlm_ids": few["caption_ids"]})
    for name in ("sdm_loss", "id_loss"):
        assert float(clean[name]) != pytest.approx(float(masked[name]), rel=1e-4)
        assert float(clean[name]) == pytest.approx(float(unmasked_mlm[name]), rel=1e-6)
    assert float(clean["mlm_loss"]) == pytest.approx(float(masked["mlm_loss"]), rel=1e-6)
    assert float(clean["mlm_loss"]) != pytest.approx(float(unmasked_mlm["mlm_loss"]), rel=1e-4)


def test_a_batch_without_labels_has_an_mlm_loss_of_0_and_gradients_that_are_numbers(few):
    model = tiny_model()
    report = model({**few, "mlm_labels": torch.zeros_like(few["mlm_labels"])})
    assert float(report["mlm_loss"].detach()) == 0 and float(report["mlm_acc"]) == 0
    total(report).backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    assert model.classifier.weight.grad.abs().sum() > 0


# ---- heads ----

MLM_HEAD = {"cross_attn", "cross_modal_transformer", "ln_pre_t", "ln_pre_i", "ln_post", "mlm_head"}


@pytest.mark.parametrize(
    ("loss_names", "heads"),
    [
        ("sdm", set()),
        ("itc+cmpm", set()),
        ("sdm+id", {"classifier"}),
        ("mlm", MLM_HEAD),
        ("cmpm+mlm+id", MLM_HEAD | {"classifier"}),
    ],
)
def test_heads_exist_only_when_their_loss_is_on(loss_names, heads):
    sizes = dict(vision_width=64, vision_layers=1, transformer_width=64, transformer_layers=1, embed_dim=64)
    with torch.device("meta"):
        model = IRRA(new_clip({**VIT_B_16, **sizes}, (32, 16), 16), loss_names.split("+"), 5)
    assert {name for name, _ in model.named_children()} == heads | {"base_model"}


@pytest.mark.parametrize("depth", [4, 1])
def test_heads_start_from_the_published_distributions(depth):
    torch.manual_seed(0)
    D, V, K = 512, 49408, 2000
    one_layer = dict(vision_width=64, vision_layers=1, transformer_width=64, transformer_layers=1)
    with torch.device("meta"):
        clip = new_clip({**VIT_B_16, **one_layer}, (32, 16), 16)
    model = IRRA(clip, ["sdm", "id", "mlm"], K, cmt_depth=depth)
    s = D**-0.5
    p, f = s * (2 * depth) ** -0.5, (2 * D) ** -0.5
    expected = {"classifier": 0.001, "cross_attn.in_proj": s, "cross_attn.out_proj": p}
    for i in range(depth):
        block = f"cross_modal_transformer.resblocks.{i}"
        expected |= {f"{block}.attn.in_proj": s, f"{block}.attn.out_proj": p}
        expected |= {f"{block}.mlp.c_fc": f, f"{block}.mlp.c_proj": p}
    expected |= {"mlm_head.dense": f, "mlm_head.fc": p}
    seen = set()
    for name, parameter in model.named_parameters():
        if name.startswith("base_model.") or parameter.ndim != 2:
            continue
        layer = name.removesuffix(".weight").removesuffix("_weight")
        values = parameter.detach().flatten()
        assert float(values.std()) == pytest.approx(expected[layer], rel=0.01), name
        assert abs(float(values.mean())) < 5 * expected[layer] / len(values) ** 0.5, name
        inside = float((values.abs() < expected[layer]).float().mean())
        assert inside == pytest.approx(0.6827, abs=0.01), name  # a normal distribution's share within one std
        seen.add(layer)
    assert seen == set(expected)
    assert model.classifier.bias.abs().sum() == 0
    assert model.mlm_head.fc.weight.shape == (V, D)
    for ln in (model.ln_pre_t, model.ln_pre_i, model.ln_post, model.mlm_head.ln):
        assert torch.equal(ln.weight, torch.ones(D)) and torch.equal(ln.bias, torch.zeros(D))


# ---- precision ----


def half_as_published(name):
    """Convolution, linear layers, attention, projections; not embeddings and normalisations."""
    layers = "conv1 in_proj_weight in_proj_bias out_proj c_fc c_proj dense fc classifier".split()
    words = name.split(".")
    return any(layer in words for layer in layers) or name.endswith((".text_projection", ".visual.proj"))


def test_fp16_halves_what_the_published_code_halves():
    model = tiny_model(precision="fp16", device="cpu")
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for name, dtype in types.items():
        assert dtype == (torch.float16 if half_as_published(name) else torch.float32), name
    in_fp32 = [name for name, dtype in types.items() if dtype == torch.float32]
    embeddings = [name for name in in_fp32 if not name.split(".")[-2].startswith("ln")]
    assert len(embeddings) == 4  # class, words, positions twice
    assert all("embedding" in name for name in embeddings)


@torch.no_grad()
@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.01), ("bf16", 0.05)])
def test_lower_precision_stays_near_fp32(precision, tolerance, few):
    model, exact = tiny_model(precision=precision), model_of(0)
    image, text = model.encode_image(few["images"]), model.encode_text(few["caption_ids"])
    assert image.dtype == text.dtype == torch.float32
    assert 0 < off(image, exact.encode_image(few["images"])) < tolerance
    assert 0 < off(text, exact.encode_text(few["caption_ids"])) < tolerance
    report, exact_report = model(few), exact(few)
    assert all(value.dtype == torch.float32 for value in report.values())
    for name in ("sdm_loss", "id_loss", "mlm_loss"):
        assert float(report[name]) == pytest.approx(float(exact_report[name]), rel=tolerance)


def test_bf16_keeps_its_weights_and_gradients_in_fp32(few):
    model = tiny_model(precision="bf16")
    total(model(few)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name


def test_fp32_is_the_cpus_own_precision():
    assert {parameter.dtype for parameter in model_of(0).parameters()} == {torch.float32}


# ---- ResNets ----

SMALL_RESNET = dict(embed_dim=64, grid=2, width=8, layers=(1, 2, 1, 1), text_width=64, text_layers=1)


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("resnet") / "resnet.pt"
    torch.save(recipe.resnet_weights(**SMALL_RESNET), path)
    return path


def test_a_resnet_gives_one_vector_an_image_and_serves_every_loss_but_mlm(resnet_file, few):
    model = build_model(tiny_args("sdm+itc+cmpm+id", pretrain_choice=resnet_file), CLASSES)
    images = recipe.pixels(5, (4, 3, 96, 32))
    assert model.encode_image(images).shape == (4, 64)
    assert model.base_model.encode_image(images).shape == (4, 64)
    positions = model.base_model.visual.attnpool.positional_embedding
    assert positions.shape == (1 + 3 * 1, 256)  # 1/32 of the image
    report = model({**few, "images": images})
    assert {"sdm_loss", "itc_loss", "cmpm_loss", "id_loss"} <= set(report)
    total(report).backward()
    assert model.base_model.visual.layer2[1].conv2.weight.grad.abs().sum() > 0


def test_micro_batches_of_a_resnet_are_refused_whatever_its_file_is_called(resnet_file):
    """It normalises over the samples at hand: the losses of a batch in parts are others."""
    args = tiny_args("sdm+id", pretrain_choice=resnet_file, micro_batch=4)
    with pytest.raises(InputError, match="--micro_batch is exact for a ViT only: .*resnet.pt is a ResNet"):
        build_model(args, CLASSES)


def test_mlm_with_a_resnet_is_refused_with_the_reason(resnet_file, capsys):
    with pytest.raises(InputError, match="mlm needs image tokens.*leave mlm out of --loss_names"):
        build_model(tiny_args("sdm+mlm", pretrain_choice=resnet_file), CLASSES)
    with pytest.raises(SystemExit) as stop:
        tiny_args("sdm+mlm", pretrain_choice="RN50")
    assert stop.value.code == 2 and "mlm needs image tokens" in capsys.readouterr().err


def test_image_tokens_follow_the_stride(few):
    model = tiny_model("itc", stride_size=8)
    tokens = model.base_model.encode_image(few["images"])
    assert tokens.shape == (4, 1 + ((96 - 16) // 8 + 1) * ((32 - 16) // 8 + 1), TINY["embed_dim"])


def test_a_text_length_beyond_the_encoders_positions_is_refused():
    with pytest.raises(InputError, match="--text_length 78: the text encoder has 77 positions"):
        tiny_model("itc", text_length=78)
