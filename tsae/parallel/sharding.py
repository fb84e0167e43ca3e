"""A dictionary sharded over processes: each holds a range of features, columns of the encoder and rows of the decoder.

Parameters are DTensors over the `features` dimension of the mesh, so the optimizer state is sharded with them.
Computations use the local shards and reduce over the ranks with `Axis`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tsae.parallel.axis import Axis, Ranks
from tsae.sae.model import SparseAutoencoder

FEATURE_DIM = {
    "W_enc": 1,
    "b_enc": 0,
    "W_dec": 0,
    "log_threshold": 0,
    "release_logit": 0,
    "decay_logit": 0,
    "threshold": 0,
    "release": 0,
    "decay": 0,
    "rates": 1,
}
"""The feature dimension of each sharded parameter and buffer; the others are replicated."""


def local(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor, in the same memory; any other tensor unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def split(tensor: Tensor, dim: int, axis: Axis) -> Tensor:
    """The shard of ``tensor`` along ``dim`` of this rank, with the same memory order; a copy if there are several."""
    if axis.size == 1:
        return tensor
    first, last = axis.shard_bounds(tensor.shape[dim])
    return tensor.narrow(dim, first, last - first).clone()


def whole(part: Tensor, dim: int, axis: Axis) -> Tensor | None:
    """The inverse of `split`: the full tensor on the first rank of the axis, on the CPU; None on the others.

    Gathered on the CPU, so that no device has to hold it.
    """
    if axis.size == 1:
        return part
    source = part.detach().movedim(dim, 0).to("cpu").contiguous()
    parts = [torch.empty_like(source) for _ in range(axis.size)] if axis.rank == 0 else None
    dist.gather(source, parts, group=axis.group, group_dst=0)
    return None if parts is None else torch.cat(parts).movedim(0, dim)


class ShardedAutoencoder(SparseAutoencoder):
    """The features of an autoencoder in training that this rank holds.

    The attributes of `SparseAutoencoder` are the local shards, ``W_enc`` (d_in, d_sae / size); `parameter_dict` gives
    the parameters, DTensors of the full shape. Only the methods that training calls work.

    Args:
        autoencoder: the full one, on the CPU; not changed.
        ranks: position of this process; ``ranks.features.size`` divides ``d_sae``.
        device: device of the shards.
    """

    def __init__(self, autoencoder: SparseAutoencoder, ranks: Ranks, device: torch.device) -> None:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        nn.Module.__init__(self)
        self.cfg, self.ranks = autoencoder.cfg, ranks
        mesh = ranks.mesh["features"]
        self.shards = nn.ParameterDict()
        for name, tensor in autoencoder.named_parameters():
            dim = FEATURE_DIM.get(name)
            part = tensor.detach() if dim is None else split(tensor.detach(), dim, ranks.features)
            placement = Replicate() if dim is None else Shard(dim)
            self.shards[name] = nn.Parameter(DTensor.from_local(part.to(device), mesh, [placement], run_check=False))
        for name, buffer in autoencoder.named_buffers():
            dim = FEATURE_DIM.get(name)
            part = buffer.clone() if dim is None else split(buffer, dim, ranks.features)
            self.register_buffer(name, part.to(device))

    def parameter_dict(self) -> dict[str, nn.Parameter]:
        """The parameters, DTensors of the full shape, under the names that `SparseAutoencoder` uses."""
        return dict(self.shards.items())

    def _part(self, name: str) -> Any:
        return self.shards[name].to_local() if name in self.shards else None

    W_enc = property(lambda self: self._part("W_enc"))
    b_enc = property(lambda self: self._part("b_enc"))
    W_dec = property(lambda self: self._part("W_dec"))
    b_dec = property(lambda self: self._part("b_dec"))
    log_threshold = property(lambda self: self._part("log_threshold"))
    release_logit = property(lambda self: self._part("release_logit"))
    decay_logit = property(lambda self: self._part("decay_logit"))

    def whole_state(self) -> dict[str, Tensor | None]:
        """`state_dict` of the full autoencoder; its sharded tensors are None except on the first feature rank."""
        parts = {name: local(p) for name, p in self.parameter_dict().items()} | dict(self.named_buffers(recurse=False))
        features = self.ranks.features
        return {
            name: whole(part, FEATURE_DIM[name], features) if name in FEATURE_DIM else part.detach()
            for name, part in parts.items()
        }

    @torch.no_grad()
    def load_whole_state(self, state: dict[str, Tensor]) -> None:
        """Load the shard of this rank from a `whole_state`."""
        parts = {name: local(p) for name, p in self.parameter_dict().items()} | dict(self.named_buffers(recurse=False))
        for name, part in parts.items():
            value = state[name]
            part.copy_(split(value, FEATURE_DIM[name], self.ranks.features) if name in FEATURE_DIM else value)


def whole_optimizer_state(optimizer: torch.optim.Optimizer, sae: ShardedAutoencoder) -> dict[str, Any]:
    """``optimizer.state_dict()`` with full tensors, as `whole` gives them."""
    out = optimizer.state_dict()
    names = _names(optimizer, sae)
    out["state"] = {
        index: {
            key: whole(local(value), FEATURE_DIM[names[index]], sae.ranks.features)
            if hasattr(value, "to_local") and names[index] in FEATURE_DIM
            else local(value)
            for key, value in values.items()
        }
        for index, values in out["state"].items()
    }
    return out


def load_whole_optimizer_state(optimizer: torch.optim.Optimizer, sae: ShardedAutoencoder, state: Any) -> None:
    """Load the shard of this rank from a `whole_optimizer_state`, or the state of an unsharded optimizer."""
    from torch.distributed.tensor import DTensor

    names, parameters = _names(optimizer, sae), sae.parameter_dict()

    def part(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != parameters[name].shape:
            return value
        own = split(value, FEATURE_DIM[name], sae.ranks.features) if name in FEATURE_DIM else value
        p: Any = parameters[name]
        return DTensor.from_local(own.to(local(p).device), p.device_mesh, p.placements, run_check=False)

    values = {
        index: {key: part(names[index], value) for key, value in each.items()} for index, each in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": values})


def _names(optimizer: torch.optim.Optimizer, sae: ShardedAutoencoder) -> list[str]:
    """The names of the parameters of the optimizer, in its order."""
    known = {id(parameter): name for name, parameter in sae.parameter_dict().items()}
    return [known[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
