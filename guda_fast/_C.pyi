# The native extension (csrc/bindings). Pointers are integers, strides count elements.
from collections.abc import Sequence

def add_noise(
    out: int,
    out_strides: Sequence[int],
    x0: int,
    x0_strides: Sequence[int],
    shape: Sequence[int],
    queries: int,
    rows: int,
    query_index: int,
    query_id: int,
    timestep: int,
    sample: int,
    x0_scale: int,
    eps_scale: int,
    seed: int,
    antithetic: bool,
    threads: int,
) -> None: ...
def denoising_error(
    errors: int,
    paired: int,
    predictions: int,
    prediction_strides: Sequence[int],
    dtype: str,
    models: int,
    x0: int,
    x0_strides: Sequence[int],
    shape: Sequence[int],
    queries: int,
    rows: int,
    query_index: int,
    query_id: int,
    timestep: int,
    sample: int,
    x0_scale: int,
    eps_scale: int,
    weight: int,
    seed: int,
    antithetic: bool,
    threads: int,
) -> None: ...
def group_norm_silu(
    out: int,
    out_strides: Sequence[int],
    x: int,
    x_strides: Sequence[int],
    dtype: str,
    rows: int,
    positions: int,
    channels: int,
    groups: int,
    weight: int,
    bias: int,
    models: int,
    model_index: int,
    addend: int,
    addend_stride: int,
    scale: int,
    scale_stride: int,
    shift: int,
    shift_stride: int,
    eps: float,
    silu: bool,
    threads: int,
) -> None: ...
def noise_words(
    out: int, blocks: int, first_block: int, query_id: int, timestep: int, sample: int, seed: int
) -> None: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def set_instruction_set(name: str) -> None: ...
def build_config() -> dict[str, str | bool | list[str]]: ...
def cuda_status() -> dict[str, str | bool | int]: ...
