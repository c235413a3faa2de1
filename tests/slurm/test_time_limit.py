"""A real time limit: SLURM itself sends the signal, and starts the job again."""

import pytest
from watching import FINISHED

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_a_job_whose_time_is_up_saves_and_goes_on_in_a_new_life(slurm, timed_job):
    """SLURM looks about twice a minute and knows whole minutes; the job waits for it, paused."""
    timed_job.until(lambda: any(life.reason == "SIGUSR1" for life in timed_job.lives()))
    (timed_job.run_dir / "control/pause").unlink()
    job = slurm.wait(timed_job.job_id, *FINISHED, timeout_s=240)
    lives = timed_job.lives()
    assert job["JobState"] == "COMPLETED", timed_job.project.log(timed_job.job_id)
    assert int(job["Restarts"]) == len(lives) - 1 >= 1
    assert [life.reason for life in lives] == ["SIGUSR1"] * (len(lives) - 1) + ["finished"]
    # the grace of a minute began before the limit of two
    assert lives[0].ended_s - lives[0].began_s < 125
    assert timed_job.steps() == list(range(1, 7))
