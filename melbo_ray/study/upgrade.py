"""Resuming runs of releases that evaluated a whole chain in one unit, of the kind `whole`."""

from melbo_ray.cluster.backlog import Backlog
from melbo_ray.evals.catalog import EVALUATIONS
from melbo_ray.runs.manifest import Manifest
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.work_unit import WHOLE, Unit, cover, covers


def upgrade(run: Run, manifest: Manifest, backlog: Backlog) -> None:
    """Have the evaluations of a concept that such a unit covers covered by their shares, or else due anew.

    They stay as they are if the chain has ended at the length that they cover and nothing failed. Otherwise their rows
    are deleted, since shares would not replace them. Killed at any point, the next call completes this.
    """
    fresh = [unit for unit in run.fresh() if unit.concept == backlog.concept and unit.kind == WHOLE]
    failed = {row["evaluation"] for row in run.read("failures", backlog.concept).to_pylist()}
    for name in [name for name, evaluation in EVALUATIONS.items() if evaluation.scope == WHOLE]:
        left = [unit for unit in fresh if unit.evaluation == name]
        if not left and WHOLE not in manifest.done.get(backlog.concept, {}).get(name, {}):
            continue
        covered = covers(manifest.done, Unit(backlog.concept, name, WHOLE, 1, backlog.found))
        if covered and backlog.stop_reason is not None and not left and name not in failed:
            _adopt(manifest, backlog, name)
        else:
            _withdraw(run, manifest, backlog, name, left)


def _adopt(manifest: Manifest, backlog: Backlog, name: str) -> None:
    for share in EVALUATIONS[name].shares:
        for item in share.items(backlog.found):
            for done in (manifest.done, backlog.done):
                cover(done, Unit(backlog.concept, name, share.kind(backlog.found), item, item))


def _withdraw(run: Run, manifest: Manifest, backlog: Backlog, name: str, fresh: list[Unit]) -> None:
    # First of all the manifest stops to vouch for the rows, and last of all it forgets that there were such units.
    kinds = manifest.done.setdefault(backlog.concept, {})
    kinds[name] = {WHOLE: []}
    run.write_manifest(manifest)
    tables = [f"{table}/concept={backlog.concept}" for table in (*EVALUATIONS[name].tables, "failures")]
    parts = [part for table in tables for part in run.storage.names(table)]
    own = (f"part-{name}-", f"part-{name}.")
    run.storage.delete([*(unit.name for unit in fresh), *(p for p in parts if p.rpartition("/")[2].startswith(own))])
    del kinds[name]
    backlog.done.get(backlog.concept, {}).pop(name, None)
    run.write_manifest(manifest)
