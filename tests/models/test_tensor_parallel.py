import subprocess
import sys
from pathlib import Path


CODE = """
import sys
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from conftest import build_model
from par_diffusers import PARForConditionalGeneration, PARScheduler

dist.init_process_group("gloo")
assert dist.get_world_size() == 2
whole, scheduler = build_model(), PARScheduler((4, 4))
parallel = PARForConditionalGeneration.from_pretrained(sys.argv[2], tp_plan="auto").eval()
assert parallel.model.layers[0].self_attn.q_proj.weight.to_local().shape == (24, 48)
inputs = {"class_labels": torch.tensor([1, 2]), **scheduler.model_inputs(torch.arange(32).view(2, 4, 4), 32)}
with torch.no_grad():
    difference = (parallel(**inputs).logits - whole(**inputs).logits).abs().max().item()
assert difference < 1e-4, difference
print("rank", dist.get_rank(), "agrees")
dist.destroy_process_group()
"""


def test_two_tensor_parallel_processes_compute_what_one_does(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    (tmp_path / "run.py").write_text(CODE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [tmp_path / "run.py", Path(__file__).parent.parent, tmp_path / "model"]
    run = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("agrees") == 2
