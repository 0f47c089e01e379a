"""`run.json`: what stands on disk, and what is made of what cannot be read."""

import pytest

from melbo_ray.errors import UserError
from melbo_ray.runs.manifest import Manifest, Outcome, Packed

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
