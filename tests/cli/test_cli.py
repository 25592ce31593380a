"""The `dhellam` command: recipes parse, mistakes get one line, the demo runs in miniature."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lightning_dhellam import __version__, recipes
from lightning_dhellam.callbacks import AutoSearch
from lightning_dhellam.commands.main import BY_NAME, COMMANDS, main
from lightning_dhellam.engine.inputs import check_length
from lightning_dhellam.models import pipeline_split, preset
from lightning_dhellam.plan import Plan
from lightning_dhellam.plan.file import PlanFile
from lightning_dhellam.plan.placement import Placement


def dhellam(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "lightning_dhellam", *words]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_parses_against_the_real_signatures(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", name, "--print_config"])
    assert exit_.value.code == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    model = parsed["model"]["init_args"]
    config = preset(model["preset"], **(model["overrides"] or {}))
    strategy = parsed["trainer"]["strategy"]["init_args"]
    tensor, stages = strategy["tensor_parallel_size"], strategy["pipeline_parallel_size"]
    config.validate(
        tensor, strategy["expert_parallel_size"], strategy["expert_tensor_parallel_size"]
    )
    assert len(pipeline_split(config, Placement.folded(stages))) == 2 * stages
    assert strategy["plan"] == "auto"
    context = strategy["context_parallel_size"]
    assert parsed["trainer"]["devices"] % (tensor * stages * context) == 0
    check_length(
        parsed["data"]["init_args"]["sequence_length"], config.max_sequence_length, tensor, context
    )


def test_a_misspelt_key_of_a_recipe_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "--config", "llama-tiny-2cpu", "--trainer.strategy.tensor_parallel=2"]
    assert main(words) == 2
    assert "did you mean 'tensor_parallel_size'?" in capsys.readouterr().err


def test_unknown_commands_and_recipes_are_answered_with_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["fitt"]) == 2
    assert f"unknown command 'fitt': use {', '.join(BY_NAME)}" in capsys.readouterr().err
    assert main(["fit", "--config", "llama-tiny-2gpu"]) == 2
    error = capsys.readouterr().err
    assert "neither a file nor a recipe" in error and "did you mean 'llama-tiny-2cpu'" in error
    assert main(["fit", "-c", "llama-tiny-2gpu"]) == 2
    assert "-c llama-tiny-2gpu is neither a file nor a recipe" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert "dhellam COMMAND --help" in said
    assert all(summary in said for command in COMMANDS for _, summary in command.uses)
    assert max(map(len, said.splitlines())) <= 100


@pytest.mark.parametrize("name", BY_NAME)
def test_every_command_of_the_table_answers_help(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(SystemExit):  # argparse ends so
        assert main([name, "--help"]) == 0
    assert re.match(rf"usage: dhellam (\[options\] )?{name}\b", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["demo", "--max_step", "3"], "--max_step 3; did you mean '--max_steps'?"),
        (["demo", "--max_steps", "0"], "--max_steps: '0' must be a whole number of at least 1"),
        (["simulate", "--stage", "2"], "the following arguments are required: --stages"),
        (["plan", "schedule", "--stages=2", "--micro_batches=2", "--out=x"], "mean '--output'?"),
        (["bench", "gemms", "--outptu", "x"], "--outptu x; did you mean '--output'?"),
    ],
)
def test_a_mistake_in_an_option_of_any_command_is_one_line(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: int | str | None = main(words)
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1, error
    assert error.startswith(f"dhellam {words[0]}") and sentence in error


@pytest.mark.parametrize("words", [["-c", "llama-tiny-2cpu"], ["-c=llama-tiny-2cpu"]])
def test_a_recipe_is_found_behind_the_short_option(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *words, "--print_config"])
    assert exit_.value.code == 0
    assert "preset: llama-tiny" in capsys.readouterr().out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dhellam {__version__}\n"


def test_a_mistake_is_one_line_and_no_process_is_started(tmp_path: Path) -> None:
    done = dhellam(tmp_path, "fit", "--config", "llama-tiny-2cpu")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith("dhellam fit: error: ") and "dhellam data prepare" in line
    assert "Traceback" not in done.stderr and "MEMBER" not in done.stderr


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("strategy.plan", "interleavd", r"plan='interleavd' .* did you mean 'interleaved'\?"),
        ("strategy.plan", "nope.json", r"nope\.json cannot be read as a plan file: .*"),
        ("strategy.micro_batch_size", "0", r"micro_batch_size=0 must be .* at least 1"),
        ("strategy.bucket_size", "0", r"bucket_size=0 must be .* at least 1"),
        ("strategy.emulate", "h200-nod", r"emulate='h200-nod' .* did you mean 'h200-node'\?"),
        (
            "callbacks",
            '[{"class_path": "lightning_dhellam.callbacks.ThroughputMonitor",'
            ' "init_args": {"window": 0}}]',
            "window=0 must be at least 1 optimizer step",
        ),
    ],
)
def test_a_bad_argument_of_the_strategy_or_a_callback_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: str,
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "llama-tiny-2cpu", f"--trainer.{option}={value}"]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if not line.startswith("Seed set")]
    assert len(lines) == 1, error
    assert re.fullmatch(f"dhellam fit: error: {sentence}", lines[0])


def test_the_demo_trains_on_real_text_with_two_processes(tmp_path: Path) -> None:
    done = dhellam(tmp_path, "demo", "--max_steps", "12", "--vocab_size", "512")
    assert done.returncode == 0, done.stdout + done.stderr
    loss = re.search(r"loss +(\d\.\d+) -> (\d\.\d+) in 12 steps", done.stdout)
    assert loss, done.stdout
    first, last = map(float, loss.groups())
    assert abs(first - 6.238) < 0.3, "an untrained model guesses: ln(512)"
    assert last < first - 0.3
    assert re.search(r"tokens/s +[\d,]+ ", done.stdout)
    assert "plan        sequential (of auto), tensor parallel 2, data parallel 1" in done.stdout
    files = re.search(r"files +(\S+)", done.stdout)
    assert files and (tmp_path / files[1] / "config.yaml").is_file()


def test_search_needs_a_recipe_and_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", "--rounds", "2"]) == 2
    assert "search needs --config FILE" in capsys.readouterr().err
    file = tmp_path / "notes"
    file.write_text("mine")
    assert main(["search", "-c", "llama-tiny-2cpu", "--output", str(file)]) == 2
    assert f"search: error: --output {file}: {file} is not a folder" in capsys.readouterr().err
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("winner", "file", "said", "code"),
    [
        ("auto", Path("s/plan.json"), "use it with --trainer.strategy.plan s/plan.json", 0),
        (
            "sequential",
            Path("s/plan.json"),
            "use it with --trainer.strategy.plan sequential, or with s/plan.json",
            0,
        ),
        ("auto", None, "", 1),
    ],
)
def test_a_search_says_how_to_use_what_it_found(
    winner: str,
    file: Path | None,
    said: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Done(AutoSearch):
        findings = SimpleNamespace(winner=winner)
        plan_file = file

    trainer = SimpleNamespace(callbacks=[Done()], is_global_zero=True)
    monkeypatch.setattr("lightning_dhellam.commands.fit.run_lightning", lambda *_, **__: trainer)
    assert main(["search", "--config", "llama-tiny-2cpu"]) == code
    printed = capsys.readouterr()
    assert printed.out.strip() == said
    assert ("dhellam search: error" in printed.err) is bool(code)


def test_a_plan_file_is_shown_and_a_bad_one_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan.parse("plan mine: forward toy, backward -\n  0  forward   compute  gemm")
    file = tmp_path / "plan.json"
    PlanFile({("made-for", ""): plan}, {"made-for": "toy forward"}).save(file)
    assert main(["plan", "show", str(file)]) == 0
    assert capsys.readouterr().out.strip() == str(plan)
    file.write_text(file.read_text()[:-20])
    assert main(["plan", "show", str(file)]) == 2
    assert str(file) in capsys.readouterr().err
    for words in (["--help"], ["show", "--help"]):
        assert main(["plan", *words]) == 0
        assert "usage: dhellam plan show FILE" in capsys.readouterr().out
    assert main(["plan", "shown"]) == 2
    assert "dhellam plan show FILE" in capsys.readouterr().err
