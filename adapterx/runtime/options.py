"""A second SessionOptions like the host's: several sessions need one each, and the host's own is never changed."""

from __future__ import annotations

from typing import Final

from adapterx.errors import OptionError
from adapterx.runtime.inference import ort, quiet_options

_ATTRIBUTES: Final = (
    "enable_cpu_mem_arena",
    "enable_mem_pattern",
    "enable_mem_reuse",
    "execution_mode",
    "execution_order",
    "graph_optimization_level",
    "inter_op_num_threads",
    "intra_op_num_threads",
    "log_severity_level",
    "log_verbosity_level",
    "logid",
    "use_deterministic_compute",
    "use_per_session_threads",
)
# ONNX Runtime tells no one which entries are set, so each that matters to a running session is asked for by name.
_ENTRIES: Final = (
    "ep.context_enable",
    "ep.context_file_path",
    "mlas.qnbit.force_fp32",
    "mlas.use_lut_gemm",
    "optimization.constant_folding_max_output_size_in_bytes",
    "optimization.disable_specified_optimizers",
    "optimization.enable_cast_chain_elimination",
    "optimization.enable_gelu_approximation",
    "session.disable_aot_function_inlining",
    "session.disable_cpu_ep_fallback",
    "session.disable_double_qdq_remover",
    "session.disable_prepacking",
    "session.disable_qdq_constant_folding",
    "session.disable_quant_qdq",
    "session.dynamic_block_base",
    "session.enable_dq_matmulnbits_fusion",
    "session.enable_quant_qdq_cleanup",
    "session.force_spinning_stop",
    "session.graph_optimizations_loop_level",
    "session.inter_op.allow_spinning",
    "session.intra_op.allow_spinning",
    "session.intra_op_thread_affinities",
    "session.model_external_initializers_file_folder_path",
    "session.qdq_matmulnbits_accuracy_level",
    "session.qdqisint8allowed",
    "session.set_denormal_as_zero",
    "session.strict_shape_type_inference",
    "session.use_device_allocator_for_initializers",
    "session.use_env_allocators",
)


def entry(options: ort.SessionOptions | None, key: str) -> str | None:
    """A config entry, or ``None`` where it is not set."""
    try:
        return None if options is None else str(options.get_session_config_entry(key))
    except RuntimeError:
        return None


def copied(options: ort.SessionOptions | None) -> ort.SessionOptions:
    """New options with the settings of ``options``; quiet default ones for ``None``.

    What ONNX Runtime does not let anyone read back stays behind: custom operator libraries, free dimensions,
    initializers, and where a profile or an optimized model is to be written (several sessions would overwrite it).

    Raises:
        OptionError: providers were added to the options, which cannot be read back either.

    Example:
        >>> host = ort.SessionOptions()
        >>> host.intra_op_num_threads = 3
        >>> copied(host).intra_op_num_threads
        3
    """
    if options is None:
        return quiet_options()
    if getattr(options, "has_providers", lambda: False)():
        raise OptionError("providers inside session_options cannot be passed on to further sessions; use providers=")
    copy = ort.SessionOptions()
    for name in _ATTRIBUTES:
        if hasattr(options, name):
            setattr(copy, name, getattr(options, name))
    for key in _ENTRIES:
        value = entry(options, key)
        if value is not None:
            copy.add_session_config_entry(key, value)
    return copy
