"""How far a long call has come, for whoever waits for it."""

from __future__ import annotations

from collections.abc import Callable

Progress = bool | Callable[[int, int], object]


class reporter:
    """A function of how much is done: a progress bar, the caller's function, or nothing."""

    def __init__(self, op: str, progress: Progress, total: int, unit: str) -> None:
        self.op, self.progress, self.total, self.unit = op, progress, total, unit
        self.stop: Callable[[], None] | None = None

    def __enter__(self) -> Callable[[int], object]:
        if callable(self.progress):
            report, total = self.progress, self.total
            return lambda done: report(done, total)
        if not self.progress:
            return lambda done: None
        try:
            from rich.progress import Progress as Bar
        except ImportError as error:
            raise ImportError(f"{self.op}: progress=True needs rich: pip install fastgen-kernels[demo]") from error
        bar = Bar(*Bar.get_default_columns(), transient=True)
        bar.start()
        self.stop = bar.stop
        task = bar.add_task(self.unit, total=self.total)
        return lambda done: bar.update(task, completed=done)

    def __exit__(self, *exception: object) -> None:
        if self.stop is not None:
            self.stop()
