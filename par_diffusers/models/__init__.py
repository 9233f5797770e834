"""Models: the autoregressive backbone."""

from par_diffusers.models.modeling_par import PARConfig, PARForConditionalGeneration, PARModel


__all__ = ["PARConfig", "PARForConditionalGeneration", "PARModel"]
