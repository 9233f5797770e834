"""The command line under FSDP2 on CPUs.

accelerate shards weights on accelerators only and takes CPUs for DDP, whatever is asked for. What this file changes is
that one decision; the sharding that follows is real.
"""

import sys

from accelerate.state import DistributedType, PartialState


PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

if __name__ == "__main__":
    from par_diffusers.cli import main

    main(sys.argv[1:])
