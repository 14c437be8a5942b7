"""How many blocks of a kernel fit on one multiprocessor, and what stops the next one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Per multiprocessor: CUDA C++ Programming Guide, "Technical Specifications"."""

    shared_bytes: int
    reserved_shared_bytes: int = 1024  # by the system, in each block
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32
    tensor_memory_columns: int = 512  # of sm_100; Blackwell tuning guide


LIMITS = {
    "sm_75": Limits(64 * 1024, reserved_shared_bytes=0, threads=1024, blocks=16),
    "sm_80": Limits(shared_bytes=164 * 1024),
    "sm_86": Limits(shared_bytes=100 * 1024, threads=1536, blocks=16),
    "sm_90": Limits(shared_bytes=228 * 1024),
    "sm_100": Limits(shared_bytes=228 * 1024),
}
_SCHEDULERS = 4
_REGISTER_UNIT = 256  # registers are given to warps in these

_GFX942_SIMDS = 4
_GFX942_LDS_BYTES = 64 * 1024


def blocks_per_sm(
    target: str, registers: int, shared_bytes: int, threads: int, tensor_memory_columns: int = 0
) -> tuple[int, str]:
    """Resident blocks and the resource that limits them; (0, "shared_bytes") cannot be launched."""
    limits = LIMITS[target]
    warps = -(-threads // 32)
    registers_of_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    warps_by_registers = limits.registers // _SCHEDULERS // registers_of_warp * _SCHEDULERS
    by_resource = {
        "registers": warps_by_registers // warps,
        "shared_bytes": limits.shared_bytes // max(shared_bytes + limits.reserved_shared_bytes, 1),
        "threads": limits.threads // threads,
        "blocks": limits.blocks,
    }
    if tensor_memory_columns:
        columns = limits.tensor_memory_columns // tensor_memory_columns
        by_resource["tensor_memory_columns"] = columns
    limit = min(by_resource, key=lambda resource: by_resource[resource])
    return by_resource[limit], limit


def blocks_per_cu(waves_per_simd: int, lds_bytes: int, warps: int) -> tuple[int, str]:
    """The same of gfx942, whose compiler says how many wavefronts the registers allow."""
    by_resource = {"registers": waves_per_simd * _GFX942_SIMDS // warps}
    if lds_bytes:
        by_resource["shared_bytes"] = _GFX942_LDS_BYTES // lds_bytes
    limit = min(by_resource, key=lambda resource: by_resource[resource])
    return by_resource[limit], limit
