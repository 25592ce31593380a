from pathlib import Path

import pytest

from lightning_dhellam.commands.data import data_command


def test_prepare_and_reuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("some words to learn from\n" * 50)
    argv = ["prepare", "--source", str(tmp_path / "a.txt"), "--output", str(tmp_path / "out")]
    argv += ["--vocab-size", "270", "--max_document_tokens=40"]
    assert data_command(argv) == 0
    assert f"{tmp_path}/out: prepared from" in (first := capsys.readouterr().out)
    assert first.rstrip().endswith("vocabulary 270")
    assert data_command(argv) == 0
    assert "already prepared" in capsys.readouterr().out
    argv[argv.index("270")] = "271"
    assert data_command(argv) == 2
    assert "now vocab_size=271. Pass --overwrite" in capsys.readouterr().err
    assert data_command([*argv, "--overwrite"]) == 0
    assert data_command([*argv, "--append-eod", "false", "--overwrite", "true"]) == 0


def test_every_source_that_is_given_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = []
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"some words of {name} to learn from\n" * 50)
        words += [f"--source={tmp_path}/{name}.txt"] if name == "b" else []
        words += [] if name == "b" else ["--source", f"{tmp_path}/{name}.txt"]
    argv = ["prepare", *words, "--output", f"{tmp_path}/out", "--vocab_size=270"]
    assert data_command(argv) == 0
    assert ": 3 documents," in capsys.readouterr().out
    assert data_command(argv) == 0
    assert "already prepared" in capsys.readouterr().out
    assert data_command(argv[2:]) == 2
    assert data_command([argv[0], *argv[3:]]) == 2
    assert "was prepared with source=" in capsys.readouterr().err


def test_an_output_below_a_file_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("some words to learn from\n" * 50)
    assert data_command(["prepare", "--source", str(text), "--output", f"{text}/out"]) == 2
    error = capsys.readouterr().err
    assert f"output={text}/out: {text} is not a folder" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["prepare"], "required: source"),
        (["prepare", "--source", "nowhere", "--output", "x"], "source=nowhere does not exist"),
        (["prepare", "--source", "a", "--output", "b", "--vocab_size", "many"], "many"),
        (["prepare", "--source", "a", "--output", "b", "--workers", "-2"], "workers=-2 is negat"),
        (["prepare", "--wrong", "1"], "--wrong"),
        (
            ["prepare", "--source=a", "--output=b", "--worker=1"],
            "--worker is not known; did you mean '--workers'?",
        ),
        (["prepare", "--source=a", "--output=b", "--workers=x"], "workers=x must be a whole numb"),
        (["prepare", "--source", "x"], "the following arguments are required: output"),
        (["train"], "unknown command 'train'. Use: prepare."),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert data_command(argv) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("dhellam data")
    assert message in output.err
    assert output.err.count("\n") == 1


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert data_command(["--help"]) == 0
    assert "dhellam data prepare --source stdlib" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        data_command(["prepare", "--help"])
    assert stop.value.code == 0
    assert "for the source text" in capsys.readouterr().out


def test_without_a_command_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert data_command([]) == 2
    assert "usage: dhellam data" in capsys.readouterr().out
