"""The optimizer, and what is done to gradients and weights around its step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tsae.config import OptimizerConfig
from tsae.parallel.sharding import FEATURE_DIM, local, split
from tsae.sae.model import SparseAutoencoder
from tsae_kernels.row_adam import AdamState


def threshold_parameters(sae: SparseAutoencoder) -> list[torch.nn.Parameter]:
    """The learned thresholds: none, ``log_threshold``, or it and ``release_logit``."""
    trained = sae.parameter_dict()
    return [trained[name] for name in ("log_threshold", "release_logit") if name in trained]


def build_optimizer(sae: SparseAutoencoder, cfg: OptimizerConfig, *, capturable: bool = False) -> torch.optim.Optimizer:
    """Fused Adam or AdamW over the parameters of the autoencoder. Learned thresholds and decays have no weight decay:
    they are logarithms and logits, for which 0 is not a neutral value. ``capturable``: for a
    CUDA graph, with learning rates on the device.
    """
    kind = torch.optim.AdamW if cfg.name == "adamw" else torch.optim.Adam
    extra: dict[str, Any] = {"weight_decay": cfg.weight_decay} if cfg.name == "adamw" else {}
    parameters: Any = list(sae.parameters())
    names = ("log_threshold", "release_logit", "decay_logit")
    learned = [parameter for name, parameter in sae.parameter_dict().items() if name in names]
    if learned and extra:
        others = [p for p in parameters if all(p is not q for q in learned)]
        parameters = [{"params": others}, {"params": learned, "weight_decay": 0.0}]
    optimizer = kind(parameters, lr=cfg.lr, betas=cfg.betas, fused=True, capturable=capturable, **extra)
    if capturable:
        keep_rates_on_device(optimizer)
    return optimizer


def keep_rates_on_device(optimizer: torch.optim.Optimizer) -> None:
    """Make every learning rate a scalar tensor beside its parameters, and the optimizer capturable."""
    for group in optimizer.param_groups:
        device = group["params"][0].device
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32).to(device)
        group["capturable"] = True


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float | Tensor) -> None:
    """Set the learning rate of all parameters."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()``, the same whether or not the step is captured in a CUDA graph."""
    state = optimizer.state_dict()
    plain = {"lr": lambda rate: float(rate), "capturable": lambda _: False}
    groups = [
        {key: plain[key](value) if key in plain else value for key, value in group.items()}
        for group in state["param_groups"]
    ]
    return state | {"param_groups": groups}


def adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor, *, transposed: bool) -> AdamState:
    """The state of a matrix, as PyTorch's Adam makes it and a checkpoint holds it.

    transposed: of ``parameter.T``, which has contiguous rows
    """
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    for name in ("exp_avg", "exp_avg_sq"):
        if state[name].stride() != parameter.stride():  # a checkpoint may have another order of memory
            state[name] = torch.empty_like(parameter).copy_(state[name]).detach()
    first, second = (state[name].T if transposed else state[name] for name in ("exp_avg", "exp_avg_sq"))
    return AdamState(first, second, state["step"])


@torch.no_grad()
def add_l0_lagrangian_gradient(sae: SparseAutoencoder, l0_gradients: Sequence[Tensor]) -> None:
    """Add the L0 penalty's gradient to the learned thresholds, with the multiplier that keeps their common scale.

    While a controller holds the mean L0, the loss does not determine the common factor of the thresholds, and the
    weight of the L0 penalty is not free: it is the Lagrange multiplier ``lambda >= 0`` with

        sum_j (dL / dlog theta_j + lambda dL0 / dlog theta_j) = 0

    the marginal value of one more active feature. A threshold falls if its feature is worth more than that, and rises
    if it is worth less.

    l0_gradients: dL0 / dp for each of `threshold_parameters`, whose ``grad`` holds dL / dp
    """
    parameters, features = threshold_parameters(sae), sae.ranks.features
    loss, count = parameters[0].grad, features.sum_no_grad(local(l0_gradients[0]).sum())
    if loss is None:
        return
    price = torch.where(count < 0, -features.sum_no_grad(local(loss).sum()) / count.clamp(max=-1e-30), 0.0).clamp(
        min=0.0
    )
    for parameter, gradient in zip(parameters, l0_gradients, strict=True):
        if parameter.grad is not None:
            local(parameter.grad).add_(price * local(gradient))


@torch.no_grad()
def add_gradient_noise(sae: SparseAutoencoder, std: float, generator: torch.Generator) -> None:
    """Add N(0, (std * RMS of that parameter's gradient)^2) to every gradient (Neelakantan et al. 2015).

    ``std`` is relative: `tsae.training.schedules.noise_std`. With a sharded dictionary every process draws
    the noise of all features and uses its shard.
    """
    features = sae.ranks.features
    for name, parameter in sae.parameter_dict().items():
        if parameter.grad is None:
            continue
        grad = local(parameter.grad)
        noise = torch.randn(parameter.grad.shape, generator=generator, device=generator.device)
        mean_square = grad.square().mean()
        if name in FEATURE_DIM:
            noise = split(noise, FEATURE_DIM[name], features)
            mean_square = features.sum_no_grad(mean_square) / features.size
        grad.add_(noise.to(grad) * mean_square.sqrt(), alpha=std)


@torch.no_grad()
def clip_gradients(sae: SparseAutoencoder, limit: float) -> Tensor:
    """Scale all gradients so that their global norm is at most ``limit``; returns the norm before, a scalar."""
    if sae.ranks.features.size == 1:
        return torch.nn.utils.clip_grad_norm_(list(sae.parameters()), limit)
    gradients = {name: local(p.grad) for name, p in sae.parameter_dict().items() if p.grad is not None}
    squares = {name: gradient.square().sum() for name, gradient in gradients.items()}
    parts = torch.stack([square for name, square in squares.items() if name in FEATURE_DIM])
    common = [square for name, square in squares.items() if name not in FEATURE_DIM]
    norm = (sae.ranks.features.sum_no_grad(parts.sum()) + sum(common)).sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients.values():
        gradient.mul_(factor)
    return norm


@torch.no_grad()
def project_decoder_gradient(sae: SparseAutoencoder) -> None:
    """Remove from the gradient of each decoder row its component along the row (TC-SAE section 4, unit norm)."""
    grad = sae.parameter_dict()["W_dec"].grad
    if grad is not None:
        grad, W_dec = local(grad), sae.W_dec
        square = torch.linalg.vecdot(W_dec, W_dec).clamp_(min=1e-24)
        share = torch.linalg.vecdot(grad, W_dec) / square
        grad.addcmul_(W_dec, share[:, None], value=-1)


@torch.no_grad()
def renormalize_decoder(sae: SparseAutoencoder) -> None:
    """Scale each decoder row to norm 1."""
    W_dec = sae.W_dec
    W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True).clamp_(min=1e-12))
