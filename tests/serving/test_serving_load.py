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


def test_who_answers(capsys):
    """Of a net that knows nothing no method is better; the answers are then those of the source."""
    small = ["--net=tiny", "--images=24", "--together=8", "--methods", "tent", "--corruptions", "gamma"]
    (found,) = serving.main(small).values()
    assert [len(found[who]) for who in ("source", "method alone", "answers")] == [4, 4, 4]
    assert found["answers"] == found["source"]
    assert (found["method answered"], found["switched"]) == (0, [])
    soon = '{"patience": 1, "min_images": 1, "margin": 0, "leave": 1}'
    always = {"a": 0.9}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_tta.serving.shadow._estimates", lambda monitors: always)
        (found,) = serving.main([*small, "--policy", soon]).values()
    assert found["switched"] == ["method from 8"]
    assert found["answers"][1:] == found["method alone"][1:] != found["source"][1:]
    assert "| gamma, tent |" in capsys.readouterr().out
