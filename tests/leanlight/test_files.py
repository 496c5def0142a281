"""Files that are whole, known by their digests, or absent."""

import os
import stat

from leanlight.contracts import atomic_path, atomic_write, is_damaged, note_digest, sha256_file, sweep_parts


def test_the_folder_is_flushed_after_the_rename(tmp_path, monkeypatch):
    seen = []
    flush, rename = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (seen.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"), flush(fd))
    )
    monkeypatch.setattr(os, "replace", lambda *paths: (seen.append("rename"), rename(*paths)))
    atomic_write(tmp_path / "a", "text")
    assert seen == ["file", "rename", "folder"]


def test_a_file_is_known_before_and_after_it_is_replaced_and_no_other_content_is(tmp_path):
    target = tmp_path / "a"
    for content in (b"one", b"two", b"three"):
        with atomic_path(target) as part:
            part.write_bytes(content)
            note_digest(target, sha256_file(part))
            assert not target.exists() or not is_damaged(target), "a crash at this moment"
        assert not is_damaged(target)
    target.write_bytes(b"thrEe")
    assert is_damaged(target)
    (tmp_path / "unknown").write_bytes(b"thrEe")
    assert not is_damaged(tmp_path / "unknown")


def test_notes_do_not_grow_with_the_number_of_files_that_came_and_went(tmp_path):
    sizes = []
    for number in range(30):
        path = tmp_path / f"step-{number:03}"
        note_digest(path, "0" * 64)
        path.touch()
        (tmp_path / f"step-{number - 1:03}").unlink(missing_ok=True)
        note_digest(tmp_path / "last", f"{number:064}")
        (tmp_path / "last").touch()
        sizes.append((tmp_path / "sha256.json").stat().st_size)
    assert len(set(sizes[10:])) == 1


def test_what_killed_writers_left_is_swept_and_nothing_else(tmp_path):
    (tmp_path / "deep").mkdir()
    swept = [tmp_path / ".last.ckpt.123.part", tmp_path / "deep" / ".summary.json.4.part"]
    kept = [tmp_path / "a.part", tmp_path / ".parts", tmp_path / "deep" / ".notes.part", tmp_path / "last.ckpt"]
    for path in swept + kept:
        path.touch()
    sweep_parts(tmp_path)
    assert not any(path.exists() for path in swept)
    assert all(path.exists() for path in kept)
