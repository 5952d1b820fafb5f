"""The ranks of one job at work: the first one's engine, which tells the others each step, and what these do.

    first rank     EngineCore -> LeadingEngine.forward(step) -> message, and its own part of the step
    other ranks    follow(): message -> Engine.forward(step)

Every rank launches the same steps in the same order, and has the same tokens on its device. After an error on one rank
they would not: then the job ends. Knows processes, plans and engines. Does not know scheduling.
"""

import atexit
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch

from minisgl.config import EngineConfig
from minisgl.engine import Engine
from minisgl.errors import MinisglError
from minisgl.forward import Forward
from minisgl.kernels.launch import use_device
from minisgl.models.config import ModelConfig
from minisgl.parallel import ProcessGroup, start_processes, stop_processes
from minisgl.plan import CLOSE, Masks, Plan, PlanReader, PlanWriter, pack_masks
from minisgl.processes import FAILED, Followers, Meeting, is_of_torchrun, when_the_first_rank_ends
from minisgl.scheduler import Step
from minisgl.upload import Ints
from minisgl.watch import START_S, Watch

NEVER_S = 7 * 86400.0  # a rank may wait for requests as long; `Watch` finds those that hang


class LeadingEngine(Engine):
    """The first rank's engine. Starts the other ranks, or meets those of torchrun; MinisglError when it cannot, and
    with the rank and the cause when one fails later: then this engine can only be closed."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig, folder: Path) -> None:
        if torch.distributed.is_initialized():
            raise MinisglError(
                "this process is part of torch.distributed already: close its other LLM that has tp, or start a new "
                "process where one failed"
            )
        self._meeting = Meeting.join(config.tp) if is_of_torchrun() else Meeting.open(config.tp)
        self._writer = PlanWriter()
        self._limit_s = config.watchdog_s
        # On a CPU, ranks share the cores: threads that spin for work would take them from the rank that is waited for.
        self._threads = torch.get_num_threads()
        num_threads = max(1, self._threads // config.tp)
        self._followers = None if is_of_torchrun() else Followers(self._meeting, num_threads)
        self._watch = Watch(self._meeting, self._followers)
        self._in_step = True  # as the other ranks are
        self._on_cpu = config.device == "cpu"
        if self._on_cpu and not is_of_torchrun():  # which has set OMP_NUM_THREADS
            torch.set_num_threads(num_threads)
        atexit.register(self.close)
        try:
            with self._watch.busy(START_S, joining=True), self._together():
                self._meeting.announce({"config": asdict(config), "folder": str(folder.resolve())})
                group = _join_group(self._meeting, config, self._watch)
            with self._watch.busy(), self._together():
                super().__init__(config, model_config, folder, group)
        except BaseException:
            self.close()
            raise

    def watched(self) -> AbstractContextManager[None]:
        return self._watch.busy(self._limit_s)

    def check(self) -> None:
        self._watch.check()

    def on_hang(self, say: Callable[[str], object]) -> None:
        self._watch.say = say

    def forward(self, step: Step, *, masked: bool = False) -> Forward:
        with self._together():
            self.group.send(self._writer.write(step, masked=masked))
            return super().forward(step, masked=masked)

    def sample(self, forward: Forward, masks: Ints, mask_of: Ints) -> Forward:
        with self._together():
            self.group.send(pack_masks(masks, mask_of))
            return super().sample(forward, masks, mask_of)

    def close(self) -> None:
        """Let the other ranks end; those that cannot any more are killed."""
        atexit.unregister(self.close)
        self._watch.close()
        torch.set_num_threads(self._threads)
        if self._in_step and not self.closed:
            with suppress(RuntimeError):  # a rank is gone, and nobody has stepped since
                self.group.send(CLOSE)
            super().close()
            self.group.close()
            stop_processes()
        if self._followers:
            self._followers.wait() if self._in_step else self._followers.kill()
            self._followers = None
        if not self._in_step and self._on_cpu:  # a GPU may wait for the other ranks for ever: leave it alone
            super().close()
            stop_processes()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Around what all ranks do. Where it fails on this one, they are no longer in step."""
        if not self._in_step:
            raise MinisglError(f"this LLM is of no more use ({self._watch.failure}): make a new one")
        try:
            yield
        except BaseException as error:
            self._in_step = False
            if not isinstance(error, Exception) or (isinstance(error, MinisglError) and not self._watch.failure):
                raise
            cause = self._watch.explain(error)
            if self._followers:
                self._followers.kill()
            raise MinisglError(cause) from error


def follow(size: int) -> None:
    """Be one of the other ranks of `size` that hold a model, until the first one ends the job. Ends the process when
    anything fails."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first rank's to handle
    meeting = Meeting.join(size)
    watch = Watch(meeting)
    if is_of_torchrun():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the first rank may finish what runs
    else:
        when_the_first_rank_ends(lambda: watch.fail("rank 0 is gone"))
    job = meeting.await_job()
    if job is None:
        return
    try:
        folder, config = Path(job["folder"]), EngineConfig(**job["config"])
        group = _join_group(meeting, config, watch)
        engine = Engine(_of_rank(config, meeting), ModelConfig.from_folder(folder), folder, group)
        _follow_plans(engine, PlanReader())
        watch.close()
        engine.close()
        group.close()
        stop_processes()
    except Exception as error:
        watch.report(error)
        os._exit(FAILED)  # at once, whatever other threads and devices wait for


def _follow_plans(engine: Engine, reader: PlanReader) -> None:
    forward: Forward | None = None  # the one that waits for masks
    while (told := reader.read(engine.group.send(b""))) is not None:
        if isinstance(told, Plan):
            forward = engine.forward(told.step, masked=told.masked)
        elif isinstance(told, Masks):
            assert forward is not None
            engine.sample(forward, told.masks, told.mask_of)


def _join_group(meeting: Meeting, config: EngineConfig, watch: Watch) -> ProcessGroup:
    device = torch.device(_of_rank(config, meeting).device)
    use_device(device)
    start_processes(device.type, NEVER_S, meeting)
    group = ProcessGroup(device, config.tp, ordered=config.deterministic)
    watch.progress = lambda: group.num_exchanges
    return group


def _of_rank(config: EngineConfig, meeting: Meeting) -> EngineConfig:
    """The first rank's config on this rank's device."""
    return config if config.device == "cpu" else replace(config, device=f"cuda:{meeting.place.local_rank}")


if __name__ == "__main__":
    follow(int(os.environ["WORLD_SIZE"]))
