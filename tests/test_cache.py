"""The cache of code that is made at run time: private, whole, or not used."""

import os
from pathlib import Path

import pytest

from fasttrain.kernels import cache


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTTRAIN_CACHE_DIR", str(tmp_path / "made" / "cache"))
    return tmp_path / "made" / "cache"


def test_entries_come_back(place: Path) -> None:
    assert cache.get("a") is None
    assert cache.put("a", b"one") == place / "a" == cache.get("a")
    cache.put("a", b"two")
    cache.put("b", b"")
    assert (place / "a").read_bytes()[:-32] == b"two"
    assert cache.get("b") == place / "b"
    assert sorted(path.name for path in place.iterdir()) == ["a", "b"]


def test_only_its_owner_can_use_what_is_made(place: Path) -> None:
    before = os.umask(0)
    try:
        cache.put("a", b"one")
    finally:
        os.umask(before)
    assert [made.stat().st_mode & 0o777 for made in (place.parent, place)] == [0o700, 0o700]
    assert (place / "a").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damaged", [
    lambda whole: whole[:-1], lambda whole: whole[1:], lambda whole: b"", lambda whole: whole + b"x",
    lambda whole: whole[:5] + bytes([whole[5] ^ 1]) + whole[6:], lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
])
def test_a_damaged_entry_is_none(place: Path, damaged) -> None:
    path = cache.put("a", b"some code")
    whole = path.read_bytes()
    path.write_bytes(damaged(whole))
    assert cache.get("a") is None
    assert cache.put("a", b"some code") == cache.get("a")


def test_an_entry_of_another_name_is_none(place: Path) -> None:
    cache.put("a", b"one").rename(place / "b")
    assert cache.get("b") is None


@pytest.mark.parametrize("mode", [0o602, 0o620, 0o666])
def test_an_entry_that_others_can_write_is_none(place: Path, mode: int) -> None:
    path = cache.put("a", b"one")
    path.chmod(mode)
    assert cache.get("a") is None


def test_an_entry_that_leads_elsewhere_is_none(place: Path, tmp_path: Path) -> None:
    path = cache.put("a", b"one")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert cache.get("a") is None
    path.unlink()
    path.mkdir()
    assert cache.get("a") is None


def test_an_entry_of_somebody_else_is_none(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cache.put("a", b"one")
    monkeypatch.setattr(cache, "directory", lambda: place)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    assert cache.get("a") is None


@pytest.mark.parametrize("mode", [0o702, 0o777, 0o770, 0o1777])
def test_a_directory_that_others_can_write_is_refused(place: Path, mode: int) -> None:
    place.mkdir(parents=True)
    place.chmod(mode)
    for use in (lambda: cache.get("a"), lambda: cache.put("a", b"")):
        with pytest.raises(PermissionError, match=rf"{place} can be written by others \(mode {mode:o}\).*chmod 700"):
            use()
    assert list(place.iterdir()) == []


def test_a_directory_of_somebody_else_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put("a", b"one")
    owner = place.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(PermissionError, match=f"{place} belongs to user {owner}, and this process to user {owner + 1}"):
        cache.get("a")


def test_a_directory_that_others_can_replace_is_refused(place: Path) -> None:
    cache.put("a", b"one")
    place.parent.chmod(0o777)
    with pytest.raises(PermissionError, match=f"can be replaced by others, who can write {place.parent} "):
        cache.get("a")
    place.parent.chmod(0o1777)  # as /tmp is: nobody can rename what belongs to others
    assert cache.get("a") == place / "a"


def test_a_directory_that_cannot_be_made(place: Path) -> None:
    place.parent.write_text("a file")
    with pytest.raises(OSError, match=f"{place} cannot be made .*FASTTRAIN_CACHE_DIR"):
        cache.get("a")


def test_a_failed_write_leaves_the_old_entry(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put("a", b"one")

    def full(*paths: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        cache.put("a", b"two")
    assert [path.name for path in place.iterdir()] == ["a"]
    assert cache.get("a") == place / "a"


def test_where_it_usually_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.usual() == "/home/somebody/.cache/fasttrain"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.usual() == "/home/somebody/.cache/fasttrain"
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache.usual() == "/caches/fasttrain"
