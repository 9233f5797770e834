"""Peak memory of a conversion, on a generated checkpoint of a published size."""

import subprocess
import sys

import pytest
import torch

from par_diffusers import PARConfig, PARForConditionalGeneration
from par_diffusers.conversion.convert_llamagen import _published_shapes


CODE = """
import sys
import par_diffusers.conversion.convert_llamagen as conversion
conversion.SHARD_SIZE = int(sys.argv.pop())

def peak():  # kilobytes; getrusage would count what the parent held before this process began
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
conversion.convert_llamagen_checkpoint(*sys.argv[1:], image_size=32)
print(before, peak())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("shard_size", "share"), [(100 << 20, 0.35), (1 << 30, 1.0)])
def test_memory_follows_the_shard_and_not_the_file(shard_size, share, tmp_path, reference):
    # LlamaGen-L with the small vocabulary of the reference tokenizer
    with torch.device("meta"):
        model = PARForConditionalGeneration(PARConfig(num_classes=10, vocab_size=96))
    torch.save(
        {"model": {name: torch.randn(shape) for name, shape in _published_shapes(model).items()}}, tmp_path / "L.pt"
    )
    size = (tmp_path / "L.pt").stat().st_size
    command = [
        sys.executable,
        "-c",
        CODE,
        tmp_path / "L.pt",
        reference("vq_f4").file,
        tmp_path / "out",
        str(shard_size),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    before, peak = (int(value) * 1024 for value in run.stdout.split()[-2:])
    print(
        f"shards of {shard_size >> 20} MiB: file {size / 1e9:.2f} GB, peak RSS {peak / 1e9:.2f} GB, of it {before / 1e9:.2f} GB before converting"
    )
    assert size > 1.2e9
    assert peak - before < share * size
