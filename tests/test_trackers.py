"""Trackers by name: those that are there, where they keep the run, and the result in them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from adept_ds.config.run import LoggingConfig
from adept_ds.errors import UserError
from adept_ds.storage.trackers import address, check_trackers, start_tracker, upload


class Notebook(GeneralTracker):
    """A tracker of the user's own, registered with Accelerate."""

    name = "notebook"
    requires_logging_directory = False

    def __init__(self, project: str) -> None:
        super().__init__(_blank=True)
        self.project, self.settings, self.files = project, {}, {}

    @property
    def tracker(self) -> Any:
        return SimpleNamespace(url=f"https://notebook.example/{self.project}/1")

    def start(self) -> None:
        if self.project == "locked":
            raise ConnectionError("nobody is logged in")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log_artifacts(self, folder: str, name: str) -> None:
        self.files[name] = sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "notebook", Notebook)


def logging(*trackers: str, **settings: Any) -> LoggingConfig:
    return LoggingConfig(trackers=trackers, **settings)


def test_known_trackers_pass():
    check_trackers(logging("tensorboard"))
    check_trackers(logging())


@pytest.mark.usefixtures("notebook")
def test_a_tracker_that_is_registered_with_accelerate_passes():
    check_trackers(logging("notebook", upload_result=True))


def test_an_unknown_tracker_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"logging\.trackers has 'tensorbord', .*did you mean 'tensorboard'"):
        check_trackers(logging("tensorbord"))


def test_a_tracker_that_is_not_installed_is_refused():
    missing = [kind for kind in LoggerType if kind not in (*get_available_trackers(), LoggerType.ALL)]
    if not missing:
        pytest.skip("every tracker that Accelerate knows is installed")
    with pytest.raises(UserError, match=f"'{missing[0].value}', whose package is not installed"):
        check_trackers(logging(missing[0].value))


@pytest.mark.parametrize("trackers", [(), ("tensorboard",)])
def test_a_result_that_no_tracker_takes_is_refused(trackers):
    with pytest.raises(UserError, match=r"logging\.upload_result is true, .*expected one of mlflow, wandb there"):
        check_trackers(logging(*trackers, upload_result=True))


@pytest.mark.usefixtures("notebook")
def test_a_tracker_is_told_the_settings_and_has_an_address(tmp_path):
    tracker = start_tracker("notebook", logging(project="p"), tmp_path, {"train.seed": 1})
    assert tracker.settings == {"train.seed": 1}
    assert address(tracker) == "https://notebook.example/p/1"


def test_the_address_of_tensorboard_is_its_folder(tmp_path):
    tracker = start_tracker("tensorboard", logging(), tmp_path, {})
    assert address(tracker) == str(tmp_path / "tensorboard")
    tracker.finish()


@pytest.mark.usefixtures("notebook")
def test_a_tracker_that_cannot_be_begun_is_told(tmp_path):
    with pytest.raises(
        UserError, match=r"logging\.trackers has 'notebook', which cannot be begun: nobody is logged in"
    ):
        start_tracker("notebook", logging(project="locked"), tmp_path, {})


@pytest.mark.usefixtures("notebook")
def test_files_go_to_the_trackers_that_take_them(tmp_path):
    result = tmp_path / "best-step-00000001"
    result.mkdir()
    (result / "adapter_config.json").touch()
    tracker = start_tracker("notebook", logging(), tmp_path, {})
    assert upload(tracker, result, "run-best")
    assert tracker.files == {"run-best": ["adapter_config.json"]}
    board = start_tracker("tensorboard", logging(), tmp_path, {})
    assert not upload(board, result, "run-best")
    board.finish()
