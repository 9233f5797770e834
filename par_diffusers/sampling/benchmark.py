"""Times the pipeline, and says how far from the limits of the machine it is."""

import gc
import itertools
import json
import math
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from accelerate.utils import tqdm
from diffusers import VQModel

from par_diffusers._version import __version__
from par_diffusers.cli import model_source
from par_diffusers.conversion.convert_llamagen import PUBLISHED_SIZES
from par_diffusers.folders import write_text
from par_diffusers.models import PARConfig, PARForConditionalGeneration
from par_diffusers.pipelines import PARPipeline
from par_diffusers.sampling.loading import int8_weights, load_pipeline, prepare, stored_tensors
from par_diffusers.schedulers import PARScheduler
from par_diffusers.settings import BenchmarkSettings, LoadingSettings
from par_diffusers.training.train import measured_tflops


_SIZES = {name: (*shape, heads) for shape, (name, heads) in PUBLISHED_SIZES.items()}


def random_pipeline(size: str, num_parallel_tokens: int, grid_size: tuple[int, ...]) -> PARPipeline:
    """A pipeline of a published size (`"B"`, `"L"`, `"XL"`, `"XXL"`, `"3B"`) with LlamaGen's VQ-16 tokenizer; random weights."""
    layers, width, heads = _SIZES[size]
    torch.manual_seed(0)
    config = PARConfig(
        hidden_size=width,
        intermediate_size=-(-int(8 * width / 3) // 256) * 256,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_learnable_tokens=num_parallel_tokens - 1,
    )
    vqvae = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 128, 256, 256, 512),
        layers_per_block=2,
        latent_channels=256,
        num_vq_embeddings=config.vocab_size,
        vq_embed_dim=8,
        lookup_from_codebook=True,
    )
    return PARPipeline(
        PARForConditionalGeneration(config).eval(), vqvae.eval(), PARScheduler(grid_size, num_parallel_tokens)
    )


@dataclass
class Machine:
    """What it can do: bytes read and floating-point operations a second."""

    name: str
    bandwidth: float
    flops: dict[str, float]

    @classmethod
    def measure(cls, device: torch.device, dtypes: tuple[str, ...]) -> "Machine":
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
        rates = {dtype: measured_tflops(device, getattr(torch, dtype)) * 1e12 for dtype in dtypes}
        return cls(name, measured_bandwidth(device), rates)


def _cpu_name() -> str:
    models = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    name = models[0].split(":")[1].strip() if models else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def _lines(file: str) -> list[str]:
    return Path(file).read_text(encoding="utf-8").splitlines() if Path(file).exists() else []


def measured_bandwidth(device: torch.device) -> float:
    """Bytes a second that a sum over more memory than any cache holds reads: the best of seven."""
    data = torch.ones(2**30 if device.type == "cuda" else 2**28, device=device)
    best = 0.0
    for _ in range(7):
        _synchronize(device)
        started = time.perf_counter()
        data.sum()
        _synchronize(device)
        best = max(best, data.nbytes / (time.perf_counter() - started))
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Work:
    """What the steps of a call must do, whoever does it: bytes to read and floating-point operations of each step."""

    bytes: list[float]
    flops: list[float]

    @classmethod
    def of(cls, pipe: PARPipeline, streams: int) -> "Work":
        """Every weight but the embeddings is read once a step, and keys and values of all slots so far for each stream."""
        config, model = pipe.transformer.config, pipe.transformer
        tables = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
        weights = sum(p.numel() for p in model.parameters()) - sum(table.numel() for table in tables)
        stored = [
            sum(part.nbytes for w in each for part in stored_tensors(w)) for each in (model.parameters(), tables)
        ]
        weight_bytes = stored[0] - stored[1]
        width = config.num_key_value_heads * config.head_dim
        slot_bytes = 2 * config.num_hidden_layers * width * model.dtype.itemsize
        found = cls([], [])
        for slots in pipe.scheduler.step_slots:
            found.bytes.append(weight_bytes + slot_bytes * slots.start * streams)
            attention = 4 * config.num_hidden_layers * config.hidden_size * slots.stop
            found.flops.append(len(slots) * streams * (2 * weights + attention))
        return found

    def floor(self, machine: Machine, dtype: str) -> float:
        """Seconds below which no program can be."""
        pairs = zip(self.bytes, self.flops, strict=True)
        return sum(max(size / machine.bandwidth, flops / machine.flops[dtype]) for size, flops in pairs)


class PeakMemory:
    """Highest memory of the process (on CUDA: of its tensors) inside the context, in bytes; None where it cannot be told."""

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, None

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif os.access("/proc/self/clear_refs", os.W_OK):
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        return self

    def __exit__(self, *exception):
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            marks = [line for line in _lines("/proc/self/status") if line.startswith("VmHWM")]
            self.bytes = int(marks[0].split()[1]) * 1024 if marks else None


def _draw(pipe: PARPipeline, batch_size: int, guidance_scale: float, **kwargs) -> torch.LongTensor:
    """Tokens (batch_size, *grid_size) of the first classes, always from the same seed."""
    labels = [i % pipe.transformer.config.num_classes for i in range(batch_size)]
    generator = torch.Generator(pipe.device).manual_seed(0)
    return pipe(labels, guidance_scale=guidance_scale, generator=generator, output_type="latent", **kwargs)[0]


def token_agreement(pipe: PARPipeline, reference: torch.LongTensor, guidance_scale: float) -> float:
    """
    Share of tokens that `pipe` draws as in `reference` (batch_size, *grid_size), which `_draw` made with another pipeline:
    from the same random numbers, and each given the reference's tokens before it.
    """
    same = []

    def compare(pipe, step, timestep, tensors):
        tokens = pipe.scheduler.step_tokens[step]
        places = pipe.scheduler.token_order[tokens.start : tokens.stop]
        same.append((tensors["latents"] == reference).flatten(1)[:, places])
        return {"latents": reference}

    _draw(pipe, len(reference), guidance_scale, callback_on_step_end=compare)
    return torch.cat(same, dim=1).float().mean().item()


def time_calls(pipe: PARPipeline, batch_size: int, guidance_scale: float, warmup: int, repeats: int) -> dict:
    """Seconds of tokens and of pixels of `repeats` calls after `warmup` others, and the peak of memory."""
    device = pipe.device
    tokens, pixels = [], []
    with PeakMemory(device) as memory:
        for _ in range(warmup + repeats):
            _synchronize(device)
            started = time.perf_counter()
            latents = _draw(pipe, batch_size, guidance_scale)
            _synchronize(device)
            drawn = time.perf_counter()
            with torch.no_grad():
                pipe.decode_latents(latents)
            _synchronize(device)
            tokens.append(drawn - started)
            pixels.append(time.perf_counter() - drawn)
    return {
        "warmup_seconds": sum(tokens[:warmup]) + sum(pixels[:warmup]),
        "token_seconds": tokens[warmup:],
        "pixel_seconds": pixels[warmup:],
        "peak_memory": memory.bytes,
    }


def _pipeline(
    model: str,
    loading: LoadingSettings,
    device: torch.device,
    num_parallel_tokens: int,
    grid_size: tuple[int, ...] | None,
) -> PARPipeline:
    if model in _SIZES:
        pipe = random_pipeline(model, num_parallel_tokens, grid_size or (24, 24))
        pipe.transformer.to(getattr(torch, loading.dtype))
        if loading.quantization is not None:
            from torchao.quantization import quantize_

            quantize_(pipe.transformer.model, int8_weights())  # like transformers, without the output head
        pipe.to(device)
    else:
        pipe = load_pipeline(model_source(model), loading, device, batch_size=1)
        config = pipe.scheduler.config
        pipe.scheduler = PARScheduler.from_config(
            config,
            num_parallel_tokens=num_parallel_tokens,
            region_grid=None,
            grid_size=grid_size or config.grid_size,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def benchmark(settings: BenchmarkSettings) -> dict:
    """
    Times every combination of the settings' lists, one after the other, each after a warm-up, and relates it to the floor:
    the time that reading the weights and the cache once a step takes at the machine's measured bandwidth, or its floating-point
    operations at the measured rate of a large matrix product, whichever is longer.

    Returns:
        `dict`: `machine`, `rows`, `versions`. Times are medians in seconds; `spread` is the range over the median;
        `agreement` the share of tokens drawn as by the same model in float32, where it is not a random one.
    """
    device = torch.device(
        settings.device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    )
    machine = Machine.measure(device, settings.dtype)
    rows, references = [], {}
    combinations = list(
        itertools.product(
            settings.model,
            settings.dtype,
            settings.quantization,
            settings.mode,
            settings.batch_size,
            settings.num_parallel_tokens,
        )
    )
    for model, dtype, quantization, mode, batch_size, n in tqdm(combinations, desc="benchmark"):
        loading = LoadingSettings(dtype=dtype, quantization=None if quantization == "none" else quantization)
        pipe = _pipeline(model, loading, device, n, settings.grid_size)
        if settings.channels_last:
            if "vqvae" not in pipe.components:
                raise ValueError(f"`channels_last` is for tokenizers of images, that of {model} is of clips.")
            pipe.vqvae.to(memory_format=torch.channels_last)
        scale = 2.0 if settings.guidance else 1.0
        case = (model, batch_size, n)
        if model not in _SIZES and case not in references:
            plain = _pipeline(model, LoadingSettings(), device, n, settings.grid_size)
            references[case] = _draw(plain, batch_size, scale)
            del plain
        work = Work.of(pipe, batch_size * (2 if settings.guidance else 1))
        torch.compiler.reset()
        prepare(pipe, mode, batch_size)
        found = time_calls(pipe, batch_size, scale, settings.warmup, settings.repeats)
        agreement = token_agreement(pipe, references[case], scale) if case in references else None
        floor = work.floor(machine, dtype)
        tokens, pixels = statistics.median(found["token_seconds"]), statistics.median(found["pixel_seconds"])
        totals = [sum(pair) for pair in zip(found["token_seconds"], found["pixel_seconds"], strict=True)]
        total = statistics.median(totals)
        steps = pipe.scheduler.num_inference_steps
        rows.append(
            {
                "model": model,
                "dtype": dtype,
                "quantization": quantization,
                "mode": mode,
                "batch_size": batch_size,
                "num_parallel_tokens": n,
                "grid_size": list(pipe.scheduler.config.grid_size),
                "steps": steps,
                "seconds_per_image": total / batch_size,
                "spread": (max(totals) - min(totals)) / total,
                "token_seconds": tokens,
                "pixel_seconds": pixels,
                "ms_per_step": 1000 * tokens / steps,
                "images_per_second": batch_size / total,
                "peak_memory": found["peak_memory"],
                "warmup_seconds": found["warmup_seconds"],
                "bytes": sum(work.bytes),
                "flops": sum(work.flops),
                "floor_seconds": floor,
                "share_of_floor": floor / tokens,
                "agreement": agreement,
            }
        )
        del pipe
        gc.collect()  # models are full of cycles, and the next one's memory is measured
    _compare_with_one_token(rows)
    return {
        "machine": {
            "name": machine.name,
            "bandwidth": machine.bandwidth,
            "flops": machine.flops,
            "device": str(device),
        },
        "guidance": settings.guidance,
        "channels_last": settings.channels_last,
        "warmup": settings.warmup,
        "repeats": settings.repeats,
        "rows": rows,
        "versions": {
            "par_diffusers": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _compare_with_one_token(rows: list[dict]) -> None:
    """`speedup`: how much faster than the row of the same model and settings with one token a step."""
    same = ("model", "dtype", "quantization", "mode", "batch_size")
    ones = {tuple(row[name] for name in same): row for row in rows if row["num_parallel_tokens"] == 1}
    for row in rows:
        one = ones.get(tuple(row[name] for name in same))
        row["speedup"] = one and one["seconds_per_image"] / row["seconds_per_image"]


_COLUMNS = {
    "model": lambda row: row["model"],
    "dtype": lambda row: row["dtype"],
    "weights": lambda row: row["dtype"] if row["quantization"] == "none" else row["quantization"],
    "mode": lambda row: row["mode"],
    "batch": lambda row: str(row["batch_size"]),
    "n": lambda row: str(row["num_parallel_tokens"]),
    "steps": lambda row: str(row["steps"]),
    "s/image": lambda row: f"{row['seconds_per_image']:.3f}",
    "spread": lambda row: f"{row['spread']:.0%}",
    "ms/step": lambda row: f"{row['ms_per_step']:.2f}",
    "pixels s": lambda row: f"{row['pixel_seconds']:.3f}",
    "images/s": lambda row: f"{row['images_per_second']:.2f}",
    "GB": lambda row: "" if row["peak_memory"] is None else f"{row['peak_memory'] / 1e9:.2f}",
    "floor s": lambda row: f"{row['floor_seconds']:.3f}",
    "of floor": lambda row: f"{row['share_of_floor']:.0%}",
    "speed-up": lambda row: "" if row["speedup"] is None else f"{row['speedup']:.2f}",
    "same tokens": lambda row: "" if row["agreement"] is None else f"{row['agreement']:.1%}",
}


def describe_benchmark(found: dict) -> str:
    """The result as a Markdown table, with what it was measured on."""
    machine = found["machine"]
    rates = ", ".join(f"{rate / 1e12:.2f} TFLOP/s in {dtype}" for dtype, rate in machine["flops"].items())
    cells = [list(_COLUMNS), *([column(row) for column in _COLUMNS.values()] for row in found["rows"])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    grids = " and ".join(dict.fromkeys("x".join(map(str, row["grid_size"])) for row in found["rows"]))
    return "\n".join(
        [
            f"{machine['name']}: {machine['bandwidth'] / 1e9:.1f} GB/s read, {rates}",
            f"{grids} tokens, {'with' if found['guidance'] else 'without'} guidance, median of {found['repeats']} after {found['warmup']}; "
            "torch " + found["versions"]["torch"],
            "",
            *lines,
        ]
    )


def plot_roofline(found: dict, file: Path) -> None:
    """Achieved FLOP/s over FLOPs a byte, under the roof that bandwidth and matrix products of the machine make."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    machine = found["machine"]
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    intensities = [row["flops"] / row["bytes"] for row in found["rows"]]
    span = torch.logspace(-1, 4, 200, dtype=torch.double)
    for dtype, rate in machine["flops"].items():
        axes.plot(span, torch.minimum(span * machine["bandwidth"], torch.tensor(rate)) / 1e9, label=f"roof, {dtype}")
    markers = itertools.cycle("os^vD<>pP*Xh")
    for row, intensity in zip(found["rows"], intensities, strict=True):
        name = f"{row['model']} {row['num_parallel_tokens']}x, batch {row['batch_size']}, {_COLUMNS['weights'](row)}"
        speed = row["flops"] / row["token_seconds"] / 1e9
        axes.scatter(intensity, speed, s=40, marker=next(markers), zorder=3, label=f"{name}, {row['mode']}")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="GFLOP/s", title=machine["name"])
    # whole decades, which have few ticks
    axes.set_xlim(10 ** math.floor(math.log10(min(intensities))), 10 ** math.ceil(math.log10(max(intensities) * 2)))
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def save_benchmark(found: dict, folder: Path) -> None:
    """`benchmark.json`, `benchmark.md` and `roofline.png` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("benchmark.json", json.dumps(found, indent=1)), ("benchmark.md", describe_benchmark(found))):
        write_text(folder / name, text + "\n")
    plot_roofline(found, folder / "roofline.png")
