"""The command line under FSDP2 on CPUs.

accelerate shards weights on accelerators only and takes CPUs for DDP, whatever is asked for. This file changes that one
decision; the sharding that follows is real. And the loss is made in parts, as with large vocabularies.
"""

import sys

from accelerate.state import DistributedType, PartialState


PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

if __name__ == "__main__":
    from par_diffusers.cli import main
    from par_diffusers.models import modeling_par

    modeling_par._MAX_LOGITS = 1000
    main(sys.argv[1:])
