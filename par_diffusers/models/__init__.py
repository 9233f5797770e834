"""Models: the autoregressive backbone, registered with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel

from par_diffusers.models.modeling_par import PARConfig, PARForConditionalGeneration, PARModel


AutoConfig.register(PARConfig.model_type, PARConfig, exist_ok=True)
AutoModel.register(PARConfig, PARForConditionalGeneration, exist_ok=True)

__all__ = ["PARConfig", "PARForConditionalGeneration", "PARModel"]
