# Copyright 2026 The par_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Images from text by LlamaGen's text-conditional models (arXiv 2406.06525), and by PAR (arXiv 2412.15119) over captions.

This file travels inside checkpoints, with the module it imports: otherwise only torch, diffusers, transformers and what
those need.
"""

from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, PixArtAlphaPipeline, SchedulerMixin, VQModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import logging, replace_example_docstring
from transformers import PreTrainedModel, PreTrainedTokenizerBase, T5EncoderModel

from .pipeline_par import PARImagePipelineBase, travelling_source


logger = logging.get_logger(__name__)

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from par_diffusers import PARTextToImagePipeline

        >>> dtype = {"transformer": torch.bfloat16, "text_encoder": torch.bfloat16, "default": torch.float32}
        >>> pipe = PARTextToImagePipeline.from_pretrained("llamagen-t2i-256", dtype=dtype).to("cuda")
        >>> image = pipe("a red fox in the snow", generator=torch.Generator().manual_seed(0)).images[0]
        ```
"""


def left_pad(features: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Right-padded features (B, length, channels) and their mask (B, length), as text encoders give them -> the same with the
    padding first and zeroed, as LlamaGen's models were trained.
    """
    length = features.shape[1]
    mask = mask.long()
    order = (torch.arange(length, device=mask.device) + mask.sum(1, keepdim=True)) % length
    mask = mask.gather(1, order)
    features = features.gather(1, order[:, :, None].expand_as(features))
    return features * mask[:, :, None].to(features.dtype), mask


@torch.no_grad()
def encode_text(
    text_encoder: T5EncoderModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    length: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Right-padded features (B, length, channels) of texts and their mask (B, length), on `device`, where the encoder runs.
    Texts of more than `length` tokens are cut, with a warning.
    """
    inputs = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    inputs = inputs.to(device)
    for ids in tokenizer(texts).input_ids:
        if len(ids) > length:
            logger.warning(
                f"The following part of your input was truncated because the model takes {length} tokens: "
                f"{tokenizer.decode(ids[length - 1 : -1])!r}"
            )
    return text_encoder(inputs.input_ids, attention_mask=inputs.attention_mask)[0], inputs.attention_mask


class CaptionPreprocessing:
    """Text in lower case, or with the cleaning of DeepFloyd IF, which LlamaGen's code takes over."""

    bad_punct_regex = PixArtAlphaPipeline.bad_punct_regex
    _clean_caption = PixArtAlphaPipeline._clean_caption
    _text_preprocessing = PixArtAlphaPipeline._text_preprocessing


class PARTextToImagePipeline(PARImagePipelineBase, CaptionPreprocessing):
    r"""
    Pipeline for images from text by autoregressive generation, one token at a time or several in parallel (PAR).

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Args:
        transformer ([`PARForConditionalGeneration`]): The autoregressive backbone, with `condition="caption"`.
        vqvae ([`VQModel`]): The tokenizer whose decoder turns tokens into pixels.
        scheduler ([`PARScheduler`]): Plans the tokens and samples them.
        text_encoder ([`T5EncoderModel`], *optional*): Encodes prompts. Without it prompts come as embeddings.
        tokenizer ([`PreTrainedTokenizerBase`], *optional*): Of the text encoder.
        card_data (`dict`, *optional*):
            Front matter of the model card beside what the pipeline knows itself: `license`, `datasets`, `base_model`, ...
    """

    model_cpu_offload_seq = "text_encoder->transformer->vqvae"
    _optional_components = ["text_encoder", "tokenizer"]
    # read when the module is imported: diffusers overwrites the file of remote code whenever it loads another folder
    _source = travelling_source(__file__)
    _condition = "caption"
    _pipeline_tag = "text-to-image"

    def __init__(
        self,
        transformer: PreTrainedModel,
        vqvae: VQModel,
        scheduler: SchedulerMixin,
        text_encoder: T5EncoderModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        card_data: dict | None = None,
    ):
        super().__init__(
            transformer=transformer, vqvae=vqvae, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(card_data=card_data)

    def _card_facts(self, grid_size: tuple[int, ...]) -> dict:
        config = self.transformer.config
        embeddings = "prompt_embeds=embeds, prompt_attention_mask=mask"
        return self._tokenizer_facts(grid_size) | {
            "kind": "Text-conditional",
            "condition": f"| caption | {config.caption_length} features of {config.caption_channels} |",
            "arguments": '"a red fox in the snow"' if self.text_encoder is not None else embeddings,
        }

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        clean_caption: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        r"""
        Encodes prompts, once for each image. What is given as embeddings is passed through.

        Args:
            prompt (`str` or `list[str]`, *optional*), negative_prompt (`str` or `list[str]`, *optional*):
                Texts; a single negative prompt goes for all. See `__call__`.
            num_images_per_prompt (`int`, defaults to 1): Rows of each prompt.
            device (`torch.device`, *optional*): Where the result lies.
            prompt_embeds (`torch.Tensor` of shape `(batch_size, length, channels)`, *optional*),
            prompt_attention_mask (`torch.Tensor` of shape `(batch_size, length)`, *optional*), and the same of
            negative prompts: What an earlier call returned, or any other T5 gave.
            clean_caption (`bool`, defaults to `False`):
                Whether to clean the text as the published code can (links, HTML, repeated punctuation); needs ftfy and
                beautifulsoup4. Text is in lower case either way.

        Returns:
            `prompt_embeds`, `prompt_attention_mask`, `negative_prompt_embeds`, `negative_prompt_attention_mask`:
            right-padded features (rows, caption_length, caption_channels) and their masks (rows, caption_length), 1 for
            text; the last two are None where there is no negative prompt.
        """
        device = self._execution_device if device is None else device
        if prompt_embeds is None:
            prompt_embeds, prompt_attention_mask = self._encode_text(prompt, device, clean_caption)
        if negative_prompt is not None:
            negative_prompt_embeds, negative_prompt_attention_mask = self._encode_text(
                negative_prompt, device, clean_caption
            )
        encoded = []
        for value in (
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        ):
            if value is not None:
                value = value.to(device).expand(max(len(value), len(prompt_embeds)), *value.shape[1:])
                value = value.repeat_interleave(num_images_per_prompt, dim=0)
            encoded.append(value)
        return tuple(encoded)

    def _encode_text(
        self, text: str | list[str], device: torch.device, clean_caption: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        text = self._text_preprocessing(text, clean_caption=clean_caption)
        length = self.transformer.config.caption_length
        return encode_text(self.text_encoder, self.tokenizer, text, length, device)

    def check_prompts(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None,
        prompt_attention_mask: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        negative_prompt_attention_mask: torch.Tensor | None,
    ) -> int:
        """The number of prompts, or a `ValueError`."""
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError(
                f"One of `prompt` and `prompt_embeds` must be given, got {'neither' if prompt is None else 'both'}."
            )
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("`negative_prompt` and `negative_prompt_embeds` cannot both be given.")
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if text is None:
                continue
            texts = [text] if isinstance(text, str) else text
            if not isinstance(texts, list) or not texts or not all(isinstance(each, str) for each in texts):
                raise ValueError(f"`{name}` must be text or a list of texts with at least one, got {text!r}.")
            if self.text_encoder is None or self.tokenizer is None:
                raise ValueError(
                    f"`{name}` needs a text encoder, and this pipeline has none: load one, or give `{name}_embeds` and "
                    f"`{name}_attention_mask`."
                )
            if self.text_encoder.config.d_model != self.transformer.config.caption_channels:
                raise ValueError(
                    f"`text_encoder.config.d_model` must be {self.transformer.config.caption_channels}, which the "
                    f"transformer was trained with, got {self.text_encoder.config.d_model}."
                )
        shape = (self.transformer.config.caption_length, self.transformer.config.caption_channels)
        for name, embeds, mask in (
            ("prompt", prompt_embeds, prompt_attention_mask),
            ("negative_prompt", negative_prompt_embeds, negative_prompt_attention_mask),
        ):
            if (embeds is None) != (mask is None):
                raise ValueError(f"`{name}_embeds` and `{name}_attention_mask` must be given together.")
            if embeds is None:
                continue
            if embeds.ndim != 3 or tuple(embeds.shape[1:]) != shape or not len(embeds):
                raise ValueError(
                    f"`{name}_embeds` must have the shape (batch_size, {shape[0]}, {shape[1]}), got "
                    f"{tuple(embeds.shape)}."
                )
            if tuple(mask.shape) != tuple(embeds.shape[:2]):
                raise ValueError(
                    f"`{name}_attention_mask` must have the shape {tuple(embeds.shape[:2])}, got {tuple(mask.shape)}."
                )
            if mask.min() < 0 or mask.max() > 1 or (mask.long() != mask).any() or (mask.long().diff() > 0).any():
                raise ValueError(f"`{name}_attention_mask` must be 1 for text and then 0 for padding (right-padded).")
        count = 1 if isinstance(prompt, str) else len(prompt if prompt_embeds is None else prompt_embeds)
        negatives = negative_prompt if negative_prompt_embeds is None else negative_prompt_embeds
        if negatives is not None and not isinstance(negatives, str) and len(negatives) not in (1, count):
            raise ValueError(f"There must be 1 negative prompt or {count}, one for each prompt, got {len(negatives)}.")
        return count

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.LongTensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        clean_caption: bool = False,
        guidance_schedule: str | None = None,
        guidance_power: float | None = None,
        guidance_interval: tuple[int, int] | None = None,
        decode_chunk_size: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        The call function to the pipeline for generation.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                Texts, cut to the tokens that the model takes (120 for LlamaGen's). Needs the text encoder.
            height (`int`, *optional*), width (`int`, *optional*):
                Pixels, multiples of the tokenizer's downsampling that the plan can divide. Default to the size the
                checkpoint was made for; of others the model has seen no example.
            num_inference_steps (`int`, *optional*):
                The plan of the scheduler fixes the number of steps; another number is an error.
            guidance_scale (`float`, *optional*):
                Classifier-free guidance scale s of `uncond + s * (cond - uncond)`; up to 1 there is no guidance. Defaults
                to the checkpoint's own (`scheduler.config.guidance_scale`; 7.5 for LlamaGen's).
            negative_prompt (`str` or `list[str]`, *optional*):
                Text that takes the place of the learned null features in guidance: images move away from it. Without it,
                guidance is the published one. Without guidance it has no effect.
            num_images_per_prompt (`int`, defaults to 1): Images of each prompt.
            temperature (`float`, *optional*), top_k (`int`, *optional*), top_p (`float`, *optional*):
                Sampling values; see [`PARScheduler.step`]. Default to the checkpoint's own (`scheduler.config`).
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One for all images, or one for each: then an image does not depend on the batch around it.
            latents (`torch.LongTensor` of shape `(batch_size, height, width)`, *optional*):
                Token ids in raster layout that the grid holds before the first step. Every token is generated all the
                same.
            prompt_embeds (`torch.Tensor` of shape `(batch_size, caption_length, caption_channels)`, *optional*),
            prompt_attention_mask (`torch.Tensor` of shape `(batch_size, caption_length)`, *optional*):
                Features instead of prompts, right-padded as [`encode_prompt`] gives them.
            negative_prompt_embeds (`torch.Tensor`, *optional*), negative_prompt_attention_mask (`torch.Tensor`, *optional*):
                Features instead of negative prompts.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` (B, H, W, 3) in [0, 1], `"pt"` (B, 3, H, W) in [0, 1], or `"latent"`: token ids
                (B, height, width) in raster layout, `torch.long`.
            return_dict (`bool`, defaults to `True`): Whether to return an `ImagePipelineOutput` or a tuple.
            callback_on_step_end (`Callable`, `PipelineCallback` or `MultiPipelineCallbacks`, *optional*):
                Called at the end of each step with the pipeline, the step, the timestep and the tensors named by
                `callback_on_step_end_tensor_inputs`; what it returns replaces them.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                Tensors to hand to the callback.
            clean_caption (`bool`, defaults to `False`): Whether to clean prompts; see [`encode_prompt`].
            guidance_schedule (`str`, *optional*), guidance_power (`float`, *optional*),
            guidance_interval (`tuple[int, int]`, *optional*):
                How the guidance scale changes over the steps; see [`PARScheduler.guidance_at`]. Default to the
                checkpoint's own.
            decode_chunk_size (`int`, *optional*):
                Images that the tokenizer decodes at a time. Defaults to as many as hold 4096 tokens.

        Examples:

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`: The images.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. The plan
        device = self._execution_device
        self.scheduler.set_timesteps(num_inference_steps, device=device, grid_size=self.token_grid(height, width))

        # 2. Check inputs; what is None is the checkpoint's own
        count = self.check_prompts(
            prompt,
            negative_prompt,
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        )
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        guidance = {
            "guidance_scale": guidance_scale,
            "guidance_schedule": guidance_schedule,
            "guidance_power": guidance_power,
            "guidance_interval": guidance_interval,
        }
        self.check_inputs(
            count,
            num_images_per_prompt,
            sampling | guidance,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
            decode_chunk_size,
        )
        self.prepare_guidance(guidance)

        # 3. Prepare the conditions; with guidance, the nulls have the padding of their prompts, as published
        embeds, mask, negative_embeds, negative_mask = self.encode_prompt(
            prompt,
            negative_prompt if self.do_classifier_free_guidance else None,
            num_images_per_prompt,
            device,
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
            clean_caption,
        )
        embeds, mask = left_pad(embeds, mask)
        latents = self.prepare_latents(len(embeds), device, latents)
        is_null = None
        if self.do_classifier_free_guidance:
            if negative_embeds is None:
                negative_embeds, negative_mask = embeds, mask
                is_null = torch.arange(2 * len(embeds), device=device) >= len(embeds)
            else:
                negative_embeds, negative_mask = left_pad(negative_embeds, negative_mask)
            embeds, mask = torch.cat([embeds, negative_embeds]), torch.cat([mask, negative_mask])

        # 4. Generate the tokens
        latents = self.generate_tokens(
            latents,
            {"encoder_hidden_states": embeds.to(self.transformer.dtype), "null_condition": is_null},
            sampling=sampling,
            guidance=guidance,
            generator=generator,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            attention_mask=mask,
        )

        # 5. Decode
        return self.postprocess(latents, output_type, return_dict, decode_chunk_size)
