"""The pages themselves: links, names, languages of blocks, the size of the README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_dhellam import recipes
from lightning_dhellam.models import PRESETS
from lightning_dhellam.plan import BUILDERS
from lightning_dhellam.precision import PRECISIONS
from tests.docs.pages import GUIDES, PAGES, README, ROOT, fences, name

GUIDE = ROOT / "docs/guides"
LANGUAGES = {"sh", "python", "text", "yaml"}


def rows(page: Path, heading: str) -> list[list[str]]:
    """The cells of the table below a heading of its first row."""
    table = page.read_text().split(heading)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table]


def test_the_readme_is_a_first_page() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 140
    assert len(re.findall(r"^!\[", text, re.MULTILINE)) == 1


def test_every_row_of_numbers_says_what_it_rests_on() -> None:
    numbers = rows(README, "| | against |")
    assert len(numbers) == 8
    for what, against, speed, same in numbers:
        assert "GPU" in what and re.search(r"20\d\d-\d\d-\d\d", what), what
        assert re.search("Attention: (flash-attn 4|cuDNN)", what), what
        assert against and re.search(r"\*\*\d\.\d\d×\*\*", speed)
        assert re.search("loss|bitwise equal", same), same


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks/README.md"], ids=name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    """Sphinx sees to the links between guides; these are also read where they lie."""
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).is_file(), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_says_its_language(page: Path) -> None:
    text = page.read_text()
    directives = len(re.findall(r"^```\{", text, re.MULTILINE))
    known = [fence for fence in fences(page) if fence["language"] in LANGUAGES]
    assert text.count("\n```") == 2 * (len(known) + directives)


def test_every_guide_is_in_the_table_of_contents() -> None:
    index = (ROOT / "docs/index.md").read_text() + (ROOT / "docs/reference/index.md").read_text()
    listed = re.findall(r"^[\w/-]+$", index, re.MULTILINE)
    stems = {Path(entry).name for entry in listed}
    assert {page.stem for page in GUIDES} - stems == {"index"} - stems


def test_every_name_that_the_pages_mention_exists() -> None:
    text = "".join(page.read_text() for page in (README, *GUIDES))
    plans = [cells[0].strip("`") for cells in rows(GUIDE / "plans.md", "| `DHellamStrategy(plan=")]
    assert sorted(plans) == sorted([*BUILDERS, "auto"])
    precisions = [
        cells[0].strip("`") for cells in rows(GUIDE / "training.md", "| `Trainer(precision=")
    ]
    assert sorted(precisions) == sorted(PRECISIONS)
    assert set(re.findall(r'preset\("([\w.-]+)"', text)) <= set(PRESETS)
    assert set(re.findall(r"`([a-z][\w.]*-[\w.-]+-\d(?:gpu|cpu))`", text)) == set(recipes.names())


def test_a_cluster_that_a_guide_shows_is_read(tmp_path: Path) -> None:
    from lightning_dhellam.parallel import Cluster

    shown = [
        fence["text"] for fence in fences(GUIDE / "emulation.md") if fence["language"] == "yaml"
    ]
    assert shown
    for number, text in enumerate(shown):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        assert Cluster.load(file).links


def test_a_manifest_that_a_guide_shows_starts_what_there_is() -> None:
    import yaml
    from torch.distributed.run import get_args_parser

    (shown,) = [
        fence["text"] for fence in fences(GUIDE / "clusters.md") if fence["language"] == "yaml"
    ]
    service, job = yaml.safe_load_all(shown)
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert "/dev/shm" in mounts.values()
    assert container["command"] == ["torchrun"]
    options = get_args_parser().parse_args(container["args"])
    assert int(options.nnodes.partition(":")[2]) == spec["completions"] == spec["parallelism"]
    assert options.nproc_per_node == str(container["resources"]["limits"]["nvidia.com/gpu"])
    host = options.rdzv_endpoint.partition(":")[0]
    assert host == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert options.max_restarts > 0 and options.rdzv_id not in ("", "none")
    assert options.module and options.training_script == "lightning_dhellam"
    command, *words = options.training_script_args
    given = dict(word.removeprefix("--").split("=") for word in words)
    assert command == "fit"
    assert given["config"] in recipes.names()
    assert all(
        path.startswith(mounts["volume"]) for name, path in given.items() if name != "config"
    )
