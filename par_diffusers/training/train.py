"""Trains a PAR backbone on the codes of images or clips."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader

from par_diffusers.analysis.heatmap import draw_heatmap
from par_diffusers.conversion.convert_llamagen import read_labels
from par_diffusers.folders import lock_folder
from par_diffusers.models import PARConfig, PARForConditionalGeneration
from par_diffusers.pipelines import PARPipeline, PARTextToImagePipeline, PARVideoPipeline
from par_diffusers.pipelines.pipeline_par_text_to_image import left_pad
from par_diffusers.sampling.generate import contact_sheet, generate
from par_diffusers.sampling.loading import pipeline_class_name
from par_diffusers.schedulers import PARScheduler
from par_diffusers.settings import TrainingSettings
from par_diffusers.training.batches import BatchSchedule, seed_step
from par_diffusers.training.codes import CodeDataset
from par_diffusers.training.features import CaptionFeatures
from par_diffusers.training.run import (
    TrainingRun,
    gather_state,
    make_accelerator,
    optimizer_and_schedule,
)
from par_diffusers.training.tokenizers import ImageTokenizer, VideoTokenizer, load_tokenizer


_PLAN = ("num_parallel_tokens", "order", "region_grid", "initial_tokens", "group_attention", "guidance_scale", "top_k")
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_DROPOUTS = ("token_dropout", "residual_dropout", "attention_dropout", "condition_dropout")


def token_losses(
    model: torch.nn.Module,
    scheduler: PARScheduler,
    vocab_size: int,
    codes: torch.LongTensor,
    **condition: torch.Tensor,
) -> torch.Tensor:
    """
    Cross-entropy in nats, float32 (B, N), of each token in generation order.

    `codes` are token ids (B, *grid_size) in raster layout, `condition` is `class_labels` (B,) or what else the model takes.
    """
    targets = scheduler.order_tokens(codes)
    inputs = scheduler.model_inputs(codes, vocab_size)
    return model(labels=targets, skip_logits=True, use_cache=False, **inputs, **condition).loss


@torch.no_grad()
def validation_losses(
    model: torch.nn.Module,
    scheduler: PARScheduler,
    vocab_size: int,
    dataset: CodeDataset,
    collate: "Collate",
    num_samples: int,
    batch_size: int,
    accelerator: Accelerator,
) -> torch.Tensor:
    """Mean loss in nats of each token in generation order, float64 (N,), over `num_samples` spread evenly over the data, dropouts off."""
    num_samples, processes = min(num_samples, len(dataset)), accelerator.num_processes
    # every process runs as many batches as the others (sharded weights need all of them); what is too much weighs nothing
    places = torch.arange(accelerator.process_index, -(-num_samples // processes) * processes, processes)
    model.eval()
    total = torch.zeros(len(scheduler.token_order), dtype=torch.float64, device=accelerator.device)
    for part in places.split(batch_size):
        codes, condition = collate(
            [dataset[int(place) % num_samples * len(dataset) // num_samples, 0] for place in part]
        )
        losses = token_losses(
            model, scheduler, vocab_size, codes.to(accelerator.device), **_to(condition, accelerator.device)
        )
        total += losses[(part < num_samples).to(losses.device)].sum(0).double()
    model.train()
    return accelerator.reduce(total, "sum") / num_samples


@contextmanager
def averaged_weights(model: torch.nn.Module, ema: EMAModel | None) -> Iterator[None]:
    """The averages in the place of the weights, where there are averages."""
    if ema is None:
        yield
        return
    # EMAModel's own store() cannot take sharded weights back
    parameters = list(model.parameters())
    weights = [parameter.detach().clone() for parameter in parameters]
    ema.copy_to(parameters)
    yield
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass without a backward one leaves the last layers gathered
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data.copy_(weight)


def flops_per_sample(config: PARConfig, num_slots: int) -> float:
    """Floating-point operations of one training sample, forward and backward: matrix products and attention, no recomputation."""
    width, hidden = config.num_key_value_heads * config.head_dim, config.hidden_size
    matrices = 2 * hidden * (hidden + width) + 3 * hidden * config.intermediate_size
    forward = config.num_hidden_layers * (2 * matrices * num_slots + 4 * num_slots**2 * hidden)
    return 3 * (forward + 2 * hidden * config.vocab_size * num_slots)


def measured_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of `device` at a large matrix product: the best of five."""
    size = 8192 if device.type == "cuda" else 512
    matrix = torch.randn(size, size, device=device).to(dtype)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = 0.0
    for _ in range(5):
        synchronize()
        started = time.perf_counter()
        matrix @ matrix
        synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - started) / 1e12)
    return best


def build_model(
    settings: TrainingSettings,
    dataset: CodeDataset,
    tokenizer: ImageTokenizer,
    features: CaptionFeatures | None = None,
) -> tuple[PARForConditionalGeneration, PARScheduler, dict[str, str] | None]:
    """Backbone, scheduler and `id2label` that the settings ask for, from scratch or from the pipeline `settings.model`."""
    plan = {name: getattr(settings, name) for name in _PLAN if getattr(settings, name) is not None}
    sizes = {name: getattr(settings, name) for name in _SIZES if getattr(settings, name) is not None}
    dropouts = {name: getattr(settings, name) for name in _DROPOUTS}
    vocab_size = tokenizer.num_codes
    torch.manual_seed(settings.seed)
    if settings.model is None:
        if dataset.classes is None:
            raise ValueError("`model` must be given for codes in LlamaGen's layout: they do not say their classes.")
        if features is None:
            condition = {"num_classes": len(dataset.classes)}
        else:
            condition = {
                "condition": "caption",
                "caption_length": features.max_length,
                "caption_channels": features.channels,
            }
        prefix_length = PARConfig(**condition).num_condition_slots
        scheduler = PARScheduler(grid_size=dataset.grid_size, prefix_length=prefix_length, **plan)
        config = PARConfig(
            **condition,
            vocab_size=vocab_size,
            num_learnable_tokens=scheduler.num_learnable_tokens,
            rope_axes=len(dataset.grid_size),
            **sizes,
            **dropouts,
        )
        labels = _read_labels(settings, dataset, config) if features is None else None
        return PARForConditionalGeneration(config), scheduler, labels

    if sizes:
        raise ValueError(f"`{next(iter(sizes))}` must not be given together with `model`, whose backbone has its own.")
    pipe_class = _pipeline_class(tokenizer, features)
    found = pipeline_class_name(DiffusionPipeline.load_config(settings.model))
    if found != pipe_class.__name__:
        raise ValueError(f"`model` must be a {pipe_class.__name__} for these data, {settings.model} is a {found}.")
    without = {} if features is None else {"text_encoder": None, "tokenizer": None}
    pipe = pipe_class.from_pretrained(settings.model, dtype=torch.float32, **without)
    config = pipe.transformer.config
    if features is not None and (config.caption_length, config.caption_channels) != (
        features.max_length,
        features.channels,
    ):
        raise ValueError(
            f"`features` must be {config.caption_length} of width {config.caption_channels}, as `model` takes them, "
            f"{settings.features} has {features.max_length} of {features.channels}."
        )
    if config.vocab_size != vocab_size:
        raise ValueError(
            f"`model` must have the {vocab_size} codes of the tokenizer, {settings.model} has {config.vocab_size}."
        )
    classes = config.num_classes if dataset.classes is None else len(dataset.classes)
    if features is None and classes > config.num_classes:
        raise ValueError(f"`data` must have at most the {config.num_classes} classes of `model`, it has {classes}.")
    # a region grid belongs to a number of parallel tokens
    inherited = {"region_grid": None} if "num_parallel_tokens" in plan else {}
    scheduler = PARScheduler.from_config(pipe.scheduler.config, grid_size=dataset.grid_size, **inherited | plan)
    for name, value in dropouts.items():
        setattr(config, name, value)
    labels = None
    if features is None:
        labels = pipe.config.id2label
        if labels is None or settings.labels is not None:
            labels = _read_labels(settings, dataset, config)
    return with_learnable_tokens(pipe.transformer, scheduler.num_learnable_tokens), scheduler, labels


def _pipeline_class(tokenizer: ImageTokenizer, features: CaptionFeatures | None) -> type:
    if isinstance(tokenizer, VideoTokenizer):
        return PARVideoPipeline
    return PARPipeline if features is None else PARTextToImagePipeline


def _read_labels(settings: TrainingSettings, dataset: CodeDataset, config: PARConfig) -> dict[str, str] | None:
    """`id2label`: of the file given, or the classes of the data where those have names."""
    if settings.labels is not None:
        return read_labels(settings.labels, config.num_classes)
    return None if dataset.classes is None else {str(i): name for i, name in enumerate(dataset.classes)}


def with_learnable_tokens(
    model: PARForConditionalGeneration, num_learnable_tokens: int
) -> PARForConditionalGeneration:
    """The same backbone with another number of learnable tokens, and the dropouts its config has now; new ones start at random."""
    config = PARConfig.from_dict(model.config.to_dict() | {"num_learnable_tokens": num_learnable_tokens})
    result = PARForConditionalGeneration(config)
    weights = model.state_dict()
    table = result.model.embed_tokens.weight.detach().clone()
    rows = min(len(table), len(weights["model.embed_tokens.weight"]))
    table[:rows] = weights["model.embed_tokens.weight"][:rows]
    result.load_state_dict(weights | {"model.embed_tokens.weight": table})
    return result


class Collate:
    """Samples of a [`CodeDataset`] -> codes (B, *grid_size) and what the model takes as their condition."""

    def __init__(self, features: CaptionFeatures | None):
        self.features = features

    def __call__(
        self, samples: list[tuple[torch.LongTensor, int]]
    ) -> tuple[torch.LongTensor, dict[str, torch.Tensor]]:
        codes, labels = torch.stack([codes for codes, _ in samples]), [label for _, label in samples]
        if self.features is None:
            return codes, {"class_labels": torch.tensor(labels)}
        features, mask = left_pad(*self.features.batch(labels))
        return codes, {"encoder_hidden_states": features, "attention_mask": mask}


def _to(condition: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: value.to(device, non_blocking=True) for name, value in condition.items()}


def train(settings: TrainingSettings, resume: str | None = None) -> Path:
    """
    Trains a backbone and returns the folder `settings.output`, then a pipeline folder.

    Every checkpoint in it (`checkpoint-N`) is a pipeline folder too, with what `resume` needs beside: `"latest"`, or the
    name of a checkpoint, continues an interrupted run of the same settings with the losses it would have had. One process
    or many (accelerate: DDP, FSDP2) see the same samples in the same steps.

    Example:

    ```py
    >>> from par_diffusers.settings import TrainingSettings
    >>> from par_diffusers.training.train import train

    >>> train(TrainingSettings("codes", "par-b-4x", vqvae="llamagen-b", hidden_size=768))  # doctest: +SKIP
    ```
    """
    accelerator = make_accelerator(settings)
    source = settings.vqvae or settings.model
    if source is None:
        raise ValueError("`vqvae` must be given where `model` is not: the tokenizer that made the codes.")
    tokenizer = load_tokenizer(source)
    is_video = isinstance(tokenizer, VideoTokenizer)
    if is_video and settings.features is not None:
        raise ValueError("`features` go with codes of images, those of clips are trained on classes.")
    # the paper's: table 5 for ImageNet, table 6 for UCF-101
    if settings.num_train_epochs is None:
        settings.num_train_epochs = 3000 if is_video else 300
    if settings.lr_warmup_epochs is None:
        settings.lr_warmup_epochs = 150 if is_video else 15
    dataset = CodeDataset(settings.data, tokenizer)
    held_out = None if settings.validation_data is None else CodeDataset(settings.validation_data, tokenizer)
    features = None if settings.features is None else CaptionFeatures(settings.features, dataset.classes)
    held_out_features = None
    if held_out is not None and features is not None:
        if settings.validation_features is None:
            raise ValueError("`validation_features` must be given with `features` and `validation_data`.")
        held_out_features = CaptionFeatures(settings.validation_features, held_out.classes)
    if held_out is not None:
        same = [held_out.grid_size == dataset.grid_size, features is not None or held_out.classes == dataset.classes]
        if not all(same):
            raise ValueError(
                f"`validation_data` must have the grid and the classes of `data`, {dataset.grid_size} and "
                f"{dataset.classes and len(dataset.classes)} classes, got {held_out.grid_size} and "
                f"{held_out.classes and len(held_out.classes)}."
            )
    model, scheduler, labels = build_model(settings, dataset, tokenizer, features)
    steps_per_epoch = max(len(dataset) // settings.global_batch_size, 1)
    total_steps = settings.max_train_steps or settings.num_train_epochs * steps_per_epoch
    warmup_steps = settings.lr_warmup_steps
    if warmup_steps is None:
        warmup_steps = min(settings.lr_warmup_epochs * steps_per_epoch, total_steps // 10)
    batches = BatchSchedule(
        len(dataset),
        dataset.num_views,
        settings.global_batch_size,
        settings.seed,
        range(total_steps),
        settings.gradient_accumulation_steps,
        accelerator.process_index,
        accelerator.num_processes,
    )
    with lock_folder(Path(settings.output), accelerator):
        fingerprint = dataset.fingerprint + ("" if features is None else features.fingerprint)
        run = TrainingRun(accelerator, settings, resume, fingerprint)
        batches.steps = range(run.step, total_steps)
        data = (dataset, features, held_out, held_out_features)
        _train(run, model, scheduler, tokenizer, labels, data, batches, warmup_steps, total_steps)
    return run.folder


def _train(run, model, scheduler, tokenizer, labels, data, batches, warmup_steps, total_steps) -> None:
    settings, accelerator = run.settings, run.accelerator
    dataset, features, held_out, held_out_features = data
    device, config = accelerator.device, model.config
    vocab_size = config.vocab_size
    model.set_attn_implementation(settings.attn_implementation)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if settings.compile:
        for layer in model.model.layers:
            layer.compile()
    optimizer, schedule = optimizer_and_schedule(model, settings, total_steps, warmup_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = None if settings.ema_decay is None else EMAModel(model.parameters(), decay=settings.ema_decay)
    run.restore(model, optimizer.optimizer, schedule, ema)
    scheduler.set_timesteps(device=device, grid_size=dataset.grid_size)
    num_slots = len(scheduler.slot_tokens)
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[settings.mixed_precision]
    peak = settings.peak_tflops or measured_tflops(device, dtype)
    accelerator.print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(dataset)} samples as "
        f"{'x'.join(map(str, dataset.grid_size))} tokens in {scheduler.num_inference_steps} steps, {total_steps} training "
        f"steps of {settings.global_batch_size} on {accelerator.num_processes} x {device.type}"
        f"{', FSDP' if accelerator.distributed_type == DistributedType.FSDP else ''}",
        flush=True,
    )

    def gather() -> tuple[dict[str, dict], PARPipeline | PARTextToImagePipeline | PARVideoPipeline | None]:
        """What is trained now: all tensors, and the pipeline of what is to be used, both on the main process."""
        tensors = gather_state(model, optimizer.optimizer, ema)
        if not accelerator.is_main_process:
            return tensors, None
        trained = PARForConditionalGeneration(config)
        trained.load_state_dict(tensors["ema" if ema is not None else "model"])
        components = {"transformer": trained.eval(), tokenizer.component: tokenizer.model, "scheduler": scheduler}
        facts = {} if features is not None else {"id2label": labels}
        if isinstance(tokenizer, VideoTokenizer):
            facts["frame_rate"] = dataset.frame_rate or None
        return tensors, _pipeline_class(tokenizer, features)(**components, **facts)

    if features is None:
        dataset.num_classes = config.num_classes
    loader = iter(
        DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=settings.dataloader_num_workers,
            collate_fn=Collate(features),
            pin_memory=device.type == "cuda",
        )
    )
    window, seconds, logged = torch.zeros((), device=device), 0.0, run.step
    model.train()
    for step in range(run.step + 1, total_steps + 1):
        started = time.perf_counter()
        for part in range(settings.gradient_accumulation_steps):
            codes, condition = next(loader)
            seed_step(settings.seed, step, part, accelerator.process_index)
            with accelerator.accumulate(model):
                losses = token_losses(
                    model,
                    scheduler,
                    vocab_size,
                    codes.to(device, non_blocking=True),
                    **_to(condition, device),
                )
                loss = losses.mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            window += loss.detach() / settings.gradient_accumulation_steps
        rate = schedule.get_last_lr()[0]
        schedule.step()
        if ema is not None:
            ema.step(model.parameters())
        validates = step % settings.validation_steps == 0 or step == total_steps
        saves = step % settings.checkpointing_steps == 0 or step == total_steps
        logs = step % settings.logging_steps == 0 or validates or saves
        if logs:
            window = accelerator.reduce(window, "mean")
            loss = window.item() / (step - logged)  # waits for the device
        seconds += time.perf_counter() - started
        if not logs:
            continue

        speed = (step - logged) * settings.global_batch_size / seconds
        utilization = speed * flops_per_sample(config, num_slots) / 1e12 / accelerator.num_processes / peak
        metrics = {"loss": loss, "learning_rate": rate, "grad_norm": float(grad_norm)}
        metrics |= {"samples_per_second": round(speed, 2), "mfu": round(utilization, 4)}
        if validates:
            if held_out is not None:
                part = max(settings.global_batch_size // accelerator.num_processes, 1)
                with averaged_weights(model, ema):
                    each = validation_losses(
                        model,
                        scheduler,
                        vocab_size,
                        held_out,
                        Collate(held_out_features),
                        settings.validation_samples,
                        part,
                        accelerator,
                    )
                metrics |= _validation_metrics(each, scheduler)
        run.log(step, metrics)
        accelerator.print(_line(step, total_steps, metrics), flush=True)
        if validates and held_out is not None and accelerator.is_main_process:
            values = scheduler.restore_grid(each[None].float())[0].cpu()
            run.log_picture(step, "validation", draw_heatmap(values))
        samples = validates and settings.num_validation_images > 0
        if samples or saves:
            tensors, pipe = gather()
            if samples and accelerator.is_main_process:
                samples = _sample(pipe, settings.num_validation_images, device, features, dataset.classes)
                run.log_picture(step, "samples", contact_sheet(samples))
            if saves:
                run.save_checkpoint(step, tensors, schedule, lambda folder, pipe=pipe: pipe.save_pretrained(folder))
        window, seconds, logged = torch.zeros((), device=device), 0.0, step
    _, pipe = gather()
    run.finish(lambda folder: pipe.save_pretrained(folder))


def _validation_metrics(losses: torch.Tensor, scheduler: PARScheduler) -> dict:
    """Means over all tokens, over those sampled one by one and over the others; and all, in raster layout."""
    single = torch.tensor([len(tokens) == 1 for tokens in scheduler.step_tokens for _ in tokens], device=losses.device)
    metrics = {"validation_loss": losses.mean().item()}
    if single.any() and not single.all():
        metrics["validation_loss_initial"] = losses[single].mean().item()
        metrics["validation_loss_parallel"] = losses[~single].mean().item()
    grid = scheduler.restore_grid(losses[None].float())[0]
    return metrics | {
        "validation_loss_per_token": [[round(v, 4) for v in row] for row in grid.flatten(0, -2).tolist()]
    }


def _line(step: int, total_steps: int, metrics: dict) -> str:
    line = f"step {step}/{total_steps} loss {metrics['loss']:.4f}"
    if "validation_loss" in metrics:
        line += f" validation {metrics['validation_loss']:.4f}"
    if "validation_loss_initial" in metrics:
        line += (
            f" (initial {metrics['validation_loss_initial']:.4f}, parallel {metrics['validation_loss_parallel']:.4f})"
        )
    return line + (
        f" lr {metrics['learning_rate']:.2e} grad {metrics['grad_norm']:.2f} {metrics['samples_per_second']:.0f} samples/s "
        f"MFU {metrics['mfu']:.0%}"
    )


def _sample(
    pipe: PARPipeline | PARTextToImagePipeline | PARVideoPipeline,
    count: int,
    device: torch.device,
    features: CaptionFeatures | None,
    captions: list[str] | None,
) -> list:
    """Images or clips of classes or captions spread over all, the same ones and from the same seeds each time."""
    pipe.to(device)
    last = pipe.transformer.config.num_classes - 1 if features is None else len(captions) - 1
    chosen = torch.linspace(0, last, count).long().tolist()
    if features is None:
        images = generate(pipe, chosen, seed=0)
    else:
        embeds, mask = features.batch(chosen)
        generators = [torch.Generator(device).manual_seed(i) for i in range(count)]
        images = pipe(prompt_embeds=embeds, prompt_attention_mask=mask, generator=generators).images
    pipe.to("cpu")
    return images
