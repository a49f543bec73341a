"""Seals: every change of a file is seen, and nothing else."""

import os

from distill_llm.common import seals
from distill_llm.common.seals import broken, differences, seal_of


def test_every_change_is_seen_and_a_copy_or_a_new_time_is_none(tmp_path):
    for name in ("a", "b", "c", "deep/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name} holds this")
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    seal = seal_of(files, tmp_path)
    assert list(seal) == ["a", "b", "c", "deep/d"] and broken(seal, tmp_path) == {}
    os.utime(tmp_path / "a", (1, 1))
    assert broken(seal, tmp_path) == {}
    time = (tmp_path / "b").stat()
    (tmp_path / "b").write_text("b holds that")
    (tmp_path / "b").write_text("b holds thiz")
    os.utime(tmp_path / "b", ns=(time.st_atime_ns, time.st_mtime_ns))
    (tmp_path / "c").unlink()
    (tmp_path / "deep" / "d").write_text("")
    assert broken(seal, tmp_path) == {"b": "changed", "c": "gone", "deep/d": "changed"}
    assert differences(seal, {**seal, "e": seal["a"]}) == {"e": "new"}


def test_a_large_file_is_read_again_only_after_a_sign_of_change(tmp_path, monkeypatch):
    monkeypatch.setattr(seals, "TRUSTED", 3)
    (tmp_path / "large").write_text("1234")
    seal = seal_of([tmp_path / "large"], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(seals.hashlib, "file_digest", None)
        assert broken(seal, tmp_path) == {}
    os.utime(tmp_path / "large", (1, 1))
    assert broken(seal, tmp_path) == {}, "read, and the same"
    (tmp_path / "large").write_text("1235")
    assert broken(seal, tmp_path) == {"large": "changed"}
