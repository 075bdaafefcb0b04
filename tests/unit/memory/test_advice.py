"""What is proposed where a run does not fit, and that it fits then."""

from dataclasses import replace

import pytest
import transformers as hf
from hift_testing.selection import slow

from hift_ds.memory import advice
from hift_ds.memory.advice import _changes, advise, room_for_activations
from hift_ds.memory.planner import Planner
from hift_ds.memory.request import RESERVE_BYTES, Request
from hift_ds.recipes.planning import complete_config
from hift_ds.state import unit_state as state

SEQ = 64
# Gathers so little at a time that stage 3 pays off even here.
FRUGAL = {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
          "stage3_param_persistence_threshold": 0}  # fmt: skip


@pytest.fixture(scope="module")
def planner():
    return Planner(
        hf.LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def request_of(micro=1, world=1, stage=0, attention="sdpa", precision="bf16", checkpointing=False, **hift):
    config = {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": stage, **FRUGAL}}
    config["hift"] = {"enabled": True, **hift}
    config = complete_config(config, precision, None, micro, world)
    return Request(config, SEQ, attention, checkpointing, gpus=world)


def need(planner, request):
    return planner.forecast(request).worst.peak + RESERVE_BYTES


def advice_for(planner, request, gpu=None, host=None):
    """The changes in the words of the config, after checks that hold for every advice."""
    request = replace(request, gpu_memory=gpu, host_memory=host)
    forecast = planner.forecast(request)
    assert forecast.fits is False
    advice = advise(planner, forecast)
    if advice.forecast is None:
        assert advice.changes == ()
        return [], None
    assert advice.forecast.fits is True
    changed = request
    for change in advice.changes:
        changed = change.apply(changed)
    assert changed == advice.forecast.request, "the plan is that of the changes proposed"
    assert (changed.gpu_memory, changed.host_memory) == (gpu, host)
    return [change.what for change in advice.changes], advice.forecast


@pytest.mark.parametrize("layers_per_block", [1, slow(2), slow(100)])
def test_as_many_layers_keep_their_activations_as_the_card_has_room_for(layers_per_block):
    """Of 6: as many as fit, while one more does not; none on a card that is full, all on one that is large."""
    planner = Planner(hf.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    ))  # fmt: skip
    request = request_of(micro=8, checkpointing=True, layers_per_block=layers_per_block)
    needs = [need(planner, replace(request, keep_layers=kept)) for kept in range(7)]
    found = set()
    for card in (needs[0], (needs[3] + needs[4]) // 2, needs[5], 2 * needs[6]):
        kept, peak = room_for_activations(planner, planner.forecast(replace(request, gpu_memory=card))) or (0, needs[0])
        assert needs[kept] <= card and (kept == 6 or needs[kept + 1] > card)
        assert kept == 0 or peak + RESERVE_BYTES == needs[kept]
        found.add(kept)
    assert len(found) == 4 and 6 in found
    full = replace(request, gpu_memory=needs[0] - 1)
    for asked in (full, replace(request, gpu_memory=None), replace(request, checkpointing=False, gpu_memory=1 << 40)):
        assert room_for_activations(planner, planner.forecast(asked)) is None


def test_a_micro_batch_too_large_is_halved_into_more_micro_steps(planner):
    limit = need(planner, request_of(micro=4)) + 200_000  # what accumulation in fp32 takes more
    assert limit < need(planner, replace(request_of(micro=8), checkpointing=True))
    whats, forecast = advice_for(planner, request_of(micro=8), gpu=limit)
    assert whats == ["micro batch 4 and as many more micro steps"]
    assert (forecast.request.config.micro_batch, forecast.request.config.micro_steps) == (4, 2)


def test_of_two_changes_that_help_the_cheaper_is_proposed(planner):
    limit = need(planner, replace(request_of(micro=8), checkpointing=True))
    assert limit > need(planner, request_of(micro=4)) + 200_000, "a smaller micro batch would help as well"
    whats, forecast = advice_for(planner, request_of(micro=8), gpu=limit)
    assert whats == ["activation checkpointing"]
    assert forecast.request.checkpointing


def test_eager_attention_gives_way_to_sdpa(planner):
    # Planned by another planner: the models of one share transformers' config.
    fresh = Planner(planner.config.__class__.from_dict(planner.config.to_dict()))
    whats, forecast = advice_for(fresh, request_of(attention="eager"), gpu=need(planner, request_of()))
    assert whats == ["attention by sdpa"]
    assert forecast.request.attn_implementation == "sdpa"


def test_large_blocks_give_way_to_single_layers(planner):
    whats, forecast = advice_for(planner, request_of(layers_per_block=8), gpu=need(planner, request_of()))
    assert whats == ['"layers_per_block": 1']
    assert len(forecast.blocks) == 4


def test_resident_state_gives_way_to_streaming(planner):
    whats, _ = advice_for(planner, request_of(state={"residency": "device"}), gpu=need(planner, request_of()))
    assert whats == ['"residency": "stream" in hift.state']


def test_host_memory_too_small_gives_way_to_split16(planner):
    host = planner.forecast(request_of()).host
    whats, forecast = advice_for(planner, request_of(), host=host * 10 // 12)
    assert whats == ['"master": "split16" in hift.state']
    assert forecast.host == host * 10 // 12, "10 bytes a parameter in the place of 12"


def test_changes_that_only_help_together_are_proposed_together_and_no_others(planner):
    host = planner.forecast(request_of()).host
    whats, forecast = advice_for(planner, request_of(), host=host // 2)
    assert whats == ['"master": "split16" in hift.state', '"moments": "bf16" in hift.state']
    assert forecast.host == host // 2


def test_host_memory_is_that_of_all_ranks_of_a_node(planner):
    host = planner.forecast(request_of(world=4)).host
    whats, forecast = advice_for(planner, request_of(world=4), host=4 * host - 1)
    assert whats == ["ZeRO stage 2"]
    assert forecast.host * 4 < host * 2


def test_card_and_node_must_both_fit_after_the_change(planner):
    request = request_of(layers_per_block=8)
    host = planner.forecast(request).host
    whats, _ = advice_for(planner, request, gpu=need(planner, request_of()), host=host * 11 // 12)
    assert whats == ['"layers_per_block": 1', '"master": "split16" in hift.state']


def test_a_ring_too_large_for_the_card_gives_way_to_the_largest_that_fits(planner, monkeypatch):
    block = max(planner.forecast(request_of()).blocks, key=lambda block: block.host_state).host_state
    monkeypatch.setattr(state, "RING_BYTES", 1)
    monkeypatch.setattr(advice, "RING_SIZES", (1 << 20, 1 << 18, 1 << 17, 1 << 16))
    least = need(planner, request_of(state={"ring_bytes": 1 << 17}))
    whats, forecast = advice_for(planner, request_of(), gpu=least + 1000)
    assert whats == ['"ring_bytes": 131072 in hift.state']
    assert need(planner, request_of()) < least < least + block < forecast.worst.peak + RESERVE_BYTES + 2 * block


def test_only_rings_smaller_than_the_present_one_are_proposed():
    def sizes(request):
        return [int(what.split()[1]) >> 20 for what in names(request) if "ring_bytes" in what]

    assert sizes(request_of()) == [64, 32], "128 MiB where no card is known"
    assert sizes(replace(request_of(), gpu_memory=24 << 30)) == [2048, 1024, 512, 256, 128, 64, 32]
    assert sizes(replace(request_of(state={"ring_bytes": 100 << 20}), gpu_memory=24 << 30)) == [64, 32]
    assert sizes(request_of(state={"residency": "device"})) == []


def test_several_ranks_are_given_stage_2_before_stage_3(planner):
    limit = need(planner, request_of(world=4, stage=2))
    assert need(planner, request_of(world=4, stage=3)) <= limit, "stage 3 would do as well"
    whats, forecast = advice_for(planner, request_of(world=4), gpu=limit)
    assert whats == ["ZeRO stage 2"]
    assert forecast.request.config.stage == 2


def test_stage_3_is_proposed_where_weights_must_go(planner):
    limit = need(planner, request_of(world=4, stage=3, checkpointing=True))
    assert limit < need(planner, request_of(world=4, stage=2, checkpointing=True))
    whats, forecast = advice_for(planner, request_of(world=4, checkpointing=True), gpu=limit)
    assert whats == ["ZeRO stage 3"]
    assert forecast.request.config.stage == 3


def test_where_nothing_helps_nothing_is_proposed(planner):
    assert advice_for(planner, request_of(), gpu=RESERVE_BYTES + 10) == ([], None)
    assert advice_for(planner, request_of(), host=10) == ([], None)


def test_shorter_rows_are_the_last_that_is_proposed(planner):
    request = replace(request_of(checkpointing=True), seq=256)
    limit = need(planner, replace(request, seq=128))
    whats, forecast = advice_for(planner, request, gpu=limit)
    assert whats == ["rows of 128 tokens"]
    assert forecast.request.seq == 128


def names(request):
    return [change.what for change in _changes(request) if change.apply(request) is not None]


def test_what_is_so_already_is_not_proposed():
    request = replace(request_of(world=4, stage=3, checkpointing=True, state={"ring_bytes": 1 << 25}), seq=128)
    assert names(request)[0] == "loss in chunks (--loss chunked)"
    request = replace(request, loss_tile=1 << 20)
    assert names(request) == ['ZeRO stage 3 with "offload_param": {"device": "cpu"}']
    assert names(replace(request, loss_tile=1 << 30))[0] == "--loss_tile 64MiB"
    offloaded = request.changed("zero_optimization", "offload_param", value={"device": "cpu"})
    assert names(offloaded) == []


def test_what_saves_host_memory_is_proposed_only_where_it_is_limited():
    limited = replace(request_of(), host_memory=1)
    assert set(names(limited)) - set(names(request_of())) == {
        '"master": "split16" in hift.state', '"moments": "bf16" in hift.state'
    }  # fmt: skip


def test_one_rank_is_not_given_stages_that_share():
    assert not {"ZeRO stage 2", "ZeRO stage 3"} & set(names(request_of()))
    assert {"ZeRO stage 2", "ZeRO stage 3"} <= set(names(request_of(world=2)))
    assert "ZeRO stage 2" not in names(request_of(world=2, stage=2))


def test_fp32_is_given_bf16_weights_but_no_forms_of_bf16():
    request = replace(request_of(precision="fp32"), host_memory=1)
    assert "bf16 weights with fp32 masters" in names(request)
    assert '"master": "split16" in hift.state' not in names(request)


def test_micro_batches_are_halved_down_to_one_row():
    micro = [what for what in names(request_of(micro=8)) if what.startswith("micro batch")]
    assert [what.split()[2] for what in micro] == ["4", "2", "1"]
    assert not [what for what in names(request_of()) if what.startswith("micro batch")]


def test_an_uneven_micro_batch_loses_no_row():
    for change in _changes(request_of(micro=6)):
        changed = change.apply(request_of(micro=6))
        if changed is not None:
            assert changed.config.micro_batch * changed.config.micro_steps == 6


def test_a_change_leaves_the_request_that_it_changes_alone():
    request = request_of(world=2, layers_per_block=2)
    before = repr(request)
    for change in _changes(request):
        change.apply(request)
    assert repr(request) == before


def test_proposals_know_what_the_config_calls_things():
    """Changes are found by what they change in the config, not by what they are called."""
    request = replace(request_of(micro=2, world=2, layers_per_block=2), host_memory=1)
    changed = {c.what: c.apply(request) for c in _changes(request)}
    assert changed['"layers_per_block": 1'].config.hift.layers_per_block == 1
    assert changed["ZeRO stage 2"].config.stage == 2
    assert changed['"master": "split16" in hift.state'].config.hift.state.master == "split16"
    assert changed['"moments": "bf16" in hift.state'].config.hift.state.moments == "bf16"
    assert changed['"ring_bytes": 33554432 in hift.state'].config.hift.state.ring_bytes == 33554432
    offload = changed['ZeRO stage 3 with "offload_param": {"device": "cpu"}'].ds_config["zero_optimization"]
    assert (offload["stage"], offload["offload_param"]) == (3, {"device": "cpu"})
    assert all(change.cost for change in _changes(request))
