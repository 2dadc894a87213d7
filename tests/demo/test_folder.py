"""A demo takes the place of the one before it when it has finished, and not before."""

from engrid.demo.folder import begin, give_up, settle


def write(folder, mark):
    for name in ("checkpoint/step-1/weights", "result.json", "corpus-1/train.npy"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            (folder / name).write_text(mark, encoding="utf-8")


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_demo_that_is_cut_off_leaves_all_but_a_corpus_as_it_was(tmp_path):
    write(tmp_path, "first")
    before = contents(tmp_path)
    work = begin(tmp_path)
    write(work, "second")
    (work / "corpus-2").mkdir()
    assert contents(work)["corpus-1/train.npy"] == "first", "what was learned is not learned again"
    assert {name: each for name, each in contents(tmp_path).items() if "unfinished" not in name} == before
    give_up(tmp_path)
    assert contents(tmp_path) == before
    assert (tmp_path / "corpus-2").is_dir()


def test_a_demo_that_died_is_cleared_away_by_the_next_which_takes_its_place(tmp_path):
    write(tmp_path, "first")
    write(begin(tmp_path), "died")
    work = begin(tmp_path)
    write(work, "second")
    assert settle(work, tmp_path) == tmp_path / "checkpoint"
    assert contents(tmp_path) == {
        "checkpoint/step-1/weights": "second",
        "result.json": "second",
        "corpus-1/train.npy": "first",
    }
