"""Pipelines: from labels to images."""

from par_diffusers.models import PARForConditionalGeneration
from par_diffusers.pipelines.pipeline_par import PARPipeline
from par_diffusers.schedulers import PARScheduler


# what `PARPipeline.from_pretrained` takes in place of the copies of these classes that travel inside a folder
PARPipeline._package_components = {cls.__name__: cls for cls in (PARForConditionalGeneration, PARScheduler)}

__all__ = ["PARPipeline"]
