"""The parts of the system's status that Control itself knows."""

from echovlm_ray.serving.cluster.settings import DEPLOYMENTS, expert_application
from echovlm_ray.serving.control.database_watch import DatabaseWatch
from echovlm_ray.serving.control.messages import problem_to_proto
from echovlm_ray.serving.control.parts import ControlParts
from protos import control_pb2
from router.errors import RolloutDatabaseError
from router.rollouts.answering import organ_problems


def wanted_applications(parts: ControlParts, *, remote: bool) -> list[str]:
    """The applications that should run, in the order in which status shows them; `remote`: with expert groups."""
    if not remote:
        return list(DEPLOYMENTS)
    try:
        snapshot = parts.store.snapshot()
        organs = [live.organ for live in snapshot.organs] + [rollout.organ for rollout in snapshot.in_flight]
    except RolloutDatabaseError:
        # What is served does not end with the database.
        current = parts.policies.current
        organs = [member.organ for member in current.stable.members]
        organs += [candidate.organ for candidate in current.candidates]
    return [*DEPLOYMENTS, *map(expert_application, dict.fromkeys(organs))]


def problems(parts: ControlParts) -> list[control_pb2.OrganProblem]:
    """The organs that cannot be answered as they should be, as the controller saw them last."""
    try:
        snapshot = parts.store.snapshot()
    except RolloutDatabaseError:
        # That it is lost is a notice of its own.
        return []
    controller = parts.controller
    found = organ_problems(snapshot, controller.views, controller.load_failures())
    return [problem_to_proto(problem, parts.catalogue.version) for problem in found]


def notices(parts: ControlParts, database: DatabaseWatch) -> list[str]:
    """What an operator should know: a lost database, and Routers that apply another policy than the current one."""
    found = [database.problem] if database.problem else []
    applied, version = parts.fleet.policies(), parts.policies.current.version
    found += [
        f"router {replica} applies policy {policy or 'none'}, and the rollouts' database says policy {version}"
        for replica, policy in sorted(applied.items())
        if policy != version
    ]
    return found
