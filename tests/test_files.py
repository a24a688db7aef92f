import os
import stat

import pytest

from mprec.files import check_room, write_whole


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_the_file_is_what_was_written_with_the_users_permissions(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    file = write_whole(tmp_path / "a.bin", lambda stream: stream.write(b"one"))
    assert write_whole(file, lambda stream: stream.write(b"two")) == file
    assert file.read_bytes() == b"two"
    assert mode(file) == mode(tmp_path / "plain")


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = write_whole(tmp_path / "a.bin", lambda stream: stream.write(b"old"))

    def half(stream):
        stream.write(b"ne")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_whole(file, half)
    monkeypatch.setattr("os.replace", lambda a, b: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(file, lambda stream: stream.write(b"new"))
    assert file.read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["a.bin"]


def test_the_bytes_and_the_rename_are_made_durable(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr("os.fsync", lambda fd: synced.append(stat.S_ISDIR(os.fstat(fd).st_mode)) or real(fd))
    write_whole(tmp_path / "a.bin", lambda stream: stream.write(b"x"))
    assert synced == [False, True]


def test_devices_pipes_and_folders_are_left_alone(tmp_path):
    """As root, a rename would put a file in their place."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for name, error in (("pipe", "a device or a pipe"), ("link", "a device or a pipe"), (".", "a folder")):
        for ask in (check_room, lambda file: write_whole(file, lambda stream: stream.write(b"x"))):
            with pytest.raises(OSError, match=error):
                ask(tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert (tmp_path / "link").is_symlink()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "pipe"]
