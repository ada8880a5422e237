"""A saved optimiser's state, put into the parameter groups of the run that goes on."""

from itertools import count, islice

from utils.errors import InputError, first_line

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # whose shape is the parameter's
KINDS = {"betas", "momentum"}  # settings that tell Adam's family from SGD's
SETTINGS = (  # of its groups: what a run decides, and PyTorch's words for ways to compute one step
    "lr initial_lr betas momentum eps weight_decay decoupled_weight_decay amsgrad dampening nesterov "
    "maximize fused foreach capturable differentiable"
).split()


def fit_groups(optimizer, saved, model, weights, source):
    """A saved optimiser's state in the parameter groups of this one. They depend on the precision, so a run
    that goes on in another one has others; InputError where they are not those of any.

    weights: the checkpoint's, whose types tell in which precision it was saved.
    """
    own = [len(group["params"]) for group in optimizer.param_groups]
    if saved is None:
        raise InputError(f"{source} cannot be resumed: unlike last.pth it has weights and no optimizer part")
    try:
        sizes = [len(group["params"]) for group in saved["param_groups"]]
        if sizes == own:
            return saved
        halves = {name for name, value in weights.items() if value.element_size() == 2}
        for kind in (halves.__contains__, lambda name: None):  # once, fp16 had the groups of fp32
            groups = _names_by_group(optimizer, model, kind)
            if [len(group) for group in groups] == sizes:
                return _regrouped(optimizer, saved, model, [name for group in groups for name in group])
    except (TypeError, KeyError, AttributeError, ValueError):
        raise InputError(f"{source} cannot be resumed: its optimizer part is missing or damaged") from None
    why = "the published code makes one of each parameter; such a file is for test.py"
    if max(sizes) > 1:
        why = "rates and decays decide on them: resume with the factors and decays that its run had"
    if others := sorted({*weights} ^ {*model.state_dict()}):
        there = "there" if others[0] in weights else "missing"
        why = f"it is of another model, in which {others[0]} is {there}"
    raise InputError(
        f"{source} cannot be resumed: its optimiser has {len(sizes)} parameter groups, ours {len(own)} "
        f"({why})"
    )


def _names_by_group(optimizer, model, kind):
    """Names of the parameters in groups of one rate, decay and kind(name), in the order of the model."""
    rule = {
        parameter: (group.get("initial_lr", group["lr"]), group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter in rule:
            groups.setdefault((*rule[parameter], kind(name)), []).append(name)
    return list(groups.values())


def _regrouped(optimizer, saved, model, names):
    """names: of the parameters in the saved order."""
    places = [(index, group) for group in saved["param_groups"] for index in group["params"]]
    place_of = dict(zip(names, places, strict=True))
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    state, groups, numbers = {}, [], count()
    for group in optimizer.param_groups:
        found = [place_of[name_of[parameter]] for parameter in group["params"]]
        own = list(islice(numbers, len(found)))
        pairs = zip(own, found, strict=True)
        state.update({n: saved["state"][index] for n, (index, _) in pairs if index in saved["state"]})
        groups.append({**found[0][1], "params": own})
    return {**saved, "state": state, "param_groups": groups}


def load_optimizer(optimizer, saved, source):
    """Load an optimiser's state where it fits: a misshapen moment makes PyTorch write beside it.

    Of its groups SETTINGS stay those of this run: decays and betas that are given beside --resume, and how a
    step is computed, since fused in fp16 would be another recipe. Rates are the schedule's.
    """
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    try:
        for index, moments in saved["state"].items():
            for name, moment in moments.items():
                if name in MOMENTS and moment is not None and moment.shape != shapes[index]:
                    raise ValueError(f"{name} of parameter {index} is {list(moment.shape)}")
        pairs = list(zip(saved["param_groups"], optimizer.param_groups, strict=True))
        if any(KINDS & group.keys() != KINDS & own.keys() for group, own in pairs):
            raise ValueError("it is another optimiser's, see --optimizer")
        groups = [{**group, **{key: own[key] for key in SETTINGS if key in own}} for group, own in pairs]
        optimizer.load_state_dict({**saved, "param_groups": groups})
    except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
        reason = f"its optimizer part does not fit ({type(error).__name__}: {first_line(error)})"
        raise InputError(f"{source} cannot be resumed: {reason}") from None
