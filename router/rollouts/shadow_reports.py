"""The reports of shadows in the database."""

from collections.abc import Iterable

from sqlalchemy import Connection, insert, select, update

from router.rollouts import schema
from router.rollouts.shadow import ShadowRecord, ShadowReport


def report_of(connection: Connection, rollout_id: str) -> ShadowReport:
    """A rollout's report; an empty one before the first comparison."""
    query = select(schema.shadow_reports.c.report).where(schema.shadow_reports.c.rollout_id == rollout_id)
    stored = connection.execute(query).scalar()
    return ShadowReport() if stored is None else ShadowReport.model_validate_json(stored)


def add_records(connection: Connection, rollout_id: str, records: Iterable[ShadowRecord], now: float) -> ShadowReport:
    """Adds comparisons to a rollout's report, inside a writing transaction.

    Returns:
        The report with them.
    """
    table = schema.shadow_reports
    report = report_of(connection, rollout_id).with_records(records)
    values = {"report": report.model_dump_json(), "updated_at": now}
    changed = connection.execute(update(table).where(table.c.rollout_id == rollout_id).values(**values))
    if changed.rowcount == 0:
        connection.execute(insert(table).values(rollout_id=rollout_id, **values))
    return report
