"""Pipelines: from labels or text to images, from labels to clips."""

from par_diffusers.models import PARForConditionalGeneration
from par_diffusers.pipelines.pipeline_par import PARPipeline, PARPipelineBase
from par_diffusers.pipelines.pipeline_par_text_to_image import PARTextToImagePipeline
from par_diffusers.pipelines.pipeline_par_video import PARVideoPipeline, PARVideoPipelineOutput
from par_diffusers.schedulers import PARScheduler


# what `from_pretrained` of our pipelines takes in place of the copies of these classes that travel inside a folder
PARPipelineBase._package_components = {cls.__name__: cls for cls in (PARForConditionalGeneration, PARScheduler)}

__all__ = ["PARPipeline", "PARTextToImagePipeline", "PARVideoPipeline", "PARVideoPipelineOutput"]
