"""`rollout.sglang.layout`: when servers are sent full tensors, with which reason, and what is refused."""

from __future__ import annotations

import pytest

from opo_megatron.config.rules.weight_layout import why_full
from opo_megatron.errors import UserError
from tests.support.fixtures import BLOCKWISE, small_config
from tests.support.slice_cases import FAMILIES, TP2, model_overrides

SGLANG, SLICES = "rollout.engine=sglang", "rollout.sglang.layout=slices"
ENGINE_TP2 = "rollout.sglang.tensor_parallel_size=2"
MODEL = model_overrides(FAMILIES["llama"])
OPTION = "rollout.sglang.options"

NOT_CUT = [
    (("rollout.sglang.transport=disk",), "rollout.sglang.transport=disk sends full tensors alone"),
    (("rollout.sglang.transport=distributed",), "rollout.sglang.transport=distributed sends full tensors"),
    ((f"{OPTION}.quantization=fp8",), f"{OPTION}.quantization may change which tensors a server holds"),
    ((f"{OPTION}.enable-dp-attention=true",), f"{OPTION}.enable_dp_attention may change which tensors"),
    ((f"{OPTION}.moe_runner_backend=cutlass",), f"{OPTION}.moe_runner_backend may change which tensors"),
    (("rollout.sglang.tensor_parallel_size=3", *TP2.split(",")), "neither is a multiple of the other"),
    (("rollout.sglang.tensor_parallel_size=8",), "num_query_groups=2 cannot be cut by 8 ranks"),
    ((ENGINE_TP2, "policy.model.num_query_groups=1"), "policy.model.num_query_groups=1 cannot be cut by 2"),
    ((ENGINE_TP2, "policy.model.ffn_hidden_size=96"), "policy.model.ffn_hidden_size=96 cannot be cut by 2"),
    (("policy.model.ffn_hidden_size=80",), "=80 cannot be cut by 1 ranks of a server into multiples of 32"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "reason"), NOT_CUT)
def test_slices_that_are_not_possible_are_refused_with_the_reason_of_auto(
    overrides: tuple[str, ...], reason: str
) -> None:
    settings = (*MODEL, SGLANG, "policy.device=cpu", *overrides)
    found = why_full(small_config(*settings, world_size=2), on_cpu=True)
    assert found is not None and reason in found
    with pytest.raises(UserError) as error:
        small_config(*settings, SLICES, world_size=2)
    assert str(error.value) == (
        f"rollout.sglang.layout=slices, but {found}; change that, or set rollout.sglang.layout=auto, which "
        "sends full tensors then"
    )


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (ENGINE_TP2,),
        TP2.split(","),
        (f"{OPTION}.mem_fraction_static=0.5", f"{OPTION}.log-level=info"),
        (f"{OPTION}.quantization=null", f"{OPTION}.enable_dp_attention=false"),
        ("rollout.sglang.urls=[http://localhost:1]",),
    ],
)
def test_slices_are_possible_otherwise(overrides: tuple[str, ...]) -> None:
    config = small_config(*MODEL, SGLANG, SLICES, *overrides, world_size=2)
    assert why_full(config, on_cpu=True) is None


def test_slices_for_servers_that_already_run_must_be_asked_for() -> None:
    urls = "rollout.sglang.urls=[http://localhost:1]"
    reason = why_full(small_config(*MODEL, SGLANG, urls), on_cpu=True)
    assert reason == "the servers of rollout.sglang.urls may hold other tensors than this recipe's would"


@pytest.mark.parametrize(
    ("ranks", "ffn", "fits"),
    [(1, 512, True), (2, 512, True), (4, 512, True), (4, 384, False), (2, 384, False)],
)
def test_blocks_of_fp8_are_not_cut(ranks: int, ffn: int, fits: bool) -> None:
    """Parts of 512 over 2 and 4 ranks are whole blocks of 128, those of 384 are not."""
    engine = f"rollout.sglang.tensor_parallel_size={ranks}"
    config = small_config(*BLOCKWISE, SGLANG, engine, f"policy.model.ffn_hidden_size={ffn}")
    assert (why_full(config, on_cpu=False) is None) == fits


@pytest.mark.parametrize(
    ("ranks", "experts", "fits"), [(2, 2, True), (4, 2, True), (2, 4, False), (4, 3, False)]
)
def test_experts_over_ranks_divide_both(ranks: int, experts: int, fits: bool) -> None:
    config = small_config(
        *model_overrides(FAMILIES["qwen3_moe"]), SGLANG, f"{OPTION}.ep_size={experts}",
        f"rollout.sglang.tensor_parallel_size={ranks}",
    )  # fmt: skip
    assert (why_full(config, on_cpu=False) is None) == fits
