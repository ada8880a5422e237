"""Every shortcut is exact: losses, gradients and ten steps against the published code restated plainly."""

import shutil

import pytest
import torch

from benchmarks import published
from solver import build_optimizer, frac_unmoved, sampled_weights
from tests import recipe
from utils.batch import Batch

B, EOT, MASK = 4, 49407, 49405
EXACT = {torch.float32: 1e-6, torch.float64: 1e-12}


def batch_of(seed, clean=False, dtype=torch.float32):
    """Captions of several lengths, two persons twice. Masked as published, in place, unless clean."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(B, 77, dtype=torch.long)
    for row, length in enumerate(torch.randint(4, 40, (B,), generator=generator).tolist()):
        ids[row, 0], ids[row, length] = 49406, EOT
        ids[row, 1:length] = torch.randint(1, MASK, (length - 1,), generator=generator)
    chosen = (ids > 0) & (ids < MASK) & (torch.rand(B, 77, generator=generator) < 0.2)
    chosen[:, 1] = True
    mlm_ids = ids.masked_fill(chosen, MASK)
    return {
        "pids": torch.tensor([3, 36, 3, 0]),
        "image_ids": torch.arange(B),
        "images": recipe.pixels(seed, (B, 3, 96, 32)).to(dtype),
        "caption_ids": ids if clean else mlm_ids.clone(),
        "mlm_ids": mlm_ids,
        "mlm_labels": ids * chosen,
    }


def model_of(dtype=torch.float32):
    return recipe.tiny_model(MLM=True).to(dtype)


def total(report):
    return sum(value for name, value in report.items() if "loss" in name)


def gradients(model, report):
    model.zero_grad()
    total(report).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def close(found, expected, tolerance, what):
    """The difference is at most this share of what is expected, both measured by their norm."""
    off = float((found - expected).norm()) / (float(expected.norm()) or 1.0)
    assert off <= tolerance, f"{what}: {off:.2g}"


CASES = [
    pytest.param(dtype, clean, id=f"{str(dtype)[6:]}-{'clean' if clean else 'as published'}")
    for dtype in EXACT
    for clean in (False, True)
]


@pytest.mark.parametrize(("dtype", "clean"), CASES)
def test_losses_and_gradients_are_those_of_the_plain_computation(dtype, clean):
    model, batch = model_of(dtype), batch_of(1, clean, dtype)
    expected = published.forward(model, batch)
    found = model(batch)
    for name in ("sdm_loss", "id_loss", "mlm_loss", "img_acc", "txt_acc", "mlm_acc"):
        close(found[name].detach(), expected[name].detach(), EXACT[dtype], name)
    of_plain = gradients(model, expected)
    of_ours = gradients(model, found)
    if dtype == torch.float64:
        for name, gradient in of_ours.items():
            close(gradient, of_plain[name], EXACT[dtype], name)
    else:  # the plain computation's own rounding, against float64, is 1.8e-6
        close(flat(of_ours), flat(of_plain), 2e-6, "gradient")


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients.values()]).double()


@pytest.mark.parametrize("switch", published.SWITCHES)
def test_each_shortcut_alone_changes_nothing(switch):
    model, batch = model_of(torch.float64), batch_of(2, dtype=torch.float64)
    expected = published.forward(model, batch)
    found = published.forward(model, batch, (switch,))
    of_plain, of_switch = gradients(model, expected), gradients(model, found)
    for name in expected:
        close(found[name].detach(), expected[name].detach(), 1e-12, name)
    for name in of_plain:
        close(of_switch[name], of_plain[name], 1e-12, name)


@pytest.mark.parametrize(("dtype", "clean"), CASES)
def test_ten_steps_end_at_the_same_weights(dtype, clean):
    args = recipe.tiny_args(MLM=True)  # the recipe's rate
    ours, plain = model_of(dtype), model_of(dtype)
    optimizers = build_optimizer(args, ours), published.optimizer_of(args, plain)
    assert len(optimizers[0].param_groups) < 10 < len(optimizers[1].param_groups)
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for step in range(10):
        batch = batch_of(100 + step, clean, dtype)
        losses = []
        for model, optimizer, forward in ((ours, optimizers[0], ours), (plain, optimizers[1], None)):
            report = forward(batch) if forward else published.forward(model, batch)
            optimizer.zero_grad()
            total(report).backward()
            optimizer.step()
            losses.append(total(report).detach())
        close(losses[0], losses[1], EXACT[dtype], f"loss of step {step}")
    reached = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        assert not torch.equal(reached[name], start[name]), name
        close(parameter.detach(), reached[name].detach(), EXACT[dtype], name)


def test_activation_keeps_only_its_input_and_has_the_plain_slope():
    from model.clip_model import QuickGELU

    x = torch.linspace(-9, 9, 101, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(QuickGELU(), x)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = QuickGELU()(x)
    assert len(kept) == 1 and kept[0].data_ptr() == x.data_ptr()
    assert torch.equal(y, x * torch.sigmoid(1.702 * x))


# ---- lengths of captions and compiled encoders ----


def test_clean_captions_are_cut_to_a_few_lengths():
    seen = set()
    for length in range(2, 78):
        ids = torch.zeros(2, 77, dtype=torch.long)
        ids[0, 1], ids[1, length - 1] = EOT, EOT
        cut = Batch(pids=ids, caption_ids=ids).planned().text_length
        assert length <= cut <= 77
        seen.add(cut)
    assert seen == {16, 32, 48, 64, 77}


def test_compiled_encoders_keep_keys_and_values_and_are_compiled_once():
    plain, model = model_of(), model_of()
    # the graphs of torch.compile, without its slow code generation
    model.compile_encoders(backend="aot_eager")
    assert model.state_dict().keys() == plain.state_dict().keys()
    graphs = torch._dynamo.utils.counters["stats"]

    torch._dynamo.reset()
    batch = batch_of(1, clean=True)
    found, expected = model(batch), plain(batch)
    close(total(found).detach(), total(expected).detach(), 1e-6, "loss")
    close(flat(gradients(model, found)), flat(gradients(plain, expected)), 2e-6, "gradient")
    compiled = graphs["unique_graphs"]
    for seed, rows in ((2, B), (3, 3), (4, B), (5, 2)):  # other lengths, a smaller last batch
        total(model({key: value[:rows] for key, value in batch_of(seed, clean=True).items()})).backward()
    assert graphs["unique_graphs"] == compiled
    with torch.no_grad():
        images = batch_of(7)["images"]
        assert torch.equal(model.encode_image(images), plain.encode_image(images))
    assert graphs["unique_graphs"] == compiled  # evaluation goes without


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++, with which torch.compile makes its code")
def test_what_torch_compile_generates_gives_the_same_losses_and_gradients():
    """In PyTorch 2.6 the gradient of the words' table came out wrong where its look-up was compiled too."""
    plain, model = model_of(), model_of()
    model.compile_encoders()
    torch._dynamo.reset()
    batch = batch_of(1)
    found, expected = model(batch), plain(batch)
    close(total(found).detach(), total(expected).detach(), 1e-6, "loss")
    found, expected = gradients(model, found), gradients(plain, expected)
    for name, gradient in expected.items():
        close(found[name], gradient, 2e-5, name)


# ---- memory of the host ----


def test_the_loop_keeps_nothing_from_step_to_step():
    import gc

    from processor.trainer import Steps, train_one_epoch

    args = recipe.tiny_args(MLM=True)
    model = model_of()
    optimizer = build_optimizer(args, model)
    counts, cpu = [], torch.device("cpu")

    def tensors(step, meters):
        if step in (2, 6):
            gc.collect()
            counts.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))

    batches = [batch_of(seed) for seed in range(2)] * 3
    train_one_epoch(model, batches, optimizer, cpu, 1, Steps(log_period=100, after_step=tensors))
    assert counts[1] <= counts[0]


def test_frac_unmoved_is_the_share_of_weights_a_step_left_alone():
    model = torch.nn.Linear(64, 32, bias=False).half()
    before = sampled_weights(model)
    assert frac_unmoved(model, before) == 1
    with torch.no_grad():
        model.weight[:8] += 1
        model.weight[8:] += 1e-9  # too little for fp16
    assert frac_unmoved(model, before) == 0.75
