from solver.average import WeightAverage
from solver.build import build_lr_scheduler, build_optimizer, frac_unmoved, sampled_weights

__all__ = ["WeightAverage", "build_lr_scheduler", "build_optimizer", "frac_unmoved", "sampled_weights"]
