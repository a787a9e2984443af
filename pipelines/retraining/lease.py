"""One operator at a time, by a Lease of Kubernetes.

The client of Kubernetes elects by a config map, and ends the process itself; kopf's peering pauses all operators of the
same priority. An operator that was replaced while it was cut off does no harm for a moment: each write of a status is
refused where another has written.
"""

import threading
import time
from datetime import UTC, datetime
from typing import Any

from components.core.base.errors import ClusterError
from components.core.base.kubernetes_api import kubernetes_errors

DURATION_S = 30
"""Time without a renewal after which another takes over, s."""
INTERVAL_S = DURATION_S / 5
"""Time between two renewals, s."""
CONFLICT, NOT_FOUND = 409, 404


class Lease:
    """The lease of the operator of a namespace.

    Args:
        namespace: of the lease.
        name: of the lease.
        holder: name of this process, unlike that of any other.
    """

    def __init__(self, namespace: str, name: str, holder: str) -> None:
        self._namespace, self._name, self._holder = namespace, name, holder
        self._seen: tuple[str, float] = ("", 0.0)

    def wait(self, interval_s: float = INTERVAL_S) -> None:
        """Wait until the lease is this process's."""
        while not self.hold():
            time.sleep(interval_s)

    def keep(self, ended: threading.Event) -> None:
        """Renew the lease until the event is set; return earlier where it is another's, or was not renewed in time."""
        renewed = time.monotonic()
        while not ended.wait(INTERVAL_S):
            try:
                if not self.hold():
                    return
                renewed = time.monotonic()
            except ClusterError:
                if time.monotonic() - renewed > DURATION_S - INTERVAL_S:
                    return

    def hold(self) -> bool:
        """Take or renew the lease; returns whether it is this process's now.

        A lease has run out where it has not changed for its duration by this machine's clock.

        Raises:
            ClusterError: the API server does not answer, or refuses.
        """
        from kubernetes.client import ApiException, CoordinationV1Api

        api = CoordinationV1Api()
        with kubernetes_errors():
            try:
                lease = api.read_namespaced_lease(self._name, self._namespace)
                if lease.spec.holder_identity not in (self._holder, "", None) and not self._has_run_out(lease):
                    return False
                lease.spec = self._spec(self._holder)
                api.replace_namespaced_lease(self._name, self._namespace, lease)
            except ApiException as error:
                if error.status == CONFLICT:
                    return False
                if error.status != NOT_FOUND:
                    raise
                return self._create(api)
        return True

    def release(self) -> None:
        """Give the lease to whoever waits for it."""
        from kubernetes.client import CoordinationV1Api

        api = CoordinationV1Api()
        with kubernetes_errors():
            lease = api.read_namespaced_lease(self._name, self._namespace)
            if lease.spec.holder_identity == self._holder:
                lease.spec = self._spec("")
                api.replace_namespaced_lease(self._name, self._namespace, lease)

    def _create(self, api: Any) -> bool:
        """Create the lease; returns whether nobody else has meanwhile."""
        from kubernetes.client import ApiException, V1Lease, V1ObjectMeta

        try:
            api.create_namespaced_lease(
                self._namespace, V1Lease(metadata=V1ObjectMeta(name=self._name), spec=self._spec(self._holder))
            )
        except ApiException as error:
            if error.status != CONFLICT:
                raise
            return False
        return True

    def _has_run_out(self, lease: Any) -> bool:
        version, now = lease.metadata.resource_version, time.monotonic()
        if self._seen[0] != version:
            self._seen = (version, now)
        return now - self._seen[1] > (lease.spec.lease_duration_seconds or DURATION_S)

    def _spec(self, holder: str) -> Any:
        from kubernetes.client import V1LeaseSpec

        return V1LeaseSpec(holder_identity=holder, lease_duration_seconds=DURATION_S, renew_time=datetime.now(UTC))
