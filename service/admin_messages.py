"""What the addresses under /v1/admin take and answer."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from service.messages import VersionNumber


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class DefaultRequest(_Message):
    version: VersionNumber | None = Field(
        default=None, description="one that serves; null: the highest one from now on"
    )


class RollbackRequest(_Message):
    version: VersionNumber | None = Field(
        default=None, description="the default, which is bad; another one is a conflict"
    )


class VersionStatus(_Message):
    version: int
    digest: str = Field(description="the sha256 of its manifest.json")
    state: Literal["serving", "quarantined"]
    provider: str | None = Field(default=None, description="where the graphs of one that serves run")
    reason: str | None = Field(default=None, description="why one does not serve")


class ModelStatus(_Message):
    """One model, and all versions of it that were taken in or refused."""

    name: str
    ready: bool
    unloaded: bool
    default: int | None = Field(description="the version for requests that name none")
    pinned: bool = Field(description="whether that was set, and newer versions do not change it")
    last_good: int | None = Field(
        default=None, description="of the status: the last version that answered those, over restarts with `state`"
    )
    versions: list[VersionStatus] = Field(description="highest first")


class WorkerStatus(_Message):
    number: int
    pid: int
    uptime_seconds: float
    memory_bytes: int = Field(description="resident; pages that workers share count in each")


class Status(_Message):
    models: list[ModelStatus]
    workers: list[WorkerStatus]
    settings: dict[str, bool | int | float | str | None] = Field(description="those that say what is served, and how")
