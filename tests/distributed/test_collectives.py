"""An error on one rank is raised on all of them; no rank is left waiting in a collective."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from small_policy import make_policy

pytestmark = pytest.mark.distributed


def join() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")


def outcome(work):
    """The result of `work`, or the type and message of the exception that it raises."""
    try:
        return work()
    except Exception as error:
        return type(error).__name__, str(error)


def use_first_rank(rank: int):
    from megatron_g2rl.distributed.collectives import on_first_rank
    from megatron_g2rl.policy.checkpoint.checkpoints import CheckpointError
    from megatron_g2rl.rewards.results import RewardError

    def fail(error: Exception):
        def work():
            raise error

        return work

    join()
    disk = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/file")
    return [
        outcome(lambda: on_first_rank(lambda: ("from", rank))),
        outcome(lambda: on_first_rank(fail(RewardError("of the user")), "when")),
        outcome(lambda: on_first_rank(fail(KeyError("key")), "X cannot be read", CheckpointError)),
        outcome(lambda: on_first_rank(fail(disk), "X cannot be read", CheckpointError)),
        outcome(lambda: on_first_rank(fail(disk))),
        outcome(lambda: on_first_rank(fail(KeyError("key")))),
    ]


def test_the_first_rank_works_and_all_get_its_result_or_its_error(ranks):
    first, second = ranks(2, use_first_rank)
    disk = "[Errno 28] No space left on device: '/full/file'"
    common = [
        ("from", 0),
        ("RewardError", "of the user"),
        ("CheckpointError", "X cannot be read (KeyError: 'key')"),
        ("CheckpointError", f"X cannot be read (OSError: {disk})"),
        ("OSError", disk),
    ]
    assert first[:5] == second[:5] == common
    assert first[5] == second[5] == ("RuntimeError", "rank 0 (KeyError: 'key')")


def use_all_ranks(rank: int):
    from megatron_g2rl.distributed.collectives import broadcast, gather, gather_on_first_rank, on_all_ranks, scatter
    from megatron_g2rl.errors import UserError

    def fail_on(*failing: int):
        def work():
            if rank in failing:
                raise UserError(f"of rank {rank}")
            if rank == 2:
                raise ValueError("a fault")
            return rank

        return work

    join()
    return [
        gather(10 * rank),
        outcome(lambda: on_all_ranks(lambda: rank * rank)),
        outcome(lambda: on_all_ranks(fail_on(1))),
        outcome(lambda: on_all_ranks(fail_on())),
        outcome(lambda: on_all_ranks(fail_on(), "X cannot be read", UserError)),
        broadcast(rank, source=1),
        gather(gather_on_first_rank(rank)),
        gather(scatter([5, 6, 7] if rank == 0 else None)),
    ]


def test_every_rank_works_and_all_get_all_results_or_the_first_error(ranks):
    found = ranks(3, use_all_ranks)
    assert found[0] == found[1] == found[2]
    assert found[0] == [
        [0, 10, 20],
        [0, 1, 4],
        ("UserError", "of rank 1"),
        ("RuntimeError", "rank 2 (ValueError: a fault)"),
        ("UserError", "X cannot be read (ValueError: a fault)"),
        1,
        [[0, 1, 2], None, None],
        [5, 6, 7],
    ]


def create_model_below_a_file(rank: int, file: str):
    from megatron_g2rl.config.warm_start import WarmStart
    from megatron_g2rl.training.warm_start import warm_start

    return outcome(lambda: warm_start(WarmStart(output=f"{file}/model", policy=dict(device="cpu"))))


def test_a_warm_start_that_cannot_write_its_model_ends_every_rank(ranks, tmp_path):
    (tmp_path / "file").touch()
    first, second = ranks(2, create_model_below_a_file, str(tmp_path / "file"))
    assert first == second and first[0] == "UserError" and f"output={tmp_path}/file/model" in first[1]


def export_below_a_file(rank: int, folder: str, file: str):
    policy = make_policy(folder, dict(tensor_parallel=2))
    failed = outcome(lambda: policy.save_hf(Path(file, "model")))
    return failed, sum(1 for _ in policy.hf_weights())


def test_an_export_that_cannot_be_written_ends_every_rank_and_leaves_them_in_step(ranks, model_folder, tmp_path):
    (tmp_path / "file").touch()
    first, second = ranks(2, export_below_a_file, model_folder("qwen3", True), str(tmp_path / "file"))
    assert first == second and first[0][0] == "NotADirectoryError" and str(tmp_path / "file") in first[0][1]
    assert first[1] > 1


def open_evaluations(rank: int, path: str):
    from megatron_g2rl.config import Config
    from megatron_g2rl.evaluation.periodic import PeriodicEvaluation

    join()
    config = Config(model={"path": "m"}, data={"source": "d"}, evaluation={})
    return outcome(lambda: PeriodicEvaluation(config, None, Path(path), 0))


def test_results_of_evaluations_that_cannot_be_opened_end_every_rank(ranks, tmp_path):
    (tmp_path / "file").touch()
    first, second = ranks(2, open_evaluations, str(tmp_path / "file" / "evaluation.jsonl"))
    assert first == second and first[0] in ("NotADirectoryError", "FileExistsError")
