"""The losses that --loss_names can name, and what a training reports. Without torch: the options read it."""

from typing import NamedTuple


class Loss(NamedTuple):
    """A row of LOSSES. Its function is compute_<name> in model/objectives.py, which gets what its arguments
    without a default ask for by name: see IRRA.compare for what there is."""

    of: str = "features"  # of image and text; "logits", "tokens", "selected" tokens, "second" captions,
    # "strong" views of the images; "words": of masked words alone, part by part of a batch
    weight: str | None = None  # the option that multiplies it
    options: tuple = ()  # those whose values it asks for by name
    switches: tuple = ()  # the options that together bring it, instead of --loss_names
    each: bool = False  # there is each_<name>, the loss of each sample, and it heeds the samples' weights
    tokens: bool = False  # it looks at image tokens, which a ResNet does not give
    views: bool = False  # it takes a second view of the images, where --second_view gives one
    scaled: bool = False  # it multiplies cosines by the logit scale, which --learn_temperature learns


LOSSES = {  # in the order of log lines and plots
    "sdm": Loss(each=True, scaled=True),
    "itc": Loss(each=True, scaled=True),
    "cmpm": Loss(),
    "id": Loss(of="logits", weight="id_loss_weight"),
    "mlm": Loss(of="words", weight="mlm_loss_weight", tokens=True),
    "tal": Loss(options=("tau", "margin"), each=True),
    "trl": Loss(options=("tau", "margin"), each=True),
    "asdm": Loss(scaled=True),
    "nitc": Loss(options=("soft_label",), each=True, views=True, scaled=True),
    "ritc": Loss(each=True, scaled=True),
    "citc": Loss(weight="citc_loss_weight"),
    "simclr": Loss(of="strong", weight="simclr_loss_weight"),
    "efa": Loss(of="tokens", tokens=True),
    "tse": Loss(of="selected", switches=("token_selection",), tokens=True),
    "second": Loss(of="second", switches=("second_caption",)),
    "tse_second": Loss(of="second", switches=("token_selection", "second_caption"), tokens=True),
}
REPORTED = ("loss", *(f"{name}_loss" for name in LOSSES), "img_acc", "txt_acc", "mlm_acc")


def named():
    """What --loss_names takes."""
    return [name for name, row in LOSSES.items() if not row.switches]


def names_of(args):
    """The names in --loss_names, in its order, and the losses that switches bring."""
    switched = [name for name, row in LOSSES.items() if row.switches]
    on = [name for name in switched if all(vars(args)[switch] for switch in LOSSES[name].switches)]
    return str(args.loss_names).split("+") + on


def second_factor(epoch):
    """What the losses of second captions count for in an epoch, from 1; RDA of ICL (CVPR 2025)."""
    return max(0.1, 1 - 0.03 * epoch)


def total_loss(report):
    """The sum of a report's losses. A loss without a row in LOSSES is an error: it would not be trained."""
    losses = {name: value for name, value in report.items() if is_loss(name)}
    unknown = [name for name in losses if name.removesuffix("_loss") not in LOSSES]
    if unknown:
        raise KeyError(f"{unknown[0]} is reported, but LOSSES in utils/losses.py has no such row")
    return sum(losses.values())


def is_loss(name):
    """Whether an entry of a report is a loss, and not an accuracy or another number to average."""
    return name.endswith("_loss")
