"""`run.json`: what stands on disk, and what is made of what cannot be read."""

import uuid

import pytest

from melbo_ray.errors import UserError
from melbo_ray.runs.manifest import Manifest, Outcome, Packed, RenderedPrompt
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.storage import StorageError

# As `jobs/ortho.py` has written it since schema version 2, shortened.
WRITTEN = """{
 "schema_version": 2,
 "run_id": "code",
 "created": "2026-11-24T12:59:19+00:00",
 "model": "smollm2",
 "revision": null,
 "fingerprint": null,
 "lower_fingerprint": "aa04",
 "seed": 0,
 "hardware": {
  "node": "cpu, 1 threads"
 },
 "checks": {
  "chain": {
   "node": {
    "slice": {
     "error": 4.0351886803e-07,
     "tolerance": 0.00034526698300124393,
     "compared": 46,
     "verdict": "exact",
     "reason": ""
    },
    "texts": {
     "error": 0.0,
     "tolerance": 0.0,
     "compared": 16,
     "verdict": "plain way",
     "reason": "<keys> are not kept"
    }
   }
  }
 },
 "prompts_rendered": {
  "code": {
   "training": {
    "text": "<|im_start|>user\\n¿Qué?[\\n1,\\n2]",
    "tokens": [ 1, 4093, 198 ]
   }
  }
 },
 "peak_memory": {
  "chain": 1012600832
 },
 "seconds": 71.20914387702942,
 "concepts": {
  "code": {
   "vectors": 24,
   "stop_reason": null
  },
  "alien": {
   "vectors": 0,
   "stop_reason": "min_norm",
   "max_abs_cos": null,
   "failures": 0
  }
 },
 "done": {
  "code": {
   "base": {
    "base": [
     [ 0, 0 ]
    ]
   },
   "chain": {
    "chain": []
   }
  }
 },
 "config": {
  "model": "smollm2",
  "radius": "auto",
  "an option of another release": 1
 },
 "definitions": {
  "code": {
   "name": "code",
   "held_out": {}
  }
 },
 "prompts": {
  "code": {
   "training": "¿Qué?"
  }
 },
 "status": "interrupted",
 "versions": {
  "python": "3.11.7"
 },
 "packed": {
  "chain": true,
  "evaluator": false
 },
 "updated": "2026-11-24T13:04:12+00:00"
}"""


def test_what_is_on_disk_is_the_same_to_the_byte_when_it_is_written_again():
    assert Manifest.decode(WRITTEN.encode(), "runs/code").encode().decode() == WRITTEN


def test_its_parts_are_typed():
    found = Manifest.decode(WRITTEN.encode(), "runs/code")
    assert found.packed == Packed(chain=True, evaluator=False)
    assert found.concepts["alien"] == Outcome(vectors=0, stop_reason="min_norm", max_abs_cos=None, failures=0)
    assert found.prompts_rendered["code"]["training"].tokens == [1, 4093, 198]


def test_what_another_release_noted_is_kept():
    written = WRITTEN.replace('00:00"\n}', '00:00",\n "weather": [\n  "fair"\n ]\n}')
    assert written != WRITTEN
    assert Manifest.decode(written.encode(), "runs/code").encode().decode() == written


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ("[]", "runs/code/run.json is not the manifest of a run"),
        (WRITTEN[:-9], "runs/code/run.json is not the manifest of a run"),
        (WRITTEN.replace('"schema_version": 2', '"schema_version": 1'), "runs/code has schema version 1, and this"),
        (WRITTEN.replace('"schema_version": 2', '"schema_version": 3'), "runs/code has schema version 3, and this"),
        (WRITTEN.replace('"vectors": 24', '"vectors": "many"'), "run: concepts.code.vectors: Input should be a valid"),
        (WRITTEN.replace("interrupted", "asleep"), "run: status: Input should be 'running', 'interrupted' or"),
    ],
)
def test_what_is_no_manifest_of_ours_is_one_line(written, complaint):
    with pytest.raises(UserError) as caught:
        Manifest.decode(written.encode(), "runs/code")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


# In storage


def manifest(status="running"):
    return Manifest(run_id="one", status=status)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"{", b'{"schema_version": 99}', b'{"schema_version": 2, "done": 1}']
)
def test_a_manifest_that_cannot_be_read_is_one_line(run, content):
    run.storage.put("run.json", content)
    with pytest.raises(UserError, match=r"run\.json|schema version 99") as caught:
        run.manifest()
    assert "\n" not in str(caught.value)


def test_token_ids_stand_on_one_line_and_no_text_changes(tmp_path):
    run = Run.open(f"{tmp_path}/one")
    told = manifest()
    told.prompts_rendered = {"code": {"training": RenderedPrompt(text="[\n 1,\n 2\n]", tokens=[1, 22, 333])}}
    told.config, told.done = {"none": []}, {"code": {"kl": {"chain": [[1, 8]]}}}
    run.write_manifest(told)
    found = run.manifest()
    assert found.model_dump(exclude={"updated"}) == told.model_dump(exclude={"updated"})
    assert b'"tokens": [ 1, 22, 333 ]\n' in (run.storage.get("run.json") or b"")


def test_a_driver_that_was_superseded_does_not_replace_the_manifest(run):
    newer = Run.open(run.storage.url)
    for state in ("running", "interrupted"):
        run.write_manifest(manifest(state))
    newer.manifest()
    newer.write_manifest(manifest("finished"))
    with pytest.raises(StorageError, match="another driver has written it"):
        run.write_manifest(manifest())
    assert newer.manifest().status == "finished"


@pytest.mark.parametrize("before", [[], ["running"]])
def test_a_manifest_that_arrives_late_changes_nothing(s3, monkeypatch, before):
    """The driver stalls between its look and its write, and another begins or goes on with the run."""
    url = f"s3://bucket/{uuid.uuid4().hex}/one"
    late, newer = Run.open(url), Run.open(url)
    for state in before:
        late.write_manifest(manifest(state))
    look, looks = late.storage.get, []

    def stalls(name):
        found = look(name)
        if not looks:
            newer.manifest()
            newer.write_manifest(manifest("finished"))
        looks.append(name)
        return found

    monkeypatch.setattr(late.storage, "get", stalls)
    with pytest.raises(StorageError, match="pre-conditions"):
        late.write_manifest(manifest())
    assert newer.manifest().status == "finished"
