"""A training run on disk: its lock, its settings, its log and its checkpoints."""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LambdaLR

from par_diffusers.folders import sync_folder
from par_diffusers.settings import save_settings


SETTINGS, METRICS, STATE = "training.yaml", "metrics.jsonl", "training_state"
# what may differ between a run and its continuation: it changes no loss
_FREE = {
    "output",
    "validation_data",
    "validation_samples",
    "validation_steps",
    "logging_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "report_to",
    "dataloader_num_workers",
    "num_validation_images",
    "peak_tflops",
    "data",  # its content is compared, not its path
    "vqvae",
    "model",
    "labels",
}


def make_accelerator(settings) -> Accelerator:
    """The `Accelerator` of a trainer. Decides `settings.mixed_precision` where the settings do not."""
    if settings.mixed_precision is None:
        settings.mixed_precision = "bf16" if torch.accelerator.is_available() else "no"
    return Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        log_with=settings.report_to,
        project_dir=settings.output,
    )


def optimizer_and_schedule(model: torch.nn.Module, settings, total_steps: int, warmup_steps: int):
    """AdamW with weight decay on matrices only (paper, section 4.1), and its schedule by name."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (settings.adam_beta1, settings.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas)
    return optimizer, get_scheduler(settings.lr_scheduler, optimizer, None, warmup_steps, total_steps)


def refuse_changes(settings, folder: Path) -> None:
    """Raises a `ValueError` where the run in `folder` has other settings than these."""
    earlier = type(settings)(**_read_yaml(folder / SETTINGS))
    changed = [
        f"{item.name} ({getattr(earlier, item.name)!r}, now {getattr(settings, item.name)!r})"
        for item in dataclasses.fields(settings)
        if item.name not in _FREE and getattr(earlier, item.name) != getattr(settings, item.name)
    ]
    if changed:
        raise ValueError(
            f"`resume` must continue with the settings of the run in {folder}, these differ: {', '.join(changed)}."
        )


class TrainingRun:
    """
    The folder of a run.

    - `training.yaml`: the settings; a continuation with others is refused.
    - `metrics.jsonl`: a line of metrics at each logging step; trackers get the same.
    - `checkpoint-N/`: what was trained after N steps, in the form users load it, with `training_state/` inside. Written
      under another name and renamed when whole; older ones go only then. The state is plain tensors and JSON, whole and
      independent of how many processes share the training, DDP or FSDP.

    Args:
        accelerator (`Accelerator`): Of this process.
        settings: Of the command.
        resume (`str`, *optional*): `"latest"` or the name of a checkpoint, to continue the run that is in the folder.
        data (`str`): Fingerprint of the training data.
    """

    def __init__(self, accelerator: Accelerator, settings, resume: str | None, data: str):
        self.accelerator, self.settings, self.data = accelerator, settings, data
        self.folder = Path(settings.output)
        found = [None, {"step": 0}]
        if accelerator.is_main_process:
            found = self._prepare(resume)
        self.checkpoint, self._state = broadcast_object_list(found)
        self.step = self._state["step"]
        if settings.report_to is not None:
            accelerator.init_trackers("par_diffusers", _flat(dataclasses.asdict(settings)))

    def _prepare(self, resume: str | None) -> list:
        """The name of the checkpoint to continue from, if any, and its state."""
        there = sorted(i.name for i in self.folder.iterdir() if i.name != ".lock" and not i.name.endswith(".partial"))
        if resume is None:
            if there:
                raise ValueError(
                    f"`output` must be a new or empty folder, {self.folder} has {there[0]}"
                    f"{' (--resume continues the run in it)' if SETTINGS in there else ''}."
                )
            save_settings(self.settings, self.folder / SETTINGS)
            return [None, {"step": 0}]
        if SETTINGS not in there:
            raise ValueError(f"`resume` continues a run, {self.folder} holds none ({SETTINGS} is missing).")
        refuse_changes(self.settings, self.folder)
        for item in self.folder.glob(".*.partial"):
            shutil.rmtree(item) if item.is_dir() else item.unlink()
        checkpoints = self._checkpoints()
        if resume != "latest" and resume not in checkpoints:
            raise ValueError(f"`resume` must be a checkpoint in {self.folder}, one of {checkpoints}, got {resume!r}.")
        name = resume if resume != "latest" else checkpoints[-1] if checkpoints else None
        state = {"step": 0}
        if name is not None:
            state = json.loads((self.folder / name / STATE / "trainer_state.json").read_text(encoding="utf-8"))
            if state["data"] != self.data:
                raise ValueError(
                    f"`resume` must continue with the data of the run ({state['data']}), `data` is {self.data}."
                )
        self._cut_metrics(state["step"])
        print(f"continuing {self.folder} {'from ' + name if name else 'from the start'}", flush=True)
        return [name, state]

    def _checkpoints(self) -> list[str]:
        names = [item.name for item in self.folder.glob("checkpoint-*") if item.name.rpartition("-")[2].isdecimal()]
        return sorted(names, key=lambda name: int(name.rpartition("-")[2]))

    def _cut_metrics(self, step: int) -> None:
        """Drops what the interrupted run logged after the checkpoint."""
        file = self.folder / METRICS
        if not file.is_file():
            return
        kept = []
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:  # the line being written when the run was killed
                break
        partial = file.with_name(f".{METRICS}.partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, file)

    def log(self, step: int, metrics: dict) -> None:
        """Appends a line to the log and tells the trackers; stops a run that has diverged."""
        if self.accelerator.is_main_process:
            with open(self.folder / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step} | metrics) + "\n")
        self.accelerator.log({k: v for k, v in metrics.items() if isinstance(v, int | float)}, step=step)
        if not math.isfinite(metrics["loss"]):
            raise ValueError(
                f"`learning_rate` ({self.settings.learning_rate:g}) must be one that training stands: at step {step} the "
                f"loss is {metrics['loss']}."
            )

    def log_picture(self, step: int, name: str, image) -> None:
        """Saves a PIL image as `name/step-N.png` and shows it to the trackers. For the main process."""
        import numpy as np

        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        image.save(folder / f"step-{step:06}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.asarray(image)[None]}, step, dataformats="NHWC")
            else:
                tracker.log_images({name: [image]}, step=step)

    def save_checkpoint(
        self, step: int, tensors: dict[str, dict], schedule: LambdaLR, export: Callable[[Path], None], **state
    ) -> None:
        """
        Writes `checkpoint-{step}`: `export(folder)` writes what users load, `tensors` (of `gather_state`, and others by
        name) go to `training_state/{name}.safetensors`, the rest to `training_state/trainer_state.json`. Called by all
        processes.
        """
        final = self.folder / f"checkpoint-{step}"
        if self.accelerator.is_main_process and not final.exists():
            scaler = self.accelerator.scaler
            state |= {"step": step, "data": self.data, "num_processes": self.accelerator.num_processes}
            state |= {"schedule": schedule.state_dict(), "scaler": scaler and scaler.state_dict()}
            partial = self.folder / f".checkpoint-{step}.partial"
            try:
                export(partial)
                (partial / STATE).mkdir()
                for name, values in tensors.items():
                    save_file(values, partial / STATE / f"{name}.safetensors")
                text = json.dumps(state, indent=1) + "\n"
                (partial / STATE / "trainer_state.json").write_text(text, encoding="utf-8")
                sync_folder(partial)
                os.rename(partial, final)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            for name in self._checkpoints()[: -self.settings.checkpoints_total_limit]:
                gone = self.folder / f".{name}.partial"  # a name that no resume takes for a checkpoint
                os.rename(self.folder / name, gone)
                shutil.rmtree(gone)
        self.accelerator.wait_for_everyone()

    def restore(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: LambdaLR,
        ema: EMAModel | None = None,
    ) -> tuple[dict[str, dict], dict]:
        """
        Puts the state of the checkpoint to continue from, if there is one, into what accelerate has prepared. Returns its
        tensors (on the main process only) and what else was saved with it.
        """
        if self.checkpoint is None:
            return {}, {}
        tensors, state = {}, self._state
        if self.accelerator.is_main_process:
            files = (self.folder / self.checkpoint / STATE).glob("*.safetensors")
            tensors = {file.stem: load_file(file) for file in files}
        _scatter_state(tensors, model, optimizer, ema)
        schedule.load_state_dict(state["schedule"])
        for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        if ema is not None:
            ema.optimization_step = self.step
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return tensors, state

    def finish(self, export: Callable[[Path], None]) -> None:
        """Puts what was trained into the folder itself, each file by a rename."""
        if self.accelerator.is_main_process:
            partial = self.folder / ".final.partial"
            export(partial)
            sync_folder(partial)
            # model_index.json, which makes a folder a pipeline, comes last
            for file in sorted(partial.rglob("*"), key=lambda file: (file.is_file() and file.parent == partial, file)):
                place = self.folder / file.relative_to(partial)
                place.mkdir(exist_ok=True) if file.is_dir() else os.replace(file, place)
            shutil.rmtree(partial)
            print(f"trained: {self.folder}", flush=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def gather_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel | None) -> dict[str, dict]:
    """Whole tensors by name, on the CPU of the main process: `model`, `optimizer`, and `ema` where there is one."""
    moments = get_optimizer_state_dict(model, optimizer, options=_WHOLE).get("state", {})
    tensors = {
        "model": get_model_state_dict(model, options=_WHOLE),
        "optimizer": {f"{name}/{kind}": value for name, kinds in moments.items() for kind, value in kinds.items()},
    }
    if ema is not None:
        names = [name.removeprefix("module.") for name, _ in model.named_parameters()]
        shadows = [s.full_tensor() if isinstance(s, DTensor) else s for s in ema.shadow_params]
        tensors["ema"] = {name: shadow.cpu() for name, shadow in zip(names, shadows, strict=True)}
    return {kind: {name: t.contiguous() for name, t in named.items()} for kind, named in tensors.items()}


def _scatter_state(
    tensors: dict[str, dict], model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel | None
) -> None:
    """The inverse of `gather_state`: `tensors` as the main process has them, empty elsewhere."""
    shared = torch.distributed.is_initialized()
    options = dataclasses.replace(_WHOLE, broadcast_from_rank0=shared, cpu_offload=False)
    set_model_state_dict(model, tensors.get("model", {}), options=options)
    moments = get_optimizer_state_dict(model, optimizer, options=_WHOLE)  # its groups name the parameters
    for name, value in tensors.get("optimizer", {}).items():
        parameter, _, kind = name.rpartition("/")
        moments["state"].setdefault(parameter, {})[kind] = value
    set_optimizer_state_dict(model, optimizer, moments, options=options)
    if ema is None:
        return
    for name, shadow in zip(
        [n.removeprefix("module.") for n, _ in model.named_parameters()], ema.shadow_params, strict=True
    ):
        whole = tensors["ema"][name].to(shadow.device) if tensors else torch.empty(shadow.shape, device=shadow.device)
        if isinstance(shadow, DTensor):
            whole = distribute_tensor(whole, shadow.device_mesh, shadow.placements)  # of the main process
        elif shared:
            torch.distributed.broadcast(whole, 0)
        shadow.copy_(whole)


def _flat(settings: dict) -> dict:
    """Values that every tracker takes."""
    return {name: value if isinstance(value, int | float | str) else str(value) for name, value in settings.items()}


def _read_yaml(file: Path) -> dict:
    import yaml

    return yaml.safe_load(file.read_text(encoding="utf-8"))
