"""What differs between the clusters that the lab runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Size:
    """What a container reserves, and what it may use: Kubernetes quantities."""

    cpu: str
    memory: str
    cpu_limit: str
    memory_limit: str
    gpus: int = 0

    def resources(self) -> dict[str, Any]:
        gpu = {"nvidia.com/gpu": str(self.gpus)} if self.gpus else {}
        return {
            "requests": {"cpu": self.cpu, "memory": self.memory, **gpu},
            "limits": {"cpu": self.cpu_limit, "memory": self.memory_limit, **gpu},
        }


@dataclass(frozen=True)
class Profile:
    """What differs between clusters.

    head, worker   what the container of each such pod reserves and may use
    sidecar        the same for a job's submitter and the autoscaler
    slots          Ray's num-cpus of a worker: what replicas and tasks are counted against, not what they get
    image, pull    the server's image, and when the node fetches it
    redis_image    for ``redis=True``
    workers        worker pods
    storage_class  of the claim for checkpoints; None = the cluster's default
    access         its access mode: several nodes want ReadWriteMany
    storage        its size
    retire_s       how long the old Ray cluster stays after an upgrade to a new one, in seconds
    """

    name: str
    head: Size
    worker: Size
    sidecar: Size
    slots: int
    image: str = "bits-to-pods/server:dev"
    pull: Literal["IfNotPresent", "Never", "Always"] = "IfNotPresent"
    redis_image: str = "redis:7.4"
    workers: int = 1
    storage_class: str | None = None
    access: Literal["ReadWriteMany", "ReadWriteOnce"] = "ReadWriteMany"
    storage: str = "5Gi"
    retire_s: int = 120


_SIDECAR = Size("100m", "256Mi", "1", "1Gi")
_BASE = Profile(
    "base",
    head=Size("1", "2Gi", "2", "4Gi"),
    worker=Size("2", "3Gi", "4", "6Gi"),
    sidecar=_SIDECAR,
    slots=4,
)
PROFILES = {
    profile.name: profile
    for profile in (
        _BASE,
        # Two Ray clusters (an upgrade), the operator, CoreDNS and metrics-server fit 1.8 cores.
        Profile(
            "node",
            head=Size("200m", "768Mi", "2", "3Gi"),
            worker=Size("300m", "768Mi", "2", "5Gi"),
            sidecar=Size("50m", "128Mi", "1", "1Gi"),
            slots=4,
            pull="Never",
            redis_image="bits-to-pods/redis:dev",
            storage_class="node",
            storage="1Gi",
            retire_s=30,
        ),
        Profile(
            "kind",
            head=Size("500m", "1Gi", "2", "3Gi"),
            worker=Size("1", "1536Mi", "4", "5Gi"),
            sidecar=_SIDECAR,
            slots=4,
            access="ReadWriteOnce",  # all that kind's own storage class offers, and enough on one node
            retire_s=60,
        ),
        Profile(
            "gpu",
            head=_BASE.head,
            worker=Size("4", "8Gi", "8", "16Gi", gpus=1),
            sidecar=_SIDECAR,
            slots=8,
        ),
    )
}


def profile_named(profile: str | Profile) -> Profile:
    """The profile of that name. Raises ValueError that lists them."""
    if isinstance(profile, Profile):
        return profile
    if profile not in PROFILES:
        raise ValueError(f"no profile {profile!r}; there are {', '.join(PROFILES)}")
    return PROFILES[profile]
