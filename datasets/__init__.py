"""Annotations, captions, images, batches. `build_dataloader` is the door."""


def __getattr__(name):  # so that `python -m datasets.synthetic` starts without loading torch
    if name == "build_dataloader":
        from datasets.build import build_dataloader

        return build_dataloader
    raise AttributeError(f"module datasets has no {name}")
