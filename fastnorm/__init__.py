"""fastnorm: batch, layer, group, instance and RMS normalization on NumPy arrays, fused, forward and backward."""

from fastnorm._config import show_config
from fastnorm._dispatch import BackendInfo, BackendUnavailableError, backends, use_backend
from fastnorm._memory import OutputPool, clear_output_pool, output_pool, set_output_pool
from fastnorm._plan import Plan, plan
from fastnorm._threads import get_num_threads, set_num_threads
from fastnorm.ops.alt import (
    batchnorm_backward_alt,
    groupnorm_backward_alt,
    instancenorm_backward_alt,
    layernorm_backward_alt,
    rmsnorm_backward_alt,
)
from fastnorm.ops.averages import ExponentialMovingAverage
from fastnorm.ops.batchnorm import (
    batchnorm_backward,
    batchnorm_backward_apply,
    batchnorm_backward_reduce,
    batchnorm_forward,
    spatial_batchnorm_backward,
    spatial_batchnorm_forward,
)
from fastnorm.ops.dropout import dropout_backward, dropout_forward
from fastnorm.ops.groupnorm import (
    groupnorm_backward,
    groupnorm_forward,
    spatial_groupnorm_backward,
    spatial_groupnorm_forward,
)
from fastnorm.ops.instancenorm import instancenorm_backward, instancenorm_forward
from fastnorm.ops.layernorm import layernorm_backward, layernorm_forward
from fastnorm.ops.rmsnorm import rmsnorm_backward, rmsnorm_forward
from fastnorm.ops.staged import (
    batchnorm_backward_staged,
    batchnorm_forward_staged,
    groupnorm_backward_staged,
    groupnorm_forward_staged,
    instancenorm_backward_staged,
    instancenorm_forward_staged,
    layernorm_backward_staged,
    layernorm_forward_staged,
    rmsnorm_backward_staged,
    rmsnorm_forward_staged,
)
from fastnorm.ops.statistics import Moments, moments, normalize, stream_moments

__version__ = "0.1.0"

__all__ = [
    "BackendInfo",
    "BackendUnavailableError",
    "ExponentialMovingAverage",
    "Moments",
    "OutputPool",
    "Plan",
    "backends",
    "batchnorm_backward",
    "batchnorm_backward_alt",
    "batchnorm_backward_apply",
    "batchnorm_backward_reduce",
    "batchnorm_backward_staged",
    "batchnorm_forward",
    "batchnorm_forward_staged",
    "clear_output_pool",
    "dropout_backward",
    "dropout_forward",
    "get_num_threads",
    "groupnorm_backward",
    "groupnorm_backward_alt",
    "groupnorm_backward_staged",
    "groupnorm_forward",
    "groupnorm_forward_staged",
    "instancenorm_backward",
    "instancenorm_backward_alt",
    "instancenorm_backward_staged",
    "instancenorm_forward",
    "instancenorm_forward_staged",
    "layernorm_backward",
    "layernorm_backward_alt",
    "layernorm_backward_staged",
    "layernorm_forward",
    "layernorm_forward_staged",
    "moments",
    "normalize",
    "output_pool",
    "plan",
    "rmsnorm_backward",
    "rmsnorm_backward_alt",
    "rmsnorm_backward_staged",
    "rmsnorm_forward",
    "rmsnorm_forward_staged",
    "set_num_threads",
    "set_output_pool",
    "show_config",
    "spatial_batchnorm_backward",
    "spatial_batchnorm_forward",
    "spatial_groupnorm_backward",
    "spatial_groupnorm_forward",
    "stream_moments",
    "use_backend",
]
