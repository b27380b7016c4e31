"""Shell completion: the script is sound, and answers Tab as the command line would want."""

import shutil
import subprocess

import pytest

from lightning_tta.cli.commands import COMMANDS
from lightning_tta.cli.main import main
from lightning_tta.methods import available_methods

pytest.importorskip("shtab", reason="shell completion needs the extra 'completion'")
LIGHTNING = {"fit", "validate", "test", "predict"}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Each shell's script, as the command prints it."""
    folder = tmp_path_factory.mktemp("scripts")
    with pytest.MonkeyPatch.context() as patch:
        for shell in ("bash", "zsh"):
            printed = []
            patch.setattr("builtins.print", lambda text, printed=printed: printed.append(text))
            main(["--print_completion", shell])
            (folder / shell).write_text(*printed)
    return folder


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_shell_can_read_it(scripts, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    checked = subprocess.run([shell, "-n", scripts / shell], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert not checked.stderr


def completed(scripts, *words):
    """What bash offers for the last of these words."""
    if shutil.which("bash") is None:
        pytest.skip("there is no bash here")
    program = f"""
        source {scripts / "bash"}
        [[ "$(complete -p lightning-tta)" == *"-F _shtab_lightning_tta "* ]] || exit 1
        compopt() {{ :; }}  # only a terminal has options of a completion under way
        COMP_WORDS=(lightning-tta "$@"); COMP_CWORD=$#
        _shtab_lightning_tta
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    run = subprocess.run(["bash", "-c", program, "bash", *words], capture_output=True, text=True, cwd=scripts)
    assert run.returncode == 0, run.stderr
    assert not run.stderr
    return set(run.stdout.split())


def test_commands(scripts):
    assert completed(scripts, "") == {*LIGHTNING, *COMMANDS}
    assert completed(scripts, "s") == {"stream", "streams"}
    assert completed(scripts, "--") >= {"--help", "--version", "--print_completion"}


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["predict", "--model.method", "z"], {"zero", "zerosiam", "zsh"}),  # names, and the files of the folder
        (["predict", "--model.method.help", "z"], {"zero", "zerosiam"}),
        (["predict", "--model.method", "tent", "--model.method.lr_b"], {"--model.method.lr_batch_size"}),
        (["predict", "--input.on_bad_batch", ""], {"raise", "skip"}),
        (["predict", "--data.stream", "c"], {"continual", "correlated"}),
        (["predict", "--data", "D"], {"DigitsData", "DomainFolderData"}),
        (["fit", "--model", "S"], {"SourceClassifier"}),
        (["fit", "--data.train_b"], {"--data.train_batch_size"}),
        (["fit", "--config", "b"], {"bash"}),
        (["fit", "--config", "bash", "--trainer.max_e"], {"--trainer.max_epochs"}),
        (["stream", "--data.sev"], {"--data.severity"}),
        (["benchmark", "--sa"], {"--save_every"}),
        (["report", "--allow_different", ""], {"true", "false"}),
        (["export", "--out"], {"--output"}),
    ],
)
def test_options_and_their_values(scripts, words, offered):
    assert completed(scripts, *words) == offered


def test_every_method_is_offered(scripts):
    assert completed(scripts, "predict", "--model.method.help", "") == set(available_methods())


def test_predict_has_no_options_of_training(scripts):
    assert completed(scripts, "predict", "--model.optim") == set()
    assert completed(scripts, "fit", "--model.optim")


def test_another_shell_and_a_missing_package(monkeypatch, capsys):
    for args, words in ((["fish"], ["fish", "bash", "zsh"]), ([], ["nothing"])):
        with pytest.raises(SystemExit) as caught:
            main(["--print_completion", *args])
        assert caught.value.code == 2
        message = capsys.readouterr().err
        assert all(word in message for word in words)
    monkeypatch.setitem(__import__("sys").modules, "shtab", None)
    with pytest.raises(SystemExit):
        main(["--print_completion", "bash"])
    assert "lightning-tta[completion]" in capsys.readouterr().err
