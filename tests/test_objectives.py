"""The five losses against published figures, hand-worked tables and plain loops."""

import math

import pytest
import torch

from model import objectives
from tests.recipe import figures, pixels

CASES = [pytest.param(case, id=f"seed{case['seed']}") for case in figures("losses")]


# ---- published values and gradients ----


def inputs_of(case, loss):
    """The tensors that a loss of losses.json is differentiated by, and the loss as a function of them."""
    seed, B, D, classes = (case[key] for key in ("seed", "batch", "dim", "classes"))
    pids, scale = torch.tensor(case["pids"]), 1 / case["temperature"]
    features = [pixels(seed + 1, (B, D)), pixels(seed + 2, (B, D))]
    logits = [pixels(seed + 3, (B, classes)), pixels(seed + 4, (B, classes))]
    labels = torch.tensor(case["mlm_labels"]).flatten()
    return {
        "sdm": (features, lambda image, text: objectives.compute_sdm(image, text, pids, scale)),
        "itc": (features, lambda image, text: objectives.compute_itc(image, text, scale)),
        "cmpm": (features, lambda image, text: objectives.compute_cmpm(image, text, pids)),
        "id": (logits, lambda image, text: objectives.compute_id(image, text, pids)),
        "mlm": ([pixels(seed + 6, (12 * B, 50))], lambda scores: objectives.compute_mlm(scores, labels)),
    }[loss]


def value_and_gradients(function, inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    loss = function(*inputs)
    return loss.item(), [g.double() for g in torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("loss", ["sdm", "itc", "cmpm", "id", "mlm"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_the_published_ones(case, loss):
    inputs, function = inputs_of(case, loss)
    value, gradients = value_and_gradients(function, inputs)
    published = case["results"][loss]
    assert value == pytest.approx(published["loss"], rel=1e-5)
    assert len(gradients) == len(published["grad"])
    for found, expected in zip(gradients, published["grad"], strict=True):
        l2 = expected["l2"]
        assert float(found.norm()) == pytest.approx(l2, rel=1e-5)
        assert abs(float(found.sum()) - expected["sum"]) <= 1e-5 * l2 * math.sqrt(found.numel())
        first4 = torch.tensor(expected["first4"], dtype=torch.float64)
        assert float((found.flatten()[:4] - first4).abs().max()) <= 1e-5 * l2


def test_the_published_figures_left_out_are_those_of_the_wrong_axis():
    """With image ids the published code divides along the wrong axis; ours follows the definition (below)."""
    names = {name for case in figures("losses") for name in case["results"]}
    assert names - {"sdm", "itc", "cmpm", "id", "mlm"} == {"sdm_image_id", "sdm_image_id_factor_0.6"}


# ---- plain loops in float64 ----


def unit(row):
    length = math.sqrt(sum(x * x for x in row))
    return [x / length for x in row]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(row):
    powers = [math.exp(x - max(row)) for x in row]
    return [x / sum(powers) for x in powers]


def sdm_by_loops(image, text, pids, scale, image_ids=None, factor=0.3):
    """Σ_j p (log p − log(q + 1e-8)) row by row, texts to images and back, as SPEC writes it."""
    image, text = [unit(row) for row in image], [unit(row) for row in text]
    B, loss = len(pids), 0.0
    for queries, gallery in ((text, image), (image, text)):
        for i in range(B):
            p = softmax([scale * dot(queries[i], gallery[j]) for j in range(B)])
            y = [float(pids[i] == pids[j]) for j in range(B)]
            if image_ids is not None:
                same = [float(image_ids[i] == image_ids[j]) for j in range(B)]
                y = [(y[j] - same[j]) * factor + same[j] for j in range(B)]
            q = [x / sum(y) for x in y]
            loss += sum(p[j] * (math.log(p[j]) - math.log(q[j] + 1e-8)) for j in range(B) if p[j] > 0) / B
    return loss


@pytest.mark.parametrize("image_ids", [None, [0, 1, 1, 2, 3, 4, 5]], ids=["pids", "pids and image ids"])
@pytest.mark.parametrize("factor", [0.3, 0.6])
def test_sdm_with_repeated_persons_equals_the_loops(image_ids, factor):
    image, text = pixels(21, (7, 10)), pixels(22, (7, 10))
    pids = [4, 4, 4, 9, 9, 2, 4]  # rows of 4, 2 and 1 matches
    ids = None if image_ids is None else torch.tensor(image_ids)
    found = objectives.compute_sdm(image, text, torch.tensor(pids), 14.0, image_ids=ids, factor=factor)
    assert float(found) == pytest.approx(
        sdm_by_loops(image.tolist(), text.tolist(), pids, 14.0, image_ids, factor), rel=1e-5
    )


def test_cmpm_with_repeated_persons_equals_the_loops():
    image, text = pixels(23, (5, 6)), pixels(24, (5, 6))
    pids, B, loss = [1, 1, 0, 1, 0], 5, 0.0
    for queries, gallery in ((image.tolist(), text.tolist()), (text.tolist(), image.tolist())):
        for i in range(B):
            p = softmax([dot(queries[i], unit(gallery[j])) for j in range(B)])
            y = [float(pids[i] == pids[j]) for j in range(B)]
            q = unit(y)
            loss += sum(p[j] * (math.log(p[j]) - math.log(q[j] + 1e-8)) for j in range(B)) / B
    assert float(objectives.compute_cmpm(image, text, torch.tensor(pids))) == pytest.approx(loss, rel=1e-5)


# ---- tables worked by hand ----

APART = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # two pairs at right angles; a text equals its image


def test_sdm_of_two_pairs_by_hand():
    # logits [[ln 3, 0], [0, ln 3]]: p = (3/4, 1/4), q = (1, 0) on each of the 4 rows
    row = 0.75 * math.log(0.75) + 0.25 * (math.log(0.25) - math.log(1e-8))
    found = objectives.compute_sdm(APART, APART, torch.tensor([5, 8]), math.log(3))
    assert float(found) == pytest.approx(2 * row, rel=1e-6)


def test_sdm_of_one_person_twice_by_hand():
    # both pairs show the same person: q = (1/2, 1/2), so a loss of 0 needs equal similarities
    row = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    same = torch.tensor([5, 5])
    assert float(objectives.compute_sdm(APART, APART, same, math.log(3))) == pytest.approx(2 * row, abs=1e-6)
    alike = torch.ones(2, 2)
    assert float(objectives.compute_sdm(alike, alike, same, math.log(3))) == pytest.approx(0, abs=1e-6)


def test_sdm_with_image_ids_by_hand():
    # one person, two images: y = (1, 0.3), q = (10/13, 3/13)
    row = 0.75 * math.log(0.75 * 13 / 10) + 0.25 * math.log(0.25 * 13 / 3)
    found = objectives.compute_sdm(APART, APART, torch.tensor([5, 5]), math.log(3), torch.tensor([0, 1]))
    assert float(found) == pytest.approx(2 * row, abs=1e-6)


def test_itc_of_two_pairs_by_hand():
    # p of the pair is 3/4 on every row and column, whatever the length of the features and whoever is shown
    found = objectives.compute_itc(7 * APART, 0.2 * APART, math.log(3))
    assert float(found) == pytest.approx(math.log(4 / 3), rel=1e-6)


def test_cmpm_of_two_pairs_by_hand():
    # image·t̂ᵀ = 2 ln 3 on the diagonal: p = (9/10, 1/10); text·v̂ᵀ = ln 3: p = (3/4, 1/4); q = (1, 0)
    rows = [p * math.log(p) + (1 - p) * (math.log(1 - p) - math.log(1e-8)) for p in (0.9, 0.75)]
    found = objectives.compute_cmpm(2 * math.log(3) * APART, math.log(3) * APART, torch.tensor([0, 1]))
    assert float(found) == pytest.approx(sum(rows), rel=1e-6)


def test_cmpm_of_one_person_twice_by_hand():
    # q = (1, 1) / √2: it does not sum to 1, so the loss may be negative
    rows = [p * math.log(p) + (1 - p) * math.log(1 - p) - math.log(2**-0.5) for p in (0.9, 0.75)]
    found = objectives.compute_cmpm(2 * math.log(3) * APART, math.log(3) * APART, torch.tensor([6, 6]))
    assert float(found) == pytest.approx(sum(rows), abs=1e-6)


def test_id_by_hand():
    # persons 0 and 2 of 3; image: p = 3/5 and 1/3, text: p = 1/3 and 2/4
    image = torch.tensor([[3.0, 1.0, 1.0], [1.0, 1.0, 1.0]]).log()
    text = torch.tensor([[2.0, 2.0, 2.0], [1.0, 1.0, 2.0]]).log()
    by_image = (math.log(5 / 3) + math.log(3)) / 2
    by_text = (math.log(3) + math.log(2)) / 2
    found = objectives.compute_id(image, text, torch.tensor([0, 2]))
    assert float(found) == pytest.approx((by_image + by_text) / 2, rel=1e-6)


def test_mlm_by_hand():
    # label 0 is no word but "not masked": the middle row does not count, also not in the mean
    scores = torch.tensor([[1.0, 1.0, 2.0], [9.0, 1.0, 1.0], [1.0, 3.0, 4.0]]).log()
    found = objectives.compute_mlm(scores, torch.tensor([2, 0, 1]))
    assert float(found) == pytest.approx((math.log(2) + math.log(8 / 3)) / 2, rel=1e-6)


@pytest.mark.parametrize("rows", [3, 0])
def test_mlm_without_labels_is_0_with_gradients_of_0(rows):
    scores = torch.randn(rows, 4, requires_grad=True)
    loss = objectives.compute_mlm(scores, torch.zeros(rows, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(scores.grad, torch.zeros(rows, 4))
