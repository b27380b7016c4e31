"""The load test at a small size: nothing is lost, each request has its own answer, also over a kill."""

import pytest

import serving

pytestmark = pytest.mark.usefixtures("one_thread")


def test_load_and_kill(capsys):
    sizes = ["--requests=96", "--clients=16", "--idle=3", "--pixels=16", "--snapshot-every=2", "--max-wait-ms=1"]
    results = serving.main(["--net=tiny", "--method=tent", *sizes])
    killed = results["kill"]
    assert killed["requests"] == killed["answered"] == killed["ids"] == killed["right"] == 96
    assert killed["gone on from micro-batch"] >= 2
    for name in ("bare net", "shadow, no monitors", "shadow", "shadow, when_behind=wait", "the method answers"):
        assert results[name]["answered"] == 96
        assert 0 < results[name]["p50"] <= results[name]["p99"]
        assert results[name]["error"] < (1e-5 if name != "the method answers" else 1)
    assert results["the method answers"]["error"] > 1e-5
    assert results["shadow, when_behind=wait"]["skipped"] == 0
    assert set(results["monitors collapse"]) == {"source", "method", "monitors"}
    assert capsys.readouterr().out.count("\n|") == 4 + 5 + 3
