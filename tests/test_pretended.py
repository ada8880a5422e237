"""The default path of a GPU on a pretended one (benchmarks/pretended.py): each tensor on the right device, of
the right type, the host waiting at log time only, no memory that grows, a CPU's numbers bit for bit."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from benchmarks.pretended import DEVICE, Pretended, WrongDevice
from benchmarks.step import batch_of
from datasets.image_text import finish
from datasets.tokenizer import START_SIMILARITY
from datasets.transforms import erase, normalise
from model import build_model
from processor.division import sample_losses
from processor.evaluator import encode, evaluate
from processor.similarity import WordSimilarities
from processor.trainer import FiniteWatch, NotFinite, Steps, train_one_epoch
from retrieval.encoders import Encoders
from solver import WeightAverage, build_optimizer
from tests.recipe import COMBINATIONS
from utils.batch import Batch
from utils.metrics import rank_features
from utils.options import get_args

CPU = torch.device("cpu")
PERSONS, IMG_SIZE = 7, (64, 32)
TINY = "embed_dim=64 vision_layers=2 vision_width=64 transformer_width=64 transformer_layers=1".split()
PRECISIONS = ("fp32", "fp16", "bf16")
READS = "aten._local_scalar_dense.default"


def build(device, precision, loss_names="sdm+mlm+id", *more):
    """(model, optimizer), from the same weights on every device."""
    args = get_args(
        [
            *("--pretrain_choice", "random", "--clip_architecture", *TINY, "--cmt_depth", "2"),
            *("--img_size", *map(str, IMG_SIZE), "--loss_names", loss_names, "--device", "cpu"),
            *("--precision", precision, "--lr", "1e-3", *more),
        ]
    )
    torch.manual_seed(0)
    model = build_model(args, PERSONS).to(device)
    return model, build_optimizer(args, model)


def batches(number, size=6, clean=False):
    """Fresh ones each time: the training loop may keep nothing of them."""
    for seed in range(number):
        batch = batch_of(size, IMG_SIZE, seed)
        batch["pids"] %= PERSONS
        batch["second_caption_ids"] = batch["caption_ids"].roll(1, dims=0)
        batch["second_factor"] = torch.full((size,), 0.4)
        batch["second_images"] = batch["images"].flip(3)
        batch["strong_images"] = torch.stack([batch["images"].flip(2), batch["images"] / 2], dim=1)
        if clean:
            masked = batch["mlm_labels"] != 0
            batch["caption_ids"] = torch.where(masked, batch["mlm_labels"], batch["caption_ids"])
        yield batch


class Loader:
    """Batches as TrainLoader gives them: ids on the host, images on the device."""

    def __init__(self, device, number, **options):
        self.device, self.number, self.options = device, number, options

    def __len__(self):
        return self.number

    def __iter__(self):
        for batch in batches(self.number, **self.options):
            yield self.moved(batch)  # and keeps nothing of it

    def moved(self, batch):
        pixels = {key: value for key, value in batch.items() if key.endswith("images")}
        return {**batch, **{key: value.to(self.device, non_blocking=True) for key, value in pixels.items()}}


def train(device, precision, loss_names="sdm+mlm+id", more=(), steps=2, clean=False, **options):
    """(averages, weights, live bytes after each step) of some steps, log_period 100."""
    model, optimizer = build(device, precision, loss_names, *more)
    gpu = torch.utils._python_dispatch._get_current_dispatch_mode()
    live = []
    if gpu:
        gpu.waits.clear()
        gpu.products.clear()
        options["after_step"] = lambda step, meters: live.append(gpu.live)
    averages = train_one_epoch(
        model, Loader(device, steps, clean=clean), optimizer, device, 1, Steps(log_period=100, **options)
    )
    return averages, [parameter.detach().cpu() for parameter in model.parameters()], live


def on_both(*args, **options):
    """What `train` gives on a CPU and on the pretended GPU, and that GPU."""
    on_cpu = train(CPU, *args, **options)
    with Pretended() as gpu:
        there = train(DEVICE, *args, **options)
    return on_cpu, there, gpu


def assert_equal(on_cpu, there):
    assert on_cpu[0] == there[0]
    assert all(torch.equal(a, b) for a, b in zip(on_cpu[1], there[1], strict=True))


# ---- training ----


class Masking(Loader):
    """With what --mask_by_similarity asks of a loader: which captions there are, and which a batch holds."""

    def __init__(self, device, number):
        super().__init__(device, number)
        self.dataset = SimpleNamespace(caption_ids=torch.cat([b["caption_ids"] for b in batches(number)]))

    def __iter__(self):
        for place, batch in enumerate(super().__iter__()):
            yield {**batch, "indices": torch.arange(6) + 6 * place}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_similarities_of_words_are_found_there_without_waiting(precision):
    found = []
    for device in (CPU, DEVICE):
        with Pretended() if device is DEVICE else nullcontext() as gpu:
            model, _ = build(device, precision)
            words = WordSimilarities(model, Masking(device, 3), device)
            if gpu:
                gpu.waits.clear()
            assert len(list(words)) == 3
            assert not gpu or not gpu.waits
            words.begin_epoch()
            found.append(words.loader.similarities)
    assert torch.equal(*found) and (found[0] != START_SIMILARITY).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("typed", COMBINATIONS)
def test_every_combination_of_losses_computes_there_what_it_does_here(typed, precision):
    loss_names, *more = typed.split()
    on_cpu, there, gpu = on_both(precision, loss_names, more=more)
    assert_equal(on_cpu, there)
    # the watch at the epoch's end, the averages, and this test, which reads the weights
    assert gpu.waits == {READS: 1, "copy to the host": 1 + len(there[1])}


WAYS = {
    "micro-batches": dict(micro_batch=4),
    "checkpointing": dict(more=["--grad_checkpointing"]),
    "both": dict(micro_batch=4, more=["--grad_checkpointing"]),
    "clean captions": dict(clean=True),
    "clipped": dict(max_grad_norm=0.5),
    "SGD": dict(more=["--optimizer", "SGD"]),
    "normalised tokens": dict(loss_names="tal", more=["--token_selection", "--tse_norm", "train"]),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_train_computes_there_what_it_does_here(way, precision):
    on_cpu, there, gpu = on_both(precision, **WAYS[way])
    assert_equal(on_cpu, there)
    assert gpu.waits[READS] == 1
    if way not in ("clipped", "SGD"):  # there PyTorch asks C++ for the device, which here is the CPU
        assert gpu.waits["copy to the host"] == 1 + len(there[1]) and len(gpu.waits) == 2


def averaged(device):
    """The averages of three steps in fp16, the weights while they are in place, and those after."""
    model, optimizer = build(device, "fp16", "sdm")
    ema, watch = WeightAverage(model, 0.9), FiniteWatch(model, optimizer, 1, period=100)
    how = Steps(watch=watch, after_step=lambda *_: ema.update(watch.left_out))
    train_one_epoch(model, Loader(device, 3), optimizer, device, 1, how)
    with ema.in_place():
        inside = [weight.detach().cpu().clone() for weight in model.parameters()]
    after = [weight.detach().cpu() for weight in model.parameters()]
    return [average.cpu() for average in ema.averages.values()], inside, after


def test_weights_are_averaged_there_as_here():
    here = averaged(CPU)
    with Pretended():
        there = averaged(DEVICE)
    for a, b in zip(here, there, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Numbered(Masking):
    """With what --division asks of a loader."""

    def __init__(self, device, number):
        super().__init__(device, number)
        self.dataset = range(6 * number)

    def __iter__(self):
        return map(Batch.of, super().__iter__())


def test_losses_of_samples_are_found_there_and_read_once():
    found = []
    for device, context in ((CPU, nullcontext()), (DEVICE, Pretended())):
        with context as gpu:
            model, _ = build(device, "fp16", "sdm+tal", "--token_selection")
            if gpu:
                gpu.waits.clear()
            found.append(sample_losses(model, Numbered(device, 3), device))
            assert not gpu or gpu.waits == {"copy to the host": 1}
    for here, there in zip(*found, strict=True):
        assert (here == there).all() and len(here) == 18


@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_are_in_the_precision_but_for_the_losses(precision):
    """In fp32 are only those of features with features, as many as in the losses alone."""
    _, _, gpu = on_both(precision, steps=1)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    with Pretended() as alone:
        features = [torch.randn(6, 64).to(DEVICE).requires_grad_() for _ in range(2)]
        model, _ = build(DEVICE, precision, "sdm")
        found = dict(zip(("image_features", "text_features"), features, strict=True))
        report = model.compare(found, {"pids": torch.arange(6).to(DEVICE)})
        report["sdm_loss"].backward()
    in_losses = alone.products[torch.float32]
    assert set(alone.products) == {torch.float32} and 0 < in_losses < 5
    assert gpu.products[dtype] > 50
    assert precision == "fp32" or gpu.products == {dtype: gpu.products[dtype], torch.float32: in_losses}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_host_waits_at_log_time_only(precision):
    """Between two looks not once; a log line reads the watch, the averages, the share of unmoved weights."""
    waits = []
    with Pretended() as gpu:
        model, optimizer = build(DEVICE, precision)

        def note(step, meters):
            waits.append(sum(gpu.waits.values()))
            gpu.waits.clear()

        gpu.waits.clear()
        train_one_epoch(model, Loader(DEVICE, 8), optimizer, DEVICE, 1, Steps(log_period=4, after_step=note))
    assert [bool(number) for number in waits] == [False, False, False, True] * 2
    assert waits[3] <= 3


@pytest.mark.parametrize("precision", PRECISIONS)
def test_live_memory_is_the_same_after_step_3_and_after_step_25(precision):
    """With log_period 10; a watch that kept batches until it looked grew by a batch a step."""
    live, steps = [], 25
    with Pretended() as gpu:
        model, optimizer = build(DEVICE, precision, "sdm")
        how = Steps(log_period=10, after_step=lambda *_: live.append(gpu.live))
        train_one_epoch(model, Loader(DEVICE, steps), optimizer, DEVICE, 1, how)
    assert len(live) == steps and set(live[2:]) == {live[2]}


def test_a_batch_is_gone_when_its_step_is_done():
    """Before the next one is asked for: what is held does not depend on the size of the batch."""
    asked = []

    class Asked(Loader):
        def __iter__(self):
            for batch in super().__iter__():
                yield {**batch, **{key: batch.pop(key) for key in [*batch] if key.endswith("images")}}
                del batch
                asked[-1].append(gpu.live)

    for size in (2, 6):
        asked.append([])
        with Pretended() as gpu:
            model, optimizer = build(DEVICE, "fp16", "sdm")
            train_one_epoch(model, Asked(DEVICE, 3, size=size), optimizer, DEVICE, 1)
    assert asked[0] == asked[1] and len(asked[0]) == 3


def test_a_watch_that_keeps_batches_is_seen(monkeypatch):
    """The fault that the test above is for, put back."""
    kept, before_step = [], FiniteWatch.before_step

    def keeping(self, step, loss, report, batch):
        kept.append(batch)
        before_step(self, step, loss, report, batch)

    monkeypatch.setattr(FiniteWatch, "before_step", keeping)
    with Pretended():
        _, _, live = train(DEVICE, "fp16", "sdm", steps=5)
        images = 4 * 6 * 3 * 64 * 32 * 4  # a batch's images, their second view and two strong ones
        assert [b - a for a, b in zip(live[1:], live[2:], strict=False)] == [images] * 3
        kept.clear()


def take_a_bad_step(device, precision):
    """It changes nothing and is named."""
    model, optimizer = build(device, precision)
    start = [parameter.detach().cpu().clone() for parameter in model.parameters()]
    loader = list(Loader(device, 3))
    loader[0]["images"][2, 0, 5, 5] = torch.nan
    with pytest.raises(NotFinite) as raised:
        train_one_epoch(model, loader, optimizer, device, 1, Steps(log_period=100))
    end = [parameter.detach().cpu() for parameter in model.parameters()]
    assert raised.value.evidence["iteration"] == 1, f"{precision}: {raised.value}"
    assert raised.value.evidence["pids"] == next(batches(1))["pids"].tolist()
    assert all(weight.isfinite().all() for weight in end), f"{precision}: it was taken"
    if precision == "fp16":  # stands still from there to the look; a fused optimiser takes the good ones
        assert all(torch.equal(a, b) for a, b in zip(start, end, strict=True)), "weights have moved"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_bad_step_changes_nothing_there_and_is_named(precision):
    with Pretended():
        take_a_bad_step(DEVICE, precision)


# ---- evaluation, ranking, search ----


def loaders(device):
    many = list(batches(3, size=5))
    images = [(batch["pids"], batch["images"].to(device, non_blocking=True)) for batch in many]
    return images, [(batch["pids"], batch["mlm_ids"]) for batch in many]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_evaluation_gives_there_what_it_gives_here(precision):
    found = []
    for device, context in ((CPU, nullcontext()), (DEVICE, Pretended())):
        with context:
            model, _ = build(device, precision)
            features = encode(model, *loaders(device), device)
            assert features.text.device == features.image.device == device
            assert features.text_pids.device == features.image_pids.device == CPU
            rows, ranking = evaluate(features, i2t=True)
            found.append((rows, ranking.indices.tolist(), features.text.cpu(), features.image.cpu()))
    (rows, best, *here), (there_rows, there_best, *there) = found
    assert rows == there_rows and best == there_best
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("ties", [False, True])
def test_ranking_gives_there_what_it_gives_here(ties):
    generator = torch.Generator().manual_seed(1)
    query, gallery = (torch.randn(n, 8, generator=generator) for n in (40, 30))
    if ties:
        query, gallery = query.round(), gallery.round()
    pids = [torch.randint(0, 9, (n,), generator=generator) for n in (40, 30)]
    here = rank_features(query, gallery, *pids)
    with Pretended():
        there = rank_features(query.to(DEVICE), gallery.to(DEVICE), *pids)
        there = [value.cpu() if isinstance(value, torch.Tensor) else value for value in there]
    assert here.tied == there[-1] and (here.tied > 0) == ties
    assert all(torch.equal(a, b) for a, b in zip(here[:4], there[:4], strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_searchs_encoders_give_there_what_they_give_here(precision):
    sentences = ["a woman in a red coat", "a man with a black bag and white shoes"]
    pictures = [torch.randint(0, 256, (3, *IMG_SIZE), dtype=torch.uint8) for _ in range(3)]
    found = []
    for device, context in ((CPU, nullcontext()), (DEVICE, Pretended())):
        with context:
            model, _ = build(device, precision)
            encoders = Encoders(model, IMG_SIZE, 77, device, "none")
            found.append((encoders.text_features(sentences), encoders.image_features(pictures)))
    for here, there in zip(*found, strict=True):
        # a unit in the last place apart with PyTorch 2.6
        assert here.dtype == there.dtype == "float32" and abs(here - there).max() < 1e-6


def test_pixels_are_finished_there_without_a_wait():
    pixels = torch.randint(0, 256, (4, 3, *IMG_SIZE), dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, 0, 0], [3, 4, 10, 6], [0, 0, 64, 32], [60, 30, 4, 2]])
    here = erase(normalise(pixels), boxes)
    with Pretended() as gpu:
        there = finish(pixels, DEVICE, boxes)
        assert there.device == DEVICE and not gpu.waits
        assert torch.equal(here, there.cpu())


# ---- the pretended device itself ----


def test_a_tensor_left_on_the_host_is_an_error():
    with Pretended(), pytest.raises(WrongDevice, match="aten.add.Tensor.*cpu"):
        torch.ones(3).to(DEVICE) + torch.ones(3)


def test_a_number_of_the_host_joins_no_tensor_there():
    """Elsewhere it may stand beside one; a list of losses with a constant among them is an error on a GPU."""
    with Pretended():
        x = torch.ones(()).to(DEVICE)
        assert (x + torch.ones(())).device == DEVICE
        with pytest.raises(WrongDevice, match="stack"):
            torch.stack([x, torch.ones(())])


def test_a_batch_left_on_the_host_is_an_error():
    with Pretended(), pytest.raises(WrongDevice):
        model, _ = build(DEVICE, "fp16")
        model(next(batches(1)))


def test_types_are_not_mixed_in_a_product():
    with Pretended(), pytest.raises(RuntimeError, match="dtype"):
        torch.ones(3, 3).to(DEVICE) @ torch.ones(3, 3).half().to(DEVICE)


@pytest.mark.parametrize(
    ("name", "wait"),
    [
        ("item", lambda x: x[0].item()),
        ("float", lambda x: float(x[0])),
        ("if", lambda x: bool(x[0] > 0)),
        ("list", lambda x: x.tolist()),
        ("cpu", lambda x: x.cpu()),
        ("to", lambda x: x.to("cpu")),
        ("nonzero", lambda x: x.nonzero()),
        ("truth values", lambda x: x[x > 0]),
        ("equal", lambda x: torch.equal(x, x)),
        ("constant", lambda x: x + torch.tensor([1.0, 2.0, 3.0], device=x.device)),
        ("from the host", lambda x: x + torch.ones(3).to(x.device)),
    ],
)
def test_what_makes_the_host_wait_is_counted(name, wait):
    with Pretended() as gpu:
        x = torch.ones(3).to(DEVICE, non_blocking=True)
        (x * 2).sum()
        assert not gpu.waits
        wait(x)
        assert gpu.waits


def test_bytes_are_counted_while_they_are_held():
    with Pretended() as gpu:
        x = torch.zeros(1000, device=DEVICE)
        assert gpu.live == 4096  # blocks of 512
        view, y = x[10:], x.half()
        assert gpu.live == 4096 + 2048
        del x, y
        assert gpu.live == 4096 and gpu.peak == 4096 + 2048  # the view holds all of it
        del view
        assert gpu.live == 0


def test_without_values_the_same_bytes_are_held():
    """What an estimate counts is what a step with values holds."""
    counted = []
    for values in (True, False):
        with Pretended(values) as gpu:
            model, optimizer = build(DEVICE, "fp16")
            batch = Batch.of(next(iter(Loader(DEVICE, 1)))).planned().to(DEVICE)
            sum(value for name, value in model(batch).items() if "loss" in name).backward()
            optimizer.step()
            counted.append((gpu.live, gpu.peak))
    assert counted[0] == counted[1]
