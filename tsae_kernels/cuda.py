"""The compiled CUDA backend: the operators of csrc/cuda/ops.cpp."""

from tsae_kernels.compiled import CompiledBackend

_backend = CompiledBackend("tsae_kernels_cuda")

activate_with_stats = _backend.activate_with_stats
temporal_stats = _backend.temporal_stats
activate_with_stats_backward = _backend.activate_with_stats_backward
step_energy = _backend.step_energy
step_energy_backward = _backend.step_energy_backward
