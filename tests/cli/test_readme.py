"""The README's commands exist: what it tells to type is parsed, and its targets are in the Makefile."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from invrecon.errors import InputError
from tests.cli.tiny import ROOT


def commands(first: str) -> list[str]:
    """Lines of the README's bash blocks that begin with a word, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return sorted({line for line in lines if re.match(rf"{first}\b", line)})


def check(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Parses a command line as far as to print its configuration."""
    from invrecon.cli import main

    with pytest.raises(SystemExit) as end:
        main([*arguments, "--print_config"])
    assert end.value.code in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize("line", commands("invrecon (fit|validate|test|predict)"))
def test_commands(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = check(shlex.split(line)[1:], capsys)
    assert text.startswith("# lightning") and "class_path" in text


@pytest.mark.parametrize("line", commands("invrecon import-weights"))
def test_commands_that_import(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from invrecon.cli import main

    monkeypatch.chdir(tmp_path)  # understood as far as to ask for the file, which is not here
    with pytest.raises(InputError, match=shlex.split(line)[2]):
        main(shlex.split(line)[1:])


@pytest.mark.parametrize("line", commands("invrecon tune"))
def test_commands_that_tune(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from invrecon.cli import main

    monkeypatch.chdir(tmp_path)  # understood as far as to ask for the scan, which is not here
    with pytest.raises(InputError, match=r"validation\.h5"):
        main(shlex.split(line)[1:])
    assert not any(tmp_path.rglob("trials.csv"))


@pytest.mark.parametrize("line", commands("(torchrun|srun)"))
def test_commands_of_clusters(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line)
    check(words[words.index("invrecon") + 1 :], capsys)


@pytest.mark.parametrize("line", commands("make"))
def test_targets(line: str) -> None:
    assert re.search(rf"^{shlex.split(line)[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_files_that_it_links_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert links and all((ROOT / link).exists() for link in links)
