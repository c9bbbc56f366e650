"""Works that lose something when they are killed, to show that the harness finds it: python -m tests.integration.careless"""

import json

from benchmarks.file_kills import Work, interrupt_all, with_faults


def in_place(folder, did):
    """Rewrites a file in place, and finds an empty one after a kill."""
    file = folder / "numbers.json"
    numbers = json.loads(file.read_text()) if file.exists() else []
    file.write_text(json.dumps([*numbers, 1][:3]))


def orphan(folder, did):
    """Gives its temporary file a name that no later run knows."""
    import os

    (folder / f"{os.getpid()}.partial").write_text("whole")
    (folder / f"{os.getpid()}.partial").rename(folder / "file.txt")


def forgetful(folder, did):
    """Finishes a part, and deletes what tells a later run so."""
    part = folder / "part"
    if not part.exists():
        part.mkdir()
        did("part")
    part.rmdir()
    (folder / "end").mkdir(exist_ok=True)


def careful(folder, did):
    (folder / "file.partial").write_text("whole")
    (folder / "file.partial").rename(folder / "file.txt")


if __name__ == "__main__":
    with_faults()
    works = [Work(run.__name__, run, lambda _: None) for run in (in_place, orphan, forgetful, careful)]
    print(json.dumps(interrupt_all(works)))
