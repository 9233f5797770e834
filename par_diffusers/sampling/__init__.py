"""Sampling: from a pipeline to pictures."""

from par_diffusers.sampling.generate import generate


__all__ = ["generate"]
