"""The "hift" section: what is taken, and what is refused in which words."""

import re

import pytest

from hift_ds.config.keys import HiFTConfig, StateConfig


def read(**section):
    return HiFTConfig.from_ds_config({"hift": {"enabled": True, **section}})


def test_enabled_alone_gives_the_documented_defaults():
    config = HiFTConfig.from_ds_config({"train_batch_size": 8, "hift": {"enabled": True}})
    assert config == HiFTConfig(
        enabled=True, layers_per_block=1, order="bottom2up", seed=42, steps_per_block=1, lr_update="cycle",
        inactive_state="keep", blocks=None, frozen=None, always_active=("fresh",), kernel=None,
        state=StateConfig(master="fp32", moments="fp32", residency="stream", ring_bytes=None, pin_memory=True),
    )  # fmt: skip


def test_no_section_is_no_config():
    assert HiFTConfig.from_ds_config({"train_batch_size": 8}) is None


@pytest.mark.parametrize("key", ["HiFT", "Hift", "HIFT"])
def test_a_section_in_other_letters_is_not_overlooked(key):
    with pytest.raises(ValueError, match=f'^{key}: unknown key; write it "hift"'):
        HiFTConfig.from_ds_config({key: {"enabled": True}})


def test_enabled_false_is_no_config_but_the_rest_is_checked():
    assert HiFTConfig.from_ds_config({"hift": {"enabled": False, "order": "random"}}) is None
    with pytest.raises(ValueError, match=r"hift\.order='up'"):
        HiFTConfig.from_ds_config({"hift": {"enabled": False, "order": "up"}})


GOOD = {
    "layers_per_block": [(1, 1), (7, 7), (None, None)],
    "seq_len": [(512, 512), (None, None)],
    "order": [("bottom2up", "bottom2up"), ("top2down", "top2down"), ("random", "random")],
    "seed": [(0, 0), (2**31, 2**31)],
    "steps_per_block": [(1, 1), (50, 50)],
    "lr_update": [("cycle", "cycle"), ("paper", "paper"), ("step", "step")],
    "update": [("step", "step"), ("backward", "backward")],
    "accumulate": [("device", "device"), ("host", "host")],
    "clip": [("global", "global"), ("unit", "unit")],
    "inactive_state": [("keep", "keep"), ("reset", "reset")],
    "blocks": [(None, None), ([["a"], ["b", "c"]], (("a",), ("b", "c")))],
    "frozen": [(None, None), (["embed"], ("embed",)), ([], None)],
    "always_active": [(None, ("fresh",)), ("fresh", ("fresh",)), ([], ()), (["norm", "fresh"], ("norm", "fresh"))],
    "kernel": [(None, None), ("torch", "torch"), ("triton", "triton")],
    "no_gradient": [("error", "error"), ("skip", "skip")],
    "not_finite": [("skip", "skip"), ("stop", "stop")],
    "asynchronous_save": [(True, True), (False, False)],
    "state": [
        (None, StateConfig()), ({}, StateConfig()),
        *(({"master": m}, StateConfig(master=m)) for m in ("fp32", "split16", "none")),
        *(({"moments": m}, StateConfig(moments=m)) for m in ("fp32", "bf16", "int8")),
        *(({"residency": r}, StateConfig(residency=r)) for r in ("stream", "device")),
        ({"ring_bytes": 1 << 20, "pin_memory": False}, StateConfig(ring_bytes=1 << 20, pin_memory=False)),
        ({"ring_bytes": None, "pin_memory": None}, StateConfig()),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("key", "given", "read_as"), [(k, *pair) for k, pairs in GOOD.items() for pair in pairs])
def test_a_good_value_is_taken(key, given, read_as):
    assert getattr(read(**{key: given}), key) == read_as


def test_every_key_has_cases_here():
    keys = set(HiFTConfig.__dataclass_fields__) - {"enabled"}
    assert keys == set(GOOD)
    assert keys <= {key for key, *_ in BAD}


# key, value, exception, what the message must say beside the key and the value
BAD = [
    ("enabled", "true", TypeError, "true or false"),
    ("enabled", 1, TypeError, "true or false"),
    ("enabled", None, TypeError, "true or false"),
    ("layers_per_block", "2", TypeError, "whole number, 1 or more"),
    ("layers_per_block", 2.0, TypeError, "whole number, 1 or more"),
    ("layers_per_block", True, TypeError, "whole number, 1 or more"),
    ("layers_per_block", 0, ValueError, "1 or more"),
    ("layers_per_block", -1, ValueError, "1 or more"),
    ("seq_len", "512", TypeError, "whole number, 1 or more"),
    ("seq_len", 0, ValueError, "1 or more"),
    ("order", "B2U", ValueError, "'bottom2up', 'top2down', 'random'"),
    ("order", "bottom2top", ValueError, "did you mean 'bottom2up'?"),
    ("order", 1, ValueError, "'bottom2up', 'top2down', 'random'"),
    ("order", None, ValueError, "'bottom2up', 'top2down', 'random'"),
    ("order", "auto", ValueError, "'bottom2up', 'top2down', 'random'"),
    ("seed", "42", TypeError, "whole number"),
    ("seed", 1.5, TypeError, "whole number"),
    ("seed", False, TypeError, "whole number"),
    ("seed", -1, ValueError, "0 or more"),
    ("steps_per_block", None, TypeError, "whole number, 1 or more"),
    ("steps_per_block", 1.0, TypeError, "whole number, 1 or more"),
    ("steps_per_block", 0, ValueError, "1 or more"),
    ("lr_update", "cycles", ValueError, "did you mean 'cycle'?"),
    ("lr_update", ["cycle"], ValueError, "'cycle', 'paper', 'step'"),
    ("update", "backwards", ValueError, "did you mean 'backward'"),
    ("update", True, ValueError, "'step', 'backward'"),
    ("accumulate", "cpu", ValueError, "'device', 'host'"),
    ("clip", "layer", ValueError, "'global', 'unit'"),
    ("inactive_state", "drop", ValueError, "'keep', 'reset'"),
    ("inactive_state", True, ValueError, "'keep', 'reset'"),
    ("blocks", "layers", TypeError, "null or a list of blocks"),
    ("blocks", ["layers"], TypeError, "null or a list of blocks"),
    ("blocks", [["a"], [3]], TypeError, "null or a list of blocks"),
    ("blocks", [], ValueError, "an empty list holds no parameter"),
    ("blocks", [["a"], []], ValueError, "an empty list holds no parameter"),
    ("frozen", "embed", TypeError, "null or a list of regexes"),
    ("frozen", [1], TypeError, "null or a list of regexes"),
    ("frozen", {"embed": True}, TypeError, "null or a list of regexes"),
    ("always_active", "norm", TypeError, "null, 'fresh' or a list of regexes"),
    ("kernel", "cuda", ValueError, "'torch'"),
    ("kernel", "auto", ValueError, "'triton', 'torch'"),
    ("kernel", 1, ValueError, "'torch'"),
    ("no_gradient", "pass", ValueError, "'error', 'skip'"),
    ("no_gradient", None, ValueError, "'error', 'skip'"),
    ("not_finite", "error", ValueError, "'skip', 'stop'"),
    ("asynchronous_save", "yes", TypeError, "true or false"),
    ("state", "split16", TypeError, "null or an object"),
    ("state", ["split16"], TypeError, "null or an object"),
]
BAD_STATE = [
    ("master", "bf16", ValueError, "'fp32', 'split16', 'none'"),
    ("moments", "fp16", ValueError, "'fp32', 'bf16', 'int8'"),
    ("residency", "host", ValueError, "'stream', 'device'"),
    ("ring_bytes", "64MiB", TypeError, "whole number"),
    ("ring_bytes", 0, ValueError, "1 or more"),
    ("pin_memory", 1, TypeError, "true or false"),
    ("moment", "bf16", ValueError, "did you mean 'moments'?"),
]


@pytest.mark.parametrize(("key", "value", "exception", "allowed"), BAD_STATE)
def test_a_bad_value_of_state_is_named_with_what_is_allowed(key, value, exception, allowed):
    with pytest.raises(exception, match=re.escape(f"hift.state.{key}={value!r}: ")) as caught:
        read(state={key: value})
    assert type(caught.value) is exception
    assert allowed in str(caught.value)


def test_every_key_of_state_has_cases_here():
    assert set(StateConfig.__dataclass_fields__) <= {key for key, *_ in BAD_STATE}


def test_a_ring_for_state_that_does_not_stream_is_refused():
    with pytest.raises(ValueError, match=r"hift\.state\.ring_bytes=64: nothing streams with residency 'device'"):
        read(state={"residency": "device", "ring_bytes": 64})


@pytest.mark.parametrize(("key", "value", "exception", "allowed"), BAD)
def test_a_bad_value_is_named_with_what_is_allowed(key, value, exception, allowed):
    with pytest.raises(exception) as caught:
        HiFTConfig.from_ds_config({"hift": {"enabled": True, key: value}})
    message = str(caught.value)
    assert type(caught.value) is exception
    assert message.startswith(f"hift.{key}"), message
    assert repr(value) in message or repr(value[-1]) in message, message
    assert allowed in message, message


def test_a_bad_block_is_named_by_its_position():
    with pytest.raises(TypeError, match=re.escape("hift.blocks[1]='b'")):
        read(blocks=[["a"], "b"])


@pytest.mark.parametrize(
    ("key", "meant"),
    [("layer_per_block", "layers_per_block"), ("oder", "order"), ("Enabled", "enabled"), ("lr_updates", "lr_update")],
)
def test_an_unknown_key_gets_a_suggestion(key, meant):
    with pytest.raises(ValueError, match="unknown key") as caught:
        read(**{key: 3})
    assert str(caught.value).startswith(f"hift.{key}=3: ")
    assert f"did you mean {meant!r}?" in str(caught.value)
    assert all(name in str(caught.value) for name in HiFTConfig.__dataclass_fields__)


def test_an_unknown_key_that_resembles_none_lists_what_is_allowed():
    with pytest.raises(ValueError, match="allowed are enabled, layers_per_block") as caught:
        read(zzz=1)
    assert "did you mean" not in str(caught.value)


def test_a_section_without_enabled_says_what_to_write():
    with pytest.raises(ValueError, match=re.escape('hift.enabled: missing; write "hift": {"enabled": true}')):
        HiFTConfig.from_ds_config({"hift": {"order": "random"}})


@pytest.mark.parametrize("section", [True, "on", ["enabled"]])
def test_a_section_that_is_no_object_is_a_type_error(section):
    with pytest.raises(TypeError, match=r"^hift=.*must be an object") as caught:
        HiFTConfig.from_ds_config({"hift": section})
    assert repr(section) in str(caught.value)


def test_layers_per_block_beside_explicit_blocks_is_refused():
    with pytest.raises(ValueError, match=r"hift\.layers_per_block=2: must be 1 or left out beside hift\.blocks"):
        read(blocks=[["a"]], layers_per_block=2)
    assert read(blocks=[["a"]], layers_per_block=1).blocks == (("a",),)


def test_the_section_and_the_config_are_left_as_they_are():
    section = {"enabled": True, "frozen": ["embed"], "blocks": None}
    ds_config = {"hift": section}
    HiFTConfig.from_ds_config(ds_config)
    assert ds_config == {"hift": {"enabled": True, "frozen": ["embed"], "blocks": None}}
