"""Trains a PAR model on the tokens of an image set.

accelerate launch -m par_diffusers.training.train_par --data glyphs --tokenizer tokenizer --output model
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import VQModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch.utils.data import DataLoader, TensorDataset

from par_diffusers.cli import one_line_errors
from par_diffusers.models import PARConfig, PARForConditionalGeneration
from par_diffusers.pipelines import PARPipeline
from par_diffusers.schedulers import PARScheduler
from par_diffusers.training.data import encode_images, load_split


def training_loss(
    model: torch.nn.Module, scheduler: PARScheduler, vocab_size: int, grid: torch.LongTensor, labels: torch.LongTensor
) -> torch.Tensor:
    """Mean cross-entropy in nats of `grid`, token ids (B, *grid_size) in raster layout, under classes `labels` (B,)."""
    inputs = scheduler.model_inputs(grid, vocab_size)
    return model(class_labels=labels, labels=scheduler.order_tokens(grid), use_cache=False, **inputs).loss


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def train_par(
    model: PARForConditionalGeneration,
    scheduler: PARScheduler,
    grids: torch.LongTensor,
    labels: torch.LongTensor,
    *,
    validation: tuple[torch.LongTensor, torch.LongTensor],
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    log_every: int = 200,
    save: Callable[[PARForConditionalGeneration], None] | None = None,
    save_every: int = 1000,
    seed: int = 0,
) -> PARForConditionalGeneration:
    """
    Trains `model` on `grids`, token ids (N, *grid_size) in raster layout, and `labels`, class ids (N,).

    `batch_size` is per process. AdamW with betas 0.9 and 0.95, cosine to zero after at most 200 steps of
    warm-up, gradients clipped to norm 1 (paper,
    table 5). `validation` is a pair like (grids, labels); `save` is called with the model every `save_every` steps.
    """
    set_seed(seed)
    accelerator = Accelerator()
    warmup_steps = min(200, steps // 10)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=learning_rate, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(
        optimizer, warmup_steps * accelerator.num_processes, steps * accelerator.num_processes
    )
    loader = DataLoader(TensorDataset(grids, labels), batch_size=batch_size, shuffle=True, drop_last=True)
    prepared, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
    scheduler.set_timesteps(device=accelerator.device, grid_size=grids.shape[1:])
    vocab_size = model.config.vocab_size

    step, running, started = 0, 0.0, time.perf_counter()
    prepared.train()
    while step < steps:
        for grid, label in loader:
            loss = training_loss(prepared, scheduler, vocab_size, grid.long(), label.long())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            running += loss.detach()
            if step % log_every == 0 or step == steps:
                held_out = validation_loss(prepared, scheduler, vocab_size, *validation)
                trained = accelerator.reduce(running, "mean").item() / (step % log_every or log_every)
                speed = step * batch_size * accelerator.num_processes / (time.perf_counter() - started)
                accelerator.print(
                    f"step {step}/{steps} loss {trained:.4f} validation {held_out:.4f} {speed:.0f} samples/s",
                    flush=True,
                )
                running = 0.0
            if save is not None and step % save_every == 0 and accelerator.is_main_process:
                save(model)
            if step == steps:
                break
    return model.eval()


@torch.no_grad()
def validation_loss(
    model: torch.nn.Module,
    scheduler: PARScheduler,
    vocab_size: int,
    grids: torch.LongTensor,
    labels: torch.LongTensor,
    batch_size: int = 64,
) -> float:
    """Mean cross-entropy in nats per token, dropouts off."""
    model.eval()
    device = scheduler.token_order.device
    total = 0.0
    for grid, label in zip(grids.split(batch_size), labels.split(batch_size), strict=True):
        loss = training_loss(model, scheduler, vocab_size, grid.long().to(device), label.long().to(device))
        total += loss.item() * len(grid)
    model.train()
    return total / len(grids)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m par_diffusers.training.train_par", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="folder made by par_diffusers.training.glyphs")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the VQModel")
    parser.add_argument("--output", type=Path, required=True, help="folder for the trained pipeline")
    parser.add_argument("--num-parallel-tokens", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--hidden-size", type=int, default=224, help="default: %(default)s")
    parser.add_argument("--intermediate-size", type=int, default=576, help="default: %(default)s")
    parser.add_argument("--num-hidden-layers", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--num-attention-heads", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--condition-dropout", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=6400, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, help="per process (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="default of the pipeline (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    train, classes = load_split(args.data, "train")
    held_out, _ = load_split(args.data, "validation")
    vqvae = VQModel.from_pretrained(args.tokenizer).eval()
    grids = encode_images(vqvae, train["images"])
    held_out_grids = encode_images(vqvae, held_out["images"][:1024])
    print(f"{len(grids)} images as {tuple(grids.shape[1:])} tokens", flush=True)

    torch.manual_seed(args.seed)
    scheduler = PARScheduler(
        grid_size=tuple(grids.shape[1:]),
        num_parallel_tokens=args.num_parallel_tokens,
        guidance_scale=args.guidance_scale,
    )
    model = PARForConditionalGeneration(
        PARConfig(
            vocab_size=vqvae.config.num_vq_embeddings,
            num_classes=len(classes),
            num_learnable_tokens=scheduler.num_learnable_tokens,
            hidden_size=args.hidden_size,
            intermediate_size=args.intermediate_size,
            num_hidden_layers=args.num_hidden_layers,
            num_attention_heads=args.num_attention_heads,
            condition_dropout=args.condition_dropout,
        )
    )
    print(f"{model.num_parameters() / 1e6:.2f} M parameters", flush=True)

    def save(model: PARForConditionalGeneration) -> None:
        id2label = {str(i): name for i, name in enumerate(classes)}
        PARPipeline(model, vqvae, scheduler, id2label=id2label).save_pretrained(args.output)

    train_par(
        model,
        scheduler,
        grids,
        train["labels"],
        validation=(held_out_grids, held_out["labels"][:1024]),
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        save=save,
        seed=args.seed,
    )
    save(model)


if __name__ == "__main__":
    with one_line_errors("python -m par_diffusers.training.train_par"):
        main()
