from solver.average import WeightAverage
from solver.build import base_lr, build_lr_scheduler, build_optimizer, frac_unmoved, sampled_weights

__all__ = [
    "WeightAverage",
    "base_lr",
    "build_lr_scheduler",
    "build_optimizer",
    "frac_unmoved",
    "sampled_weights",
]
