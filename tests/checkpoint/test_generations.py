"""Numbered saves: one rename commits, a number is given once, nobody's save is dropped unseen."""

import os
import threading

import pytest

import fisher_jax as fj
from fisher_jax._support.errors import ConflictError, InputError
from fisher_jax.checkpoint import generations


def incoming(path, content):
    folder = generations.begin(path)
    (folder / "content").write_text(content)
    return folder


def content(path):
    return generations.place_of(path, generations.revision(path)).joinpath("content").read_text()


def test_saves_are_numbered_and_the_last_one_stays(tmp_path):
    path = tmp_path / "state"
    assert generations.revision(path) == 0
    assert [generations.commit(incoming(path, str(i)), path) for i in (1, 2, 3)] == [1, 2, 3]
    assert (content(path), [x.name for x in path.iterdir()]) == ("3", ["00000003"])


def test_a_save_after_another_one_than_the_newest_is_refused_and_left(tmp_path):
    path = tmp_path / "state"
    generations.commit(incoming(path, "a"), path, after=0)
    mine = incoming(path, "mine")
    generations.commit(incoming(path, "b"), path, after=1)
    with pytest.raises(ConflictError, match=r"at save 2.*follows save 1"):
        generations.commit(mine, path, after=1)
    assert isinstance(ConflictError("x"), InputError)
    assert (content(path), mine.joinpath("content").read_text()) == ("b", "mine")


@pytest.mark.parametrize(("others", "after"), [(1, None), (1, 1), (2, None), (2, 1)])
def test_saves_committed_between_a_look_and_the_rename_are_kept(tmp_path, others, after):
    """``others`` savers come first, at the very moment of the rename."""
    path = tmp_path / "state"
    generations.commit(incoming(path, "first"), path)
    mine, ahead = incoming(path, "mine"), [incoming(path, f"other {i}") for i in range(others)]

    def late(source, target):
        while ahead:
            generations.commit(ahead.pop(0), path)
        os.rename(source, target)

    if after is None:
        assert generations.commit(mine, path, rename=late) == 2 + others
        assert content(path) == "mine"
    else:
        with pytest.raises(ConflictError):
            generations.commit(mine, path, after, rename=late)
        assert content(path) == f"other {others - 1}"


def test_of_many_savers_after_one_save_one_succeeds(tmp_path):
    path = tmp_path / "state"
    for round_number in range(10):
        folders = [incoming(path, str(i)) for i in range(8)]
        won = []

        def save(i, folders=folders, after=round_number, won=won):
            try:
                generations.commit(folders[i], path, after)
            except ConflictError:
                generations.discard(folders[i])
            else:
                won.append(str(i))

        threads = [threading.Thread(target=save, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [content(path)]
        assert generations.revision(path) == round_number + 1


def test_what_dead_savers_left_is_removed_and_a_live_saver_keeps_its_folder(tmp_path):
    path = tmp_path / "state"
    live = incoming(path, "live")
    dead = path / live.name.replace(f"-{os.getpid()}-", "-999999999-").replace("live", "")
    dead.mkdir()
    stranger = path / ".incoming-1-elsewhere-abc"
    stranger.mkdir()
    old = path / ".incoming-2-elsewhere-abc"
    old.mkdir()
    os.utime(old, (0, 0))
    (path / ".dropped-x").mkdir()
    generations.commit(incoming(path, "x"), path)
    assert {x.name for x in path.iterdir()} == {live.name, stranger.name, "00000001"}


def test_the_library_refuses_a_stale_save_and_says_so(tmp_path):
    first = fj.checkpoint.save(tmp_path / "state", {"a": 1})
    assert fj.checkpoint.save(tmp_path / "state", {"a": 2}, after=first) == first + 1
    with pytest.raises(ConflictError, match="at save 2"):
        fj.checkpoint.save(tmp_path / "state", {"a": 3}, after=first)
    assert fj.checkpoint.restore(tmp_path / "state") == {"a": 2}
    assert fj.checkpoint.describe(tmp_path / "state")["revision"] == 2
