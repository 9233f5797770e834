# Copyright 2026 The par_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Class-conditional images by parallelized autoregressive generation (PAR, arXiv 2412.15119).

This file travels inside checkpoints: it imports the standard library, torch, diffusers, transformers and what those need.
"""

import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, VQModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import export_to_gif, is_torch_xla_available, logging, replace_example_docstring
from diffusers.utils.torch_utils import is_compiled_module, unwrap_module
from huggingface_hub import ModelCard, ModelCardData, file_exists
from transformers import Cache, DynamicLayer, PreTrainedModel, StaticCache


if is_torch_xla_available():
    import torch_xla.core.xla_model as xm

    XLA_AVAILABLE = True
else:
    XLA_AVAILABLE = False

logger = logging.get_logger(__name__)

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from par_diffusers import PARPipeline, embedded_model

        >>> pipe = PARPipeline.from_pretrained(embedded_model("par-glyphs-4x"), dtype=torch.float32)
        >>> generator = [torch.Generator().manual_seed(i) for i in range(3)]
        >>> images = pipe(class_labels=["P", "A", "R"], generator=generator).images
        >>> images[0].size
        (48, 48)
        ```
"""

CARD = """
# {unit}s by parallelized autoregressive generation

{kind} {units} by **PAR**, parallelized autoregressive visual generation ([arXiv 2412.15119](https://arxiv.org/abs/2412.15119)).
The token grid is cut into regions; the first token of each region is sampled one by one, then the tokens at the same
place of all regions are sampled in one step. This model takes {num_steps} steps for {num_tokens} tokens.
{samples}
## Use

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)
{output} = pipe({arguments}, generator=torch.Generator().manual_seed(0)).{output}
```

With the package par_diffusers installed, `{class_name}.from_pretrained("{repo_id}")` does the
same with the code of the package.

## Model

| | |
|---|---|
| parameters | {parameters} backbone, {vq_parameters} tokenizer |
| decoder | {layers} layers, width {width}, {heads} heads |
| vocabulary | {vocab_size} codes |
{condition}
{size}

## Token plan

| | |
|---|---|
| grid | {grid} tokens |
| order | {order}, regions {region_grid} |
| parallel tokens | {num_parallel_tokens} |
| initial tokens | {initial_tokens} |
| attention in a group | {group_attention} |
| steps | {num_steps} |

Defaults of the call: guidance scale {guidance_scale}, temperature {temperature}, top-k {top_k}, top-p {top_p}.
"""


def travelling_source(file: str) -> str:
    """The text of a module as it travels, alone: what it imports from siblings stands in the place of the import."""
    text = Path(file).read_text(encoding="utf-8")
    siblings = r"^from \.(\w+) import .*\n"
    return re.sub(
        siblings, lambda found: travelling_source(Path(file).with_name(f"{found[1]}.py")), text, flags=re.MULTILINE
    )


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer in memory that is allocated once; attention reads the filled part, without a copy."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        batch_size, heads, _, width = key_states.shape
        self.memory = key_states.new_empty(2, batch_size, heads, self.capacity, width)
        self.keys, self.values = self.memory[..., :0, :]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        self.memory[0, ..., start:end, :] = key_states
        self.memory[1, ..., start:end, :] = value_states
        self.keys, self.values = self.memory[..., :end, :]
        return self.keys, self.values


class PARPipelineBase(DiffusionPipeline):
    """
    What the pipelines of PAR share: the loop of steps, checks, and folders that carry their own code.

    Args:
        components: The modules by name; `transformer`, `scheduler` and the tokenizer among them.
    """

    _callback_tensor_inputs = ["latents"]
    _output_types = ("pil", "np", "pt", "latent")
    # what a call returns: the words of arguments and messages, the name in the output
    _unit, _output = "image", "images"
    # the component that turns tokens into pixels, its class, and what in its config is the number of codes
    _tokenizer, _tokenizer_class, _num_codes = "vqvae", VQModel, "num_vq_embeddings"
    # class name -> class, filled by the installed package; empty in a copy that travels with a checkpoint
    _package_components: dict = {}

    def __init__(self, **components):
        super().__init__()
        self.register_modules(**components)
        self._static_cache = None

    # Folders that carry their own code: see docs/conversion.md for what each file is for.

    def save_pretrained(self, save_directory: str | os.PathLike, *args, samples=None, **kwargs):
        """
        Saves the pipeline with the code of its own classes, so that `DiffusionPipeline.from_pretrained(...,
        trust_remote_code=True)` loads it where par_diffusers is not installed, and a model card `README.md` unless the
        folder has one.

        Args:
            save_directory (`str` or `os.PathLike`): The folder; created if it does not exist.
            samples (`PIL.Image.Image` or `list[PIL.Image.Image]`, *optional*):
                A grid of samples for the model card, saved as `samples.png`; several are the frames of `samples.gif`.
            args, kwargs: As in [`DiffusionPipeline.save_pretrained`].
        """
        if samples is not None:
            os.makedirs(save_directory, exist_ok=True)
            if isinstance(samples, list):
                export_to_gif(samples, os.path.join(save_directory, "samples.gif"))
            else:
                samples.save(os.path.join(save_directory, "samples.png"))
        super().save_pretrained(os.fspath(save_directory), *args, **kwargs)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        # `save_pretrained` calls this after the components are written and before anything is uploaded
        super().save_config(save_directory)
        folder = Path(save_directory)
        index = json.loads((folder / self.config_name).read_text(encoding="utf-8"))
        index["_class_name"] = self._export_source(type(self), folder)
        for name, component in self.components.items():
            cls = type(getattr(component, "_orig_mod", component))
            if component is not None and cls.__module__.split(".")[0] not in ("diffusers", "transformers"):
                index[name] = self._export_source(cls, folder / name)
                if issubclass(cls, PreTrainedModel):
                    # transformers looks for the code of `from_pretrained(folder, subfolder="transformer")` at the root
                    self._export_source(cls, folder)
        self._write_json(folder / self.config_name, index)
        # diffusers records where the tokenizer was loaded from, which is nobody's business and differs at each save
        tokenizer_config = folder / self._tokenizer / "config.json"
        self._write_json(tokenizer_config, json.loads(tokenizer_config.read_text(encoding="utf-8")))
        if not (folder / "README.md").exists():
            self._write_model_card(folder, repo_id="FOLDER_OR_REPOSITORY")

    @staticmethod
    def _write_json(file: Path, content: dict) -> None:
        content.pop("_name_or_path", None)
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @staticmethod
    def _export_source(cls: type, folder: Path) -> list[str]:
        module = cls.__module__.split(".")[-1]
        source = vars(cls).get("_source") or Path(sys.modules[cls.__module__].__file__).read_text(encoding="utf-8")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{module}.py").write_text(source, encoding="utf-8")
        return [module, cls.__name__]

    def _upload_folder(self, working_dir: str | os.PathLike, repo_id: str, token: str | None = None, **kwargs):
        # diffusers has just written its template over our card, or fetched the card that the repository has
        if not file_exists(repo_id, "README.md", token=token):
            self._write_model_card(Path(working_dir), repo_id)
        return super()._upload_folder(working_dir, repo_id, token=token, **kwargs)

    def _write_model_card(self, folder: Path, repo_id: str) -> None:
        config = self.transformer.config
        scheduler = type(self.scheduler).from_config(self.scheduler.config)  # with the plan of its own grid
        facts = self._card_facts(scheduler.grid_size)
        known = {"library_name": "diffusers", "license": "unknown"} | facts["front_matter"]
        known["tags"] = ["par", "autoregressive", facts["kind"].lower(), "diffusers:" + type(self).__name__]
        samples = [name for name in ("samples.png", "samples.gif") if (folder / name).exists()]
        text = CARD.format(
            repo_id=repo_id,
            unit=self._unit.capitalize(),
            units=self._unit + "s",
            output=self._output,
            samples="".join(f"\n![samples]({name})\n" for name in samples),
            class_name=type(self).__name__,
            **{name: facts[name] for name in ("kind", "condition", "arguments", "size")},
            num_tokens=math.prod(scheduler.grid_size),
            num_steps=scheduler.num_inference_steps,
            parameters=f"{self.transformer.num_parameters() / 1e6:.1f} M",
            vq_parameters=f"{getattr(self, self._tokenizer).num_parameters() / 1e6:.1f} M",
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            heads=config.num_attention_heads,
            vocab_size=config.vocab_size,
            grid=" x ".join(map(str, scheduler.grid_size)),
            region_grid=" x ".join(map(str, scheduler.region_grid)),
            **{name: scheduler.config[name] for name in ("order", "num_parallel_tokens", "initial_tokens")},
            **{name: scheduler.config[name] for name in ("group_attention", "guidance_scale", "temperature")},
            **{name: scheduler.config[name] for name in ("top_k", "top_p")},
        )
        front_matter = ModelCardData(**known | (self.config.card_data or {})).to_yaml()
        ModelCard(f"---\n{front_matter}\n---\n{text}").save(folder / "README.md")

    # With the package installed, `PARPipeline.from_pretrained` runs the classes of the package, not those in the folder.

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict:
        config = super()._dict_from_json_file(json_file)
        class_name = config.get("_class_name")
        if cls._package_components and isinstance(class_name, list) and class_name[1] == cls.__name__:
            config["_class_name"] = cls.__name__
        return config

    @classmethod
    def load_config(cls, *args, **kwargs):
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, value in config.items():
            if name != "_class_name" and isinstance(value, list) and value[1] in cls._package_components:
                component = cls._package_components[value[1]]
                config[name] = [component.__module__, component.__name__]
        return loaded

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def check_inputs(
        self,
        batch_size: int,
        num_per_prompt: int,
        sampling: dict,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.LongTensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
        decode_chunk_size: int | None,
    ):
        if output_type not in self._output_types:
            allowed = ", ".join(map(repr, self._output_types[:-1]))
            raise ValueError(f"`output_type` must be {allowed} or {self._output_types[-1]!r}, got {output_type!r}.")
        self.scheduler.check_sampling(**sampling)
        chunk = 1 if decode_chunk_size is None else decode_chunk_size
        for name, count in ((f"num_{self._unit}s_per_prompt", num_per_prompt), ("decode_chunk_size", chunk)):
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {count!r}.")
        batch_size = batch_size * num_per_prompt
        generators = generator if isinstance(generator, list) else [generator]
        if not all(g is None or isinstance(g, torch.Generator) for g in generators) or None in generators[1:]:
            raise ValueError(f"`generator` must be a torch.Generator or a list of them, got {generator!r}.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` must be one generator or a list of {batch_size}, one for each {self._unit}, got "
                f"{len(generator)}."
            )
        config, grid_size = self.transformer.config, self.scheduler.grid_size
        if latents is not None:
            if not isinstance(latents, torch.Tensor) or latents.dtype != torch.long:
                found = latents.dtype if isinstance(latents, torch.Tensor) else type(latents).__name__
                raise ValueError(f"`latents` must be a torch.long tensor of token ids, got {found}.")
            if tuple(latents.shape) != (batch_size, *grid_size):
                raise ValueError(
                    f"`latents` must have the shape {(batch_size, *grid_size)}, got {tuple(latents.shape)}."
                )
            if latents.min() < 0 or latents.max() >= config.vocab_size:
                raise ValueError(
                    f"`latents` must be token ids from 0 to {config.vocab_size - 1}, got {latents.min()} to {latents.max()}."
                )
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, got {unknown}."
            )
        # components that a user has exchanged
        tokenizer = unwrap_module(getattr(self, self._tokenizer))
        if not isinstance(tokenizer, self._tokenizer_class):
            raise ValueError(
                f"`{self._tokenizer}` must be of the class {self._tokenizer_class.__name__} in this pipeline, got "
                f"{type(tokenizer).__name__}."
            )
        for name, value, allowed in (
            ("transformer.config.condition", config.condition, self._condition),
            ("scheduler.config.prefix_length", self.scheduler.config.prefix_length, config.num_condition_slots),
            ("transformer.config.rope_axes", config.rope_axes, len(grid_size)),
            (f"{self._tokenizer}.config.{self._num_codes}", tokenizer.config[self._num_codes], config.vocab_size),
        ):
            if value != allowed:
                raise ValueError(f"`{name}` must be {allowed!r} in this pipeline, got {value!r}.")
        if self.scheduler.num_learnable_tokens > config.num_learnable_tokens:
            raise ValueError(
                f"`scheduler.config.num_parallel_tokens` must be at most {config.num_learnable_tokens + 1}, one more than "
                f"the learnable tokens of the transformer, got {self.scheduler.config.num_parallel_tokens}."
            )

    def token_grid(self, height: int | None = None, width: int | None = None) -> list[int]:
        """The token grid of `height` x `width` pixels; None takes the size that the checkpoint was made for."""
        grid_size = list(self.scheduler.config.grid_size)
        for axis, name, size in ((-2, "height", height), (-1, "width", width)):
            if size is None:
                continue
            if not isinstance(size, int) or isinstance(size, bool) or size < 1 or size % self.vae_scale_factor:
                raise ValueError(f"`{name}` must be a multiple of {self.vae_scale_factor} pixels, got {size!r}.")
            grid_size[axis] = size // self.vae_scale_factor
        return grid_size

    def prepare_latents(
        self, batch_size: int, device: torch.device, latents: torch.LongTensor | None = None
    ) -> torch.LongTensor:
        """The token grid (batch_size, *grid_size) that the steps fill."""
        if latents is not None:
            return latents.to(device)
        return torch.zeros((batch_size, *self.scheduler.grid_size), dtype=torch.long, device=device)

    def prepare_guidance(self, guidance: dict) -> None:
        """Sets the guidance scale of the call."""
        scale = guidance["guidance_scale"]
        self._guidance_scale = self.scheduler.config.guidance_scale if scale is None else scale

    def prepare_cache(self, batch_size: int) -> Cache:
        """
        Where keys and values go. For a compiled transformer it has one shape for all steps, and the same memory in all calls
        of a batch size, so that there is a graph for steps of one token and one for steps of n.
        """
        config, slots = self.transformer.config, len(self.scheduler.slot_tokens)
        compiled = is_compiled_module(self.transformer) or self.transformer._compiled_call_impl is not None
        if not compiled:
            return Cache(layers=[PreallocatedLayer(slots) for _ in range(config.num_hidden_layers)])
        key = (batch_size, slots, self.transformer.dtype, self.transformer.device)
        if self._static_cache is None or self._static_cache[0] != key:
            logger.warning("Compiling the steps: the first call takes longer.")
            self._static_cache = key, StaticCache(config=config, max_cache_len=slots)
        self._static_cache[1].reset()
        return self._static_cache[1]

    def generate_tokens(
        self,
        latents: torch.LongTensor,
        condition: dict[str, torch.Tensor],
        sampling: dict,
        guidance: dict,
        generator: torch.Generator | list[torch.Generator] | None,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: list[str],
        attention_mask: torch.Tensor | None = None,
    ) -> torch.LongTensor:
        """
        Fills the grid `latents`, step after step.

        Args:
            latents (`torch.LongTensor` of shape `(batch_size, *grid_size)`): Token ids.
            condition (`dict[str, torch.Tensor]`):
                What the transformer takes for its first slots; with guidance, of the batch followed by its nulls.
            sampling (`dict`), generator: Of [`PARScheduler.step`].
            guidance (`dict`): Of [`PARScheduler.guidance_at`]; of the scale only whether there is guidance counts here.
            callback_on_step_end, callback_on_step_end_tensor_inputs: Of the call.
            attention_mask (`torch.Tensor`, *optional*): 0 for condition slots that are padding, of as many sequences.
        """
        config = self.transformer.config
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        self._current_timestep = None
        self._interrupt = False
        # whether there is guidance is fixed for the call, its scale is not
        use_guidance = self.do_classifier_free_guidance
        past_key_values = self.prepare_cache(len(latents) * (2 if use_guidance else 1))
        # the first step, which has no tokens to read, is not worth a graph
        first = unwrap_module(self.transformer).forward if past_key_values.is_compileable else self.transformer
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                inputs = self.scheduler.model_inputs(latents, config.vocab_size, i)
                if use_guidance and "input_ids" in inputs:
                    inputs["input_ids"] = inputs["input_ids"].repeat(2, 1)
                if i == 0:
                    inputs |= condition
                transformer = first if i == 0 else self.transformer
                logits = transformer(
                    **inputs,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    use_cache=True,
                    logits_to_keep=len(self.scheduler.step_tokens[i]),
                ).logits.float()
                if use_guidance:
                    cond, uncond = logits.chunk(2)
                    scale = self.scheduler.guidance_at(i, **guidance | {"guidance_scale": self.guidance_scale})
                    logits = cond if scale == 1 else uncond + scale * (cond - uncond)
                latents = self.scheduler.step(logits, i, latents, **sampling, generator=generator).prev_sample

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in callback_on_step_end_tensor_inputs:
                        callback_kwargs[name] = locals()[name]
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    latents = callback_outputs.pop("latents", latents)
                progress_bar.update()
                if XLA_AVAILABLE:
                    xm.mark_step()
        self._current_timestep = None
        return latents


class PARImagePipelineBase(PARPipelineBase):
    """What the pipelines of images share: the tokenizer."""

    def __init__(self, **components):
        super().__init__(**components)
        has_vqvae = getattr(self, "vqvae", None) is not None
        self.vae_scale_factor = 2 ** (len(self.vqvae.config.block_out_channels) - 1) if has_vqvae else 16
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def _tokenizer_facts(self, grid_size: tuple[int, ...]) -> dict:
        height, width = (side * self.vae_scale_factor for side in grid_size)
        return {
            "size": f"| image | {height} x {width} pixels |",
            "front_matter": {"pipeline_tag": self._pipeline_tag, "metrics": ["fid", "inception_score"]},
        }

    def decode_latents(self, latents: torch.LongTensor, decode_chunk_size: int | None = None) -> torch.Tensor:
        """
        Token ids (B, h, w) -> pixels (B, 3, H, W), about [-1, 1]; `decode_chunk_size` images at a time, or as many as hold
        4096 tokens, so that the memory of the tokenizer does not grow with the batch.
        """
        if decode_chunk_size is None:
            decode_chunk_size = max(1, 4096 // latents[0].numel())
        pixels = []
        for chunk in latents.split(decode_chunk_size):
            shape = (*chunk.shape, self.vqvae.quantize.vq_embed_dim)
            pixels.append(self.vqvae.decode(chunk, force_not_quantize=True, shape=shape, return_dict=False)[0])
        return torch.cat(pixels)

    def postprocess(
        self, latents: torch.LongTensor, output_type: str, return_dict: bool, decode_chunk_size: int | None
    ) -> ImagePipelineOutput | tuple:
        """The output of the call: pixels of the tokens, unless they are asked for themselves."""
        if output_type == "latent":
            image = latents
        else:
            image = self.decode_latents(latents, decode_chunk_size)
            image = self.image_processor.postprocess(image, output_type=output_type)

        # Offload all models
        self.maybe_free_model_hooks()

        if not return_dict:
            return (image,)
        return ImagePipelineOutput(images=image)


class ClassConditional:
    """What the pipelines of classes share: a mixin for [`PARPipelineBase`]."""

    _condition = "class"

    def _set_labels(self, id2label: dict | None) -> None:
        ids = {}
        for key, value in (id2label or {}).items():
            for name in {value, *(part.strip() for part in value.split(","))}:
                ids.setdefault(name, []).append(int(key))
        self.labels = {name: found[0] for name, found in sorted(ids.items()) if len(found) == 1}
        self._ambiguous_labels = {name: found for name, found in ids.items() if len(found) > 1}

    def _card_facts(self, grid_size: tuple[int, ...]) -> dict:
        return self._tokenizer_facts(grid_size) | {
            "kind": "Class-conditional",
            "condition": f"| classes | {self.transformer.config.num_classes} |",
            "arguments": f"class_labels={[next(iter(self.labels), 0)]}",
        }

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        r"""
        Class ids of label names.

        Args:
            label (`str` or `list[str]`): Names from `pipe.labels`.

        Returns:
            `list[int]`: One id for each name.
        """
        label = [label] if isinstance(label, str) else label
        for name in label:
            if name in self._ambiguous_labels:
                raise ValueError(
                    f"`class_labels`: {name!r} names the classes {self._ambiguous_labels[name]}; give the id."
                )
            if name not in self.labels:
                shown = ", ".join(list(self.labels)[:40]) or "none, so give class ids"
                more = ", ... (see `pipe.labels`)" if len(self.labels) > 40 else ""
                raise ValueError(f"`class_labels`: {name!r} is not a label of this pipeline. Labels: {shown}{more}.")
        return [self.labels[name] for name in label]

    def prepare_class_labels(self, class_labels: int | str | list[int | str] | torch.Tensor) -> list[int]:
        """Labels in any form the call takes -> class ids."""
        if isinstance(class_labels, torch.Tensor):
            if class_labels.is_floating_point() or class_labels.dtype == torch.bool or class_labels.ndim > 1:
                raise ValueError(
                    "`class_labels` as a tensor must hold whole numbers in at most one dimension, got "
                    f"{class_labels.dtype} of shape {tuple(class_labels.shape)}."
                )
            class_labels = class_labels.tolist()
        if isinstance(class_labels, int | str):
            class_labels = [class_labels]
        if not isinstance(class_labels, list | tuple) or not class_labels:
            raise ValueError(
                f"`class_labels` must be an int, a label name, a list of either with at least one, or a tensor, got {class_labels!r}."
            )
        num_classes = self.transformer.config.num_classes
        ids = []
        for label in class_labels:
            if isinstance(label, str):
                ids += self.get_label_ids(label)
            elif isinstance(label, int) and not isinstance(label, bool) and 0 <= label < num_classes:
                ids.append(label)
            else:
                raise ValueError(
                    f"`class_labels` must be ids from 0 to {num_classes - 1} or label names, got {label!r}."
                )
        return ids

    def generate_from_labels(
        self,
        class_labels: int | str | list[int | str] | torch.Tensor,
        num_per_prompt: int,
        sizes: dict[str, int | None],
        sampling: dict,
        guidance: dict,
        num_inference_steps: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.LongTensor | None,
        output_type: str,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: list[str],
        decode_chunk_size: int | None,
    ) -> torch.LongTensor:
        """
        The token grids of a call, (batch_size, *grid_size).

        `sizes` are arguments of `token_grid`, `sampling` of [`PARScheduler.step`], `guidance` the scale and arguments of
        [`PARScheduler.guidance_at`]; the rest are those of the call.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. The plan
        device = self._execution_device
        self.scheduler.set_timesteps(num_inference_steps, device=device, grid_size=self.token_grid(**sizes))

        # 2. Check inputs; what is None is the checkpoint's own
        class_ids = self.prepare_class_labels(class_labels)
        self.check_inputs(
            len(class_ids),
            num_per_prompt,
            sampling | guidance,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
            decode_chunk_size,
        )

        # 3. Prepare the conditions, with the null class for guidance
        labels = torch.tensor(class_ids, device=device).repeat_interleave(num_per_prompt)
        latents = self.prepare_latents(len(labels), device, latents)
        self.prepare_guidance(guidance)
        if self.do_classifier_free_guidance:
            labels = torch.cat([labels, torch.full_like(labels, self.transformer.config.num_classes)])

        # 4. Generate the tokens
        return self.generate_tokens(
            latents,
            {"class_labels": labels},
            sampling=sampling,
            guidance=guidance,
            generator=generator,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )


class PARPipeline(ClassConditional, PARImagePipelineBase):
    r"""
    Pipeline for class-conditional images by parallelized autoregressive generation (PAR).

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Args:
        transformer ([`PARForConditionalGeneration`]): The autoregressive backbone.
        vqvae ([`VQModel`]): The tokenizer whose decoder turns tokens into pixels.
        scheduler ([`PARScheduler`]): Plans the tokens and samples them.
        id2label (`dict[str, str]`, *optional*):
            Class id (as a string, as JSON has it) to label; several names of one class are separated by commas.
        card_data (`dict`, *optional*):
            Front matter of the model card beside what the pipeline knows itself: `license`, `datasets`, `base_model`, ...
    """

    model_cpu_offload_seq = "transformer->vqvae"
    # read when the module is imported: diffusers overwrites the file of remote code whenever it loads another folder
    _source = travelling_source(__file__)
    _pipeline_tag = "unconditional-image-generation"

    def __init__(
        self,
        transformer: PreTrainedModel,
        vqvae: VQModel,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
        card_data: dict | None = None,
    ):
        super().__init__(transformer=transformer, vqvae=vqvae, scheduler=scheduler)
        self.register_to_config(id2label=id2label, card_data=card_data)
        self._set_labels(id2label)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        class_labels: int | str | list[int | str] | torch.Tensor,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
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
        height: int | None = None,
        width: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        The call function to the pipeline for generation.

        Args:
            class_labels (`int`, `str`, `list[int]`, `list[str]` or `torch.Tensor`):
                Class ids or label names, one for each prompt.
            num_inference_steps (`int`, *optional*):
                The plan of the scheduler fixes the number of steps; another number is an error.
            guidance_scale (`float`, *optional*):
                Classifier-free guidance scale s of `uncond + s * (cond - uncond)`; up to 1 there is no guidance. Defaults
                to the checkpoint's own (`scheduler.config.guidance_scale`).
            num_images_per_prompt (`int`, defaults to 1): Images of each label.
            temperature (`float`, *optional*), top_k (`int`, *optional*), top_p (`float`, *optional*):
                Sampling values; see [`PARScheduler.step`]. Default to the checkpoint's own (`scheduler.config`).
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One for all images, or one for each: then an image does not depend on the batch around it.
            latents (`torch.LongTensor` of shape `(batch_size, height, width)`, *optional*):
                Token ids in raster layout that the grid holds before the first step. Every token is generated all the
                same.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` (B, H, W, 3) in [0, 1], `"pt"` (B, 3, H, W) in [0, 1], or `"latent"`: token ids
                (B, height, width) in raster layout, `torch.long`.
            return_dict (`bool`, defaults to `True`): Whether to return an `ImagePipelineOutput` or a tuple.
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
                Images that the tokenizer decodes at a time. Defaults to as many as hold 4096 tokens.
            height (`int`, *optional*), width (`int`, *optional*):
                Pixels, multiples of the tokenizer's downsampling that the plan can divide. Default to the size the
                checkpoint was made for; of others the model has seen no example (see docs/sampling.md).

        Examples:

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`: The images.
        """
        latents = self.generate_from_labels(
            class_labels,
            num_images_per_prompt,
            sizes={"height": height, "width": width},
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
