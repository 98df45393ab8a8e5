"""Many GPUs: FSDP2 (`fully_shard`), block by block, over all ranks or within replicated groups (HSDP)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fusedlm.models import DecoderModel
from fusedlm.training.collectives import DirectAllGather, DirectReduceScatter, nccl_options, shared_memory
from fusedlm.training.config import ParallelConfig
from fusedlm.training.ranks import Ranks


def shard(model: DecoderModel, parallel: ParallelConfig, ranks: Ranks) -> None:
    """Divide a model's parameters among the ranks, in place; one rank keeps them whole.

    Every block is gathered before its forward and its backward pass, the next one meanwhile. A model on "meta" has its
    parts there too, until `fill`. Raises ValueError where the ranks cannot be divided into so many replicas.
    """
    if ranks.size == 1:
        if parallel.replicas > 1:
            raise ValueError(f"parallel.replicas is {parallel.replicas} and there is one process; expected torchrun")
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if ranks.size % parallel.replicas:
        raise ValueError(f"parallel.replicas is {parallel.replicas}; expected a divisor of {ranks.size} processes")
    kind = ranks.device.type
    direct = parallel.direct and parallel.replicas == 1 and ranks.one_host
    reaching = direct and kind == "cuda" and _reach_each_other(ranks)
    if parallel.replicas > 1:
        sizes = (parallel.replicas, ranks.size // parallel.replicas)
        mesh = init_device_mesh(kind, sizes, mesh_dim_names=("replicate", "shard"))
    else:
        override: Any = {"shard": ("nccl", nccl_options())} if reaching else None
        mesh = init_device_mesh(kind, (ranks.size,), mesh_dim_names=("shard",), backend_override=override)
    memory = shared_memory(mesh.get_group(), ranks) if reaching else None
    direct = direct and (memory is not None or kind == "cpu")
    # Sums of what was exchanged are in fp32, whatever travels.
    widened = parallel.reduce_dtype == "fp32" and not direct
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if widened else None)
    options = {"mesh": mesh, "mp_policy": policy}
    last = len(model.blocks) - 1
    for number, block in enumerate(model.blocks):
        # The backward pass begins with the last block: let go, it would be gathered again at once, with nothing to do
        # meanwhile.
        reshard = parallel.reshard_after_forward and number < last
        fully_shard(block, reshard_after_forward=reshard, **options)  # type: ignore[call-overload]
    # What is outside of blocks is needed first and last: it stays.
    fully_shard(model, reshard_after_forward=False, **options)  # type: ignore[call-overload]
    # The one method that training calls. Of two inside each other the order of backward's gathering comes out wrong.
    register_fsdp_forward_method(model, "loss")
    if direct:
        blocks: list[Any] = list(model.blocks)
        whole: Any = model
        reduce_scatter = DirectReduceScatter(memory)
        for module in (*blocks, whole):
            module.set_custom_reduce_scatter(reduce_scatter)
        if memory is not None:
            all_gather = DirectAllGather(memory, 2)  # one block is gathered while the one before it is copied
            for block in blocks:
                block.set_custom_all_gather(all_gather)
            whole.set_custom_all_gather(DirectAllGather(memory, 1))


def _reach_each_other(ranks: Ranks) -> bool:
    """Whether the GPUs of this host can all write to each other's memory, and NCCL can. All ranks say the same."""
    here = ranks.device.index
    others = (number for number in range(torch.cuda.device_count()) if number != here)
    reached = all(torch.cuda.can_device_access_peer(here, other) for other in others)
    return not ranks.any(not (reached and hasattr(dist.ProcessGroupNCCL, "NCCL_CTA_POLICY_ZERO")))


def let_go(model: nn.Module) -> None:
    """After a forward pass that no backward pass follows: what stays for that one is divided again.

    Until then parameters are whole, which a save would take for the shards of every rank.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def fill(model: nn.Module, whole: nn.Module | None, ranks: Ranks) -> None:
    """Give a model that was divided on "meta" its parts on the ranks' devices, with the values of a whole one.

    whole: the same model, of the first rank; the others have None. They never hold more of it than one parameter.
    Every rank must call it.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    model.to_empty(device=ranks.device)
    values: dict[str, Any] = {} if whole is None else {name: p.detach() for name, p in whole.named_parameters()}
    set_model_state_dict(model, values, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


@torch.no_grad()
def gathered(model: nn.Module, ranks: Ranks) -> dict[str, torch.Tensor]:
    """All parameters whole, on the first rank's host, by name; nothing on the others. Every rank must call it."""
    found = {}
    for name, p in model.named_parameters():
        whole = p.full_tensor() if hasattr(p, "full_tensor") else p
        if ranks.first:
            found[name] = whole.detach().to("cpu", copy=True)
    return found
