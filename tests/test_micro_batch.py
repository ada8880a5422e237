"""--micro_batch and --grad_checkpointing: the losses and gradients of the whole batch, in less memory."""

from itertools import combinations

import pytest
import torch

from datasets import build_dataloader
from model import build_model
from processor.micro_batch import backward_in_parts
from tests import processes
from tests.children import draw, rewritten, words
from tests.processes import together
from tests.recipe import COMBINATIONS, PUBLISHED, off
from utils.batch import Batch
from utils.losses import total_loss
from utils.options import get_args

B = 11
TWO_OR_THREE = ["+".join(names) for n in (2, 3) for names in combinations(PUBLISHED, n)]  # of IRRA's losses


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return rewritten(draw(tmp_path_factory.mktemp("drawn")))


@pytest.fixture(scope="module")
def batch_of(data):
    """batch_of(*options): a batch of 11 captions as the loader gives it, with all that losses may ask for."""
    batches = {}

    def of(*options):
        if options not in batches:
            typed = ("--batch_size", str(B), "--second_caption", "--second_view", *options)
            args = get_args(words(data, data, *typed, loss_names="mlm+nitc+simclr"))
            batches[options] = next(iter(build_dataloader(args)[0]))
        return batches[options]

    return of


def new_model(data, loss_names, *options):
    torch.manual_seed(0)
    model = build_model(get_args(words(data, data, *options, loss_names=loss_names)), num_classes=12)
    return model.train().double()  # in fp32 rounding hides what is wrong below 1e-5


def whole(model, batch):
    report = model(batch)
    total_loss(report).backward()
    return taken(model, report)


def in_parts(model, batch, size):
    return taken(model, backward_in_parts(model, [part.planned() for part in Batch.of(batch).parts(size)]))


def taken(model, report):
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return {name: value.detach() for name, value in report.items()}, gradients


def assert_same(found, expected):
    (report, gradients), (whole_report, whole_gradients) = found, expected
    assert report.keys() == whole_report.keys()
    for name, value in whole_report.items():
        assert float(report[name]) == pytest.approx(float(value), rel=1e-10, abs=1e-12), name
    for name, gradient in whole_gradients.items():
        assert gradient is not None and gradients[name] is not None, name
        assert off(gradients[name], gradient) < 1e-10, name


@pytest.mark.parametrize("typed", [typed for typed in COMBINATIONS if typed not in TWO_OR_THREE])
def test_parts_of_a_batch_give_its_losses_and_gradients(typed, data, batch_of):
    """Each loss alone, each of IRRA's left out, all of them; and those beside them."""
    model, batch = new_model(data, *typed.split()), batch_of()
    assert_same(in_parts(model, batch, 4), whole(model, batch))  # 4, 4 and 3 samples


@pytest.mark.parametrize("typed", TWO_OR_THREE)
def test_parts_of_a_batch_give_the_losses_and_gradients_of_two_or_three(typed, data, batch_of):
    test_parts_of_a_batch_give_its_losses_and_gradients(typed, data, batch_of)


@pytest.mark.parametrize("loss_names", ["mlm", "sdm+id+mlm", "itc+cmpm"])
@pytest.mark.parametrize("size", [1, 11, 100])
def test_parts_of_any_size_with_clean_captions(size, loss_names, data, batch_of):
    model, batch = new_model(data, loss_names), batch_of("--clean_captions")
    assert not torch.equal(batch["caption_ids"], batch["mlm_ids"])
    assert_same(in_parts(model, batch, size), whole(model, batch))


def test_a_part_without_a_masked_word_counts_as_it_does_in_the_batch(data, batch_of):
    model, batch = new_model(data, "sdm+mlm"), dict(batch_of())
    batch["mlm_labels"] = batch["mlm_labels"].clone()
    batch["mlm_labels"][:4] = 0
    assert_same(in_parts(model, batch, 4), whole(model, batch))


def test_the_weights_of_samples_count_in_parts_as_in_the_batch(data, batch_of):
    model, batch = new_model(data, "tal+sdm", "--token_selection"), dict(batch_of())
    batch["label_hat"] = torch.arange(B) % 3 > 0
    found = in_parts(model, batch, 4)
    assert_same(found, whole(model, batch))
    del batch["label_hat"]
    assert found[0]["tal_loss"] < 0.9 * whole(model, batch)[0]["tal_loss"]


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("loss_names", ["sdm+itc+cmpm+id+mlm", "itc"])
def test_activations_computed_twice_give_the_same_losses_and_gradients(
    loss_names, activation, data, batch_of
):
    options = ("--activation", activation)
    plain = new_model(data, loss_names, *options)
    frugal = new_model(data, loss_names, *options, "--grad_checkpointing")
    batch = batch_of()
    assert_same(whole(frugal, batch), whole(plain, batch))
    assert_same(in_parts(frugal, batch, 4), whole(plain, batch))


def test_a_training_in_parts_by_five_processes_is_the_training(data):
    """Two epochs with shares that differ in their number of parts, and one that is empty."""
    argv = words(data, data, "--batch_size", "45", loss_names="sdm+itc+cmpm+id+mlm")  # then a batch of 3
    (alone,) = together(1, processes.train_some, argv, 2)
    assert len(alone["reports"]) == 4
    for found in together(5, processes.train_some, [*argv, "--micro_batch", "4"], 2):
        for report, expected in zip(found["reports"], alone["reports"], strict=True):
            for name, value in expected.items():
                assert report[name] == pytest.approx(value, rel=1e-5), name
        for name, value in alone["weights"].items():
            assert (found["weights"][name] - value).abs().max() < 1e-5, name


def test_a_resnet_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        get_args(["--pretrain_choice", "RN50", "--loss_names", "sdm+id", "--micro_batch", "16"])
    assert stop.value.code == 2
    assert "--micro_batch is exact for a ViT only" in capsys.readouterr().err


class Saved:
    """Counts the bytes that autograd keeps for the backward pass, each stretch of memory once."""

    def __init__(self, model):
        self.of_model = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.held, self.bytes, self.peak = {}, 0, 0

    def pack(self, tensor):
        return self.Held(self, tensor)

    def unpack(self, held):
        return held.tensor

    class Held:
        def __init__(self, saved, tensor):
            self.saved, self.tensor, self.place = saved, tensor, tensor.untyped_storage().data_ptr()
            if self.place not in saved.of_model:
                saved.held[self.place] = saved.held.get(self.place, 0) + 1
                if saved.held[self.place] == 1:
                    saved.bytes += tensor.untyped_storage().nbytes()
                    saved.peak = max(saved.peak, saved.bytes)

        def __del__(self):
            if self.place not in self.saved.of_model:
                self.saved.held[self.place] -= 1
                if not self.saved.held[self.place]:
                    self.saved.bytes -= self.tensor.untyped_storage().nbytes()


def test_a_quarter_of_the_batch_at_a_time_keeps_less_than_half_for_the_backward_pass(data):
    """What does not depend on the batch included; benchmarks/memory.py measures the whole process."""
    model = new_model(data, "sdm+id").float()
    batch = {
        "pids": torch.arange(48) % 12,
        "images": torch.randn(48, 3, 64, 32),
        "caption_ids": torch.randint(1, 49405, (48, 48)).index_fill(1, torch.tensor([20]), 49407),
    }
    arms = {"whole": lambda: whole(model, batch), "quarter": lambda: in_parts(model, batch, 12)}
    peaks = {}
    for name, run in arms.items():
        saved = Saved(model)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            run()
        assert saved.bytes == 0, name
        peaks[name] = saved.peak
    assert peaks["whole"] / 4 <= peaks["quarter"] < peaks["whole"] / 2, peaks
