"""Two and four processes on gloo give the numbers and gradients of one, and wrong placements raise.

The processes of a size start once and run every check for it; each check is a result of its own here.
"""

import fcntl
import multiprocessing
import os
import subprocess
import sys

import parallel_checks
import pytest
import ranks
import sharding_checks
import training_checks

RESULTS = [(size, name) for name, (sizes, _) in ranks.CHECKS.items() for size in sizes]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The folder of the outcomes of a size, made by the first who asks, whichever worker of pytest it is."""
    common = tmp_path_factory.getbasetemp()
    common = common.parent if "PYTEST_XDIST_WORKER" in os.environ else common

    def folder_of(size: int):
        folder = common / f"ranks{size}"
        with (common / f"ranks{size}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                folder.mkdir()
                start(size, str(folder))
        return folder

    return folder_of


def start(size: int, folder: str) -> None:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(
        [parallel_checks.__name__, sharding_checks.__name__, training_checks.__name__]
    )  # imported once, not per process
    processes = [server.Process(target=run, args=(rank, size, folder)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(400)
        process.kill()


def run(rank: int, size: int, folder: str) -> None:
    ranks.run(rank, size, folder)  # here, so that a process that starts with it imports the checks


@pytest.mark.parametrize("size, name", RESULTS, ids=str)
def test_processes_are_one_process(outcomes, size, name):
    files = [outcomes(size) / f"{name}.{rank}" for rank in range(size)]
    texts = [file.read_text() if file.exists() else "not reached, an earlier check failed" for file in files]
    assert not any(texts), "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)


def test_checks_of_every_file_are_run():
    assert {name for _, name in RESULTS} >= {
        sharding_checks.chunk_over_batch_and_heads.__name__,
        parallel_checks.fsdp_model_is_the_model.__name__,
        training_checks.training_over_processes_is_training_in_one.__name__,
    }


def test_distributed_tensors_are_imported_on_demand():
    """They take a third of the time that importing torch takes."""
    code = "import sys, gdn2_ops; assert 'torch.distributed.tensor' not in sys.modules; import gdn2_ops.parallel"
    subprocess.run([sys.executable, "-c", code], check=True)
