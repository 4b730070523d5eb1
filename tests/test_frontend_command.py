"""What the frontends share, and the small files of UnlearnCanvas: no model is run here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guda_fast.cli.conditioned import conditioned
from guda_fast.frontends.command import check_writable, run
from guda_fast.frontends.unlearncanvas_files import StyledImage, checkpoint, prompts_of


def test_folders_are_made_and_left_empty(tmp_path: Path) -> None:
    check_writable({"--out": tmp_path / "new/folder/scores.csv"})
    assert (tmp_path / "new/folder").is_dir() and not list((tmp_path / "new/folder").iterdir())


def test_what_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for path, what in ((tmp_path / "file/scores.csv", "File exists"), (tmp_path, "Is a directory")):
        with pytest.raises(OSError, match=f"--out: must be a path that can be written, found {what}: '{path}'"):
            check_writable({"--out": path})

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    # As on a file system that is read-only, also where the tests run as root.
    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    with pytest.raises(PermissionError, match="--out: must be a path that can be written, found Permission denied"):
        check_writable({"--out": tmp_path / "scores.csv"})


def test_an_interrupted_command_does_not_deny_what_it_wrote(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        run("program", interrupted)
    assert capsys.readouterr().err == "program: interrupted; no file was left half written\n"


CAT = StyledImage(Path("Blue_Ink_Cat.png"), "Blue Ink", "Cat")


def prompts(path: Path, *texts: str, encoding: str = "utf-8") -> Path:
    lines = [{"style": "Blue_Ink", "object": "Cat", "prompt": text} for text in texts]
    content = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_bytes(content.encode(encoding))
    return path


def test_two_prompts_for_one_image_are_refused(tmp_path: Path) -> None:
    file = prompts(tmp_path / "prompts.jsonl", "a cat", "a cat")
    assert prompts_of([CAT], file) == ["a cat"]
    file = prompts(tmp_path / "prompts.jsonl", "a cat", "a cat", "a dog")
    with pytest.raises(ValueError, match="line 3: must have the prompt of .*, line 1, .* found 'a dog' and 'a cat'"):
        prompts_of([CAT], file)


@pytest.mark.parametrize("text", ["a\u2028cat", "a\x85cat", "a\x0bcat"])
def test_lines_end_where_json_lines_do(tmp_path: Path, text: str) -> None:
    file = prompts(tmp_path / "prompts.jsonl", text, text, encoding="utf-8-sig")
    assert prompts_of([CAT], file) == [text]


def test_lines_of_conditions_end_there_too(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    name = "a\u2028b.png"
    line = json.dumps({"file_name": name, "prompt": "a"}, ensure_ascii=False)
    (tmp_path / "conditions.jsonl").write_text(line + "\r\n", encoding="utf-8-sig")
    assert conditioned(tmp_path / "images", tmp_path / "conditions.jsonl", tmp_path, None) == {"conditions": []}


def test_a_step_has_one_checkpoint(tmp_path: Path) -> None:
    assert checkpoint(tmp_path, 7) is None
    (tmp_path / "checkpoint-7").mkdir()
    assert checkpoint(tmp_path, 7) == tmp_path / "checkpoint-7"
    (tmp_path / "checkpoint_step_7.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"one checkpoint of step 7, found checkpoint-7 and checkpoint_step_7\.pt"):
        checkpoint(tmp_path, 7)
