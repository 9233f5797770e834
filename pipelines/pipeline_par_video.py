# Copyright 2026 The par_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Class-conditional video clips by parallelized autoregressive generation (PAR, arXiv 2412.15119, section 3.3).

This file travels inside checkpoints, with the module it imports: otherwise only torch, diffusers, transformers and what
those need.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderVidTok, DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput, replace_example_docstring
from diffusers.video_processor import VideoProcessor
from transformers import PreTrainedModel

from .pipeline_par import ClassConditional, PARPipelineBase, travelling_source


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers.utils import export_to_gif
        >>> from par_diffusers import PARVideoPipeline

        >>> pipe = PARVideoPipeline.from_pretrained("runs/ucf101-par-4x").to("cuda")
        >>> clip = pipe("Surfing", generator=torch.Generator("cuda").manual_seed(0)).frames[0]
        >>> export_to_gif(clip, "surfing.gif", fps=pipe.config.frame_rate)
        ```
"""


@dataclass
class PARVideoPipelineOutput(BaseOutput):
    r"""
    Output of [`PARVideoPipeline`].

    Args:
        frames (`list[list[PIL.Image.Image]]`, `np.ndarray` or `torch.Tensor`):
            The clips: `"pil"` a list of frames each, `"np"` (B, frames, H, W, 3) and `"pt"` (B, frames, 3, H, W) in
            [0, 1], or `"latent"` token ids (B, *grid_size).
    """

    frames: torch.Tensor


class PARVideoPipeline(ClassConditional, PARPipelineBase):
    r"""
    Pipeline for class-conditional clips by parallelized autoregressive generation (PAR). The tokens of a clip come frame
    after frame of the token grid, in each frame in the order of images; the first n tokens of the clip are sampled one by
    one, then those at the same place of all regions in one step.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Args:
        transformer ([`PARForConditionalGeneration`]): The autoregressive backbone, with `rope_axes=3`.
        vae ([`AutoencoderVidTok`]): The tokenizer, causal and with `regularizer="fsq"`.
        scheduler ([`PARScheduler`]): Plans the tokens (frames, height, width) and samples them.
        id2label (`dict[str, str]`, *optional*):
            Class id (as a string, as JSON has it) to label; several names of one class are separated by commas.
        frame_rate (`float`, *optional*): Frames a second of the clips that the model was trained on.
        card_data (`dict`, *optional*):
            Front matter of the model card beside what the pipeline knows itself: `license`, `datasets`, `base_model`, ...
    """

    model_cpu_offload_seq = "transformer->vae"
    # read when the module is imported: diffusers overwrites the file of remote code whenever it loads another folder
    _source = travelling_source(__file__)
    _unit, _output = "video", "frames"
    _tokenizer, _tokenizer_class, _num_codes = "vae", AutoencoderVidTok, "codebook_size"

    def __init__(
        self,
        transformer: PreTrainedModel,
        vae: AutoencoderVidTok,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
        frame_rate: float | None = None,
        card_data: dict | None = None,
    ):
        super().__init__(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(id2label=id2label, frame_rate=frame_rate, card_data=card_data)
        is_vidtok = isinstance(vae, AutoencoderVidTok)  # another tokenizer is an error of the call, which names it
        self.vae_scale_factor_spatial = 2 ** len(vae.encoder.spatial_ds) if is_vidtok else 8
        self.vae_scale_factor_temporal = vae.temporal_compression_ratio if is_vidtok else 4
        self.vae_scale_factor = self.vae_scale_factor_spatial
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)
        self._set_labels(id2label)

    def _tokenizer_facts(self, grid_size: tuple[int, ...]) -> dict:
        frames = (grid_size[0] - 1) * self.vae_scale_factor_temporal + 1
        height, width = (side * self.vae_scale_factor_spatial for side in grid_size[1:])
        rate = f", {self.config.frame_rate:g} a second" if self.config.frame_rate else ""
        return {
            "size": f"| clip | {frames} frames of {height} x {width} pixels{rate} |",
            "front_matter": {"metrics": ["fvd"]},
        }

    def token_grid(
        self, num_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> list[int]:
        """
        The token grid of `num_frames` frames of `height` x `width` pixels; None takes the size that the checkpoint was
        made for. The first frame has a token frame of its own, each further one holds `vae_scale_factor_temporal`.
        """
        grid_size = super().token_grid(height, width)
        if num_frames is not None:
            stride = self.vae_scale_factor_temporal
            if (
                not isinstance(num_frames, int)
                or isinstance(num_frames, bool)
                or num_frames < 1
                or num_frames % stride != 1
            ):
                raise ValueError(
                    f"`num_frames` must be 1 more than a multiple of {stride} (1, {stride + 1}, {2 * stride + 1}, ...), "
                    f"got {num_frames!r}."
                )
            grid_size[0] = 1 + num_frames // stride
        return grid_size

    def check_inputs(self, *args, **kwargs):
        super().check_inputs(*args, **kwargs)
        for name, allowed in (("regularizer", "fsq"), ("is_causal", True)):
            if self.vae.config[name] != allowed:
                raise ValueError(
                    f"`vae.config.{name}` must be {allowed!r} in this pipeline, got {self.vae.config[name]!r}."
                )

    def decode_latents(self, latents: torch.LongTensor, decode_chunk_size: int | None = None) -> torch.Tensor:
        """
        Token ids (B, t, h, w) -> pixels (B, 3, frames, H, W), about [-1, 1]; `decode_chunk_size` clips at a time, or as
        many as hold 4096 tokens, so that the memory of the tokenizer does not grow with the batch.
        """
        if decode_chunk_size is None:
            decode_chunk_size = max(1, 4096 // latents[0].numel())
        dtype = self.vae.dtype
        # the latents that diffusers makes of indices are in float32, whatever the model is in
        with torch.autocast(latents.device.type, dtype, enabled=dtype != torch.float32):
            pixels = [self.vae.decode(chunk, decode_from_indices=True) for chunk in latents.split(decode_chunk_size)]
        return torch.cat(pixels)

    def postprocess(
        self, latents: torch.LongTensor, output_type: str, return_dict: bool, decode_chunk_size: int | None
    ) -> PARVideoPipelineOutput | tuple:
        """The output of the call: frames of the tokens, unless they are asked for themselves."""
        if output_type == "latent":
            frames = latents
        else:
            frames = self.decode_latents(latents, decode_chunk_size)
            frames = self.video_processor.postprocess_video(frames, output_type=output_type)

        # Offload all models
        self.maybe_free_model_hooks()

        if not return_dict:
            return (frames,)
        return PARVideoPipelineOutput(frames=frames)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        class_labels: int | str | list[int | str] | torch.Tensor,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.LongTensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        guidance_schedule: str | None = None,
        guidance_power: float | None = None,
        guidance_interval: tuple[int, int] | None = None,
        decode_chunk_size: int | None = None,
    ) -> PARVideoPipelineOutput | tuple:
        r"""
        The call function to the pipeline for generation.

        Args:
            class_labels (`int`, `str`, `list[int]`, `list[str]` or `torch.Tensor`):
                Class ids or label names, one for each prompt.
            num_frames (`int`, *optional*):
                Frames of a clip, 1 more than a multiple of the tokenizer's compression in time (17 = 1 + 4 x 4). Defaults
                to the number the checkpoint was made for; of others the model has seen no example.
            height (`int`, *optional*), width (`int`, *optional*):
                Pixels, multiples of the tokenizer's downsampling that the plan can divide. Default likewise.
            num_inference_steps (`int`, *optional*):
                The plan of the scheduler fixes the number of steps; another number is an error.
            guidance_scale (`float`, *optional*):
                Classifier-free guidance scale s of `uncond + s * (cond - uncond)`; up to 1 there is no guidance. Defaults
                to the checkpoint's own (`scheduler.config.guidance_scale`; the paper takes 1.15 for UCF-101).
            num_videos_per_prompt (`int`, defaults to 1): Clips of each label.
            temperature (`float`, *optional*), top_k (`int`, *optional*), top_p (`float`, *optional*):
                Sampling values; see [`PARScheduler.step`]. Default to the checkpoint's own (`scheduler.config`).
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One for all clips, or one for each: then a clip does not depend on the batch around it.
            latents (`torch.LongTensor` of shape `(batch_size, frames, height, width)`, *optional*):
                Token ids in raster layout that the grid holds before the first step. Every token is generated all the
                same.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` (B, frames, H, W, 3) in [0, 1], `"pt"` (B, frames, 3, H, W) in [0, 1], or `"latent"`: token
                ids (B, frames, height, width) in raster layout, `torch.long`.
            return_dict (`bool`, defaults to `True`): Whether to return a [`PARVideoPipelineOutput`] or a tuple.
            callback_on_step_end (`Callable`, `PipelineCallback` or `MultiPipelineCallbacks`, *optional*):
                Called at the end of each step with the pipeline, the step, the timestep and the tensors named by
                `callback_on_step_end_tensor_inputs`; what it returns replaces them.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                Tensors to hand to the callback.
            guidance_schedule (`str`, *optional*), guidance_power (`float`, *optional*),
            guidance_interval (`tuple[int, int]`, *optional*):
                How the guidance scale changes over the steps; see [`PARScheduler.guidance_at`]. Default to the
                checkpoint's own.
            decode_chunk_size (`int`, *optional*):
                Clips that the tokenizer decodes at a time. Defaults to as many as hold 4096 tokens.

        Examples:

        Returns:
            [`PARVideoPipelineOutput`] or `tuple`: The clips.
        """
        latents = self.generate_from_labels(
            class_labels,
            num_videos_per_prompt,
            sizes={"num_frames": num_frames, "height": height, "width": width},
            sampling={"temperature": temperature, "top_k": top_k, "top_p": top_p},
            guidance={
                "guidance_scale": guidance_scale,
                "guidance_schedule": guidance_schedule,
                "guidance_power": guidance_power,
                "guidance_interval": guidance_interval,
            },
            num_inference_steps=num_inference_steps,
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            decode_chunk_size=decode_chunk_size,
        )
        return self.postprocess(latents, output_type, return_dict, decode_chunk_size)
