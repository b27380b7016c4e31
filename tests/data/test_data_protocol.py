import dataclasses
import json

import pytest

from lightning_tta.data import DigitsData, Protocol
from lightning_tta.data.streams import OPTIONS
from lightning_tta.errors import ConfigError, DataError

PARTS = {"reset": "domain", "predict": "method", "weights": "test_resnet", "weights_digest": "abc"}
DESCRIPTION = {
    "data": "digits",
    "data_digest": "0123",
    "split": "test",
    "domains": ["haze", "clean"],
    "images": 20,
    "images_per_domain": [10, 10],
    "function_set": "builtin-1",
    "severity": 3,
    "corruption_seed": 0,
    "stream": "iid",
    "order_seed": 0,
    "batch_size": 64,
}


def protocol(**changes):
    preprocessing = {"mean": [0.485, 0.456, 0.406], "std": (1.0, 1, 1), "size": 32}
    return Protocol.from_parts(DESCRIPTION, **{**PARTS, "preprocessing": preprocessing, **changes})


def test_hash_is_pinned():
    assert protocol().hash == "b125cd48aded"


def test_every_field_is_in_the_hash():
    other = {
        **{"data": "x", "data_digest": "x", "split": "val", "domains": ["clean", "haze"], "images": 21},
        **{"images_per_domain": [11, 10], "function_set": None, "severity": 4, "corruption_seed": 1},
        **{"stream": "mixed", "order_seed": 1, "batch_size": 1, "reset": "never", "predict": "after"},
        **{"weights": "x", "weights_digest": None, "preprocessing": {}},
        **{"world_size": 2, "mode": "replicas", "dirichlet": 0.1, "charge": "passes", "interval": 1.0},
        **{"visits": 2, "class_correlation": 0.5, "domain_correlation": 0.5, "class_imbalance": 2.0},
        **{"domain_imbalance": 2.0, "pollution": 0.5, "polluters": "uniform"},
        **{"pollution_first": True, "subset_seed": 1},
    }
    base = protocol()
    assert set(other) == {field.name for field in dataclasses.fields(Protocol)}
    for name, value in other.items():
        changes = {"world_size": 2, "mode": "replicas"} if name in ("world_size", "mode") else {name: value}
        changed = dataclasses.replace(base, **changes)
        assert changed.hash != base.hash, name
        assert any(line.startswith(f"{name}: ") for line in base.diff(changed))


def test_round_trip_through_json():
    one = protocol()
    text = json.dumps(one.to_dict())
    assert Protocol.from_dict(json.loads(text)) == one
    assert json.loads(text)["hash"] == one.hash
    assert one.diff(Protocol.from_dict(json.loads(text))) == []


def test_the_same_numbers_written_in_another_way_have_the_same_hash():
    same = protocol(preprocessing={"size": 32.0, "std": [1, 1, 1.0], "mean": (0.4850000143, 0.456, 0.406)})
    assert same.hash == protocol().hash  # 0.4850000143: 0.485 in single precision
    assert protocol(preprocessing={"size": 33}).hash != protocol(preprocessing={"size": 32}).hash


def test_a_changed_file_is_noticed():
    values = protocol().to_dict()
    with pytest.raises(DataError, match="changed after it was written"):
        Protocol.from_dict({**values, "severity": 1})
    with pytest.raises(DataError, match="missing severity, unknown level"):
        Protocol.from_dict({("level" if name == "severity" else name): value for name, value in values.items()})
    values.pop("hash")
    with pytest.raises(DataError, match="None"):
        Protocol.from_dict(values)


def test_diff_is_readable():
    assert protocol().diff(protocol(reset="never")) == ["reset: 'domain' != 'never'"]


def test_wrong_values():
    for changes in (
        {"reset": "always"},
        {"predict": "before"},
        {"mode": "ddp"},
        {"world_size": 0},
        {"world_size": 2},
        {"mode": "replicas"},
        {"preprocessing": {"mean": float("nan")}},
        {"preprocessing": {"net": object()}},
    ):
        with pytest.raises(ConfigError):
            protocol(**changes)
    with pytest.raises(ConfigError, match="colour"):
        Protocol.from_parts({**DESCRIPTION, "colour": "blue"}, **PARTS)
    assert Protocol.from_parts({"data": "mine"}, **PARTS).domains == ()


def test_data_modules_describe_themselves_completely():
    data = DigitsData(domains=["clean"], num_images=4)
    assert set(data.describe()) == {*DESCRIPTION, "charge", "interval", "subset_seed", *OPTIONS}
    one, other = (
        Protocol.from_parts(DigitsData(domains=["clean"], num_images=4, order_seed=s).describe(), **PARTS)
        for s in (0, 1)
    )
    assert one.diff(other) == ["order_seed: 0 != 1"]
