"""A save of several ranks that fails on one of them."""

import subprocess
import sys
import threading

import pytest

from hift_ds.checkpoint import folder
from hift_ds.checkpoint.save import Save

# A process of its own: to its own locks a process is blind.
RANK_1 = """
import sys
from pathlib import Path
from hift_ds.checkpoint.save import Save
save = Save(Path(sys.argv[1]), "run", latest=True, without_frozen=False, keeps=False)
begun = save.begin_report(1)
print("writes", flush=True)
sys.stdin.readline()
save.report(1, begun, {}, None)
"""


def test_a_save_that_failed_on_one_rank_is_removed_when_the_others_have_ended_writing(tmp_path):
    """Removed earlier, the slower rank's files would be there again, in a folder that nobody removes."""
    save = Save(tmp_path, "run", latest=True, without_frozen=False, keeps=True)
    folder.begin(tmp_path, "run")
    save.report(0, save.begin_report(0), {}, OSError("No space left on device"))
    errors = []

    def conclude():
        try:
            save.conclude(2, {})
        except RuntimeError as error:
            errors.append(str(error))

    command = [sys.executable, "-c", RANK_1, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as rank_1:
        assert rank_1.stdout.readline() == "writes\n"
        thread = threading.Thread(target=conclude)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and save.place.is_dir(), "rank 1 still writes"
        rank_1.communicate("\n", timeout=20)
    thread.join(20)
    assert errors == ["rank 0 failed to save in the background: No space left on device"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failed", [(0,), (1,), (0, 1)])
def test_the_first_rank_s_error_is_the_one_that_is_said(tmp_path, failed):
    save = Save(tmp_path, "run", latest=True, without_frozen=False, keeps=True)
    folder.begin(tmp_path, "run")
    for rank in range(2):
        save.report(rank, save.begin_report(rank), {}, OSError("full") if rank in failed else None)
    with pytest.raises(RuntimeError, match=f"rank {failed[0]} failed"):
        save.conclude(2, {})
    assert list(tmp_path.iterdir()) == []
