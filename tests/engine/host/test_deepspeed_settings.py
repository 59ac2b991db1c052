"""A user's DeepSpeed file: what is taken, what our own options decide, and what is mistyped."""

import json

import pytest

from bsnas.engine.host.deepspeed_settings import (
    OWN_OPTIONS,
    Settings,
    check_deepspeed_settings,
    load_deepspeed_settings,
)
from bsnas.engine.host.errors import UserError
from tests import ROOT


def test_a_users_file(tmp_path):
    assert load_deepspeed_settings(None) == {}
    good, bad, listing = tmp_path / "good.json", tmp_path / "bad.json", tmp_path / "list.json"
    good.write_text(json.dumps({"gradient_clipping": 2}))
    bad.write_text("{")
    listing.write_text("[1]")
    assert load_deepspeed_settings(good) == {"gradient_clipping": 2}
    for file in (bad, tmp_path / "missing.json"):
        with pytest.raises(UserError, match=f"DeepSpeed configuration {file} cannot be read: .*give a JSON file"):
            load_deepspeed_settings(file)
    with pytest.raises(UserError, match="holds no JSON object"):
        load_deepspeed_settings(listing)
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps({"fp16": {"enabled": True}}))
    with pytest.raises(UserError, match=r"wrong.json: fp16 is decided by --precision fp16 or bf16; remove it"):
        load_deepspeed_settings(wrong)


@pytest.mark.parametrize("key", OWN_OPTIONS)
def test_what_an_own_option_decides_is_refused_with_it(key):
    with pytest.raises(UserError, match=f"file: {key} is decided by .*; remove it from the DeepSpeed file"):
        check_deepspeed_settings({key: {}}, "file")


@pytest.mark.parametrize("key", ["gradient_cliping", "activation_checkpointing", ""])
def test_a_key_without_effect_is_refused_with_those_that_have_one(key):
    with pytest.raises(UserError, match=f"'{key}' is no key that has an effect here; allowed are comms_logger, comm"):
        check_deepspeed_settings({"comms_logger": {}, key: 1}, "file")


@pytest.mark.parametrize("zero", [2, {"stage": 1}, {"stage": 0, "round_robin": True}, "all", {}])
def test_zero_stages_are_refused(zero):
    with pytest.raises(UserError, match="allowed is stage 0 alone, because higher stages move weights of operations"):
        check_deepspeed_settings({"zero_optimization": zero}, "file")


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"gradient_clipping": "much"}, "gradient_clipping: Input should be a valid number"),
        ({"gradient_clipping": -1}, "gradient_clipping: Input should be greater than or equal to 0"),
        ({"comms_logger": {"enable": True}}, "comms_logger.enable: Extra inputs are not permitted"),
        ({"comms_logger": True}, "comms_logger: Input should be a valid dictionary"),
        ({"timers": {}}, "timers.throughput: Field required"),
        ({"communication_data_type": "int8"}, "communication_data_type: Input should be 'fp32', 'fp16' or 'bf16'"),
        ({"steps_per_print": 0}, "steps_per_print: Input should be greater than 0"),
    ],
)
def test_values_of_another_type_are_refused(settings, place):
    with pytest.raises(UserError, match=rf"file: {place}.* \(it is .*\); mend it in the DeepSpeed file"):
        check_deepspeed_settings(settings, "file")


def test_the_readme_lists_the_keys_that_are_taken():
    text = (ROOT / "README.md").read_text()
    assert not [key for key in Settings.model_fields if f"`{key}`" not in text]
