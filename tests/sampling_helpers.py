"""Calls of pipelines, by label names or prompts, of images or clips alike."""

import torch

from par_diffusers import PARTextToImagePipeline
from par_diffusers.pipelines.pipeline_par_text_to_image import left_pad


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(pipe, words, output_type="pt", **kwargs):
    (drawn,) = pipe(words, output_type=output_type, return_dict=False, **kwargs)
    return drawn


def tokens(pipe, words, **kwargs):
    return draw(pipe, words, "latent", **kwargs)


def conditions(pipe, words: list[str], is_null: bool = False) -> dict[str, torch.Tensor]:
    """What the transformer takes for labels or prompts, or for their nulls."""
    if not isinstance(pipe, PARTextToImagePipeline):
        ids = [pipe.transformer.config.num_classes] * len(words) if is_null else pipe.get_label_ids(words)
        return {"class_labels": torch.tensor(ids)}
    features, mask = left_pad(*pipe.encode_prompt(words)[:2])
    null = torch.full((len(words),), is_null)
    return {"encoder_hidden_states": features, "attention_mask": mask, "null_condition": null}


@torch.no_grad()
def logits(pipe, words: list[str], grid: torch.LongTensor, is_null: bool = False) -> torch.Tensor:
    """Of all tokens of `grid` at once, in the order of generation."""
    inputs = pipe.scheduler.model_inputs(grid, pipe.transformer.config.vocab_size)
    condition = conditions(pipe, words, is_null)
    return pipe.transformer(**condition, **inputs, logits_to_keep=grid[0].numel()).logits
