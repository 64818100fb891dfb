"""Freed memory kept for the next step, as the operating system sees it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hfbench.machine.allocator import can_keep_freed_memory

# In a process of its own: in the heap of a long one a block may fit into a hole.
PROGRAM = """
import json, resource
import numpy as np
from hfbench.machine.allocator import keep_freed_memory, keeps_freed_memory

def page_faults(mebibytes):
    found = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.full(mebibytes * 2**17, 1.0)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found)

found = {"before": page_faults(256)}
keep_freed_memory(True)
found |= {"kept": page_faults(256), "keeps": keeps_freed_memory()}
keep_freed_memory(False)
found |= {"after": page_faults(512), "keeps_after": keeps_freed_memory()}
print(json.dumps(found))
"""


@pytest.mark.skipif(not can_keep_freed_memory(), reason="needs Linux with glibc")
def test_freed_memory_is_asked_for_again_unless_it_is_kept() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert (found["keeps"], found["keeps_after"]) == (True, False)
    assert found["kept"] == 0
    # A page of 4 KiB or, where the system uses them, of 2 MiB.
    assert found["before"] >= 128
    assert found["after"] >= 256
